"""Training data: what a conversation becomes, where records and images come from, and what is refused."""

import io
import json
import multiprocessing
import pickle
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import (
    BOS,
    EDGE,
    EOS,
    IMAGE,
    VISION,
    VOCO,
    image_processor,
    picture,
    processor,
    tokenizer,
    voco_config,
)
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from voco_llama import VocoCollator, VocoProcessor
from voco_llama.demo import CLIPS, MODEL, UNCOMPRESSED
from voco_llama.demo.build import TEMPLATE, build_processor
from voco_llama.demo.digits import DigitsTask
from voco_llama.demo.train import UNCOMPRESSED_PHASE, Documents
from voco_llama.training import DataConfig, TrainingConfig, VideoConfig
from voco_llama.training.dataset import ConversationDataset
from voco_llama.training.images import Shards, shards_of

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant{}. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. "
)
OURS = processor()


def conversation(*turns: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]


def record(image=None, question="<image>\nhow many?", answer="three", **more) -> dict:
    about = {} if image is None else {"image": image}
    return {**about, "conversations": conversation(question, answer), **more}


def text(i: int) -> dict:
    return {"id": f"t{i}", "conversations": conversation(f"q{i}", f"a{i}")}


def data_of(records, out="unused", proc=OURS, seed=0, data=None, **options) -> ConversationDataset:
    """Records in Python as a data set; `data` are settings of DataConfig."""
    own = None if data is None else DataConfig(conversations=(), **data)
    return ConversationDataset.of(TrainingConfig("model", Path(out), own, **options), proc, records, seed)


def files_of(folder: Path, *conversations, proc=OURS, images=None, **data) -> ConversationDataset:
    """Files in a folder as a data set, whose report is in its `out`."""
    files = tuple(folder / name for name in conversations)
    own = DataConfig(files, None if images is None else str(folder / images), **data)
    return ConversationDataset.of(TrainingConfig("model", folder / "out", own), proc, None, 0)


def report_of(dataset: ConversationDataset) -> list[dict]:
    return [json.loads(line) for line in dataset.report.read_text().splitlines()]


def answers_of(dataset: ConversationDataset) -> list[str]:
    """The text that each sample of a data set learns."""
    learnt = ((sample["input_ids"], sample["labels"]) for sample in dataset)
    return [OURS.tokenizer.decode(ids[labels >= 0], skip_special_tokens=True).strip() for ids, labels in learnt]


def assert_same(sample: dict, other: dict) -> None:
    assert sample.keys() == other.keys()
    for name, x in sample.items():
        assert torch.equal(x, other[name]), name


# ---- token ids and labels ----------------------------------------------------------------------------------------------


def by_hand(turns, counts) -> tuple[list[int], list[int]]:
    """Vicuna-v1 with images in front, a character a token, by a loop of its own: ids and labels."""
    vocab = tokenizer().get_vocab()
    ids, labels = [BOS], [-100]

    def special(token, learnt=False):
        ids.append(token)
        labels.append(token if learnt else -100)

    def plain(words, learnt=False, first=True):
        # Text behind a special token begins with a space.
        for character in ("▁" if first else "") + words.replace(" ", "▁"):
            whole = [vocab[character]] if character in vocab else [vocab[f"<0x{b:02X}>"] for b in character.encode()]
            ids.extend(whole)
            labels.extend(whole if learnt else [-100] * len(whole))

    for i, count in enumerate(counts):
        if i:
            special(BOS)
        for _ in range(VISION):
            special(IMAGE)
        if count:
            plain("\n")
            for _ in range(count):
                special(VOCO)
        plain("\n")
    plain(SYSTEM.format(" of the image" if counts else ""), first=not counts)
    for i in range(0, len(turns), 2):
        plain(f"USER: {turns[i]} ASSISTANT:", first=i > 0)
        plain(f" {turns[i + 1]}", learnt=True, first=False)
        special(EOS, learnt=True)
    return ids, labels


WORDS = st.text(st.sampled_from("ab :\n.éß中🙂USER"), max_size=12)
PLAIN = WORDS.filter(lambda x: x == x.strip())


