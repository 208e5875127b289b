"""The systems that the paper compares, a word each: what an image becomes, and what the text sees of it."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from voco_kernels.integrations.transformers import CACHE_NAME

from .baselines import CompressedLlavaConfig, with_compressor
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
    name: str,
    model: VocoLlavaForConditionalGeneration,
    processor: VocoProcessor,
    num_tokens: int,
    *,
    qformer_config: dict | None = None,
) -> tuple[VocoLlavaForConditionalGeneration, VocoProcessor]:
    """Turn a model into the system of that name; a compressor starts from random weights (`baselines.with_compressor`).

    A system with a compressor is a new model that shares the vision tower and the LLaMA, unless `model` has that compressor
    already; otherwise `model` itself is changed. So is `processor`, which becomes the model's.

    Args:
        num_tokens: tokens of an image, at least 1: VoCo tokens, or what a compressor makes of it ("llama_vid" adds its
            context token); without meaning for "full_caching".
        qformer_config: of the Q-Former of "q_former" and "llama_vid" (see `CompressedLlavaConfig`).

    Raises:
        ValueError: a name that is none; a number below 1; a model with another compressor, or one for another number;
            `qformer_config` where no compressor is made.
    """
    system = system_of(name)
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, but was {num_tokens}")
    if system.compressor is not None and not isinstance(model.config, CompressedLlavaConfig):
        model = with_compressor(model, system.compressor, num_tokens, qformer_config)
    elif qformer_config is not None:
        raise ValueError("qformer_config must be None where there is no Q-Former to be made, but was given")
    _check(system, model, num_tokens)
    if system.compressor is None:
        model.config.masked = system.masked
    processor.num_compressed_tokens = getattr(model.config, "tokens_per_image", None)
    count = num_tokens if system.voco_tokens else 0
    for part in (model.config, processor):
        part.num_voco_tokens, part.max_voco_tokens = count, max(count, part.max_voco_tokens)
    model.processor = processor
    return model, processor


@torch.no_grad()
def answer(
    name: str,
    model: VocoLlavaForConditionalGeneration,
    questions: Sequence[str],
    images: Sequence[Sequence],
    num_tokens: int,
    **kwargs,
) -> list[str]:
    """Answers to a batch of questions, as the system of that name gives them with the weights of `model`.

    "voco" compresses the images and generates from their K/V, "full_caching" caches all vision tokens, a question at a time;
    the others read the prompt in a single pass. The configuration is as before afterwards.

    Args:
        images: for each question its images (see `VocoProcessor`).
        num_tokens: as in `prepare`.
        kwargs: for `generate`; greedy unless they say otherwise.

    Raises:
        ValueError: a model that is not of the system; more or fewer lists of images than questions.
    """
    system = system_of(name)
    _check(system, model, num_tokens)
    if len(images) != len(questions):
        raise ValueError(f"images must hold a list for each of the {len(questions)} questions, but holds {len(images)}")
    if not len(questions):
        return []
    options = {"do_sample": False, "max_new_tokens": 64, **kwargs}
    with _masked(model, system.masked):
        if name == "full_caching":
            return [_answer_cached(model, *one, options) for one in zip(questions, images, strict=True)]
        count = num_tokens if system.voco_tokens else 0
        tokens = _tokens(model, questions, images, count)
        if name == "voco" and "pixel_values" in tokens:
            del tokens["pixel_values"]
            options["voco_kv"] = model.compress(list(itertools.chain.from_iterable(images)), count)
        return _decoded(model, tokens["input_ids"], model.generate(**tokens, **options))


def _check(system: System, model: VocoLlavaForConditionalGeneration, num_tokens: int) -> None:
    """ValueError where a model has not what the system needs before the LLaMA."""
    config, has = model.config, None
    if isinstance(config, CompressedLlavaConfig):
        has = config.compressor
    if has != system.compressor:
        raise ValueError(f"model must have the compressor {system.compressor} for {system.name}, but has {has}")
    if has is not None and config.num_compressed_tokens != num_tokens:
        raise ValueError(
            f"num_tokens must be that of the model's compressor ({config.num_compressed_tokens}), but was {num_tokens}"
        )


@contextlib.contextmanager
def _masked(model: VocoLlavaForConditionalGeneration, masked: bool) -> Iterator[None]:
    before, model.config.masked = model.config.masked, masked
    try:
        yield
    finally:
        model.config.masked = before


def _tokens(model, questions: Sequence[str], images: Sequence[Sequence], num_voco_tokens: int):
    processor = model.processor
    prompts = [processor.prompt(question, len(own)) for question, own in zip(questions, images, strict=True)]
    flat = list(itertools.chain.from_iterable(images))
    return processor(flat or None, prompts, num_voco_tokens, padding_side="left").to(model.device)


def _answer_cached(model, question: str, images: Sequence, options: dict) -> str:
    """One question behind the K/V of everything up to its last image."""
    tokens = _tokens(model, [question], [images], 0)
    ids = tokens["input_ids"]
    if images:
        end = int((ids[0] == model.config.image_token_id).nonzero()[-1]) + 1
        options = {**options, CACHE_NAME: model.cache_images(ids[:, :end], tokens.pop("pixel_values"))}
    return _decoded(model, ids, model.generate(**tokens, **options))[0]


def _decoded(model, prompts: torch.Tensor, output: torch.Tensor) -> list[str]:
    new = output[:, prompts.shape[1] :]
    return [text.strip() for text in model.processor.batch_decode(new, skip_special_tokens=True)]
