"""`decode_attention` and its torch backend: against float64 request by request, what it never reads, and what it refuses."""

import math
from dataclasses import replace

import pytest
import torch
from decode_samples import POISON, Form, Problem, forms
from hypothesis import given
from hypothesis import strategies as st
from reference import rotated

import voco_kernels.backends.torch_decode as torch_decode
from voco_kernels import SharedPrefix, VocoKV, decode_attention

INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn
HALF = (torch.float16, torch.bfloat16)
# Two videos, and requests without one.
FORM = Form(groups=((3, 40), (2, 7), (1, 0)), lengths=(5, 17, 1, 9, 2, 30), tokens=2)


# ---- values ------------------------------------------------------------------------------------------------------------


@given(forms((torch.float32, *HALF), (None, INT8, FLOAT8), head_dims=(20, 64)))
def test_random_problems(form):
    problem = Problem(form)
    problem.check(problem.run("torch"))


@given(forms((torch.float64,), head_dims=(8,)), st.floats(0.01, 3))
def test_float64_is_exact(form, scale):
    """Also with a scale of one's own."""
    problem = Problem(form)
    for x, x64 in zip(problem.run("torch", scale=scale), problem.expected(torch.float64, scale)):
        torch.testing.assert_close(x, x64, rtol=1e-11, atol=1e-11)


def test_long_prefixes_are_read_in_chunks(monkeypatch):
    problem = Problem(FORM)
    whole = problem.run("torch")
    monkeypatch.setattr(torch_decode, "PREFIX_CHUNK", 16)
    for x, y in zip(problem.run("torch"), whole):
        torch.testing.assert_close(x, y)
    problem.check(problem.run("torch"))


def test_a_prefix_is_what_every_request_would_have_before_its_own_keys():
    """The same through the same function, with the prefix repeated in the caches."""
    problem = Problem(replace(FORM, groups=((6, 40),)))
    wide = torch.arange(40 + problem.k_cache.shape[1])
    caches = []
    for shared, own in ((problem.prefix.k, problem.k_cache), (problem.prefix.v, problem.v_cache)):
        caches.append(torch.cat([shared[None].expand(6, -1, -1, -1), own], dim=1))
    repeated = decode_attention(problem.q, *caches, problem.lengths + 40, return_lse=True)
    assert caches[0].shape[1] == len(wide)
    for x, y in zip(problem.run("auto"), repeated):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("entry", [-1, 10**6, -(2**31)])
@pytest.mark.parametrize("which", [0, 1])
def test_entries_that_are_no_block_hide_their_keys(entry, which):
    problem = Problem(Form(groups=(), lengths=(8,), block=4))
    problem.table[0, which] = entry
    kept = slice(4, 8) if which == 0 else slice(0, 4)
    k, v = problem.own[0][:, kept][:, None]
    last = torch.tensor([4], dtype=torch.int32)
    for x, y in zip(problem.run("torch"), decode_attention(problem.q, k, v, last, return_lse=True)):
        torch.testing.assert_close(x, y)


def test_what_is_behind_the_lengths_is_never_looked_at():
    problem = Problem(FORM)
    assert problem.k_cache.isnan().any() and problem.v_cache.isnan().any() and math.isnan(POISON)
    assert all(x.isfinite().all() for x in problem.run("torch"))


def test_only_the_output_is_returned_unless_asked():
    problem = Problem(FORM)
    out = problem.run("torch", return_lse=False)
    assert isinstance(out, torch.Tensor) and torch.equal(out, problem.run("torch")[0])


# ---- as an operator ----------------------------------------------------------------------------------------------------

# Without a prefix, with one, with one of bytes; contiguous and paged. Of the first one, what torch computes is not dense.
PAGED = replace(FORM, block=4)
TRACED = [replace(FORM, groups=(), group_heads=1), replace(PAGED, dtype=torch.bfloat16), replace(PAGED, stored=INT8)]