@given(first=PLAIN, rest=st.lists(WORDS, min_size=1, max_size=5), images=st.integers(0, 3), count=st.integers(1, 4))
def test_a_conversation_by_hand(first, rest, images, count):
    turns = [first, *rest][: (len(rest) + 1) // 2 * 2]
    question = "<image>\n" * images + first
    one = {"image": [picture(i) for i in range(images)], "conversations": conversation(question, *turns[1:])}
    sample = data_of([one], num_voco_tokens=(count,))[0]
    ids, labels = by_hand(turns, [count] * images)
    assert sample["input_ids"].tolist() == ids
    assert sample["labels"].tolist() == labels
    assert {x.dtype for x in (sample["input_ids"], sample["labels"])} == {torch.int64}
    if images:
        assert sample["pixel_values"].shape == (images, 3, EDGE, EDGE)
        assert sample["pixel_values"].dtype == torch.float32
    else:
        assert "pixel_values" not in sample


@pytest.mark.parametrize("make", [processor, build_processor], ids=["LLaMA-like", "demo"])
@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("sources", [1, 2, 3])
def test_a_prompt_is_the_beginning_of_what_was_trained(make, kind, sources):
    """Training and inference must see the same tokens and pixels."""
    proc, frames = make(), [1] * sources if kind == "image" else [3, 1, 2][:sources]
    images = [[picture(10 * i + j) for j in range(n)] for i, n in enumerate(frames)]
    about = [x[0] for x in images] if kind == "image" else images
    turns = (f"<{kind}>\n" * sources + "how many fours?", "three", "which digit?", "six")
    sample = data_of([{kind: about, "conversations": conversation(*turns)}], proc=proc, num_voco_tokens=(4,))[0]
    asked = proc([x for some in images for x in some], proc.prompt("how many fours?", frames), 4)
    length = asked["input_ids"].shape[1]
    assert torch.equal(sample["input_ids"][:length], asked["input_ids"][0])
    assert torch.equal(sample["pixel_values"], asked["pixel_values"])
    learnt = (sample["labels"] >= 0).nonzero()
    assert int(learnt.min()) == length
    # The next question, too, begins where its prompt ends.
    text = proc.conversation(["how many fours?", "three", "which digit?"], frames)
    asked = proc(None, text, 4)["input_ids"][0]
    assert torch.equal(sample["input_ids"][: len(asked)], asked)
    assert sample["labels"][len(asked) :].equal(sample["input_ids"][len(asked) :])


def test_demo_documents_as_its_own_training_makes_them():
    """Two ways from digits to tokens: through the chat template, and word by word as the demo model was trained."""
    proc = build_processor()
    questions = DigitsTask("train", augment=False).sample((0,), 4).questions
    turns = [turn for q in questions for turn in (q.text, q.answer)]
    image = picture(1, 32)
    expected = Documents(UNCOMPRESSED_PHASE, proc, 0)._document([image], 3, questions)
    one = record(image, f"<image>\n{turns[0]}", turns[1])
    one["conversations"] = conversation(f"<image>\n{turns[0]}", *turns[1:])
    assert_same(data_of([one], proc=proc, num_voco_tokens=(3,))[0], expected)


def test_the_demo_template_asks_as_before():
    before = (
        "{% for message in messages %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
        "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %} answer:{% endif %}"
    )
    proc = build_processor()
    for images in (0, 1, 3):
        content = [{"type": "image"}] * images + [{"type": "text", "text": " which <b>digit</b>?\n"}]
        messages = [{"role": "user", "content": content}]
        for options in ({}, {"add_generation_prompt": True}):
            old = proc.apply_chat_template(messages * 2, chat_template=before, **options)
            assert proc.apply_chat_template(messages * 2, **options) == old
    for folder in (MODEL, CLIPS, UNCOMPRESSED):
        assert VocoProcessor.from_pretrained(folder).chat_template == TEMPLATE


@pytest.mark.parametrize(
    "question",
    ["<image>\nwhy?", "why?\n<image>", "<image>why?", " <image> \n why?\n", "why?<image>"],
)
def test_a_marker_is_removed_at_either_edge(question):
    assert_same(data_of([record(picture(1), question)])[0], data_of([record(picture(1), "<image>\nwhy?")])[0])


def test_markers_of_videos():
    frames = [picture(i) for i in range(2)]
    samples = [
        data_of([{"video": [frames, frames], "conversations": conversation(question, "x")}])[0]
        for question in ("<video>\n<video>\nwhy?", "<image>\nwhy?\n<video>", "why?\n<image><image>")
    ]
    assert samples[0]["pixel_values"].shape[0] == 4
    for other in samples[1:]:
        assert_same(samples[0], other)


def test_text_without_images_is_left_as_it_is():
    """HTML has a <video> element, and whitespace means something in code."""
    one = {"conversations": conversation("  <video>\n", " x\n")}
    sample = data_of([one])[0]
    assert sample["input_ids"].tolist() == by_hand(["  <video>\n", " x\n"], [])[0]


# ---- VoCo counts -------------------------------------------------------------------------------------------------------


def counts_of(sample: dict) -> list[int]:
    """VoCo tokens behind each run of image tokens."""
    counts, inside = [], False
    for token in sample["input_ids"].tolist():
        if token == IMAGE and not inside:
            counts.append(0)
        inside = token == IMAGE
        counts[-1:] = [counts[-1] + (token == VOCO)] if counts else []
    return counts


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 2),
        ({"num_voco_tokens": (5,)}, 5),
        ({"system": "upper_bound"}, 2),
        ({"system": "avg_pool"}, 0),
        ({"stage": "align", "num_voco_tokens": (1, 4)}, 0),
    ],
)
def test_the_count_of_a_system_and_a_stage(options, count):
    assert counts_of(data_of([record([picture(1), picture(2)], "<image><image>?")], **options)[0]) == [count] * 2


def test_a_compressed_image_takes_the_tokens_that_its_system_makes():
    sample = data_of([record(picture(1))], proc=processor(num_compressed_tokens=4), system="q_former")[0]
    assert (sample["input_ids"] == IMAGE).sum() == 4
    assert VOCO not in sample["input_ids"]


def test_counts_are_drawn_per_image_from_seed_epoch_and_index(tmp_path):
    records = [record([picture(1)] * 8, "<image>" * 8 + "?")] * 8
    choices = (1, 2, 4)

    def draws(seed=0, epoch=0):
        data = data_of(records, seed=seed, num_voco_tokens=choices)
        data.set_epoch(epoch)
        return [counts_of(sample) for sample in data]

    first = draws()
    assert first == draws()
    assert all(set(counts) <= set(choices) for counts in first)
    assert len({tuple(counts) for counts in first}) == 8, "drawn for each index"
    assert all(len(set(counts)) > 1 for counts in first), "drawn for each image"
    assert draws(epoch=1) != first != draws(seed=1)
    times = [sum(counts.count(choice) for counts in first) for choice in choices]
    assert min(times) > 10, times
    # Whatever was asked for before changes nothing.
    data = data_of(records, num_voco_tokens=choices)
    assert [counts_of(data[i]) for i in (3, 0, 3)] == [first[3], first[0], first[3]]
    # So does what stands in for a broken record.
    broken = data_of([{}, *records[1:]], out=tmp_path, data={"on_error": "skip"}, num_voco_tokens=choices)
    assert counts_of(broken[0]) == first[0]


def test_frames_of_a_video_share_a_count():
    frames = [picture(i) for i in range(6)]
    one = {"video": [frames, frames, frames, frames], "conversations": conversation("<video>" * 4 + "?", "x")}
    drawn = counts_of(data_of([one], num_voco_tokens=(1, 2, 4))[0])
    per_video = [set(drawn[i : i + 6]) for i in range(0, 24, 6)]
    assert all(len(x) == 1 for x in per_video)
    assert len(set.union(*per_video)) > 1


