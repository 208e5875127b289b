"""Access to the compiled module `voco_kernels._cuda`. It has no kernels yet: today it only tells about the machine.

The module is missing from a wheel that was built without nvcc; nothing else in the library needs it.
"""

from functools import cache
from importlib import import_module
from types import ModuleType

from ..version import __version__


def load() -> ModuleType:
    """The module `voco_kernels._cuda`; RuntimeError with `unavailable_reason()` where it cannot be loaded."""
    module, reason = _import()
    if reason is not None:
        raise RuntimeError(reason)
    return module


def unavailable_reason() -> str | None:
    """Why `load()` fails, or None. A loaded module needs no driver: `load().device_query()` tells whether there is one."""
    return _import()[1]


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
