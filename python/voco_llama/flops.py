"""FLOPs of a forward, counted from the configuration: 2 per multiply-add of matmuls and attention, as papers count."""

from transformers import PreTrainedConfig


def llama_flops(config: PreTrainedConfig, tokens: int, pairs: int, logits: int = 1) -> int:
    """FLOPs of a LLaMA forward.

    Args:
        config: a LlamaConfig.
        tokens: new tokens that go through the layers.
        pairs: (query, key) pairs that the mask allows, summed over the new tokens; for plain causal text behind a cache of
            c keys: tokens * c + tokens * (tokens + 1) / 2.
        logits: tokens for which logits are made.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    projections = hidden * head_dim * (2 * heads + 2 * config.num_key_value_heads)
    layer = 2 * tokens * (projections + 3 * hidden * config.intermediate_size) + 4 * pairs * heads * head_dim
    return config.num_hidden_layers * layer + 2 * logits * hidden * config.vocab_size


def clip_flops(config: PreTrainedConfig) -> int:
    """FLOPs of a CLIP vision tower on one image."""
    patches = (config.image_size // config.patch_size) ** 2
    tokens, hidden = patches + 1, config.hidden_size
    layer = 2 * tokens * (4 * hidden * hidden + 2 * hidden * config.intermediate_size) + 4 * tokens * tokens * hidden
    return 2 * patches * 3 * config.patch_size**2 * hidden + config.num_hidden_layers * layer


def image_flops(config: PreTrainedConfig) -> int:
    """FLOPs of LLaVA's vision tower and projector on one image."""
    hidden = config.text_config.hidden_size
    projector = 2 * config.image_seq_length * (config.vision_config.hidden_size * hidden + hidden * hidden)
    return clip_flops(config.vision_config) + projector
