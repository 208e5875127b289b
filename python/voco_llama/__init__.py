"""A thin LLaMA that compresses images into VoCo tokens: training, and two-stage inference (arXiv 2406.12275).

The Hugging Face classes are registered with the Auto classes on import.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from .baselines import CompressedLlavaConfig, CompressedLlavaForConditionalGeneration
from .collator import VocoCollator
from .configuration import VocoLlavaConfig
from .modeling import VocoLlavaForConditionalGeneration
from .processing import VocoProcessor

for _config, _model in (
    (VocoLlavaConfig, VocoLlavaForConditionalGeneration),
    (CompressedLlavaConfig, CompressedLlavaForConditionalGeneration),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForImageTextToText.register(_config, _model)
    AutoProcessor.register(_config, VocoProcessor)
    # Checkpoints of llava-hf have other key names than the modules. transformers converts them for its own classes only,
    # and would leave `lm_head` random here.
    register_checkpoint_conversion_mapping(
        _config.model_type, get_checkpoint_conversion_mapping("llava"), overwrite=True
    )

__all__ = [
    "CompressedLlavaConfig",
    "CompressedLlavaForConditionalGeneration",
    "VocoCollator",
    "VocoLlavaConfig",
    "VocoLlavaForConditionalGeneration",
    "VocoProcessor",
]
