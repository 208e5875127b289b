"""The comparison of systems on digits: the task, scoring, tables by hand, and runs that are killed and go on."""

import io
import itertools
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from voco_llama import VocoProcessor
from voco_llama.demo import dataset
from voco_llama.demo.digits import KINDS as KINDS_OF_DEMO
from voco_llama.demo.digits import DigitsTask, Question, load_digits
from voco_llama.retention import plots, results, runs, tables
from voco_llama.retention.__main__ import main
from voco_llama.retention.build import PATCH, VISION, build_model, build_processor
from voco_llama.retention.plan import COUNTS, ELASTIC, FULL, SMOKE, Run, Settings, all_runs, smoke_runs
from voco_llama.retention.results import LOWER, UPPER, Scores, row_of
from voco_llama.retention.task import (
    CELL,
    CELLS,
    COLUMNS,
    EDGE,
    INK,
    KINDS,
    LINES,
    MOST,
    STEP,
    Box,
    Conversations,
    RetentionTask,
    heldout,
    iou,
    is_right,
    question_prior,
)
from voco_llama.retention.tower import Cells
from voco_llama.training import TrainingConfig
from voco_llama.training.dataset import ConversationDataset
from voco_llama.training.trainer import VocoTrainer

# ---- the task ----------------------------------------------------------------------------------------------------------


