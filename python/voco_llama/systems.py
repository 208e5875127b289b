"""The systems that the paper compares, a word each: what an image becomes, and what the text sees of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from voco_kernels.integrations.transformers import CACHE_NAME

from .baselines import with_compressor
from .modeling import VocoLlavaForConditionalGeneration
from .processing import VocoProcessor


@dataclass(frozen=True)
class System:
    """One way of showing an image to a LLaMA.

    Attributes:
        name: the word in a training configuration.
        what: one line about it.
        source: where it is described.
        compressor: what makes fewer tokens of an image before the LLaMA (`voco_llama.baselines`); None where the LLaMA gets
            all vision tokens.
        voco_tokens: whether VoCo tokens stand behind an image.
        masked: whether text sees an image only through its VoCo tokens.
        weights_of: the system whose training makes its weights; its own name unless it is inference only.
    """

    name: str
    what: str
    source: str
    compressor: str | None = None
    voco_tokens: bool = False
    masked: bool = False
    weights_of: str = ""

    @property
    def trains(self) -> bool:
        """Whether it has weights of its own."""
        return self.weights_of == self.name


_VOCO = "VoCo-LLaMA (arXiv 2406.12275)"
SYSTEMS = {
    system.name: system
    for system in (
        System(
            "voco",
            "text sees VoCo tokens only",
            f"{_VOCO}, section 3.2",
            voco_tokens=True,
            masked=True,
            weights_of="voco",
        ),
        System(
            "upper_bound",
            "VoCo tokens are there, and text sees everything",
            f"{_VOCO}, section 4.2",
            voco_tokens=True,
            weights_of="upper_bound",
        ),
        System(
            "lower_bound",
            "the upper bound's weights under the VoCo mask",
            f"{_VOCO}, section 4.2",
            voco_tokens=True,
            masked=True,
            weights_of="upper_bound",
        ),
        System(
            "full_caching", "the K/V of all vision tokens are cached", f"{_VOCO}, table 7", weights_of="upper_bound"
        ),
        System(
            "avg_pool",
            "mean of vision tokens, then a linear layer",
            f"{_VOCO}, section 4.2",
            compressor="avg_pool",
            weights_of="avg_pool",
        ),
        System(
            "q_former",
            "queries of a Q-Former",
            "BLIP-2 (arXiv 2301.12597), section 3.1",
            compressor="q_former",
            weights_of="q_former",
        ),
        System(
            "llama_vid",
            "a context token guided by the text, and pooled content tokens",
            "LLaMA-VID (arXiv 2311.17043), section 3.2",
            compressor="llama_vid",
            weights_of="llama_vid",
        ),
    )
}


def system_of(name: str) -> System:
    """The system of that name; ValueError that lists all."""
    if name not in SYSTEMS:
        raise ValueError(f"system must be one of {', '.join(SYSTEMS)}, but was {name!r}")
    return SYSTEMS[name]


def prepare(
    name: str, model: VocoLlavaForConditionalGeneration, processor: VocoProcessor, num_tokens: int
) -> tuple[VocoLlavaForConditionalGeneration, VocoProcessor]:
    """A checkpoint as the named system: its projector replaced, or its attention and its counts set, in place.

    Args:
        model: a LLaVA or VoCo checkpoint; one that has been trained as `name` is left as it is.
        num_tokens: VoCo tokens per image, tokens of a compressor, or content tokens of LLaMA-VID.

    Returns:
        (model, processor); a model with a new compressor shares all its other weights with the one that was given.

    Raises:
        ValueError: a model with another compressor, or with one for another number of tokens.
    """
    system = system_of(name)
    found = getattr(model.config, "compressor", None)
    if found is not None and (found, model.config.num_compressed_tokens) != (system.compressor, num_tokens):
        raise ValueError(
            f"model must be made for system {name!r} with {num_tokens} tokens, but is {found!r} with "
            f"{model.config.num_compressed_tokens}"
        )
    if system.compressor is None:
        model.config.masked = system.masked
        model.processor = processor
        return model, processor
    if found is None:
        model = with_compressor(model, system.compressor, num_tokens)
    processor.num_compressed_tokens = model.config.tokens_per_image
    processor.num_voco_tokens = 0
    model.processor = processor
    return model, processor


@torch.no_grad()
def answer(
    name: str,
    model: VocoLlavaForConditionalGeneration,
    questions: Sequence[str],
    images: Sequence,
    num_tokens: int,
    **kwargs,
) -> list[str]:
    """Greedy answers to a question about each image, as the named system is meant to be used.

    VoCo models compress first and answer over the compressed K/V; full caching answers behind the cache of all vision
    tokens, image by image; all others answer in a single pass.

    Args:
        model: trained for `System.weights_of`; `config.masked` is set for the time of the call.
        num_tokens: VoCo tokens per image, where the system has any.
        kwargs: for `generate`.

    Returns:
        The text of each answer.
    """
    system, processor = system_of(name), model.processor
    before, model.config.masked = model.config.masked, system.masked
    options = {"do_sample": False, "max_new_tokens": 64, **kwargs}
    try:
        if name == "full_caching":
            return [_behind_a_cache(model, *pair, options) for pair in zip(questions, images, strict=True)]
        count = num_tokens if system.voco_tokens else 0
        prompts = [processor.prompt(question) for question in questions]
        kv = model.compress(list(images), count) if name == "voco" else None
        inputs = processor(list(images) if kv is None else None, prompts, num_voco_tokens=count).to(model.device)
        written = model.generate(**inputs, voco_kv=kv, **options)
        return _texts(processor, written[:, inputs["input_ids"].shape[1] :])
    finally:
        model.config.masked = before


def _behind_a_cache(model: VocoLlavaForConditionalGeneration, question: str, image, options: dict) -> str:
    processor = model.processor
    inputs = processor([image], processor.prompt(question), num_voco_tokens=0).to(model.device)
    ids = inputs["input_ids"]
    end = int((ids[0] == model.config.image_token_id).nonzero()[-1]) + 1
    cache = model.cache_images(ids[:, :end], inputs["pixel_values"])
    written = model.generate(input_ids=ids, **{CACHE_NAME: cache}, **options)
    return _texts(processor, written[:, ids.shape[1] :])[0]


def _texts(processor: VocoProcessor, tokens: torch.Tensor) -> list[str]:
    return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
