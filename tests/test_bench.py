"""What benchmarks are made of: turns, statuses, memory, ceilings, files of results, and the suites' own fixtures."""

import json
import os
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import dense_attention, mask_of_layout
from voco_llama.bench import measure, results
from voco_llama.bench.clock import FLUSHES, Ceilings, Clock, measure_ceilings
from voco_llama.bench.measure import (
    FEWEST,
    LEAST_ROUNDS,
    LIMIT,
    OURS,
    PART,
    Candidate,
    Comparison,
    Row,
    Work,
    compare,
)

from bench import attention_peers, end_to_end, gpu_kv, run, scaling_problem
from bench.attention_masks import PaddedMask
from bench.conftest import UNFINISHED
from bench.kv_problem import Problem as KVProblem
from bench.sanitized import KV_SHAPE
from bench.scaling_problem import Patience
from bench.shapes import FRAMES, TEXT, frames_shape, text_shape
from voco_kernels import VocoKV
from voco_kernels.tiles import useful_pairs

pytest_plugins = "pytester"
ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


# ---- turns -------------------------------------------------------------------------------------------------------------


def test_candidates_take_turns():
    calls = []

    def wrong(_):
        raise AssertionError("too far off")

    def fail():
        raise torch.OutOfMemoryError("out of memory\nwith details")

    candidates = [
        Candidate("a", lambda: calls.append("a"), target=2.0, role=OURS, facts={"layers": 2}, unchecked="a test",
                  kept_bytes=5),
        Candidate("b", lambda: calls.append("b"), unchecked="a test", captured=True, kept_bytes=7),
        Candidate("wrong", lambda: None, wrong),
        Candidate("large", fail, unchecked="a test"),
        Candidate("absent", fail, absent="flash-attn is not installed"),
    ]
    # So many seconds that only the rounds end it.
    a, b, *others = compare(candidates, Clock(CPU), seconds=1e9, most_rounds=7)
    assert [row.status for row in others] == [
        "wrong: too far off", "cannot run: out of memory", "not run: flash-attn is not installed",
    ]  # fmt: skip
    assert not any(row.seconds for row in others) and others[0].peak_bytes is None
    assert a.peak_bytes == 5 and b.peak_bytes is None, "no allocator sees what a graph writes"
    assert len(a.seconds) == len(b.seconds) == 7 and (a.target, a.role, a.facts) == (2.0, OURS, {"layers": 2})
    timed = calls[-14:]
    assert ["".join(pair) for pair in zip(timed[::2], timed[1::2])][:3] == ["ab", "ba", "ab"]


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, FEWEST), (1.0, LEAST_ROUNDS)])
def test_slow_rounds_are_few(seconds, rounds, monkeypatch):
    monkeypatch.setattr(Clock, "time", lambda self, run: 0.5)
    [row] = compare([Candidate("a", lambda: None, role=PART)], Clock(CPU), seconds=seconds)
    assert len(row.seconds) == rounds


def test_nothing_to_time():
    [row] = compare([Candidate("a", lambda: 1 / 0, unchecked="a test")], Clock(CPU))
    assert row.status == "cannot run: division by zero" and not row.seconds


def test_who_claims_to_do_the_task_must_be_checked():
    for options in ({}, {"check": lambda _: None, "unchecked": "a test"}):
        with pytest.raises(ValueError, match="check or unchecked must be given of 'a', and not both"):
            compare([Candidate("a", lambda: None, **options)], Clock(CPU))
    compare([Candidate("a", lambda: None, role=LIMIT)], Clock(CPU), most_rounds=1)


@pytest.mark.parametrize("good", [1, 2, 3, 5])
def test_what_fails_after_its_check_leaves_the_others(good, monkeypatch):
    """As an implementation whose later runs find less memory than its first."""
    released, runs = [], []
    monkeypatch.setattr(measure, "release", released.append)

    def once():
        runs.append(None)
        if len(runs) > good:
            raise torch.OutOfMemoryError("out of memory")

    rows = compare([Candidate("a", once, role=PART), Candidate("b", lambda: None, role=PART)], Clock(CPU), most_rounds=5)
    assert [row.status for row in rows] == ["cannot run: out of memory", "ok"]
    assert not rows[0].seconds and len(rows[1].seconds) == 5 and released == [CPU]


# ---- the clock ---------------------------------------------------------------------------------------------------------


