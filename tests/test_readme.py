"""The README's Python and commands run, its equivalents are true, its numbers are measured."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from building import ROOT, checkout, run

import fusedkl

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
# | `call` | `code` ... |
ROWS = dict(re.findall(r"^\| `(\w+\(x[^`]*)` \| `([^`]+)`", README, flags=re.MULTILINE))


def test_examples_run() -> None:
    assert EXAMPLES
    namespace: dict[str, Any] = {}
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), namespace)
    assert namespace["x"].grad.shape == namespace["x"].shape


@pytest.mark.parametrize("call", ROWS)
def test_equivalents(call: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 300, generator=generator)
    temperature = 1.7 if "temperature" in call else 1.0
    names: dict[str, Any] = vars(fusedkl) | {
        "torch": torch,
        "F": F,
        "x": x,
        "y": y,
        "T": temperature,
        "index": torch.randint(300, (5,), generator=generator),
        "lp": F.log_softmax(x.double() / temperature, -1),
        "lq": F.log_softmax(y.double() / temperature, -1),
    }
    ours, theirs = eval(call, names), eval(ROWS[call], names)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)


def test_the_table_is_read() -> None:
    assert {call.partition("(")[0] for call in ROWS} == {
        "forward_kl",
        "reverse_kl",
        "entropy",
        "logsumexp",
        "selective_log_softmax",
        "log_softmax",
    }


# Each command of the page, and what runs it.
COMMANDS = {
    'pip install "torch>=2.11" setuptools wheel ninja': "this environment; no test downloads it",
    "pip install . --no-build-isolation": "tests/test_wheel.py",
    "FUSEDKL_NO_EXT=1 pip install .": "test_it_installs_without_a_compiler",
    "python -m fusedkl info": "test_info",
    "make demo": "tests/test_demo.py",
    "make demo MODEL=gemma3": "tests/test_demo.py, another model",
    "make test": "this is it",
    "make site": "tests/test_site.py",
}


def test_every_command_is_known() -> None:
    blocks = re.findall(r"^    ((?:pip|make|python) [^#\n]*)", README, flags=re.MULTILINE)
    inline = re.findall(r"`((?:FUSEDKL_\w+=\w+ )?(?:pip|make|python) [^`]+)`", README)
    # The command that wrote the results is theirs, not the page's.
    told = {c.strip() for c in blocks + inline if not c.startswith("python bench/")}
    assert told == set(COMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_knows(command: str) -> None:
    done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_info() -> None:
    assert "reference" in run(sys.executable, "-I", "-m", "fusedkl", "info", cwd=ROOT)


@pytest.mark.full
def test_it_installs_without_a_compiler(tmp_path: Path) -> None:
    """Into an empty environment that borrows torch from this one."""
    home, tree = tmp_path / "venv", checkout(tmp_path)
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=tmp_path)
    (site,) = home.glob("[lL]ib/**/site-packages")
    shared = [p for p in sys.path if p.endswith("-packages")]
    (site / "shared.pth").write_text("\n".join(shared))
    python = next(home.glob("[bS]*/python*"))
    install = ("install", ".", "--no-build-isolation", "--no-deps", "--ignore-installed")
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=tree, FUSEDKL_NO_EXT="1")
    info = run(python, "-I", "-m", "fusedkl", "info", cwd=tmp_path)
    (cpu,) = re.findall(r"^ *cpu +(yes|no) ", info, flags=re.MULTILINE)
    assert cpu == "no", info


def test_it_is_short() -> None:
    assert README.count("\n") < 200


def test_its_numbers_are_those_of_the_committed_file() -> None:
    headline = pytest.importorskip("bench_modules").headline
    (name,) = set(re.findall(r"(bench/results/[\w.-]+\.json)", README))
    assert headline.filled(README, headline.Headline.of(ROOT / name)) == README


def test_its_figures_are_of_the_committed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = pytest.importorskip("bench_modules").figures
    from PIL import Image

    monkeypatch.setattr(figures, "IMAGES", tmp_path)
    figures.main()
    drawn = sorted(file.name for file in tmp_path.iterdir())
    assert drawn == ["error.png", "speed.png"]
    for name in drawn:
        # Pixels depend on the version of the drawing library; the numbers' digest does not.
        with Image.open(tmp_path / name) as new, Image.open(ROOT / "docs" / "img" / name) as old:
            assert new.info["Source"] == old.info["Source"], "python bench/figures.py draws it anew"
            assert new.size == old.size


def test_the_citation_is_of_this_version() -> None:
    assert f"version: {fusedkl.__version__}\n" in (ROOT / "CITATION.cff").read_text()