def answer_by_hand(sample, question: Question) -> str:
    """The answer from the digits and the pixels of a sample alone."""
    grid = np.array(sample.digits).reshape(-1, COLUMNS)
    words = question.text.split()
    if question.kind == "position":
        return str(grid[int(words[5]) - 1, int(words[7]) - 1])
    if question.kind == "region":
        left, top, right, bottom = (STEP * int(word) for word in words[-4:])
        return str(grid[(top + bottom) // 2 // CELL, (left + right) // 2 // CELL])
    digit = int(words[-1])
    where = np.argwhere(grid == digit)
    if question.kind == "count":
        return str(len(where))
    if question.kind == "presence":
        return "yes" if len(where) else "no"
    assert len(where) == 1
    row, column = where[0]
    if question.kind == "neighbour":
        down, right = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}[words[3]]
        return str(grid[row + down, column + right])
    pixels = np.array(sample.image.convert("L"))[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
    rows, columns = np.nonzero((pixels >= INK).any(1))[0], np.nonzero((pixels >= INK).any(0))[0]
    x, y = column * CELL, row * CELL
    low = (x + columns.min()) // STEP, (y + rows.min()) // STEP
    high = -(-(x + columns.max() + 1) // STEP), -(-(y + rows.max() + 1) // STEP)
    return " ".join(map(str, low + high))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_are_those_of_the_image(split):
    task, seen = RetentionTask(split), Counter()
    for i in range(80):
        sample = task.sample((5, i), each=2)
        assert len(set(sample.questions)) == len(sample.questions)
        assert max(Counter(question.kind for question in sample.questions).values()) == 2
        for question in sample.questions:
            assert question.answer == answer_by_hand(sample, question), question
            seen[question.kind] += 1
    assert set(seen) == set(KINDS) and min(seen.values()) > 80


def test_answers_are_balanced():
    samples = heldout(6 * 300)
    answers = {kind: Counter() for kind in KINDS}
    for i, sample in enumerate(samples):
        (question,) = sample.questions
        assert question.kind == KINDS[i % 6]
        shown = sample.digits.index(int(question.text.split()[-1])) if question.kind == "locate" else question.answer
        answers[question.kind][shown] += 1
    for kind, counts in answers.items():
        choices = {"count": MOST + 1, "presence": 2, "locate": CELLS}.get(kind, 10)
        expected = 300 / choices
        assert len(counts) == choices
        # Within five standard deviations of the uniform distribution.
        assert all(abs(n - expected) < 5 * expected**0.5 for n in counts.values()), (kind, counts)
        assert question_prior(kind) == pytest.approx(1 / (9 if kind == "neighbour" else choices))


def test_a_neighbour_is_none_of_the_digits_asked_about():
    for i in range(60):
        (question,) = RetentionTask("heldout").sample(i, ("neighbour",)).questions
        assert question.answer != question.text.split()[-1]


def test_boxes_are_not_given_by_the_cell():
    """The best box for all cells alike bounds what one gets who knows only the cell."""
    side = CELL // STEP
    boxes = []
    for sample in heldout(40):
        for cell, b in enumerate(sample.boxes):
            x, y = cell % COLUMNS * side, cell // COLUMNS * side
            boxes.append(Box(b.left - x, b.top - y, b.right - x, b.bottom - y))
    assert all(0 <= b.left < b.right <= side and 0 <= b.top < b.bottom <= side for b in boxes)
    guesses = [Box(x, y, x + w, y + h) for x, y, w, h in itertools.product(range(4), range(4), range(3, 7), range(4, 8))]
    assert max(np.mean([iou(guess, b) > 0.5 for b in boxes]) for guess in guesses) < 0.7


def test_samples_are_reproducible_and_splits_are_apart():
    a, b = (RetentionTask("train").sample((3, 1)) for _ in range(2))
    assert a.image.tobytes() == b.image.tobytes() and a.questions == b.questions
    assert RetentionTask("train").sample((3, 2)).image.tobytes() != a.image.tobytes()
    task = RetentionTask("heldout")
    assert all(x is y for x, y in zip(task.scans, load_digits("heldout"), strict=True)) and not task.augment


def test_training_conversations_end_with_the_reading():
    data = Conversations(3, (0, 1))
    assert len(data) == 3
    turns = data[1]["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
    assert turns[0]["value"].startswith("<image>\n") and "<image>" not in turns[2]["value"]
    assert len(turns[-1]["value"].split()) == CELLS


def test_every_word_has_a_token():
    processor = build_processor()
    texts = [turn["value"] for i in range(40) for turn in Conversations(40, (2,))[i]["conversations"]]
    texts += [sample.questions[0].text for sample in heldout(60)]
    ids = processor.tokenizer([processor.prompt(text.removeprefix("<image>\n"), 0) for text in texts]).input_ids
    assert processor.tokenizer.unk_token_id not in {i for row in ids for i in row}
    words = [processor.tokenizer(f"{a} {b}", add_special_tokens=False).input_ids for a, b in ((0, LINES - 1), (12, 1))]
    assert [len(row) for row in words] == [2, 2] and processor.tokenizer.decode(words[1]) == "12 1"


def test_models_see_the_image_as_it_is():
    processor = build_processor()
    config = build_model(processor.tokenizer).config
    image = heldout(1)[0].image
    pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose(pixels.permute(1, 2, 0), np.array(image) / 127.5 - 1, atol=1e-6)
    assert VISION == processor.num_image_tokens == config.image_seq_length == 64
    # What the GPU kernels take.
    assert config.text_config.hidden_size // config.text_config.num_attention_heads >= 32


def test_the_tower_learns_the_cell_of_each_vision_token():
    cells = Cells(4, build_processor().image_processor, PATCH, (1, 2))
    item, sample = cells[3], RetentionTask("train").sample((1, 2, 3), ("position",))
    side = EDGE // PATCH
    for token in range(side**2):
        cell = (token // side * PATCH // CELL) * COLUMNS + token % side * PATCH // CELL
        assert item["labels"][:, token].tolist() == [sample.digits[cell], cell, *sample.boxes[cell]]


# ---- scoring -----------------------------------------------------------------------------------------------------------


@st.composite
def boxes(draw):
    left, top = draw(st.integers(0, 8)), draw(st.integers(0, 8))
    return Box(left, top, left + draw(st.integers(1, 6)), top + draw(st.integers(1, 6)))


@given(boxes(), boxes())
def test_iou_counts_squares(a, b):
    def squares(box):
        return {(x, y) for x in range(box.left, box.right) for y in range(box.top, box.bottom)}

    assert iou(a, b) == pytest.approx(len(squares(a) & squares(b)) / len(squares(a) | squares(b)))


@pytest.mark.parametrize(
    ("given_text", "right"),
    [
        ("2 2 6 6", True),
        ("2 2 6 5", True),  # 12 of 16
        ("2 2 6 4", False),  # 8 of 16: not above 0.5
        ("2 2 6", False),
        ("2 2 6 6 6", False),
        ("6 6 2 2", False),
        ("2 2 x 6", False),
        ("2 2 -6 6", False),
        ("", False),
    ],
)
def test_a_box_is_right_above_half(given_text, right):
    assert is_right(Question("locate", "where is the 3", "2 2 6 6"), given_text) is right


def test_other_answers_are_right_as_words():
    question = Question("count", "how often is there a 3", "4")
    assert is_right(question, " 4 ") and not is_right(question, "3") and not is_right(question, "4 4")


# ---- tables from numbers worked out by hand ----------------------------------------------------------------------------


def scores_of(hits: int | dict[str, int], total: int = 100) -> dict:
    hits = hits if isinstance(hits, dict) else dict.fromkeys(KINDS, hits)
    return {kind: {"hits": hits[kind], "total": total} for kind in KINDS}


def result_of(system: str, counts: tuple[int, ...], seed: int, evaluations, settings: Settings = FULL) -> dict:
    return {
        "system": system,
        "counts": list(counts),
        "seed": seed,
        "smoke": settings.smoke,
        "evaluations": [{"system": name, "tokens": tokens, "scores": scores} for name, tokens, scores in evaluations],
        "losses": [[50, 1.0]],
        "seconds": {"training": 60.0, "evaluation": 6.0},
        "digest": settings.digest,
        "settings": json.loads(json.dumps(settings.to_dict())),
        "machine": {"device": "a CPU", "torch": "2.13.0", "commit": "0123456789abcdef", "date": "2026-01-02T03:04:05"},
    }


def bounds_of(seed: int, upper=90, lower=10) -> dict:
    shares = {"upper_bound": upper, "lower_bound": lower, "full_caching": upper}
    return result_of("upper_bound", (1,), seed, [(name, 1, scores_of(hits)) for name, hits in shares.items()])


def by_hand() -> list[dict]:
    return [
        bounds_of(0),
        bounds_of(1, upper=80, lower=20),
        # (50 - 10) / 80 = 0.5 and (65 - 20) / 60 = 0.75: 62.5, sample standard deviation 17.68.
        result_of("voco", (1,), 0, [("voco", 1, scores_of(50))]),
        result_of("voco", (1,), 1, [("voco", 1, scores_of(65))]),
        # (70 - 10) / 80
        result_of("voco", (16,), 0, [("voco", n, scores_of(30 + n)) for n in (1, 2, 4, 8)] + [("voco", 16, scores_of(70))]),
        result_of("voco", ELASTIC, 0, [("voco", n, scores_of(58)) for n in ELASTIC]),
    ]


def test_rates_are_those_of_each_seed():
    scores = Scores(by_hand())
    value = scores.retention(row_of("voco", 1), ("count", "locate"))
    assert (value.mean, value.spread, value.seeds) == pytest.approx((0.625, 0.25 / 2**0.5, 2))
    value = scores.accuracy(row_of("voco", 1), ("count",))
    assert (value.mean, value.spread, value.seeds) == pytest.approx((0.575, 0.15 / 2**0.5, 2))
    assert scores.retention(UPPER, KINDS).mean == 1 and scores.retention(LOWER, KINDS).mean == 0
    assert scores.accuracy(row_of("q_former", 1), KINDS) is None
    assert Scores(by_hand()[2:]).retention(row_of("voco", 1), KINDS) is None


def test_a_mean_gives_each_kind_the_same_weight():
    mixed = {**scores_of(10), "count": {"hits": 300, "total": 300}}
    scores = Scores([result_of("voco", (1,), 0, [("voco", 1, mixed)])])
    assert scores.accuracy(row_of("voco", 1), ("count", "locate")).mean == pytest.approx(0.55)


def test_bounds_that_are_too_close_have_no_rate():
    """Three standard errors of 10 against 24 of 100 are 0.157 for one kind of question and 0.078 for the mean of four."""
    scores = Scores([bounds_of(0, upper=24), result_of("voco", (1,), 0, [("voco", 1, scores_of(17))])])
    assert scores.retention(row_of("voco", 1), ("count",)) == "bounds too close"
    assert scores.retention(row_of("voco", 1), KINDS[:4]).mean == pytest.approx(0.5)
    # 0.162 against 0.18.
    scores = Scores([bounds_of(0, upper=28), result_of("voco", (1,), 0, [("voco", 1, scores_of(19))])])
    assert scores.retention(row_of("voco", 1), ("count",)).mean == pytest.approx(0.5)


def cells_of(text: str, title: str) -> list[list[str]]:
    """Rows of the table under a heading."""
    part = text.split(f"## {title}")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_tables_are_those_worked_out_by_hand():
    text = tables.markdown(Scores(by_hand()))
    assert [int(n) for n in re.findall(r"## Table (\d)", text)] == [1, 2, 3, 4, 5, 6]
    first = cells_of(text, "Table 1")
    assert first[0] == ["system", "tokens", "position", "count", "presence", "neighbour", "mean", "seeds"]
    assert first[1] == ["Upper bound", "64", *["85.0 ± 7.1"] * 5, "2"]
    assert ["VoCo", "1", *["57.5 ± 10.6"] * 5, "2"] in first
    assert first[first.index(["VoCo", "1", *["57.5 ± 10.6"] * 5, "2"]) + 1] == ["", "", *["*62.5 ± 17.7*"] * 5, ""]
    assert ["Q-Former", "1", *["not run"] * 5, "0"] in first
    assert [first[i][0] for i in (1, 2, -2)] == ["Upper bound", "Full caching", "Lower bound"]
    assert first[-1] == ["Question alone (prior)", "", "10.0", "20.0", "50.0", "11.1", "22.8", ""]
    second = cells_of(text, "Table 2")
    assert [row[1] for row in second[1:-1] if row[0] == "VoCo"] == [str(n) for n in reversed(COUNTS)]
    assert second[[row[:2] for row in second].index(["VoCo", "16"]) + 1][2] == "*75.0*"
    third = cells_of(text, "Table 3")
    assert [row[:2] for row in third if row[0] in ("VoCo", "LLaMA-VID")] == [
        [name, n] for n in ("1", "4", "16") for name in ("LLaMA-VID", "VoCo")
    ]
    fourth = cells_of(text, "Table 4")
    assert fourth[1] == ["16 tokens (the paper's)", "31.0", "32.0", "34.0", "38.0", "70.0", "1"]
    assert fourth[2] == ["", "*26.2*", "*27.5*", "*30.0*", "*35.0*", "*75.0*", ""]
    assert fourth[3] == ["1 to 16 (ours)", *["58.0"] * 5, "1"]
    assert fourth[5] == ["as many as evaluated", "57.5 ± 10.6", "not run", "not run", "not run", "70.0", ""]
    for title, kind in (("Table 5", "locate"), ("Table 6", "region")):
        assert cells_of(text, title)[0] == ["system", "tokens", kind, "seeds"]
    assert "smoke" not in text


def test_a_smoke_run_says_so():
    assert "**A smoke run, too short to be a result.**" in tables.markdown(
        Scores([result_of("voco", (1,), 0, [("voco", 1, scores_of(50))], SMOKE)])
    )


@pytest.mark.parametrize("found", [[], by_hand()], ids=["nothing", "some"])
def test_tables_and_plots_of_whatever_there_is(found):
    scores = Scores(found)
    assert tables.markdown(scores).count("not run") > 20
    for picture in plots.pictures(scores).values():
        with Image.open(io.BytesIO(picture)) as image:
            assert image.size == (1230, 630)


# ---- runs --------------------------------------------------------------------------------------------------------------

TINY = Settings(tower_steps=2, base_steps=2, steps=4, batch=2, questions=6, smoke=True)


def test_the_full_set():
    every = list(all_runs())
    assert len({run.name for run in every}) == len(every) == 3 * (1 + len(COUNTS) + 3 * 3 + 1)
    assert [run.system for run in every[:5]] == ["upper_bound", "voco", "avg_pool", "q_former", "llama_vid"]
    assert max(COUNTS) == VISION
    chosen = list(all_runs(["voco"], [1, 2], [4]))
    assert [(run.counts, run.seed) for run in chosen] == [((1,), 4), ((2,), 4)]
    for arguments, message in (((["vico"],), "only must be of"), ((None, [3]), "counts must be of")):
        with pytest.raises(ValueError, match=message):
            list(all_runs(*arguments))
    assert Run("voco", ELASTIC, 1).name == "voco-elastic-seed1"
    assert Run("voco", (4,), 0).evaluations == (("voco", 1), ("voco", 2), ("voco", 4))
    assert len(smoke_runs()) == 3


def test_settings_that_differ_are_told_apart(tmp_path):
    assert FULL.digest != SMOKE.digest and Settings().digest == FULL.digest
    out = tmp_path / "study"
    runs.open_study(out, TINY)
    runs.open_study(out, TINY)
    with pytest.raises(ValueError, match="out must be a folder of the same settings"):
        runs.open_study(out, FULL)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="out must be a new folder"):
        runs.open_study(tmp_path / "other", TINY)
    (out / "results").mkdir()
    for name, settings in (("a", TINY), ("b", FULL)):
        result = result_of("voco", (1,), 0, [("voco", 1, scores_of(50))], settings)
        (out / "results" / f"{name}.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"results must be of the same settings, but .*b\.json"):
        results.load(out)
    (out / "results" / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a\.json must be a result, but lacks"):
        results.load(out)


def test_smoke_runs_stay_out_of_results(tmp_path, capsys):
    out = tmp_path / "bench" / "results" / "smoke"
    assert main(["--out", str(out), "--smoke"]) == 2
    assert "outside of bench/results" in capsys.readouterr().err and not out.exists()
    assert main(["--out", str(tmp_path / "x"), "--only", "vico"]) == 2
    assert not (tmp_path / "x").exists()


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    """Killed in its third step, after a checkpoint: the losses and answers are those of a run that was never killed."""
    monkeypatch.setattr(runs, "SAVE_STEPS", 2)
    monkeypatch.setattr(runs, "LOG_STEPS", 1)
    out, calm = tmp_path / "killed", tmp_path / "calm"
    wanted = [Run("voco", (2,), 0)]
    runs.open_study(calm, TINY)
    runs.carry_out(wanted, calm, TINY)
    # With the same tower and base.
    shutil.copytree(calm, out)
    shutil.rmtree(out / "results")

    class Kill(BaseException):
        pass

    steps, step = [], VocoTrainer.training_step

    def counted(self, *arguments, **options):
        steps.append(self.state.global_step)
        if len(steps) == 3:
            raise Kill
        return step(self, *arguments, **options)

    monkeypatch.setattr(VocoTrainer, "training_step", counted)
    with pytest.raises(Kill):
        runs.carry_out(wanted, out, TINY)
    assert not (out / "results").exists()
    runs.carry_out(wanted, out, TINY)
    assert steps == [0, 1, 2, 2, 3], "the first two steps must not be trained again"
    ((ours,), (theirs,)) = (results.load(folder) for folder in (out, calm))
    assert ours["losses"] == theirs["losses"] and len(ours["losses"]) == TINY.steps
    assert ours["evaluations"] == theirs["evaluations"]
    assert ours["settings"] == json.loads(json.dumps(TINY.to_dict())) and ours["machine"]["torch"]
    # What is finished is not run again, and what another process is at is left to it.
    monkeypatch.setattr(runs, "_result", lambda *_: pytest.fail("was run again"))
    runs.carry_out(wanted, out, TINY)
    other = Run("voco", (4,), 0)
    with runs._lock(out / f"{other.name}.lock"):
        runs.carry_out([other], out, TINY)


@pytest.mark.full
@pytest.mark.parametrize("system", ["upper_bound", "avg_pool", "q_former", "llama_vid"])
def test_every_system_runs(tmp_path, system):
    runs.open_study(tmp_path / "study", TINY)
    run = Run(system, (1,), 0)
    runs.carry_out([run], tmp_path / "study", TINY)
    (result,) = results.load(tmp_path / "study")
    assert [(one["system"], one["tokens"]) for one in result["evaluations"]] == list(run.evaluations)
    assert all(cell["total"] == 1 for one in result["evaluations"] for cell in one["scores"].values())


# ---- digits as files ---------------------------------------------------------------------------------------------------


def test_digits_as_files_can_be_trained_on(tmp_path):
    out = tmp_path / "new" / "digits"
    dataset.write(out, training=4, heldout=6)
    assert sorted(path.name for path in out.parent.iterdir()) == ["digits"]
    config = TrainingConfig.load(out / "train.yaml")
    assert Path(config.model) == out / "start" and config.out == out / "run"
    processor = VocoProcessor.from_pretrained(config.model)
    data = ConversationDataset.of(config, processor, None, seed=0)
    assert len(data) == 4 and data[3]["pixel_values"].shape == (1, 3, 32, 32)
    for split, seed, kinds in (("train", 1, None), ("heldout", 2, KINDS_OF_DEMO)):
        task = DigitsTask(split, augment=split == "train")
        for i, record in enumerate(json.loads((out / f"{split}.json").read_text())):
            sample = task.sample((seed, i), dataset.TURNS) if kinds is None else task.sample((seed, i), kinds=(kinds[i],))
            with Image.open(out / record["image"]) as image:
                assert np.array_equal(np.array(image), np.array(sample.image))
            texts = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
            pairs = list(zip(texts[::2], texts[1::2], strict=True))
            asked = [(question.text, question.answer) for question in sample.questions]
            assert pairs[: len(asked)] == asked and len(pairs) == len(asked) + (split == "train")


def test_digits_as_files_refuse_and_leave_nothing(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="out must be a new folder"):
        dataset.write(tmp_path / "mine", 2, 2)
    with pytest.raises(ValueError, match="training must be at least 1"):
        dataset.write(tmp_path / "none", 0, 2)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(dataset, "_write_split", full)
    with pytest.raises(OSError, match="no space"):
        dataset.write(tmp_path / "digits", 2, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
