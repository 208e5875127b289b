"""The invariant over backends of the K/V path and kinds of cache: injected K/V give the logits of one masked pass."""

import copy

import pytest
import torch
from cuda_backend import emulated
from models import additive_mask, exact_logits, llama, twin
from reference import OPEN, assert_error_rule
from test_two_stages import embeddings, token_ids
from transformers import DynamicCache, StaticCache
from voco_llama import stages

from voco_kernels import Image, Text, VocoKV, VocoLayout, extract_kv, inject_kv
from voco_kernels.integrations.transformers import CACHE_NAME

pytestmark = pytest.mark.filterwarnings("error:.*`past_key_values`:FutureWarning")

DOCUMENTS = {
    "one image": [Image(6, 2), Text(4)],
    "images of unequal size": [Image(3, 1), Image(9, 3), Image(5, 2), Text(6)],
    "a video": [*[Image(5, 2)] * 8, Text(5)],
}
BLOCK = 4


@pytest.fixture(params=["torch", "triton", "cuda"])
def backend(request):
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("kernels are interpreted only where there is no GPU")
    if request.param == "cuda":
        with emulated():
            yield request.param
    else:
        yield request.param


def compressed(model, x: torch.Tensor, run: stages.Run, backend: str) -> VocoKV:
    """Stage 1 of a closed segment, alone, at positions 0, 1, 2, ..."""
    cache = DynamicCache(config=model.config)
    model.model(inputs_embeds=x[:, run.tokens], use_cache=True, **{CACHE_NAME: cache})
    index = run.public.nonzero()[:, 0]
    keys, values = ([getattr(layer, name)[0].transpose(0, 1) for layer in cache.layers] for name in ("keys", "values"))
    return extract_kv(keys, values, index, index, *stages.rotary_of(model.model), backend=backend)


def contiguous(model, kv: VocoKV, positions, backend: str):
    """A dynamic cache whose tensors are slices of one."""
    k, v = (torch.empty(kv.num_layers, 1, kv.k.shape[2], kv.num_tokens, kv.k.shape[3], dtype=model.dtype) for _ in "kv")
    slots = torch.arange(kv.num_tokens)
    inject_kv(kv, k.transpose(2, 3), v.transpose(2, 3), slots, positions, *stages.rotary_of(model.model), backend=backend)
    return dynamic(model, k, v)


def static(model, kv: VocoKV, positions, backend: str):
    """A static cache, longer than what it holds, with memory of its own for each layer."""
    cache = StaticCache(model.config, max_cache_len=64)
    for layer in cache.layers:
        like = torch.empty(1, kv.k.shape[2], 0, kv.k.shape[3], dtype=model.dtype)
        layer.lazy_initialization(like, like)
    sides = ([getattr(layer, name).transpose(1, 2) for layer in cache.layers] for name in ("keys", "values"))
    slots = torch.arange(kv.num_tokens)
    inject_kv(kv, *sides, slots, positions, *stages.rotary_of(model.model), backend=backend)
    for layer in cache.layers:
        layer.cumulative_length.add_(kv.num_tokens)
    return cache


def paged(model, kv: VocoKV, positions, backend: str):
    """Pages in disorder, as a server has them; read back through the slot mapping, since transformers has no such cache."""
    blocks = 2 * -(-kv.num_tokens // BLOCK)
    k, v = (torch.full((kv.num_layers, blocks, BLOCK, *kv.k.shape[2:]), 77.0, dtype=model.dtype) for _ in "kv")
    slots = torch.randperm(blocks)[:, None] * BLOCK + torch.arange(BLOCK)
    slots = slots.flatten()[: kv.num_tokens]
    inject_kv(kv, k, v, slots, positions, *stages.rotary_of(model.model), backend=backend)
    return dynamic(model, *(x.flatten(1, 2)[:, slots].transpose(1, 2)[:, None] for x in (k, v)))


def dynamic(model, k, v) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for layer, (x, y) in enumerate(zip(k, v)):
        cache.update(x, y, layer)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("positions", ["continuous", "compact"])
@pytest.mark.parametrize("cache", [contiguous, static, paged])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_two_stages_equal_the_masked_pass(backend, name, cache, positions, dtype):
    model = copy.deepcopy(llama(rope="yarn")).to(dtype)
    layout = VocoLayout.from_spans([DOCUMENTS[name]], isolated=True, positions=positions)
    runs, x = stages.runs_of(layout, 0, layout.num_tokens), embeddings(model, layout)
    shift, text = stages.shift_of(runs), runs[-1]
    causal = twin(model, "sdpa")
    with torch.no_grad():
        kv = VocoKV.cat([compressed(model, x, run, backend) for run in runs[:-1]])
        public = torch.cat([(run.positions - shift)[run.public] for run in runs[:-1]])
        filled = cache(model, kv, public, backend)
        # Nothing but the cache: stage 2 is a plain causal LLaMA.
        got = causal(inputs_embeds=x[:, text.tokens], **{CACHE_NAME: filled}).logits[0]
        eager = twin(model, "eager")(
            inputs_embeds=x, attention_mask=additive_mask(layout, 1, x.dtype), position_ids=layout.position_ids[None]
        ).logits[0, text.tokens]
    exact = exact_logits(model, token_ids(layout), layout, x)[0, text.tokens]
    assert_error_rule("logits", got, eager, exact, [OPEN] * len(got))
