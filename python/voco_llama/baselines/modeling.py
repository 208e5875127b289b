"""A LLaVA whose projector is a compressor; the vision tower and the LLaMA are those of every other system."""

import functools

import torch

from voco_kernels.integrations import transformers as voco_transformers

from ..modeling import VocoLlavaForConditionalGeneration
from .compressors import compressor_of
from .configuration import CompressedLlavaConfig
from .guide import guided_by, text_behind_images


class CompressedLlavaForConditionalGeneration(VocoLlavaForConditionalGeneration):
    """LLaVA that gets few tokens of an image: pooled, of a Q-Former, or as in LLaMA-VID (see `compressors`)."""

    config: CompressedLlavaConfig
    config_class = CompressedLlavaConfig

    def __init__(self, config: CompressedLlavaConfig):
        super().__init__(config)
        self.model.multi_modal_projector = compressor_of(config)
        self.post_init()

    # `generate` asks the signature which arguments there are.
    @functools.wraps(VocoLlavaForConditionalGeneration.forward)
    def forward(self, input_ids=None, pixel_values=None, attention_mask=None, *args, labels=None, cu_seqlens=None, **kwargs):
        given = {"labels": labels, "cu_seqlens": cu_seqlens, **kwargs}
        run = functools.partial(super().forward, input_ids, pixel_values, attention_mask, *args, **given)
        # Later steps of `generate` have no images, so that an answer does not guide. Training may add an image to text.
        without_images = pixel_values is None and not self.training
        if self.config.compressor != "llama_vid" or input_ids is None or without_images:
            return run()
        padding = attention_mask
        if isinstance(attention_mask, voco_transformers.PrefillMask):
            padding = attention_mask.padding
        guide = text_behind_images(
            input_ids,
            self.config.image_token_id,
            self.config.tokens_per_image,
            self.config.qformer_config.max_position_embeddings,
            attention_mask=padding,
            labels=labels,
            cu_seqlens=cu_seqlens,
        )
        with guided_by(guide):
            return run()

    def cache_images(self, input_ids: torch.Tensor, pixel_values: torch.Tensor):
        """As in `VocoLlavaForConditionalGeneration`; ValueError for "llama_vid", whose images hang on the question."""
        if self.config.compressor == "llama_vid":
            raise ValueError('compressor must be one that does not read the question to cache images, but was "llama_vid"')
        return super().cache_images(input_ids, pixel_values)

    def generate(self, inputs: torch.Tensor | None = None, **kwargs):
        """As in `VocoLlavaForConditionalGeneration`; ValueError for "llama_vid" without a cache.

        It would read an answer as text about the image.
        """
        config = kwargs.get("generation_config") or self.generation_config
        if self.config.compressor == "llama_vid" and kwargs.get("use_cache", config.use_cache) is False:
            raise ValueError('use_cache must be True for the compressor "llama_vid", but was False')
        return super().generate(inputs, **kwargs)


def with_compressor(
    model: VocoLlavaForConditionalGeneration, compressor: str, num_tokens: int, qformer_config: dict | None = None
) -> CompressedLlavaForConditionalGeneration:
    """A model with a compressor, which shares the vision tower and the LLaMA of `model`.

    The compressor is random, from torch's global generator: weights are normal with the configuration's
    `initializer_range`, biases 0, norms 1, as in a new LLaVA.

    Args:
        compressor, num_tokens, qformer_config: as in `CompressedLlavaConfig`.
    """
    settings = model.config.to_dict() | {
        "compressor": compressor,
        "num_compressed_tokens": num_tokens,
        "qformer_config": qformer_config,
        "masked": False,
        "num_voco_tokens": 0,
    }
    config = CompressedLlavaConfig.from_dict(settings)
    config._name_or_path = model.config._name_or_path
    # Modules of which only the compressor is kept take no memory.
    with torch.device("meta"):
        compressed = CompressedLlavaForConditionalGeneration(config)
    compressed.model.vision_tower = model.model.vision_tower
    compressed.model.language_model = model.model.language_model
    compressed.lm_head = model.lm_head
    projector = compressor_of(config).apply(compressed._init_weights)
    compressed.model.multi_modal_projector = projector.to(model.device, model.dtype)
    compressed.generation_config = model.generation_config
    return compressed.train(model.training)
