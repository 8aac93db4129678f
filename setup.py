"""What pyproject.toml cannot say: the package map, the C++ library, and the switches of its build.

FUSEDKL_NO_EXT=1   pure Python: no compiler needed, everything runs on the reference backend
FUSEDKL_BUILD_CUDA=1, 0   the CUDA kernels, or not; unset: where PyTorch has CUDA and sees a GPU,
                   and nvcc is found
FUSEDKL_DEBUG=1    compile with -O0 -g
FUSEDKL_COVERAGE=1 count which lines run, for gcov: `make coverage-cpp`
FUSEDKL_SANITIZE=1 with AddressSanitizer
MAX_JOBS=n         parallel compile jobs
"""

import glob
import os
import shutil
import sys
import sysconfig

from setuptools import Extension, setup

NO_EXT = os.environ.get("FUSEDKL_NO_EXT") == "1"
DEBUG = os.environ.get("FUSEDKL_DEBUG") == "1"
WATCHED = {
    "FUSEDKL_COVERAGE": ["--coverage"],
    "FUSEDKL_SANITIZE": ["-fsanitize=address"],
}
WATCH = [flag for name, flags in WATCHED.items() if os.environ.get(name) == "1" for flag in flags]
# One binary serves every CPython >= 3.10. Free-threaded interpreters have no such ABI.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")

# Listed, not globbed: a stray file must not join the build.
CPU_SOURCES = [
    "csrc/cpu/isa_portable.cpp",
    "csrc/cpu/isa_avx2.cpp",
    "csrc/cpu/isa_avx512.cpp",
    "csrc/cpu/isa_avx512_bf16.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/family_series.cpp",
    "csrc/cpu/rows_f64.cpp",
    "csrc/cpu/kept_memory.cpp",
    "csrc/cpu/tensors.cpp",
    "csrc/cpu/row_stats.cpp",
    "csrc/cpu/row_stats_backward.cpp",
    "csrc/cpu/sharpen_states.cpp",
    "csrc/cpu/topk.cpp",
    "csrc/cpu/merge_states.cpp",
    "csrc/cpu/kl_div.cpp",
    "csrc/cpu/ops.cpp",
]


# Compiled apart: a library that only a PyTorch with CUDA loads.
CUDA_SOURCES = [
    "csrc/cuda/bf16.cu",
    "csrc/cuda/f16.cu",
    "csrc/cuda/f32.cu",
    "csrc/cuda/mixed.cu",
    "csrc/cuda/rows.cu",
    "csrc/cuda/family_bf16.cu",
    "csrc/cuda/family_f16.cu",
    "csrc/cuda/family_f32.cu",
    "csrc/cuda/family_any.cu",
    "csrc/cuda/topk.cu",
    "csrc/cuda/ops.cpp",
    "csrc/cuda/topk_ops.cpp",
    "csrc/cpu/family_series.cpp",
]
CUDA_ARCHITECTURES = ("80", "90a", "100", "120")


def find_toolkit() -> str | None:
    """The folder of a CUDA toolkit that is whole; PyTorch takes a wrapper on the path for one."""
    import torch

    named = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    on_path = shutil.which("nvcc")
    behind = os.path.dirname(os.path.dirname(os.path.realpath(on_path))) if on_path else None
    # nvcc's packages from PyPI lie beside PyTorch
    packages = os.path.join(os.path.dirname(torch.__path__[0]), "nvidia", "cu13")
    for home in (*named, behind, "/usr/local/cuda", packages):
        parts = ("bin/nvcc", "include/cuda_runtime.h")
        if home and all(os.path.isfile(os.path.join(home, part)) for part in parts):
            return home
    return None


