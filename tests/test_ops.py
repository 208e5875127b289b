"""The registered operators: opcheck, torch.compile in a fresh process, and the backward that compiled graphs use."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from cuda_backend import emulated
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_attention
from strategies import Pack, attention_layouts

import voco_kernels  # noqa: F401 (registers the operators)
import voco_kernels.backends.reference as reference_backend
import voco_kernels.backends.torch as torch_backend
from voco_kernels import Image, Text, VocoLayout

ROOT = Path(__file__).parent.parent
LAYOUT = VocoLayout.from_spans([[Text(2), Image(4, 2), Text(3)], [Image(3, 1), Text(2)]], isolated=False)
PADDED = Pack([-1, 1, 1, 1, 0, 0, -1], [False, False, False, True, True, True, False], [0, 7]).layout(True)
BACKENDS = {"torch": torch_backend, "reference": reference_backend}


def qkv(layout, dtype=torch.float32, heads=(4, 2), head_dim=8):
    return [torch.randn(layout.num_tokens, h, head_dim).to(dtype) for h in (heads[0], heads[1], heads[1])]


# ---- attention_backward against float64 --------------------------------------------------------------------------------


def assert_backward(layout, dtype, heads, backend, strided=False):
    q, k, v = qkv(layout, dtype, heads, head_dim=16)
    grad = torch.randn_like(q)
    if strided:
        q, k, v, grad = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, grad))
    got = BACKENDS[backend].attention_backward(grad, q, k, v, None, None, layout, 0.25)
    assert [g.dtype for g in got] == [dtype] * 3
    assert_attention([(dict(zip(("dq", "dk", "dv"), got)), (q, k, v, grad))], layout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@given(data=st.data())
def test_backward_of_any_layout(dtype, backend, data, row_chunks):
    row_chunks(data.draw(st.sampled_from([1, 5, 256]), "rows"), 768)
    layout = data.draw(attention_layouts(data.draw(st.booleans(), "isolated")), "layout")
    heads = data.draw(st.sampled_from([(4, 1), (4, 2), (4, 4)]), "heads")
    assert_backward(layout, dtype, heads, backend, data.draw(st.booleans(), "strided"))


@pytest.mark.parametrize("rows", [255, 256, 257])
def test_backward_of_row_chunks_of_the_real_size(rows):
    layout = VocoLayout.from_spans([[Text(3), Image(rows - 2, 2)], [Image(20, 3), Text(rows)]], isolated=False)
    assert_backward(layout, torch.float32, (2, 1), "torch")


# ---- opcheck -----------------------------------------------------------------------------------------------------------


def attention_arguments(layout, backend, return_lse, requires_grad, dtype=torch.float32):
    tensors = [x.requires_grad_(requires_grad) for x in qkv(layout, dtype)]
    ids = (layout.segment_ids, layout.public, layout.cu_seqlens, layout.isolated)
    return (*tensors, *ids, 0.3, backend, return_lse)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("return_lse", [False, True], ids=["", "lse"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_attention(backend, return_lse, requires_grad):
    arguments = attention_arguments(LAYOUT, backend, return_lse, requires_grad)
    torch.library.opcheck(torch.ops.voco.attention.default, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_opcheck_attention_of_other_dtypes_and_padding(dtype):
    arguments = attention_arguments(PADDED, "torch", True, True, dtype)
    torch.library.opcheck(torch.ops.voco.attention.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_attention_backward(backend):
    q, k, v, *rest, _ = attention_arguments(LAYOUT, backend, False, False)
    results = torch.randn_like(q), torch.empty(0)
    torch.library.opcheck(torch.ops.voco.attention_backward.default, (torch.randn_like(q), q, k, v, *results, *rest))


@pytest.fixture(params=["torch", "triton", "cuda"])
def kv_backend(request):
    """Each backend of the K/V path, on CPU tensors."""
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("kernels are interpreted only where there is no GPU")
    with emulated() if request.param == "cuda" else nullcontext():
        yield request.param


@pytest.mark.parametrize("rotate", [False, True])
def test_opcheck_extract_kv(kv_backend, rotate):
    keys, values = ([torch.randn(9, 2, 8) for _ in range(3)] for _ in "kv")
    index = torch.tensor([4, 0, 8])
    rotation = (torch.tensor([-7, 3, 900]), torch.rand(4), 1.2) if rotate else (None, None, 1.0)
    torch.library.opcheck(torch.ops.voco.extract_kv.default, (keys, values, index, *rotation, kv_backend))


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
def test_opcheck_inject_kv(kv_backend, quantised, requires_grad):
    k, v = (torch.randn(2, 3, 2, 8) for _ in "kv")
    scales = (None, None)
    if quantised:
        k, v = (x.mul(20).to(torch.int8) for x in (k, v))
        scales = (torch.rand(2, 3, 2), torch.rand(2, 3, 2))
    elif requires_grad:
        k, v = k.requires_grad_(), v.requires_grad_()
    k_caches, v_caches = ([torch.zeros(4, 2, 2, 8) for _ in range(2)] for _ in "kv")
    slots, positions = torch.tensor([7, -1, 0]), torch.tensor([5, 6, -7])
    arguments = (k, v, *scales, k_caches, v_caches, slots, positions, torch.rand(4), 1.5, kv_backend)
    torch.library.opcheck(torch.ops.voco.inject_kv.default, arguments)


def test_lse_of_the_operator_is_not_differentiable():
    out, lse = torch.ops.voco.attention(*attention_arguments(LAYOUT, "torch", True, True))
    assert out.requires_grad and not lse.requires_grad


# ---- torch.compile -----------------------------------------------------------------------------------------------------

COMPILE = """
import sys
import torch
import voco_kernels as vk
from torch._dynamo.utils import counters
from voco_kernels import Image, Text

