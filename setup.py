"""Builds the CUDA module `voco_kernels._cuda` with CMake; everything else is in pyproject.toml.

VOCO_CUDA        auto (default): with nvcc where found, else a pure Python wheel; off: never; require: nvcc or an error
VOCO_CUDA_ARCHS  CMake's CUDA_ARCHITECTURES, separated by semicolons; the default is in CMakeLists.txt
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

MODE = os.environ.get("VOCO_CUDA", "auto")
if MODE not in ("auto", "off", "require"):
    sys.exit(f"VOCO_CUDA must be auto, off or require, but was {MODE!r}")


def find_nvcc() -> str | None:
    home, path = os.environ.get("CUDA_HOME"), os.environ.get("PATH")
    folders = filter(None, (home and f"{home}/bin", path, "/usr/local/cuda/bin"))
    return shutil.which(os.environ.get("CUDACXX", "nvcc"), path=os.pathsep.join(folders))


NVCC = find_nvcc() if MODE != "off" and sys.platform == "linux" else None


class BuildPython(build_py):
    def run(self):
        without = "VOCO_CUDA=off" if MODE == "off" else "no nvcc in CUDACXX, CUDA_HOME, PATH or /usr/local/cuda"
        print(f"voco-kernels: CUDA module with {NVCC}" if NVCC else f"voco-kernels: no CUDA module ({without})")
        super().run()


class BuildCuda(build_ext):
    def build_extension(self, ext):
        # Checked here, since the hooks that only ask for requirements or metadata run this file too.
        if NVCC is None:
            sys.exit("VOCO_CUDA=require needs nvcc")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CUDA_COMPILER": NVCC,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": Path(self.get_ext_fullpath(ext.name)).parent.resolve(),
            "Python_EXECUTABLE": sys.executable,
            "VOCO_VERSION": self.distribution.get_version(),
        }
        # --fresh: a cache of an earlier isolated build names tools in a folder that is gone.
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        configure = ["cmake", "--fresh", "-G", "Ninja", "-S", ".", "-B", self.build_temp, *definitions]
        if subprocess.call(configure) or subprocess.call(["cmake", "--build", self.build_temp]):
            sys.exit("The CUDA module could not be built (see above); VOCO_CUDA=off builds without it")


setup(
    ext_modules=[Extension("voco_kernels._cuda", sources=[])] if NVCC or MODE == "require" else [],
    cmdclass={"build_ext": BuildCuda, "build_py": BuildPython},
)
