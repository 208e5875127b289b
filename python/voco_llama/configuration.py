"""Configuration of a LLaVA that compresses images into VoCo tokens."""

from transformers import LlavaConfig


class VocoLlavaConfig(LlavaConfig):
    """`LlavaConfig` plus what a VoCo model has to know about its own training.

    Attributes:
        voco_token_id: id of the VoCo token; all VoCo tokens of an image share it. In llava-hf checkpoints 32000 is taken by
            the image token, so the default is the first free row of their padded embedding.
        num_voco_tokens: VoCo tokens per image unless a call asks for another number.
        max_voco_tokens: the largest number the weights were trained for; a call for more warns.
        isolated: whether segments see nothing outside themselves. Then an image can be compressed alone.
        hide_prefix: whether everything before the first image's VoCo tokens is private to it, as in the released code.
        positions: "continuous" or "compact" (see `voco_kernels.VocoLayout`).
        image_start_id: a token that stands directly before each image and belongs to its segment (BOS), or None. It makes
            every image's segment the same wherever it stands, so its compressed form can be reused anywhere.
        masked: whether text sees an image only through its VoCo tokens. If not, attention is plain causal: the upper bound
            of the paper.
    """

    model_type = "voco_llava"

    voco_token_id: int = 32002
    num_voco_tokens: int = 2
    max_voco_tokens: int = 2
    isolated: bool = True
    hide_prefix: bool = True
    positions: str = "continuous"
    image_start_id: int | None = 1
    masked: bool = True

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers; a checkpoint of llava-hf says "llava", which must not become this configuration's own type."""
        return super().from_dict({**config_dict, "model_type": cls.model_type}, **kwargs)
