"""Launches of the shipped kernels, for `fake_cuda`: what a GPU would be asked to run, on tensors that hold nothing.

`python tests/triton_jobs.py` compiles every shipped configuration and writes `triton_budget.json` anew.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

BUDGET = Path(__file__).parent / "triton_budget.json"
KERNELS = ("forward_kernel", "dq_kernel", "dkv_kernel")
KV_KERNELS = ("inject_kernel", "extract_kernel")
COUNTED = ("registers", "stack", "shared", "LDL", "STL", "HMMA", "HGMMA", "LDGSTS")

# name: (capability, function, arguments). head_dim 96 is compiled as 128 with masks.
SHIPPED = {
    f"sm_{arch} head_dim {head_dim} {dtype}": (
        arch,
        "triton_jobs:attention",
        {"arch": arch, "head_dim": head_dim, "dtype": dtype},
    )
    for arch in (80, 90)
    for head_dim in (32, 64, 96, 128, 256)
    for dtype in ("float16", "bfloat16", "float32")
}
KV_TYPES = (
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("float32", "float32"),
    ("int8", "bfloat16"),
    ("float8_e4m3fn", "bfloat16"),
)
KV_SHIPPED = {
    f"sm_{arch} {kv_dtype} -> {dtype}{'' if stacked else ', separate layers'}": (
        arch,
        "triton_jobs:move_kv",
        {"kv_dtype": kv_dtype, "dtype": dtype, "stacked": stacked},
    )
    for arch in (80, 90)
    for kv_dtype, dtype in KV_TYPES
    for stacked in (True, False)
}


def attention(arch: int, head_dim: int, dtype: str, odd: bool = False) -> None:
    """Forward and backward of 4 query and 2 key heads; `odd` gives inputs whose rows do not start at 16 bytes."""
    inputs = [torch.empty(77, heads, head_dim + odd, dtype=getattr(torch, dtype))[..., odd:] for heads in (4, 2, 2, 4)]
    _launch(arch, *inputs)


def far_apart(arch: int) -> None:
    """The same with offsets that need 64 bits."""
    strides = (2**24 - 16, 128, 1)
    _launch(arch, *(torch.empty_strided((200, 4, 128), strides, dtype=torch.bfloat16, device="meta") for _ in range(4)))


def move_kv(kv_dtype: str, dtype: str, stacked: bool, head_dim: int = 128, odd: bool = False) -> None:
    """Injection of two tokens into static caches, and extraction; `odd` gives caches whose rows do not start at 16 bytes."""
    from voco_kernels import VocoKV
    from voco_kernels.backends.triton import kv as backend

    layers, heads = 3, 8
    shape = (layers, heads, 16 + odd, head_dim + odd)
    sides = [torch.empty(shape, dtype=getattr(torch, dtype))[..., odd:].transpose(1, 2) for _ in "kv"]
    # Tensors of their own, and in no order that a stride could describe.
    sides = [list(side) if stacked else [side[0].clone(), side[2].clone(), side[1].clone()] for side in sides]
    tokens, inv_freq = torch.zeros(2, dtype=torch.int64), torch.empty(head_dim // 2)
    rows = torch.empty(layers, 2, heads, head_dim, dtype=getattr(torch, kv_dtype))
    scales = (None, None) if rows.is_floating_point() and rows.itemsize > 1 else (torch.empty(layers, 2, heads),) * 2
    kv = VocoKV(rows, rows.clone(), *scales)
    backend.injection(*sides, tokens, tokens, inv_freq, 1.0)(kv.k, kv.v, kv.k_scale, kv.v_scale)
    out = [torch.empty(layers, 2, heads, head_dim, dtype=getattr(torch, dtype)) for _ in "kv"]
    backend.extraction(*sides, tokens, tokens, inv_freq, 1.0, *out)()


def _launch(arch: int, q, k, v, grad) -> None:
    from voco_kernels import Image, Text, VocoLayout
    from voco_kernels.backends.triton import launch
    from voco_kernels.backends.triton.backward import backward
    from voco_kernels.backends.triton.forward import forward
    from voco_kernels.tiles import build_tiles

    layout = VocoLayout.from_spans([[Image(q.shape[0] - 18, 2), Text(16)]], isolated=True)
    plan = build_tiles(layout, launch.geometry_of(q.shape[2], q.dtype))
    out, lse = forward(q, k, v, plan, 0.125, arch)
    backward(grad, q, k, v, out, lse, plan, 0.125, arch)


def counted(report) -> dict[str, int]:
    """The numbers of a launch that the budget holds."""
    return {name: getattr(report.resources, name) for name in COUNTED}


def main() -> None:
    """Write the budget of every shipped configuration."""
    import fake_cuda
    import triton

    kernels, jobs = {}, SHIPPED | KV_SHIPPED
    with ThreadPoolExecutor(os.cpu_count()) as children:
        compiled = children.map(lambda name: fake_cuda.run_jobs({name: jobs[name]})[name], jobs)
        for at, (name, reports) in enumerate(zip(jobs, compiled, strict=True), start=1):
            kernels |= {f"{report.name} {name}": counted(report) for report in reports}
            print(f"{at}/{len(jobs)} {name}", file=sys.stderr, flush=True)
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in kernels.items())
    BUDGET.write_text(f'{{"triton": {json.dumps(triton.__version__)}, "kernels": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
