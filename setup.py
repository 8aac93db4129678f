"""What pyproject.toml cannot say: the package map, the C++ library, and the switches of its build.

FUSEDKL_NO_EXT=1   pure Python: no compiler needed, everything runs on the reference backend
FUSEDKL_DEBUG=1    compile with -O0 -g
MAX_JOBS=n         parallel compile jobs
"""

import glob
import os
import sys
import sysconfig

from setuptools import setup

NO_EXT = os.environ.get("FUSEDKL_NO_EXT") == "1"
DEBUG = os.environ.get("FUSEDKL_DEBUG") == "1"
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
    "csrc/cpu/tensors.cpp",
    "csrc/cpu/row_stats.cpp",
    "csrc/cpu/row_stats_backward.cpp",
    "csrc/cpu/topk.cpp",
    "csrc/cpu/merge_states.cpp",
    "csrc/cpu/kl_div.cpp",
    "csrc/cpu/ops.cpp",
]


def compile_flags() -> list[str]:
    # Only the stable ABI of LibTorch 2.11, so one binary also serves every torch since.
    define = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    if sys.platform == "win32":
        return [*define, "/Od" if DEBUG else "/O2", "/std:c++20", "/fp:precise"]
    # No contraction: which multiply-adds are fused is part of the arithmetic; the code states it.
    # No -march: the instruction set is chosen at run time; the ISA files state their target inside.
    numerics = ["-ffp-contract=off", "-fno-math-errno"]
    optimise = ["-O0", "-g"] if DEBUG else ["-O3", "-g0"]
    return [*define, *optimise, "-std=c++20", "-fvisibility=hidden", "-Wall", *numerics]


def native_build() -> dict[str, object]:
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
        py_limited_api=LIMITED_API,
    )
    wheel = {"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {}
    return {"ext_modules": [library], "cmdclass": {"build_ext": IncrementalBuild}, "options": wheel}


setup(
    packages=["fusedkl", "fusedkl.kernels"],
    package_dir={"fusedkl.kernels": "kernels"},
    **({} if NO_EXT else native_build()),
)
