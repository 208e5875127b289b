"""What was verified on which GPU, and `make gpu-check` itself, on a CPU with tiny shapes and the torch backend."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from time import monotonic
from types import SimpleNamespace

import pytest
import torch
from reference import assert_error_rule, kinds_of, mask_of_layout
from voco_llama.bench.clock import Ceilings
from voco_llama.bench.measure import OURS, Comparison, Row, Work
from voco_llama.bench.results import load

from bench import attention_peers, attention_problem, gpu_check, gpu_checks, sanitized, verified
from bench.gpu_table import PLAN, PLAN_CPU, PLAN_DEVICE, table_lines
from bench.shapes import GPU, AttentionShape
from voco_kernels import Image, Text
from voco_kernels.tiles import build_tiles, useful_pairs

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


# ---- the file of verifications -----------------------------------------------------------------------------------------


def record(date="2026-01-02T03:04:05+00:00", device="NVIDIA H200", commit="abc", **changes):
    values = dict.fromkeys(verified.RECORD_KEYS)
    values |= {"date": date, "device": device, "commit": commit, "uncommitted_changes": False}
    return values | changes


@pytest.fixture
def tree(tmp_path):
    """A folder with every source in it."""
    for source in {source for group in verified.GROUPS.values() for source in group}:
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / source).write_text(source)
    return tmp_path


def add(content, tree, groups, family="sm_90", **changes):
    sources = {source for group in groups for source in verified.GROUPS[group]}
    return verified.add(content, family, record(**changes), verified.hashes_of(sources, tree))


def standing(content, tree, group, family="sm_90"):
    return verified.standing(content, family, verified.GROUPS[group], tree)


NOTHING = verified.load(Path("/nonexistent"))


def test_every_source_exists():
    missing = [s for s, sha in verified.hashes_of(s for g in verified.GROUPS.values() for s in g).items() if sha is None]
    assert not missing


def test_every_kernel_source_belongs_to_a_group():
    listed = {source for sources in verified.GROUPS.values() for source in sources}
    folders = ("voco_kernels/backends", "csrc")
    kernels = {p for f in folders for p in (ROOT / f).rglob("*.*") if p.suffix in (".py", ".cu", ".cuh", ".cpp", ".h")}
    elsewhere = {"voco_kernels/backends/__init__.py", "voco_kernels/backends/triton/__init__.py"}
    named = {p.relative_to(ROOT).as_posix() for p in kernels if "csrc/host" not in p.as_posix()}
    assert named - elsewhere <= listed


def test_file_of_this_repository():
    """Its schema, and README's table is what it says."""
    content, readme = verified.load(), verified.README.read_text()
    expected = verified.with_table(readme, verified.status_table(content))
    assert readme == expected, "run `python -m bench.verified --write`"
    assert verified.report_lines()


def test_nothing_verified(tree):
    assert "not yet run on a GPU" in verified.report_lines(NOTHING, tree)[0]
    table = verified.status_table(NOTHING, tree).splitlines()
    assert len({line.count("|") for line in table}) == 1 and table[1] == "| --- | --- | --- | --- | --- |"
    [row] = [line for line in table if "`triton` attention" in line]
    assert row.count("not yet run on a GPU") == 2 and row.endswith("| none |")


def test_verified_until_a_source_changes(tree):
    content = add(NOTHING, tree, verified.GROUPS)
    assert all(standing(content, tree, group).verified for group in verified.GROUPS)
    assert standing(content, tree, "torch", "sm_80").record is None
    assert "verified on NVIDIA H200" in verified.status_table(content, tree)
    (tree / "voco_kernels/backends/triton/forward.py").write_text("changed")
    assert standing(content, tree, "triton backward").verified
    found = standing(content, tree, "triton forward")
    assert not found.verified and found.changed == ("voco_kernels/backends/triton/forward.py",)
    lines = dict(line.split(": ", 1) for line in verified.report_lines(content, tree))
    assert lines["triton forward"] == "CHANGED since it was verified on sm_90 at abc: forward.py"
    assert lines["triton backward"] == "verified on sm_90 at abc"
    [row] = [line for line in verified.status_table(content, tree).splitlines() if "`triton` attention" in line]
    assert "changed since it ran on NVIDIA H200" in row and "`abc` (sm_90)" in row


