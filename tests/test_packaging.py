"""What leaves this folder (sdist, wheel) holds what it must, and runs where it lands."""

import ast
import email
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from building import ROOT, SOURCE_FOLDERS, build, checkout, run, sources, unpack

import fusedkl

pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools >= 77")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    archive = build("sdist", tree, tmp_path_factory.mktemp("sdist"))
    return unpack(archive, tmp_path_factory.mktemp("unpacked"))


def test_pure_wheel_maps_the_packages(tree: Path, tmp_path: Path) -> None:
    wheel = build("wheel", tree, tmp_path, FUSEDKL_NO_EXT="1")
    assert wheel.name == f"fusedkl-{fusedkl.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"fusedkl-{fusedkl.__version__}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        top_level = archive.read(f"{info}/top_level.txt").split()

    mapped = {
        re.sub(r"^kernels/", "fusedkl/kernels/", s) for s in sources(ROOT, SOURCE_FOLDERS[:2])
    }
    assert {name for name in names if not name.startswith(info)} == mapped
    assert "fusedkl/kernels/__init__.py" in names and "fusedkl/py.typed" in names
    # A top-level `kernels` would take the place of somebody else's package of that name.
    assert top_level == [b"fusedkl"]
    assert f"{info}/licenses/LICENSE" in names
    assert metadata["Requires-Python"] == ">=3.10"
    assert [r for r in metadata.get_all("Requires-Dist") if "extra" not in r] == ["torch>=2.11"]


def test_kernels_are_not_a_folder_of_the_package() -> None:
    assert not (ROOT / "fusedkl" / "kernels").exists()
    for file in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                named = [node.module or ""]
            wrong = [n for n in named if n.split(".")[0] in ("kernels", "fusedkl")]
            assert not wrong, f"{file.name}:{node.lineno} must import {wrong} relatively"


def test_sources_are_listed_once_and_exist() -> None:
    """A new .cpp that nobody lists would compile nowhere and be missed by no one."""
    listed = re.findall(r'"(csrc/\w+/\w+\.(?:cpp|cu))"', (ROOT / "setup.py").read_text())
    there = [s for s in sources(ROOT, ("csrc",)) if s.endswith((".cpp", ".cu"))]
    both_libraries = ["csrc/cpu/family_series.cpp"]
    assert sorted(listed) == sorted([*there, *both_libraries])


def test_the_runtime_of_pypi_is_linked(tmp_path: Path) -> None:
    """Its package has libcudart.so by a versioned name alone, which no linker looks for."""
    home = tmp_path / "cu13"
    (home / "lib").mkdir(parents=True)
    (home / "lib" / "libcudart.so.13").write_bytes(b"a library")
    text = (ROOT / "setup.py").read_text()
    (function,) = re.findall(r"^def runtime_folders.*?(?=^def )", text, re.DOTALL | re.MULTILINE)
    script = f"import glob, os\n{function}\nprint(*runtime_folders(), sep='|')"
    for _ in range(2):  # a second build finds the link of the first
        folder = run(sys.executable, "-c", script, cwd=tmp_path, CUDA_HOME=str(home)).strip()
        assert (Path(folder) / "libcudart.so").read_bytes() == b"a library"
    # a toolkit's folder needs nothing
    empty = run(sys.executable, "-c", script, cwd=tmp_path, CUDA_HOME=str(tmp_path))
    assert empty.strip() == ""


@pytest.mark.slow
def test_without_the_compiled_library(tmp_path: Path) -> None:
    """The Python files alone import, say what is missing, and compute."""
    for name in sources(ROOT, ("fusedkl", "kernels")):
        target = tmp_path / re.sub(r"^kernels/", "fusedkl/kernels/", name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    # First on the path, and before the hook of an editable install.
    here = {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}

    info = run(sys.executable, "-m", "fusedkl", "info", cwd=tmp_path, **here)
    assert "reference" in info
    assert re.search(r"_C\S* .*(not|missing|absent)", info) or "not built" in info, info

    script = """
import math, torch, fusedkl, fusedkl.kernels, fusedkl._library
x = torch.tensor([[0.0, math.log(3)]], requires_grad=True)
y = torch.tensor([[0.0, 0.0]])
kl = fusedkl.forward_kl(x, y)
kl.sum().backward()
print(fusedkl.__file__, fusedkl._library.why_not(), sep="|")
assert abs(kl.item() - math.log(2 / 3**0.5)) < 1e-6, kl
assert torch.allclose(x.grad, torch.tensor([[-0.25, 0.25]])), x.grad
try:
    fusedkl.forward_kl(x, y, backend="cpu")
except (ValueError, RuntimeError) as error:
    assert "cpu" in str(error), error
else:
    raise AssertionError("an explicit backend fell back silently")
"""
    where, why = run(sys.executable, "-c", script, cwd=tmp_path, **here).splitlines()[-1].split("|")
    assert Path(where).is_relative_to(tmp_path)
    assert why not in ("", "None")


@pytest.mark.slow
def test_sdist_is_complete(tree: Path, sdist: Path) -> None:
    assert sources(sdist) == sources(tree)
    whole = ("LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", ".ci/run")
    # What `make site`, `make bench` and the tests of the documents read.
    read = ("mkdocs.yml", "docs/assets/hooks.py", "docs/img/speed.png", "bench/suite/page.html")
    for name in (*whole, *read, "bench/results/cpu-avx512.json", "examples/dropin/toy.py"):
        assert (sdist / name).read_bytes() == (ROOT / name).read_bytes()
