"""Configuration of a LLaVA whose projector makes few tokens of an image."""

from typing import ClassVar

from transformers import Blip2QFormerConfig

from ..configuration import VocoLlavaConfig

COMPRESSORS = ("avg_pool", "q_former", "llama_vid")
GUIDE = 256  # tokens of text that LLaMA-VID's text decoder reads, the last ones


class CompressedLlavaConfig(VocoLlavaConfig):
    """`VocoLlavaConfig` of a model without VoCo tokens, whose attention is plain causal.

    Attributes:
        compressor: "avg_pool", "q_former" or "llama_vid" (see `compressors`).
        num_compressed_tokens: tokens that are made of an image; of "llama_vid" its content tokens, beside which stands the
            context token.
        num_queries: learnt queries of LLaMA-VID's text decoder.
        qformer_config: of the Q-Former, as a `Blip2QFormerConfig` or as the settings in which it differs from BLIP-2's (of a
            narrower tower: from the tower's sizes). Its vocabulary is the LLaMA's. Unused by "avg_pool".
    """

    model_type = "compressed_llava"
    sub_configs: ClassVar = {**VocoLlavaConfig.sub_configs, "qformer_config": Blip2QFormerConfig}

    masked: bool = False
    num_voco_tokens: int = 0
    compressor: str = "avg_pool"
    num_compressed_tokens: int = 1
    num_queries: int = 32
    qformer_config: dict | Blip2QFormerConfig | None = None

    def __post_init__(self, **kwargs):
        if self.compressor not in COMPRESSORS:
            raise ValueError(f"compressor must be one of {', '.join(COMPRESSORS)}, but was {self.compressor!r}")
        for name in ("num_compressed_tokens", "num_queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but was {getattr(self, name)}")
        if self.masked:
            raise ValueError("masked must be False for a model without VoCo tokens, but was True")
        # Its defaults depend on the other parts, which are configurations only after this.
        qformer, self.qformer_config = self.qformer_config, None
        super().__post_init__(**kwargs)
        if not isinstance(qformer, Blip2QFormerConfig):
            defaults = {
                **self._narrower_than_blip2(),
                "vocab_size": self.text_config.vocab_size,
                "encoder_hidden_size": self.vision_width,
                "use_qformer_text_input": self.compressor == "llama_vid",
                "max_position_embeddings": GUIDE,
                "initializer_range": getattr(self, "initializer_range", 0.02),
            }
            qformer = Blip2QFormerConfig(**{**defaults, **(qformer or {})})
        self.qformer_config = qformer

    def _narrower_than_blip2(self) -> dict:
        """Sizes of a Q-Former for a tower that is narrower than BLIP-2's: those of the tower."""
        tower, names = self.vision_config, ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        if tower.hidden_size >= Blip2QFormerConfig().hidden_size:
            return {}
        return {name: getattr(tower, name) for name in names}

    @property
    def vision_width(self) -> int:
        """Channels of a vision token: those of all layers that are read."""
        layers = 1 if isinstance(self.vision_feature_layer, int) else len(self.vision_feature_layer)
        return layers * self.vision_config.hidden_size

    @property
    def tokens_per_image(self) -> int:
        """Tokens of an image in the LLaMA."""
        return self.num_compressed_tokens + (self.compressor == "llama_vid")