def test_a_source_that_is_gone_is_changed(tree):
    content = add(NOTHING, tree, ["flash"])
    (tree / "voco_kernels/backends/flash.py").unlink()
    assert standing(content, tree, "flash").changed == ("voco_kernels/backends/flash.py",)
    with pytest.raises(ValueError, match=r"must be there: voco_kernels/backends/flash\.py"):
        add(NOTHING, tree, ["flash"])


def test_a_new_run_replaces_the_old_one_of_its_family_only(tree):
    content = add(NOTHING, tree, verified.GROUPS, family="sm_80", device="NVIDIA A100")
    content = add(content, tree, verified.GROUPS)
    (tree / "voco_kernels/tiles.py").write_text("changed")
    content = add(content, tree, verified.GROUPS, date="2026-02-02", commit="def", uncommitted_changes=True)
    assert standing(content, tree, "triton plan").record["commit"] == "def"
    assert not standing(content, tree, "triton plan", "sm_80").verified
    assert standing(content, tree, "torch", "sm_80").verified
    runs = [(family, old["commit"]) for _, _, family, old in verified._records(content)]
    assert set(runs) == {("sm_80", "abc"), ("sm_90", "def")}
    assert "`def+` (sm_90)" in verified.status_table(content, tree)


def test_a_run_stays_for_what_a_newer_one_left_out(tree):
    """The two share a source; a machine without FlashAttention says nothing about the backend that needs it."""
    content = add(NOTHING, tree, ["torch", "flash"])
    content = add(content, tree, ["torch"], date="2026-02-02", commit="def")
    assert standing(content, tree, "flash").verified and standing(content, tree, "flash").record["commit"] == "abc"
    assert standing(content, tree, "torch").record["commit"] == "def"


def test_sources_that_never_ran_together_are_not_verified(tree):
    content = add(NOTHING, tree, ["torch", "flash"])
    plan, flash = tree / "voco_kernels/plan.py", tree / "voco_kernels/backends/flash.py"
    plan.write_text("newer")
    content = add(content, tree, ["torch"], date="2026-02-02")
    hashes = verified.hashes_of(verified.GROUPS["flash"], tree)
    assert all(sha in content["sources"][source] for source, sha in hashes.items()) and flash.exists()
    assert not standing(content, tree, "flash").verified


def test_other_families_get_a_column(tree):
    content = add(NOTHING, tree, ["torch"], family="sm_120", device="GPU of another family")
    header, _, first, *_ = verified.status_table(content, tree).splitlines()
    assert "| sm_120 |" in header and "verified on GPU of another family" in first


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"format_version": 2, "sources": {}}',
        '{"format_version": 1, "sources": []}',
        '{"format_version": 1, "sources": {"a.py": {"00": {"sm_90": []}}, "b.py": {"00": {"sm_90": [{}]}}}}',
    ],
)
def test_a_file_that_is_something_else_is_refused(text, tmp_path):
    path = tmp_path / "gpu_verified.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"gpu_verified\.json is not a file of GPU verifications"):
        verified.load(path)


def test_a_record_must_be_whole(tree):
    incomplete = record()
    del incomplete["errors"]
    with pytest.raises(ValueError, match="must have errors"):
        verified.add(NOTHING, "sm_90", incomplete, {})


