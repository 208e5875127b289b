"""Decoding by the CUDA kernels in the emulation: values, sanitizers, defects that must be seen; and their machine code.

Values are held to the error rule, as those of the torch backend in tests/test_decode.py.
"""

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cuda_host
import pytest
import torch
from cuda_backend import emulated
from decode_samples import Form, Problem, forms
from fake_cuda import cuobjdump
from hypothesis import given, settings

from voco_kernels import decode_attention
from voco_kernels.backends import cuda as package
from voco_kernels.backends.cuda import decode

HERE = Path(__file__).resolve().parent
CASES = HERE / "cuda" / "decode_cases.cpp"
BUDGET = HERE / "cuda_decode_budget.json"
HALF, BYTES = (torch.float16, torch.bfloat16), (torch.int8, torch.float8_e4m3fn)
FORM = Form(groups=((3, 40), (2, 7), (1, 0)), lengths=(5, 17, 1, 9, 2, 30), tokens=2, dtype=torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def backend():
    with emulated() as module:
        yield module


# ---- values ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(forms(HALF))
def test_random_problems(form):
    problem = Problem(form)
    problem.check(problem.run("cuda"))


@settings(max_examples=40)
@given(forms(HALF, BYTES))
def test_random_problems_with_a_quantised_prefix(form):
    problem = Problem(form)
    problem.check(problem.run("cuda"))


@pytest.mark.full
@settings(max_examples=600)
@given(forms(HALF, (None, *BYTES), longest=300))
def test_many_random_problems(form):
    problem = Problem(form)
    problem.check(problem.run("cuda"))


@pytest.mark.parametrize("stored", [None, *BYTES])
def test_many_splits(monkeypatch, stored):
    """More than there are steps of keys; and so many groups that a warp looks for its own twice."""
    problem = Problem(replace(FORM, groups=((0, 1),) * 33 + FORM.groups + ((0, 0),), stored=stored, head_dim=96))
    for count in (1, 2, 3, 7):
        monkeypatch.setattr(decode, "splits", lambda items, keys, places: count)  # noqa: B023
        problem.check(problem.run("cuda"))


def test_long_prefixes_and_rows_of_several_blocks():
    problem = Problem(Form(groups=((5, 700), (3, 33)), lengths=(20,) * 8, tokens=16, group_heads=4, dtype=torch.float16))
    problem.check(problem.run("cuda"))


def test_two_runs_give_the_same_bits():
    problem = Problem(replace(FORM, groups=((6, 600),)))
    for x, y in zip(problem.run("cuda"), problem.run("cuda")):
        assert torch.equal(x, y)


@pytest.mark.parametrize("factor", [1e-4, 300.0])
@pytest.mark.parametrize("stored", BYTES)
def test_scales_of_any_size(factor, stored):
    """Weights that values' scales have multiplied fit into float16, however large the values are."""
    problem = Problem(replace(FORM, groups=((6, 200),), dtype=torch.float16, stored=stored))
    problem.prefix.v_scale.mul_(factor / problem.prefix.v.float().abs().max() / problem.prefix.v_scale.max())
    problem.v_cache.mul_(factor)
    for kv in problem.own:
        kv[1].mul_(factor)
    problem.check(problem.run("cuda"))


@pytest.mark.parametrize("entry", [-1, 10**6, -(2**31)])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_entries_that_are_no_block_hide_their_keys(entry, which):
    """Also in the middle of a step, where keys behind them are seen by some queries and not by others."""
    problem = Problem(Form(groups=(), lengths=(12,), tokens=3, block=4, dtype=torch.float16))
    problem.table[0, which] = entry
    for x, y in zip(problem.run("cuda"), problem.run("torch")):
        torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3)


def test_what_a_replayed_graph_may_find_stays_inside():
    """Lengths and ends that nobody checked are cut off where their memory ends."""
    problem = Problem(FORM)
    true = problem.run("cuda")
    # As a graph would: the call below is what is left of it when checks have been passed once.
    module = decode
    lengths, prefix = problem.lengths.clone(), replace(problem.prefix, cu_prefix=problem.prefix.cu_prefix.clone())
    lengths[0], lengths[5] = -7, 2**31 - 1
    prefix.cu_prefix[0], prefix.cu_prefix[-1] = -5, 10**6
    problem.k_cache.nan_to_num_(0), problem.v_cache.nan_to_num_(0)
    arguments = (problem.q, problem.k_cache, problem.v_cache, lengths, None, prefix, FORM.head_dim**-0.5)
    out, lse = module.decode(*arguments)
    assert out.isfinite().all()
    assert torch.equal(out[1:5], true[0][1:5]) and torch.equal(lse[1:5], true[1][1:5])


