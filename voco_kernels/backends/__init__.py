"""Which backends there are, and which one serves a call.

A backend module is imported when it is first used. For attention it offers `attention(q, k, v, layout, scale, return_lse)`
and `attention_backward(grad_out, q, k, v, out, lse, layout, scale)`; for the K/V path `injection(k_caches, v_caches, slots,
positions, inv_freq, attention_scaling)`, which returns `run(k, v, k_scale, v_scale)`, and `extraction(keys, values, index,
positions, inv_freq, attention_scaling, out_k, out_v)`, which returns `run()`; for decoding `decode(q, k_cache, v_cache,
lengths, block_table, prefix, scale)`, which returns out and lse. `unavailable_reason()` says why it cannot run on this
machine, `unsupported_reason(q, layout)`, for the K/V path `unsupported_reason(kv_dtype, cache)`, for decoding
`unsupported_reason(q, dtype of the prefix)`, why it cannot serve given inputs. Backends never import each other.
"""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch

from .. import choice
from ..layout import VocoLayout

ATTENTION = {"reference": "reference", "torch": "torch", "flash": "flash", "triton": "triton", "cuda": "cuda.attention"}
KV = {"torch": "torch_kv", "triton": "triton.kv", "cuda": "cuda.kv"}
DECODE = {"torch": "torch_decode", "cuda": "cuda.decode"}
TABLES = {"attention": ATTENTION, "kv": KV, "decode": DECODE}
IN_WORDS = {"attention": "attention", "kv": "the K/V path", "decode": "decoding"}

# Backends whose `attention_backward` reads the lse of the forward; the others get an empty one.
BACKWARD_READS_LSE = {"triton", "cuda"}


@dataclass(frozen=True)
class BackendStatus:
    """One row of `backend_status()`: `serves` lists "attention", "kv", "decode"; `reason` is None where it can be used."""

    name: str
    serves: tuple[str, ...]
    reason: str | None


def backend_status() -> list[BackendStatus]:
    """Every backend of the public contract, and why it cannot be used on this machine where it cannot."""
    rows = []
    for name in {**ATTENTION, **KV, **DECODE}:
        tables = {kind: table for kind, table in TABLES.items() if name in table}
        reason = load_module(next(iter(tables.values())), name).unavailable_reason()
        rows.append(BackendStatus(name, tuple(tables), reason))
    return rows


def compiled_module() -> str:
    """One line on the compiled CUDA module: what it was built for, or why it is missing."""
    module = import_module(".cuda", __package__)
    return module.unavailable_reason() or f"built for {', '.join(module.load().compiled_archs())}"


def chosen_on_gpus() -> str:
    """One line on what backend="auto" takes for attention on GPUs, and which results say so."""
    return choice.in_words()


def load(table: dict[str, str], name: str) -> ModuleType:
    """The backend module `name`; ValueError if there is none, or if this version or machine cannot run it."""
    if name not in table:
        known = ", ".join(("auto", *table))
        serves = " and ".join(IN_WORDS[kind] for kind, other in TABLES.items() if name in other)
        reason = f"it serves {serves} only" if serves else None
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


def load_kv(name: str, kv_dtype: torch.dtype, cache: torch.Tensor) -> ModuleType:
    """The K/V backend `name`, which is not "auto"; ValueError also if it cannot serve such K/V and caches."""
    module = load(KV, name)
    reason = module.unsupported_reason(kv_dtype, cache)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot serve this call: {reason}")
    return module


def resolved_kv(name: str, kv_dtype: torch.dtype, cache: torch.Tensor) -> str:
    """`name`, or what "auto" stands for: on a GPU cuda where it was compiled, else triton; torch for everything else."""
    if name != "auto":
        return name
    for fused in ("cuda", "triton") if cache.is_cuda else ():
        module = load_module(KV, fused)
        if module.unavailable_reason() is None and module.unsupported_reason(kv_dtype, cache) is None:
            return fused
    return "torch"


def load_decode(name: str, q: torch.Tensor, stored: torch.dtype | None) -> ModuleType:
    """The backend `name` for decoding, which is not "auto"; ValueError also if it cannot serve such queries and prefixes."""
    module = load(DECODE, name)
    reason = module.unsupported_reason(q, stored)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot serve this call: {reason}")
    return module


def resolved_decode(name: str) -> str:
    """`name`, or what "auto" stands for: torch, since no GPU has measured the CUDA kernels of decoding yet."""
    return "torch" if name == "auto" else name


def resolved(name: str, q: torch.Tensor, *, backward: bool = True) -> str:
    """`name`, or what "auto" stands for: on a GPU cuda where it was measured ahead (`choice.py`), else triton; else torch.

    Args:
        backward: whether gradients may be asked for.
    """
    if name != "auto":
        return name
    if q.is_cuda:
        for fused in ("cuda", "triton") if choice.prefers_cuda(q, backward=backward) else ("triton",):
            module = load_module(ATTENTION, fused)
            if module.unavailable_reason() is None and module.unsupported_reason(q) is None:
                return fused
    return "torch"


def load_module(table: dict[str, str], name: str) -> ModuleType:
    """The module of a backend, whether or not this machine can run it."""
    return import_module(f".{table[name]}", __package__)
