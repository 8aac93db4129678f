"""Tables of docs/linear.md: what rounding costs, ways to a product, what is not a product.

    python bench/linear_tables.py bench/results/linear-tables.json

One thread, in turn, process CPU clock; `python bench/page.py` puts them into the page.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

# Explicit, so that it also works where PYTHONSAFEPATH keeps the script's folder off the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import linear
import machine
import oracle_f64
import timing
import torch
from torch import Tensor

from fusedkl import linear_products, reference
from fusedkl.linear_products import Products, bf16_multipliers

TOKENS, VOCABULARY, HIDDEN = 512, 4096, 1024
BLOCK = 32  # tokens whose whole rows of logits a memory of tens of MiB holds
NOISES = (1e-3, 1e-2, 1e-1, 1.0)


def candidates(hidden: Tensor, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Name -> hidden weight^T; both are bfloat16."""
    wide = hidden.float(), weight.float()
    products = Products(hidden, False, hidden.shape[1])
    out = torch.empty(hidden.shape[0], weight.shape[0])

    def twice() -> Tensor:
        first = torch.mm(hidden, weight.t())
        rest = torch.addmm(first, hidden, weight.t(), beta=-1)
        return first.float() + rest.float()

    def multiplied() -> Tensor:
        with bf16_multipliers():
            return torch.mm(wide[0], wide[1].t(), out=out)

    def of_blocks() -> Tensor:
        for at in range(0, len(hidden), BLOCK):
            products.logits(out[at : at + BLOCK], hidden[at : at + BLOCK], weight)
        return out

    return {
        "bfloat16 in and out": lambda: hidden @ weight.t(),
        "float32, operands widened": lambda: hidden.float() @ weight.float().t(),
        "bfloat16 twice: the product, and what its rounding left": twice,
        "float32 by bfloat16 multipliers, operands widened by blocks (the default)": lambda: (
            products.logits(out, hidden, weight)
        ),
        "the same without the widening": multiplied,
        f"the same with it, {BLOCK} tokens at a time": of_blocks,
    }


def measure_products(
    rounds: int = 9, sizes: tuple[int, int, int] = (TOKENS, VOCABULARY, HIDDEN)
) -> list[dict[str, Any]]:
    """GFLOP/s of each candidate, and its largest error over the largest logit."""
    tokens, vocabulary, width = sizes
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).bfloat16()
    weight = (torch.randn(vocabulary, width, generator=generator) * (3 / width**0.5)).bfloat16()
    exact = hidden.double() @ weight.double().t()
    work = 2 * tokens * vocabulary * width / 1e9
    ways = candidates(hidden, weight)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, product in ways.items():
            taken[name].append(work / timing.sample(timing.Step(product), timing.CPU))
    found = []
    for name, product in ways.items():
        error = float((product().double() - exact).abs().max() / exact.abs().max())
        speed = timing.Spread.of(taken[name][1:])  # the first one warms up
        found.append(
            {
                "name": name,
                "gflops": speed.median,
                "low": speed.low,
                "high": speed.high,
                "error": error,
            }
        )
    return found


def measure_errors(tokens: int = 256, vocabulary: int = 8192) -> list[dict[str, float]]:
    """Relative errors of the mean and of d hidden, in bfloat16, by the size of the divergence.

    "fast" as on a machine with 16-bit products, on every machine.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 256, generator=generator)
    weight = (torch.randn(vocabulary, 256, generator=generator) * (3 / 16)).bfloat16()
    rows = []
    for noise in NOISES:
        moved = weight.float() + noise / 16 * torch.randn(weight.shape, generator=generator)
        given = linear.Heads(hidden.bfloat16(), moved.bfloat16(), hidden.bfloat16(), weight)
        names = linear.Heads.__dataclass_fields__
        exact = linear.Heads(*(getattr(given, name).double() for name in names))
        with torch.no_grad():
            truth = float(linear.divergence_f64(exact))
        slope = linear.gradients(exact, linear.divergence_f64)[0]
        row = {"kl": truth}
        for label, precision in linear.PRECISIONS.items():
            call = functools.partial(linear.ours, precision=precision)
            with mock.patch.object(linear_products, "multiplied_natively", return_value=True):
                with torch.no_grad():
                    value = float(call(given))
                found = linear.gradients(given, call)[0]
            row[f"value {label}"] = abs(value - truth) / truth
            row[f"d hidden {label}"] = oracle_f64.relative_l2(found.flatten(), slope.flatten())
        rows.append(row)
    return rows


def measure_costs(rows: int = TOKENS, rounds: int = 7) -> list[dict[str, Any]]:
    """Of what a forward does beside its products, in microseconds, in cache."""
    ops = torch.ops.fusedkl

    def least(step: Callable[[], object], calls: int) -> float:
        found = [timing.sample(timing.Step(step), timing.CPU, calls) for _ in range(rounds)]
        return min(found[1:]) * 1e6

    def row_stats(tokens: int, width: int) -> Callable[[], object]:
        x = 3 * torch.randn(tokens, width)
        y = x + 0.05 * torch.randn(tokens, width)
        given = (x, y, None, ["forward_kl"], None, None, None, None, None, "cpu")
        return lambda: ops.row_stats(*given)

    short, long = (least(row_stats(rows, width), 10) / rows for width in (64, 4096))
    logit = (long - short) / (4096 - 64)
    parts = torch.zeros(9, rows, len(reference.STATE), dtype=torch.float64)
    merged = least(lambda: ops.merge_states(parts, [], None, "cpu"), 10)
    engine = linear.engine_of(linear.inputs(linear.make(rows, VOCABULARY, 8), False))
    tile = next(engine.columns())
    return [
        {"name": "a pair of logits, ns", "value": logit * 1e3},
        {"name": "a row of a tile, before its first logit, us", "value": short - 64 * logit},
        {"name": "its state merged, us", "value": merged / len(parts) / rows},
        {"name": "a call of a row kernel, one row of 8, us", "value": least(row_stats(1, 8), 100)},
        {
            "name": "the two products of a tile, one token, 8 entries, H = 8, us",
            "value": least(lambda: engine.logits(slice(0, 1), slice(tile.start, 8)), 100),
        },
    ]


def section(content: dict[str, Any]) -> str:
    """The Markdown of the tables."""
    columns = ("value default", "value fast", "d hidden default", "d hidden fast")
    lines = [f"| KL | {' | '.join(columns)} |", "|---" * 5 + "|"]
    for row in content["errors"]:
        lines.append("| " + " | ".join(f"{row[name]:.1e}" for name in ("kl", *columns)) + " |")
    lines += ["", "| product of bfloat16 | GFLOP/s (10 to 90%) | error, of the largest logit |"]
    lines += ["|---|---|---|"]
    for row in content["products"]:
        speed = f"{row['gflops']:.0f} ({row['low']:.0f} to {row['high']:.0f})"
        lines.append(f"| {row['name']} | {speed} | {row['error']:.0e} |")
    lines += ["", "| not a product | |", "|---|---|"]
    lines += [f"| {row['name']} | {row['value']:.3g} |" for row in content["costs"]]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    out = Path(arguments[0])
    content = {
        "schema": 1,
        "command": f"python bench/linear_tables.py {out}",
        "commit": machine.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "isa": machine.instruction_set(),
        "versions": machine.versions(),
        "load": machine.load(),
        "errors": measure_errors(),
        "products": measure_products(),
        "costs": measure_costs(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(section(content))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
