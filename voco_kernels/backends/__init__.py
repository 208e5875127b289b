"""Which backends there are, and which one serves a call.

A backend module is imported when it is first used. For attention it offers `attention(q, k, v, layout, scale, return_lse)`
and `attention_backward(grad_out, q, k, v, out, lse, layout, scale)`, for the K/V path `extract_kv` and `inject_kv`;
`unavailable_reason()` says why it cannot run on this machine, and `unsupported_reason(q, layout)` why it cannot serve given
inputs. Backends never import each other.
"""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch

from ..layout import VocoLayout

ATTENTION = {"reference": "reference", "torch": "torch", "flash": "flash", "triton": "triton"}
KV = {"torch": "torch_kv"}

# Backends whose `attention_backward` reads the lse of the forward; the others get an empty one.
BACKWARD_READS_LSE = {"triton"}

# Backends of the public contract that have no kernels yet, so that asking for one says so.
PLANNED = {
    "cuda": "the CUDA kernels are not part of this version",
}


@dataclass(frozen=True)
class BackendStatus:
    """One row of `backend_status()`: `serves` lists "attention" and "kv"; `reason` is None where the backend can be used."""

    name: str
    serves: tuple[str, ...]
    reason: str | None


def backend_status() -> list[BackendStatus]:
    """Every backend of the public contract, and why it cannot be used on this machine where it cannot."""
    rows = []
    for name in (*ATTENTION, *PLANNED):
        serves = tuple(kind for kind, table in (("attention", ATTENTION), ("kv", KV)) if name in table)
        reason = PLANNED.get(name) or load_module(ATTENTION, name).unavailable_reason()
        rows.append(BackendStatus(name, serves, reason))
    return rows


def compiled_module() -> str:
    """One line on the compiled CUDA module: what it was built for, or why it is missing."""
    module = import_module(".cuda", __package__)
    return module.unavailable_reason() or f"built for {', '.join(module.load().compiled_archs())}"


def load(table: dict[str, str], name: str) -> ModuleType:
    """The backend module `name`; ValueError if there is none, or if this version or machine cannot run it."""
    if name not in table:
        known = ", ".join(("auto", *table, *(p for p in PLANNED if p not in table)))
        reason = PLANNED.get(name) or ("it serves attention only" if name in ATTENTION else None)
        raise ValueError(f"backend must be one of {known}, but was {name!r}" + (f": {reason}" if reason else ""))
    module = load_module(table, name)
    reason = module.unavailable_reason()
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot be used here: {reason}")
    return module


def load_for(name: str, q: torch.Tensor, layout: VocoLayout) -> ModuleType:
    """The attention backend `name`, which is not "auto"; ValueError also if it cannot serve these inputs."""
    module = load(ATTENTION, name)
    reason = module.unsupported_reason(q, layout)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot serve this call: {reason}")
    return module


def resolved(name: str, q: torch.Tensor) -> str:
    """`name`, or what "auto" stands for: triton on the GPUs, with the dtypes and head dims that it serves, else torch."""
    if name != "auto":
        return name
    if q.is_cuda:
        triton = load_module(ATTENTION, "triton")
        if triton.unavailable_reason() is None and triton.unsupported_reason(q) is None:
            return "triton"
    return "torch"


def load_module(table: dict[str, str], name: str) -> ModuleType:
    """The module of a backend, whether or not this machine can run it."""
    return import_module(f".{table[name]}", __package__)
