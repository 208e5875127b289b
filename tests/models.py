"""Tiny models with random weights, for the tests of the integration and of the thin LLaMA. Nothing is downloaded."""

import copy
import functools

import numpy as np
import torch
from PIL import Image
from reference import dense_attention, mask_of_layout
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from voco_llama import VocoLlavaConfig, VocoLlavaForConditionalGeneration, VocoProcessor

from voco_kernels import VocoLayout
from voco_kernels.integrations import transformers as voco_transformers

voco_transformers.register()

PAD, BOS, EOS, IMAGE, VOCO = 0, 1, 2, 3, 4
FIRST_TEXT, VOCAB = 5, 64
VISION = 9  # vision tokens of an image of the tiny LLaVA: 12 x 12 pixels in patches of 4 x 4
EDGE = 12
# Weights are large enough for attention to be far from uniform: a wrong mask or rotation then changes results by their own
# size, while float32 results agree to 1e-5.
SPREAD = 0.2

ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "dynamic": {"factor": 2.0},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 128,
    },
}


# ---- configurations and models -----------------------------------------------------------------------------------------


def llama_config(rope: str = "default", **options) -> LlamaConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": SPREAD,
        "rope_parameters": {"rope_type": rope, "rope_theta": 10000.0, **ROPES[rope]},
    }
    return LlamaConfig(**{**sizes, **options}, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)


def clip_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=EDGE,
        patch_size=4,
        projection_dim=32,
        initializer_range=SPREAD,
        initializer_factor=10.0,
    )


def _llava_options(rope: str, text: dict) -> dict:
    return {
        "vision_config": clip_config(),
        "text_config": llama_config(rope, **text),
        "image_token_id": IMAGE,
        "image_seq_length": VISION,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
    }


def llama(attention: str = "voco", rope: str = "default", **options) -> LlamaForCausalLM:
    model = LlamaForCausalLM(llama_config(rope, **options)).eval()
    model.set_attn_implementation(attention)
    return model


def _strengthen(model):
    """Projections that LLaVA leaves small, so that images matter."""
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "multi_modal_projector" in name:
                x.normal_(std=SPREAD)
    return model.eval()


def llava(rope: str = "default", **text) -> LlavaForConditionalGeneration:
    return _strengthen(LlavaForConditionalGeneration(LlavaConfig(**_llava_options(rope, text))))


def voco_config(rope: str = "default", text: dict | None = None, **options) -> VocoLlavaConfig:
    own = {"voco_token_id": VOCO, "num_voco_tokens": 2, "max_voco_tokens": 8, "image_start_id": BOS}
    return VocoLlavaConfig(**{**_llava_options(rope, text or {}), **own, **options})


def voco_llava(rope: str = "default", **options) -> VocoLlavaForConditionalGeneration:
    """The thin model whose vocabulary is that of `tokenizer()`, with its processor."""
    text = {"vocab_size": len(tokenizer()), **options.pop("text", {})}
    model = _strengthen(VocoLlavaForConditionalGeneration(voco_config(rope, text, **options)))
    model.processor = processor()
    return model


def twin(model, attention, dtype: torch.dtype | None = None):
    """A copy of a model with the same weights and another attention."""
    other = copy.deepcopy(model)
    other.set_attn_implementation(attention)
    return other if dtype is None else other.to(dtype)


# Greedy, of a fixed length. Random weights would now and then write an image token, which without a cache is an image.
GENERATED = {
    "max_new_tokens": 6,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "suppress_tokens": [PAD, BOS, EOS, IMAGE, VOCO],
}


