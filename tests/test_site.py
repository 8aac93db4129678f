"""The documentation as a site: built without a warning, opened in a browser."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import CHROMIUM, visit

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(file.name for file in (ROOT / "docs").glob("*.md"))


@pytest.mark.full
def test_every_page_is_in_the_menu() -> None:
    # "- page.md", or with a title of its own
    entry = re.compile(r"^ +- (?:[\w ]+: )?([\w-]+\.md)$", re.MULTILINE)
    assert sorted(entry.findall((ROOT / "mkdocs.yml").read_text())) == PAGES


@pytest.mark.full
def test_every_public_name_is_in_the_reference() -> None:
    import fusedkl

    listed = re.findall(r"^::: fusedkl\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(fusedkl.__all__)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'fusedkl[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.full
def test_it_builds_strictly(site: Path) -> None:
    pages = {f"{Path(name).stem}.html" for name in PAGES}
    assert pages <= {file.name for file in site.glob("*.html")}
    reference = (site / "api.html").read_text()
    assert "::</p>" not in reference and 'id="fusedkl.forward_kl"' in reference
    fetched = re.compile(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)')
    for file in site.rglob("*.html"):
        assert fetched.findall(file.read_text()) == [], file.name


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian's package) on this machine")
@pytest.mark.parametrize("page", ["index.html", "api.html", "numerics.html"])
def test_it_opens_in_a_browser(site: Path, page: str, tmp_path: Path) -> None:
    found = visit(site, page, tmp_path, tmp_path / "screen.png")
    assert found == {"errors": [], "broken": [], "foreign": []}


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian's package) on this machine")
def test_the_browser_sees_faults(tmp_path: Path) -> None:
    faults = '<img src="none.png"><script>undefined_name()</script>'
    (tmp_path / "bad.html").write_text(f"<html><head></head><body>{faults}</body></html>")
    found = visit(tmp_path, "bad.html", tmp_path)
    assert "undefined_name" in found["errors"][0]
    assert found["broken"][0].endswith("none.png")
