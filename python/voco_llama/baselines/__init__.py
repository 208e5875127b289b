"""The systems that make few tokens of an image before the LLaMA, with which VoCo compression is compared."""

from .configuration import CompressedLlavaConfig
from .modeling import CompressedLlavaForConditionalGeneration, with_compressor

__all__ = ["CompressedLlavaConfig", "CompressedLlavaForConditionalGeneration", "with_compressor"]
