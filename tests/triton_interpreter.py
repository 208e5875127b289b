"""Triton kernels on the CPU: turns Triton's interpreter on, and makes it compute bfloat16 and round `fma` once.

The interpreter keeps bfloat16 as bit patterns in uint16 and computes with these integers; only conversions from and to
float32 know better, and to bfloat16 they cut off instead of rounding. `install` wraps a few methods of the interpreter so
that operands are float32 and results are rounded to nearest even, as on a GPU. The `fma` of older versions rounds the
product, too, which the reduction of large angles does not survive. Kernels need not know.

Triton decides at its import whether it interprets, so this module comes before every other import of triton.
"""

import functools
import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    ReduceScanOpInterface,
    TensorHandle,
)


def _is_bf16(handle) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widened(handle):
    """A bfloat16 handle as float32, which is exact; anything else as it is."""
    if not _is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(handle) -> TensorHandle:
    """A float32 handle as bfloat16: nearest, ties to even; NaN stays NaN."""
    bits = np.asarray(handle.data).view(np.uint32)
    nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return TensorHandle(np.where(np.isnan(handle.data), 0x7FC0, nearest).astype(np.uint16), tl.bfloat16)


def _cast(method):
    @functools.wraps(method)
    def cast(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return _rounded(method(self, _widened(src), tl.float32))
        return method(self, _widened(src), dst_type)

    return cast


def _in_float32(method):
    @functools.wraps(method)
    def compute(self, *arguments):
        result = method(self, *map(_widened, arguments))
        # The last operand has the result's type: a product's accumulator is float32 and stays so. Comparisons give booleans.
        last = [argument for argument in arguments if isinstance(argument, TensorHandle)][-1]
        return _rounded(result) if _is_bf16(last) and result.data.dtype == np.float32 else result

    return compute


def _fused(method):
    """a * b + c of float32 rounded once, as on a GPU: in float64 their product is exact, and the second rounding of the sum
    shows only where the first one ends halfway between two float32."""

    @functools.wraps(method)
    def fma(self, a, b, c):
        if c.dtype.scalar != tl.float32:
            return method(self, a, b, c)
        wide = np.asarray(a.data, np.float64) * np.asarray(b.data, np.float64) + np.asarray(c.data, np.float64)
        return TensorHandle(wide.astype(np.float32), c.dtype)

    return fma


def _reduced_in_float32(method):
    @functools.wraps(method)
    def apply(self, values):
        if isinstance(values, tl.tensor) and values.dtype == tl.bfloat16:
            return method(self, values.to(tl.float32)).to(tl.bfloat16)
        return method(self, values)

    return apply


PATCHES = (
    (InterpreterBuilder, "cast_impl", _cast),
    (InterpreterBuilder, "binary_op", _in_float32),
    (InterpreterBuilder, "unary_op", _in_float32),
    (InterpreterBuilder, "create_fma", lambda method: _in_float32(_fused(method))),
    (InterpreterBuilder, "create_dot", _in_float32),
    (ReduceScanOpInterface, "apply", _reduced_in_float32),
)


def _get_bf16(self, value):
    """What a constant in a bfloat16 expression becomes. Triton 3.6 lacks the method."""
    return self.create_fp_trunc(self.get_fp32(value), tl.bfloat16)


def install() -> None:
    """Make the interpreter compute bfloat16, for the rest of the process; a second call changes nothing."""
    if not isinstance(tl.sum, InterpretedFunction):
        raise RuntimeError("triton was imported before triton_interpreter, and compiles instead of interpreting")
    for owner, name, wrapper in PATCHES:
        method = _method(owner, name)
        if not hasattr(method, "__wrapped__"):
            setattr(owner, name, wrapper(method))
    if not hasattr(InterpreterBuilder, "get_bf16"):
        InterpreterBuilder.get_bf16 = _get_bf16


def _method(owner: type, name: str):
    method = getattr(owner, name, None)
    assert method is not None, f"Triton {triton.__version__} has no {owner.__name__}.{name} to patch for bfloat16"
    return method


@triton.jit
def _convert_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(out_ptr + lane, tl.load(x_ptr + lane).to(out_ptr.dtype.element_ty))


@triton.jit
def _elementwise_kernel(a_ptr, b_ptr, out_ptr, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    a, b = tl.load(a_ptr + lane), tl.load(b_ptr + lane)
    if OPERATION == "a + b":
        out = a + b
    elif OPERATION == "a * 0.3":
        out = a * 0.3
    elif OPERATION == "-a":
        out = -a
    elif OPERATION == "fma":
        out = tl.fma(a, b, a)
    elif OPERATION == "where(a < b)":
        out = tl.where(a < b, a, b)
    elif OPERATION == "sum(a < b)":
        out = tl.zeros([SIZE], a.dtype) + tl.sum((a < b).to(a.dtype), 0)
    elif OPERATION == "cumsum(a < b)":
        out = tl.cumsum((a < b).to(a.dtype), 0)
    tl.store(out_ptr + lane, out)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    offsets = lane[:, None] * SIZE + lane[None, :]
    tl.store(out_ptr + offsets, tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)))


