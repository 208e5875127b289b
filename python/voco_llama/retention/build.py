"""The parts of the models that are compared, in Hugging Face format: tokenizer, image processor, weights to begin with."""

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from voco_llama import VocoLlavaConfig, VocoLlavaForConditionalGeneration, VocoProcessor
from voco_llama.demo import UNCOMPRESSED
from voco_llama.demo.build import PATCH, SPECIAL_TOKENS, TEMPLATE, build_config, with_special_tokens

from .task import EDGE, vocabulary

VISION = (EDGE // PATCH) ** 2  # vision tokens of an image


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word or number."""
    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return with_special_tokens(tokenizer)


def build_model(tokenizer: PreTrainedTokenizerFast) -> VocoLlavaForConditionalGeneration:
    """The demo's uncompressed model, which has never seen a VoCo token, with this task's vocabulary.

    Words that it does not know are random, from torch's global generator.
    """
    known = VocoLlavaForConditionalGeneration.from_pretrained(UNCOMPRESSED, dtype=torch.float32)
    config = build_config(tokenizer, EDGE)
    config.num_voco_tokens = config.max_voco_tokens = 1
    config.positions = VocoLlavaConfig.positions
    model = VocoLlavaForConditionalGeneration(config)
    ids = VocoProcessor.from_pretrained(UNCOMPRESSED).tokenizer.get_vocab()
    shared = [(row, ids[word]) for word, row in tokenizer.get_vocab().items() if word in ids]
    rows, theirs = torch.tensor(shared).T
    state = model.state_dict()
    with torch.no_grad():
        for name, x in known.state_dict().items():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                state[name][rows] = x[theirs]
            else:
                state[name].copy_(x)
    return model


def build_processor() -> VocoProcessor:
    """Tokenizer and image processor."""
    size = {"height": EDGE, "width": EDGE}
    images = CLIPImageProcessorPil(
        size=size, do_center_crop=False, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return VocoProcessor(
        images,
        build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        num_voco_tokens=1,
        max_voco_tokens=1,
        image_start_token="<s>",
    )
