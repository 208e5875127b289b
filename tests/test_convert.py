"""`voco convert`: tiny checkpoints with the key names of the real ones, against models that never saw the converter."""

import json
import resource
from dataclasses import dataclass

import models
import pytest
import torch
from models import EDGE, VISION, clip_config, image_processor, llama_config, pictures
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import voco_here
from tokenizers import AddedToken, Tokenizer
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionModel,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from voco_llama import VocoLlavaForConditionalGeneration, VocoProcessor, checkpoints
from voco_llama.convert import convert

# ---- the key names of the real checkpoints -----------------------------------------------------------------------------

LLAMA = [
    "embed_tokens.weight",
    *(
        f"layers.{i}.{name}.weight"
        for i in range(2)
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ),
    "norm.weight",
]
CLIP = [
    "embeddings.class_embedding",
    "embeddings.patch_embedding.weight",
    "embeddings.position_embedding.weight",
    "pre_layrnorm.weight",
    "pre_layrnorm.bias",
    *(
        f"encoder.layers.{i}.{name}.{kind}"
        for i in range(2)
        for name in (
            "layer_norm1",
            "layer_norm2",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.out_proj",
            "mlp.fc1",
            "mlp.fc2",
        )
        for kind in ("weight", "bias")
    ),
    "post_layernorm.weight",
    "post_layernorm.bias",
]
PROJECTOR = ["1.weight", "1.bias", "2.weight", "2.bias"]
# (LLaMA, head, CLIP, projector) of each layout; the projector's part numbers its layers 1 and 2.
HUB = (
    "language_model.model.{}",
    "language_model.lm_head.weight",
    "vision_tower.vision_model.{}",
    "multi_modal_projector.linear_{}",
)
MODULES = (
    "model.language_model.{}",
    "lm_head.weight",
    "model.vision_tower.{}",
    "model.multi_modal_projector.linear_{}",
)
OLDER_MODULES = (*MODULES[:2], "model.vision_tower.vision_model.{}", MODULES[3])
ORIGINAL = ("model.{}", "lm_head.weight", "model.vision_tower.vision_tower.vision_model.{}", "model.mm_projector.{}")

TEXT = 354  # tokens of the tokenizer before <image>, <pad> and <voco>
PADDED = 384  # the next multiple of 64
QUESTION = "<image>\nwhat is it?"
ROPE = {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}


@dataclass
class Parts:
    """The tensors of a LLaVA, and what they compute, without any LLaVA class."""

    llama: LlamaForCausalLM
    clip: CLIPVisionModel
    linears: dict[str, torch.nn.Linear]

    def named(self, layout) -> dict[str, torch.Tensor]:
        llama, head, clip, projector = layout
        text = self.llama.state_dict()
        vision = {name.removeprefix("vision_model."): x for name, x in self.clip.state_dict().items()}
        named = {llama.format(name): text[f"model.{name}"] for name in LLAMA} | {head: text["lm_head.weight"]}
        named |= {clip.format(name): vision[name] for name in CLIP}
        for name in PROJECTOR:
            number, kind = name.split(".")
            # The two layers of the original stand around an activation: 0 and 2.
            as_named = {"1": "0", "2": "2"}[number] if "mm_projector" in projector else number
            named[projector.format(f"{as_named}.{kind}")] = getattr(self.linears[number], kind)
        return {name: x.detach().clone() for name, x in named.items()}

    @torch.no_grad()
    def logits(self, ids: list[int], pixel_values, voco: int | None = None, first: int = 1) -> torch.Tensor:
        """[S, V] of one prompt in the source's ids, -200 for an image, under the mask of the released VoCo-LLaMA.

        Of the vision tower's tokens, the class token before patches, those from `first` on are seen.
        """
        seen = self.clip(pixel_values, output_hidden_states=True).hidden_states[-2][0, first:]
        seen = self.linears["2"](torch.nn.functional.gelu(self.linears["1"](seen)))
        embed = self.llama.model.embed_tokens.weight
        embeddings, flat = [], []
        for i in ids:
            embeddings += list(seen) if i == -200 else [embed[i]]
            flat += [-200] * len(seen) if i == -200 else [i]
        rows = torch.arange(len(flat))
        visible = rows[:, None] >= rows
        if voco is not None:
            places = [k for k, i in enumerate(flat) if i == voco]
            visible &= (rows[:, None] <= places[-1]) | (rows >= places[0])
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        return self.llama(inputs_embeds=torch.stack(embeddings)[None], attention_mask=mask[None, None]).logits[0]