@pytest.mark.parametrize("form", TRACED)
def test_a_compiled_graph_holds_it(form):
    """As one operator, whatever is read from the tensors inside; lengths and groups may then be others."""
    problem, seen = Problem(form), []

    def keep(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return torch.compile(graph, backend="aot_eager")

    @torch.compile(fullgraph=True, backend=keep)
    def compiled(q, k_cache, v_cache, lengths, table, prefix):
        return decode_attention(q, k_cache, v_cache, lengths, block_table=table, prefix=prefix, return_lse=True)

    for _ in range(2):
        results = compiled(problem.q, problem.k_cache, problem.v_cache, problem.lengths, problem.table, problem.prefix)
        for x, y in zip(results, problem.run("torch"), strict=True):
            assert torch.equal(x, y)
        problem.lengths.sub_(1)
    assert seen.count("voco.decode_attention.default") + seen.count("voco.decode_attention") == 1


def test_a_compiled_graph_refuses_what_a_call_does():
    problem = Problem(FORM)
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"^backend must be .+, but was 'fast'"):
        compiled(problem.q, problem.k_cache, problem.v_cache, problem.lengths, backend="fast")
    with torch.no_grad():
        q = problem.q.clone().requires_grad_()
        assert not compiled(q, problem.k_cache, problem.v_cache, problem.lengths).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", TRACED)
def test_opcheck(form, dtype):
    problem = Problem(replace(form, dtype=dtype))
    # Poison would be unequal to itself wherever an input is compared.
    caches = (x.nan_to_num(0) for x in (problem.k_cache, problem.v_cache))
    names = ("k", "v", "cu_prefix", "cu_requests", "k_scale", "v_scale")
    shared = (problem.prefix and getattr(problem.prefix, name) for name in names)
    arguments = (problem.q, *caches, problem.lengths, problem.table, *shared, 0.3, "torch")
    torch.library.opcheck(torch.ops.voco.decode_attention.default, arguments)


# ---- a prefix from stored K/V ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF, INT8, FLOAT8])
@pytest.mark.parametrize("quantised", [False, True])
def test_stored_kv_become_a_prefix(dtype, quantised):
    kv = VocoKV(*torch.randn(2, 3, 9, 2, 16))
    kv = kv.quantised() if quantised else kv
    wide = kv.dequantised(torch.float64) if quantised else kv.to(torch.float64)
    positions, inv_freq, ends = torch.randint(0, 4000, (9,)), 10000 ** -(torch.arange(8) / 8), ints(0, 9)
    prefix = SharedPrefix.from_kv(kv, 1, positions, inv_freq, 1.25, dtype=dtype, cu_prefix=ends, cu_requests=ends)
    assert prefix.k.dtype == dtype and (prefix.k_scale is not None) == (dtype in (INT8, FLOAT8))
    k, v = prefix.k.double(), prefix.v.double()
    if prefix.k_scale is not None:
        k, v = k * prefix.k_scale[..., None], v * prefix.v_scale[..., None]
    # Steps of int8 are 1/127 of the largest number of a row, those of float8 1/16 of a number.
    allowed = {INT8: 0.5 / 127, FLOAT8: 1 / 16}.get(dtype) or max(torch.finfo(dtype).eps, 1e-6)
    for x, true in ((k, rotated(wide.k[1], positions, inv_freq, 1.25)), (v, wide.v[1])):
        assert ((x - true).abs() <= 1.01 * allowed * true.abs().amax(-1, keepdim=True) + 1e-12).all()


# ---- refusals ----------------------------------------------------------------------------------------------------------


def arguments() -> dict:
    problem = Problem(replace(FORM, block=4))
    names = {"q": problem.q, "k_cache": problem.k_cache, "v_cache": problem.v_cache, "lengths": problem.lengths}
    return names | {"block_table": problem.table, "prefix": problem.prefix}


