"""The one instruction of the Triton kernels that no interpreter runs: its text, run by hand."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, which an interpreting process cannot", allow_module_level=True)

from bench_modules import static_cases

from fusedkl.kernels import formulas


def run(text: str, arguments: list[np.float32]) -> list[float]:
    """PTX of `mov.b64` and `fma.rn.f32x2`: outputs $0 and $1, arguments from $2 on."""
    pairs: dict[str, list[float]] = {}
    numbers = {f"${i + 2}": float(value) for i, value in enumerate(arguments)}
    for line in re.findall(r"^(?:mov|fma).*;$", text, re.M):
        operation, rest = line.rstrip(";").split(" ", 1)
        operands = re.findall(r"\{[^}]*\}|\w+", rest)
        if operation == "mov.b64":
            to, source = operands
            if source.startswith("{"):
                pairs[to] = [numbers[name] for name in re.findall(r"\$\d", source)]
            else:
                names = re.findall(r"\$\d", to)
                numbers |= dict(zip(names, pairs[source], strict=True))
        else:
            assert operation == "fma.rn.f32x2"
            to, a, b, c = operands
            # exact in float64 for these arguments, then rounded once
            pairs[to] = [
                float(np.float32(x * y + z))
                for x, y, z in zip(pairs[a], pairs[b], pairs[c], strict=True)
            ]
    return [numbers["$0"], numbers["$1"]]


def wanted(v: list[np.float32]) -> list[float]:
    return [float(np.float32(float(v[i]) * float(v[2 + i]) + float(v[4 + i]))) for i in (0, 1)]


def test_two_multiply_adds_of_the_right_registers() -> None:
    text = formulas._PAIR.value
    given = [np.float32(x) for x in (1.5, -2.25, 3.125, 0.1, -7.0, 1e-3)]
    assert run(text, given) == wanted(given)
    for wrong in (
        text.replace("{$2, $3}", "{$3, $2}"),
        text.replace("{$6, $7}", "{$4, $5}"),
        text.replace("a, a, b, c", "a, a, c, b"),
        text.replace("{$0, $1}", "{$1, $0}"),
    ):
        assert wrong != text and run(wrong, given) != wanted(given)


@pytest.mark.slow
def test_it_is_used_where_the_architecture_has_it() -> None:
    _, call = static_cases.triton_calls()["forward_kl"]
    for architecture, has in ((90, False), (100, True)):
        with static_cases.capture.capture(f"cuda:{architecture}") as launches:
            call()
        sweep = next(launch for launch in launches if launch.name == "sweep_pair")
        assert ("mov.b64 a, {" in sweep.compiled.asm["ptx"]) == has