def test_rows_that_are_not_contiguous_are_copied():
    problem = Problem(FORM)
    wide = [x[..., None].expand(*x.shape, 2).flatten(-2)[..., ::2] for x in (problem.q, problem.k_cache, problem.v_cache)]
    out = decode_attention(*wide, problem.lengths, prefix=problem.prefix, backend="cuda")
    assert torch.equal(out, problem.run("cuda")[0])


def test_no_requests_and_no_keys():
    assert Problem(replace(FORM, groups=(), lengths=())).run("cuda")[0].shape == (0, 2, 4, 64)
    out, lse = Problem(replace(FORM, groups=((2, 0),), lengths=(0, 0))).run("cuda")
    assert not out.any() and (lse == float("-inf")).all()


@pytest.mark.parametrize("stored", [None, torch.int8])
def test_a_compiled_graph_holds_it(stored):
    problem = Problem(replace(FORM, block=4, stored=stored))
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    caches = (problem.q, problem.k_cache, problem.v_cache, problem.lengths)
    results = compiled(*caches, block_table=problem.table, prefix=problem.prefix, backend="cuda", return_lse=True)
    for x, y in zip(results, problem.run("cuda"), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "it takes float16 and bfloat16, not float32"),
        ({"head_dim": 32}, "it takes head_dim 64, 96, 128, 256, not 32"),
    ],
)
def test_what_it_does_not_take(change, reason):
    with pytest.raises(ValueError, match=f"backend 'cuda' cannot serve this call: {reason}"):
        Problem(replace(FORM, **change)).run("cuda")


# By bytes of shared memory of a multiprocessor and, at most, of a block, as compute capability 9.0, 8.0 and 8.6 have it:
# blocks that a multiprocessor holds of each head_dim, without and with a prefix of bytes; 0 where it is refused. On the last
# one, which nobody makes, what the system takes makes a difference.
GPUS = {
    (233472, 232448): {64: (4, 4), 96: (4, 3), 128: (4, 4), 256: (2, 2)},
    (167936, 166912): {64: (4, 4), 96: (4, 2), 128: (3, 3), 256: (1, 1)},
    (102400, 101376): {64: (3, 2), 96: (2, 1), 128: (1, 1), 256: (1, 0)},
    (110000, 108976): {64: (3, 2), 96: (2, 1), 128: (2, 2), 256: (1, 1)},
}


@pytest.fixture(params=GPUS, ids=["9.0", "8.0", "8.6", "none"])
def gpu(request, monkeypatch, backend):
    """(device, blocks held by head_dim) of a GPU that is not there, which has all that other kernels ask for."""
    whole, block = request.param
    fake = SimpleNamespace(
        DEVICE_TYPE="cuda",
        compiled_archs=lambda: ["compute_80"],
        device_query=lambda: [{"shared_memory_per_block_optin": block}],
        decode_shared=backend.decode_shared,
    )
    for module in (decode, package):
        monkeypatch.setattr(module, "load", lambda: fake)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    properties = SimpleNamespace(shared_memory_per_multiprocessor=whole)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for cached in (decode.blocks_held, package.unserved_by_gpu):
        cached.cache_clear()
    yield torch.device("cuda", 0), GPUS[request.param]
    for cached in (decode.blocks_held, package.unserved_by_gpu):
        cached.cache_clear()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("stored", [None, *BYTES])
@pytest.mark.parametrize("head_dim", decode.HEAD_DIMS)
def test_blocks_that_a_multiprocessor_holds(gpu, backend, head_dim, stored, dtype):
    """Only what a GPU has no memory for is refused, and of the rest it is given as many as it holds."""
    device, held = gpu
    blocks = held[head_dim][stored is not None]
    q = SimpleNamespace(dtype=dtype, shape=(3, 1, 4, head_dim), device=device)
    reason = decode.unsupported_reason(q, stored)
    if blocks:
        assert reason is None and decode.blocks_held(device, head_dim, stored or dtype) == blocks
    else:
        needs = backend.decode_shared(head_dim, decode.STORED_DTYPES[stored])
        assert reason == f"head_dim {head_dim} needs {needs} bytes of shared memory, and the GPU has 101376"


