"""What answers a question about an image: without a cache, over all its K/V, over the K/V of VoCo tokens; and the gate.

Every system pays for whatever it has to do for a question: the vision tower, or bringing stored K/V into its static cache.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from voco_kernels import InjectionPlan, VocoKV

from .. import VocoLlavaConfig, stages
from ..flops import image_flops, llama_flops
from .clock import release
from .paper import FULL, NO_CACHE
from .static import StaticRun

# ---- FLOPs -------------------------------------------------------------------------------------------------------------


def flops_of_question(config: VocoLlavaConfig, cached: int, image: int, text: int, tokens: int) -> int:
    """Useful FLOPs of one question, up to `tokens` new tokens: pairs that the causal mask allows, as papers count.

    Args:
        cached: tokens whose K/V are stored.
        image: tokens of the image that go through the vision tower and the LLaMA; 0 where its K/V are stored.
        text: tokens of the question.
    """
    new = image + text
    pairs = new * cached + new * (new + 1) // 2
    flops = llama_flops(config.text_config, new, pairs) + (image_flops(config) if image else 0)
    return flops + sum(llama_flops(config.text_config, 1, cached + new + i) for i in range(1, tokens))


# ---- systems ---------------------------------------------------------------------------------------------------------


@dataclass
class Ready:
    """All that a system needs on the device to answer a batch of questions.

    Attributes:
        stored, bind: see `loader`.
    """

    run: StaticRun
    stored: Sequence[torch.Tensor]
    bind: Callable[[Sequence[torch.Tensor]], Callable[[], None]]


@dataclass
class System:
    """What is known of a system before anything is allocated.

    Attributes:
        voco: VoCo tokens of an image; 0 where it is not compressed.
        cached: tokens of one image whose K/V are stored.
        kv_bytes: of the stored K/V of one image.
        make: allocates, stores and captures.
    """

    name: str
    voco: int
    cached: int
    kv_bytes: int
    make: Callable[[], Ready]

    @cached_property
    def ready(self) -> Ready:
        """Made at the first use, so that a system that has no room fails alone; tried again after a failure."""
        return self.make()


class Questions:
    """Questions of random words, each about its own random image.

    Attributes:
        pixels ([B, 3, H, W]): the images.
        text (int64 [B, T]): the questions; next (int64 [B, 1]): a token that may follow each.
        prefix (int64 [P]): the tokens of an image.
    """

    def __init__(self, model, llama, batch: int, text: int, answer: int):
        self.model, self.llama, self.answer = model, llama, answer
        config, device = model.config, model.device
        start = [] if config.image_start_id is None else [config.image_start_id]
        self.prefix = torch.tensor(start + [config.image_token_id] * config.image_seq_length, device=device)
        special = {config.image_token_id, config.voco_token_id, *start}
        words = [i for i in range(config.text_config.vocab_size) if i not in special]
        drawn = torch.randint(len(words), (batch, text + 1), generator=torch.Generator().manual_seed(1))
        drawn = torch.tensor(words)[drawn].to(device)
        self.text, self.next = drawn[:, :-1].contiguous(), drawn[:, -1:]
        edge = config.vision_config.image_size
        pixels = torch.randn(batch, 3, edge, edge, generator=torch.Generator().manual_seed(2))
        self.pixels = pixels.to(device, model.dtype)

    def prompts(self, voco: int) -> torch.Tensor:
        """[B, P + voco + T]: images, VoCo tokens, questions, as a forward of the whole model takes them."""
        ids = torch.cat([self.prefix, self.prefix.new_full((voco,), self.model.config.voco_token_id)])
        return torch.cat([ids.expand(len(self.text), -1), self.text], dim=1)

    def _run(self, cached: int, image: Callable[[], torch.Tensor] | None = None) -> StaticRun:
        return StaticRun(self.model, self.llama, self.text, cached, self.answer, image)

    def _kv_bytes(self, tokens: int) -> int:
        """Of the K/V of `tokens` tokens of one image."""
        config = self.llama.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = config.num_hidden_layers * config.num_key_value_heads * head_dim
        return 2 * tokens * width * self.model.dtype.itemsize

    def no_cache(self) -> System:
        """The image goes through the vision tower, the projector and the LLaMA."""
        return System(NO_CACHE, 0, 0, 0, self._no_cache)

    def full_caching(self) -> System:
        """The K/V of all tokens of the image, rotated, are copied into the cache."""
        length = len(self.prefix)
        return System(FULL, 0, length, self._kv_bytes(length), self._full_caching)

    def voco(self, count: int) -> System:
        """The K/V of the VoCo tokens, not rotated, are injected into the cache."""
        return System(f"voco {count}", count, count, self._kv_bytes(count), partial(self._voco, count))

    def _no_cache(self) -> Ready:
        pixels = torch.empty_like(self.pixels)
        start = self.prefix[: len(self.prefix) - self.model.config.image_seq_length].expand(len(self.text), -1)

        def image() -> torch.Tensor:
            embeds = self.model.get_input_embeddings()(start)
            features = stages.image_features(self.model, pixels).view(len(pixels), -1, embeds.shape[-1])
            return torch.cat([embeds, features], dim=1)

        def bind(stored):
            return lambda: pixels.copy_(stored[0])

        return Ready(self._run(0, image), [self.pixels], bind)

    def _full_caching(self) -> Ready:
        run = self._run(len(self.prefix))
        place = run.memory.tensor[..., : len(self.prefix), :]
        stored = torch.empty(place.shape, dtype=place.dtype, device=place.device)
        for i, pixels in enumerate(self.pixels):
            layers = self.model.cache_images(self.prefix[None], pixels[None]).layers
            for side, kind in zip(stored, ("keys", "values")):
                side[:, i] = torch.cat([getattr(layer, kind) for layer in layers])

        def bind(stored):
            return lambda: place.copy_(stored[0])

        return Ready(run, [stored], bind)

    def _voco(self, count: int) -> Ready:
        segments = self.prompts(count)[:, : len(self.prefix) + count]
        images = range(len(self.pixels))
        # Not `model.compress`, which would hash all weights for the origin of the K/V.
        parts = [stages.compress(self.model, segments[[i]], self.pixels[[i]], {})[0] for i in images]
        kv = VocoKV.cat(parts)
        run = self._run(count)
        memory, device = run.memory, self.text.device
        places = torch.arange(count, device=device)
        slots = (torch.arange(len(images), device=device)[:, None] * memory.slots + places).flatten()
        by_slot = memory.tensor.transpose(-2, -3)  # [2, L, B, slots, Hkv, D], as the library takes a paged cache
        rotary = stages.rotary_of(self.model.model.language_model)
        plan = InjectionPlan(*by_slot, slots, places.repeat(len(images)), *rotary)

        def bind(stored):
            kv = VocoKV(*stored)
            return lambda: plan.inject(kv)

        return Ready(run, [kv.k, kv.v], bind)


# ---- the gate ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_logits(model, ids: torch.Tensor, pixels: torch.Tensor, keep: int = 1) -> torch.Tensor:
    """[keep, vocabulary]: the last logits of one prompt in a single forward of the whole model, without a cache."""
    pixels = pixels[None].to(model.dtype)
    return model(input_ids=ids[None], pixel_values=pixels, logits_to_keep=keep, use_cache=False).logits[0]


@dataclass(frozen=True, eq=False)
class Truth:
    """What the next logits after a prompt are ([vocabulary], in the next wider dtype), and how far off they may be.

    The bound is the project's rule for errors: twice that of the plain forward in the model's dtype, and a little.
    """

    ids: torch.Tensor
    pixels: torch.Tensor
    logits: torch.Tensor
    bound: float

    def check_logits(self, logits: torch.Tensor) -> None:
        """AssertionError where the logits are further off."""
        error = float((logits.to(self.logits.dtype) - self.logits).abs().max())
        # Written so that a NaN fails.
        assert error <= self.bound, f"logits are {error:.2e} off the plain forward's, granted {self.bound:.2e}"

    def check_answer(self, model, tokens: torch.Tensor, last: torch.Tensor) -> None:
        """Check an answer (int64 [n]) that was chosen greedily, and the logits that its last token was chosen by.

        AssertionError unless each token is the likeliest to a plain forward too, but for what rounding decides.
        """
        # The plain forward would take an image token for an image.
        images = (tokens[:-1] == model.config.image_token_id).nonzero()
        compared = tokens[: int(images[0]) + 1] if len(images) else tokens
        logits = plain_logits(model, torch.cat([self.ids, compared[:-1]]), self.pixels, len(compared)).double()
        lost = logits.max(-1).values - logits.gather(1, compared[:, None])[:, 0]
        # Two logits, each off the truth by the bound here and there; written so that a NaN fails.
        granted = 4 * self.bound
        wrong = (~(lost <= granted)).nonzero()[:, 0]
        assert not len(wrong), (
            f"the logit of token {int(wrong[0])} of the answer is {float(lost[wrong[0]]):.2e} below that of the plain "
            f"forward's choice, granted {granted:.2e}"
        )
        if len(compared) == len(tokens):
            error = float((last.double() - logits[-1]).abs().max())
            assert error <= granted, f"the last logits are {error:.2e} off the plain forward's, granted {granted:.2e}"


def truths(model, prompts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[Truth]:
    """The Truth of (token ids [S], pixels [3, H, W]); meanwhile holds a copy of the model in the next wider dtype."""
    wide = copy.deepcopy(model).to(torch.float64 if model.dtype == torch.float32 else torch.float32)
    result = []
    for ids, pixels in prompts:
        true = plain_logits(wide, ids, pixels)[0]
        plain = plain_logits(model, ids, pixels)[0].to(true.dtype)
        bound = 2 * (plain - true).abs().max() + 4 * torch.finfo(model.dtype).eps * true.abs().max()
        result.append(Truth(ids, pixels, true, float(bound)))
    del wide
    release(model.device)
    return result