class Epoch(torch.nn.Module):
    """A model that notes the VoCo counts that it sees."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def forward(self, input_ids, **batch):
        self.seen.append(tuple(counts_of({"input_ids": input_ids[0]})))
        return {"loss": self.weight.square()}


class Epochs(TrainerCallback):
    """Tells the data its epoch, as `VocoTrainer` does."""

    def __init__(self, data):
        self.data = data

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.data.set_epoch(int(state.epoch or 0))


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_draws_the_same_counts(tmp_path):
    records = [record([picture(1)] * 4, "<image>" * 4 + f"{i}?") for i in range(6)]

    def run(workers, resume=None):
        model, data = Epoch(), data_of(records, num_voco_tokens=(1, 2, 4))
        arguments = TrainingArguments(
            str(tmp_path / str(workers)), per_device_train_batch_size=2, num_train_epochs=3, save_steps=5, use_cpu=True,
            report_to="none", remove_unused_columns=False, disable_tqdm=True, dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0, save_total_limit=5,
        )  # fmt: skip
        collator = VocoCollator(voco_config(text={"max_position_embeddings": 2048}))
        trainer = Trainer(model, arguments, collator, data, callbacks=[Epochs(data)])
        trainer.train(resume_from_checkpoint=resume)
        return model.seen

    whole = run(0)
    assert len(whole) == 9 and len(set(whole)) > 7
    assert run(0, str(tmp_path / "0" / "checkpoint-5")) == whole[5:]
    assert run(1) == whole


# ---- files -------------------------------------------------------------------------------------------------------------


def lines_of(records) -> bytes:
    return b"".join(json.dumps(x).encode() + b"\n" for x in records)


RECORDS = [text(0), {**text(1), "conversations": conversation("é 中", "🙂 ok", "b", "c")}, text(2)]
FORMATS = {
    "array": json.dumps(RECORDS).encode(),
    "indented, not escaped": json.dumps(RECORDS, indent=1, ensure_ascii=False).encode(),
    "array with a byte order mark": b"\xef\xbb\xbf \n" + json.dumps(RECORDS).encode(),
    "lines": lines_of(RECORDS),
    "lines with a byte order mark": b"\xef\xbb\xbf" + lines_of(RECORDS),
    "lines, some empty, the last not ended": b"\n" + lines_of(RECORDS).replace(b"\n", b"\r\n \n").rstrip(),
}


@pytest.mark.parametrize("content", FORMATS.values(), ids=FORMATS)
def test_formats_of_files(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    data = files_of(tmp_path, "a.json")
    assert len(data) == 3
    for sample, other in zip(data, data_of(RECORDS), strict=True):
        assert_same(sample, other)
    assert data.summary() == {
        "records": 3, "with images": 0, "with videos": 0, "text only": 3, "skipped at start": 0, "skipped": 0, "truncated": 0
    }  # fmt: skip


def test_several_files_one_behind_the_other(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([text(0), text(1)]))
    (tmp_path / "b.jsonl").write_bytes(lines_of([text(2)]))
    assert answers_of(files_of(tmp_path, "b.jsonl", "a.json")) == ["a2", "a0", "a1"]


def test_records_in_python_are_made_when_they_are_asked_for():
    class Lazy:
        def __init__(self):
            self.made = []

        def __len__(self):
            return 1000

        def __getitem__(self, index):
            self.made.append(index)
            return record(picture(index), answer=str(index))

    records = Lazy()
    data = data_of(records)
    assert len(data) == 1000 and not records.made
    sample = data[7]
    assert set(records.made) == {7}
    assert torch.equal(sample["pixel_values"], OURS(picture(7), "<image>")["pixel_values"])
    assert data.summary() == {"records": 1000, "skipped": 0, "truncated": 0}
    for index in (-1, 1000):
        with pytest.raises(IndexError, match=f"index must be from 0 to 999, but was {index}"):
            data[index]


WRONG = {
    "no object": ([1], "record must hold keys and values, but was list"),
    "no conversation": ({"id": 1}, "conversations must be a list of questions and answers in turn, but was None"),
    "empty": ({"conversations": []}, "conversations must be a list of questions and answers in turn, but was []"),
    "text": ({"conversations": "hi"}, "conversations must be a list of questions and answers in turn, but was 'hi'"),
    "turn": ({"conversations": ["hi"]}, "conversations[0] must hold from and value, but was 'hi'"),
    "roles": (
        {"conversations": conversation("a", "b")[::-1]},
        "conversations must hold an answer of 'gpt' to a question, but hold none",
    ),
    "same role": (
        {"conversations": conversation("a", "b")[:1] * 2},
        "conversations[1]['from'] must be 'gpt', but was 'human'",
    ),
    "two answers in front": (
        {"conversations": [{"from": "gpt", "value": "x"}] * 2 + conversation("a", "b")},
        "conversations[0]['from'] must be 'human', but was 'gpt'",
    ),
    "other role": (
        {"conversations": [{"from": "system", "value": "x"}]},
        "conversations[0]['from'] must be 'human', but was 'system'",
    ),
    "no answer": (
        {"conversations": conversation("a")},
        "conversations must hold an answer of 'gpt' to a question, but hold none",
    ),
    "number": ({"conversations": conversation("a", 5)}, "conversations[1]['value'] must be text, but was 5"),
    "no value": (
        {"conversations": [{"from": "human"}]},
        "conversations[0]['value'] must be text, but was None",
    ),
    "half a character": (
        {"conversations": conversation("a", "b\ud83d")},
        "conversations[1]['value'] must be whole characters, but was 'b\\ud83d'",
    ),
    "the other half": (
        {"conversations": conversation("a", "b\udfff")},
        "conversations[1]['value'] must be whole characters, but was 'b\\udfff'",
    ),
    "no marker": (
        record("a.png", "why?"),
        "conversations[0]['value'] must hold one <image> per image (1) at its start or end, but holds 0",
    ),
    "marker within": (
        record("a.png", "an <image> here"),
        "conversations[0]['value'] must hold one <image> per image (1) at its start or end, but holds 0",
    ),
    "too few markers": (
        record(["a.png", "b.png"], "<image>?"),
        "conversations[0]['value'] must hold one <image> per image (2) at its start or end, but holds 1",
    ),
    "video marker": (
        record("a.png", "<video>?"),
        "conversations[0]['value'] must hold one <image> per image (1) at its start or end, but holds 0",
    ),
    "no video marker": (
        {"video": "a.mp4", "conversations": conversation("?", "x")},
        "conversations[0]['value'] must hold one <video> per video (1) at its start or end, but holds 0",
    ),
    "both": ({**record("a.png"), "video": "a.mp4"}, "video must be absent where image is given, but both were given"),
    "marker without image": (record(None), "conversations[0]['value'] must not hold <image>, except for one"),
    "marker in an answer": (
        record("a.png", answer="the <image>"),
        "conversations[1]['value'] must not hold <image>, except for one",
    ),
    "one marker more": (
        record("a.png", "<image> a <image> b"),
        "conversations[0]['value'] must not hold <image>, except for one",
    ),
    "VoCo token": (
        record(None, "a", "the <voco>"),
        "conversations[1]['value'] must not hold <voco>, except for one",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_wrong_records(tmp_path, wrong, message):
    """Found at the start, in whatever place they are; the same record in Python when it is asked for."""
    (tmp_path / "images").mkdir()
    named = ["a", wrong, text(2)]
    named[0] = text(0)
    (tmp_path / "a.json").write_text(json.dumps(named))
    (tmp_path / "a.jsonl").write_bytes(b"\n" + lines_of(named))
    identity = f" (id {wrong['id']})" if isinstance(wrong, dict) and "id" in wrong else ""
    for name, place in (("a.json", "record 1"), ("a.jsonl", "line 3")):
        with pytest.raises(ValueError) as error:
            files_of(tmp_path, name, images="images")
        assert str(error.value).startswith(f"{tmp_path / name}, {place}{identity}: {message}")
    assert not (tmp_path / "out").exists()
    data = data_of(named)
    with pytest.raises(ValueError) as error:
        data[1]
    assert str(error.value).startswith(f"records, 1{identity}: {message}")
    skipping = files_of(tmp_path, "a.jsonl", images="images", on_error="skip")
    assert answers_of(skipping) == ["a0", "a2"]
    assert skipping.summary()["skipped at start"] == skipping.skipped == 1
    (line,) = report_of(skipping)
    assert line["file"] == str(tmp_path / "a.jsonl") and line["record"] == "line 3" + identity
    assert line["reason"].startswith(message)


def test_turns_without_a_partner_are_left_out():
    """An answer in front and a question at the end, which some of LLaVA's data have."""
    whole = conversation("a", "b", "c", "d")
    expected = data_of([{"conversations": whole}])[0]
    lonely = [{"from": "gpt", "value": "x"}, *whole, {"from": "human", "value": "y"}]
    assert_same(data_of([{"conversations": lonely}])[0], expected)


