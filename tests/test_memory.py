"""O(N) memory: forward and backward of layouts whose dense masks would need gigabytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYOUTS = {
    "a video of 127 isolated frames": "[[*[Image(256, 2)] * 127, Text(512)]], isolated=True",
    "an image and 16k text tokens": "[[Image(576, 2), Text(16384)]], isolated=False",
    "64 images that see each other": "[[Text(16), *[Image(576, 2)] * 64, Text(512)]], isolated=False",
}

# VmHWM belongs to one program; ru_maxrss starts at the peak of the process that launched it.
MEASURE = """
import torch
import voco_kernels as vk
from voco_kernels import Image, Text

torch.set_num_threads(1)


def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024


def tensors(layout):
    return [torch.randn(layout.num_tokens, 4, 64, requires_grad=grad) for grad in (True, True, True, False)]


def step(layout, q, k, v, grad):
    vk.voco_attention(q, k, v, layout, backend=BACKEND).backward(grad)


tiny = vk.VocoLayout.from_spans([[Image(4, 1), Text(600)]], isolated=False)
step(tiny, *tensors(tiny))
layout = vk.VocoLayout.from_spans(SPANS)
inputs = tensors(layout)
before = peak()
step(layout, *inputs)
assert all(x.grad.isfinite().all() for x in inputs[:3])
print(layout.num_tokens, peak() - before)
"""


def added_bytes(spans: str, backend: str = "torch") -> tuple[int, int]:
    """(tokens, bytes that one forward and backward pass adds to the peak of a fresh process)"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc/self/status")
    code = MEASURE.replace("SPANS", spans).replace("BACKEND", repr(backend))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-5000:]
    tokens, added = map(int, done.stdout.split())
    return tokens, added


@pytest.mark.parametrize("name", LAYOUTS)
def test_under_a_gigabyte(name):
    tokens, added = added_bytes(LAYOUTS[name])
    assert tokens > 16_000
    assert added < 2**30, f"{name}: {added / 2**20:.0f} MiB"


def test_a_dense_mask_is_seen():
    """The measurement sees what it is there to forbid."""
    tokens, added = added_bytes("[[Text(2048)]], isolated=True", backend="reference")
    assert added > 4 * 4 * tokens**2