# Ties, carries, overflow, what is subnormal and what is not finite.
_INF = float("inf")
_FLOATS = torch.tensor(
    [1 + 2**-8, 1 + 3 * 2**-8, 1.999, -1.999, 3.4e38, 1e30, 1e-40, 0.1, -0.1, 77.7, 2.5, 0.0, -0.0, _INF, -_INF, _INF - _INF]
)
_CONVERSIONS = {
    "float32 to bfloat16": (_FLOATS, torch.bfloat16),
    "float16 to bfloat16": (_FLOATS.half(), torch.bfloat16),
    "int32 to bfloat16": (torch.arange(1000, 1016, dtype=torch.int32), torch.bfloat16),
    "bfloat16 to float32": (_FLOATS.bfloat16(), torch.float32),
    "bfloat16 to float16": (_FLOATS.bfloat16(), torch.float16),
    "bfloat16 to int32": (torch.arange(-8, 8).bfloat16() * 2.5, torch.int32),
}


def _converts(source: torch.Tensor, dtype: torch.dtype) -> bool:
    out = torch.zeros(16, dtype=dtype)
    _convert_kernel[(1,)](source, out, SIZE=16)
    return torch.equal(out.nan_to_num(nan=123), source.to(dtype).nan_to_num(nan=123))


_A, _B = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
_OPERATIONS = {
    "a + b": _A + _B,
    "a * 0.3": _A * torch.tensor(0.3).bfloat16(),
    "-a": -_A,
    "fma": (_A.float() * _B.float() + _A.float()).bfloat16(),
    "where(a < b)": torch.minimum(_A, _B),
    "sum(a < b)": (_A < _B).sum().bfloat16().expand(32, 32),
    "cumsum(a < b)": (_A < _B).flatten().cumsum(0).bfloat16().view(32, 32),
}


def _computes(operation: str, expected: torch.Tensor) -> bool:
    out = torch.zeros_like(_A)
    _elementwise_kernel[(1,)](_A, _B, out, OPERATION=operation, SIZE=_A.numel())
    return torch.equal(out, expected)


def _multiplies() -> bool:
    out = torch.zeros(32, 32)
    _dot_kernel[(1,)](_A, _B, out, SIZE=32)
    return torch.allclose(out, _A.float() @ _B.float(), rtol=1e-5, atol=1e-5)


def _fuses() -> bool:
    """a * b + a, where b is so close to -1 that nothing but what a rounded product would lose remains."""
    a, b = 1 + torch.arange(32) * 2.0**-23, -1 + torch.arange(1, 33) * 2.0**-24
    out = torch.zeros(32)
    _elementwise_kernel[(1,)](a, b, out, OPERATION="fma", SIZE=32)
    return torch.equal(out, (a.double() * b.double() + a.double()).float())


def faults() -> list[str]:
    """Names of the computations, of bfloat16 but for one, that the interpreter gets wrong or refuses, as it is now."""
    probes = {name: functools.partial(_converts, *case) for name, case in _CONVERSIONS.items()}
    probes |= {name: functools.partial(_computes, name, expected) for name, expected in _OPERATIONS.items()}
    probes["dot"] = _multiplies
    probes["fma of float32"] = _fuses
    return [name for name, probe in probes.items() if not _holds(probe)]


def _holds(probe) -> bool:
    try:
        with np.errstate(all="ignore"):
            return probe()
    except InterpreterError:
        return False


def self_test() -> None:
    """Raise AssertionError unless every method is patched and every computation is right."""
    for owner, name, _ in PATCHES:
        assert hasattr(_method(owner, name), "__wrapped__"), f"{owner.__name__}.{name} is not patched for bfloat16"
    wrong = faults()
    assert not wrong, f"Triton {triton.__version__} interprets bfloat16 wrongly in: {', '.join(wrong)}"