def test_registers_are_enough_for_the_most_blocks_and_no_more():
    """A multiprocessor has 65,536, and a thread takes a multiple of 8."""
    for kernels in json.loads(BUDGET.read_text()).values():
        for name, kernel in kernels.items():
            if name.startswith("split"):
                head_dim = int(name.split()[-1])
                threads = 128 if head_dim == 256 else 64
                assert 65536 // (-(-kernel["registers"] // 8) * 8 * threads) == decode.MOST_BLOCKS[head_dim], name


def test_splits_fill_a_gpu_once_without_being_short():
    assert decode.splits(items=32, keys=8192, places=264) == 8
    assert decode.splits(items=32, keys=8192, places=528) == 16
    assert decode.splits(items=32, keys=3000, places=528) == 12
    assert decode.splits(items=8, keys=100, places=264) == 1
    assert decode.splits(items=10_000, keys=10**6, places=264) == 1
    assert decode.splits(items=1, keys=10**6, places=264) == decode.MOST_SPLITS
    assert decode.splits(items=0, keys=0, places=1) == 1


@pytest.mark.parametrize(("head_dim", "count"), [(64, 12), (256, 6)])
def test_own_keys_and_prefixes_are_split_for_the_places_of_their_kernel(monkeypatch, backend, head_dim, count):
    """Of 3 multiprocessors, which the host stands for."""
    launches = []
    recording = SimpleNamespace(**vars(backend) | {"decode": lambda **launch: launches.append(launch)})
    monkeypatch.setattr(decode, "load", lambda: recording)
    form = Form(groups=((1, 4000),), lengths=(4000,), kv_heads=1, head_dim=head_dim, dtype=torch.float16)
    Problem(form).run("cuda")
    assert [(launch["own_splits"], launch["prefix_splits"]) for launch in launches] == [(count, count)]


# ---- sanitizers --------------------------------------------------------------------------------------------------------


def executable(kind: str, source: Path = CASES, brief: bool = True) -> Path:
    if reason := cuda_host.missing(kind):
        pytest.skip(reason)
    return cuda_host.build("decode_cases", [source], kind, extra_flags=["-DVOCO_BRIEF"] if brief else [])


KINDS, full = ("plain", "asan", "tsan"), pytest.mark.full


@pytest.mark.parametrize("copies", ["lazy", "eager"])
@pytest.mark.parametrize(
    ("kind", "brief"),
    [(kind, True) for kind in KINDS] + [pytest.param(kind, False, marks=full) for kind in KINDS],
)
def test_every_kind_of_problem(kind, brief, copies):
    assert cuda_host.run(executable(kind, brief=brief), lazy=copies == "lazy") == "0 failures, 0 bank conflicts\n"


def test_the_values_are_looked_at():
    assert not cuda_host.run(executable("plain"), ["length"]).endswith("\n0 failures, 0 bank conflicts\n")


@pytest.mark.parametrize("wrong", ["short", "block"])
def test_an_access_out_of_bounds_is_seen(wrong):
    with pytest.raises(cuda_host.HostError, match="heap-buffer-overflow"):
        cuda_host.run(executable("asan"), [wrong])


def test_a_race_between_blocks_is_seen():
    with pytest.raises(cuda_host.HostError, match="data race"):
        cuda_host.run(executable("tsan"), ["twice"])