def wants_cuda() -> bool:
    """Whether to build the CUDA library; the reason goes to the build's log."""
    import torch

    toolkit = find_toolkit()
    if toolkit is not None:
        os.environ["CUDA_HOME"] = toolkit  # for torch.utils.cpp_extension, imported after this

    asked = os.environ.get("FUSEDKL_BUILD_CUDA")
    if asked not in (None, "", "0", "1"):
        raise ValueError(f"FUSEDKL_BUILD_CUDA must be 0 or 1, got {asked!r}")
    missing = "this PyTorch has no CUDA" if torch.version.cuda is None else ""
    if not missing and toolkit is None:
        missing = "no CUDA toolkit was found (set CUDA_HOME)"
    if asked == "1" and missing:
        raise RuntimeError(f"FUSEDKL_BUILD_CUDA=1, but {missing}")
    if asked != "1" and not missing and not torch.cuda.is_available():
        missing = "no GPU is visible (FUSEDKL_BUILD_CUDA=1 builds all the same)"
    reason = f"FUSEDKL_BUILD_CUDA={asked}" if asked else missing or "PyTorch sees a GPU"
    wanted = asked == "1" or (not asked and not missing)
    print(f"fusedkl: {'building' if wanted else 'not building'} the CUDA kernels: {reason}")
    return wanted


def compile_flags() -> list[str]:
    # Only the stable ABI of LibTorch 2.11, so one binary also serves every torch since.
    define = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    if sys.platform == "win32":
        return [*define, "/Od" if DEBUG else "/O2", "/std:c++20", "/fp:precise"]
    # No contraction: which multiply-adds are fused is part of the arithmetic; the code states it.
    # No -march: the instruction set is chosen at run time; the ISA files state their target inside.
    numerics = ["-ffp-contract=off", "-fno-math-errno"]
    optimise = ["-O0", "-g"] if DEBUG else ["-O1", "-g1"] if WATCH else ["-O3", "-g0"]
    return [*define, *optimise, *WATCH, "-std=c++20", "-fvisibility=hidden", "-Wall", *numerics]


def runtime_folders() -> list[str]:
    """Where the linker finds libcudart.so, which PyPI's package has by its versioned name alone."""
    found = glob.glob(os.path.join(os.environ["CUDA_HOME"], "lib", "libcudart.so.*"))
    if not found:
        return []
    folder = os.path.abspath(os.path.join("build", "cudart"))
    os.makedirs(folder, exist_ok=True)
    link = os.path.join(folder, "libcudart.so")
    if os.path.lexists(link):
        os.remove(link)
    os.symlink(found[0], link)
    return [folder]


def cuda_library() -> Extension:
    from torch.utils.cpp_extension import CUDAExtension

    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
    newest = CUDA_ARCHITECTURES[-1]  # as PTX, for devices to come
    code.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    define = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]
    return CUDAExtension(
        "fusedkl._C_cuda",
        CUDA_SOURCES,
        include_dirs=[os.path.abspath("csrc")],
        library_dirs=runtime_folders(),
        depends=sorted(glob.glob("csrc/**/*.*h", recursive=True)),
        extra_compile_args={
            "cxx": [*compile_flags(), "-DUSE_CUDA"],
            "nvcc": [
                *(*define, *code, "-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden"),
                "--compress-mode=size",  # a sixth
            ],
        },
        py_limited_api=LIMITED_API,
    )


def native_build() -> dict[str, object]:
    with_cuda = wants_cuda()
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class IncrementalBuild(BuildExtension):
        def build_extensions(self) -> None:
            if self.editable_mode:
                # setuptools gives editable installs a temporary folder, which would recompile
                # everything each time; this is the folder that `build_ext --inplace` uses too.
                tag = f"{self.plat_name}-{sys.implementation.cache_tag}"
                self.build_temp = os.path.join("build", f"temp.{tag}")
            super().build_extensions()

    library = CppExtension(
        "fusedkl._C",
        CPU_SOURCES,
        include_dirs=[os.path.abspath("csrc")],  # ninja runs in the build folder
        depends=sorted(glob.glob("csrc/**/*.h", recursive=True)),
        extra_compile_args={"cxx": compile_flags()},
        extra_link_args=WATCH,
        py_limited_api=LIMITED_API,
    )
    libraries = [library]
    if with_cuda:
        libraries.append(cuda_library())
    wheel = {"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {}
    return {"ext_modules": libraries, "cmdclass": {"build_ext": IncrementalBuild}, "options": wheel}


setup(
    packages=["fusedkl", "fusedkl.inductor", "fusedkl.integrations", "fusedkl.kernels"],
    package_dir={"fusedkl.kernels": "kernels"},
    **({} if NO_EXT else native_build()),
)
