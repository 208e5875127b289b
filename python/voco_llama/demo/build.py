"""Builds the parts of the demo model in Hugging Face format: tokenizer, image processor, configuration."""

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from voco_llama import VocoLlavaConfig, VocoProcessor

from . import clips, digits
from .digits import CELL

SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "<voco>")
PATCH = 4  # pixels of one vision token, each way
MAX_VOCO = 8  # VoCo tokens per image that the model is trained with, at most
DEFAULT_VOCO = 2
INITIAL_STD = 0.06  # transformers' 0.02 is meant for layers ten times as wide, and learns much slower here
# Images first, then questions, each with its answer of one word.
TEMPLATE = (
    "{% for message in messages %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %} answer: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} answer:{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word or numeral; case, punctuation and line breaks do not matter.

    Dropping punctuation lets "Which digit is in row 2, column 1?" read as it was trained. Line breaks go the
    same way, so a prompt has the same ids whether or not a template puts one beside the VoCo tokens.
    """
    # The words about clips come last: a model that was trained before there were any keeps its ids.
    words = [*SPECIAL_TOKENS, *digits.vocabulary(), *clips.vocabulary()]
    vocab = {token: i for i, token in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]  # "4s" is 4 and s
    )
    return with_special_tokens(tokenizer)


def with_special_tokens(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary holds `SPECIAL_TOKENS`, as transformers wants it; each text begins with `<s>`."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>", "voco_token": "<voco>"},
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_image_processor(rows: int = 2, columns: int = 2) -> CLIPImageProcessorPil:
    """Resizes to the size that the model was trained on, scales pixels to -1 .. 1; needs Pillow only."""
    size = {"height": rows * CELL, "width": columns * CELL}
    return CLIPImageProcessorPil(
        size=size, do_center_crop=False, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def build_config(tokenizer: PreTrainedTokenizerFast, image_size: int = 2 * CELL) -> VocoLlavaConfig:
    """A CLIP tower, a projector and a LLaMA, about 1.3 M parameters together."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=PATCH,
        projection_dim=128,
        initializer_range=INITIAL_STD,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=INITIAL_STD,
    )
    return VocoLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // PATCH) ** 2,
        # LLaVA takes the last layer but one by default; the demo's tower has no layer to spare.
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        initializer_range=INITIAL_STD,
        voco_token_id=tokenizer.convert_tokens_to_ids("<voco>"),
        num_voco_tokens=DEFAULT_VOCO,
        max_voco_tokens=MAX_VOCO,
        image_start_id=tokenizer.bos_token_id,
        # The frames of a clip then take positions for their VoCo tokens alone.
        positions="compact",
    )


def build_processor() -> VocoProcessor:
    """Tokenizer and image processor of the demo."""
    return VocoProcessor(
        build_image_processor(),
        build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        num_voco_tokens=DEFAULT_VOCO,
        max_voco_tokens=MAX_VOCO,
        image_start_token="<s>",
    )
