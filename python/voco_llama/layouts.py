"""The layout of token ids under a configuration: the one place that knows what a VoCo model's settings mean."""

import torch

from voco_kernels import VocoLayout

from .configuration import VocoLlavaConfig

NO_TOKEN = -1  # no id is negative


def layout_of(
    config: VocoLlavaConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    keep_padding: bool = False,
) -> VocoLayout:
    """The layout of token ids, [B, S] or packed [1, N] with `cu_seqlens` (see `VocoLayout.from_input_ids`).

    Where the configuration is not `masked`, every token is open text: plain causal attention.
    """
    given = {"attention_mask": attention_mask, "cu_seqlens": cu_seqlens, "keep_padding": keep_padding}
    if not config.masked:
        return VocoLayout.from_input_ids(
            input_ids, image_token_id=NO_TOKEN, voco_token_id=NO_TOKEN - 1, isolated=config.isolated, **given
        )
    return VocoLayout.from_input_ids(
        input_ids,
        image_token_id=config.image_token_id,
        voco_token_id=config.voco_token_id,
        isolated=config.isolated,
        positions=config.positions,
        hide_prefix=config.hide_prefix,
        image_start_id=config.image_start_id,
        **given,
    )
