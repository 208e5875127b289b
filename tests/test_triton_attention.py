"""The Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter.

The interpreter takes milliseconds per step of a program, so layouts are as small as they can be with every kind of tile, and
heads are few.
"""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_attention
from strategies import Pack, attention_layouts
from test_attention import GRADIENTS, LAYOUTS, spans
from test_attention import inputs as cpu_inputs

from voco_kernels import Image, Text, VocoLayout, backend_status, voco_attention
from voco_kernels.backends import triton as backend
from voco_kernels.backends.triton import launch
from voco_kernels.tiles import TilePlan, build_tiles, keep

ROOT = Path(__file__).parent.parent
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = [pytest.mark.gpu] if GPU else []

pytest.importorskip("triton")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def poison():
    """What no kernel has written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(layout, dtype, heads=(2, 1), head_dim=32, **options):
    return cpu_inputs(layout, dtype, heads, head_dim, **options)


def results(q, k, v, grad, layout, scale=None) -> dict[str, torch.Tensor]:
    """out, lse and gradients of the backend as CPU tensors."""
    leaves = [x.detach().to(DEVICE).requires_grad_() for x in (q, k, v)]
    out, lse = voco_attention(*leaves, layout.to(DEVICE), scale, "triton", return_lse=True)
    grads = torch.autograd.grad(out, leaves, grad.to(DEVICE))
    return {name: x.detach().cpu() for name, x in zip(("out", "lse", *GRADIENTS), (out, lse, *grads))}


def assert_case(layout, dtype, heads=(2, 1), head_dim=32, scale=None, **options):
    x = inputs(layout, dtype, heads, head_dim, **options)
    assert_attention([(results(*x, layout, scale), x)], layout, scale)


# ---- against float64 under the error rule ------------------------------------------------------------------------------


@pytest.mark.parametrize("isolated", [False, True], ids=["seeing", "isolated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=6)
@given(data=st.data())
def test_any_layout(dtype, isolated, data):
    assert_case(data.draw(attention_layouts(isolated), "layout"), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["prime lengths", "ends in an image", "public tokens anywhere", "padding"])
def test_named_layouts(name, dtype):
    assert_case(LAYOUTS[name], dtype)


@pytest.mark.parametrize("isolated", [False, True], ids=["seeing", "isolated"])
@pytest.mark.parametrize("rows", [(15, 16, 17, 31), (32, 33, 48, 63), (64, 65, 80, 129)], ids=str)
def test_edges_of_tiles(rows, isolated):
    """Segments and text that end around the sizes of tiles and steps."""
    layout = spans(*([Image(n - 2, 2), Text(n)] for n in rows), isolated=isolated)
    assert_case(layout, torch.bfloat16, heads=(1, 1))


@pytest.mark.parametrize("isolated", [False, True], ids=["seeing", "isolated"])
def test_loops_that_go_round(isolated):
    """Several steps in each of the loops: text and VoCo keys before a segment, long segments, long text, many readers."""
    layout = spans([Text(70), Image(130, 70), Text(90), Image(150, 3), Text(140)], isolated=isolated)
    assert_case(layout, torch.float16, heads=(2, 1))


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [
        ((4, 1), 32, torch.float32),
        ((3, 3), 64, torch.bfloat16),
        ((4, 2), 128, torch.float16),
        ((2, 1), 256, torch.bfloat16),
        # Registers hold powers of two, memory multiples of 16.
        ((2, 1), 96, torch.bfloat16),
        ((2, 1), 80, torch.float32),
        ((2, 1), 40, torch.float16),
        ((2, 1), 33, torch.float32),
    ],
    ids=str,
)
def test_heads(heads, head_dim, dtype):
    assert_case(spans([Text(3), Image(29, 3), Text(18)]), dtype, heads, head_dim)


@pytest.mark.parametrize("scale", [0.05, 0.5])
def test_scale(scale):
    assert_case(LAYOUTS["prime lengths"], torch.float32, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_very_large_and_very_small_scores(dtype):
    layout = spans([Text(3), Image(9, 2), Text(20)], [Image(20, 2), Text(5)])
    q, k, v, grad = inputs(layout, dtype)
    # All scores of odd rows are very negative, those of even ones large.
    k = k.abs()
    q = 30 * q.abs() * (1 - 2 * (torch.arange(len(q)) % 2))[:, None, None]
    x = (q.to(dtype), k, v, grad)
    assert_attention([(results(*x, layout), x)], layout)


@pytest.mark.parametrize("isolated", [False, True], ids=["seeing", "isolated"])
def test_segments_back_to_back_with_public_tokens_at_both_ends(isolated):
    """Rows of the next segment stand directly behind the last that may see a key of this one."""
    layout = Pack([1] * 9 + [2] * 9, ([True] + [False] * 7 + [True]) * 2, [0, 18]).layout(isolated)
    assert_case(layout, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs(dtype):
    assert_case(LAYOUTS["prime lengths"], dtype, heads=(4, 2), head_dim=32, strided=True)


def test_gradients_add_up_in_float32():
    """A key of an early token gathers gradients from every later segment."""
    layout = spans([Text(3), *[Image(2 + i % 3, 1) for i in range(40)], Text(8)])
    q, k, v, grad = inputs(layout, torch.bfloat16, (1, 1))
    x = (0.3 * q, k, v, grad + 1)
    assert_attention([(results(*x, layout), x)], layout)


# ---- the same bits, however it is launched -----------------------------------------------------------------------------

MIXED = spans([Text(3), Image(70, 3), Text(40)], [Image(20, 2), Text(18)], isolated=False)


def assert_same(got, want):
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_twice_gives_the_same_bits():
    x = inputs(MIXED, torch.float16)
    assert_same(results(*x, MIXED), results(*x, MIXED))


@pytest.mark.parametrize("programs", [1, 3])
def test_programs_go_on_to_further_tiles(programs, monkeypatch):
    x = inputs(MIXED, torch.float16)
    want = results(*x, MIXED)
    for module in ("forward", "backward"):
        monkeypatch.setattr(f"voco_kernels.backends.triton.{module}.num_programs", lambda *_: programs)
    assert_same(results(*x, MIXED), want)


def on_a_device(plan: TilePlan, n: int) -> TilePlan:
    """The plan as it is made on a device, where nobody counts the tiles."""

    def filled(tiles):
        return torch.cat([tiles, tiles.new_zeros(n - len(tiles), tiles.shape[1])])

    return dataclasses.replace(
        plan, counted=False, row_tiles=filled(plan.row_tiles), key_tiles=filled(plan.key_tiles)
    )


@pytest.mark.parametrize("programs", [1, 2, None], ids=str)
def test_nothing_is_read_behind_the_tables(programs, monkeypatch):
    """Behind the tiles stands one that would overwrite the first rows with zeros."""
    x = inputs(MIXED, torch.float16)
    want = results(*x, MIXED)
    plan = build_tiles(MIXED, launch.GEOMETRY)

    def trapped(tiles):
        trap = torch.zeros(4, tiles.shape[1], dtype=torch.int32)
        trap[:, 1] = 64
        return torch.cat([tiles, trap])[: len(tiles)]

    layout = dataclasses.replace(MIXED).to(DEVICE)
    trap = dataclasses.replace(plan, row_tiles=trapped(plan.row_tiles), key_tiles=trapped(plan.key_tiles))
    keep(layout, trap if DEVICE == "cpu" else trap.to(DEVICE))
    if programs is not None:
        for module in ("forward", "backward"):
            monkeypatch.setattr(f"voco_kernels.backends.triton.{module}.num_programs", lambda *_: programs)
    assert_same(results(*x, layout), want)


def test_plans_that_were_not_counted():
    x = inputs(MIXED, torch.float16)
    want = results(*x, MIXED)
    layout = dataclasses.replace(MIXED).to(DEVICE)
    keep(layout, on_a_device(build_tiles(MIXED, launch.GEOMETRY), MIXED.num_tokens).to(DEVICE))
    assert_same(results(*x, layout), want)


def test_prepared_layouts():
    x = inputs(MIXED, torch.float16)
    assert_same(results(*x, dataclasses.replace(MIXED).prepare()), results(*x, MIXED))


def test_offsets_in_64_bits_change_nothing(monkeypatch):
    x = inputs(MIXED, torch.float16)
    want = results(*x, MIXED)
    for module in ("forward", "backward"):
        monkeypatch.setattr(f"voco_kernels.backends.triton.{module}.needs_int64", lambda *_: True)
    assert_same(results(*x, MIXED), want)


@pytest.mark.parametrize("strides", [(2**24 - 16, 32), (32, 2**31 - 2**20)], ids=["tokens", "heads"])
def test_offsets_beyond_int32(strides):
    """Inputs whose last elements lie more than 2**31 elements behind the first; almost none of that memory is touched."""
    layout = spans([Text(2), Image(126, 3), Text(10)])
    n, heads, head_dim = layout.num_tokens, 2, 32
    x = inputs(layout, torch.float16, (heads, heads), head_dim)
    far = [spread(t, strides) for t in x]
    assert launch.prepared(far[0]) is far[0]
    assert max((n - 1) * strides[0], strides[1]) + head_dim > 2**31 - 2**21
    assert launch.needs_int64(*far) == (strides[0] > 32)
    assert_same(results(*far, layout), results(*x, layout))


def spread(x: torch.Tensor, strides: tuple[int, int]) -> torch.Tensor:
    """`x` with other strides."""
    extent = sum((size - 1) * stride for size, stride in zip(x.shape, (*strides, 1))) + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        buffer = torch.empty(extent, dtype=x.dtype, device=DEVICE)
    return buffer.as_strided(x.shape, (*strides, 1)).copy_(x)


# ---- inputs that kernels cannot read as they are -----------------------------------------------------------------------


def base(shape, dtype=torch.float16):
    return torch.randn(shape).to(dtype)


PREPARED = {
    "contiguous": (lambda: base((6, 2, 32)), True),
    "heads first": (lambda: base((2, 6, 32)).transpose(0, 1), True),
    "one of several": (lambda: base((6, 3, 2, 32))[:, 1], True),
    "one head of many": (lambda: base((6, 9, 32))[:, 3:4], True),
    "the same token again": (lambda: base((1, 2, 32)).expand(6, 2, 32), True),
    "head_dim not contiguous": (lambda: base((6, 2, 64))[..., ::2], False),
    "head_dim first": (lambda: base((32, 2, 6)).permute(2, 1, 0), False),
    "odd stride of tokens": (lambda: base((6, 2 * 32 + 8))[:, :64].unflatten(1, (2, 32)), False),
    "odd stride of heads": (lambda: base((6, 2, 40))[..., :32], False),
    "odd address": (lambda: base((6 * 64 + 4,))[4:].view(6, 2, 32), False),
    "odd head_dim": (lambda: base((6, 2, 40)), False),
    "far apart": (lambda: spread(base((2, 2, 32)), (2**24, 32)).cpu(), False),
    "expanded number": (lambda: base(()).expand(6, 2, 32), False),
}  # fmt: skip


@pytest.mark.parametrize("name", PREPARED)
def test_prepared(name):
    """Whatever would lose the asynchronous copies is copied, and nothing else."""
    make, fits = PREPARED[name]
    x = make()
    y = launch.prepared(x)
    assert (y is x) == fits
    d = x.shape[2]
    assert torch.equal(y[..., :d], x) and not y[..., d:].any()
    assert y.stride(2) == 1 and y.shape[2] % 16 == 0 and y.data_ptr() % 16 == 0
    assert launch.strides_of(y)[0] < launch.MAX_ROW_STRIDE and all(stride % 16 == 0 for stride in launch.strides_of(y))


@pytest.mark.parametrize("name", ["odd stride of heads", "odd address"])
def test_inputs_that_are_copied_give_the_same_bits(name):
    layout = spans([Image(3, 1), Text(2)], isolated=True)
    x = [PREPARED[name][0]() for _ in range(4)]
    assert not x[0].is_contiguous() or x[0].data_ptr() % 16
    if not GPU:
        assert_same(results(*x, layout), results(*(t.clone(memory_format=torch.contiguous_format) for t in x), layout))


# ---- behaviour ---------------------------------------------------------------------------------------------------------


def test_padding_may_hold_anything():
    layout = LAYOUTS["padding"]
    clean = inputs(layout, torch.float32)
    poisoned = [x.clone() for x in clean]
    for x in poisoned:
        x[layout.segment_ids < 0] = float("nan")
    got = results(*poisoned, layout)
    assert_same(got, results(*clean, layout))
    padding = layout.segment_ids < 0
    assert all(not got[name][padding].any() for name in ("out", *GRADIENTS))
    assert (got["lse"][padding] == float("-inf")).all() and got["lse"][~padding].isfinite().all()


@pytest.mark.parametrize("layout", [spans(), spans([], []), Pack([-1] * 3, [False] * 3, [0, 3]).layout(False)])
def test_nothing_to_attend_to(layout):
    x = inputs(layout, torch.float32)
    got = results(*x, layout)
    assert got["out"].shape == x[0].shape and not got["out"].any()
    assert got["lse"].shape == x[0].shape[:2] and (got["lse"] == float("-inf")).all()
    assert all(got[name].shape == t.shape and not got[name].any() for name, t in zip(GRADIENTS, x))


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False)])
def test_gradients_of_some_inputs(wanted):
    layout = spans([Image(9, 2), Text(5)])
    *x, grad = (t.to(DEVICE) for t in inputs(layout, torch.float32))
    want = results(*x, grad, layout)
    leaves = [t.detach().requires_grad_(w) for t, w in zip(x, wanted)]
    out, lse = voco_attention(*leaves, layout.to(DEVICE), backend="triton", return_lse=True)
    assert out.requires_grad and not lse.requires_grad
    out.backward(grad)
    for leaf, w, name in zip(leaves, wanted, GRADIENTS):
        assert torch.equal(leaf.grad.cpu(), want[name]) if w else leaf.grad is None


def test_without_gradients():
    layout = spans([Image(9, 2), Text(5)])
    *x, grad = inputs(layout, torch.float32)
    with torch.inference_mode():
        out = voco_attention(*(t.to(DEVICE) for t in x), layout.to(DEVICE), backend="triton")
    assert torch.equal(out.cpu(), results(*x, grad, layout)["out"])


def test_results_may_be_changed_in_place():
    layout = spans([Image(9, 2), Text(5)]).to(DEVICE)
    *x, _ = (t.to(DEVICE) for t in inputs(layout.to("cpu"), torch.float32))
    with torch.no_grad():
        out, lse = voco_attention(*x, layout, backend="triton", return_lse=True)
    weight = torch.ones(2, 32, device=DEVICE, requires_grad=True)
    out += weight
    lse.mul_(2)
    out.sum().backward()
    assert weight.grad is not None


def test_nan_does_not_look_like_padding():
    layout = spans([Text(4)])
    q, k, v, _ = (t.to(DEVICE) for t in inputs(layout, torch.float32, (1, 1)))
    q[2] = float("nan")
    out, lse = voco_attention(q, k, v, layout.to(DEVICE), backend="triton", return_lse=True)
    assert out[2].isnan().all() and lse[2].isnan().all() and lse[[0, 1, 3]].isfinite().all()


def test_inputs_are_left_alone():
    x = inputs(MIXED, torch.float16)
    copies = [t.clone() for t in x]
    results(*x, MIXED)
    assert_same(dict(enumerate(x)), dict(enumerate(copies)))


NEW_SWITCH = hasattr(torch.backends.cuda.matmul, "fp32_precision")


@pytest.mark.parametrize(
    "allow",
    [
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.set_float32_matmul_precision('high')",
        pytest.param(
            "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
            marks=pytest.mark.skipif(not NEW_SWITCH, reason="torch has no fp32_precision yet"),
        ),
    ],
)
def test_float32_products_are_exact_unless_torch_says_otherwise(allow):
    """Whichever of its switches was used; each in a fresh process, since torch forbids to mix them."""
    code = f"""
