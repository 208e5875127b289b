"""CUDA kernels, compiled into the module `voco_kernels._cuda`: attention, decoding and the K/V path.

The module is missing from a wheel that was built without nvcc; nothing else in the library needs it.
"""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch

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


def kernels_unavailable_reason() -> str | None:
    """Why no kernel can run on this machine; None where they can."""
    reason = unavailable_reason()
    if reason is None and load().DEVICE_TYPE == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    return reason


def unserved_reason(device: torch.device, head_dim: int, shared_bytes: int = 0) -> str | None:
    """Why kernels for `head_dim` that need so much shared memory for a block do not run on a device; None where they do."""
    if device.type != load().DEVICE_TYPE or torch.version.hip is not None:
        return f"it needs tensors on an NVIDIA GPU, not on {device}"
    return unserved_by_gpu(device, head_dim, shared_bytes) if device.type == "cuda" else None


@cache
def unserved_by_gpu(device: torch.device, head_dim: int, shared_bytes: int) -> str | None:
    """The same of a GPU, which does not change."""
    capability, archs = torch.cuda.get_device_capability(device), load().compiled_archs()
    if not serves(archs, capability):
        return f"it was compiled for {', '.join(archs)}, and the GPU has compute capability {capability}"
    has = load().device_query()[device.index]["shared_memory_per_block_optin"] if shared_bytes else 0
    if shared_bytes <= has:
        return None
    return f"head_dim {head_dim} needs {shared_bytes} bytes of shared memory, and the GPU has {has}"


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; of the host, which stands in for one in tests, few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


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
