"""The processor: what stands where in a prompt, counts, images of every kind, saving."""

import json
import warnings

import numpy as np
import pytest
import torch
from models import (
    BOS,
    EDGE,
    IMAGE,
    VISION,
    VOCO,
    picture,
    pictures,
    processor,
    tokenizer,
    voco_llava,
)
from PIL import Image
from transformers import AutoTokenizer
from voco_llama import VocoProcessor
from voco_llama.demo.build import build_processor
from voco_llama.processing import VICUNA_TEMPLATE, open_image, pixels_digest

SYSTEM = "A chat between a curious user and an artificial intelligence assistant of the image."


@pytest.fixture(scope="module")
def ours():
    return processor()


def kinds(ids, proc=None) -> str:
    """Letters of token ids, runs written once with their length: b BOS, v vision, c VoCo, t anything else."""
    special = {BOS: "b", IMAGE: "v", VOCO: "c"}
    if proc is not None:
        names = {"<s>": "b", "<image>": "v", "<voco>": "c"}
        special = {proc.tokenizer.convert_tokens_to_ids(name): letter for name, letter in names.items()}
    letters = "".join(special.get(i, "t") for i in ids.tolist())
    runs, begin = [], 0
    for i in range(1, len(letters) + 1):
        if i == len(letters) or letters[i] != letters[begin]:
            runs.append(f"{letters[begin]}{i - begin}")
            begin = i
    return " ".join(runs)


def text_of(proc, ids) -> str:
    return proc.tokenizer.decode(ids, skip_special_tokens=True)


# ---- prompts -----------------------------------------------------------------------------------------------------------


def test_the_released_order_image_voco_system_question(ours):
    """`<s> <image> newline <voco> newline system USER: question ASSISTANT:`"""
    ids = ours(pictures(1), ours.prompt("how many?"))["input_ids"][0]
    shape = kinds(ids).split()
    assert [run[0] for run in shape] == ["b", "v", "t", "c", "t"]
    assert shape[:2] == ["b1", f"v{VISION}"] and shape[3] == "c2"
    text = text_of(ours, ids[ids.tolist().index(VOCO) :])
    assert text.index(SYSTEM) < text.index("USER: how many?") < text.index("ASSISTANT:")
    assert text.strip().endswith("ASSISTANT:")
    assert text_of(ours, ids[: ids.tolist().index(VOCO)]).strip() == ""


def test_the_vicuna_template_of_a_conversation(ours):
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "first"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": "second"},
    ]
    prompt = ours.apply_chat_template(conversation, add_generation_prompt=True)
    assert ours.chat_template == VICUNA_TEMPLATE
    assert prompt.startswith(f"<image>\n{SYSTEM}")
    assert prompt.endswith(" USER: first ASSISTANT: yes</s>USER: second ASSISTANT:")
    assert not ours.apply_chat_template(conversation).endswith("ASSISTANT:")


def test_the_demo_prompt():
    proc = build_processor()
    ids = proc(pictures(1), proc.prompt("how many fours"), 4)["input_ids"][0]
    shape = kinds(ids, proc).split()
    assert [run[0] for run in shape] == ["b", "v", "c", "t"]
    assert shape[2] == "c4" and shape[1] == f"v{proc.num_image_tokens}"
    assert proc.tokenizer.decode(ids, skip_special_tokens=True).split() == ["how", "many", "fours", "answer"]


@pytest.mark.parametrize("make", [processor, build_processor], ids=["LLaMA-like", "demo"])
def test_bos_in_front_of_every_image(make):
    """Every image's segment has the same ids wherever it stands, so its compressed form fits everywhere."""
    proc = make()
    alone = proc(pictures(1), proc.image_token)["input_ids"][0].tolist()
    voco, bos = (proc.tokenizer.convert_tokens_to_ids(t) for t in ("<voco>", "<s>"))
    assert alone[0] == bos and alone.count(bos) == 1 and alone[-1] == voco
    for prompt in ("<image>one<image><image>\ntwo", "before <image> between <image>after", proc.prompt("which?", 3)):
        count = prompt.count("<image>")
        ids = proc(pictures(count), prompt)["input_ids"][0].tolist()
        found = sum(ids[i : i + len(alone)] == alone for i in range(len(ids)))
        assert found == count, prompt
        # A prompt that begins with an image has one BOS there, not two.
        assert ids.count(bos) == count + (not prompt.startswith("<image>"))


def test_without_an_image_start_token():
    proc = processor(image_start_token=None)
    ids = proc(pictures(2), "<image>one<image>two")["input_ids"][0].tolist()
    assert ids.count(BOS) == 1


