"""Attention under the mask rule: results and gradients against float64, and what is refused."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    assert_attention,
    assert_error_rule,
    dense_results,
    mask_of_layout,
)
from strategies import Pack, attention_layouts

from voco_kernels import Image, Text, VocoLayout, backends, voco_attention

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GRADIENTS = ("dq", "dk", "dv")


def inputs(layout, dtype, heads=(4, 2), head_dim=16, *, strided=False):
    """q, k, v and a gradient of the output, all normal."""
    n, (hq, hkv) = layout.num_tokens, heads
    if not strided:
        return tuple(torch.randn(n, h, head_dim).to(dtype) for h in (hq, hkv, hkv, hq))
    q = torch.randn(hq, n, head_dim).to(dtype).transpose(0, 1)
    k = torch.randn(n, hkv, 2 * head_dim).to(dtype)[..., ::2]
    v = torch.randn(n, 2, hkv, head_dim).to(dtype)[:, 1]
    grad = torch.randn(head_dim, hq, n).to(dtype).permute(2, 1, 0)
    return q, k, v, grad


def results(q, k, v, grad, layout, scale=None, backend="torch"):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = voco_attention(q, k, v, layout, scale, backend, return_lse=True)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    return {"out": out.detach(), "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def assert_case(
    layout, dtype, heads=(4, 2), head_dim=16, scale=None, backend="torch", strided=False, names=("out", "lse", *GRADIENTS)
):
    runs = []
    # The bound is tightest in float32, where library and eager round alike, and needs the larger sample.
    for _ in range(4 if dtype == torch.float32 else 1):
        x = inputs(layout, dtype, heads, head_dim, strided=strided)
        got = results(*x, layout, scale, backend)
        runs.append(({name: got[name] for name in names}, x))
    assert_attention(runs, layout, scale)


def spans(*documents, isolated=False):
    return VocoLayout.from_spans(documents, isolated=isolated)


# ---- against float64 under the error rule ------------------------------------------------------------------------------


@pytest.mark.parametrize("isolated", [False, True], ids=["seeing", "isolated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_any_layout(dtype, isolated, data, row_chunks):
    row_chunks(data.draw(st.sampled_from([1, 5, 256]), "rows"), data.draw(st.sampled_from([4, 768]), "long run"))
    layout = data.draw(attention_layouts(isolated), "layout")
    heads = data.draw(st.sampled_from([(4, 1), (4, 2), (4, 4), (1, 1)]), "heads")
    assert_case(layout, dtype, heads, head_dim=data.draw(st.sampled_from([8, 16]), "head_dim"))


LAYOUTS = {
    "no image": spans([Text(40)]),
    "text of one token": spans([Text(1), *[Image(5, 1), Text(1)] * 8], *[[Text(1), Image(6, 1)]] * 6),
    "prime lengths": spans([Text(7), Image(53, 3), Text(31), Image(29, 1), Text(11)], [Image(13, 2), Text(5)]),
    "prime lengths, isolated": spans([Text(7), Image(53, 3), Text(31), Image(29, 1), Text(11)], isolated=True),
    "ends in an image": spans([Text(9), Image(30, 2)]),
    "images back to back": spans([*[Image(16, 2)] * 6, Text(20)]),
    "video, isolated": spans([Text(4), *[Image(16, 2)] * 12, Text(20)], isolated=True),
    "VoCo tokens between text rows": spans([Text(20), *[Image(5, 2), Text(9)] * 5]),
    "public tokens anywhere": Pack(
        [0] * 4 + [1] * 12 + [0] * 5 + [7] * 9,
        [True] * 4 + [False, True, False] * 4 + [True] * 5 + [False, False, True] * 3,
        [0, 30],
    ).layout(False),
    "padding": Pack(
        [-1] * 3 + [0] * 6 + [1] * 8 + [0] * 5 + [-1] * 4 + [2] * 7 + [0] * 6 + [-1] * 2,
        [False] * 3 + [True] * 6 + [False] * 6 + [True] * 7 + [False] * 4 + [False] * 6 + [True] * 7 + [False] * 2,
        [0, 22, 41],
    ).layout(False),
    "many images that see each other": spans([Text(3), *[Image(2 + i % 3, 1) for i in range(96)], Text(8)]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_named_layouts(name, dtype):
    assert_case(LAYOUTS[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_add_up_in_float32(dtype):
    """Keys of early tokens gather gradients from every later segment; they were once rounded at each of them."""
    layout = spans([Text(3), *[Image(2 + i % 3, 1) for i in range(300)], Text(8)])
    q, k, v, grad = inputs(layout, dtype, (2, 1))
    x = (0.3 * q, k, v, grad + 1)
    assert_attention([(results(*x, layout), x)], layout)


@pytest.mark.parametrize("rows", [64, 65, 255, 256, 257, 513])
def test_row_chunks_of_the_real_size(rows):
    """A segment's rows behind a text prefix, and open rows behind a VoCo prefix, around the edges of chunks."""
    layout = spans([Text(3), Image(rows - 2, 2)], [Image(20, 3), Text(rows)])
    assert_case(layout, torch.float32, heads=(2, 1))


