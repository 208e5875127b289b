"""`voco demo`: real digits in images and in a clip, questions in words, several ways to answer, tables, one picture."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from voco_kernels import Image, Text, VocoKV, VocoLayout, draw_on
from voco_llama.flops import image_flops, llama_flops

from . import CLIPS, MODEL
from .clips import Clip, ClipsTask, write_clip
from .digits import KINDS, DigitsTask, Sample
from .evaluate import FILE_FPS, load

QUESTIONS_PER_IMAGE = 4
# The kinds that the packaged model has learnt (README has all of them).
CLIP_KINDS = ("first", "last", "number")
TIMED_RUNS = 7
MODES = ("uncompressed", "two stages", "from the cache file")
CLIP_MODES = MODES[1:]


def run(out: Path, model_folder: Path | None, images: int, seed: int, step: Callable[[str], None]) -> dict:
    """Answer questions in three ways, time them, and write images, a clip, caches and `demo.png` into `out`.

    Args:
        step: called with the name of each step as it begins.

    Returns:
        The report: one dict per image, one for the clip, the table of costs, and the paths.
    """
    folder, clip_folder = model_folder or MODEL, model_folder or CLIPS
    model, clip_model = load(folder), load(clip_folder)
    out.mkdir(parents=True, exist_ok=True)
    samples = [_sample(seed, i) for i in range(images)]
    for i, sample in enumerate(samples):
        sample.image.save(out / f"image{i}.png")
    clip, video = ClipsTask("heldout").sample((4321, seed), 3, CLIP_KINDS), out / "clip.mp4"
    write_clip(video, clip.frames(FILE_FPS), FILE_FPS)

    step("answer without compression")
    asked = [(i, question) for i, sample in enumerate(samples) for question in sample.questions]
    given = {"uncompressed": _ask_images(model, samples, asked)}
    step("compress and answer in two stages")
    caches = model.compress([sample.image for sample in samples])
    given["two stages"] = [model.ask(question.text, voco_kv=[caches[i]], max_new_tokens=4) for i, question in asked]
    paths = [out / f"image{i}.safetensors" for i in range(images)]
    for kv, path in zip(caches, paths, strict=True):
        kv.save(path)
    step("compress the clip, and ask about it")
    clip_kv, clip_cache = clip_model.compress_video(video), out / "clip.safetensors"
    clip_kv.save(clip_cache)
    order = [question.text for question in clip.questions]
    clip_given = {"two stages": [clip_model.ask(text, voco_kv=[clip_kv], max_new_tokens=4) for text in order]}
    step("answer from the saved caches in a new process")
    requests = [(folder, paths[i], q.text) for i, q in asked] + [(clip_folder, clip_cache, text) for text in order]
    answers = _ask_in_new_process(requests)
    given["from the cache file"], clip_given["from the cache file"] = answers[: len(asked)], answers[len(asked) :]
    step("measure")
    costs = measure(model, samples[0])
    report = {
        "model": str(folder),
        "clip model": str(clip_folder),
        "images": [
            {
                "image": str(out / f"image{i}.png"),
                "cache": str(paths[i]),
                "digits": [list(row) for row in sample.grid],
                "questions": [
                    {"question": q.text, "truth": q.answer, **{mode: given[mode][n] for mode in MODES}}
                    for n, (j, q) in enumerate(asked)
                    if j == i
                ],
            }
            for i, sample in enumerate(samples)
        ],
        "clip": {
            "clip": str(video),
            "cache": str(clip_cache),
            "order": list(clip.order),
            "frames": len(clip_kv.segments),
            "questions": [
                {"question": q.text, "truth": q.answer, **{mode: clip_given[mode][n] for mode in CLIP_MODES}}
                for n, q in enumerate(clip.questions)
            ],
        },
        "costs": costs,
        "picture": str(out / "demo.png"),
    }
    step("draw")
    draw_report(report, samples, clip, out / "demo.png")
    return report


def _sample(seed: int, index: int) -> Sample:
    """An image of held-out digits with questions of different kinds."""
    return DigitsTask("heldout").sample((4321, seed, index), QUESTIONS_PER_IMAGE, KINDS)


def _ask_images(model, samples, asked) -> list[str]:
    return [
        model.ask(question.text, images=[samples[i].image], num_voco_tokens=0, max_new_tokens=4)
        for i, question in asked
    ]


def _ask_in_new_process(asked: list[tuple[Path, Path, str]]) -> list[str]:
    """Answers of a Python process that has never seen the images; it gets a checkpoint, a cache file and a question each."""
    request = json.dumps([[str(folder), str(path), question] for folder, path, question in asked])
    command = [sys.executable, "-m", "voco_llama.demo.show"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, input=request, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise OSError(f"the process that answers from caches failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(model, sample: Sample) -> list[dict]:
    """The rows of the paper's table 7 for this model: what one question costs up to its first token.

    No cache: the image is encoded and read by the LLaMA. Full caching: the K/V of all image tokens are kept. VoCo: those of
    the VoCo tokens. Milliseconds are medians, the three rows in turn within each round.
    """
    processor, question = model.processor, sample.questions[0].text
    prompt = processor.prompt(question)
    full = processor([sample.image], prompt, num_voco_tokens=0)
    compressed = processor(None, prompt)
    prefix = processor([sample.image], processor.image_token, num_voco_tokens=0)
    cached = model.cache_images(**{k: prefix[k] for k in ("input_ids", "pixel_values")})
    (kv,) = model.compress([sample.image])
    first = {"max_new_tokens": 1, "do_sample": False}

    def copy_of_cache():
        # generate grows the cache that it is given, so each question needs its own, as each request of a server does.
        clone = type(cached)(config=model.config.text_config)
        for i, layer in enumerate(cached.layers):
            clone.update(layer.keys, layer.values, i)
        return clone

    text = {"input_ids": full["input_ids"], "attention_mask": full["attention_mask"]}
    calls = {
        "no cache": lambda: model.generate(**full, **first),
        "full caching": lambda: model.generate(**text, past_key_values=copy_of_cache(), **first),
        "VoCo": lambda: model.generate(**compressed, voco_kv=kv, **first),
    }
    times = {name: [] for name in calls}
    for _ in range(TIMED_RUNS):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - begin) * 1e3)

    length, kept = prefix["input_ids"].shape[1], kv.num_tokens
    words = full["input_ids"].shape[1] - length
    config = model.config.text_config
    width = kv.nbytes // kept  # bytes a token

    def text_flops(cache_length: int) -> int:
        return llama_flops(config, words, words * cache_length + words * (words + 1) // 2)

    everything = length + words
    flops = {
        "no cache": image_flops(model.config) + llama_flops(config, everything, everything * (everything + 1) // 2),
        "full caching": text_flops(length),
        "VoCo": text_flops(kept),
    }
    sizes = {"no cache": (0, 0), "full caching": (length, length * width), "VoCo": (kept, kv.nbytes)}
    return [
        {
            "method": name,
            "kv length": sizes[name][0],
            "cache bytes": sizes[name][1],
            "flops": flops[name],
            "ms": round(statistics.median(times[name]), 2),
        }
        for name in calls
    ]


def print_report(report: dict, console) -> None:
    """The report as tables on a rich console."""
    for entry in report["images"]:
        rows = " / ".join(" ".join(map(str, row)) for row in entry["digits"])
        console.print(_answers(f"{entry['image']} (digits {rows})", entry["questions"], MODES))
    clip = report["clip"]
    order = " ".join(map(str, clip["order"]))
    title = f"{clip['clip']} ({clip['frames']} frames, digits in order {order})"
    console.print(_answers(title, clip["questions"], CLIP_MODES))
    table = Table("", "K/V length", "cache bytes", "MFLOP to first token", "ms to first token", title="one question")
    for row in report["costs"]:
        flops, size = f"{row['flops'] / 1e6:.1f}", f"{row['cache bytes']:,}"
        table.add_row(row["method"], str(row["kv length"]), size, flops, f"{row['ms']:.1f}")
    console.print(table)
    console.print(f"picture: {report['picture']}", highlight=False, soft_wrap=True)


def _answers(title: str, questions: list[dict], modes: tuple[str, ...]) -> Table:
    table = Table("question", "truth", *modes, title=title, title_justify="left")
    for question in questions:
        marked = [
            f"[green]{question[mode]}[/]" if question[mode] == question["truth"] else f"[red]{question[mode]}[/]"
            for mode in modes
        ]
        table.add_row(question["question"], question["truth"], *marked)
    return table


def draw_report(report: dict, samples: list[Sample], clip: Clip, path: Path) -> None:
    """One PNG: images and a clip with questions and answers, the mask of an image's prompt, and the sizes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = len(samples)
    figure = Figure(figsize=(max(9.5, 3.4 * columns), 11.4), layout="constrained")
    upper, middle, lower = figure.subfigures(3, 1, height_ratios=[1, 0.62, 0.85])
    panels = upper.subplots(2, columns, squeeze=False, gridspec_kw={"height_ratios": [1, 0.9]})
    for column, (entry, sample) in enumerate(zip(report["images"], samples, strict=True)):
        panels[0][column].imshow(sample.image)
        panels[0][column].axis("off")
        _write_answers(panels[1][column], entry["questions"], MODES, line=0.27)
    upper.suptitle("answers: uncompressed, in two stages, from the cache file in a new process", fontsize=11)
    _draw_clip(middle, report["clip"], clip)
    left, right = lower.subplots(1, 2, gridspec_kw={"width_ratios": [1.25, 1]})
    draw_on(left, VocoLayout.from_spans([_spans(report)], isolated=True))
    names = [row["method"] for row in report["costs"][1:]]
    sizes = [row["cache bytes"] for row in report["costs"][1:]]
    bars = right.barh(names, sizes, color=["#56b4e9", "#d55e00"])
    right.bar_label(bars, [f" {size:,} bytes, {row['kv length']} keys" for size, row in zip(sizes, report["costs"][1:])])
    right.set_xlim(0, max(sizes) * 1.9)
    right.set_xlabel("K/V kept per image (bytes)")
    right.invert_yaxis()
    for side in ("top", "right"):
        right.spines[side].set_visible(False)
    FigureCanvasAgg(figure).print_png(str(path))


