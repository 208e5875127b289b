"""What only a GPU shows: graphs, plans made there, long packs, the default backend, and transformers on top.

The comparisons of tests/test_triton_attention.py run on a GPU too, where there is one.
"""

import dataclasses

import pytest
import torch
from reference import assert_attention
from test_attention import LAYOUTS, inputs, results, spans

from voco_kernels import Image, Text, VocoLayout, voco_attention
from voco_kernels.backends import resolved

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

LONG = {
    "packed documents": spans(*[[Image(576, 2), Text(300)]] * 3, isolated=True),
    "frames": spans([*[Image(256, 2)] * 12, Text(256)], isolated=True),
    "images that see each other": spans([span for _ in range(5) for span in (Text(64), Image(200, 3), Text(70))]),
    "short text between short images": spans(
        [span for i in range(40) for span in (Text(1 + i % 5), Image(5 + i % 40, 1 + i % 3))]
    ),
}


def on_gpu(x, layout, backend="triton"):
    got = results(*(t.cuda() for t in x), layout.to("cuda"), backend=backend)
    return {name: value.cpu() for name, value in got.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", LONG)
def test_long_layouts(name, dtype):
    x = inputs(LONG[name], dtype, (4, 2), 64)
    assert_attention([(on_gpu(x, LONG[name]), x)], LONG[name])


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("heads", [(4, 1), (4, 4)], ids=str)
def test_heads(heads, head_dim):
    layout = LONG["short text between short images"]
    x = inputs(layout, torch.bfloat16, heads, head_dim)
    assert_attention([(on_gpu(x, layout), x)], layout)


@pytest.mark.parametrize("name", LONG)
def test_a_plan_made_on_the_gpu_gives_the_same_bits(name):
    layout = LONG[name].to("cuda")
    assert layout.tiles is None
    prepared = dataclasses.replace(LONG[name]).prepare().to("cuda")
    assert prepared.tiles.counted
    q, k, v, grad = (t.cuda() for t in inputs(layout, torch.bfloat16, (4, 2), 64))
    for got, want in zip(*(results(q, k, v, grad, x, backend="triton").values() for x in (layout, prepared))):
        assert torch.equal(got, want)


def test_repeated_runs_give_the_same_bits():
    layout = LONG["images that see each other"].to("cuda")
    x = [t.cuda() for t in inputs(layout, torch.bfloat16, (8, 2), 128)]
    first = results(*x, layout, backend="triton")
    for _ in range(5):
        assert all(torch.equal(got, first[name]) for name, got in results(*x, layout, backend="triton").items())


def test_auto_is_triton():
    layout = LAYOUTS["prime lengths"].to("cuda")
    q, k, v, _ = (t.cuda() for t in inputs(layout, torch.bfloat16, (4, 2), 32))
    assert resolved("auto", q) == "triton"
    assert torch.equal(voco_attention(q, k, v, layout), voco_attention(q, k, v, layout, backend="triton"))
    # What the kernels cannot serve goes to torch, when nothing was asked for.
    assert resolved("auto", q.double()) == resolved("auto", q[..., :16]) == resolved("auto", q.cpu()) == "torch"
    assert voco_attention(q.double(), k.double(), v.double(), layout).dtype == torch.float64


def test_no_synchronisation():
    """Neither the plan nor the kernels ask the device for anything."""
    layout = LONG["frames"].to("cuda")
    q, k, v, grad = (t.cuda().requires_grad_() for t in inputs(layout, torch.bfloat16, (2, 2), 64))
    voco_attention(q, k, v, layout, backend="triton").backward(grad)  # compiles
    fresh = dataclasses.replace(layout, segment_ids=layout.segment_ids.clone())
    torch.cuda.set_sync_debug_mode("error")
    try:
        voco_attention(q, k, v, fresh, backend="triton").backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("plan_inside", [False, True], ids=["plan before", "plan inside"])
def test_a_cuda_graph(plan_inside):
    """A captured step can be replayed with other values; with the plan inside also with another layout of the same size."""
    first, second = spans([Image(90, 3), Text(60)], isolated=True), spans([Image(40, 2), Text(20), Image(70, 1), Text(20)])
    second = dataclasses.replace(second, isolated=True)
    static = [t.cuda() for t in inputs(first, torch.bfloat16, (2, 2), 64)]
    ids = [t.cuda() for t in (first.segment_ids, first.public, first.cu_seqlens)]

    def layout() -> VocoLayout:
        return VocoLayout(ids[0].clone(), ids[1].clone(), ids[2], ids[0], True)

    kept = layout()

    def step():
        return results(*static, layout() if plan_inside else kept, backend="triton")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for replayed in (first, second) if plan_inside else (first,):
        x = inputs(replayed, torch.bfloat16, (2, 2), 64)
        for target, value in zip(static, x):
            target.copy_(value)
        for target, value in zip(ids, (replayed.segment_ids, replayed.public, replayed.cu_seqlens)):
            target.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert_attention([({name: value.cpu() for name, value in captured.items()}, x)], replayed)


def test_another_stream():
    layout = LONG["frames"].to("cuda")
    x = [t.cuda() for t in inputs(layout, torch.bfloat16, (2, 2), 64)]
    want = results(*x, layout, backend="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = results(*x, layout, backend="triton")
    stream.synchronize()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device():
    layout = LAYOUTS["prime lengths"]
    x = inputs(layout, torch.bfloat16, (2, 2), 64)
    got = results(*(t.to("cuda:1") for t in x), layout.to("cuda:1"), backend="triton")
    assert_attention([({name: value.cpu() for name, value in got.items()}, x)], layout)


def test_memory_is_linear():
    """What attention adds beside its results: a few numbers per row, never a mask."""
    layout = spans([*[Image(256, 2)] * 64, Text(256)], isolated=True).to("cuda")
    q, k, v, grad = (torch.randn(layout.num_tokens, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    results(q, k, v, grad, layout, backend="triton")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results(q, k, v, grad, layout, backend="triton")
    extra = torch.cuda.max_memory_allocated() - before
    # out, dq, dk, dv and the sum in `results`; a dense mask alone would be 280 MB.
    assert extra < 8 * q.nbytes + 2**20


def test_transformers_prefill_uses_the_kernels(monkeypatch):
    """A stock LLaMA with attn_implementation="voco" on a GPU, against the reference on the same GPU."""
    transformers = pytest.importorskip("transformers")
    from voco_kernels.backends import triton as backend
    from voco_kernels.integrations.transformers import register

    register()
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=32,
        num_key_value_heads=2, max_position_embeddings=512, attn_implementation="voco",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).cuda().to(torch.bfloat16).eval()
    layout = spans([Text(4), Image(70, 2), Text(20)], isolated=True).to("cuda")
    calls = []
    inner = backend.attention
    monkeypatch.setattr(backend, "attention", lambda *a: calls.append(1) or inner(*a))
    ids = torch.randint(0, 64, (1, layout.num_tokens), device="cuda")
    with torch.no_grad():
        got = model(ids, voco_layout=layout, use_cache=False).logits
        mask = torch.zeros(1, 1, *[layout.num_tokens] * 2, device="cuda", dtype=torch.bfloat16)
        mask.masked_fill_(~layout.dense_mask(), torch.finfo(torch.bfloat16).min)
        model.set_attn_implementation("eager")
        want = model(ids, attention_mask=mask, use_cache=False).logits
    assert len(calls) == 2
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))


def test_compiled_with_inductor():
    layout = LONG["frames"].to("cuda")
    x = [t.cuda() for t in inputs(layout, torch.bfloat16, (4, 2), 64)]

    @torch.compile(fullgraph=True)
    def step(q, k, v, layout):
        return voco_attention(2 * q, k, v, layout) * 3

    leaves = [t.clone().requires_grad_() for t in x[:3]]
    out = step(*leaves, layout)
    grads = torch.autograd.grad(out, leaves, x[3])
    plain = [t.clone().requires_grad_() for t in x[:3]]
    want = voco_attention(2 * plain[0], *plain[1:], layout) * 3
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(grads, torch.autograd.grad(want, plain, x[3]))
