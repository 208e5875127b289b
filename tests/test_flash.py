"""The varlen split: what it serves and refuses, against float64, over a dense varlen attention in place of the kernels.

The kernels themselves run in the tests marked `gpu`. Without a GPU the calls to them are held to stand-ins with the
signatures of torch 2.10, 2.11 and 2.13 and of flash-attn 2.8, and to the installed torch's own on tensors without data.
"""

import functools
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_attention
from strategies import Pack, closed_images

import voco_kernels.backends.flash as flash
from voco_kernels import Image, Text, VocoLayout, voco_attention

ROOT = Path(__file__).parent.parent
GRADIENTS = ("dq", "dk", "dv")


# ---- a dense varlen attention ------------------------------------------------------------------------------------------


def assert_readable(x):
    """What a kernel relies on that loads 16 bytes at a time."""
    step = 16 // x.element_size()
    assert x.stride(2) == 1 and not x.stride(0) % step and not x.stride(1) % step and not x.data_ptr() % 16


def dense_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale):
    """(out, lse [R, Hq]), sequence by sequence: causal, aligned to the bottom right, and strict about what it is given."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape and cu_q.is_contiguous()
    rows, keys = cu_q.diff().tolist(), cu_k.diff().tolist()
    assert min(rows) > 0 and all(r <= n for r, n in zip(rows, keys)), "a row would see nothing"
    assert (max(rows), max(keys), sum(rows), sum(keys)) == (max_q, max_k, q.shape[0], k.shape[0])
    assert type(max_q) is type(max_k) is int and k.shape == v.shape
    for x in (q, k, v):
        assert_readable(x)
    groups = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for bq, bk, bv in zip(q.split(rows), k.split(keys), v.split(keys)):
        bk, bv = (x.repeat_interleave(groups, dim=1) for x in (bk, bv))
        scores = torch.einsum("ihd,jhd->hij", bq, bk).float() * scale
        visible = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(bk) - len(bq))
        scores = scores.masked_fill(~visible, float("-inf"))
        outs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1).to(q.dtype), bv))
        lses.append(scores.logsumexp(-1).T)
    out = torch.cat(outs)
    if out.requires_grad:
        out.register_hook(assert_readable)
    return out, torch.cat(lses)


@pytest.fixture
def dense(monkeypatch):
    """Runs the backend on the CPU, over `dense_varlen`."""
    monkeypatch.setattr(flash, "implementation", lambda: flash.Implementation("dense", dense_varlen))


def inputs(layout, dtype, heads=(4, 2), head_dim=16):
    n, (hq, hkv) = layout.num_tokens, heads
    return tuple(torch.randn(n, h, head_dim).to(dtype) for h in (hq, hkv, hkv, hq))


def results(q, k, v, grad, layout, device="cpu"):
    """What the backend gives, with its backward once by autograd and once by `attention_backward`, as CPU tensors."""
    layout, *x = (t.to(device) for t in (layout, q, k, v, grad))
    leaves, scale = [t.detach().requires_grad_() for t in x[:3]], 1 / math.sqrt(q.shape[-1])
    out, lse = flash.attention(*leaves, layout, scale, True)
    assert not lse.requires_grad and lse.dtype == torch.float32
    runs = torch.autograd.grad(out, leaves, x[3]), flash.attention_backward(x[3], *x[:3], None, None, layout, scale)
    return [{"out": out.cpu(), "lse": lse.cpu(), **dict(zip(GRADIENTS, (g.cpu() for g in run)))} for run in runs]


def assert_case(layout, dtype, heads=(4, 2), head_dim=16, device="cpu"):
    # The bound is tightest in float32, where library and eager round alike, and needs the larger sample.
    samples = [inputs(layout, dtype, heads, head_dim) for _ in range(4 if dtype == torch.float32 else 1)]
    for runs in zip(*(results(*x, layout, device) for x in samples)):
        assert_attention(list(zip(runs, samples)), layout)


# ---- layouts that are served -------------------------------------------------------------------------------------------

padding = st.tuples(st.just("padding"), st.integers(1, 3))
text = st.tuples(st.just("text"), st.integers(1, 6))
plain_segments = closed_images.map(lambda image: ("segment", [False] * image.vision + [True] * image.voco))
gist_segments = st.lists(st.booleans(), min_size=2, max_size=7).filter(lambda f: any(f) and not all(f))
segments = plain_segments | st.tuples(st.just("segment"), gist_segments)


@st.composite
def served_layouts(draw):
    """Segments, text and segments in each document, any of them missing, with padding anywhere.

    One fixed document in front gives every kind of rows ordinary members: maxima over few rows with one key mean nothing.
    """
    documents = [[("segment", [False] * 9 + [True] * 4), ("segment", [False] * 8 + [True] * 3), ("text", 9)]]
    for _ in range(draw(st.integers(0, 4))):
        parts = (segments | padding, text | padding, segments | padding)
        documents.append([run for part in parts for run in draw(st.lists(part, max_size=3))])
    segment, public, ends, name = [], [], [0], 0
    for document in documents:
        for kind, content in document:
            name += kind == "segment"
            flags = content if kind == "segment" else [kind == "text"] * content
            segment += [{"segment": name, "text": 0, "padding": -1}[kind]] * len(flags)
            public += flags
        ends.append(len(segment))
    return Pack(segment, public, ends).layout(isolated=True)


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_served_layouts(dtype, data, dense):
    layout = data.draw(served_layouts(), "layout")
    assert_case(layout, dtype, data.draw(st.sampled_from([(4, 1), (4, 2), (4, 4), (1, 1)]), "heads"))


def spans(*documents, isolated=True):
    return VocoLayout.from_spans(documents, isolated=isolated)


LAYOUTS = {
    "video": spans([*[Image(16, 2)] * 12, Text(20)]),
    "one text row": spans([Image(9, 3), Text(1)]),
    "one text row in each of many documents": spans(*[[Image(9, 2), Text(1)]] * 5),
    "no image": spans([Text(20)], [Text(7)]),
    "no text": spans([Image(16, 2)], [], [Image(5, 3), Image(7, 1)]),
    "one image and no text behind it": spans([Text(9), Image(12, 4)]),
    "documents of all forms": spans([], [Image(9, 4), Text(9)], [Text(5)], [Image(7, 2)], [], [Image(8, 1), Text(3)], []),
    "seeing, with nothing to see": spans([Image(9, 4), Text(9)], [Text(4)], [Image(3, 1), Text(2)], isolated=False),
    "padded batch": Pack(
        [-1] * 3 + [1] * 8 + [0] * 5 + [2] * 7 + [0] * 6 + [-1] * 2,
        [False] * 9 + [True] * 7 + [False] * 6 + [True] * 7 + [False] * 2,
        [0, 16, 31],
    ).layout(True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_named_layouts(name, dtype, dense):
    assert_case(LAYOUTS[name], dtype)


@pytest.mark.parametrize("layout", [spans(), spans([], []), Pack([-1] * 3, [False] * 3, [0, 3]).layout(True)])
def test_nothing_to_attend_to(layout, dense):
    for got in results(*inputs(layout, torch.float32), layout):
        assert not any(got[name].any() for name in ("out", *GRADIENTS))
        assert (got["lse"] == float("-inf")).all()


def test_padding_sees_nothing_and_may_hold_anything(dense):
    layout = LAYOUTS["padded batch"]
    hidden = layout.segment_ids < 0
    clean = inputs(layout, torch.float32)
    poisoned = [x.masked_fill(hidden[:, None, None], float("nan")) for x in clean]
    for got, want in zip(results(*poisoned, layout), results(*clean, layout)):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert not any(got[name][hidden].any() for name in ("out", *GRADIENTS))
        assert (got["lse"][hidden] == float("-inf")).all() and got["lse"][~hidden].isfinite().all()


def strided_inputs(n, head_dim, dtype, device):
    """q, k, v and a gradient that the kernels cannot read as they are: by their address, row strides and last strides."""
    options = {"dtype": dtype, "device": device}
    return (
        torch.randn(n * 4 * head_dim + 1, **options)[1:].view(n, 4, head_dim),
        torch.randn(n, 2, head_dim + 1, **options)[..., :head_dim],
        torch.randn(n, 2, 2 * head_dim, **options)[..., ::2],
        torch.randn(4, 1, 1, **options).expand(4, n, head_dim).transpose(0, 1),
    )


@pytest.mark.parametrize("name", ["video", "padded batch"])
def test_any_strides(name, dense):
    """Copies are made of what the kernels cannot read; `dense_varlen` refuses it."""
    layout = LAYOUTS[name]
    x = strided_inputs(layout.num_tokens, 16, torch.bfloat16, "cpu")
    for got in results(*x, layout):
        assert_attention([(got, x)], layout)


def test_consecutive_rows_are_not_copied():
    calls = flash._split_of(LAYOUTS["video"]).calls
    assert [call.rows for call in calls] == [slice(0, 216), slice(216, 236)]
    assert calls[0].keys == calls[0].rows and calls[1].keys.tolist()[:3] == [16, 17, 34]
    assert [(call.max_rows, call.max_keys) for call in calls] == [(18, 18), (20, 44)]


def test_gradients_of_some_inputs(dense):
    layout = LAYOUTS["padded batch"]
    *x, grad = inputs(layout, torch.float32)
    want = results(*x, grad, layout)[0]
    for i, name in enumerate(GRADIENTS):
        leaves = [t.detach().requires_grad_(j == i) for j, t in enumerate(x)]
        flash.attention(*leaves, layout, 0.25, False)[0].backward(grad)
        torch.testing.assert_close(leaves[i].grad, want[name], rtol=0, atol=0)


@pytest.mark.parametrize("layout_first", [False, True])
def test_first_use_in_inference_mode(layout_first, dense):
    """What the backend keeps for a layout can be saved by autograd later."""
    with torch.inference_mode(layout_first):
        layout = spans([Image(9, 4), Text(9)], [Image(9, 4), Text(9)])
    x = inputs(layout, torch.float32)
    with torch.inference_mode():
        out, _ = flash.attention(*x[:3], layout, 0.25, False)
    assert_attention([({"out": out.clone()}, x)], layout)
    kept = [t for call in flash._split_of(layout).calls for t in vars(call).values() if isinstance(t, torch.Tensor)]
    assert kept and not any(t.is_inference() for t in kept)


def test_the_operator(dense, monkeypatch):
    """In a compiled graph both passes run inside operators, where autograd is off."""
    monkeypatch.setattr(flash, "unavailable_reason", lambda: None)
    monkeypatch.setattr(flash, "unsupported_reason", lambda q, layout: None)
    layout = LAYOUTS["padded batch"]
    *x, grad = inputs(layout, torch.float32)
    leaves = [t.requires_grad_() for t in x]
    ids = layout.segment_ids, layout.public, layout.cu_seqlens, layout.isolated
    out, lse = torch.ops.voco.attention(*leaves, *ids, 0.25, "flash", True)
    got = {"out": out, "lse": lse, **dict(zip(GRADIENTS, torch.autograd.grad(out, leaves, grad)))}
    assert_attention([(got, (*x, grad))], layout)
    with pytest.raises(ValueError, match="^backend 'flash' cannot serve this call: layout must be isolated"):
        torch.ops.voco.attention(*leaves, *REFUSED["a segment behind text"][0].tensors(), 0.25, "flash", False)


# ---- layouts and inputs that are refused -------------------------------------------------------------------------------


class Refused(NamedTuple):
    segment: list[int]
    public: str
    ends: list[int]
    isolated: bool

    def layout(self):
        return Pack(self.segment, [flag == "p" for flag in self.public], self.ends).layout(self.isolated)

    def tensors(self):
        """As the operator takes them, padded to the length of the padded batch."""
        more = 31 - len(self.segment)
        padded = Pack(self.segment + [-1] * more, [f == "p" for f in self.public] + [False] * more, [*self.ends[:-1], 31])
        layout = padded.layout(self.isolated)
        return layout.segment_ids, layout.public, layout.cu_seqlens, layout.isolated


REFUSED = {
    "a segment behind text": (
        Refused([1, 1, 0, 0, 2, 2], "-pp" + "p-p", [0, 3, 6], False),
        "layout must be isolated, so that segments see nothing outside themselves, "
        "but in document 1 the segment at token 4 sees public tokens before it",
    ),
    "a segment behind a segment": (
        Refused([1, 1, 1, 2, 2, 0], "-pp-pp", [0, 0, 6], False),
        "layout must be isolated, so that segments see nothing outside themselves, "
        "but in document 1 the segment at token 3 sees public tokens before it",
    ),
    "text on both sides": (
        Refused([1, 1, 0, 0, 0, -1, 2, 2, 2, 0], "-ppp" + "p---pp", [0, 3, 10], True),
        "layout must have no VoCo token between the text tokens of a document, "
        "but in document 1 VoCo token 8 stands between text tokens 4 and 9",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_layouts(name, dense):
    refused, reason = REFUSED[name]
    layout = refused.layout()
    q, k, v, _ = inputs(layout, torch.float32)
    with pytest.raises(ValueError) as error:
        flash.attention(q, k, v, layout, 0.25, False)
    assert str(error.value) == f"backend 'flash' cannot serve this call: {reason}"
    assert flash._split_of(layout).refusal == reason


@pytest.mark.parametrize(
    ("q", "reason"),
    [
        (torch.zeros(3, 1, 64), "q must be of dtype float16 or bfloat16, but was torch.float32"),
        (torch.zeros(3, 1, 12).half(), "q must be of a head_dim that is a multiple of 8 and at most 256, but was of 12"),
        (torch.zeros(3, 1, 264).half(), "q must be of a head_dim that is a multiple of 8 and at most 256, but was of 264"),
        (torch.zeros(3, 1, 64).bfloat16(), "q must be on a CUDA device, but was on cpu"),
    ],
)
def test_refused_inputs(q, reason):
    assert flash.unsupported_reason(q, spans([Text(3)])) == reason


# ---- whose kernels -----------------------------------------------------------------------------------------------------


class AuxRequest(NamedTuple):
    lse: bool = False


def varlen_attn_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    raise AssertionError("not to be called")


def varlen_attn_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    # Causal only for this tuple: a list would be no mask at all, and heads are documented to be equal.
    assert window_size == (-1, 0) and query.shape[1:] == key.shape[1:] and return_aux.lse
    out, lse = dense_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)
    return out, lse.T


def varlen_attn_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert window_size == (-1, 0) and return_aux.lse and enable_gqa == (query.shape[1] != key.shape[1])
    assert seqused_k is block_table is num_splits is None
    out, lse = dense_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)
    return out, lse.T


def flash_attn_2_8(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert causal and return_attn_probs and window_size == (-1, -1) and dropout_p == softcap == 0
    assert alibi_slopes is block_table is None and not deterministic
    out, lse = dense_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
    return out, lse.T, None


@pytest.fixture
def installed(monkeypatch):
    """A function that makes these two modules importable, or not."""

    def install(flash_attn=None, torch_varlen=None):
        for name, module in (("flash_attn", flash_attn), ("torch.nn.attention.varlen", torch_varlen)):
            monkeypatch.setitem(sys.modules, name, module)
        flash.implementation.cache_clear()

    yield install
    flash.implementation.cache_clear()


def module(**names):
    made = ModuleType("stand_in")
    vars(made).update(names)
    return made


FLASH_ATTN = module(__version__="2.8.3.post2", flash_attn_varlen_func=flash_attn_2_8)
TORCH = {
    "2.11": module(varlen_attn=varlen_attn_2_11, AuxRequest=AuxRequest),
    "2.13": module(varlen_attn=varlen_attn_2_13, AuxRequest=AuxRequest),
}


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)], ids=["grouped heads", "equal heads"])
@pytest.mark.parametrize("version", [*TORCH, "flash-attn"])
def test_how_the_kernels_are_called(version, heads, installed):
    installed(*((FLASH_ATTN, None) if version == "flash-attn" else (None, TORCH[version])))
    assert_case(LAYOUTS["documents of all forms"], torch.bfloat16, heads)


def test_grouped_heads_are_copied_only_for_torch_2_11(installed):
    for torch_varlen, expected in zip(TORCH.values(), (4, 2)):
        taken = []

        @functools.wraps(torch_varlen.varlen_attn)
        def watched(query, key, *rest, torch_varlen=torch_varlen, taken=taken, **options):
            taken.append(key.shape[1])
            return torch_varlen.varlen_attn(query, key, *rest, **options)

        installed(None, module(varlen_attn=watched, AuxRequest=AuxRequest))
        results(*inputs(LAYOUTS["video"], torch.bfloat16), LAYOUTS["video"])
        assert set(taken) == {expected}


def test_flash_attn_goes_before_torch(installed):
    installed(FLASH_ATTN, TORCH["2.13"])
    assert flash.implementation().name == "flash_attn 2.8.3.post2"
    installed(None, TORCH["2.13"])
    assert flash.implementation().name == f"torch {torch.__version__} varlen_attn"


@pytest.mark.parametrize(
    ("flash_attn", "reason"),
    [
        (None, "flash_attn cannot be imported"),
        (module(), "flash_attn has no flash_attn_varlen_func"),
        (module(__version__="2.5.8", flash_attn_varlen_func=flash_attn_2_8), "flash_attn is 2.5.8, older than 2.7"),
    ],
)
@pytest.mark.parametrize(
    ("torch_varlen", "torch_reason"),
    [
        (None, f"torch {torch.__version__} has no varlen_attn"),
        (
            module(varlen_attn=varlen_attn_2_10, AuxRequest=AuxRequest),
            f"varlen_attn of torch {torch.__version__} takes no scale; 2.11 is the first that does",
        ),
    ],
)
def test_no_kernels(flash_attn, reason, torch_varlen, torch_reason, installed):
    installed(flash_attn, torch_varlen)
    found = flash.implementation()
    assert found.startswith(reason) and found.endswith(f"; {torch_reason}")


def on_a_device(monkeypatch, capability):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def test_unavailable_reasons(monkeypatch, installed):
    installed()
    on_a_device(monkeypatch, (9, 0))
    assert flash.unavailable_reason().startswith("flash_attn cannot be imported")
    installed(FLASH_ATTN)
    assert flash.unavailable_reason() is None
    on_a_device(monkeypatch, (7, 5))
    assert flash.unavailable_reason() == "FlashAttention needs compute capability 8.0, the device has 7.5"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert flash.unavailable_reason() == "no CUDA device"
    # A build for AMD GPUs calls them CUDA devices too.
    on_a_device(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert flash.unavailable_reason() == "no CUDA device"


NO_KERNELS = """
import sys
sys.modules |= {"flash_attn": None, "torch.nn.attention.varlen": None}
import torch
torch.cuda.is_available = lambda: False
import voco_kernels.backends.flash as flash
print(flash.unavailable_reason())
"""


def test_import_needs_no_kernels():
    command = [sys.executable, "-c", NO_KERNELS]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "no CUDA device\n"), done.stderr


@pytest.mark.parametrize("hkv", [1, 4])
def test_the_installed_torch_takes_the_call(hkv):
    """Its own signature, its own shapes and its own backward, on tensors without data."""
    found = flash.load_torch()
    if isinstance(found, str):
        pytest.skip(found)
    q, k, v = (torch.empty(n, h, 64, dtype=torch.half, device="meta") for n, h in ((6, 4), (9, hkv), (9, hkv)))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    out, lse = found.varlen(*leaves, cu, cu, 4, 5, 0.25)
    assert out.shape == q.shape and lse.shape == q.shape[:2] and lse.dtype == torch.float32
    assert [g.shape for g in torch.autograd.grad(out.sum(), leaves)] == [x.shape for x in leaves]


# ---- the kernels themselves --------------------------------------------------------------------------------------------


@pytest.fixture(params=flash.LOADERS, ids=lambda load: load.__name__)
def kernels(request, monkeypatch):
    """Both implementations, each where it is installed."""
    found = request.param() if torch.cuda.is_available() else "no CUDA device"
    if isinstance(found, str):
        pytest.skip(found)
    monkeypatch.setattr(flash, "implementation", lambda: found)
    reason = flash.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)


GPU_LAYOUTS = LAYOUTS | {
    "frames longer than a tile": spans([*[Image(144, 4)] * 5, Text(130)], [*[Image(144, 4)] * 2, Text(3)]),
    "a long image and little text": spans([Image(576, 2), Text(1)], [Image(576, 2), Text(1)]),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GPU_LAYOUTS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=["equal heads", "grouped heads"])
def test_on_a_gpu(name, dtype, heads, kernels):
    assert_case(GPU_LAYOUTS[name], dtype, heads, head_dim=64, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 72, 128, 256])
def test_head_dims_on_a_gpu(head_dim, kernels):
    assert_case(GPU_LAYOUTS["frames longer than a tile"], torch.bfloat16, (4, 2), head_dim, device="cuda")


@pytest.mark.gpu
def test_any_strides_on_a_gpu(kernels):
    layout = LAYOUTS["video"]
    x = strided_inputs(layout.num_tokens, 64, torch.float16, "cuda")
    for got in results(*x, layout, "cuda"):
        assert_attention([(got, [t.cpu() for t in x])], layout)


@pytest.mark.gpu
def test_a_compiled_graph_on_a_gpu(kernels):
    layout = GPU_LAYOUTS["frames longer than a tile"]
    *x, grad = inputs(layout, torch.bfloat16, head_dim=64)
    leaves, on_device = [t.cuda().requires_grad_() for t in x], layout.to("cuda")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, k, v):
        return voco_attention(q, k, v, on_device, backend="flash", return_lse=True)

    out, lse = step(*leaves)
    gradients = torch.autograd.grad(out, leaves, grad.cuda())
    got = {"out": out.cpu(), "lse": lse.cpu(), **{n: g.cpu() for n, g in zip(GRADIENTS, gradients)}}
    assert_attention([(got, (*x, grad))], layout)