def _draw_clip(figure, entry: dict, clip: Clip) -> None:
    """The frames that the model looks at, side by side, and what was asked about them."""
    strip, text = figure.subplots(2, 1, gridspec_kw={"height_ratios": [1, 0.9]})
    strip.imshow(np.concatenate([np.pad(np.asarray(frame), ((2, 2), (2, 2), (0, 0))) for frame in clip.frames()], axis=1))
    strip.axis("off")
    half = -(-len(entry["questions"]) // 2)
    _write_answers(text, entry["questions"][:half], CLIP_MODES, line=0.5)
    _write_answers(text, entry["questions"][half:], CLIP_MODES, line=0.5, at=0.52)
    title = f"a clip of {entry['frames']} frames: answers in two stages, from the cache file in a new process"
    figure.suptitle(title, fontsize=11)


def _write_answers(panel, questions: list[dict], modes: tuple[str, ...], line: float, at: float = 0.02) -> None:
    """Questions with their answers below, `line` of the panel's height for each, from `at` of its width on."""
    panel.axis("off")
    for number, question in enumerate(questions):
        answers = ", ".join(question[mode] for mode in modes)
        right = all(question[mode] == question["truth"] for mode in modes)
        panel.text(at, 1 - line * number, question["question"], fontsize=9, va="top")
        truth, colour = f"{answers}   (truth {question['truth']})", "#00734d" if right else "#b2182b"
        panel.text(at + 0.03, 1 - line * (number + 0.45), truth, fontsize=9, va="top", color=colour)


def _spans(report: dict) -> list:
    """The document of one image and one question, for the picture of its mask."""
    costs = {row["method"]: row["kv length"] for row in report["costs"]}
    return [Image(costs["full caching"], costs["VoCo"]), Text(10)]


def _answer_from_caches() -> None:
    """The new process: [[checkpoint, cache file, question], ...] as JSON on standard input, answers on standard output."""
    asked = json.load(sys.stdin)
    models = {folder: load(Path(folder)) for folder, _, _ in asked}
    caches = {path: VocoKV.load(path) for _, path, _ in asked}
    torch.set_grad_enabled(False)
    answers = [models[folder].ask(text, voco_kv=[caches[path]], max_new_tokens=4) for folder, path, text in asked]
    print(json.dumps(answers))


if __name__ == "__main__":
    _answer_from_caches()