def parts_of(rows: int, seed: int = 0) -> Parts:
    torch.manual_seed(seed)
    llama = LlamaForCausalLM(llama_config(vocab_size=rows, rms_norm_eps=1e-5, rope_parameters=ROPE)).eval()
    llama.set_attn_implementation("eager")
    linears = {"1": torch.nn.Linear(32, 64), "2": torch.nn.Linear(64, 64)}
    return Parts(llama, CLIPVisionModel(clip_config()).eval(), linears)


# ---- source folders ----------------------------------------------------------------------------------------------------


def tokenizer_of(*added: str) -> PreTrainedTokenizerFast:
    """LLaMA's 3 special tokens, bytes and characters, then the added ones."""
    state = json.loads(models.tokenizer().backend_tokenizer.to_str())
    base = ["<unk>", "<s>", "</s>"]
    others = [t for t in state["model"]["vocab"] if not (t.startswith("<") and t.endswith(">")) or t.startswith("<0x")]
    state["model"]["vocab"] = {t: i for i, t in enumerate([*base, *others])}
    state["added_tokens"] = []
    backend = Tokenizer.from_str(json.dumps(state))
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (*base, *added)])
    assert backend.get_vocab_size() == TEXT + len(added)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def write_json(path, value) -> None:
    path.write_text(json.dumps(value))


def write_tensors(folder, tensors: dict, how: str = "safetensors") -> None:
    """In one of the four forms that checkpoints have."""
    if how == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    elif how == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        suffix, name = ("safetensors", "model") if how == "safetensors shards" else ("bin", "pytorch_model")
        names, where = sorted(tensors), {}
        for i in range(3):
            file, part = f"{name}-0000{i + 1}-of-00003.{suffix}", {k: tensors[k] for k in names[i::3]}
            save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
            where |= dict.fromkeys(part, file)
        write_json(folder / f"{name}.{suffix}.index.json", {"metadata": {}, "weight_map": where})


def llava_hf(folder, parts: Parts, layout=HUB, how: str = "safetensors", added=("<image>", "<pad>"), **config):
    folder.mkdir()
    text = {**parts.llama.config.to_dict(), "_name_or_path": "lmsys/vicuna-7b-v1.5", "torch_dtype": "float32"}
    settings = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": TEXT,
        "model_type": "llava",
        "pad_token_id": TEXT + 1,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vision_config": {**clip_config().to_dict(), "vocab_size": 32000},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    write_json(folder / "config.json", {**settings, **config})
    write_tensors(folder, parts.named(layout), how)
    tokenizer_of(*added).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def original(folder, parts: Parts, how: str = "bin", added=(), with_tower=False, extra=None, **config):
    """As liuhaotian/llava-v1.5-7b, and with <voco> among `added` as VoCo-LLaMA."""
    folder.mkdir()
    llama = parts.llama.config
    settings = {
        "_name_or_path": "llava-v1.5-7b",
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "hidden_act": "silu",
        "hidden_size": llama.hidden_size,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": llama.intermediate_size,
        "max_length": 4096,
        "max_position_embeddings": llama.max_position_embeddings,
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "model_type": "llava_llama",
        "num_attention_heads": llama.num_attention_heads,
        "num_hidden_layers": llama.num_hidden_layers,
        "num_key_value_heads": llama.num_key_value_heads,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": llama.rms_norm_eps,
        "rope_theta": ROPE["rope_theta"],
        "rope_scaling": {"type": "linear", "factor": ROPE["factor"]},
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": llama.vocab_size,
    }
    write_json(folder / "config.json", {**settings, **config})
    tensors = parts.named(ORIGINAL)
    if not with_tower:
        tensors = {name: x for name, x in tensors.items() if "vision_tower" not in name}
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    write_tensors(folder, {**tensors, **(extra or {})}, how)
    tokenizer_of(*added).save_pretrained(folder)
    return folder


