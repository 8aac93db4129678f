"""`mypy --strict` of a script that uses the installed package: what its users are told."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from building import build, checkout, run

pytestmark = pytest.mark.full

RIGHT = """
import fusedkl
import fusedkl.inductor
import fusedkl.integrations.transformers
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

x = torch.randn(2, 3, 50, requires_grad=True)
y = torch.randn(2, 3, 50)
ids = torch.randint(50, (2, 3))
mask = torch.ones(2, 3, dtype=torch.bool)

assert_type(fusedkl.forward_kl(x, y), Tensor)
assert_type(fusedkl.divergence(x, y, "jsd", beta=0.1, mask=mask, reduction="mean"), Tensor)
assert_type(fusedkl.distillation_loss(x, y, ids, temperature=2.0, ce_weight=0.3), Tensor)
assert_type(fusedkl.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="batchmean"), Tensor)
stats = fusedkl.token_stats(x, y, ids, fields=("logprob", "reverse_kl"))
assert_type(stats, fusedkl.TokenStats)
assert_type(stats.logprob, Tensor | None)
assert_type(stats.k3, Tensor)
assert_type(fusedkl.AdaptiveKLController(0.2, target=6.0).coef, float)
criterion: nn.Module = fusedkl.JSDLoss(beta=0.5, reduction="mean")
with fusedkl.patch() as patch:
    print(patch)
with fusedkl.inductor.enable():
    print(fusedkl.inductor.report(), fusedkl.explain(x, y), fusedkl.backends())
"""
# Line by line, and what the checker must say of it.
WRONG = {
    "fusedkl.forward_kl(x)": "call-arg",
    "fusedkl.forward_kl(x, y, 2.0)": "call-arg",  # options are keyword-only
    "fusedkl.forward_kl(x, y, mask=[True])": "arg-type",
    "fusedkl.forward_kl(x, y, temperatur=2.0)": "call-arg",
    "fusedkl.renyi(x, y, alpha='two')": "arg-type",
    "fusedkl.no_such_function": "attr-defined",
}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the package as its users do: a wheel's files, and no sources."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed: pip install 'fusedkl[dev]'")
    folder = tmp_path_factory.mktemp("typing")
    wheel = build("wheel", checkout(folder), folder / "wheel", FUSEDKL_NO_EXT="1")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    (site,) = (folder / "venv").glob("[lL]ib/**/site-packages")
    (site / "shared.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return next((folder / "venv").glob("[bS]*/python*"))


def check(python: Path, program: str, folder: Path) -> tuple[int, str]:
    (folder / "script.py").write_text(program)
    options = ("--strict", "--no-error-summary", "--show-error-codes", "--python-executable")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(python), "script.py"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_right_script_is_right(python: Path, tmp_path: Path) -> None:
    assert check(python, RIGHT, tmp_path) == (0, "")


def test_wrong_calls_are_seen(python: Path, tmp_path: Path) -> None:
    head = "import fusedkl, torch\nx = y = torch.randn(2, 3, 50)\n"
    _, told = check(python, head + "\n".join(WRONG), tmp_path)
    found = dict(re.findall(r"^script\.py:(\d+): error: .*\[([\w-]+)\]", told, re.MULTILINE))
    assert found == {str(i): code for i, code in enumerate(WRONG.values(), start=3)}, told