def test_the_report_names_the_id_of_a_record():
    with pytest.raises(ValueError, match=r"records, 0 \(id '0001'\): conversations must hold an answer"):
        data_of([{"id": "0001", "conversations": conversation("a")}])[0]


BROKEN = [b'{"conversations": [', b"\xff\xfe", b"{]", b'{"a": 1} {"b": 2}']


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_lines(tmp_path, broken):
    (tmp_path / "a.jsonl").write_bytes(lines_of([text(0)]) + broken + b"\n" + lines_of([text(1)]))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: must be JSON, but is broken: "):
        files_of(tmp_path, "a.jsonl")
    data = files_of(tmp_path, "a.jsonl", on_error="skip")
    assert answers_of(data) == ["a0", "a1"]
    assert [line["record"] for line in report_of(data)] == ["line 2"]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_broken_array_cannot_be_read_around(tmp_path, on_error):
    (tmp_path / "a.json").write_text(json.dumps([text(0), text(1)], indent=1)[:-30])
    with pytest.raises(ValueError, match=r"a\.json must be a JSON array or hold a record in each line.*line \d+ column"):
        files_of(tmp_path, "a.json", on_error=on_error)


def test_no_records(tmp_path):
    for name, content in (("empty.json", b""), ("array.json", b"[]"), ("blank.jsonl", b"\n\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"data.conversations must hold a whole record.*{name} hold none \(0 broken\)"):
            files_of(tmp_path, name)
    (tmp_path / "broken.jsonl").write_bytes(b"{]\n[1]\n" + lines_of([{"conversations": []}]))
    with pytest.raises(ValueError, match=r"broken\.jsonl hold none \(3 broken\)"):
        files_of(tmp_path, "broken.jsonl", on_error="skip")
    with pytest.raises(ValueError, match=r"data.conversations must be files, but .*none\.json cannot be read: No such file"):
        files_of(tmp_path, "none.json")
    with pytest.raises(ValueError, match="records must hold at least one"):
        data_of([])
    with pytest.raises(ValueError, match="data must be given where there are no records, but was None"):
        data_of(None)


def test_no_folder_for_images(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([text(0), record("a.png")]))
    for on_error in ("stop", "skip"):
        with pytest.raises(ValueError, match=r"data.images must be given where .*, as .*record 1 has"):
            files_of(tmp_path, "a.json", on_error=on_error)
    with pytest.raises(ValueError, match=r"data.images must be a folder or .tar shards, but .*missing is neither"):
        files_of(tmp_path, "a.json", images="missing")


# ---- images ------------------------------------------------------------------------------------------------------------


def png(seed: int) -> bytes:
    data = io.BytesIO()
    picture(seed).save(data, "PNG")
    return data.getvalue()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


# A name longer than the 100 characters of a plain header, too.
NAMES = [f"train/{i}.png" for i in range(5)] + ["long/" * 30 + "5.png"]


@pytest.fixture
def places(tmp_path) -> Path:
    """The same images in a folder and in three shards, and a conversation about each."""
    for i, name in enumerate(NAMES):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(png(i))
    for shard in range(3):
        write_tar(tmp_path / f"{shard + 8:02}.tar", {f"./{n}": png(i) for i, n in enumerate(NAMES) if i % 3 == shard})
    records = [record(name, answer=str(i)) for i, name in enumerate(NAMES)]
    records += [text(6), record([f"./{NAMES[2]}", NAMES[5]], "<image>\n<image>?", "x")]
    (tmp_path / "a.json").write_text(json.dumps(records))
    return tmp_path


@pytest.mark.parametrize("images", ["images", "{08..10}.tar"])
def test_images_of_files(places, images):
    data = files_of(places, "a.json", images=images)
    expected = [record(picture(i), answer=str(i)) for i in range(6)]
    expected += [text(6), record([picture(2), picture(5)], "<image>\n<image>?", "x")]
    for sample, other in zip(data, data_of(expected), strict=True):
        assert_same(sample, other)
    assert data.summary()["with images"] == 7 and data.summary()["text only"] == 1


def test_images_in_python(places):
    path = places / "images" / NAMES[1]
    for image in (path, str(path), picture(1), np.asarray(picture(1)), [picture(1)]):
        assert_same(data_of([record(image)])[0], data_of([record(picture(1))])[0])
    inside = data_of([record(NAMES[1])], data={"images": str(places / "images")})
    assert_same(inside[0], data_of([record(picture(1))])[0])


OUTSIDE = ["../secret.png", "a/../../secret.png", "/etc/secret.png", "..", ".", "train/.."]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("images", ["images", "{08..10}.tar"])
def test_names_that_leave_the_folder(places, images, name):
    (places / "secret.png").write_bytes(png(0))
    (places / "b.json").write_text(json.dumps([record(name, id=7)]))
    with pytest.raises(ValueError) as error:
        files_of(places, "b.json", images=images)[0]
    message = f"image and video must be paths inside of data.images, but were {name!r}"
    assert str(error.value) == f"{places / 'b.json'}, record 0 (id 7): {message}"


def cut_short(seed: int) -> bytes:
    return png(seed)[:-60]


def enormous() -> bytes:
    """A header that promises more pixels than there is memory for."""
    data = bytearray(png(0))
    data[16:24] = (1 << 30).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


DAMAGED = {
    "no image": (b"<html>", "is not an image file that Pillow can read"),
    "empty": (b"", "is not an image file that Pillow can read"),
    "cut short": (cut_short(0), "cannot be read: "),
    "enormous": (enormous(), "cannot be read: Image size"),
}


@pytest.mark.parametrize(("content", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_images(tmp_path, content, reason):
    (tmp_path / "x.png").write_bytes(content)
    write_tar(tmp_path / "x.tar", {"x.png": content})
    (tmp_path / "a.json").write_text(json.dumps([record("x.png")]))
    for images, named in ((".", f"image {tmp_path / 'x.png'}"), ("x.tar", f"image x.png in {tmp_path / 'x.tar'}")):
        with pytest.raises(ValueError) as error:
            files_of(tmp_path, "a.json", images=images)[0]
        assert str(error.value).startswith(f"{tmp_path / 'a.json'}, record 0: {named} {reason}")
    with pytest.raises(ValueError, match=r"records, 0: image .*x\.png"):
        data_of([record(tmp_path / "x.png")])[0]


def test_a_damaged_image_that_pillow_has_opened(tmp_path):
    image = Image.open(io.BytesIO(cut_short(0)))
    with pytest.raises(ValueError, match="records, 0: image .*cannot be read: "):
        data_of([record(image)])[0]


def test_missing_images(places):
    (places / "b.json").write_text(json.dumps([record("train/9.png", id="nine")]))
    with pytest.raises(ValueError, match=r"b\.json, record 0 \(id 'nine'\): image .*images/train/9\.png does not exist"):
        files_of(places, "b.json", images="images")[0]
    with pytest.raises(ValueError, match=r"image train/9\.png must be in the shards .*\{08\.\.10\}\.tar, but is in none of"):
        files_of(places, "b.json", images="{08..10}.tar")[0]


@pytest.mark.parametrize("image", [5, {"path": "a.png"}, [[1]]])
def test_what_is_no_image(tmp_path, image):
    (tmp_path / "a.json").write_text(json.dumps([record(image)]))
    with pytest.raises(ValueError, match="record 0: image must be a PIL image, a path or a uint8 array, but was"):
        files_of(tmp_path, "a.json", images=".")[0]


def test_patterns_of_shards():
    assert [str(x) for x in shards_of("a/{008..010}-{1..2}.tar")] == [
        f"a/{i}-{j}.tar" for i in ("008", "009", "010") for j in (1, 2)
    ]
    assert [str(x) for x in shards_of("{98..101}.tar")] == ["98.tar", "99.tar", "100.tar", "101.tar"]
    assert shards_of("one.tar") == [Path("one.tar")]
    with pytest.raises(ValueError, match=r"shards must be numbered upwards, but the pattern was \{3\.\.1\}\.tar"):
        shards_of("{3..1}.tar")


def test_shards_that_cannot_be_used(tmp_path):
    whole = write_tar(tmp_path / "0.tar", {f"{i}.png": png(i) for i in range(3)})
    with pytest.raises(ValueError, match=r"shard .*1\.tar does not exist"):
        Shards(tmp_path / "{0..1}.tar")
    (tmp_path / "1.tar").write_bytes(whole.read_bytes())
    with pytest.raises(ValueError, match=r"hold a name once, but 0\.png is in .*0\.tar and again in .*1\.tar"):
        Shards(tmp_path / "{0..1}.tar")
    write_tar(tmp_path / "zipped.tar", {"0.png": png(0)}, "w:gz")
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "text.tar").write_bytes(b"text" * 500)
    (tmp_path / "empty.tar").write_bytes(b"")
    for name in ("zipped", "cut", "text", "empty"):
        with pytest.raises(ValueError, match=rf"shard .*{name}\.tar must be a tar file that is not compressed, but cannot"):
            Shards(tmp_path / f"{name}.tar")
    shards = Shards(whole)
    whole.write_bytes(whole.read_bytes()[:2700])
    with pytest.raises(ValueError, match=r"shard .*0\.tar must be whole, but ends within 2\.png"):
        shards.image("2.png")


def test_a_video_of_a_shard_is_whole_in_its_file_while_it_is_read(tmp_path):
    shards = Shards(write_tar(tmp_path / "0.tar", {"a/short.mp4": b"short"}))
    with shards.video("a/short.mp4") as path:
        assert path.read_bytes() == b"short" and path.suffix == ".mp4"
    assert not path.exists()


def test_links_in_shards_are_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(0))
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, kind in (("soft.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(tmp_path / "secret.png")
            archive.addfile(member)
        # Nor are holes filled: what lies in the archive is not the file.
        member = tarfile.TarInfo("holes.png")
        member.size, member.pax_headers = len(png(0)), {"GNU.sparse.map": "0,9", "GNU.sparse.size": "999"}
        archive.addfile(member, io.BytesIO(png(0)))
    for name in ("soft.png", "hard.png", "holes.png"):
        with pytest.raises(ValueError, match="is in none of them"):
            Shards(tmp_path / "0.tar").image(name)


# ---- conversations in shards -------------------------------------------------------------------------------------------


def as_json(x) -> bytes:
    return json.dumps(x).encode()


def test_webdataset_samples(tmp_path):
    """`key.jpg` and `key.json` side by side; whatever the JSON says about its image, the one of the same key is its own."""
    about = record("lost/name.jpg", answer="a", video="lost/name.mp4")
    write_tar(tmp_path / "0.tar", {"s/1.json": as_json(about), "s/1.png": png(1), "s/1.txt": b"ignored"})
    # The key of a name ends at its first dot.
    write_tar(tmp_path / "2.tar", {"s/1.meta.json": b"ignored", "s/1.mask.png": b"ignored"})
    second = {"s/2.PNG": png(2), "s/2.json": as_json(record(None, answer="b")), "3.json": as_json(text(3)), "4.png": png(4)}
    # The same file name in another folder, and an image that the JSON names itself.
    write_tar(tmp_path / "1.tar", second | {"t/1.json": as_json(record("4.png", answer="c"))})
    data = files_of(tmp_path, "{0..2}.tar")
    expected = [record(picture(i), answer=x) for i, x in ((1, "a"), (2, "b"))]
    expected += [text(3), record(picture(4), answer="c")]
    for sample, other in zip(data, data_of(expected), strict=True):
        assert_same(sample, other)
    assert data.summary()["with images"] == 3


def test_shards_beside_other_files(places):
    write_tar(places / "w.tar", {"1.json": as_json(record(None, answer="w")), "1.png": png(9)})
    data = files_of(places, "w.tar", "a.json", images="images")
    assert_same(data[0], data_of([record(picture(9), answer="w")])[0])
    assert_same(data[1], data_of([record(picture(0), answer="0")])[0])


def test_shards_of_conversations_have_their_own_images(tmp_path):
    for i, name in enumerate("ab"):
        write_tar(tmp_path / f"{name}.tar", {"1.json": as_json(record(None, answer=name)), "1.png": png(i)})
    data = files_of(tmp_path, "a.tar", "b.tar")
    for sample, other in zip(data, data_of([record(picture(i), answer="ab"[i]) for i in range(2)]), strict=True):
        assert_same(sample, other)


def test_webdataset_samples_that_are_broken(tmp_path):
    good = as_json(record(None))
    members = {
        "0.json": b"{]",
        "1.json": good,
        "1.png": png(1),
        "1.jpg": png(1),
        "2.json": good,
        "3.png": b"no image",
        "3.json": good,
        "4.json": as_json(text(4)),
        "5.json": as_json([1]),
        "5.png": png(5),
    }
    write_tar(tmp_path / "0.tar", members)
    data = files_of(tmp_path, "0.tar", on_error="skip")
    # The third cannot be read, and the next one stands in for it.
    assert answers_of(data) == ["a4", "a4"]
    lines = {line["record"]: line["reason"] for line in report_of(data)}
    assert {line["file"] for line in report_of(data)} == {str(tmp_path / "0.tar")}
    assert lines["0.json"].startswith("must be JSON, but is broken: ")
    assert lines["1.json"] == "key 1 must have one image or video, but has 1.png, 1.jpg"
    assert lines["2.json"].startswith("conversations[0]['value'] must not hold <image>")
    assert lines["3.json"].startswith(f"image 3.png in {tmp_path / '0.tar'} is not an image file")
    assert lines["5.json"] == "record must hold keys and values, but was list"
    assert len(lines) == 5 and data.summary()["skipped at start"] == 4 and data.skipped == 5


# ---- videos ------------------------------------------------------------------------------------------------------------


def test_frames_in_python():
    frames = [picture(i) for i in range(5)]
    turns = conversation("<video>\n?", "x")
    given = [{"video": [frames], "conversations": turns}]
    expected = data_of([{"image": frames, "conversations": conversation("<image>" * 5 + "?", "x")}])[0]
    sample = data_of(given)[0]
    assert torch.equal(sample["pixel_values"], expected["pixel_values"])
    assert counts_of(sample) == [2] * 5
    # In the prompt, frames stand side by side where images have a line each.
    assert len(sample["input_ids"]) < len(expected["input_ids"])
    array = np.stack([np.asarray(frame) for frame in frames])
    assert_same(data_of([{"video": array, "conversations": turns}])[0], sample)
    middle = data_of(given, data={"video": VideoConfig(num_frames=1)})[0]
    assert torch.equal(middle["pixel_values"], expected["pixel_values"][2:3])
    with pytest.raises(ValueError, match="records, 0: fps must be None for frames without timestamps, but was 2"):
        data_of(given, data={"video": VideoConfig(fps=2.0)})[0]
    with pytest.raises(ValueError, match="records, 0: video must hold at least one frame, but holds none"):
        data_of([{"video": [[]], "conversations": turns}])[0]


def test_video_files(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=2)
        stream.width = stream.height = EDGE
        stream.pix_fmt = "bgr0"
        for i in range(8):
            container.mux(stream.encode(av.VideoFrame.from_image(picture(i)).reformat(format="bgr0")))
        container.mux(stream.encode())
    clip = (tmp_path / "clip.mkv").read_bytes()
    write_tar(tmp_path / "v.tar", {"clip.mkv": clip, "cut.mkv": clip[:600]})
    write_tar(tmp_path / "w.tar", {"a.mkv": clip, "a.json": as_json({"conversations": conversation("<video>?", "x")})})
    (tmp_path / "cut.mkv").write_bytes(clip[:600])
    for name in ("clip", "cut", "none"):
        one = {"video": f"{name}.mkv", "conversations": conversation("<video>?", "x")}
        (tmp_path / f"{name}.json").write_text(json.dumps([one]))
    every = [picture(i) for i in range(8)]
    # By default a frame a second.
    for video, taken in (({}, every[::2]), ({"fps": 2.0}, every), ({"num_frames": 2}, [every[2], every[6]])):
        expected = data_of([{"video": [taken], "conversations": conversation("<video>?", "x")}])[0]
        settings = {"video": VideoConfig(**video)}
        assert_same(files_of(tmp_path, "clip.json", images=".", **settings)[0], expected)
        assert_same(files_of(tmp_path, "clip.json", images="v.tar", **settings)[0], expected)
        assert_same(files_of(tmp_path, "w.tar", **settings)[0], expected)
    assert files_of(tmp_path, "w.tar").summary()["with videos"] == 1
    for images in (".", "v.tar"):
        with pytest.raises(ValueError, match=r"cut\.json, record 0: video .*mkv"):
            files_of(tmp_path, "cut.json", images=images)[0]
        with pytest.raises(ValueError, match=r"none\.json, record 0: video .*none\.mkv (does not exist|must be in)"):
            files_of(tmp_path, "none.json", images=images)[0]


# ---- broken records ----------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(places) -> Path:
    """`places`, of whose eight records those with images 1, 2 and 5 cannot be read, and so not the last one either."""
    for i, content in ((1, b"x"), (2, png(2)[:-60]), (5, None)):
        path = places / "images" / NAMES[i]
        path.write_bytes(content) if content is not None else path.unlink()
    return places


def test_another_record_stands_in_for_a_broken_one(damaged):
    data = files_of(damaged, "a.json", images="images", on_error="skip")
    assert answers_of(data) == ["0", "3", "3", "3", "4", "a6", "a6", "0"]
    assert answers_of(data) == ["0", "3", "3", "3", "4", "a6", "a6", "0"]
    assert data.skipped == 4 and data.summary()["skipped"] == 4 and data.summary()["skipped at start"] == 0
    lines = report_of(data)
    assert [line["record"] for line in lines] == ["record 1", "record 2", "record 5", "record 7"], "once each"
    assert all(line.keys() == {"record", "file", "reason"} and line["file"] == str(damaged / "a.json") for line in lines)
    assert [line["reason"].split(NAMES[i] + " ")[1][:7] for i, line in zip((1, 2, 5), lines)] == [
        "is not ", "cannot ", "does no"
    ]  # fmt: skip
    # Whatever came first.
    assert answers_of([files_of(damaged, "a.json", images="images", on_error="skip")[1]]) == ["3"]


def test_a_run_that_goes_on_notes_nothing_twice(damaged):
    (damaged / "b.jsonl").write_bytes(b"{]\n" + lines_of(json.loads((damaged / "a.json").read_text())))
    found = []
    for _ in range(2):
        data = files_of(damaged, "b.jsonl", images="images", on_error="skip")
        assert data.skipped == 1 and len(list(data)) == 8 and data.skipped == 5
        found.append([line["record"] for line in report_of(data)])
    assert found[0] == found[1] == ["line 1", "line 3", "line 4", "line 7", "line 9"]
    # What was not there then is added.
    (damaged / "images" / NAMES[0]).unlink()
    list(files_of(damaged, "b.jsonl", images="images", on_error="skip"))
    assert [line["record"] for line in report_of(data)] == [*found[0], "line 2"]


def test_a_broken_record_stops_the_run(damaged):
    data = files_of(damaged, "a.json", images="images")
    assert len(data) == 8 and data[0] is not None
    with pytest.raises(ValueError, match=rf"a\.json, record 1: image .*{NAMES[1]} is not an image"):
        data[1]
    assert not data.report.exists()


def test_nothing_can_be_read(damaged):
    (damaged / "b.json").write_text(json.dumps([record(NAMES[1]), record(NAMES[5])]))
    data = files_of(damaged, "b.json", images="images", on_error="skip")
    with pytest.raises(ValueError, match=r"records must hold one that can be read, but all 2 are broken; .*skipped\.jsonl"):
        data[1]
    assert len(report_of(data)) == 2


def test_records_in_python_are_skipped_too(tmp_path):
    records = [{"conversations": conversation("a")}, record(tmp_path / "none.png"), text(2)]
    data = data_of(records, out=tmp_path, data={"on_error": "skip"})
    assert answers_of(data) == ["a2"] * 3
    assert [(line["file"], line["record"]) for line in report_of(data)] == [("records", "0"), ("records", "1")]


# ---- samples that are too long -----------------------------------------------------------------------------------------


def test_long_samples_lose_text_at_the_end():
    records = [record(picture(1), answer="a long answer", id="x"), text(1)]
    whole = data_of(records)[0]
    length, first = len(whole["input_ids"]), int((whole["labels"] >= 0).nonzero().min())
    for limit in (length, length - 1, first + 1):
        data = data_of(records, data={"max_length": limit})
        assert data.truncated == 0
        sample = data[0]
        for name in ("input_ids", "labels"):
            assert torch.equal(sample[name], whole[name][:limit])
            # What is cut off takes no memory on the way to another process.
            assert sample[name].untyped_storage().nbytes() == 8 * limit
        assert torch.equal(sample["pixel_values"], whole["pixel_values"])
        data[0]
        assert data.truncated == data.summary()["truncated"] == (limit < length)
        assert data.skipped == 0


def test_long_samples_that_keep_no_answer(tmp_path):
    records = [record([picture(1), picture(2)], "<image><image>?"), text(1)]
    whole = data_of(records)[0]
    first = int((whole["labels"] >= 0).nonzero().min())
    images = int((whole["input_ids"] == VOCO).nonzero().max()) + 1
    no_answer = f"an answer must begin within data.max_length ({{}} tokens), but the first is at {first}"
    cut = f"images must fit data.max_length ({{}} tokens), but need {images}"
    for limit, reason in ((first, no_answer), (images, no_answer), (images - 1, cut), (VISION, cut)):
        data = data_of(records, data={"max_length": limit})
        with pytest.raises(ValueError) as error:
            data[0]
        assert str(error.value) == "records, 0: " + reason.format(limit)
        assert data.truncated == 0
    skipping = data_of([*records, record(picture(3))], out=tmp_path, data={"max_length": first, "on_error": "skip"})
    # Text alone is short enough, and no image is cut.
    assert "pixel_values" not in skipping[0] and skipping.skipped == 1


def test_the_context_of_the_model_cuts_where_it_is_shorter():
    (one,) = records = [record(picture(1), answer="a long answer")]
    whole = data_of(records)[0]["input_ids"]
    config = TrainingConfig("model", Path("unused"), DataConfig((), max_length=len(whole) - 2))
    for context, length in ((len(whole) - 3, len(whole) - 3), (len(whole) - 1, len(whole) - 2), (None, len(whole) - 2)):
        data = ConversationDataset.of(config, OURS, [one], 0, context)
        assert data[0]["input_ids"].equal(whole[:length]) and data.truncated == 1
    with pytest.raises(ValueError, match=r"images must fit the model's context \(5 tokens\), but need"):
        ConversationDataset.of(config, OURS, [one], 0, 5)[0]


def test_processes_tell_each_other_what_they_skipped_and_cut(tmp_path):
    records = [text(0), {"conversations": []}, text(2), text(3)]
    long = len(data_of(records)[0]["input_ids"]) - 1
    first, second = (data_of(records, out=tmp_path, data={"max_length": long, "on_error": "skip"}) for _ in range(2))
    first[1], second[2], second[1]
    assert (first.skipped, first.truncated, second.skipped, second.truncated) == (1, 1, 1, 1)
    others = iter((second._skipped, second._truncated))
    first.gather(lambda counts: counts + next(others))
    # The next record stood in for the broken one, so both cut the same.
    assert first.summary() == {"records": 4, "skipped": 1, "truncated": 1}
    first[3]
    first.gather(lambda counts: counts)
    assert first.truncated == 2


# ---- processors that cannot be trained with ----------------------------------------------------------------------------


def refused(proc: VocoProcessor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data_of([text(0)], proc=proc)


def test_a_template_whose_answers_do_not_end():
    endless = processor(chat_template=OURS.chat_template.replace("</s>", ""))
    refused(endless, r"must end each answer with '</s>', but renders")
    later = processor(chat_template=OURS.chat_template.replace("</s>", "{% if loop.index > 2 %}</s>{% endif %}"))
    refused(later, r"must end each answer with '</s>', but renders")


def test_a_template_that_renders_a_beginning_differently():
    last = "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m['content'][-1]['text'] }}</s>{% endfor %}"
    # A prompt that is not how the answer begins, and an end that goes away when the conversation goes on.
    ours, ends = OURS.chat_template, "{% if message['role'] == 'assistant' %}</s>{% endif %}"
    asked = ours.replace("%} ASSISTANT:{%", "%} ASSISTANT-{%")
    over = ours.replace(ends, ends + "{% if loop.last and message['role'] == 'assistant' %}!{% endif %}")
    assert ours not in (asked, over)
    for template in (last, asked, over):
        message = "chat_template must render a conversation as its beginning and then the rest"
        refused(processor(chat_template=template), message)


def test_a_template_with_images_behind_answers():
    behind = processor(chat_template=OURS.chat_template + "{% if messages[3] %}<image>{% endif %}")
    refused(behind, "with one marker per image before the first answer")
    without = processor(chat_template=OURS.chat_template.replace("<image>", ""))
    refused(without, "with one marker per image before the first answer")


def rules_of_tokenizer() -> dict:
    return json.loads(tokenizer().backend_tokenizer.to_str())


def with_rules(rules: dict, **options) -> VocoProcessor:
    changed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(rules)),
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>", "voco_token": "<voco>"},
    )
    own = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return VocoProcessor(image_processor(), changed, **own, **options)


JOINED = r"tokenizer must end a token where an answer begins and where it ends, but joins "


def test_a_tokenizer_that_joins_question_and_answer():
    rules = rules_of_tokenizer()
    rules["model"]["vocab"][":▁"] = len(tokenizer())
    rules["model"]["merges"] = [[":", "▁"]]
    refused(with_rules(rules), JOINED + "'SSISTANT: two</s>U'")


def test_a_tokenizer_that_joins_an_answer_and_the_next_question():
    """An end token that takes the space behind it, which here belongs to the question."""
    rules = rules_of_tokenizer()
    (end,) = [token for token in rules["added_tokens"] if token["content"] == "</s>"]
    end["rstrip"] = True
    spaced = OURS.chat_template.replace("'USER: '", "' USER: '")
    assert spaced != OURS.chat_template
    refused(with_rules(rules, chat_template=spaced), JOINED + "': two</s> USER: th'")


def test_a_slow_tokenizer(monkeypatch):
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    refused(OURS, "tokenizer must be a fast one")


# ---- data loaders ------------------------------------------------------------------------------------------------------


def collate(samples):
    return samples


def loaded(data, workers: int, **options) -> list[dict]:
    loader = DataLoader(data, batch_size=2, num_workers=workers, collate_fn=collate, **options)
    return [sample for batch in loader for sample in batch]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.full)])
