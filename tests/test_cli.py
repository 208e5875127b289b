"""The `voco` command as a user calls it: mostly a new process, files in a folder, answers on standard output."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from voco_llama import VocoLlavaForConditionalGeneration, cli
from voco_llama.demo.digits import DigitsTask

from voco_kernels import VocoKV


def voco(*arguments, cwd, ok=True):
    """Run `voco ...` in a new process; with `ok` it must succeed."""
    command = [sys.executable, "-m", "voco_llama.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) is ok, done.stderr
    return done


def voco_here(arguments, folder, monkeypatch) -> int:
    """The exit status of `voco ...` in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["voco", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


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
def test_bad_input_is_one_line_and_writes_nothing(folder, arguments, said, monkeypatch, capsys):
    assert voco_here(arguments, folder, monkeypatch) == 1
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert not (folder / "new").exists()


def test_bad_input_shows_no_traceback(folder):
    done = voco("compress", "digits0.png", "missing.png", "--out", "new", cwd=folder, ok=False)
    assert "missing.png does not exist" in done.stderr.replace("\n", " ") and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def clip(folder):
    """Three seconds of a video, each an image of digits of its own; its cache file, and one that is cut off."""
    pytest.importorskip("av")
    from test_video import write

    digits = [np.asarray(DigitsTask("heldout").sample((5, i)).image.resize((64, 64))) for i in range(3)]
    path = write(folder / "clip.mp4", digits, rate=1)
    (folder / "cut.mp4").write_bytes(path.read_bytes()[:1000])
    voco("compress", "clip.mp4", "--out", "caches", cwd=folder)
    return path


def test_compress_writes_one_file_for_all_frames_of_a_video(folder, clip, monkeypatch, capsys):
    arguments = ["compress", "clip.mp4", "digits0.png", "--out", "more", "--fps", "2", "--json"]
    assert voco_here(arguments, folder, monkeypatch) == 0
    video, image = json.loads(capsys.readouterr().out)
    assert video["source"] == "clip.mp4" and (video["frames"], image["frames"]) == (6, 1)
    kv = VocoKV.load(folder / video["cache"])
    assert len(kv.segments) == 6 and kv.num_tokens == video["voco"] == 6 * image["voco"]


def test_caches_know_which_packaged_model_made_them(folder, clip, monkeypatch, capsys):
    """An image that was compressed with a clip is asked about with the model of the clip."""
    assert voco_here(["compress", "digits0.png", "clip.mp4", "--out", "made"], folder, monkeypatch) == 0
    for name in ("digits0", "clip"):
        assert voco_here(["ask", f"made/{name}.safetensors", "how many digits came"], folder, monkeypatch) == 0
    for video in ("caches/clip.safetensors", "clip.mp4"):
        capsys.readouterr()
        assert voco_here(["ask", video, "caches/digits0.safetensors", "what came first"], folder, monkeypatch) == 1
        assert "must be made by this model" in capsys.readouterr().err.replace("\n", " ")


def test_ask_answers_the_same_from_video_and_cache(folder, clip, monkeypatch, capsys):
    """Together with an image, in order."""
    answers = []
    # Together, since the packaged model for images alone is another one.
    assert voco_here(["compress", "clip.mp4", "digits1.png", "--out", "both", "--json"], folder, monkeypatch) == 0
    capsys.readouterr()
    for sources in (("clip.mp4", "digits1.png"), ("both/clip.safetensors", "both/digits1.safetensors")):
        assert voco_here(["ask", *sources, "what is in the image", "--json"], folder, monkeypatch) == 0
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compress", "cut.mp4", "--out", "new"), "cut.mp4 is not a video file"),
        (("compress", "nowhere.mkv", "--out", "new"), "nowhere.mkv does not exist"),
        (("compress", "clip.mp4", "clip.mp4", "--out", "new"), "sources must have different names"),
        (("ask", "clip.mp4", "how many fours", "--fps", "0"), "fps must be a positive number"),
        (("ask", "clip.mp4", "how many fours", "--fps", "1", "--frames", "2"), "--fps must be used without --frames"),
        (("ask", "digits0.png", "how many fours", "--frames", "2"), "--fps and --frames must be used with a video"),
        (("ask", "clip.mp4", "how many fours", "--uncompressed"), "--uncompressed must be used with image files alone"),
    ],
)
def test_bad_videos_are_one_line_and_write_nothing(folder, clip, arguments, said, monkeypatch, capsys):
    """In this process: they are refused before there is a model."""
    assert voco_here(arguments, folder, monkeypatch) == 1
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert not (folder / "new").exists()


def test_a_store_keeps_what_was_compressed(folder, clip, monkeypatch):
    pytest.importorskip("voco_kernels.store")
    arguments = ["compress", "clip.mp4", "digits0.png", "--store", "kept", "--out"]
    assert voco_here([*arguments, "first"], folder, monkeypatch) == 0
    monkeypatch.setattr(VocoLlavaForConditionalGeneration, "compress", None)
    assert voco_here([*arguments, "again"], folder, monkeypatch) == 0
    for name in ("clip.safetensors", "digits0.safetensors"):
        first, again = (VocoKV.load(folder / out / name) for out in ("first", "again"))
        assert torch.equal(first.k, again.k) and torch.equal(first.v, again.v) and first.segments == again.segments
    assert voco_here(["ask", "clip.mp4", "digits0.png", "how many fours", "--store", "kept"], folder, monkeypatch) == 0


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
