"""What benchmarks are made of: turns, statuses, memory, ceilings, files of results, and the suites' own fixtures."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import mask_of_layout
from voco_llama.bench import results
from voco_llama.bench.clock import Ceilings, Clock, measure_ceilings
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

from bench import attention_peers, end_to_end, run, scaling_problem
from bench.kv_problem import Problem as KVProblem
from bench.sanitized import KV_SHAPE
from bench.scaling_problem import Patience
from bench.shapes import FRAMES, TEXT, frames_shape, text_shape
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
        Candidate("a", lambda: calls.append("a"), target=2.0, role=OURS, facts={"layers": 2}),
        Candidate("b", lambda: calls.append("b")),
        Candidate("wrong", lambda: None, wrong),
        Candidate("large", fail),
        Candidate("absent", fail, absent="flash-attn is not installed"),
    ]
    # So many seconds that only the rounds end it.
    a, b, *others = compare(candidates, Clock(CPU), seconds=1e9, most_rounds=7)
    assert [row.status for row in others] == [
        "wrong: too far off", "cannot run: out of memory", "not run: flash-attn is not installed",
    ]  # fmt: skip
    assert not any(row.seconds for row in others) and others[0].peak_bytes is None
    assert len(a.seconds) == len(b.seconds) == 7 and (a.target, a.role, a.facts) == (2.0, OURS, {"layers": 2})
    timed = calls[-14:]
    assert ["".join(pair) for pair in zip(timed[::2], timed[1::2])][:3] == ["ab", "ba", "ab"]


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, FEWEST), (1.0, LEAST_ROUNDS)])
def test_slow_rounds_are_few(seconds, rounds, monkeypatch):
    monkeypatch.setattr(Clock, "time", lambda self, run: 0.5)
    [row] = compare([Candidate("a", lambda: None)], Clock(CPU), seconds=seconds)
    assert len(row.seconds) == rounds


def test_nothing_to_time():
    [row] = compare([Candidate("a", lambda: 1 / 0)], Clock(CPU))
    assert row.status == "cannot run: division by zero" and not row.seconds


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
    second = results.Results(path, machine | {"date": "later", "uncommitted_changes": True}, resume=True)
    second.add(comparison(shape="frames"))
    assert len(results.load(path)["rows"]) == 10 and second.ceilings("float32") == Ceilings(1e12, 1e10)
    assert results.load(path)["date"] == machine["date"] and results.load(path)["uncommitted_changes"] is True
    third = results.Results(path, machine)
    third.write()
    assert results.load(path)["rows"] == [], "without resume a file is made anew"


@pytest.mark.parametrize("key", ["commit", "device", "torch", "threads"])
def test_a_file_of_another_commit_or_machine_is_not_gone_on_with(key, tmp_path, machine):
    path = tmp_path / "r.json"
    results.Results(path, machine).write()
    before = path.read_text()
    with pytest.raises(ValueError, match=rf"must be of this run's {key} \(another\) to go on with it, but was of"):
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
        x = torch.randn(32, 32)
        return [Candidate("voco", lambda: x @ x), Candidate("absent", None, absent="not here")]

    measure("product", shape, made, work=Work(2 * 32**3, 2 * 4 * 32**2), dtype=torch.float32)

def test_wrong(measure):
    def check(result):
        assert result == 2, "it is not 2"

    measure("wrong", "none", [Candidate("voco", lambda: 1, check)])
"""


@pytest.fixture
def suite(pytester):
    """run(*options): the suite above with bench/conftest.py, in a folder of its own."""
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

    done = suite("--results", "r.json", "--resume", "--commit", "feed")
    assert done.ret == 1, "the wrong result fails"
    done.stdout.fnmatch_lines(["*it is in the results already"])
    assert (pytester.path / "made.txt").read_text() == "smalllarge", "what is there is not made again"
    statuses = {(row["task"], row["shape"], row["name"]): row["status"] for row in results.load(path)["rows"]}
    assert statuses[("wrong", "none", "voco")] == "wrong: it is not 2" and len(statuses) == 5