def test_ceilings_are_the_best_of_some_runs(monkeypatch):
    monkeypatch.setattr(Clock, "times", lambda self, run: [0.5, 0.25, 1.0])
    ceilings = measure_ceilings(Clock(CPU), torch.float32, 8, 2**10)
    assert ceilings == Ceilings(2 * 8**3 / 0.25, 2 * 2**10 / 0.25)


class FakeEvent:
    """A CUDA event of a GPU on which a millisecond passes with each event."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.now += 1.0
        self.at, self.waited = FakeEvent.now, False

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, end):
        assert end.waited
        return end.at - self.at


def test_times_of_a_gpu(monkeypatch):
    """In seconds, and every run behind a flush of the cache."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    device, calls = torch.device("cuda"), []
    clock = Clock.__new__(Clock)
    clock.device, clock._flushed = device, SimpleNamespace(zero_=lambda: calls.append("flush"))
    assert clock.drive([lambda: calls.append("a"), lambda: calls.append("b")]) == [1e-3, 1e-3]
    assert calls == [*["flush"] * FLUSHES, "a", *["flush"] * FLUSHES, "b"]


def test_memory_of_a_gpu(monkeypatch):
    """What a run adds at its peak, without what was there before."""
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 130)
    clock = Clock.__new__(Clock)
    clock.device = torch.device("cuda")
    assert clock.peak_bytes(lambda: None) == 30


def test_memory_at_its_peak():
    def run():
        first = torch.zeros(1000, 1000)  # 4 MB
        second = first + 1
        del first
        return second * 2

    assert 8_000_000 <= Clock(CPU).peak_bytes(run) < 8_100_000


def test_ceilings_are_of_this_machine():
    ceilings = measure_ceilings(Clock(CPU), torch.float32, 64, 2**16)
    assert 1e6 < ceilings.flops < 1e14 and 1e6 < ceilings.bytes < 1e13


def test_share_of_the_lower_roof():
    ceilings = Ceilings(flops=100.0, bytes=10.0)
    assert ceilings.share(flops=200, moved_bytes=1, seconds=4) == 0.5
    assert ceilings.share(flops=200, moved_bytes=30, seconds=4) == 0.75


def comparison(**changes):
    rows = [
        Row("voco", "ok", None, OURS, [0.001, 0.002, 0.003], 10),
        Row("peer", "ok", 3.0, seconds=[0.004, 0.004, 0.008]),
        Row("limit", "ok", role=LIMIT, seconds=[0.001]),
        Row("mask", "ok", role=PART, seconds=[0.001]),
        Row("absent", "not run: no GPU"),
    ]
    made = Comparison("attention", "forward", "image", rows, Work(1e6, 1e3), "float32", 4)
    return replace(made, **changes)


def test_rows_for_json():
    voco, peer, limit, part, absent = comparison().as_rows(Ceilings(1e9, 1e9))
    assert set(voco) == results.ROW_KEYS
    assert (voco["p20_ms"], voco["p50_ms"], voco["p80_ms"], voco["rounds"]) == (1.4, 2.0, 2.6, 3)
    assert voco["ratio"] == 1 and (peer["ratio"], peer["target"]) == (2.0, 3.0)
    assert (voco["suite"], voco["task"], voco["shape"], voco["x"]) == ("attention", "forward", "image", 4)
    assert voco["roof"] == 0.5 and peer["roof"] == 0.25 and limit["roof"] is part["roof"] is None
    assert (voco["flops"], voco["bytes"], voco["peak_bytes"], peer["peak_bytes"]) == (1e6, 1e3, 10, None)
    assert absent["p50_ms"] is None and absent["ratio"] is None and absent["status"] == "not run: no GPU"
    assert comparison().as_rows(None)[0]["roof"] is None
    without = comparison(rows=comparison().rows[::-1])
    assert without.as_rows(None)[-1]["ratio"] is None, "there is no ratio to a row that was not timed"


# ---- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine():
    return results.describe_machine(CPU)