# What is changed in which header, the kind of build and the copies that see it, and the report.
RACE, WRONG = "data race", r"[1-9]\d* failures|nan"
DEFECTS = {
    "lax wait": ("decode", "cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>", "plain", "lazy", WRONG),
    "lax wait, race": ("decode", "cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>", "tsan", "lazy", RACE),
    "no barrier": ("decode", "sync_block();\n      // Looked up", "// Looked up", "tsan", "eager", RACE),
    "one list less": ("decode", "kLists = kStages + 1", "kLists = kStages", "tsan", "lazy", RACE),
    "one stage ahead": ("decode", "copy_step(step + kStages - 1)", "copy_step(step + kStages)", "plain", "eager", WRONG),
    "causal": ("decode", "return before + token;", "return before + token + 1;", "plain", "lazy", WRONG),
    "no compaction": ("decode_keys", "place = there ? count_bits(all", "place = all ? (place", "plain", "lazy", WRONG),
    "a split too short": ("decode", "(steps + splits - 1) / splits", "steps / splits", "plain", "lazy", WRONG),
    "another scale": ("decode", "(scores, list.v_scale)", "(scores, list.k_scale)", "plain", "lazy", WRONG),
    "columns": ("byte_tile", "permute_bytes(one, next, 0x7362)", "permute_bytes(one, next, 0x6273)", "plain", "lazy", WRONG),
    "no swizzle of bytes": ("byte_tile", "swizzle = row % 4 ^ row / 4 % 2;", "swizzle = row % 4;", "plain", "lazy", WRONG),
    "no swizzle": ("mma_tile", "(chunk ^ swizzle) * 16", "(chunk ^ 0 * swizzle) * 16", "plain", "lazy", "0 failures, [1-9]"),
}  # fmt: skip
QUICK = ("no barrier", "no compaction")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=full) for name in DEFECTS])
def test_a_defect_in_the_kernel_is_seen(name, tmp_path):
    header, right, wrong, kind, copies, report = DEFECTS[name]
    text = (cuda_host.CSRC / "include" / "voco" / f"{header}.cuh").read_text()
    assert right in text
    # What lies beside a file is found before what the compiler is told: a source and its headers in a folder of their own.
    shutil.copytree(cuda_host.CSRC / "include" / "voco", tmp_path / "voco", ignore=shutil.ignore_patterns("voco"))
    (tmp_path / "voco" / "voco").symlink_to(tmp_path / "voco")
    (tmp_path / "voco" / f"{header}.cuh").write_text(text.replace(right, wrong))
    program = executable(kind, Path(shutil.copy(CASES, tmp_path)))
    try:
        said = cuda_host.run(program, lazy=copies == "lazy")
    except cuda_host.HostError as error:
        said = str(error)
    assert re.search(report, said), said


# ---- machine code ------------------------------------------------------------------------------------------------------


def machine_code(arch: str, folder: Path) -> dict[str, dict[str, int]]:
    """Registers, bytes of stack, and instructions that count of every kernel on a GPU family such as sm_90."""
    kernels = {}
    for source in ("decode", "decode_int8", "decode_float8"):
        cubin = folder / f"{source}-{arch}.cubin"
        command = [cuda_host.find_nvcc(), "-std=c++17", "-cubin", f"-arch={arch}", "-I", cuda_host.CSRC / "include"]
        subprocess.run([*command, cuda_host.CSRC / f"{source}.cu", "-o", cubin], check=True)
        dump = [cuobjdump(), "--dump-resource-usage", "--dump-sass", cubin]
        text = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
        usage = {name: (int(r), int(s)) for name, r, s in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", text)}
        for name, code in re.findall(r"Function : (\w+)(.*?)(?=Function :|\Z)", text, re.DOTALL):
            count = {op: len(re.findall(rf"\s{op}", code)) for op in ("LDL", "STL", "HMMA.16816", "LDSM", "LDGSTS.*128")}
            kernels[readable(name)] = {"registers": usage[name][0], "stack": usage[name][1], **count}
    return kernels


def readable(symbol: str) -> str:
    """"split bfloat16 int8 128" out of a mangled name."""
    kernel, arguments = re.search(r"(split|merge)_kernelI(\w+?)EEv", symbol).groups()
    names = {"6__half": "float16", "13__nv_bfloat16": "bfloat16", "13__nv_fp8_e4m3": "float8", "a": "int8"}
    found = re.findall(r"6__half|13__nv_bfloat16|13__nv_fp8_e4m3|S\d?_|a|(?<=Li)\d+", arguments)
    return " ".join([kernel, *(names.get(x, names[found[0]] if x.startswith("S") else x) for x in found)])


@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=full), pytest.param("sm_90", marks=full)])
def test_machine_code_keeps_to_the_budget(arch, tmp_path):
    """Nothing spills, tensor cores multiply, and keys and values come into shared memory 16 bytes at a time."""
    if cuda_host.find_nvcc() is None:
        pytest.skip("needs nvcc")
    found = machine_code(arch, tmp_path)
    budget = json.loads(BUDGET.read_text())[arch]
    assert found.keys() == budget.keys() and len(found) == 26
    for name, kernel in found.items():
        assert kernel["stack"] == kernel["LDL"] == kernel["STL"] == 0, (name, kernel)
        assert kernel["registers"] <= budget[name]["registers"] + 4, (name, kernel)
        if name.startswith("split"):
            assert kernel["HMMA.16816"] == budget[name]["HMMA.16816"] > 0, (name, kernel)
            assert kernel["LDSM"] > 0 and kernel["LDGSTS.*128"] > 0, (name, kernel)


if __name__ == "__main__":  # write the budget anew: python tests/test_cuda_decode.py
    with tempfile.TemporaryDirectory() as folder:
        measured = {arch: machine_code(arch, Path(folder)) for arch in ("sm_80", "sm_90")}
    BUDGET.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n")
