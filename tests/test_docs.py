"""The Python in docs/ runs, and what the documents point at exists."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {file.name: file.read_text() for file in DOCUMENTS}
FOLDERS = "fusedkl|csrc|kernels|tests|bench|demo|docs|examples"


def examples(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)


# The README's are run by test_readme.py.
@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name in PAGES if name != "README.md" and examples(name)])
def test_examples_run(page: str) -> None:
    namespace: dict[str, Any] = {}
    for example in examples(page):
        exec(compile(example, page, "exec"), namespace)


def test_there_are_examples() -> None:
    assert examples("migrating.md") and examples("numerics.md")


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_links_lead_somewhere(file: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[file.name])
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (file.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page: str) -> None:
    named = set(re.findall(rf"\b(?:{FOLDERS})/[\w/]+\.(?:py|h|cpp|md)\b", PAGES[page]))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def commands(text: str) -> list[str]:
    """What a page tells its reader to run: lines of indented blocks, and code in a sentence."""
    told = r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:make|python|pytest) [^`\n]+"
    found = re.findall(rf"^    ({told})", text, re.MULTILINE) + re.findall(rf"`({told})`", text)
    return [c.partition(" #")[0].strip() for c in found]


def unknown(command: str) -> list[str]:
    """Targets, files and options of a command that are not there."""
    words = [w for w in command.split() if not re.match(r"[A-Z_]+=", w)]
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return [w for w in words[1:] if w not in targets]
    files = [w for w in words[1:] if re.fullmatch(r"(?:\w+/)*\w+\.py|bench/", w)]
    missing = [name for name in files if not (ROOT / name).exists()]
    if words[0].endswith("pytest") or missing or not files or files[0] == "setup.py":
        return missing
    program = (ROOT / files[0]).read_text()
    program += (ROOT / "examples/common.py").read_text() if "examples/" in files[0] else ""
    return [w for w in words if w.startswith("--") and f'"{w}"' not in program]


@pytest.mark.parametrize("page", [name for name in PAGES if commands(PAGES[name])])
def test_commands_are_known(page: str) -> None:
    assert [c for c in commands(PAGES[page]) if unknown(c)] == []


def test_unknown_commands_are_seen() -> None:
    (command,) = commands("    .venv/bin/python bench/run.py --models --no-such  # x\n")
    assert unknown(command) == ["--no-such"]
    assert unknown("make nothing") == ["nothing"]
    assert unknown("A=1 pytest tests/test_none.py -k x") == ["tests/test_none.py"]


# In a process of its own: modules of bench/ share names with those of other tests.
COMPARE = """
import json, re, sys
sys.path.insert(0, sys.argv[1])
import page
for kind in sys.argv[2:]:
    begin, end = page.marks(kind)
    shown = page.PAGES[kind]
    text = shown.read_text().split(begin)[1].split(end)[0]
    named = re.findall(r"`(bench/results/[\\w.-]+\\.json)`", text)
    if named:
        wanted = page.section(shown.parents[1] / named[0], kind)
        assert text == wanted, f"{kind}: python bench/page.py {named[0]}"
    else:  # only while there is nothing to show
        found = (shown.parents[1] / "bench" / "results").glob("*.json")
        kept = [file.name for file in found if kind in page.kinds(json.loads(file.read_text()))]
        assert text == page.NOTHING and not kept, f"{kind}: {kept} not shown"
"""


KINDS = ["results-avx512", "cpu-loops", "results-avx2", "memory-model", "linear-results"]
KINDS += ["linear-tables"]
KINDS += ["models-cpu", "models-cuda", "dropin", "trainers", "sharding"]


@pytest.mark.slow
def test_results_are_those_of_the_committed_files() -> None:
    command = [sys.executable, "-W", "ignore", "-c", COMPARE, str(ROOT / "bench"), *KINDS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_page_is_linked_from_the_first_ones() -> None:
    pages = [file.name for file in DOCUMENTS if file.parent == ROOT / "docs"]
    first = PAGES["README.md"] + PAGES["index.md"] + "index.md"
    assert [page for page in pages if page not in first] == []
