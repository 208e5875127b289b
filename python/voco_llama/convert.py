"""LLaVA checkpoints of others into checkpoints of this package.

Tensors are read, renamed and written one shard at a time, so a model larger than the memory can be converted.
"""

import os
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaImageProcessorPil,
    PreTrainedTokenizerFast,
)

from .checkpoints import DTYPES, Stored, read_json, read_tensors, write_tensors
from .configuration import VocoLlavaConfig
from .modeling import VocoLlavaForConditionalGeneration
from .processing import VocoProcessor
from .vocabulary import (
    IMAGE,
    PAD,
    VOCO,
    Vocabulary,
    enlarged,
    read_tokenizer,
    vocabulary_of_original,
    with_image_tokens,
)

LLAVA_HF, ORIGINAL, VOCO_LLAMA = "llava-hf LLaVA-1.5", "original LLaVA-1.5", "VoCo-LLaMA"
SHOWN = 5  # keys that an error lists

EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"

# Key names of each layout, and those of the llava-hf checkpoints on the hub, which stock tools read.
_CLIP = r"(?:vision_model\.)?(embeddings|pre_layrnorm|encoder|post_layernorm)\."
NAMES_OF_LLAVA_HF = {
    r"language_model\.(model|lm_head)\.": r"language_model.\1.",
    r"model\.language_model\.": "language_model.model.",
    r"lm_head\.": "language_model.lm_head.",
    r"(?:model\.)?multi_modal_projector\.": "multi_modal_projector.",
    rf"(?:model\.)?vision_tower\.{_CLIP}": r"vision_tower.vision_model.\1.",
}
NAMES_OF_ORIGINAL = {
    r"model\.(embed_tokens|layers|norm)\.": r"language_model.model.\1.",
    r"lm_head\.": "language_model.lm_head.",
    r"model\.mm_projector\.0\.": "multi_modal_projector.linear_1.",
    r"model\.mm_projector\.2\.": "multi_modal_projector.linear_2.",
    rf"model\.vision_tower\.vision_tower\.{_CLIP}": r"vision_tower.vision_model.\1.",
}
NAMES_OF_TOWER = {_CLIP: r"vision_tower.vision_model.\1."}
# Buffers that old versions of transformers saved; models compute them.
DROPPED = re.compile(r"\.rotary_emb\.inv_freq$|(^|\.)vision_model\.embeddings\.position_ids$")
# The other half of a CLIP checkpoint.
CLIP_TEXT = re.compile(r"^(text_model\.|(visual_projection|text_projection)\.weight$|logit_scale$)")