def masked_eager(model, build):
    """transformers' eager model under an explicit 4-D mask in every forward: what `generate` must give, with a cache or not.

    Args:
        build: (input_ids, attention_mask=...) -> layout of the padded batch.
    """
    other = twin(model, "eager")
    images_of_rows = []

    def before(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        layout = build(ids, attention_mask=kwargs.get("attention_mask"))
        kwargs["attention_mask"] = additive_mask(layout, ids.shape[0])
        kwargs["position_ids"] = layout.position_ids.view(ids.shape)
        if images_of_rows:
            # Here, not through generate: for beams some versions of transformers repeat each image, not each row's images.
            copies = ids.shape[0] // len(images_of_rows)
            kwargs.pop("mm_encoder_outputs", None)
            kwargs["pixel_values"] = torch.cat([images for images in images_of_rows for _ in range(copies)])
        return args, kwargs

    def generate(ids, pixel_values=None, **kwargs):
        images_of_rows.clear()
        if pixel_values is not None:
            images_of_rows.extend(pixel_values.split(((ids == IMAGE).sum(1) // VISION).tolist()))
        return other.generate(ids, **{**GENERATED, **kwargs}, use_cache=False)

    other.register_forward_pre_hook(before, with_kwargs=True)
    return generate


def stock_of(model: VocoLlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Stock LLaVA with the weights of the thin model."""
    text = {"vocab_size": model.config.text_config.vocab_size}
    stock = LlavaForConditionalGeneration(LlavaConfig(**_llava_options("default", text)))
    stock.load_state_dict(model.state_dict())
    return stock.eval()


# ---- tokens and images -------------------------------------------------------------------------------------------------


def ids_of(letters: str, row: int = 0) -> list[int]:
    """Token ids of letters: b BOS, v vision, c VoCo, t text (a different id at each place)."""
    known = {"b": BOS, "v": IMAGE, "c": VOCO}
    text = [FIRST_TEXT + (7 * i + 11 * row) % (VOCAB - FIRST_TEXT) for i in range(len(letters))]
    return [known.get(letter, text[i]) for i, letter in enumerate(letters)]


def batch_of(*rows: str, pad: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask) of rows of letters, padded on one side."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if pad == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.tensor(ids_of(row, i)), 1
    return ids, mask


def builder(isolated: bool = True, hide_prefix: bool = True, positions: str = "continuous"):
    """(input_ids, attention_mask=...) -> the layout of a padded batch, padding kept."""
    return functools.partial(
        VocoLayout.from_input_ids,
        image_token_id=IMAGE,
        voco_token_id=VOCO,
        isolated=isolated,
        hide_prefix=hide_prefix,
        positions=positions,
        keep_padding=True,
    )


def picture(seed: int, edge: int = EDGE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (edge, edge, 3), dtype=np.uint8))


def pictures(count: int) -> list[Image.Image]:
    return [picture(i) for i in range(count)]


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    """[count, 3, EDGE, EDGE] pixel values."""
    return torch.randn(count, 3, EDGE, EDGE, generator=torch.Generator().manual_seed(seed))


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as LLaMA's: BOS in front, "▁" for spaces, bytes for what the vocabulary lacks. A token is a character."""
    special = ["<pad>", "<s>", "</s>", "<image>", "<voco>", "<unk>"]
    characters = ["▁", *(chr(c) for c in range(33, 127))]
    vocab = [*special, *(f"<0x{b:02X}>" for b in range(256)), *characters]
    backend = Tokenizer(
        models.BPE({t: i for i, t in enumerate(vocab)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>", "voco_token": "<voco>"},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def image_processor(edge: int = EDGE) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": edge},
        crop_size={"height": edge, "width": edge},
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )


def processor(**options) -> VocoProcessor:
    """The processor of the tiny LLaVA."""
    own = {
        "patch_size": 4,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "max_voco_tokens": 8,
    }
    return VocoProcessor(image_processor(), tokenizer(), **{**own, **options})


# ---- what transformers' own attention needs, and the truth ---------------------------------------------------------------


def visible_of(layout: VocoLayout, batch: int) -> torch.Tensor:
    """bool [B, S, S] by the reference's mask rule, for the rows of a padded batch, or for one packed row (B = 1)."""
    mask = torch.from_numpy(mask_of_layout(layout))
    width = layout.num_tokens // batch
    return torch.stack([mask[b * width : (b + 1) * width, b * width : (b + 1) * width] for b in range(batch)])


def additive_mask(layout: VocoLayout, batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same as the additive 4-D mask [B, 1, S, S] of transformers' eager attention; padding rows see themselves."""
    visible = visible_of(layout, batch)
    visible |= torch.eye(visible.shape[1], dtype=torch.bool) & ~visible.any(-1, keepdim=True)
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None]


@torch.no_grad()
def exact_hidden(language_model, embeddings: torch.Tensor, positions: torch.Tensor, mask) -> torch.Tensor:
    """A LLaMA's last hidden states [N, E] in float64, in plain arithmetic: one sequence under a mask [N, N]."""
    rotary = language_model.rotary_emb
    # Exact angles too: those of float32 are off by more, the further away a token stands.
    angle = positions.double()[:, None, None] * rotary.inv_freq.double()
    cos, sin = angle.cos() * rotary.attention_scaling, angle.sin() * rotary.attention_scaling

    def turn(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def linear(module, x):
        return x @ module.weight.double().T

    def norm(module, x):
        return module.weight.double() * x * (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()

    x = embeddings.double()
    for layer in language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        y = norm(layer.input_layernorm, x)
        q, k, v = (
            linear(projection, y).unflatten(-1, (-1, attention.head_dim))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        out, _ = dense_attention(turn(q), turn(k), v, mask, attention.head_dim**-0.5)
        x = x + linear(attention.o_proj, out.flatten(1))
        y = norm(layer.post_attention_layernorm, x)
        x = x + linear(mlp.down_proj, torch.nn.functional.silu(linear(mlp.gate_proj, y)) * linear(mlp.up_proj, y))
    return norm(language_model.norm, x)


def exact_logits(model: LlamaForCausalLM, ids: torch.Tensor, layout: VocoLayout, embeddings=None) -> torch.Tensor:
    """[B, S, V] in float64: the masked single pass over a padded batch, or over one packed row."""
    visible, positions = visible_of(layout, ids.shape[0]), layout.position_ids.view(ids.shape)
    head = model.lm_head.weight.double()
    embeddings = model.model.embed_tokens(ids) if embeddings is None else embeddings
    rows = zip(embeddings, positions, visible, strict=True)
    return torch.stack([exact_hidden(model.model, x, p, v) @ head.T for x, p, v in rows]).detach()
