"""Builds the wheel: the Python package, csrc as hybridrl/_C (CMake + ninja), and configs/ as hybridrl/_configs.

Environment: HYBRIDRL_CUDA=auto|1|0 builds the CUDA kernels where nvcc is found (auto, the default), always or never;
HYBRIDRL_CUDA_ARCHS, CMake's list of architectures (default "80;90a-real"); CUDACXX or CUDA_HOME say where nvcc is;
MAX_JOBS limits the compiler processes.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    """Path of the nvcc to build with, or None for a build without CUDA."""
    wanted = os.environ.get("HYBRIDRL_CUDA", "auto").lower()
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"HYBRIDRL_CUDA={wanted}: must be auto, 1 or 0")
    if wanted == "0":
        return None
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [os.environ.get("CUDACXX"), *(home / "bin" / "nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    for place in filter(None, places):
        if found := shutil.which(place):
            return found
    if wanted == "1":
        raise SystemExit("HYBRIDRL_CUDA=1, but no nvcc is found: set CUDA_HOME, or HYBRIDRL_CUDA=0 to do without")
    return None


def find_tool(module: str, folder: str) -> str:
    """Path of cmake or ninja: from the PyPI package of that name (its attribute `folder`), else from PATH."""
    try:
        path = Path(getattr(__import__(module), folder)) / module
        if path.is_file():
            return str(path)
    except (ImportError, AttributeError):
        pass
    if found := shutil.which(module):
        return found
    raise SystemExit(f"building csrc needs {module}: run `{sys.executable} -m pip install cmake ninja pybind11` first")


class BuildNative(build_ext):
    """Runs CMake for the one extension. The build folder is kept, so a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        nvcc = find_nvcc()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{'cuda' if nvcc else 'cpu'}"
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja", "BIN_DIR"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "HYBRIDRL_CUDA": "ON" if nvcc else "OFF",
        }
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
            if archs := os.environ.get("HYBRIDRL_CUDA_ARCHS"):
                options["HYBRIDRL_CUDA_ARCHS"] = archs
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        try:
            subprocess.check_call(
                [cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())]
            )
            subprocess.check_call([cmake, "--build", folder, "--target", "_C", "-j", jobs])
        except subprocess.CalledProcessError as error:
            mend = f" To build without CUDA set HYBRIDRL_CUDA=0; nvcc was {nvcc}." if nvcc else ""
            raise SystemExit(f"building csrc failed: see the message above; {folder} may be deleted.{mend}") from error
        # CMake may name it by an interpreter's own suffix; setuptools' name is the one that the wheel's tag promises.
        (built,) = folder.glob("_C*.so")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written beside and renamed: a process that has the old library mapped must not see it change under it.
        fresh = target.with_suffix(".new")
        shutil.copyfile(built, fresh)
        os.replace(fresh, target)
        print(f"hybridrl: {target.name} built {'with CUDA kernels (' + nvcc + ')' if nvcc else 'without CUDA'}")


class BuildPython(build_py):
    """Ships configs/ as hybridrl/_configs; an editable install reads configs/ in place (hybridrl.config_dir)."""

    def run(self) -> None:
        if not self.editable_mode:
            # build/lib outlives the sources: a module deleted since the last build must not reach the wheel.
            shutil.rmtree(Path(self.build_lib) / "hybridrl", ignore_errors=True)
        super().run()
        if not self.editable_mode and (ROOT / "configs").is_dir():
            shutil.copytree(ROOT / "configs", Path(self.build_lib) / "hybridrl" / "_configs", dirs_exist_ok=True)


setup(
    ext_modules=[Extension("hybridrl._C", sources=[])],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