# What an original layout's config.json says about its LLaMA.
LLAMA_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "initializer_range",
    "vocab_size",
)


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        kind: what the source was: LLAVA_HF, ORIGINAL or VOCO_LLAMA.
        tensors, bytes: what was written, of dtypes `dtypes`.
        dropped: buffers that old versions of transformers saved and models compute.
        tower: the folder that the vision tower's tensors come from.
        vocabulary: rows of the embedding before and after.
        tokens: the ids of the tokens <image>, <pad> and <voco>.
        moved: (old id, new id) of the <voco> token where its rows were moved, or None.
        added: rows of the embedding and of the head that are new: the mean of the known ones.
    """

    kind: str
    source: str
    out: str
    tensors: int
    bytes: int
    dtypes: list[str]
    dropped: int
    tower: str
    vocabulary: tuple[int, int]
    tokens: dict[str, int]
    moved: tuple[int, int] | None
    added: int


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    tower: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    num_voco_tokens: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write the checkpoint of a `VocoLlavaForConditionalGeneration` and its processor from one of another layout.

    What the source is follows from its config.json: llava-hf LLaVA-1.5, original LLaVA-1.5 (`model.mm_projector.*`), or
    VoCo-LLaMA as published, which is the latter with a token <voco>. Its images have no id of the vocabulary, so <voco>
    has the id that <image> has in llava-hf checkpoints; here <image>, <pad> and <voco> follow the text's tokens in this
    order. Tensors keep their dtypes and get the key names of llava-hf checkpoints on the hub.

    Args:
        source: folder with config.json and model.safetensors or pytorch_model.bin, in one file or in shards.
        out: a folder that is not there yet, or is empty. It appears when all is written.
        tower: of an original layout, which names its vision tower only: the folder of that CLIP model (config.json,
            preprocessor_config.json, and its weights unless the source has its own).
        tokenizer: folder with tokenizer.json or tokenizer.model; the source where None.
        num_voco_tokens: VoCo tokens per image that the weights were, or will be, trained for.
        progress: called with the number of bytes written and of all, at first and after each file.

    Raises:
        ValueError: a source that is something else; keys that are missing, unexpected or of other shapes; a tokenizer
            that does not fit the weights; an `out` with files in it. Nothing has been written then.
        OSError: files that cannot be read or written; `out` is then as before.
    """
    source, out = Path(source), Path(out)
    if num_voco_tokens < 1:
        raise ValueError(f"num_voco_tokens must be at least 1, but was {num_voco_tokens}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out must be a new or an empty folder, but {out} is not")
    settings = _settings_of(source)
    if "text_config" in settings:
        kind, config, names, looks = LLAVA_HF, _config_of_llava_hf(settings), NAMES_OF_LLAVA_HF, source
        if tower is not None:
            raise ValueError(f"tower must be None for a llava-hf checkpoint, which has its own, but was {tower}")
    else:
        if tower is None:
            named = settings.get("mm_vision_tower")
            raise ValueError(f"tower must be the folder of the CLIP model {named} for an original LLaVA, but was None")
        kind, config, names, looks = ORIGINAL, _config_of_original(settings, Path(tower)), NAMES_OF_ORIGINAL, Path(tower)

    stored, dropped = _renamed(source, names)
    weights_of_tower = source
    if kind == ORIGINAL and not any(name.startswith("vision_tower.") for name in stored):
        weights_of_tower = Path(tower)
        of_tower, more = _renamed(weights_of_tower, NAMES_OF_TOWER, ignored=CLIP_TEXT)
        stored, dropped = {**stored, **of_tower}, dropped + more
    _check(stored, config, source)

    tokens = read_tokenizer(source if tokenizer is None else Path(tokenizer))
    rows = config.text_config.vocab_size
    if kind == LLAVA_HF:
        known = tokens.convert_tokens_to_ids(IMAGE)
        if known != config.image_token_id:
            raise ValueError(f"tokenizer must know {IMAGE} as {config.image_token_id}, its id in the source, not as {known}")
        vocabulary, moved = Vocabulary(rows, rows), None
    else:
        vocabulary, moved = vocabulary_of_original(tokens, rows)
        kind = ORIGINAL if moved is None else VOCO_LLAMA
    tokens = with_image_tokens(tokens, without_voco=moved is not None)
    vocabulary = enlarged(vocabulary, tokens, moved)
    for name in (EMBEDDING, HEAD):
        stored[name] = vocabulary.apply(stored[name])
    ids = {token: tokens.convert_tokens_to_ids(token) for token in (IMAGE, PAD, VOCO)}
    _complete(config, tokens, ids, vocabulary.rows, num_voco_tokens, stored[EMBEDDING].dtype)
    images = _image_processor(looks, pads=settings.get("image_aspect_ratio") == "pad")
    processor = _processor(config, tokens, images)

    _write(out, stored, config, processor, progress)
    return Conversion(
        kind=kind,
        source=str(source),
        out=str(out),
        tensors=len(stored),
        bytes=sum(x.nbytes for x in stored.values()),
        dtypes=sorted({str(x.dtype).removeprefix("torch.") for x in stored.values()}),
        dropped=dropped,
        tower=str(weights_of_tower),
        vocabulary=(rows, vocabulary.rows),
        tokens=ids,
        moved=vocabulary.moved,
        added=vocabulary.added,
    )


# ---- configuration -----------------------------------------------------------------------------------------------------


