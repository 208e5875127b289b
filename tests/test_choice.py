"""What "auto" takes on GPUs: it follows committed results, and nothing else."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from bench import choose
from bench.attention_peers import our_name
from bench.shapes import GPU
from voco_kernels import backends, choice, chosen_on_gpus

RESULTS = next((choose.ROOT / "bench" / "results").glob("cpu-*.json"))


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of its own, and a repository that results may be written to."""
    (tmp_path / "bench" / "results").mkdir(parents=True)
    file = tmp_path / "measured.json"
    shutil.copy(choose.FILE, file)
    monkeypatch.setattr(choose, "ROOT", tmp_path)
    monkeypatch.setattr(choose, "FILE", file)
    monkeypatch.setattr(choice, "files", lambda package: tmp_path)
    choice.measured.cache_clear()
    yield tmp_path
    choice.measured.cache_clear()


def results_file(folder, times: dict[tuple[str, str, str], float], capability=(9, 0)):
    """Results of a GPU with {(task, shape, backend): milliseconds}."""
    content = json.loads(RESULTS.read_text())
    [like] = [row for row in content["rows"] if row["status"] == "ok" and row["suite"] == "attention"][:1]
    rows = []
    for (task, shape, name), ms in times.items():
        named = {"task": task, "shape": shape, "dtype": "bfloat16", "name": our_name(name)}
        timed = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"), ms) | {"status": "ok" if ms else "not run: no"}
        rows.append(like | named | timed)
    path = folder / "bench" / "results" / "gpu.json"
    path.write_text(json.dumps(content | {"rows": rows, "capability": capability and list(capability), "kind": "cuda"}))
    return path


def test_nothing_was_measured_yet():
    """This changes with the first results of a GPU, and so does what is said."""
    if not json.loads(choose.FILE.read_text())["entries"]:
        assert chosen_on_gpus() == "triton; no results of a GPU show cuda ahead of it"


def test_cuda_is_taken_where_it_is_ahead_on_every_shape(table, capsys, monkeypatch):
    assert {GPU[name].head_dim for name in ("video", "sft")} == {128}
    path = results_file(
        table,
        {
            ("forward", "video", "triton"): 2.0, ("forward", "video", "cuda"): 1.0,
            ("forward", "sft", "triton"): 1.5, ("forward", "sft", "cuda"): 1.0,
            ("forward + backward", "video", "triton"): 2.0, ("forward + backward", "video", "cuda"): 1.0,
            ("forward + backward", "sft", "triton"): 1.0, ("forward + backward", "sft", "cuda"): 1.1,
        },
    )  # fmt: skip
    assert choose.main([str(path)]) == 0
    said = capsys.readouterr().out
    assert "cuda for forward, head_dim 128, bfloat16 on sm_90 (1.50 times as fast: bench/results/gpu.json)" in said
    assert choice.in_words().endswith("; triton for all else")
    for capability, head_dim, dtype, backward, wanted in (
        ((9, 0), 128, torch.bfloat16, False, True), ((8, 0), 128, torch.bfloat16, False, False),
        ((9, 0), 64, torch.bfloat16, False, False), ((9, 0), 128, torch.float16, False, False),
        ((9, 0), 128, torch.bfloat16, True, False),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        q = SimpleNamespace(device="cuda:0", shape=(5, 2, head_dim), dtype=dtype)
        assert choice.prefers_cuda(q, backward=backward) == wanted


def test_a_shape_that_did_not_run_does_not_count(table):
    times = {("forward", "video", "triton"): 2.0, ("forward", "video", "cuda"): None, ("forward", "sft", "cuda"): 1.0}
    assert choose.entries(results_file(table, times)) == []


def test_what_went_wrong_was_not_ahead(table):
    times = {("forward", shape, name): 2.0 - (name == "cuda") for shape in ("video", "sft") for name in ("triton", "cuda")}
    path = results_file(table, times)
    content = json.loads(path.read_text())
    content["rows"][-1] |= {"status": "wrong: out differs", "p20_ms": None, "p50_ms": None, "p80_ms": None}
    path.write_text(json.dumps(content))
    [entry] = choose.entries(path)
    assert entry["ahead"] == 0 and choose.chosen([entry]) == []


def test_of_several_files_the_worst_counts(table):
    kind = {"family": "sm_90", "head_dim": 128, "dtype": "bfloat16", "task": "forward"}
    good, bad = (kind | {"ahead": ahead} for ahead in (1.5, 0.9))
    assert choose.chosen([good]) == [good] and choose.chosen([good, bad]) == choose.chosen([bad, good]) == []


def test_results_of_a_cpu_are_refused(table, capsys):
    before = choose.FILE.read_text()
    assert choose.main([str(results_file(table, {}, capability=None))]) == 2
    assert "must hold results of a GPU" in capsys.readouterr().err and choose.FILE.read_text() == before


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("reason", [None, "it is missing"])
def test_auto_follows_the_table(ahead, reason, monkeypatch):
    """And goes on to triton where cuda cannot serve."""
    modules = {
        "triton": SimpleNamespace(unavailable_reason=lambda: None, unsupported_reason=lambda q: None),
        "cuda": SimpleNamespace(unavailable_reason=lambda: reason, unsupported_reason=lambda q: None),
    }
    monkeypatch.setattr(backends, "load_module", lambda table, name: modules[name])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(choice, "measured", lambda: {("sm_90", 128, "bfloat16", choice.FORWARD): {}} if ahead else {})
    q = SimpleNamespace(is_cuda=True, device="cuda:0", shape=(5, 2, 128), dtype=torch.bfloat16)
    wanted = "cuda" if ahead and reason is None else "triton"
    assert backends.resolved("auto", q, backward=False) == wanted
    assert backends.resolved("auto", q) == backends.resolved("auto", q, backward=True) == "triton"
