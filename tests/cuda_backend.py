"""The `cuda` backend on a CPU: its binding and its kernels, compiled against the emulation of csrc/host.

Used in the place of the compiled module, it runs all of the backend but the hardware: Python, binding, launcher, kernels.
"""

import importlib.util
import sysconfig
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import cuda_host
import pybind11
import pytest

from voco_kernels.backends import cuda
from voco_kernels.version import __version__

SOURCES = [cuda_host.CSRC / "bindings.cpp", *sorted(cuda_host.CSRC.glob("*.cu"))]


@cache
def build() -> ModuleType:
    """The module `_cuda` for tensors on the CPU."""
    flags = [
        "-fvisibility=hidden",
        f'-DVOCO_VERSION="{__version__}"',
        '-DVOCO_ARCHS="host"',
        *(f"-isystem{folder}" for folder in (pybind11.get_include(), sysconfig.get_paths()["include"])),
        # Questions about devices go to the real runtime, as they do on any machine.
        *(f"-L{cuda_host.cuda_include().parent / folder}" for folder in ("lib64", "lib")),
        *("-lcudart_static", "-lrt", "-lpthread", "-ldl"),
    ]
    path = cuda_host.build("_cuda", SOURCES, shared=True, extra_flags=flags)
    # Under the name of the real one, pybind11 would give us that where it is already loaded.
    spec = importlib.util.spec_from_file_location("emulated._cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def emulated():
    """Inside, backend "cuda" serves tensors on the CPU. Skips the test where the emulation cannot be built."""
    if reason := cuda_host.missing():
        pytest.skip(reason)
    module, real = build(), cuda._import
    cuda._import = lambda: (module, None)
    try:
        yield module
    finally:
        cuda._import = real