def test_the_layout_of_a_prompt(ours):
    """Each image's segment runs from its BOS to its last VoCo token; everything else is text."""
    model = voco_llava(hide_prefix=False)
    x = ours(pictures(2), "<image>one<image>two", 3)
    layout = model.layout_of(x["input_ids"], x["attention_mask"])
    alone = ours(pictures(1), "<image>", 3)["input_ids"].shape[1]
    segments = layout.segment_ids.tolist()
    lengths = [segments.count(s) for s in sorted(set(segments) - {0})]
    assert lengths == [alone, alone] and segments[:alone] == [segments[0]] * alone
    assert int((layout.public & (layout.segment_ids > 0)).sum()) == 6


@pytest.mark.parametrize("count", [0, 1, 2, 5, 8])
def test_voco_counts(ours, count):
    ids = ours(pictures(1), "<image>\nwhat", count)["input_ids"][0].tolist()
    assert ids.count(VOCO) == count and ids.count(IMAGE) == VISION
    assert (count == 0) == (ids[VISION + 1] != ids[VISION + 1 - 1] and VOCO not in ids)


def test_one_count_for_each_image(ours):
    x = ours(pictures(3), ["<image>one<image>two", "<image>three"], [1, 0, 4])
    assert [(row == VOCO).sum().item() for row in x["input_ids"]] == [1, 4]


def test_prompts_without_images_are_the_same(ours):
    """Stage 2 needs the same placeholders, and no pixels."""
    prompts = ["<image>\nwhat", "no image"]
    with_images, without = ours(pictures(1), prompts), ours(None, prompts)
    assert "pixel_values" in with_images and "pixel_values" not in without
    assert torch.equal(with_images["input_ids"], without["input_ids"])
    assert "pixel_values" not in ours([], "no image")


def test_padding_is_on_the_left(ours):
    x = ours(pictures(1), ["<image>\nwhat is it", "no image"])
    assert x["attention_mask"][0].all() and not x["attention_mask"][1, 0] and x["attention_mask"][1, -1]
    assert "token_type_ids" not in x


@pytest.mark.parametrize("edge", [12, 28])
def test_num_image_tokens_is_that_of_the_tower(edge):
    proc = processor()
    proc.image_processor.size = {"shortest_edge": edge}
    proc.image_processor.crop_size = {"height": edge, "width": edge}
    assert proc.num_image_tokens == (edge // 4) ** 2
    if edge == EDGE:
        model = voco_llava()
        values = proc(pictures(1), "<image>")["pixel_values"]
        assert values.shape == (1, 3, EDGE, EDGE)
        features = model.model.get_image_features(pixel_values=values)
        features = getattr(features, "pooler_output", features)[0]
        assert features.shape[0] == proc.num_image_tokens == VISION


def test_num_image_tokens_of_other_settings():
    assert processor(vision_feature_select_strategy="full").num_image_tokens == VISION + 1
    assert build_processor().num_image_tokens == 64
    proc = processor()
    proc.image_processor.do_center_crop = False
    proc.image_processor.size = {"height": 16, "width": 24}
    assert proc.num_image_tokens == 4 * 6


# ---- wrong calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "text"),
    [(1, "no image"), (2, "<image>one"), (1, "<image><image>"), (3, ["<image>", "<image>"]), (0, "<image>")],
)
def test_other_numbers_of_images_than_placeholders(ours, images, text):
    with pytest.raises(ValueError, match=rf"text must hold one <image> per image \({images}\), but holds"):
        ours(pictures(images), text)


@pytest.mark.parametrize("count", [-1, 1.5, "2", [1], [1, 2, 3], [1, -1], [1, 1.5]], ids=str)
def test_wrong_voco_counts(ours, count):
    with pytest.raises(ValueError, match="^num_voco_tokens must"):
        ours(pictures(2), "<image><image>", count)


