"""The wheel that is published: audited, installed far from its sources, tested on two torches."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from building import ROOT, build, checkout, run, unpack

pytestmark = pytest.mark.full

# Of the oldest torch that is supported, the newest patch release.
OLDEST = "torch==2.11.*"
# Tests of sources, benchmarks or scripts have nothing to say of an installed wheel.
OF_SOURCES = re.compile(
    r"parents\[1\]|parent\.parent|bench_modules|cuda_on_cpu|cuda_suite|cuda_sass|building"
)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp
    return build("sdist", checkout(folder("checkout")), folder("sdist"))


@pytest.fixture(scope="module")
def tree(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist unpacked, where the wheel is built."""
    return unpack(sdist, tmp_path_factory.mktemp("unpacked"))


@pytest.fixture(scope="module")
def artefacts(
    sdist: Path, tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The sdist, and the optimised wheel that is built of it."""
    into = tmp_path_factory.mktemp("wheel")
    # As README installs it: an installation is this and unpacking.
    command = (sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps")
    run(*command, "--wheel-dir", into, cwd=tree, FUSEDKL_BUILD_CUDA="0")
    (wheel,) = into.iterdir()
    return sdist, wheel


def needs(tool: str) -> None:
    try:
        metadata.distribution(tool)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{tool} is not installed: pip install 'fusedkl[dev]'")


def test_the_index_would_take_it(artefacts: tuple[Path, Path], tmp_path: Path) -> None:
    needs("twine")
    checked = run(sys.executable, "-m", "twine", "check", "--strict", *artefacts, cwd=tmp_path)
    assert checked.count("PASSED") == 2, checked


def test_only_the_limited_api(artefacts: tuple[Path, Path], tmp_path: Path) -> None:
    needs("abi3audit")
    wheel = artefacts[1]
    if "abi3" not in wheel.name:
        pytest.skip("built by a Python that has no limited API")
    audit = (sys.executable, "-m", "abi3audit", "--strict", "--summary", wheel)
    said = " ".join(run(*audit, cwd=tmp_path).split())  # it breaks lines
    assert "0 ABI version mismatches and 0 ABI violations" in said


def test_it_holds_nothing_but_the_package(artefacts: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(artefacts[1]) as archive:
        names = {i.filename: i.file_size for i in archive.infolist()}
    folders = {name.split("/")[0].split("-")[0] for name in names}
    suffixes = {Path(name).suffix for name in names if ".dist-info" not in name}
    assert folders == {"fusedkl"}
    assert suffixes <= {".py", ".typed", ".so", ".pyd", ".dylib"}
    assert sum(names.values()) < 8 << 20


def test_one_binary_for_every_python_and_torch(artefacts: tuple[Path, Path]) -> None:
    """Neither Python nor anything of a torch with CUDA may be linked to."""
    with zipfile.ZipFile(artefacts[1]) as archive:
        (library,) = (name for name in archive.namelist() if name.startswith("fusedkl/_C"))
        code = archive.read(library)
    for foreign in (b"libpython", b"libtorch_python", b"libtorch_cuda", b"libcudart"):
        assert foreign not in code, f"{library} needs {foreign.decode()}"
    if sys.platform == "linux":
        assert "-cp310-abi3-linux_" in artefacts[1].name
        assert library == "fusedkl/_C.abi3.so"


def test_a_second_build_compiles_what_changed(artefacts: tuple[Path, Path], tree: Path) -> None:
    rebuild = (sys.executable, "setup.py", "build_ext")
    switches = {"FUSEDKL_BUILD_CUDA": "0"}
    assert "no work to do" in run(*rebuild, cwd=tree, **switches)
    (tree / "csrc/cpu/ops.cpp").touch()
    assert "[1/1]" in run(*rebuild, cwd=tree, **switches)


def oldest_torch(into: Path) -> Path:
    """Where the oldest torch lies, without what it depends on: this environment has that."""
    needs("pip")
    asked = (sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(into), OLDEST)
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{OLDEST} could not be had within 15 minutes")
    if done.returncode:
        pytest.skip(f"{OLDEST} could not be had: {done.stderr.strip().splitlines()[-1]}")
    return into


# With this torch the sources have passed them all: what shows that the library is the wheel's.
QUICK = {
    "this torch": ([f"tests/test_{name}.py" for name in ("values", "edges", "errors")], 300),
    "oldest torch": ([], 1000),
}


@pytest.mark.parametrize("which", QUICK)
def test_installed_it_passes_the_quick_tests(
    which: str, artefacts: tuple[Path, Path], tmp_path: Path
) -> None:
    paths = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    if which == "oldest torch":
        paths.insert(0, str(oldest_torch(tmp_path / "torch")))
    home = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=tmp_path)
    python = next(home.glob("[bS]*/python*"))
    (site,) = home.glob("[lL]ib/**/site-packages")
    # Packages of this environment, but not what its own .pth files add: an editable fusedkl.
    (site / "shared.pth").write_text("\n".join(paths))
    found = (python, "-I", "-c", "import torch; print(torch.__version__)")
    if which == "this torch":
        assert run(*found, cwd=tmp_path).split() == [torch.__version__]
    elif not run_quietly(*found):
        pytest.skip(f"{OLDEST} does not import beside the packages of {torch.__version__}")

    install = ("install", "--no-deps", "--no-index", "--ignore-installed", artefacts[1])
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=tmp_path)
    away = tmp_path / "away"
    away.mkdir()
    shutil.copy(ROOT / "pyproject.toml", away)
    shutil.copytree(ROOT / "tests", away / "tests", ignore=shutil.ignore_patterns("cuda_on_cpu"))
    for file in (away / "tests").glob("test_*.py"):
        if OF_SOURCES.search(file.read_text()):
            file.unlink()
    where = "import fusedkl, fusedkl._library as l; print(fusedkl.__file__, l.why_not(), sep='|')"
    file, missing = run(python, "-I", "-c", where, cwd=away).strip().split("|")
    assert Path(file).is_relative_to(site) and missing == "None"
    tests = ("pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "-m", "not full and not slow")
    files, least = QUICK[which]
    summary = run(python, "-I", "-m", *tests, *files, cwd=away).splitlines()[-1]
    passed = re.search(r"(\d+) passed", summary)
    assert passed and int(passed[1]) > least, summary
    print(f"{which}: {summary}")


def run_quietly(*command: str | Path) -> bool:
    return subprocess.run([str(c) for c in command], capture_output=True).returncode == 0