import torch
from voco_kernels.backends.triton.launch import precision
print(precision(torch.float32), precision(torch.bfloat16))
{allow}
print(precision(torch.float32), precision(torch.bfloat16))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["ieee", "ieee", "tf32", "ieee"], done.stderr


# ---- as an operator ----------------------------------------------------------------------------------------------------


def operator_arguments(layout, dtype=torch.float32, requires_grad=True):
    q, k, v, grad = (x.to(DEVICE) for x in inputs(layout, dtype, (2, 1)))
    layout = layout.to(DEVICE)
    ids = (layout.segment_ids, layout.public, layout.cu_seqlens, layout.isolated)
    return [x.requires_grad_(requires_grad) for x in (q, k, v)], ids, grad


def test_opcheck():
    tensors, ids, grad = operator_arguments(spans([Image(4, 2), Text(3)], isolated=True))
    torch.library.opcheck(torch.ops.voco.attention.default, (*tensors, *ids, 0.3, "triton", True))
    q, k, v = (x.detach() for x in tensors)
    out, lse = torch.ops.voco.attention(q, k, v, *ids, 0.3, "triton", True)
    torch.library.opcheck(torch.ops.voco.attention_backward.default, (grad, q, k, v, out, lse, *ids, 0.3, "triton"))


def test_compile():
    """One full graph, forward and backward, with the bits of eager."""
    layout = spans([Text(2), Image(9, 2), Text(5)])
    x = inputs(layout, torch.float32)

    def attention(q, k, v, layout):
        return voco_attention(2 * q, k, v, layout, backend="triton") * 3

    compiled = torch.compile(attention, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    got, want = [], []
    for step, collected in ((compiled, got), (attention, want)):
        leaves = [t.to(DEVICE).requires_grad_() for t in x[:3]]
        out = step(*leaves, layout.to(DEVICE))
        out.backward(x[3].to(DEVICE))
        collected += [out.detach(), *(leaf.grad for leaf in leaves)]
    torch.testing.assert_close(got, want)


# ---- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_dim", "dtype", "reason"),
    [
        (32, torch.float64, "it takes float16, bfloat16 and float32, not float64"),
        (16, torch.float16, "it takes head_dim 32 to 256, not 16"),
        (257, torch.float16, "it takes head_dim 32 to 256, not 257"),
    ],
)
def test_refusals(head_dim, dtype, reason):
    layout = spans([Text(3)])
    q, k, v, _ = (x.to(DEVICE) for x in inputs(layout, dtype, (1, 1), head_dim))
    with pytest.raises(ValueError, match=rf"^backend 'triton' cannot serve this call: {reason}$"):
        voco_attention(q, k, v, layout.to(DEVICE), backend="triton")


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {row.name: row.reason for row in backend_status()}["triton"] == "there is no CUDA device"
    layout = spans([Text(3)])
    q = torch.randn(3, 1, 32)
    with pytest.raises(ValueError, match=r"^backend 'triton' cannot be used here: there is no CUDA device$"):
        voco_attention(q, q, q, layout, backend="triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"cannot serve this call: it needs tensors on an NVIDIA GPU, not on cpu$"):
        voco_attention(q, q, q, layout, backend="triton")


def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    monkeypatch.setattr(backend, "arch_of", lambda device: 75)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    q = SimpleNamespace(dtype=torch.float16, shape=(3, 1, 32), device=torch.device("cuda"))
    assert backend.unsupported_reason(q, spans([Text(3)])) == "it needs compute capability 8.0, not 7.5"


@pytest.mark.parametrize("arch", [86, 89, 120])
def test_gpus_with_little_shared_memory(arch, monkeypatch):
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    monkeypatch.setattr(backend, "arch_of", lambda device: arch)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for head_dim, reason in ((128, None), (160, "head_dim 160 needs more shared memory than compute capability")):
        q = SimpleNamespace(dtype=torch.float16, shape=(3, 1, head_dim), device=torch.device("cuda"))
        found = backend.unsupported_reason(q)
        assert found is None if reason is None else found.startswith(reason)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_are_launch_parameters_for_all(dtype, arch):
    for kernel in ("forward", "dq", "dkv"):
        for head_dim in (32, 40, 64, 96, 128, 192, 256):
            assert isinstance(launch.launch_of(kernel, arch, head_dim, dtype), launch.Launch)


def test_lse_is_the_natural_logarithm():
    layout = spans([Text(2)])
    q = torch.zeros(2, 1, 32, device=DEVICE)
    _, lse = voco_attention(q, q, q, layout.to(DEVICE), backend="triton", return_lse=True)
    torch.testing.assert_close(lse.cpu(), torch.tensor([[0.0], [math.log(2)]]))


def test_layouts_come_and_go():
    for voco in (1, 2, 3) * 2:
        layout = VocoLayout.from_spans([[Text(3), Image(12 - voco, voco), Text(5)]], isolated=False)
        x = inputs(layout, torch.float32, (1, 1))
        assert_attention([(results(*x, layout), x)], layout)