def test_a_file_grows_and_is_gone_on_with(tmp_path, machine):
    path = tmp_path / "r.json"
    first = results.Results(path, machine)
    first.set_ceilings("float32", Ceilings(1e12, 1e10))
    first.add(comparison())
    assert first.has("attention", "forward", "image") and not first.has("attention", "forward", "frames")
    assert results.load(path) == first.content and len(first.content["rows"]) == 5
    assert first.content["rows"][0]["roof"] == round(1e6 / 1e12 / 0.002, 4)
    second = results.Results(path, machine | {"date": "later"}, resume=True)
    second.add(comparison(shape="frames"))
    assert len(results.load(path)["rows"]) == 10 and second.ceilings("float32") == Ceilings(1e12, 1e10)
    assert results.load(path)["date"] == machine["date"]
    second.add(comparison(rows=comparison().rows[:2]))
    assert [row["shape"] for row in results.load(path)["rows"]] == ["frames"] * 5 + ["image"] * 2, "rows are replaced"
    second.drop(["attention"])
    assert not second.has("attention", "forward", "image")
    third = results.Results(path, machine)
    third.write()
    assert results.load(path)["rows"] == [], "without resume a file is made anew"


@pytest.mark.parametrize("status", ["wrong: it is", "cannot run: no"])
def test_what_failed_is_not_there(status, machine):
    kept = results.Results(None, machine)
    kept.add(comparison(rows=[Row("voco", "ok", role=OURS, seconds=[1.0]), Row("voco 2", status, role=OURS)]))
    assert not kept.has("attention", "forward", "image")
    kept.add(comparison(rows=[Row("voco", "ok", role=OURS, seconds=[1.0]), Row("peer", status), Row("b", "not run: x")]))
    assert kept.has("attention", "forward", "image") and not kept.has("other", "forward", "image")


IDENTITY = (
    "device", "kind", "threads", "python", "torch", "triton", "transformers", "voco_kernels", "commit", "changes", "driver",
    "cuda", "capability", "flash_attn", "flash_attn_4", "nvidia_cudnn_frontend", "liger_kernel",
)  # fmt: skip


@pytest.mark.parametrize("key", IDENTITY)
def test_a_file_of_another_commit_or_machine_is_not_gone_on_with(key, tmp_path, machine):
    path = tmp_path / "r.json"
    results.Results(path, machine).write()
    before = path.read_text()
    with pytest.raises(ValueError, match=rf"must be of this run's {key} \(another\) but was of"):
        results.Results(path, machine | {key: "another"}, resume=True)
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "Expecting"),
        ("[]", "list indices"),
        ("{}", "lacks 'format_version'"),
        ('{"format_version": 1}', "format_version must be 2, but was 1"),
        ('{"format_version": 2}', "the file lacks ceilings, commit"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_something_else_is_refused(content, said, tmp_path):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"r\.json is no file of results: .*{said}"):
        results.load(path)


def test_rows_must_be_whole(tmp_path, machine):
    path = tmp_path / "r.json"
    kept = results.Results(path, machine)
    kept.add(comparison())
    del kept.content["rows"][3]["p50_ms"]
    kept.write()
    with pytest.raises(ValueError, match="row 3 lacks p50_ms"):
        results.load(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"facts": None}, "row 0: facts must be a dict"),
        ({"role": "friend"}, "row 0: role must be one of ours, peer, limit, part"),
        ({"p50_ms": None}, "row 0: times must be numbers"),
        ({"p20_ms": -1.0}, "row 0: times must be numbers that rise"),
        ({"p80_ms": 1.0}, "row 0: times must be numbers that rise"),
        ({"status": "wrong: x"}, "row 0: times must be null"),
        ({"status": None}, "row 0: names and status must be text"),
        ({"name": "peer"}, "rows must be there once"),
    ],
)
def test_rows_must_make_sense(change, said, tmp_path, machine):
    kept = results.Results(tmp_path / "r.json", machine)
    kept.add(comparison())
    kept.content["rows"][0] |= change
    kept.write()
    with pytest.raises(ValueError, match=said):
        results.load(tmp_path / "r.json")


@pytest.mark.parametrize("change", [{"date": None}, {"device": 3}, {"ceilings": {"float32": {}}}])
def test_files_must_make_sense(change, tmp_path, machine):
    kept = results.Results(tmp_path / "r.json", machine | change)
    kept.content |= change
    kept.write()
    with pytest.raises(ValueError, match=r"date must be text|device must be text|ceilings of float32 lacks copy"):
        results.load(tmp_path / "r.json")