def test_a_suite_out_of_time_begins_nothing(suite, pytester):
    done = suite("--results", "r.json", "--minutes", "0")
    assert done.ret == 0
    done.stdout.fnmatch_lines(["*no time was left; --resume goes on with it"])
    assert not (pytester.path / "made.txt").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rounds", "0"), "--rounds must be at least 1"),
        (("--results", "nowhere/r.json"), "--results must be a file in a folder that exists"),
        (("--results", "old.json", "--resume"), "old.json is no file of results"),
        (("--device", "cuda"), "torch sees no NVIDIA GPU"),
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
    assert run.prepare(path, machine, fresh=False).startswith("writing to")
    results.Results(path, machine, resume=True).add(comparison())
    assert run.prepare(path, machine | {"date": "later"}, fresh=False) == f"going on with {path}, which has 5 rows"
    for fresh, now in ((True, machine), (False, machine | {"commit": "another"})):
        results.Results(path, machine).add(comparison())
        assert run.prepare(path, now, fresh).startswith("writing to")
        assert results.load(path)["rows"] == [] and results.load(path)["commit"] == now["commit"]
    path.write_text("{}")
    with pytest.raises(ValueError, match="no file of results"):
        run.prepare(path, machine, fresh=False)


@pytest.mark.parametrize("failing", [None, "kv", "report"])
def test_parts_run_one_after_the_other(failing, tmp_path, monkeypatch, capsys):
    commands = []

    def done(command, **_):
        commands.append(" ".join(command))
        failed = failing is not None and failing in command[3]  # the suite's file, or "report"
        failed |= failing == "report" and "report" in command
        return SimpleNamespace(returncode=int(failed))

    monkeypatch.setattr(run.subprocess, "run", done)
    monkeypatch.setattr(run, "describe_machine", lambda *_: machine_of_a_test())
    status = run.main(["--device", "cpu", "--part", "plan", "kv", "--results", str(tmp_path / "r.json"), "--minutes", "2"])
    assert status == (failing is not None)
    plan, kv, report = commands
    assert "bench/test_plan.py" in plan and "bench/test_kv.py" in kv and "bench report" in report
    assert all(f"--results {tmp_path / 'r.json'} --resume --minutes 2" in command for command in (plan, kv))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("all passed; results in" if failing is None else f"FAILED: {failing}")


def machine_of_a_test():
    return dict.fromkeys(results.MACHINE_KEYS | {"capability"}, None) | {"device": "CPU", "kind": "cpu", "threads": 1}


def test_a_suite_that_hangs_is_ended(monkeypatch, capsys, tmp_path):
    def hang(command, timeout, **_):
        assert timeout == 60 * 2 + run.LAST_TEST
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(run.subprocess, "run", hang)
    options = SimpleNamespace(device="cpu", minutes=2.0, seconds=1.0, commit=None)
    assert not run.run_part("kv", tmp_path / "r.json", options)
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


def test_masks_that_nobody_has_memory_for():
    assert scaling_problem.dense_absent(4096, torch.float32, CPU) is None
    assert "would take 20.0 GiB, more than 8.0" in scaling_problem.dense_absent(2**16, torch.float32, CPU)


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


def test_answers_agree(answers):
    rows = compare(end_to_end.candidates(answers), Clock(CPU), seconds=0)
    assert [row.status for row in rows] == ["ok"] * 4
    answers.check_compressed(answers.compress_by_loop())
    assert answers.look().shape == (3 * 64, 64)


def test_wrong_answers_are_found(answers):
    with pytest.raises(AssertionError, match="logits are off"):
        answers.check(answers.uncompressed())
    kv = answers.compress()
    kv.v[:, -1] += 1
    with pytest.raises(AssertionError, match="v of frame 2 is off"):
        answers.check_compressed(kv)


def test_static_update():
    problem = KVProblem(KV_SHAPE, CPU)
    run = problem.static_update()
    for _ in range(2):
        problem.check_injected(run())
