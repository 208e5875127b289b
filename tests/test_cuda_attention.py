"""The CUDA attention kernels against float64: on a GPU where there is one, else in the emulation of csrc/host.

Sanitizers and machine code, which need no GPU, are in tests/test_cuda_attention_host.py.
"""

import dataclasses
from types import SimpleNamespace

import cuda_backend
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_attention
from strategies import Pack, attention_layouts
from test_attention import GRADIENTS, LAYOUTS, inputs, spans

from voco_kernels import Image, Text, voco_attention
from voco_kernels.backends import cuda as package
from voco_kernels.backends.cuda import attention as backend
from voco_kernels.tiles import TilePlan, build_tiles, keep

GPU = torch.cuda.is_available() and backend.unavailable_reason() is None
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.float16, torch.bfloat16)
pytestmark = [pytest.mark.gpu] if GPU else []


@pytest.fixture
def cuda(monkeypatch):
    """Backend "cuda" with the kernels of all GPUs: on a GPU, or emulated. What no kernel has written is NaN."""
    monkeypatch.setattr(backend, "_has_wgmma", lambda q: False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    if GPU:
        yield backend.load()
    else:
        with cuda_backend.emulated() as module:
            yield module
    torch.use_deterministic_algorithms(False)


def results(q, k, v, grad, layout, scale=None) -> dict[str, torch.Tensor]:
    """out, lse and gradients of the backend as CPU tensors."""
    leaves = [x.detach().to(DEVICE).requires_grad_() for x in (q, k, v)]
    out, lse = voco_attention(*leaves, layout.to(DEVICE), scale, "cuda", return_lse=True)
    grads = torch.autograd.grad(out, leaves, grad.to(DEVICE))
    return {name: x.detach().cpu() for name, x in zip(("out", "lse", *GRADIENTS), (out, lse, *grads))}


def assert_case(layout, dtype=torch.bfloat16, heads=(2, 1), head_dim=64, scale=None, **options):
    x = inputs(layout, dtype, heads, head_dim, **options)
    assert_attention([(results(*x, layout, scale), x)], layout, scale)


# ---- against float64 under the error rule ------------------------------------------------------------------------------


@pytest.mark.parametrize("isolated", [False, True], ids=["seeing", "isolated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=20)
@given(data=st.data())
def test_any_layout(cuda, dtype, isolated, data):
    assert_case(data.draw(attention_layouts(isolated), "layout"), dtype)


@pytest.mark.parametrize("head_dim", [96, 128, 256])
@settings(max_examples=8)
@given(data=st.data())
def test_any_layout_at_every_head_dim(cuda, head_dim, data):
    layout = data.draw(attention_layouts(data.draw(st.booleans(), "isolated")), "layout")
    assert_case(layout, data.draw(st.sampled_from(DTYPES), "dtype"), head_dim=head_dim)


@pytest.mark.parametrize("name", ["prime lengths", "ends in an image", "public tokens anywhere", "padding"])
@pytest.mark.parametrize("head_dim", backend.HEAD_DIMS)
def test_named_layouts(cuda, name, head_dim):
    assert_case(LAYOUTS[name], head_dim=head_dim)


@pytest.mark.parametrize("isolated", [False, True], ids=["seeing", "isolated"])
@pytest.mark.parametrize("rows", [(15, 16, 17, 31), (32, 33, 47, 48, 49, 63), (64, 65, 80, 97, 129)], ids=str)
def test_edges_of_tiles(cuda, rows, isolated):
    """Segments and text that end around the sizes of tiles, of warps' shares and of steps."""
    assert_case(spans(*([Image(n - 2, 2), Text(n)] for n in rows), isolated=isolated), heads=(1, 1))


@pytest.mark.parametrize("voco", [13, 14, 30])
def test_steps_that_end_at_the_edge_of_a_mask(cuda, voco):
    assert_case(spans([Image(20, voco), Text(80)]), torch.float16, (1, 1))


@pytest.mark.parametrize("isolated", [False, True], ids=["seeing", "isolated"])
def test_late_rows_end_with_their_segment(cuda, isolated):
    layout = Pack([1] * 31 + [2] * 5, [True] * 16 + [False] * 15 + [True] + [False] * 4, [0, 36]).layout(isolated)
    assert_case(layout, torch.float16, (1, 1))


def test_copies_for_a_tile_that_meets_nothing(cuda, monkeypatch):
    """They are over when the next tile's begin; the emulation sees two that are under way to one place."""
    segments = [-1] * 70 + [i // 20 + 1 for i in range(240)]
    layout = Pack(segments, [False] * 310, [0, 310]).layout(True)
    monkeypatch.setattr(TilePlan, "likely", lambda *_: 1)
    assert_case(layout, heads=(1, 1), head_dim=128)


LONG = [Text(70), Image(130, 70), Text(90), Image(150, 3), Text(140)]


@pytest.mark.parametrize("isolated", [False, True], ids=["seeing", "isolated"])
@pytest.mark.parametrize("head_dim", [64, *(pytest.param(d, marks=pytest.mark.full) for d in (128, 256))])
def test_many_steps(cuda, isolated, head_dim):
    """Stages go round in each range: text and VoCo keys before a segment, long segments, long text, many readers."""
    assert_case(spans(LONG, isolated=isolated), head_dim=head_dim)


@pytest.mark.parametrize("heads", [(4, 1), (3, 3), (8, 2)], ids=str)
def test_heads(cuda, heads):
    assert_case(spans([Text(3), Image(29, 3), Text(18)]), torch.float16, heads)


@pytest.mark.parametrize("scale", [0.05, 0.5])
def test_scale(cuda, scale):
    assert_case(LAYOUTS["prime lengths"], scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_very_large_and_very_small_scores(cuda, dtype):
    layout = spans([Text(3), Image(9, 2), Text(40)], [Image(40, 2), Text(5)])
    q, k, v, grad = inputs(layout, dtype, (2, 1), 64)
    # All scores of odd rows are very negative, those of even ones large.
    k = k.abs()
    q = 30 * q.abs() * (1 - 2 * (torch.arange(len(q)) % 2))[:, None, None]
    x = (q.to(dtype), k, v, grad)
    assert_attention([(results(*x, layout), x)], layout)


def test_gradients_add_up_in_float32(cuda):
    """A key of an early token gathers gradients from every later segment."""
    layout = spans([Text(3), *[Image(2 + i % 3, 1) for i in range(40)], Text(8)])
    q, k, v, grad = inputs(layout, torch.bfloat16, (1, 1), 64)
    x = (0.3 * q, k, v, grad + 1)
    assert_attention([(results(*x, layout), x)], layout)


# ---- Hopper's kernels --------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(cuda, monkeypatch):
    """Hopper's kernels for whatever they can serve, as on such a GPU; the emulation has three multiprocessors."""
    if GPU and not backend._is_hopper(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.setattr(backend, "_has_wgmma", lambda q: q.shape[2] in backend.HOPPER_HEAD_DIMS)
    return cuda


@pytest.mark.parametrize("isolated", [False, True], ids=["seeing", "isolated"])
@settings(max_examples=20)
@given(data=st.data())
def test_any_layout_on_hopper(hopper, isolated, data):
    layout = data.draw(attention_layouts(isolated), "layout")
    assert_case(layout, data.draw(st.sampled_from(DTYPES)), head_dim=data.draw(st.sampled_from(backend.HOPPER_HEAD_DIMS)))


@pytest.mark.parametrize("head_dim", backend.HOPPER_HEAD_DIMS)
@pytest.mark.parametrize("name", ["prime lengths", "ends in an image", "public tokens anywhere", "padding"])
def test_named_layouts_on_hopper(hopper, name, head_dim):
    assert_case(LAYOUTS[name], head_dim=head_dim)


@pytest.mark.parametrize("isolated", [False, True], ids=["seeing", "isolated"])
@pytest.mark.parametrize("rows", [(63, 64, 65), (127, 128, 129), (192, 257)], ids=str)
def test_edges_of_tiles_on_hopper(hopper, rows, isolated):
    # In bfloat16, one key of 65 too few would go unnoticed.
    assert_case(spans(*([Image(n - 2, 2), Text(n)] for n in rows), isolated=isolated), torch.float16, (1, 1))


@pytest.mark.parametrize("voco", [1, 13, 14, 30])
def test_steps_that_end_at_the_edge_of_a_mask_on_hopper(hopper, voco):
    text = 64 if voco == 1 else 80
    assert_case(spans([Image(9 if voco == 1 else 20, voco), Text(text)]), torch.float16, (1, 1))


def test_the_last_row_of_a_step_is_the_first_to_see_a_key_on_hopper(hopper):
    assert_case(spans([Text(64), Image(62, 1), Text(1)], isolated=False), torch.float16, (1, 1))
    # Of late rows, the 64th is that of the 65th key.
    assert_case(spans([Text(1), *[Image(1, 1)] * 64, Image(9, 1), Text(2)], isolated=True), torch.float16, (1, 1))


def test_copies_by_index_before_many_by_tma_on_hopper(hopper):
    """They are announced, however many stages TMA fills behind them."""
    assert_case(spans([Text(5), Image(400, 2)], isolated=False), torch.float16, (1, 1))


@pytest.mark.parametrize("heads", [(4, 1), (3, 3), (4, 2)], ids=str)
def test_many_steps_on_hopper(hopper, heads):
    """Stages go round within a tile and from tile to tile, by TMA and by index; many rows read public keys."""
    assert_case(spans(LONG, [Text(300)], isolated=False), torch.float16, heads)


@pytest.mark.parametrize("rest", [1, 62, 63, 64])
def test_hopper_does_not_read_behind_a_segment(hopper, rest):
    """A step that TMA brings reaches beyond nothing: NaN behind the segment stays out."""
    n = 64 + rest
    layout = Pack([1] * n + [-1] * 5, [False] * (n - 2) + [True] * 2 + [False] * 5, [0, n + 5]).layout(False)
    clean = inputs(layout, torch.float16, (1, 1), 64)
    poisoned = [x.clone() for x in clean]
    for x in poisoned:
        x[n:] = float("nan")
    assert_same(results(*poisoned, layout), results(*clean, layout))


def test_expanded_heads_and_odd_strides_of_one_on_hopper(hopper):
    """TMA takes neither a stride of 0 nor an odd one, even where it has no meaning."""
    q, k, v, grad = inputs(MIXED, torch.float16, (2, 1), 64)
    want = results(q, k, v, grad, MIXED)
    wide = [x.expand(-1, 2, -1) for x in (k, v)]
    assert torch.equal(results(q, *wide, grad, MIXED)["out"], want["out"])
    odd = [torch.nn.functional.pad(x, (0, 2, 0, 3))[:, :1, :64] for x in (k, v)]
    assert odd[0].stride(1) % 8 and backend._aligned(odd[0]) is odd[0]
    assert_same(results(q, *odd, grad, MIXED), want)


def test_an_odd_stride_of_a_single_token_on_hopper(hopper):
    layout = spans([Text(1)])
    x = inputs(layout, torch.float16, (2, 2), 64)
    odd = [torch.nn.functional.pad(t, (0, 0, 0, 0, 0, 1)).as_strided(t.shape, (129, 64, 1)) for t in x]
    assert backend._aligned(odd[0]) is odd[0]
    assert_same(results(*odd, layout), results(*x, layout))


@pytest.mark.parametrize("change", ["heads first", "one of several"])
def test_strides_on_hopper(hopper, change):
    """TMA reads where the tensors lie."""
    x = inputs(MIXED, torch.float16, (2, 2), 64)
    assert_same(results(*[ROWS[change][0](t) for t in x], MIXED), results(*x, MIXED))


def test_which_kernels_are_launched(hopper, monkeypatch):
    launched, launch = [], hopper.attention
    monkeypatch.setattr(hopper, "attention", lambda **options: (launched.append(options["kernel"]), launch(**options)))
    for head_dim in (64, 96):
        results(*inputs(MIXED, torch.float16, (1, 1), head_dim), MIXED)
    assert launched == ["hopper forward", "hopper dq", "hopper dkv", "forward", "dq", "dkv"]


# ---- the same bits, however it is launched -----------------------------------------------------------------------------

MIXED = spans([Text(3), Image(70, 3), Text(40)], [Image(20, 2), Text(18)], isolated=False)


def assert_same(got, want):
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_twice_gives_the_same_bits(cuda):
    x = inputs(MIXED, torch.float16, (2, 1), 64)
    assert_same(results(*x, MIXED), results(*x, MIXED))


@pytest.mark.parametrize("tiles", [1, 3])
def test_blocks_go_on_to_further_tiles(cuda, tiles, monkeypatch):
    x = inputs(MIXED, torch.float16, (2, 1), 64)
    want = results(*x, MIXED)
    monkeypatch.setattr(TilePlan, "likely", lambda *_: tiles)
    assert_same(results(*x, MIXED), want)


def test_plans_that_were_not_counted(cuda):
    """As they are made on a device: behind the tiles are zeros, and the number of blocks is a guess."""
    x = inputs(MIXED, torch.float16, (2, 1), 64)
    want, plan = results(*x, MIXED), build_tiles(MIXED, backend.GEOMETRY)

    def filled(tiles):
        return torch.cat([tiles, tiles.new_zeros(MIXED.num_tokens - len(tiles), tiles.shape[1])])

    plan = dataclasses.replace(plan, counted=False, row_tiles=filled(plan.row_tiles), key_tiles=filled(plan.key_tiles))
    layout = dataclasses.replace(MIXED).to(DEVICE)
    keep(layout, plan.to(DEVICE))
    assert_same(results(*x, layout), want)


def test_the_plan_is_the_one_that_a_data_loader_prepares(cuda):
    x = inputs(MIXED, torch.float16, (2, 1), 64)
    layout = dataclasses.replace(MIXED).prepare()
    assert layout.tiles.geometry == backend.GEOMETRY
    assert_same(results(*x, layout), results(*x, MIXED))


def test_a_layout_whose_tensors_are_written_anew(cuda):
    """Static buffers: the plan follows, and nothing is left on the caller's layout."""
    first, second = spans([Image(20, 3), Text(17)]), spans([Text(9), Image(24, 2), Text(5)])
    layout = dataclasses.replace(first, segment_ids=first.segment_ids.clone(), public=first.public.clone()).to(DEVICE)
    x = inputs(layout.to("cpu"), torch.float16, (2, 1), 64)
    results(*x, layout)
    layout.segment_ids.copy_(second.segment_ids)
    layout.public.copy_(second.public)
    assert_same(results(*x, layout), results(*x, second))
    assert layout.tiles is None


ROWS = {
    "heads first": (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), True),
    "one of several": (lambda x: torch.stack([x, x + 1], 1)[:, 0], True),
    "odd stride of heads": (lambda x: torch.nn.functional.pad(x, (0, 4))[..., :64], False),
    "odd address": (lambda x: torch.nn.functional.pad(x.flatten(), (1, 0))[1:].view(x.shape), False),
    "columns apart": (lambda x: x.repeat_interleave(2, 2)[..., ::2], False),
}


@pytest.mark.parametrize("name", ROWS)
def test_any_strides(cuda, name):
    """Rows that 16 bytes at a time do not fit are copied, and nothing else."""
    change, fits = ROWS[name]
    x = inputs(MIXED, torch.float16, (2, 2), 64)
    changed = [change(t) for t in x]
    assert (backend._aligned(changed[0]) is changed[0]) == fits
    assert_same(results(*changed, MIXED), results(*x, MIXED))


# ---- behaviour ---------------------------------------------------------------------------------------------------------


def test_padding_may_hold_anything(cuda):
    layout = LAYOUTS["padding"]
    clean = inputs(layout, torch.float16, (2, 1), 64)
    poisoned = [x.clone() for x in clean]
    for x in poisoned:
        x[layout.segment_ids < 0] = float("nan")
    got = results(*poisoned, layout)
    assert_same(got, results(*clean, layout))
    padding = layout.segment_ids < 0
    assert all(not got[name][padding].any() for name in ("out", *GRADIENTS))
    assert (got["lse"][padding] == float("-inf")).all() and got["lse"][~padding].isfinite().all()


@pytest.mark.parametrize("layout", [spans(), spans([], [])])
def test_nothing_to_attend_to(cuda, layout):
    x = inputs(layout, torch.float16, (2, 1), 64)
    assert results(*x, layout)["out"].shape == x[0].shape


def test_nan_does_not_look_like_padding(cuda):
    layout = spans([Text(4)])
    q, k, v, _ = (t.to(DEVICE) for t in inputs(layout, torch.float16, (1, 1), 64))
    q[2] = float("nan")
    out, lse = voco_attention(q, k, v, layout.to(DEVICE), backend="cuda", return_lse=True)
    assert out[2].isnan().all() and lse[2].isnan().all() and lse[[0, 1, 3]].isfinite().all()


def test_opcheck(cuda):
    layout = spans([Image(4, 2), Text(3)], isolated=True).to(DEVICE)
    q, k, v, grad = (x.to(DEVICE) for x in inputs(layout.to("cpu"), torch.float16, (2, 1), 64))
    ids = (layout.segment_ids, layout.public, layout.cu_seqlens, layout.isolated)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.voco.attention.default, (*leaves, *ids, 0.3, "cuda", True))
    out, lse = torch.ops.voco.attention(q, k, v, *ids, 0.3, "cuda", True)
    torch.library.opcheck(torch.ops.voco.attention_backward.default, (grad, q, k, v, out, lse, *ids, 0.3, "cuda"))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "reason"),
    [
        (64, torch.float32, "it takes float16 and bfloat16, not float32"),
        (80, torch.float16, "it takes head_dim 64, 96, 128, 256, not 80"),
    ],
)
def test_refusals(cuda, head_dim, dtype, reason):
    layout = spans([Text(3)])
    q, k, v, _ = (x.to(DEVICE) for x in inputs(layout, dtype, (1, 1), head_dim))
    with pytest.raises(ValueError, match=rf"^backend 'cuda' cannot serve this call: {reason}$"):
        voco_attention(q, k, v, layout.to(DEVICE), backend="cuda")


def test_gpus_that_cannot_run_it(cuda, monkeypatch):
    """Another architecture, and one whose blocks have too little shared memory for rows of 256."""
    monkeypatch.setattr(torch.version, "hip", None)
    q = SimpleNamespace(dtype=torch.float16, shape=(3, 1, 256), device=torch.device("cuda", 0), is_cuda=True)
    for capability, archs, memory, reason in (
        ((7, 5), ["sm_80"], 65536, "it was compiled for sm_80, and the GPU has compute capability (7, 5)"),
        ((8, 6), ["sm_80"], 101376, "head_dim 256 needs {} bytes of shared memory, and the GPU has 101376"),
        ((8, 0), ["sm_80"], 166912, None),
    ):
        fake = SimpleNamespace(
            DEVICE_TYPE="cuda",
            compiled_archs=lambda archs=archs: archs,
            device_query=lambda memory=memory: [{"shared_memory_per_block_optin": memory}],
            attention_shared=cuda.attention_shared,
        )
        for module in (backend, package):
            monkeypatch.setattr(module, "load", lambda fake=fake: fake)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        package.unserved_by_gpu.cache_clear()
        assert backend.unsupported_reason(q) == (reason and reason.format(cuda.attention_shared(256)))
    package.unserved_by_gpu.cache_clear()
    assert cuda.attention_shared(80) == 0