def test_writing_is_atomic(tmp_path, tree, monkeypatch):
    path = tmp_path / "gpu_verified.json"
    content = add(NOTHING, tree, verified.GROUPS)
    verified.write_json(path, content)
    assert verified.load(path) == content
    before = path.read_text()

    def broken(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(OSError, match="disk full"):
            verified.write_json(path, NOTHING)
    with pytest.raises(ValueError):
        verified.write_json(path, {"error": float("nan")})
    assert path.read_text() == before and not list(tmp_path.glob("*.part"))


def test_readme_needs_both_markers():
    text = f"a\n{verified.BEGIN}\nold\n{verified.END}\nb"
    assert verified.with_table(text, "| new |") == f"a\n{verified.BEGIN}\n| new |\n{verified.END}\nb"
    for broken in ("", verified.BEGIN, f"{verified.END}{verified.BEGIN}", text + text):
        with pytest.raises(ValueError, match="README must hold"):
            verified.with_table(broken, "")


def test_reading_it_needs_no_torch():
    command = [sys.executable, "-c", "import sys; sys.modules['torch'] = None; import bench.verified as v; v.main([])"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout, done.stderr


# ---- shapes and arithmetic ---------------------------------------------------------------------------------------------


def test_shapes_are_the_named_ones():
    tokens = {name: shape.layout().num_tokens for name, shape in GPU.items()}
    assert tokens == {
        "sft": 19 * 878, "anyres": 5 * 3288, "video": 64 * 258 + 256, "long_video": 256 * 264 + 512, "chat": 16 * 770,
        "gqa": 64 * 258 + 256,
    }  # fmt: skip
    heads = {(shape.heads, shape.kv_heads, shape.head_dim) for shape in GPU.values()}
    assert heads == {(32, 32, 128), (32, 8, 128)}


@pytest.mark.parametrize("shape", GPU.values(), ids=GPU)
def test_shrunk_shapes_are_of_the_same_kind(shape):
    small = shape.shrunk()
    layout = small.layout()
    assert layout.num_tokens <= 4096
    assert layout.isolated == shape.isolated and small.heads * shape.kv_heads == shape.heads * small.kv_heads
    assert {type(span) for d in small.documents for span in d} == {type(span) for d in shape.documents for span in d}
    assert useful_pairs(layout) == mask_of_layout(layout).sum()


def test_work_and_bytes():
    shape = AttentionShape("tiny", "", ((Image(3, 1), Text(2)),), True, heads=4, kv_heads=2, head_dim=8)
    pairs = 1 + 2 + 3 + 4 + 2 + 3
    assert shape.flops(backward=False) == 4 * 8 * 4 * pairs
    assert shape.flops(backward=True) == 3.5 * shape.flops(backward=False)
    assert shape.moved_bytes(torch.bfloat16, backward=False) == 2 * 6 * 8 * (4 + 2 + 2 + 4)
    assert shape.moved_bytes(torch.bfloat16, backward=True) == 3 * shape.moved_bytes(torch.bfloat16, backward=False)


def test_share_of_the_bound_is_that_of_the_rule():
    layout = TINY["chat"].layout()
    kinds, true = kinds_of(layout), torch.randn(layout.num_tokens, 2, 8, dtype=torch.float64)
    eager = true.to(torch.bfloat16)
    for noise in (0.0, 0.01, 0.02, 0.04, 0.08, float("nan")):
        x = (true + noise * torch.randn_like(true)).to(torch.bfloat16)
        share = attention_problem.error_over_bound(x, eager, true, kinds)
        try:
            assert_error_rule("x", x, eager, true, kinds)
        except AssertionError:
            assert not share <= 1
        else:
            assert share <= 1


# ---- checks -------------------------------------------------------------------------------------------------------------

TINY = {
    "sft": AttentionShape("sft", "", ((Image(9, 2), Text(6)), (Image(7, 1), Text(3))), True, 2, 2, 16),
    "video": AttentionShape("video", "", ((*[Image(8, 2)] * 7, Text(5)),), True, 2, 2, 16),
    "chat": AttentionShape("chat", "", ((Text(4), Image(6, 2), Text(5), Image(7, 1), Text(3)), (Image(3, 1), Text(2))),
                           False, 4, 2, 16),
}  # fmt: skip


def uncompiled(function, **_):
    return function


def test_both_checks_find_a_wrong_backend(monkeypatch):
    shape, where = TINY["video"], (CPU, torch.float32, "torch")
    assert set(gpu_checks.small_errors(shape, *where)) == set(attention_problem.RESULTS)
    problem = attention_problem.Problem(shape, *where)
    assert max(gpu_checks.full_errors(problem).values()) < 1
    monkeypatch.setattr(problem, "packed", [x + 0.1 for x in problem.packed])
    with pytest.raises(AssertionError, match="error"):
        gpu_checks.full_errors(problem)
    runs = []

    def noisy(*_):
        runs.append(None)
        return dict.fromkeys(attention_problem.RESULTS, torch.ones(1)) | {"dk": torch.full((1,), float(len(runs)))}

    monkeypatch.setattr(gpu_checks, "results_of", noisy)
    with pytest.raises(AssertionError, match="dk differs from run to run"):
        gpu_checks.check_repeatable(shape, *where)


@pytest.mark.parametrize("wrong", [None, "row_tiles", "after"])
def test_plans_are_compared(wrong, monkeypatch):
    def build(layout, geometry):
        plan = build_tiles(layout, geometry)
        changed = {wrong: getattr(plan, wrong) + 1} if wrong else {}
        # Uncut, as on a device.
        padded = torch.cat([plan.key_tiles, plan.key_tiles.new_zeros(9, plan.key_tiles.shape[1])])
        return dataclasses.replace(plan, key_tiles=padded, **changed)

    monkeypatch.setitem(sys.modules, "voco_kernels.backends.triton.plan", SimpleNamespace(build_tiles_on_gpu=build))
    if wrong is None:
        gpu_checks.check_plan(TINY["chat"], CPU)
    else:
        with pytest.raises(AssertionError, match=f"the plan's {wrong} differs"):
            gpu_checks.check_plan(TINY["chat"], CPU)


# ---- other processes ---------------------------------------------------------------------------------------------------

UNSUPPORTED = "========= Error: Device not supported. Please refer to the documentation\n========= ERROR SUMMARY: 2 errors"


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (0, "========= COMPUTE-SANITIZER\n3 layouts\n========= ERROR SUMMARY: 0 errors", "pass"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "pass"),
        (99, "========= Invalid read\n========= at f\n========= ERROR SUMMARY: 2 errors", "fail: ERROR SUMMARY: 2"),
        (0, "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", "fail: RACECHECK SUMMARY: 1"),
        (99, UNSUPPORTED, "not run: Error: Device not supported"),
        (1, "Traceback\nValueError: no\n========= ERROR SUMMARY: 0 errors", "fail: ValueError: no"),
        (1, "========= Error: cannot attach", "not run: Error: cannot attach"),
        (127, "no such option", "not run: no such option"),
        (None, "========= COMPUTE-SANITIZER", "not run: it took more than 150 seconds"),
    ],
)
def test_verdict_of_a_sanitizer(status, output, expected):
    assert gpu_checks.verdict(status, output).startswith(expected)


