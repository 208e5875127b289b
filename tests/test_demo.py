"""The packaged model: what the README says about it, computed again through the public calls."""

import json
from pathlib import Path

import pytest
from voco_llama.demo import CLIPS, MODEL, UNCOMPRESSED
from voco_llama.demo.digits import KINDS, DigitsTask, load_digits, question_prior
from voco_llama.demo.evaluate import answers, heldout, load, score

RESULTS = json.loads((MODEL.parent / "results.json").read_text())


def row(name):
    return RESULTS["rows"][name]


@pytest.fixture(scope="module")
def samples():
    return heldout(RESULTS["questions"])


@pytest.fixture(scope="module")
def model():
    return load(MODEL)


def agree(found: dict, stated: dict) -> None:
    """Same accuracy up to the few answers that another CPU's rounding may turn."""
    for kind in (*KINDS, "all"):
        assert found[kind]["total"] == stated[kind]["total"]
        assert abs(found[kind]["hits"] - stated[kind]["hits"]) <= max(1, 0.003 * stated[kind]["total"]), kind


def test_the_stated_accuracies_meet_their_bounds():
    uncompressed, voco = row("uncompressed"), row(f"voco {RESULTS['default_voco']}")
    assert RESULTS["questions"] >= 2000
    assert uncompressed["position"]["accuracy"] >= 0.95
    assert uncompressed["all"]["accuracy"] >= 0.90
    assert voco["all"]["accuracy"] >= 0.95 * uncompressed["all"]["accuracy"]
    wrong = row("another image's cache")["all"]
    assert abs(wrong["accuracy"] - wrong["prior"]) <= 0.03


def test_uncompressed_accuracy(model, samples):
    agree(score(samples, answers(model, samples, 0)), row("uncompressed"))


def test_two_stage_accuracy(model, samples):
    count = RESULTS["default_voco"]
    agree(score(samples, answers(model, samples, count)), row(f"voco {count}"))


def test_another_images_cache(model, samples):
    count = RESULTS["default_voco"]
    agree(score(samples, answers(model, samples, count, wrong_image=True)), row("another image's cache"))


@pytest.mark.full
@pytest.mark.parametrize("count", [1, 4, 8])
def test_other_voco_counts(model, samples, count):
    agree(score(samples, answers(model, samples, count)), row(f"voco {count}"))


@pytest.mark.full
def test_bounds_of_the_uncompressed_checkpoint(samples):
    before = load(UNCOMPRESSED)
    agree(score(samples, answers(before, samples, RESULTS["default_voco"])), row("lower bound"))
    agree(score(samples, answers(before, samples, 0)), row("upper bound"))


def test_package_is_small():
    size = sum(f.stat().st_size for folder in (MODEL, UNCOMPRESSED, CLIPS) for f in Path(folder).iterdir())
    assert size <= 8 * 2**20


def test_heldout_digits_are_not_in_training():
    train, held = load_digits("train"), load_digits("heldout")
    assert sum(map(len, train)) == 1437 and sum(map(len, held)) == 360
    seen = {(digit, scan.tobytes()) for digit, scans in enumerate(train) for scan in scans}
    assert not any((digit, scan.tobytes()) in seen for digit, scans in enumerate(held) for scan in scans)


def test_answers_are_right_and_balanced():
    task = DigitsTask("heldout")
    for kind in KINDS:
        counts = {}
        for i in range(1500):
            sample = task.sample((3, i), kinds=(kind,))
            question = sample.questions[0]
            counts[question.answer] = counts.get(question.answer, 0) + 1
            digits = [digit for line in sample.grid for digit in line]
            if kind in ("largest", "smallest"):
                assert question.answer == str(max(digits) if kind == "largest" else min(digits))
        # A neighbour is uniform over nine digits given its question, and over ten given nothing.
        most = max(counts.values()) / 1500
        assert most <= (0.1 if kind == "neighbour" else question_prior(kind)) * 1.4