def prefix_with(**changes):
    """arguments() whose prefix is another one."""
    return lambda a: {"prefix": SharedPrefix(**(vars(a["prefix"]) | {name: f(a["prefix"]) for name, f in changes.items()}))}


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "q is a list": (lambda a: {"q": a["q"].tolist()}, "q"),
    "q of 3 dimensions": (lambda a: {"q": a["q"][0]}, "q"),
    "q of integers": (lambda a: {"q": a["q"].int()}, "q"),
    "no query token": (lambda a: {"q": a["q"][:, :0]}, "q"),
    "17 query tokens": (lambda a: {"q": a["q"][:, :1].expand(-1, 17, -1, -1)}, "q"),
    "heads no multiple": (lambda a: {"q": a["q"][:, :, :3]}, "q"),
    "cache of another dtype": (lambda a: {"k_cache": a["k_cache"].double()}, "k_cache"),
    "cache of another device": (lambda a: {"v_cache": a["v_cache"].to("meta")}, "v_cache"),
    "cache of another head_dim": (lambda a: {x: a[x][..., :8] for x in ("k_cache", "v_cache")}, "k_cache"),
    "values of another shape": (lambda a: {"v_cache": a["v_cache"][1:]}, "v_cache"),
    "no gradients": (lambda a: {"v_cache": a["v_cache"].requires_grad_()}, "v_cache"),
    "requests without a table": (lambda a: {"block_table": None}, "k_cache"),
    "blocks of nothing": (lambda a: {x: a[x][:, :0] for x in ("k_cache", "v_cache")}, "k_cache"),
    "table of other requests": (lambda a: {"block_table": a["block_table"][1:]}, "block_table"),
    "table of int64": (lambda a: {"block_table": a["block_table"].long()}, "block_table"),
    "lengths of int64": (lambda a: {"lengths": a["lengths"].long()}, "lengths"),
    "lengths of other requests": (lambda a: {"lengths": a["lengths"][1:]}, "lengths"),
    "negative length": (lambda a: {"lengths": a["lengths"] - 2}, "lengths"),
    "length beyond the table": (lambda a: {"lengths": a["lengths"] + 10}, "lengths"),
    "scale of 0": (lambda a: {"scale": 0}, "scale"),
    "infinite scale": (lambda a: {"scale": math.inf}, "scale"),
    "prefix is a tensor": (lambda a: {"prefix": a["prefix"].k}, "prefix"),
    "prefix of other heads": (prefix_with(k=lambda p: p.k[:, :1], v=lambda p: p.v[:, :1]), "prefix.k"),
    "prefix of another dtype": (prefix_with(k=lambda p: p.k.half(), v=lambda p: p.v.half()), "prefix.k"),
    "prefix with a gradient": (prefix_with(v=lambda p: p.v.clone().requires_grad_()), "prefix.v"),
    "prefix of int16": (prefix_with(k=lambda p: p.k.short()), "prefix.k"),
    "prefix values of another shape": (prefix_with(v=lambda p: p.v[1:]), "prefix.v"),
    "scales without use": (prefix_with(k_scale=lambda p: p.k[..., 0]), "prefix.k_scale"),
    "scales missing": (prefix_with(k=lambda p: p.k.to(INT8), v=lambda p: p.v.to(INT8)), "prefix.k_scale"),
    "no group": (prefix_with(cu_prefix=lambda p: p.cu_prefix[:1]), "prefix.cu_prefix"),
    "other number of groups": (prefix_with(cu_requests=lambda p: p.cu_requests[1:]), "prefix.cu_requests"),
    "groups of int64": (prefix_with(cu_prefix=lambda p: p.cu_prefix.long()), "prefix.cu_prefix"),
    "prefix too short": (prefix_with(cu_prefix=lambda p: p.cu_prefix + 1), "prefix.cu_prefix"),
    "prefix backwards": (prefix_with(cu_prefix=lambda p: ints(0, 9, 7, 10)), "prefix.cu_prefix"),
    "a request without a group": (prefix_with(cu_requests=lambda p: ints(0, 1, 2, 5)), "prefix.cu_requests"),
    "a first request without a group": (prefix_with(cu_requests=lambda p: ints(1, 1, 2, 6)), "prefix.cu_requests"),
    "unknown backend": (lambda a: {"backend": "fast"}, "backend"),
    "backend that does not decode": (lambda a: {"backend": "triton"}, "backend"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    good = arguments()
    decode_attention(**good)
    change, argument = BAD[name]
    with pytest.raises(ValueError, match=rf"^{argument} must be .+, but was .+"):
        decode_attention(**(good | change(good)))


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"kv": "k"}, "kv"),
        ({"layer": 3}, "layer"),
        ({"layer": -1}, "layer"),
        ({"dtype": torch.int32}, "dtype"),
        ({"positions": torch.zeros(8, dtype=torch.int64)}, "positions"),
        ({"inv_freq": torch.zeros(7)}, "inv_freq"),
    ],
)
def test_bad_stored_kv(change, argument):
    good = {
        "kv": VocoKV(*torch.randn(2, 3, 9, 2, 16)), "layer": 2, "positions": torch.arange(9),
        "inv_freq": torch.rand(8), "dtype": torch.float16, "cu_prefix": ints(0, 9), "cu_requests": ints(0, 1),
    }  # fmt: skip
    SharedPrefix.from_kv(**good)
    with pytest.raises(ValueError, match=rf"^{argument} must be .+, but was .+"):
        SharedPrefix.from_kv(**(good | change))


def test_gradients_are_refused_only_where_they_are_recorded():
    good = arguments()
    with torch.no_grad():
        assert not decode_attention(**(good | {"q": good["q"].clone().requires_grad_()})).requires_grad
