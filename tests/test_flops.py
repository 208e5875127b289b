"""The FLOP formulas against torch's own counter, on eager attention (its counter does not see fused CPU attention)."""

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from voco_llama.flops import clip_flops, llama_flops


def test_llama():
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, 90, (1, 21)), logits_to_keep=1)
    # The rotary angles are a matmul in transformers; eager attention computes every pair.
    rotary = 2 * 21 * (48 // 4 // 2)
    assert counter.get_total_flops() - llama_flops(config, 21, 21 * 21) in (0, rotary)


def test_clip():
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=24,
        patch_size=4,
        attn_implementation="eager",
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        CLIPVisionModel(config)(torch.randn(1, 3, 24, 24))
    assert counter.get_total_flops() == clip_flops(config)