def test_more_voco_tokens_than_trained_for(ours):
    with pytest.warns(UserWarning, match="9 VoCo tokens per image were asked for, .* trained for at most 8"):
        ours(pictures(1), "<image>", 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(pictures(1), "<image>", 8)


@pytest.mark.parametrize("text", [None, []], ids=str)
def test_no_prompt(ours, text):
    with pytest.raises(ValueError, match="text must be a prompt"):
        ours(pictures(1), text)


# ---- images ------------------------------------------------------------------------------------------------------------


def saved(tmp_path, image, name="image.png"):
    path = tmp_path / name
    image.save(path)
    return path


def test_images_of_every_source_are_the_same(ours, tmp_path):
    image = picture(3)
    path = saved(tmp_path, image)
    expected = ours(image, "<image>")["pixel_values"]
    for source in (path, str(path), np.asarray(image), [image], [str(path)], (image,)):
        assert torch.equal(ours(source, "<image>")["pixel_values"], expected)


def test_several_images_keep_their_order(ours):
    images = pictures(3)
    x = ours(images, ["<image><image>", "<image>"])["pixel_values"]
    assert x.shape[0] == 3
    for i, image in enumerate(images):
        assert torch.equal(x[i : i + 1], ours(image, "<image>")["pixel_values"])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_images_of_every_mode_become_rgb(ours, tmp_path, mode):
    image = (picture(5).convert("L") if mode == "LA" else picture(5)).convert(mode)
    suffix = "tiff" if mode == "CMYK" else "png"
    opened = open_image(saved(tmp_path, image, f"image.{suffix}"))
    assert opened.mode == "RGB" and opened.size == image.size
    assert ours(image, "<image>")["pixel_values"].shape == (1, 3, EDGE, EDGE)


def test_a_palette_image_keeps_its_colours():
    image = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8), mode="P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    assert np.asarray(open_image(image)).tolist() == [[[255, 0, 0], [0, 0, 255]], [[0, 0, 255], [255, 0, 0]]]


def test_grey_arrays(ours):
    grey = np.arange(EDGE * EDGE, dtype=np.uint8).reshape(EDGE, EDGE)
    x = ours(grey, "<image>")["pixel_values"][0]
    assert torch.equal(x[0], x[1]) and torch.equal(x[1], x[2])


def write(tmp_path, name, content: bytes):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def truncated(tmp_path):
    whole = saved(tmp_path, picture(1, edge=64)).read_bytes()
    return write(tmp_path, "truncated.png", whole[: len(whole) // 2])


BAD_IMAGES = {
    "missing": (lambda tmp_path: tmp_path / "nothing.png", "does not exist"),
    "truncated": (truncated, "cannot be read"),
    "empty": (lambda tmp_path: write(tmp_path, "empty.png", b""), "is not an image file"),
    "text": (lambda tmp_path: write(tmp_path, "notes.png", b"not an image"), "is not an image file"),
    "directory": (lambda tmp_path: tmp_path, "cannot be read"),
}


@pytest.mark.parametrize("make, what", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_images_that_cannot_be_read(ours, tmp_path, make, what):
    path = make(tmp_path)
    with pytest.raises(ValueError, match=what) as caught:
        ours([picture(0), path], "<image><image>")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [np.zeros((EDGE, EDGE, 3), dtype=np.float32), np.zeros((3, EDGE, EDGE), dtype=np.uint8), np.zeros(4, dtype=np.uint8), 7],
    ids=["float array", "channels first", "one dimension", "number"],
)
def test_things_that_are_no_images(ours, source):
    with pytest.raises(ValueError, match="^image"):
        ours([source], "<image>")


# ---- saving and fingerprints -------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    proc = processor(num_voco_tokens=3, max_voco_tokens=16, image_start_token=None)
    proc.save_pretrained(tmp_path)
    loaded = VocoProcessor.from_pretrained(tmp_path)
    for name in ("num_voco_tokens", "max_voco_tokens", "image_start_token", "voco_token", "voco_token_id", "chat_template"):
        assert getattr(loaded, name) == getattr(proc, name), name
    assert loaded.fingerprint() == proc.fingerprint()
    prompt, image = proc.prompt("how many?"), picture(1)
    x, y = proc(image, prompt), loaded(image, prompt)
    assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)
    assert "nothing" not in json.dumps(sorted(p.name for p in tmp_path.iterdir()))
    assert AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids("<voco>") == VOCO


def test_the_fingerprint_follows_what_the_model_sees():
    base = processor()
    assert processor().fingerprint() == base.fingerprint()
    # Defaults for the number of VoCo tokens, and templates, are no part of a segment.
    assert processor(num_voco_tokens=7, chat_template="{{ messages }}").fingerprint() == base.fingerprint()
    assert processor(vision_feature_select_strategy="full").fingerprint() != base.fingerprint()
    normalised = processor()
    normalised.image_processor.image_mean = [0.4] * 3
    assert normalised.fingerprint() != base.fingerprint()


def test_pixels_digest():
    x = torch.rand(3, 4, 4)
    assert pixels_digest(x) == pixels_digest(x.clone()) != pixels_digest(x + 1e-3)
    assert pixels_digest(x.transpose(1, 2)) == pixels_digest(x.transpose(1, 2).contiguous())


def test_tokenizer_is_like_llamas():
    """BOS in front, spaces as "▁", bytes for what the vocabulary lacks: what the prompts above are made of."""
    tokens = tokenizer().convert_ids_to_tokens(tokenizer()("a b\né").input_ids)
    assert tokens == ["<s>", "▁", "a", "▁", "b", "<0x0A>", "<0xC3>", "<0xA9>"]
