"""The README does what it shows, and shows what was measured."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from voco_llama.demo import MODEL

from voco_kernels import Image, VocoLayout

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DESIGN = (ROOT / "DESIGN.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


TRAINING = -5  # the commands of the section on training are the last ones


def voco_commands():
    lines = [shlex.split(line.partition(">")[0]) for line in commands()]
    return [words for words in lines if words[0] == "voco"]


def run(words, folder) -> str:
    """What `voco ...` prints."""
    command = [sys.executable, "-m", "voco_llama.cli", *words[1:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


def test_commands_run_as_written(folder):
    ours = voco_commands()[:TRAINING]
    assert {words[1] for words in ours} == {"demo", "compress", "ask", "cache", "info"}
    for words in ours:
        run(words, folder)


@pytest.mark.full
def test_a_model_is_trained_as_written(folder):
    *ours, convert = voco_commands()[TRAINING:]
    assert [words[1] for words in ours] == ["digits", "train", "ask", "recipe"] and convert[1] == "convert"
    for words in ours:
        run(words, folder)
    assert run(ours[2], folder).strip() in "01234"


def test_examples_run_as_written(folder):
    # After the commands, in one folder, as a reader would.
    assert (folder / "voco-demo").is_dir(), "test_commands_run_as_written must run first"
    for block in blocks("python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {line.split()[1] for line in commands() if line.startswith("make ")}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_paths_exist():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path


def test_accuracies_are_the_recorded_ones():
    results = json.loads((MODEL.parent / "results.json").read_text())
    for name, row in results["rows"].items():
        figures = [f"{100 * row[kind]['accuracy']:.1f}" for kind in ("position", "all")]
        line = next((line for line in README.splitlines() if line.startswith(f"| {name} ")), None)
        if name != "upper bound":
            assert line and all(figure in line for figure in figures), name


def test_accuracies_of_clips_are_the_recorded_ones():
    document = (MODEL.parent / "README.md").read_text()
    clips = json.loads((MODEL.parent / "results.json").read_text())["clips"]
    names = {"voco 1": "1 VoCo token a frame", "voco 2": "2 VoCo tokens a frame", "mp4": "the same, from mp4 files"}
    for name, row in clips["rows"].items():
        line = next(line for line in document.splitlines() if line.startswith(f"| {names.get(name, name)} |"))
        assert line.split("|")[2:-1] == [f" {100 * cell['accuracy']:.1f} " for cell in row.values()], name
    assert f"{100 * clips['images']['voco 2']['all']['accuracy']:.1f} % with 2 VoCo tokens" in document


def test_it_stays_short():
    assert len(README.splitlines()) <= 155


def test_tile_efficiencies_are_the_counted_ones():
    of_triton, of_cuda = ("", "triton"), ("`cuda` ", "cuda")
    rows = [(*of, *row) for of in (of_triton, of_cuda) for row in (("forward, dQ", ("forward", "dq")), ("dK/dV", ("dkv",)))]
    for prefix, backend, name, kernels in rows:
        line = next(line for line in DESIGN.splitlines() if line.startswith(f"| {prefix}{name} |"))
        shown = [float(cell) for cell in line.split("|")[2:-1]]
        for which in kernels:
            layouts = [
                VocoLayout.from_spans([[Image(vision, voco)] * 16], isolated=True)
                for vision, voco in ((144, 4), (256, 2), (576, 2), (2880, 8))
            ]
            assert shown == [round(layout.tile_efficiency(128, backend, which=which), 2) for layout in layouts]
