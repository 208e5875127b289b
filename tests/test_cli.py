"""The `voco` command as a user calls it: a new process, files in a folder, answers on standard output."""

import json
import subprocess
import sys

import pytest
from PIL import Image
from voco_llama.demo.digits import DigitsTask


def voco(*arguments, cwd, ok=True):
    """Run `voco ...` in a new process; with `ok` it must succeed."""
    command = [sys.executable, "-m", "voco_llama.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) is ok, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    for i in range(2):
        DigitsTask("heldout").sample((5, i)).image.save(path / f"digits{i}.png")
    (path / "text.png").write_text("this is not an image")
    whole = (path / "digits0.png").read_bytes()
    (path / "half.png").write_bytes(whole[: len(whole) // 2])
    voco("compress", "digits0.png", "digits1.png", "--out", "caches", cwd=path)
    return path


def test_compress_writes_one_file_per_image(folder):
    assert sorted(p.name for p in (folder / "caches").iterdir()) == ["digits0.safetensors", "digits1.safetensors"]


def test_ask_answers_the_same_from_image_and_cache(folder):
    question = "what is in the image"
    answers = [
        json.loads(voco("ask", source, question, "--json", cwd=folder).stdout)["answer"]
        for source in ("digits0.png", "caches/digits0.safetensors")
    ]
    assert answers[0] == answers[1] and len(answers[0].split()) == 4


def test_ask_about_two_sources_and_uncompressed(folder):
    both = voco("ask", "digits0.png", "caches/digits1.safetensors", "how many fours", cwd=folder)
    assert both.stdout.strip()
    whole = voco("ask", "digits0.png", "how many fours", "--uncompressed", cwd=folder)
    assert whole.stdout.strip()


def test_info_says_why_backends_are_missing(folder):
    report = json.loads(voco("info", "--json", cwd=folder).stdout)
    assert report["backends"]["torch"]["missing"] is None
    assert report["backends"]["cuda"]["missing"]
    assert report["versions"]["torch"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compress", "digits0.png", "missing.png", "--out", "new"), "missing.png does not exist"),
        (("compress", "digits0.png", "text.png", "--out", "new"), "text.png is not an image"),
        (("compress", "digits0.png", "half.png", "--out", "new"), "half.png cannot be read"),
        (("compress", "digits0.png", "./digits0.png", "--out", "new"), "different names"),
        (("compress", "digits0.png", "--out", "new", "--voco", "-1"), "num_voco_tokens"),
        (("compress", "digits0.png", "--out", "new", "--model", "nowhere"), "--model must be a checkpoint folder"),
        (("ask", "caches/none.safetensors", "how many fours"), "no K/V cache file"),
        (("ask", "caches/digits0.safetensors", "how many fours", "--uncompressed"), "--uncompressed"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(folder, arguments, said):
    done = voco(*arguments, cwd=folder, ok=False)
    assert said in done.stderr.replace("\n", " ") and "Traceback" not in done.stderr
    assert not (folder / "new").exists()


def test_damaged_cache_is_refused(folder):
    data = bytearray((folder / "caches" / "digits0.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "flipped.safetensors").write_bytes(data)
    assert "damaged" in voco("ask", "flipped.safetensors", "how many fours", cwd=folder, ok=False).stderr


def test_more_voco_tokens_than_trained_for_warns_with_the_number(folder):
    done = voco("compress", "digits0.png", "--out", "many", "--voco", "100", cwd=folder)
    assert "100 VoCo tokens" in done.stderr and "at most 8" in done.stderr


def test_demo_answers_three_ways_and_draws(folder):
    report = json.loads(voco("demo", "--out", "demo", "--images", "2", "--json", cwd=folder).stdout)
    for entry in report["images"]:
        for question in entry["questions"]:
            assert question["two stages"] == question["from the cache file"]
    length, size = ({row["method"]: row[key] for row in report["costs"]} for key in ("kv length", "cache bytes"))
    assert (length["no cache"], length["full caching"], length["VoCo"]) == (0, 65, 2)
    assert size["full caching"] / size["VoCo"] == 65 / 2
    with Image.open(folder / "demo" / "demo.png") as picture:
        assert picture.size[0] > 600
