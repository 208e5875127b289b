"""The one way in which this library says that an argument is wrong."""

from typing import NoReturn

import torch


def reject(argument: str, must: str, was: object) -> NoReturn:
    """Raise the ValueError that names an argument, what it must be and what it was."""
    raise ValueError(f"{argument} must be {must}, but was {was}")


def require_tensor(argument: str, value: object, *, ndim: int | None = None) -> torch.Tensor:
    """Return `value` if it is a tensor (of `ndim` dimensions, where given), else raise ValueError."""
    if not isinstance(value, torch.Tensor):
        reject(argument, "a torch.Tensor", type(value).__name__)
    if ndim is not None and value.ndim != ndim:
        reject(argument, f"a tensor of {ndim} dimensions", f"of shape {list(value.shape)}")
    return value


def require_integers(argument: str, value: object, *, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """Return `value` if it is an integer tensor (of `shape`, where given), else raise ValueError."""
    tensor = require_tensor(argument, value)
    if tensor.dtype not in (torch.int32, torch.int64):
        reject(argument, "an int32 or int64 tensor", f"of dtype {tensor.dtype}")
    if shape is not None and tuple(tensor.shape) != shape:
        reject(argument, f"of shape {list(shape)}", f"of shape {list(tensor.shape)}")
    return tensor
