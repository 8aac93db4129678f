"""The scripts of examples/dropin: the same losses plain, under patch() and under enable()."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kl_div_cases import needs_kernel
from torch._inductor.utils import fresh_cache

import fusedkl
import fusedkl.deferred_kl as deferred_kl

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "dropin"
NAMES = ["compiled", "distillation", "from_import", "hand_written", "kldivloss", "rlhf_penalty"]
# How many kl_div of a step run fused under patch().
FUSED = {"compiled": 0, "hand_written": 0}

pytestmark = [
    needs_kernel,
    pytest.mark.usefixtures("compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    # Dynamo's own look at the .grad of logits that come from a module.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
]


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in ("toy", *NAMES):
        sys.modules.pop(name, None)


def script(name: str) -> Any:
    return importlib.import_module(name)


def test_these_are_all_and_none_knows_fusedkl() -> None:
    files = {file.stem: file.read_text() for file in FOLDER.glob("*.py")}
    assert sorted(files) == sorted([*NAMES, "toy"])
    assert [name for name, text in files.items() if "fusedkl" in text] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_same_losses_under_patch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = []
    sources = deferred_kl._sources
    monkeypatch.setattr(deferred_kl, "_sources", lambda *plan: fused.append(1) or sources(*plan))
    module = script(name)
    plain = module.main(steps=4)
    assert len(set(plain)) == 4 and fused == []
    with fusedkl.patch():
        patched = module.main(steps=4)
    assert patched == pytest.approx(plain, rel=1e-5)
    assert len(fused) == 4 * FUSED.get(name, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compiled"])
def test_the_same_losses_with_the_compilers_pass(name: str) -> None:
    module = script(name)
    # What comes out of the cache on disk has no graph to be read, and no entry in the report.
    plain = module.main(steps=3)
    torch.compiler.reset()
    fusedkl.inductor.report(clear=True)
    with fusedkl.inductor.enable(), fresh_cache():
        rewritten = module.main(steps=3)
    assert rewritten == pytest.approx(plain, rel=1e-5)
    assert len(fusedkl.inductor.report(clear=True).rewritten) == 1