def clip(folder, parts: Parts):
    """As openai/clip-vit-large-patch14-336."""
    folder.mkdir()
    vision = {**clip_config().to_dict(), "model_type": "clip_vision_model"}
    text = {"model_type": "clip_text_model"}
    write_json(folder / "config.json", {"model_type": "clip", "vision_config": vision, "text_config": text})
    tensors = {name.removeprefix("vision_tower."): x for name, x in parts.named(HUB).items() if "vision_model" in name}
    others = ("text_model.embeddings.token_embedding.weight", "visual_projection.weight", "text_projection.weight")
    tensors |= {name: torch.ones(2, 2) for name in others} | {"logit_scale": torch.tensor(1.0)}
    tensors |= {"vision_model.embeddings.position_ids": torch.arange(VISION + 1)[None]}
    write_tensors(folder, tensors, "bin")
    image_processor().save_pretrained(folder)
    return folder


def inputs(out, count: int = 0, picture: int = 0):
    return VocoProcessor.from_pretrained(out)([models.picture(picture)], QUESTION, count)


@torch.no_grad()
def logits(out, x) -> torch.Tensor:
    return VocoLlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()(**x).logits[0]


def source_ids(x, voco: int | None = None) -> list[int]:
    """The prompt in the ids of an original layout."""
    known = {TEXT: -200, TEXT + 2: voco}
    ids = [known.get(i, i) for i in x["input_ids"][0].tolist()]
    return [i for k, i in enumerate(ids) if i != -200 or ids[k - 1] != -200]


# ---- what comes out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [HUB, MODULES, OLDER_MODULES], ids=["hub", "modules", "older modules"])
@pytest.mark.parametrize("how", ["safetensors", "safetensors shards"])
def test_llava_hf(tmp_path, layout, how):
    parts = parts_of(PADDED)
    source = llava_hf(tmp_path / "source", parts, layout, how)
    done = convert(source, tmp_path / "out", num_voco_tokens=3)
    assert done.kind == "llava-hf LLaVA-1.5" and done.moved is None and done.added == done.dropped == 0
    assert done.tokens == {"<image>": TEXT, "<pad>": TEXT + 1, "<voco>": TEXT + 2}
    assert done.vocabulary == (PADDED, PADDED) and done.tower == str(source)
    written = load_file(tmp_path / "out/model.safetensors")
    expected = parts.named(HUB)
    assert written.keys() == expected.keys() and done.tensors == len(expected)
    assert all(torch.equal(written[name], x) for name, x in expected.items())
    x = inputs(tmp_path / "out")
    stock = LlavaForConditionalGeneration.from_pretrained(source, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "out", x), stock(**x).logits[0], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("with_tower", [False, True], ids=["tower apart", "own tower"])
@pytest.mark.parametrize("how", ["bin", "bin shards", "safetensors"])
def test_original_llava(tmp_path, how, with_tower):
    parts = parts_of(TEXT)
    source = original(tmp_path / "source", parts, how, with_tower=with_tower)
    # A source with a tower of its own takes only the settings of the other.
    tower = clip(tmp_path / "tower", parts_of(TEXT, seed=1) if with_tower else parts)
    done = convert(source, tmp_path / "out", tower=tower)
    assert done.kind == "original LLaVA-1.5" and done.moved is None
    assert done.vocabulary == (TEXT, PADDED) and done.added == PADDED - TEXT
    assert done.dropped == 2 + (not with_tower) and done.tower == str(source if with_tower else tower)
    x = inputs(tmp_path / "out")
    expected = parts.logits(source_ids(x), x["pixel_values"])
    torch.testing.assert_close(logits(tmp_path / "out", x)[:, :TEXT], expected, rtol=2e-4, atol=2e-4)
    assert_text_is_as_before(source, tmp_path / "out")