def _settings_of(source: Path) -> dict:
    """The config.json of a folder that `convert` can read."""
    if not source.is_dir():
        raise ValueError(f"source must be a folder, but was {source}")
    if (source / "adapter_config.json").is_file() or (source / "non_lora_trainables.bin").is_file():
        raise ValueError(f"source must hold a whole model, but {source} holds LoRA weights: merge them first")
    if not (source / "config.json").is_file():
        raise ValueError(f"source must have a config.json, but {source} has none")
    settings = read_json(source / "config.json")
    kind, makers = settings.get("model_type"), settings.get("architectures") or []
    if kind == VocoLlavaConfig.model_type:
        raise ValueError(f"source must be the checkpoint of another layout, but {source} already is a {kind}")
    is_hf = kind == "llava" and "text_config" in settings
    is_original = kind in ("llava", "llava_llama") and makers == ["LlavaLlamaForCausalLM"]
    if not is_hf and not is_original:
        raise ValueError(
            "source must be a LLaVA-1.5: model_type llava with a text_config, or the architecture LlavaLlamaForCausalLM, "
            f"but {source} has model_type {kind} and architectures {makers}"
        )
    return settings


def _config_of_llava_hf(settings: dict) -> VocoLlavaConfig:
    for name, of in (("text_config", "llama"), ("vision_config", "clip_vision_model")):
        kind = settings.get(name, {}).get("model_type")
        if kind != of:
            raise ValueError(f"source must have a {name} of model_type {of}, but it is {kind}")
    noise = ("architectures", "transformers_version", "_name_or_path")
    return VocoLlavaConfig.from_dict({key: value for key, value in settings.items() if key not in noise})


def _config_of_original(settings: dict, tower: Path) -> VocoLlavaConfig:
    allowed = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", "cls_patch"),
        "mm_patch_merge_type": ("flat", None),
        "image_aspect_ratio": ("pad", "square", None),
        "mm_use_im_start_end": (False, None),
    }
    for name, values in allowed.items():
        if settings.get(name) not in values:
            wanted = " or ".join(map(str, values))
            raise ValueError(f"source must have {name} {wanted} in its config.json, but has {settings.get(name)}")
    layer = settings.get("mm_vision_select_layer")
    if not isinstance(layer, int):
        raise ValueError(f"source must have an integer mm_vision_select_layer in its config.json, but has {layer}")
    if not (tower / "config.json").is_file():
        raise ValueError(f"tower must be the folder of a CLIP model with a config.json, but was {tower}")
    vision = read_json(tower / "config.json")
    vision = vision.get("vision_config", {}) if vision.get("model_type") == "clip" else vision
    if vision.get("model_type") not in ("clip_vision_model", None) or "hidden_size" not in vision:
        raise ValueError(f"tower must be the folder of a CLIP model, but {tower} holds a {vision.get('model_type')}")
    return VocoLlavaConfig(
        text_config=LlamaConfig.from_dict({key: settings[key] for key in LLAMA_FIELDS if key in settings}),
        vision_config=CLIPVisionConfig.from_dict(vision),
        vision_feature_layer=layer,
        vision_feature_select_strategy="full" if settings["mm_vision_select_feature"] == "cls_patch" else "default",
        tie_word_embeddings=bool(settings.get("tie_word_embeddings")),
    )


def _complete(
    config: VocoLlavaConfig, tokens: PreTrainedTokenizerFast, ids: dict, rows: int, num_voco_tokens: int, dtype: torch.dtype
) -> None:
    """Write into the configuration what follows from the tokenizer.

    Attention is as in the published training: text sees nothing before the first VoCo token, positions count all tokens.
    """
    config.architectures = [VocoLlavaForConditionalGeneration.__name__]
    config.dtype = dtype
    config.text_config.vocab_size = rows
    config.text_config.bos_token_id, config.text_config.eos_token_id = tokens.bos_token_id, tokens.eos_token_id
    config.text_config.pad_token_id = config.pad_token_id = ids[PAD]
    config.image_token_id, config.voco_token_id = ids[IMAGE], ids[VOCO]
    config.image_seq_length = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    config.image_seq_length += config.vision_feature_select_strategy == "full"
    config.num_voco_tokens = config.max_voco_tokens = num_voco_tokens
    config.isolated = config.hide_prefix = config.masked = True
    config.positions = "continuous"
    config.image_start_id = tokens.bos_token_id


# ---- tensors -----------------------------------------------------------------------------------------------------------