def test_the_commit_and_what_changed_since(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(results.voco_kernels, "__file__", str(tmp_path / "voco_kernels" / "__init__.py"))
    assert results.describe_machine(CPU, "given")["commit"] == "given"
    git("init", "-q")
    for name in ("a.py", "b.md"):
        (tmp_path / name).write_text("1")
    git("add", "."), git("commit", "-q", "-m", "one")
    clean = results.describe_machine(CPU, "given")
    assert clean["commit"] == git("rev-parse", "--short=12", "HEAD") and clean["uncommitted_changes"] is False
    (tmp_path / "b.md").write_text("2")
    assert results.describe_machine(CPU)["changes"] is None, "documents are what a run writes"
    (tmp_path / "a.py").write_text("2")
    first = results.describe_machine(CPU)
    (tmp_path / "a.py").write_text("3")
    assert first["uncommitted_changes"] is True and first["changes"] != results.describe_machine(CPU)["changes"]


def test_writing_is_atomic(tmp_path, machine, monkeypatch):
    path = tmp_path / "r.json"
    kept = results.Results(path, machine)
    kept.write()
    before = path.read_text()
    with pytest.raises(ValueError):
        kept.add(comparison(work=Work(float("nan"))))

    def broken(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(OSError, match="disk full"):
            kept.content["rows"].clear()
            kept.write()
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_names_of_files(machine):
    machine |= {"device": "AMD EPYC (x)", "threads": 1}
    assert results.file_name(machine) == "cpu-amd-epyc-x-1-thread.json"
    assert results.file_name(machine | {"threads": 2}) == "cpu-amd-epyc-x-2-threads.json"
    assert results.file_name(machine | {"kind": "cuda", "device": "NVIDIA H200"}) == "nvidia-h200.json"


# ---- the suites' fixtures ----------------------------------------------------------------------------------------------

SUITE = """
import pytest, torch
from voco_llama.bench.measure import Candidate, Work

@pytest.mark.parametrize("shape", ["small", "large"])
def test_it(measure, shape):
    def made():
        with open("made.txt", "a") as file:
            file.write(shape)
        with open("random.txt", "a") as file:
            file.write(f"{torch.rand(1).item()} ")
        x = torch.randn(32, 32)
        voco = Candidate("voco", lambda: x @ x, role="ours", unchecked="a test")
        return [voco, Candidate("absent", None, absent="not here")]

    measure("product", shape, made, work=Work(2 * 32**3, 2 * 4 * 32**2), dtype=torch.float32)

def test_wrong(measure):
    def check(result):
        assert result == 2, "it is not 2"

    good = Candidate("voco", lambda: 2, check, role="ours")
    measure("wrong", "none", [good, Candidate("voco 2", lambda: 1, check, role="ours")])
"""


@pytest.fixture
def suite(pytester, monkeypatch):
    """run(*options): the suite above with bench/conftest.py, in a folder of its own."""
    # pytest-benchmark measures nothing where tests run in parallel, as these may; the suite inside does not.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    pytester.makepyfile(test_sums=SUITE)
    pytester.makeconftest("from bench.conftest import *\n")

    def run(*options):
        always = ("-rs", "-p", "no:cacheprovider", "--benchmark-only", "--device", "cpu", "--rounds", "5")
        return pytester.runpytest_inprocess(*always, *options)

    return run


def test_a_suite_writes_rows_and_goes_on(suite, pytester):
    path = pytester.path / "r.json"
    done = suite("--results", "r.json", "-k", "small", "--commit", "feed")
    assert done.ret == 0
    done.stdout.fnmatch_lines(["sums: product, small*", "*not run: not here", "*written to r.json*"])
    found = results.load(path)
    assert [(row["suite"], row["task"], row["shape"], row["name"]) for row in found["rows"]] == [
        ("sums", "product", "small", "voco"), ("sums", "product", "small", "absent"),
    ]  # fmt: skip
    assert found["rows"][0]["rounds"] == 5 and found["rows"][0]["roof"] > 0 and set(found["ceilings"]) == {"float32"}

    for _ in range(2):
        done = suite("--results", "r.json", "--resume", "--commit", "feed")
        assert done.ret == 1, "a wrong result fails however often it is asked for"
        done.stdout.fnmatch_lines(["*it is in the results already"])
        assert (pytester.path / "made.txt").read_text() == "smalllarge", "what is there is not made again"
    statuses = {(row["task"], row["shape"], row["name"]): row["status"] for row in results.load(path)["rows"]}
    assert statuses[("wrong", "none", "voco 2")] == "wrong: it is not 2" and len(statuses) == 6
    done.stdout.fnmatch_lines(["*AssertionError: voco 2: wrong: it is not 2"])


def test_how_a_suite_times(suite, pytester, monkeypatch):
    """By pytest-benchmark, with the clock's marks, each turn behind a flush; all tests see the same random numbers."""
    calls = []

    class Later:
        def __sub__(self, earlier):
            return 0.002

    monkeypatch.setattr(Clock, "flush", lambda self: calls.append("flush"))
    monkeypatch.setattr(Clock, "now", lambda self: calls.append("now") or Later())
    done = suite("--results", "r.json", "-k", "not wrong", "--benchmark-json", "b.json", "--rounds", "9", "--seconds", "0")
    assert done.ret == 0
    rows = [row for row in results.load(pytester.path / "r.json")["rows"] if row["status"] == "ok"]
    assert [(row["p50_ms"], row["rounds"]) for row in rows] == [(2.0, FEWEST)] * 2
    stats = [one["stats"] for one in json.loads((pytester.path / "b.json").read_text())["benchmarks"]]
    assert [(one["rounds"], one["median"]) for one in stats] == [(FEWEST, 0.002)] * 2
    assert calls[-3 * FEWEST :] == ["flush", "now", "now"] * FEWEST
    first, second = (pytester.path / "random.txt").read_text().split()
    assert first == second


def test_a_suite_out_of_time_begins_nothing(suite, pytester):
    done = suite("--results", "r.json", "--minutes", "0")
    assert done.ret == UNFINISHED
    done.stdout.fnmatch_lines(["*no time was left; --resume goes on with it"])
    assert not (pytester.path / "made.txt").exists()
    assert results.load(pytester.path / "r.json")["unfinished"] == {"sums": 3}
    assert suite("--results", "r.json", "--resume", "-k", "not wrong").ret == 0
    assert results.load(pytester.path / "r.json")["unfinished"] == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rounds", "0"), "--rounds must be at least 1"),
        (("--results", "nowhere/r.json"), "--results must be a file in a folder that exists"),
        (("--results", "old.json", "--resume"), "old.json is no file of results"),
        (("--device", "cuda"), "torch sees no NVIDIA GPU"),
        (("--device", "tpu"), "argument --device: invalid choice: 'tpu'"),
    ],
)
def test_options_of_suites(options, said, suite, pytester, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (pytester.path / "old.json").write_text("{}")
    done = suite(*options)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines([f"*{said}*"])


# ---- `make bench` ------------------------------------------------------------------------------------------------------


def test_every_suite_is_a_part():
    suites = {path.stem.removeprefix("test_") for path in (ROOT / "bench").glob("test_*.py")}
    assert suites == set(run.PARTS)


def test_a_run_goes_on_with_its_own_file_only(tmp_path, machine):
    path = tmp_path / "r.json"
    assert run.prepare(path, machine, run.PARTS, fresh=True).startswith("writing to")
    results.Results(path, machine, resume=True).add(comparison(), comparison(suite="kv"))
    later = machine | {"date": "later"}
    assert run.prepare(path, later, ["kv"], fresh=False) == f"going on with {path}, which keeps 10 rows"
    assert run.prepare(path, later, ["kv"], fresh=True) == f"going on with {path}, which keeps 5 rows"
    assert {row["suite"] for row in results.load(path)["rows"]} == {"attention"}
    now = machine | {"commit": "another"}
    assert "anew, since this run is of commit (another)" in run.prepare(path, now, ["kv"], fresh=False)
    assert results.load(path)["rows"] == [] and results.load(path)["commit"] == "another"
    with pytest.raises(ValueError, match=r"--results must be of this device \(GPU\), but .* is of"):
        run.prepare(path, now | {"device": "GPU"}, ["kv"], fresh=True)
    path.write_text("{}")
    with pytest.raises(ValueError, match="no file of results"):
        run.prepare(path, machine, run.PARTS, fresh=False)


@pytest.mark.parametrize(
    ("failing", "code", "status", "last"),
    [
        (None, 0, 0, "plan: passed; kv: passed; report: passed"),
        ("kv", 1, 1, "plan: passed; kv: FAILED; report: passed"),
        ("kv", UNFINISHED, 3, "plan: passed; kv: unfinished; report: passed"),
        ("report", 1, 1, "plan: passed; kv: passed; report: FAILED"),
    ],
)
def test_parts_run_one_after_the_other(failing, code, status, last, tmp_path, monkeypatch, capsys):
    commands, path = [], tmp_path / "r.json"

    def done(command, **_):
        commands.append(command)
        named = "report" if "report" in command else command[3]  # the suite's file
        return SimpleNamespace(returncode=code if failing is not None and failing in named else 0)

    monkeypatch.setattr(run.subprocess, "run", done)
    monkeypatch.setattr(run, "describe_machine", lambda *_: machine_of_a_test())
    options = ["--device", "cpu", "--part", "plan", "kv", "--results", str(path), "--minutes", "2", "--commit", "feed"]
    assert run.main([*options, "--seconds", "7"]) == status
    assert [command[3] for command in commands[:2]] == ["bench/test_plan.py", "bench/test_kv.py"]
    for command in commands[:2]:
        assert command[-11:] == [
            "--device", "cpu", "--results", str(path), "--resume",
            "--minutes", "2.0", "--seconds", "7.0", "--commit", "feed",
        ]  # fmt: skip
    assert commands[2][-5:] == ["bench", "report", str(path), "--out", str(run.REPORT)]
    assert last in capsys.readouterr().out.splitlines()


def machine_of_a_test():
    texts = {"device": "CPU", "kind": "cpu", "threads": 1, "date": "2026-01-01"}
    return dict.fromkeys([*results.MACHINE_KEYS, *results.IDENTITY]) | texts


def test_a_suite_that_hangs_is_ended(monkeypatch, capsys, tmp_path):
    def hang(command, timeout, **_):
        assert timeout == 60 * 2 + run.LAST_TEST
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(run.subprocess, "run", hang)
    options = SimpleNamespace(device="cpu", minutes=2.0, seconds=1.0, commit=None)
    assert run.run_part("kv", tmp_path / "r.json", options) == "FAILED"
    assert "kv: ended, since it took more than 2 minutes" in capsys.readouterr().out


def test_gpu_bench_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().out.startswith("gpu-bench: no NVIDIA GPU here")


# ---- problems ----------------------------------------------------------------------------------------------------------


def uncompiled(function, **_):
    return function


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("shape", [frames_shape(3, 2, 16), text_shape(40, 1, 16)], ids=lambda shape: shape.name)
def test_attention_that_grows(shape):
    problem = scaling_problem.Problem(shape, CPU, torch.float32)
    mask = scaling_problem.row_mask(problem.layout, torch.arange(problem.layout.num_tokens))
    assert (mask.numpy() == mask_of_layout(problem.layout)).all() and useful_pairs(problem.layout) == int(mask.sum())
    rows = compare(scaling_problem.candidates(problem, uncompiled), Clock(CPU), seconds=0)
    assert [(row.name, row.status) for row in rows] == [
        (name, "ok")
        for name in (attention_peers.OURS, attention_peers.DENSE, attention_peers.CAUSAL, attention_peers.FLEX)
    ]
    out = problem.batched()[2][0].transpose(0, 1)
    with pytest.raises(AssertionError, match="out"):
        problem.check(out)
    causal = next(c for c in scaling_problem.candidates(problem, uncompiled) if c.name == attention_peers.CAUSAL)
    lower = torch.ones_like(mask).tril()
    expected, _ = dense_attention(problem.q, problem.k, problem.v, lower, problem.scale)
    torch.testing.assert_close(causal.run(), expected, rtol=1e-4, atol=1e-4)
    # What no sample has seen is compared with the first result.
    unseen = next(i for i in range(len(mask)) if i not in problem.rows.tolist())
    wrong = problem.first.clone()
    wrong[unseen] = 0
    with pytest.raises(AssertionError, match="out is off by .* from voco"):
        problem.check(wrong)
    problem.first = None
    with pytest.raises(AssertionError, match="rows of zeros"):
        problem.check(wrong)


def test_masks_that_nobody_has_memory_for():
    small, large = (PaddedMask(text_shape(n - 16 * 258, 1, 16).layout()) for n in (5000, 2**16))
    assert scaling_problem.dense_absent(small, CPU) is None
    assert "would take 24.0 GiB, more than 8.0" in scaling_problem.dense_absent(large, CPU)


def row(name, tokens, p50_ms=None, status="ok"):
    return {"name": name, "p50_ms": p50_ms, "status": status, "facts": {"tokens": tokens}}


def test_patience():
    patience = Patience(seconds=2.0)
    patience.learn([row("ours", 10, 9e9), row("slow", 10, 300), row("quick", 10, 10)])
    patience.learn([row("large", 10, None, "cannot run: x")])
    names = {"ours": OURS, "slow": "peer", "quick": "peer", "large": "peer", "new": "peer", "absent": "peer"}
    found = [
        Candidate(name, lambda: None, role=role, absent="not here" if name == "absent" else None)
        for name, role in names.items()
    ]
    said = {c.name: c.absent for c in patience.apply(found, 30)}
    assert said == {
        "ours": None,
        "slow": "a call might take 3 s (0.3 s at 10 tokens, squared), more than 2",
        "quick": None,
        "large": "at 10 tokens already: cannot run: x",
        "new": None,
        "absent": "not here",
    }
    assert {c.facts["tokens"] for c in patience.apply(found, 30)} == {30}


def test_points_of_scaling():
    assert FRAMES[0] == 1 and FRAMES[-1] == 2048 and list(FRAMES) == sorted(FRAMES) and list(TEXT) == sorted(TEXT)


@pytest.fixture(scope="module")
def answers():
    return end_to_end.Problem(3, CPU, new_tokens=2)


def test_answers_agree(answers, monkeypatch):
    rows = compare(end_to_end.candidates(answers), Clock(CPU), seconds=0)
    assert [row.status for row in rows] == ["ok"] * 4
    answers.check_compressed(answers.compress_by_loop())
    compress, calls = answers.compress, []
    monkeypatch.setattr(answers, "compress", lambda: calls.append(None) or compress())
    stored, stages, *_ = end_to_end.candidates(answers)
    stored.run(), stages.run(), stages.run()
    assert len(calls) == 2, "stored K/V are there, two stages make them"
    assert answers.look().shape == (3 * 64, 64)


def test_wrong_answers_are_found(answers):
    """A frame whose values are gone, or frames in another order, move logits by a percent or two."""
    kv = answers.compress()
    values = torch.cat([torch.zeros_like(kv.v[:, :2]), kv.v[:, 2:]], dim=1)
    silent = VocoKV(kv.k, values, segments=kv.segments, meta=kv.meta)
    swapped = VocoKV(kv.k.roll(2, 1), kv.v.roll(2, 1), segments=kv.segments, meta=kv.meta)
    for wrong in (silent, swapped):
        with pytest.raises(AssertionError, match="logits"):
            answers.check(answers.generate(answers.prompt, voco_kv=wrong))
    kv.v[:, -1] += 0.1
    with pytest.raises(AssertionError, match="v of frame 2"):
        answers.check_compressed(kv)


def test_answers_that_part_ways_are_compared_up_to_there(answers):
    true, eager = answers.truth
    other = true.clone()
    other[0, int(true[0].argmin())] = true[0].max() + 1  # another token is chosen
    with pytest.raises(AssertionError, match="logits"):
        answers.check(other.float())
    answers.truth = (true, eager.clone())
    answers.truth[1][0] = true[0].flip(0).float()  # the eager model chose another, so only the first is compared
    later = true.float().clone()
    later[1] = 0
    answers.check(later)
    del answers.truth


def test_static_update():
    problem = KVProblem(KV_SHAPE, CPU)
    run = problem.static_update()
    for _ in range(2):
        problem.check_injected(run())


@pytest.mark.parametrize("broken", [False, True])
def test_a_graph_that_does_nothing_is_found(broken, monkeypatch):
    """What is captured ran before, and so did what it was compared with; only the graph itself may make results right."""
    problem = KVProblem(KV_SHAPE, CPU)
    run = problem.injection("torch", problem.static_caches())

    class Graph:
        def replay(self):
            if not broken:
                run()

    nothing = SimpleNamespace(wait_stream=lambda stream: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: nothing)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda x: nullcontext())
    replay = gpu_kv.captured(run, torch.device("cuda"))
    if broken:
        with pytest.raises(AssertionError):
            problem.check_injected(replay())
    else:
        problem.check_injected(replay())
        problem.check_injected(replay())


def test_on_a_cpu_nothing_is_captured():
    problem = KVProblem(KV_SHAPE, CPU)
    assert not any(c.captured for c in gpu_kv.candidates(problem, ("torch",)))
    assert gpu_kv.captured(test_patience, CPU) is test_patience
