"""CUDA kernels, compiled into the module `voco_kernels._cuda`: the K/V path (`kv.py`).

The module is missing from a wheel that was built without nvcc; nothing else in the library needs it.
"""

from functools import cache
from importlib import import_module
from types import ModuleType

from ...version import __version__


def load() -> ModuleType:
    """The module `voco_kernels._cuda`; RuntimeError with `unavailable_reason()` where it cannot be loaded."""
    module, reason = _import()
    if reason is not None:
        raise RuntimeError(reason)
    return module


def unavailable_reason() -> str | None:
    """Why `load()` fails, or None. A loaded module needs no driver: `load().device_query()` tells whether there is one."""
    return _import()[1]


def serves(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether code that was compiled for `archs` ("sm_80", "compute_80", "sm_90a", ...) runs on a compute capability."""
    for arch in archs:
        kind, number = arch.split("_")
        exact = not number[-1].isdigit()  # what is for one GPU only ends with a letter
        major, minor = int(number.rstrip("af")[:-1]), int(number.rstrip("af")[-1])
        if exact and (major, minor) == capability:
            return True
        if not exact and kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if not exact and kind == "compute" and (major, minor) <= capability:
            return True
    return False


@cache
def _import() -> tuple[ModuleType | None, str | None]:
    name = "voco_kernels._cuda"
    try:
        module = import_module(name)
    except ModuleNotFoundError:
        return None, f"{name} is missing: voco-kernels was built without nvcc (VOCO_CUDA=require insists on it)"
    except ImportError as error:
        return None, f"{name} does not load: {error}"
    if module.version() != __version__:
        return None, f"{name} was built for version {module.version()}, but this is {__version__}: build it again"
    return module, None