def test_an_original_that_sees_the_class_token(tmp_path):
    parts = parts_of(TEXT)
    source = original(tmp_path / "source", parts, mm_vision_select_feature="cls_patch")
    convert(source, tmp_path / "out", tower=clip(tmp_path / "tower", parts))
    x = inputs(tmp_path / "out")
    expected = parts.logits(source_ids(x), x["pixel_values"], first=0)
    torch.testing.assert_close(logits(tmp_path / "out", x)[:, :TEXT], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("how", ["bin", "safetensors shards"])
def test_voco_llama(tmp_path, how):
    parts = parts_of(TEXT + 1)
    source = original(tmp_path / "source", parts, how, added=["<voco>"])
    done = convert(source, tmp_path / "out", tower=clip(tmp_path / "tower", parts))
    assert done.kind == "VoCo-LLaMA" and done.moved == (TEXT, TEXT + 2)
    assert done.tokens == {"<image>": TEXT, "<pad>": TEXT + 1, "<voco>": TEXT + 2}
    assert done.vocabulary == (TEXT + 1, PADDED) and done.added == PADDED - TEXT - 1
    x = inputs(tmp_path / "out", count=2)
    ids = source_ids(x, voco=TEXT)
    # The prompt of the released code: <s><image>\n<voco><voco>\n and then the system prompt.
    newline = tokenizer_of()("\n").input_ids[1:]
    assert ids[: 4 + len(newline)] == [1, -200, *newline, TEXT, TEXT]
    got, expected = logits(tmp_path / "out", x), parts.logits(ids, x["pixel_values"], voco=TEXT)
    torch.testing.assert_close(got[:, :TEXT], expected[:, :TEXT], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(got[:, TEXT + 2], expected[:, TEXT], rtol=2e-4, atol=2e-4)
    # The mask matters to them, or they would show nothing.
    assert (expected - parts.logits(ids, x["pixel_values"])).abs().max() > 1e-2
    assert_text_is_as_before(source, tmp_path / "out")


def test_new_rows_are_the_mean_of_the_known(tmp_path):
    parts = parts_of(TEXT + 1)
    source = original(tmp_path / "source", parts, added=["<voco>"])
    convert(source, tmp_path / "out", tower=clip(tmp_path / "tower", parts))
    written = load_file(tmp_path / "out/model.safetensors")
    for name, old in (("model.embed_tokens", parts.llama.model.embed_tokens), ("lm_head", parts.llama.lm_head)):
        new, old = written[f"language_model.{name}.weight"], old.weight.detach()
        assert new.shape == (PADDED, 64)
        assert torch.equal(new[:TEXT], old[:TEXT]) and torch.equal(new[TEXT + 2], old[TEXT])
        mean = old[:TEXT].double().mean(0).expand(PADDED - TEXT - 1, 64)
        torch.testing.assert_close(torch.cat([new[TEXT : TEXT + 2], new[TEXT + 3 :]]).double(), mean, rtol=0, atol=1e-6)


def test_a_vocabulary_without_a_free_row_grows(tmp_path):
    parts = parts_of(TEXT + 2)
    source = llava_hf(tmp_path / "source", parts)
    done = convert(source, tmp_path / "out")
    assert done.vocabulary == (TEXT + 2, PADDED) and done.added == PADDED - TEXT - 2 and done.moved is None
    x = inputs(tmp_path / "out")
    stock = LlavaForConditionalGeneration.from_pretrained(source, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = stock(**x).logits[0]
    torch.testing.assert_close(logits(tmp_path / "out", x)[:, : TEXT + 2], expected, rtol=2e-4, atol=2e-4)


def assert_text_is_as_before(source, out) -> None:
    before, after = PreTrainedTokenizerFast.from_pretrained(source), VocoProcessor.from_pretrained(out).tokenizer
    for text in ("what is it?", " two  spaces", "é\n</s>x"):
        assert before(text).input_ids == after(text).input_ids


def test_settings(tmp_path):
    parts = parts_of(TEXT + 1)
    source = original(tmp_path / "source", parts, added=["<voco>"])
    out = tmp_path / "out"
    convert(source, out, tower=clip(tmp_path / "tower", parts), num_voco_tokens=5)
    model = AutoModelForImageTextToText.from_pretrained(out)
    config, processor = model.config, AutoProcessor.from_pretrained(out)
    assert type(model) is VocoLlavaForConditionalGeneration and type(processor) is VocoProcessor
    assert (config.isolated, config.hide_prefix, config.masked, config.positions) == (True, True, True, "continuous")
    assert (config.image_token_id, config.pad_token_id, config.voco_token_id) == (TEXT, TEXT + 1, TEXT + 2)
    assert (config.image_start_id, config.image_seq_length, config.text_config.vocab_size) == (1, VISION, PADDED)
    assert config.num_voco_tokens == config.max_voco_tokens == processor.num_voco_tokens == processor.max_voco_tokens == 5
    assert (processor.image_start_token, processor.tokenizer.padding_side) == ("<s>", "left")
    assert (processor.tokenizer.pad_token_id, processor.tokenizer.model_max_length) == (TEXT + 1, 512)
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, TEXT + 1)
    assert model.ask("what is it?", images=pictures(1), max_new_tokens=3) is not None


@pytest.mark.parametrize(("ratio", "pads"), [("pad", True), ("square", False), (None, False)])
def test_images_are_padded_where_the_model_was_trained_so(tmp_path, ratio, pads):
    parts = parts_of(TEXT)
    source = original(tmp_path / "source", parts, image_aspect_ratio=ratio)
    convert(source, tmp_path / "out", tower=clip(tmp_path / "tower", parts))
    wide = models.picture(0, 4 * EDGE).crop((0, 0, 4 * EDGE, 2 * EDGE))
    pixels = VocoProcessor.from_pretrained(tmp_path / "out")([wide], QUESTION)["pixel_values"]
    square = models.Image.new("RGB", (4 * EDGE, 4 * EDGE), (127, 127, 127))
    square.paste(wide, (0, EDGE))
    expected = image_processor()([square if pads else wide], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, expected, rtol=0, atol=0)


def test_images_of_a_newer_llava_hf(tmp_path):
    """Its image processor is a part of processor_config.json."""
    source = llava_hf(tmp_path / "source", parts_of(PADDED))
    (source / "preprocessor_config.json").unlink()
    odd = LlavaImageProcessorPil(**{**image_processor().to_dict(), "image_mean": [0.1, 0.2, 0.3], "do_pad": True})
    LlavaProcessor(odd, tokenizer_of("<image>", "<pad>"), patch_size=4).save_pretrained(source)
    assert not (source / "preprocessor_config.json").exists()
    convert(source, tmp_path / "out")
    wide = models.picture(0, 4 * EDGE).crop((0, 0, 4 * EDGE, 2 * EDGE))
    got = VocoProcessor.from_pretrained(tmp_path / "out").image_processor(wide, return_tensors="pt")
    torch.testing.assert_close(got["pixel_values"], odd(wide, return_tensors="pt")["pixel_values"], rtol=0, atol=0)


def test_shards_are_small_and_dtypes_kept(tmp_path, monkeypatch):
    parts = parts_of(TEXT)
    source = original(tmp_path / "source", parts)
    tensors = torch.load(source / "pytorch_model.bin", weights_only=True)
    torch.save({name: x.to(torch.bfloat16) for name, x in tensors.items()}, source / "pytorch_model.bin")
    monkeypatch.setattr(checkpoints, "SHARD", 60_000)
    seen = []
    done = convert(source, tmp_path / "out", tower=clip(tmp_path / "tower", parts), progress=lambda *x: seen.append(x))
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) == len(seen) - 1 > 3 and not (tmp_path / "out/model.safetensors").exists()
    assert seen == sorted(seen) and seen[0] == (0, done.bytes) and seen[-1] == (done.bytes, done.bytes)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    dtypes = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                assert index["weight_map"][name] == file.name
                dtypes[name] = opened.get_tensor(name).dtype
    assert dtypes.keys() == parts.named(HUB).keys() == index["weight_map"].keys()
    assert all(x == (torch.float32 if "vision" in name else torch.bfloat16) for name, x in dtypes.items())
    assert done.dtypes == ["bfloat16", "float32"]
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    model = VocoLlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16


def test_stock_llava_reads_the_checkpoint(tmp_path):
    parts = parts_of(PADDED)
    convert(llava_hf(tmp_path / "source", parts), tmp_path / "out")
    config = LlavaConfig.from_pretrained(tmp_path / "out")
    stock, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", config=config, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(stock.lm_head.weight, parts.llama.lm_head.weight)


# ---- refusals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hf(tmp_path):
    return llava_hf(tmp_path / "source", parts_of(PADDED))


@pytest.fixture
def old(tmp_path):
    return original(tmp_path / "source", parts_of(TEXT), "safetensors")


@pytest.fixture
def tower(tmp_path):
    return clip(tmp_path / "tower", parts_of(TEXT))


def changed(folder, **settings):
    path = folder / "config.json"
    write_json(path, {**json.loads(path.read_text()), **settings})
    return folder


def with_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def refuses(source, match: str, error=ValueError, **options) -> None:
    """The message is as said, and nothing has been written."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(error, match=match):
        convert(source, source.parent / "out", **options)
    assert sorted(source.parent.iterdir()) == before


def test_refuses_what_is_no_llava(hf, tmp_path):
    refuses(tmp_path / "nothing", "source must be a folder, but was .*nothing")
    for settings, match in (
        ({"model_type": "llava_next"}, "source must be a LLaVA-1.5.* model_type llava_next"),
        ({"model_type": "voco_llava"}, "source must be the checkpoint of another layout.* already is a voco_llava"),
        ({"model_type": "llava", "text_config": {"model_type": "qwen2"}}, "text_config of model_type llama, .* qwen2"),
        ({"text_config": llama_config(vocab_size=PADDED).to_dict(), "tie_word_embeddings": True}, "embeddings false"),
    ):
        refuses(changed(hf, **settings), match)
    (hf / "config.json").write_text("{")
    refuses(hf, "config.json is not JSON")
    (hf / "config.json").unlink()
    refuses(hf, "source must have a config.json")


def test_refuses_settings_of_other_originals(old, tower):
    before = json.loads((old / "config.json").read_text())
    for settings, match in (
        ({"architectures": ["LlavaMistralForCausalLM"]}, r"architectures \['LlavaMistralForCausalLM'\]"),
        ({"mm_projector_type": "linear"}, "mm_projector_type mlp2x_gelu in its config.json, but has linear"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio pad or square or None in its config.json, but has anyres"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type flat or None in .* has spatial_unpad"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end False or None"),
        ({"mm_vision_select_layer": None}, "integer mm_vision_select_layer"),
    ):
        refuses(changed(old, **settings), match, tower=tower)
        write_json(old / "config.json", before)


def test_refuses_parts_of_models(old, tower):
    (old / "model.safetensors").rename(old / "mm_projector.bin")
    refuses(old, "source must hold a whole model, but .* holds a projector alone", tower=tower)
    (old / "mm_projector.bin").unlink()
    refuses(old, "source must have model.safetensors or pytorch_model.bin", tower=tower)
    (old / "non_lora_trainables.bin").touch()
    refuses(old, "holds LoRA weights", tower=tower)


def test_refuses_a_tower_that_is_missing_or_too_many(hf, tmp_path):
    refuses(hf, "tower must be None for a llava-hf checkpoint", tower=tmp_path)
    source = original(tmp_path / "old", parts_of(TEXT))
    refuses(source, "tower must be the folder of the CLIP model openai/clip-vit-large-patch14-336 .* but was None")
    refuses(source, "tower must be the folder of a CLIP model with a config.json", tower=tmp_path)
    refuses(source, "tower must be the folder of a CLIP model, but .* holds a llava", tower=hf)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x.pop("lm_head.weight"), r"lacks language_model.lm_head.weight \(1 in all\)"),
        (lambda x: [x.pop(k) for k in sorted(x) if "layers.1" in k], r"lacks .* and 4 more \(9 in all\)"),
        (lambda x: x.update({"model.image_newline": torch.ones(1)}), r"unexpected keys: model.image_newline \(1 in all\)"),
        (
            lambda x: x.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}),
            "unexpected keys: language_model.model.layers.2.mlp.up_proj.weight",
        ),
        (
            lambda x: x.update({"lm_head.weight": torch.ones(TEXT + 1, 64)}),
            rf"lm_head.weight \[{TEXT + 1}, 64\] instead of \[{TEXT}, 64\]",
        ),
        (
            lambda x: x.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
            "must hold float32, float16 or bfloat16, but holds language_model.model.norm.weight of I8",
        ),
    ],
    ids=["a key", "a layer", "newline", "another layer", "shape", "dtype"],
)
def test_refuses_wrong_tensors(old, tower, change, match):
    refuses(with_tensors(old, change), match, tower=tower)


def test_refuses_a_tensor_under_two_names(hf):
    def twice(tensors):
        tensors["model.language_model.norm.weight"] = tensors["language_model.model.norm.weight"].clone()

    refuses(with_tensors(hf, twice), "must hold language_model.model.norm.weight once")


def test_refuses_a_tower_of_another_size(old, tower):
    changed(tower, vision_config={**clip_config().to_dict(), "hidden_size": 16})
    refuses(old, r"does not fit its config.json: .*multi_modal_projector.linear_1.weight", tower=tower)


def test_refuses_an_image_processor_of_another_size(hf):
    image_processor(2 * EDGE).save_pretrained(hf)
    refuses(hf, f"must make images of {VISION} tokens, the tower's number, but makes images of 36")
    write_json(hf / "preprocessor_config.json", {"image_processor_type": "SiglipImageProcessor"})
    refuses(hf, "preprocessor_config.json of .* must be that of a CLIP or a LLaVA, but is that of a SiglipImageProcessor")
    (hf / "preprocessor_config.json").unlink()
    refuses(hf, "must hold a preprocessor_config.json, but does not")


def test_refuses_damaged_files(tmp_path, tower):
    source = original(tmp_path / "source", parts_of(TEXT), "bin shards")
    shard = source / "pytorch_model-00002-of-00003.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refuses(source, "is not a file of tensors that torch.load can map", tower=tower)
    torch.save([1], shard)
    refuses(source, "must hold a dictionary of tensors", tower=tower)
    shard.unlink()
    refuses(source, "lacks pytorch_model-00002-of-00003.bin, which pytorch_model.bin.index.json names", tower=tower)
    source = original(tmp_path / "other", parts_of(TEXT), "safetensors")
    (source / "model.safetensors").write_bytes(b"12345678")
    refuses(source, "model.safetensors is damaged", tower=tower)


def test_nothing_is_unpickled(tmp_path, tower):
    class Trap:
        def __reduce__(self):
            return (print, ("executed",))

    source = original(tmp_path / "source", parts_of(TEXT), extra={"trap": Trap()})
    refuses(source, "is not a file of tensors", tower=tower)


def test_refuses_tokenizers_that_do_not_fit(tmp_path, tower):
    def tokens(name, *added):
        tokenizer_of(*added).save_pretrained(tmp_path / name)
        return tmp_path / name

    plain, hub = tokens("plain"), tokens("hub", "<image>", "<pad>")
    voco_llama = original(tmp_path / "voco", parts_of(TEXT + 1), added=["<voco>"])
    fits = "tokenizer must be the one that the source was trained with, but"
    refuses(voco_llama, f"{fits} 1 rows of the embedding's {TEXT + 1} have no token", tower=tower, tokenizer=plain)
    refuses(voco_llama, f"{fits} <image> has row {TEXT}", tower=tower, tokenizer=hub)
    early = original(tmp_path / "early", parts_of(TEXT + 2), added=["<voco>", "<more>"])
    refuses(early, f"<voco> as the last of the source's {TEXT + 2} tokens, but its id is {TEXT}", tower=tower)
    source = llava_hf(tmp_path / "hf", parts_of(PADDED), added=["<pad>", "<image>"])
    refuses(source, f"must know <image> as {TEXT}, its id in the source, not as {TEXT + 1}")
    refuses(source, "folder with tokenizer.json or tokenizer.model, but was", tokenizer=tmp_path)
    state = json.loads((source / "tokenizer.json").read_text())
    write_json(source / "tokenizer.json", {**state, "post_processor": None})
    refuses(source, "tokenizer must put its BOS token before a text")


def test_says_what_a_tokenizer_model_needs(tmp_path, tower):
    """This one is none, so it cannot be read by whatever is installed."""
    source = original(tmp_path / "source", parts_of(TEXT))
    (source / "tokenizer.json").rename(source / "tokenizer.model")
    match = "tokenizer.model install sentencepiece and protobuf, or give as tokenizer a folder with the tokenizer.json"
    refuses(source, match, ImportError, tower=tower)


def test_a_tokenizer_from_elsewhere(tmp_path, tower):
    """An original source with the tokenizer of llava-hf, whose <image> and <pad> keep their ids."""
    source = original(tmp_path / "source", parts_of(TEXT))
    (source / "tokenizer.json").unlink()
    refuses(source, "folder with tokenizer.json", tower=tower)
    backend = tokenizer_of("<image>", "<pad>").backend_tokenizer
    # And it has no token for what it does not know.
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path / "hub")
    done = convert(source, tmp_path / "out", tower=tower, tokenizer=tmp_path / "hub")
    assert done.tokens == {"<image>": TEXT, "<pad>": TEXT + 1, "<voco>": TEXT + 2}
    assert len(VocoProcessor.from_pretrained(tmp_path / "out").tokenizer) == TEXT + 3


def test_refuses_an_out_that_is_taken(hf, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    refuses(hf, "out must be a new or an empty folder")
    assert [x.name for x in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    convert(hf, out)
    assert (out / "config.json").is_file()


def test_refuses_a_count_of_nothing(hf):
    refuses(hf, "num_voco_tokens must be at least 1, but was 0", num_voco_tokens=0)


# ---- failures while writing --------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(hf, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARD", 60_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Some shards fit; the embedding does not.
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, before[1]))
    try:
        refuses(hf, "cannot be written to", OSError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: type("", (), {"free": 1000}))
    refuses(hf, "the model needs .* bytes, and 1,000 are free", OSError)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(hf, monkeypatch, error):
    monkeypatch.setattr(checkpoints, "SHARD", 60_000)

    def stop(done, total):
        if done > total / 2:
            raise error("stop")

    refuses(hf, "stop", error, progress=stop)


# ---- the command -------------------------------------------------------------------------------------------------------


def test_command(tmp_path, monkeypatch, capsys):
    parts = parts_of(TEXT + 1)
    original(tmp_path / "source", parts, added=["<voco>"])
    clip(tmp_path / "tower", parts)
    arguments = ["convert", "source", "--tower", "tower", "--voco", "4"]
    assert voco_here([*arguments, "--out", "a", "--json"], tmp_path, monkeypatch) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["kind"], done["out"], done["moved"]) == ("VoCo-LLaMA", "a", [TEXT, TEXT + 2])
    assert VocoProcessor.from_pretrained(tmp_path / "a").num_voco_tokens == 4
    assert voco_here([*arguments, "--out", "b"], tmp_path, monkeypatch) == 0
    said = capsys.readouterr().out
    assert "VoCo-LLaMA in source" in said and f"row {TEXT} to {TEXT + 2}" in said
    assert voco_here([*arguments, "--out", "a"], tmp_path, monkeypatch) == 1
    assert "out must be a new or an empty folder" in capsys.readouterr().err