def _renamed(folder: Path, names: dict[str, str], ignored: re.Pattern | None = None) -> tuple[dict[str, Stored], int]:
    """The tensors of a folder under the names of the hub, and how many buffers were left out."""
    renamed, unexpected, dropped = {}, [], 0
    for key, tensor in read_tensors(folder).items():
        if DROPPED.search(key):
            dropped += 1
            continue
        if ignored is not None and ignored.search(key):
            continue
        for pattern, name in names.items():
            new, found = re.subn(f"^{pattern}", name, key)
            if found:
                break
        else:
            unexpected.append(key)
            continue
        if new in renamed:
            raise ValueError(f"{folder} must hold {new} once, but holds it under two names, one of them {key}")
        renamed[new] = tensor
    if unexpected:
        raise ValueError(f"{folder} has unexpected keys: {_listed(unexpected)}")
    return renamed, dropped


def _check(stored: dict[str, Stored], config: VocoLlavaConfig, source: Path) -> None:
    """ValueError unless the tensors are those of the model, in its shapes."""
    if config.tie_word_embeddings:
        raise ValueError("source must have tie_word_embeddings false in its config.json, but it was true")
    with torch.device("meta"):
        model = VocoLlavaForConditionalGeneration(config)
    expected = {}
    for key, x in model.state_dict().items():
        for pattern, name in NAMES_OF_LLAVA_HF.items():
            new, found = re.subn(f"^{pattern}", name, key)
            if found:
                expected[new] = tuple(x.shape)
    wrong = [
        f"{name} {list(stored[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    odd = [f"{name} of {x.dtype}" for name, x in stored.items() if x.dtype not in DTYPES.values()]
    for keys, what in (
        ([name for name in expected if name not in stored], "lacks"),
        ([name for name in stored if name not in expected], "has unexpected keys:"),
        (wrong, "does not fit its config.json:"),
        (odd, "must hold float32, float16 or bfloat16, but holds"),
    ):
        if keys:
            raise ValueError(f"{source} {what} {_listed(keys)}")


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(sorted(keys)[:SHOWN]) + more + f" ({len(keys)} in all)"


# ---- processor ---------------------------------------------------------------------------------------------------------


def _image_processor(folder: Path, *, pads: bool) -> CLIPImageProcessorPil | LlavaImageProcessorPil:
    """The image processor of a folder; where it `pads`, images become squares first, as original LLaVAs were trained."""
    try:
        settings, _ = CLIPImageProcessorPil.get_image_processor_dict(folder)
    except OSError as error:
        raise ValueError(f"{folder} must hold a preprocessor_config.json, but does not") from error
    kind = settings.get("image_processor_type", settings.get("feature_extractor_type"))
    if kind is not None and not kind.startswith(("CLIP", "Llava")):
        raise ValueError(f"preprocessor_config.json of {folder} must be that of a CLIP or a LLaVA, but is that of a {kind}")
    settings = {key: value for key, value in settings.items() if not key.endswith("_type")}
    if pads or settings.get("do_pad"):
        return LlavaImageProcessorPil.from_dict({**settings, "do_pad": True})
    return CLIPImageProcessorPil.from_dict(settings)


def _processor(
    config: VocoLlavaConfig, tokens: PreTrainedTokenizerFast, images: CLIPImageProcessorPil | LlavaImageProcessorPil
) -> VocoProcessor:
    tokens.model_max_length = config.text_config.max_position_embeddings
    processor = VocoProcessor(
        images,
        tokens,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        num_voco_tokens=config.num_voco_tokens,
        max_voco_tokens=config.max_voco_tokens,
        image_start_token=tokens.bos_token,
    )
    if processor.num_image_tokens != config.image_seq_length:
        raise ValueError(
            f"preprocessor_config.json must make images of {config.image_seq_length} tokens, the tower's number, but makes "
            f"images of {processor.num_image_tokens}"
        )
    return processor


# ---- writing -----------------------------------------------------------------------------------------------------------


def _write(
    out: Path,
    stored: dict[str, Stored],
    config: VocoLlavaConfig,
    processor: VocoProcessor,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write everything into a folder beside `out`, and rename that."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.parent / f".{out.name}.{secrets.token_hex(8)}.part"
    try:
        beside.mkdir()
        write_tensors(beside, stored, progress)
        config.save_pretrained(beside)
        llama = config.text_config
        GenerationConfig(
            bos_token_id=llama.bos_token_id, eos_token_id=llama.eos_token_id, pad_token_id=llama.pad_token_id
        ).save_pretrained(beside)
        processor.save_pretrained(beside)
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