@pytest.mark.parametrize("rows", [255, 256, 257])
def test_row_chunks_behind_a_long_prefix(rows):
    layout = spans([*[Image(4, 30)] * 9, Text(rows)], isolated=True)
    assert_case(layout, torch.float32, heads=(2, 1))


@pytest.mark.parametrize("rows", [767, 768, 769])
def test_long_runs(rows):
    layout = spans([Image(20, 3), Text(rows)])
    assert_case(layout, torch.bfloat16, heads=(1, 1))


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("hkv", [1, 2, 4])
def test_heads(hkv, head_dim):
    layout = LAYOUTS["prime lengths"]
    assert_case(layout, torch.float32, (4, hkv), head_dim, names=("out", "lse"))
    # Gradients in half precision: in float32 torch's own fused CPU backward is at the edge of the rule for long heads.
    assert_case(layout, torch.bfloat16, (4, hkv), head_dim, names=GRADIENTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.05, 0.25, 1 / 3, 1])
def test_scale(scale, dtype):
    assert_case(LAYOUTS["VoCo tokens between text rows"], dtype, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["prime lengths", "video, isolated", "padding"])
def test_strided_inputs(name, dtype):
    x = inputs(LAYOUTS[name], dtype, strided=True)
    assert not any(t.is_contiguous() for t in x)
    assert_case(LAYOUTS[name], dtype, strided=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_reference_backend(name):
    assert_case(LAYOUTS[name], torch.float32, backend="reference")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_reference_backend_in_half_precision(dtype):
    assert_case(LAYOUTS["padding"], dtype, backend="reference")


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", ["prime lengths", "video, isolated", "padding", "public tokens anywhere"])
def test_float64(name, backend):
    layout = LAYOUTS[name]
    x = inputs(layout, torch.float64)
    got, want = results(*x, layout, backend=backend), dense_results(*x, mask_of_layout(layout), 0.25)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize(
    "pack",
    [
        Pack([0, 1, 1, 1, 0, 0], [True, False, False, True, True, True], [0, 6]),
        Pack([-1, 1, 1, 0, 2, 2, 2], [False, False, True, True, False, True, True], [0, 4, 7]),
    ],
    ids=["one image", "padding and two documents"],
)
def test_gradcheck(pack, isolated, backend, row_chunks):
    row_chunks(2, 768)
    layout = pack.layout(isolated)
    x = [t.requires_grad_() for t in inputs(layout, torch.float64, (2, 1), head_dim=2)[:3]]
    assert torch.autograd.gradcheck(lambda q, k, v: voco_attention(q, k, v, layout, backend=backend), x)


# ---- behaviour ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_padding_rows_see_nothing_and_are_not_seen(backend):
    layout = LAYOUTS["padding"]
    padding = layout.segment_ids < 0
    x = inputs(layout, torch.float32)
    got = results(*x, layout, backend=backend)
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(got[name][padding], torch.zeros_like(got[name][padding])), name
    assert (got["lse"][padding] == float("-inf")).all() and got["lse"][~padding].isfinite().all()


def test_padding_may_hold_anything():
    layout = LAYOUTS["padding"]
    clean = inputs(layout, torch.float32)
    poisoned = [x.clone() for x in clean]
    for x in poisoned:
        x[layout.segment_ids < 0] = float("nan")
    torch.testing.assert_close(results(*poisoned, layout), results(*clean, layout), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("layout", [spans(), spans([], []), Pack([-1] * 3, [False] * 3, [0, 3]).layout(False)])
def test_nothing_to_attend_to(layout, backend):
    x = inputs(layout, torch.float32)
    got = results(*x, layout, backend=backend)
    assert got["out"].shape == x[0].shape and not got["out"].any()
    assert (got["lse"] == float("-inf")).all()
    assert all(got[name].shape == t.shape and not got[name].any() for name, t in zip(GRADIENTS, x))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_lse_is_not_differentiable(backend):
    layout = LAYOUTS["prime lengths"]
    q, k, v, _ = inputs(layout, torch.float32)
    out, lse = voco_attention(q.requires_grad_(), k, v, layout, backend=backend, return_lse=True)
    assert out.requires_grad and not lse.requires_grad


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_of_some_inputs(wanted):
    layout = LAYOUTS["prime lengths"]
    *x, grad = inputs(layout, torch.float32)
    want = results(*x, grad, layout)
    leaves = [t.detach().requires_grad_(w) for t, w in zip(x, wanted)]
    voco_attention(*leaves, layout).backward(grad)
    for leaf, w, name in zip(leaves, wanted, ("dq", "dk", "dv")):
        if w:
            torch.testing.assert_close(leaf.grad, want[name])
        else:
            assert leaf.grad is None


def test_one_tensor_for_all_inputs():
    layout = LAYOUTS["prime lengths"]
    x, _, _, grad = inputs(layout, torch.float32, (2, 2))
    want = results(x, x, x, grad, layout)
    leaf = x.clone().requires_grad_()
    voco_attention(leaf, leaf, leaf, layout).backward(grad)
    torch.testing.assert_close(leaf.grad, want["dq"] + want["dk"] + want["dv"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twice_gives_the_same_bits(dtype):
    layout = LAYOUTS["many images that see each other"]
    x = inputs(layout, dtype)
    torch.testing.assert_close(results(*x, layout), results(*x, layout), rtol=0, atol=0)


def test_inputs_are_left_alone():
    layout = LAYOUTS["padding"]
    x = inputs(layout, torch.float32)
    copies = [t.clone() for t in x]
    results(*x, layout)
    assert all(torch.equal(t, copy) for t, copy in zip(x, copies))


def test_auto_is_the_torch_backend():
    layout = LAYOUTS["prime lengths"]
    q, k, v, _ = inputs(layout, torch.float32)
    assert torch.equal(voco_attention(q, k, v, layout), voco_attention(q, k, v, layout, backend="torch"))


def test_two_layouts_of_the_same_ids():
    """What a backend keeps for a layout must not serve one that shares tensors with it."""
    seeing = LAYOUTS["prime lengths"]
    isolated = dataclasses.replace(seeing, isolated=True)
    one_document = dataclasses.replace(seeing, cu_seqlens=seeing.cu_seqlens[[0, -1]])
    public = seeing.public.clone()
    public[10] = True  # a vision token of the first image
    gist = dataclasses.replace(seeing, public=public)
    x = inputs(seeing, torch.float32)
    for layout in (seeing, isolated, seeing, one_document, gist, seeing):
        assert_attention([(results(*x, layout), x)], layout)


def test_layouts_come_and_go():
    """A new layout may lie where a dead one lay in memory."""
    for voco in (1, 2, 3, 4) * 5:
        layout = spans([Text(3), Image(12 - voco, voco), Text(5)])
        x = inputs(layout, torch.float32, (1, 1))
        assert_attention([(results(*x, layout), x)], layout)


@pytest.mark.parametrize("layout_first", [False, True])
def test_inference_mode(layout_first):
    with torch.inference_mode(layout_first):
        layout = spans([Text(3), Image(9, 2), Text(5)])
    x = inputs(layout, torch.float32)
    with torch.inference_mode():
        out = voco_attention(*x[:3], layout)
    assert_attention([({"out": out.clone()}, x)], layout)


def test_the_rule_itself_can_fail():
    """An error in one kind of rows is not excused by the other kinds; neither is a NaN."""
    layout = LAYOUTS["prime lengths"]
    x = inputs(layout, torch.float32)
    good = results(*x, layout)
    voco_row = int(((layout.segment_ids > 0) & layout.public).nonzero()[0])
    for name in good:
        for wrong in (1e-4, float("nan")):
            bad = good[name].clone()
            bad[voco_row] += wrong
            with pytest.raises(AssertionError, match=f"{name}, voco rows"):
                assert_attention([({name: bad}, x)], layout)
    with pytest.raises(AssertionError, match="padding rows"):
        assert_error_rule("out", torch.ones(1), torch.zeros(1), torch.zeros(1).double(), ["padding"])


# ---- bad input ---------------------------------------------------------------------------------------------------------

LAYOUT = spans([Text(2), Image(4, 1), Text(1)], isolated=True)


def attention_arguments():
    q, k, v, _ = inputs(LAYOUT, torch.float32, (4, 2), head_dim=8)
    return {"q": q, "k": k, "v": v, "layout": LAYOUT}


BAD = {
    "q is a list": (lambda q, k, v: {"q": q.tolist()}, "q"),
    "q is 4-D": (lambda q, k, v: {"q": q[None]}, "q"),
    "k is 2-D": (lambda q, k, v: {"k": k[0]}, "k"),
    "v is None": (lambda q, k, v: {"v": None}, "v"),
    "integers": (lambda q, k, v: {"q": q.long(), "k": k.long(), "v": v.long()}, "q"),
    "float8": (lambda q, k, v: {"q": q.to(torch.float8_e4m3fn)}, "q"),
    "k of another dtype": (lambda q, k, v: {"k": k.half()}, "k"),
    "v of another dtype": (lambda q, k, v: {"v": v.double()}, "v"),
    "k on another device": (lambda q, k, v: {"k": k.to("meta")}, "k"),
    "v on another device": (lambda q, k, v: {"v": v.to("meta")}, "v"),
    "q, k, v on another device": (lambda q, k, v: {n: x.to("meta") for n, x in zip("qkv", (q, k, v))}, "layout"),
    "layout on another device": (lambda q, k, v: {"layout": LAYOUT.to("meta")}, "layout"),
    "layout of another length": (lambda q, k, v: {"layout": spans([Text(7)])}, "q"),
    "layout is a mask": (lambda q, k, v: {"layout": LAYOUT.dense_mask()}, "layout"),
    "k of another length": (lambda q, k, v: {"k": k[:-1]}, "k"),
    "v of another length": (lambda q, k, v: {"v": v[:-1]}, "v"),
    "v of other heads": (lambda q, k, v: {"v": v[:, :1]}, "v"),
    "v of another head_dim": (lambda q, k, v: {"v": v[..., :4]}, "v"),
    "k and v of another head_dim": (lambda q, k, v: {"k": k[..., :4], "v": v[..., :4]}, "k"),
    "head_dim 0": (lambda q, k, v: {"q": q[..., :0], "k": k[..., :0], "v": v[..., :0]}, "q"),
    "heads not a multiple": (lambda q, k, v: {"q": q[:, :3]}, "q"),
    "no K/V heads": (lambda q, k, v: {"k": k[:, :0], "v": v[:, :0]}, "q"),
    "no heads": (lambda q, k, v: {"q": q[:, :0]}, "q"),
    "scale is infinite": (lambda q, k, v: {"scale": float("inf")}, "scale"),
    "scale is NaN": (lambda q, k, v: {"scale": float("nan")}, "scale"),
    "scale is a word": (lambda q, k, v: {"scale": "small"}, "scale"),
    "scale is 0": (lambda q, k, v: {"scale": 0.0}, "scale"),
    "scale is negative": (lambda q, k, v: {"scale": -0.3}, "scale"),
    "unknown backend": (lambda q, k, v: {"backend": "fast"}, "backend"),
    "no backend": (lambda q, k, v: {"backend": None}, "backend"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    good = attention_arguments()
    voco_attention(**good)
    change, argument = BAD[name]
    with pytest.raises(ValueError, match=rf"^{argument} must be .+, but was .+"):
        voco_attention(**(good | change(good["q"], good["k"], good["v"])))


def test_a_backend_that_serves_something_else_gives_the_reason(monkeypatch):
    monkeypatch.setitem(backends.KV, "copies", "torch_kv")
    with pytest.raises(ValueError, match=r"^backend must be one of auto, .* but was 'copies': it serves the K/V path only"):
        voco_attention(**attention_arguments(), backend="copies")


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"public": LAYOUT.public & (LAYOUT.segment_ids > 0)}, "public"),
        ({"segment_ids": torch.tensor([1, 0, 1, 1, 1, 1, 1, 0], dtype=torch.int32), "public": ~LAYOUT.public}, "public"),
        ({"cu_seqlens": torch.tensor([0, 4, 8], dtype=torch.int32)}, "segment_ids"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, "cu_seqlens"),
    ],
)
def test_check_looks_at_the_values_of_a_layout(changes, argument):
    layout = dataclasses.replace(LAYOUT, **changes)
    with pytest.raises(ValueError, match=rf"^{re.escape(argument)} must be"):
        voco_attention(**(attention_arguments() | {"layout": layout}), check=True)


