"""The model of a training run: a checkpoint turned into the system that is trained, with what stays frozen."""

import logging

import torch
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from voco_llama import (
    CompressedLlavaConfig,
    CompressedLlavaForConditionalGeneration,
    VocoLlavaConfig,
    VocoLlavaForConditionalGeneration,
    VocoProcessor,
    systems,
)

from .config import LoraConfig, TrainingConfig

logger = logging.getLogger(__name__)

TOWER, LLAMA, HEAD = "vision_tower", "language_model", "lm_head"


def load(config: TrainingConfig, arguments: TrainingArguments) -> tuple[VocoLlavaForConditionalGeneration, VocoProcessor]:
    """The model and its processor as `config` has them trained: what stays frozen needs no gradient.

    What is trained is float32. A LLaMA that stays frozen (stage "align", LoRA) is in the dtype of the computation.

    Raises:
        ValueError: a checkpoint that cannot be trained so; its message says what does not fit.
    """
    system = systems.system_of(config.system)
    frozen = config.stage == "align" or config.lora is not None
    dtype = computed_dtype(arguments) if frozen else torch.float32
    model = _class_of(config.model).from_pretrained(config.model, dtype=dtype)
    processor = VocoProcessor.from_pretrained(config.model)
    check(model.config, processor, config.model)
    if config.positions is not None:
        model.config.positions = config.positions
    tokens = config.num_voco_tokens[0]
    if system.voco_tokens and config.stage == "align":
        tokens = model.config.num_voco_tokens  # of which this stage makes no use
    elif system.voco_tokens:
        _set_counts(model.config, processor, config.num_voco_tokens)
    model, processor = systems.prepare(config.system, model, processor, tokens)
    freeze(model, llama=not frozen)
    return model, processor


def _class_of(checkpoint: str) -> type[VocoLlavaForConditionalGeneration]:
    """The class of a checkpoint; LLaVA's own configurations are those of a VoCo model that is yet to be trained."""
    settings, _ = PreTrainedConfig.get_config_dict(checkpoint)
    compressed = settings.get("model_type") == CompressedLlavaConfig.model_type
    return CompressedLlavaForConditionalGeneration if compressed else VocoLlavaForConditionalGeneration


def computed_dtype(arguments: TrainingArguments) -> torch.dtype:
    """The dtype of matrix products in a run."""
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32


def check(config: VocoLlavaConfig, processor: VocoProcessor, checkpoint: str) -> None:
    """ValueError where a checkpoint's configuration, embedding and tokenizer do not fit together."""
    tokenizer, rows = processor.tokenizer, config.text_config.vocab_size
    if len(tokenizer) > rows:
        raise ValueError(
            f"model must have an embedding row for each of its {len(tokenizer)} tokens, but {checkpoint} has {rows} rows"
        )
    if processor.voco_token not in tokenizer.get_vocab():
        raise ValueError(
            f"model must have the VoCo token {processor.voco_token} in its tokenizer, but {checkpoint} has not; "
            "`voco convert` adds it"
        )
    for setting, token in (
        ("voco_token_id", processor.voco_token),
        ("image_token_id", processor.image_token),
        ("image_start_id", processor.image_start_token),
    ):
        number, wanted = getattr(config, setting), None if token is None else tokenizer.convert_tokens_to_ids(token)
        if number != wanted:
            raise ValueError(
                f"{setting} of {checkpoint} must be that of {token} in its tokenizer ({wanted}), but was {number}"
            )
    for name, taken in (
        ("image", config.image_token_id),
        ("start", tokenizer.bos_token_id),
        ("end", tokenizer.eos_token_id),
        ("padding", tokenizer.pad_token_id),
    ):
        if config.voco_token_id == taken:
            raise ValueError(f"voco_token_id of {checkpoint} must be a token of its own, but is the {name} token, {taken}")


def _set_counts(config: VocoLlavaConfig, processor: VocoProcessor, counts: tuple[int, ...]) -> None:
    if max(counts) > config.max_voco_tokens:
        logger.warning(
            f"the checkpoint was trained for at most {config.max_voco_tokens} VoCo tokens per image; "
            f"from now on it is trained for {max(counts)}"
        )
    config.num_voco_tokens = processor.num_voco_tokens = counts[0]
    config.max_voco_tokens = processor.max_voco_tokens = max(counts)


def freeze(model: torch.nn.Module, llama: bool) -> None:
    """Leave gradients to what is between tower and LLaMA and, if wanted, to that; the tower stays as it is (section 3.5).

    What is trained becomes float32.
    """
    for name, parameter in model.named_parameters():
        trained = TOWER not in name and (llama or not (LLAMA in name or HEAD in name))
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.float()


def with_lora(model: VocoLlavaForConditionalGeneration, config: LoraConfig):
    """A PeftModel around `model`: LoRA of the LLaMA's linear layers; the projector and the VoCo token are trained in full.

    Without a row of its own the VoCo token would ask every image the same random question.

    Raises:
        ImportError: without PEFT.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError('lora needs PEFT: pip install "voco-kernels[train]"') from error
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=r".*language_model\.layers\..*_proj",
            modules_to_save=[name for name, _ in model.model.named_children() if name not in (TOWER, LLAMA)],
            trainable_token_indices={"embed_tokens": [model.config.voco_token_id]},
        ),
    )


def merged(model) -> PreTrainedModel:
    """A model without LoRA, of which the weights are part from then on."""
    return model if isinstance(model, PreTrainedModel) else model.merge_and_unload()