torch.manual_seed(0)
torch.set_num_threads(1)
backend = sys.argv[1]
layouts = [
    vk.VocoLayout.from_spans([[Text(3), Image(6, 2), Text(5)], [Image(9, 1), Text(4)]], isolated=False),
    vk.VocoLayout.from_spans([[Image(12, 3), Text(1)], [Text(8), Image(4, 2)]], isolated=False),
]
assert layouts[0].num_tokens == layouts[1].num_tokens == 30


def compiled(step):
    torch._dynamo.reset()
    return torch.compile(step, fullgraph=True, backend=backend)


def differentiated(step, layout, x, grad):
    leaves = [t.clone().requires_grad_() for t in x]
    out, lse = step(*leaves, layout)
    out.backward(grad)
    return [out.detach(), lse, *(t.grad for t in leaves)]


def attention(q, k, v, layout):
    # Arithmetic on both sides, so that the operator stands inside a graph.
    out, lse = vk.voco_attention(2 * q, k, v, layout, 0.2, return_lse=True)
    return out * 3, lse


def of_each_layout(step, run):
    step = compiled(step)
    run(step, layouts[0])
    torch._dynamo.config.error_on_recompile = True
    run(step, layouts[1])
    torch._dynamo.config.error_on_recompile = False


x = [torch.randn(30, h, 16) for h in (4, 2, 2)]
grad = torch.randn(30, 4, 16)


def run(step, layout):
    got, want = (differentiated(f, layout, x, grad) for f in (step, attention))
    assert not got[1].requires_grad
    torch.testing.assert_close(got, want)


of_each_layout(attention, run)

inv_freq = torch.rand(8)
keys, values = torch.randn(2, 3, 30, 2, 16)
keys.requires_grad_()


def extract(index, positions):
    kv = vk.extract_kv(keys * 2, list(values), index, positions, inv_freq, 1.25)
    return kv.k, kv.v


def inject(kv, k_cache, v_caches, slots, positions):
    vk.inject_kv(kv, k_cache, v_caches, slots, positions, inv_freq, 1.25)
    return k_cache + 1


run = compiled(extract)
for index, positions in ([3, 1, 29], [-5, 0, 70]), ([0, 0, 2], [9, 8, 7]):
    index, positions = torch.tensor(index), torch.tensor(positions)
    got = run(index, positions)
    assert not got[0].requires_grad
    torch.testing.assert_close(got, extract(index, positions))
    torch._dynamo.config.error_on_recompile = True
torch._dynamo.config.error_on_recompile = False

run = compiled(inject)
kv = vk.VocoKV(*torch.randn(2, 3, 4, 2, 16))
for slots, positions in ([5, 1, -1, 0], [-5, 0, 70, 3]), ([2, 3, 4, 5], [1, 2, 3, 4]):
    slots, positions = torch.tensor(slots), torch.tensor(positions)
    results = []
    for step in (run, inject):
        k_cache, v_caches = torch.full((3, 3, 2, 2, 16), 7.0), [torch.full((3, 2, 2, 16), 7.0) for _ in range(3)]
        results.append([step(kv, k_cache, v_caches, slots, positions), k_cache, *v_caches])
    torch.testing.assert_close(*results)
    torch._dynamo.config.error_on_recompile = True

assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"], counters
print("compiled")
"""


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compile_in_a_fresh_process(backend, tmp_path):
    """Full graphs, the results and gradients of eager, and no second compilation for a second layout of the same size."""
    command = [sys.executable, "-c", COMPILE, backend]
    done = subprocess.run(command, cwd=ROOT, env=environment(tmp_path), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout == "compiled\n"


def environment(folder) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