@pytest.mark.parametrize("images", ["images", "{08..10}.tar"])
def test_workers(places, images, start):
    """The same samples from any number of processes, which share counts and epoch with the one that asks."""
    (places / "images" / NAMES[1]).write_bytes(b"x")
    write_tar(places / "08.tar", {NAMES[0]: png(0), NAMES[3]: b"x"})
    settings = {"images": images, "on_error": "skip", "max_length": 214}
    data, alone = (files_of(places, "a.json", **settings) for _ in range(2))
    for dataset in (data, alone):
        dataset.choices = (1, 2, 4)
    loader = DataLoader(
        data, 2, num_workers=2, collate_fn=collate, persistent_workers=True, multiprocessing_context=start
    )
    alone_loader = DataLoader(alone, 2, collate_fn=collate)
    epochs = []
    for epoch in range(3):
        for dataset in (data, alone):
            dataset.set_epoch(epoch)
        got, expected = ([x for batch in batches for x in batch] for batches in (loader, alone_loader))
        for sample, other in zip(got, expected, strict=True):
            assert_same(sample, other)
        epochs.append([counts_of(sample) for sample in got])
    assert epochs[0] != epochs[1] != epochs[2]
    assert (data.skipped, data.truncated) == (alone.skipped, alone.truncated)
    assert data.skipped == 2 and data.truncated > 1
    unreadable = "record 1" if images == "images" else "record 3"
    assert {line["record"] for line in report_of(data)} == {unreadable, "record 7"}, "the last one is too long"


