"""Attention of a few small layouts, forward and backward, decoding, and the K/V path, for a sanitizer to watch.

`bench.gpu_check` runs it.
"""

import argparse

import torch

from bench import gpu_kv
from bench.attention_problem import inputs_of, results_of
from bench.decode_problem import Problem, able
from bench.shapes import AttentionShape, DecodeShape, KVShape
from voco_kernels import Image, Text

# Tiles that end inside a segment, VoCo keys behind text, text in several runs; everything short, since a sanitizer is slow.
SHAPES = (
    AttentionShape("frames", "full and ragged tiles", (((Image(70, 3),) * 3 + (Text(37),)),), True, heads=2, kv_heads=2),
    AttentionShape("turns", "segments that see text", ((Text(9), Image(66, 2), Text(70), Image(20, 1)),), False, 2, 1),
    AttentionShape("pack", "documents of all kinds", ((Text(5),), (Image(130, 5),), (Image(3, 1), Text(18))), True, 4, 2),
    # Kernels of their own in CUDA.
    AttentionShape("narrow", "rows of 192 bytes", ((Text(9), Image(66, 2), Text(70)),), False, 2, 1, 96),
    AttentionShape("wide", "operands in shared memory", ((Text(9), Image(66, 2), Text(70)),), False, 2, 1, 256),
)
DECODE_SHAPE = DecodeShape("questions", "ragged blocks", prefix=70, requests=5, own=9, heads=4, kv_heads=2, head_dim=64)
KV_SHAPE = KVShape("images", "few tokens in few layers", images=2, vision=9, voco=3, layers=3, kv_heads=2, head_dim=64)


def main(arguments: list[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m bench.sanitized", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs="*", default=("triton", "cuda"))
    parser.add_argument("--kv-backends", nargs="*", default=gpu_kv.BACKENDS)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    for shape in SHAPES:
        inputs = inputs_of(shape, device, torch.bfloat16)
        for backend in options.backends:
            results = results_of(*inputs, shape.layout().to(device), backend)
            assert all(bool(x.isfinite().all()) for x in results.values()), (shape.name, backend)
    for stored in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        problem = Problem(DECODE_SHAPE, device, torch.bfloat16, stored)
        problem.check(problem.shared(able(device)[0]))
    for backend in options.kv_backends:
        gpu_kv.check(KV_SHAPE, device, torch.bfloat16, backend)
    said = f"{len(SHAPES)} layouts, forward and backward of {', '.join(options.backends)}; decoding of {able(device)[0]}"
    print(f"{said}; K/V path of {', '.join(options.kv_backends)}")


if __name__ == "__main__":
    main()