def test_no_sanitizer(monkeypatch):
    monkeypatch.setattr(gpu_checks, "CUDA_FOLDERS", ())
    for name in ("PATH", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    said = gpu_checks.run_sanitizer("memcheck", "cpu", ("torch",), ("torch",), monotonic() + 60)
    assert said.startswith("not run: there is no compute-sanitizer")


def test_what_a_sanitizer_watches(capsys):
    sanitized.main(["--device", "cpu", "--backends", "torch", "--kv-backends", "torch"])
    assert "5 layouts" in capsys.readouterr().out


def test_a_command_that_hangs_is_ended():
    status, output = gpu_checks.run_command([sys.executable, "-c", "print('begun', flush=True); input()"], 1)
    assert status in (None, 1) and "begun" in output
    status, _ = gpu_checks.run_command([sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert status is None


MARK = "@pytest.mark." + "gpu\n"
TESTS = {
    "test_good.py": f"import pytest\n{MARK}def test_a(): pass\n{MARK}def test_b(): pytest.skip('no')\ndef test_c(): 1 / 0\n",
    "test_bad.py": f"import pytest\n{MARK}def test_d(): assert 0\n",
    "test_broken.py": f"import pytest\nimport no_such_module\n{MARK}def test_e(): pass\n",
    "test_other.py": "import no_such_module\n",
}


@pytest.fixture
def some_tests(tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs one\n")

    def write(*names):
        for name in names:
            (folder / name).write_text(TESTS[name])
        return folder

    return write


# ---- the whole of it ---------------------------------------------------------------------------------------------------


def settings_of(folder, tests, **changes):
    chosen = gpu_check.Settings(
        CPU, backend="torch", dtype=torch.float32, shapes={name: TINY[name] for name in ("video", "chat")}, tests=tests,
        kv_backends=("torch",), kv_shapes={"image": sanitized.KV_SHAPE},
        sanitizers=(), results=folder, verified=folder / "gpu_verified.json", seconds=0, compiler=uncompiled,
        ceiling=(32, 2**10), commit="feed",
    )  # fmt: skip
    return dataclasses.replace(chosen, **changes)


def test_a_run_that_passes(tmp_path, some_tests, capsys):
    assert gpu_check.GpuCheck(settings_of(tmp_path, some_tests("test_good.py", "test_other.py"))).run() == 0
    said = capsys.readouterr().out
    assert "tests/test_good.py: 1 passed, 0 failed, 1 skipped" in said and said.rstrip().endswith("all passed")
    assert "check video: same bits twice" in said and "check backend flash: not run" in said
    [path] = tmp_path.glob("*-check-20*.json")
    found = load(path)
    assert found["failed"] == [] and found["tests"] == {"passed": 1, "failed": 0, "skipped": 1, "failures": []}
    assert {(row["suite"], row["task"], row["shape"]) for row in found["rows"]} == {
        *(("attention", task, shape) for task in ("forward", "forward + backward") for shape in ("video", "chat")),
        ("kv", "into a cache", "images"), ("plan", PLAN, "video"),
    }  # fmt: skip
    rows = {(row["task"], row["shape"], row["name"]): row for row in found["rows"]}
    assert "compiled module: not asked for" in said
    assert "check K/V path torch: 1 shapes keep to the error rule" in said and "inject images: voco torch" in said
    assert rows[("into a cache", "images", "voco torch")]["facts"]["host_us"] > 0
    assert rows[("forward", "video", "voco torch")]["roof"] > 0 and rows[(PLAN, "video", PLAN_CPU)]["p50_ms"] > 0
    assert not any("blocks of 64" in name or "causal" in name for _, _, name in rows), "there is time for a few peers only"
    assert {"device", "capability", "driver", "torch", "triton", "python", "commit", "uncommitted_changes"} <= set(found)
    content = verified.load(tmp_path / "gpu_verified.json")
    groups = ("torch", "torch K/V path", "torch decoding")
    assert set(content["sources"]) == {source for group in groups for source in verified.GROUPS[group]}
    [kept] = content["sources"]["voco_kernels/plan.py"].popitem()[1]["none"]
    assert kept["tests"] == {"passed": 1, "failed": 0, "skipped": 1} and set(kept["errors"]) == {"torch", "reference"}
    assert set(kept["errors"]["torch"]) == set(attention_problem.RESULTS) and max(kept["errors"]["torch"].values()) <= 1


def test_a_module_that_cannot_be_built_leaves_its_backend_out(tmp_path, some_tests, capsys, monkeypatch):
    # Imported before anything is patched: a module that is imported while it is would keep the patch.
    from voco_kernels.backends import cuda

    monkeypatch.setattr(cuda, "unavailable_reason", lambda: "it is missing")
    run = gpu_checks.run_command

    def without_nvcc(command, limit):
        return (1, "nvcc: not found\n") if "setup.py" in command else run(command, limit)

    monkeypatch.setattr(gpu_checks, "run_command", without_nvcc)
    settings = settings_of(tmp_path, some_tests("test_good.py"), kv_backends=("cuda", "torch"))
    assert gpu_check.GpuCheck(settings).run() == 0
    said = capsys.readouterr().out
    assert "compiled module: not built: nvcc: not found" in said and "check K/V path cuda" not in said
    [path] = tmp_path.glob("*-20*.json")
    assert json.loads(path.read_text())["backends"]["cuda K/V path"] == "not run: it is missing"


@pytest.mark.parametrize("names", [("test_good.py", "test_bad.py"), ("test_broken.py",), ()])
def test_a_run_that_fails_records_nothing(names, tmp_path, some_tests, capsys):
    folder = settings_of(tmp_path, some_tests(*names), shapes={"video": TINY["video"]})
    assert gpu_check.GpuCheck(folder).run() == 1
    said = capsys.readouterr().out
    assert "time video: forward" in said and "FAILED" in said.splitlines()[-1]
    assert not (tmp_path / "gpu_verified.json").exists() and list(tmp_path.glob("*-20*.json"))


def test_a_run_out_of_time_still_ends(tmp_path, some_tests, capsys):
    settings = settings_of(tmp_path, some_tests(), shapes={"video": TINY["video"]}, minutes=0)
    assert gpu_check.GpuCheck(settings).run() == 1
    assert "time video: not run: no time was left" in capsys.readouterr().out


def test_the_table_has_targets_and_gaps():
    rows = [
        Row("voco triton", "ok", None, OURS, [0.001], 3 * 2**20),
        Row(f"{attention_peers.SPLIT} (slow)", "ok", 1.5, seconds=[0.003]),
        Row(f"{attention_peers.SPLIT} (torch)", "ok", 1.5, seconds=[0.002]),
        Row(attention_peers.FLEX, "cannot run: out of memory", 1.5),
    ]
    comparison = Comparison("attention", "forward", "video", rows, Work(0.61e6, 0))
    plans = [Row(name, "ok", None, OURS, [1e-5], facts={"tokens": 16640}) for name in (PLAN_DEVICE, PLAN_CPU)]
    found = {
        "device": "NVIDIA H200", "capability": [9, 0], "driver": "1", "torch": "2", "triton": "3", "python": "3",
        "commit": "abc", "uncommitted_changes": True, "sanitizers": {"memcheck": "pass"}, "failed": ["plan"],
        "tests": {"passed": 3, "failed": 0, "skipped": 1},
        "ceilings": {"bfloat16": {"matmul_tflops": 790.0, "copy_gb_per_s": 4300.0}},
        "checks": {"video": {"same_bits": True, "errors": {"out": 0.5, "dq": 0.75}}, "chat": {"same_bits": False}},
        "rows": comparison.as_rows(Ceilings(1e9, 1e9)) + Comparison("plan", PLAN, "video", plans).as_rows(None),
    }  # fmt: skip
    lines = table_lines(found)
    assert "capability 9.0" in lines[0] and "commit abc with uncommitted changes" in lines[0]
    assert "memcheck pass" in lines[1] and "same bits twice 1 of 2" in lines[1] and "error / bound 0.75" in lines[1]
    assert "matmul 790 TFLOP/s" in lines[2] and "plan of 16640 tokens: 10 us (<= 30) on the device" in lines[2]
    [video] = [line.split() for line in lines if line.startswith("video")]
    assert video[:7] == ["video", "1.000", "61", "[60]", "2.00", "[1.5]", "-"]
    assert video[-3:] == ["3", "/", "-"]
    assert lines[-1] == "FAILED: plan" and len(lines) <= 14


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("gpu-check: no NVIDIA GPU here")