def test_an_error_in_a_worker_says_where(damaged):
    with pytest.raises(ValueError, match=r"a\.json, record 1: image "):
        loaded(files_of(damaged, "a.json", images="images"), 1)


def _append(dataset, index, barrier):
    barrier.wait()
    for i in range(50):
        dataset._note(dataset._record(0)[1]._replace(record=f"{index} {i}"), "x" * 3000)


def test_lines_of_many_processes(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([text(0)]))
    data, context = files_of(tmp_path, "a.json", on_error="skip"), multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    writers = [context.Process(target=_append, args=(data, i, barrier)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {line["record"] for line in report_of(data)} == {f"{i} {j}" for i in range(4) for j in range(50)}


def test_a_data_set_can_be_pickled(places):
    for images in ("images", "{08..10}.tar"):
        data = files_of(places, "a.json", images=images)
        for sample, other in zip(pickle.loads(pickle.dumps(data)), data, strict=True):
            assert_same(sample, other)


# ---- batches -----------------------------------------------------------------------------------------------------------


def test_samples_make_a_batch_and_stay_as_they_are():
    data = data_of([record(picture(1)), text(1), record([picture(2), picture(3)], "<image><image>?")])
    samples = list(data)
    # A label on a first token would be that of the document before.
    samples[1]["labels"][0] = 7
    before = [{name: x.clone() for name, x in sample.items()} for sample in samples]
    batch = VocoCollator(voco_config(text={"max_position_embeddings": 2048}))(samples)
    for sample, other in zip(samples, before):
        assert_same(sample, other)
    assert batch["pixel_values"].shape[0] == 3
    assert batch["labels"][0, len(samples[0]["labels"])] == -100
    learnt = sum(int((sample["labels"] >= 0).sum()) for sample in samples) - 1
    assert int((batch["labels"] >= 0).sum()) == learnt
    only = VocoCollator(voco_config(text={"max_position_embeddings": 2048}))(samples[1:2])
    assert samples[1]["labels"][0] == 7 and only["labels"][0, 0] == -100


def test_each_sample_of_a_batch_may_fill_the_context():
    samples = list(data_of([text(0), text(1)]))
    length = len(samples[0]["input_ids"])
    fitting = VocoCollator(voco_config(text={"max_position_embeddings": length}))(samples)
    assert fitting["position_ids"].max() == length - 1 and fitting["input_ids"].shape == (1, 2 * length)
    with pytest.raises(ValueError, match=f"the context of {length - 1} positions, but reach position {length - 1}"):
        VocoCollator(voco_config(text={"max_position_embeddings": length - 1}))(samples)


def test_batches_of_samples_that_do_not_fit():
    collator = VocoCollator(voco_config(text={"max_position_embeddings": 2048}))
    good = data_of([record(picture(1))])[0]
    pixels = good["pixel_values"]
    ids, labels = torch.tensor([5, 6]), torch.tensor([5, 6])
    wrong = {
        r"samples\[1\]\['input_ids'\] must be int64 \[S\] with S of at least 1, but was torch.int64 \[0\]": {
            "input_ids": ids[:0], "labels": labels[:0]
        },
        r"samples\[1\]\['input_ids'\] must be int64 .* but was torch.float32 \[2\]": {
            "input_ids": ids.float(), "labels": labels
        },
        r"samples\[1\]\['labels'\] must be of the shape of its input_ids, int64, but was torch.float32 \[2\] for \[2\]": {
            "input_ids": ids, "labels": labels.float()
        },
        r"samples\[1\]\['pixel_values'\] must be like .* torch.float32 \[images, 3, 12, 12\], but was torch.float16": {
            "input_ids": ids, "labels": labels, "pixel_values": pixels.half()
        },
        r"samples\[1\]\['pixel_values'\] must be like .* but was torch.float32 \[1, 3, 8, 12\]": {
            "input_ids": ids, "labels": labels, "pixel_values": pixels[:, :, :8]
        },
    }  # fmt: skip
    for message, sample in wrong.items():
        with pytest.raises(ValueError, match=message):
            collator([good, sample])
    with pytest.raises(ValueError, match=r"samples\[0\]\['pixel_values'\] must be floating point \[images, 3, H, W\]"):
        collator([{**good, "pixel_values": pixels[0]}])
    with pytest.raises(ValueError, match="samples must hold at least one, but hold none"):
        collator([])
