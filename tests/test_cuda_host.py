"""The emulation that runs CUDA C++ on a CPU: kernels that are right pass, and each seeded defect is caught.

The kernels and their defects are in tests/cuda/selftest.cuh; selftest.cu compares them with references.
"""

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor

import cuda_host
import pytest
import torch
from cuda_host import HostError
from fake_cuda import cuobjdump

SOURCE = cuda_host.ROOT / "tests" / "cuda" / "selftest.cu"
NVCC = cuda_host.find_nvcc()
NVCC_COMMAND = (NVCC, "-std=c++17", "-I", cuda_host.CSRC / "include", SOURCE)

pytestmark = pytest.mark.skipif(cuda_host.missing() is not None, reason=str(cuda_host.missing()))
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


def selftest(kind, copies, case, defect="none", **options):
    if reason := cuda_host.missing(kind):
        pytest.skip(reason)
    executable = cuda_host.build("selftest", [SOURCE], kind, **options)
    return cuda_host.run(executable, [case, defect], lazy=copies == "lazy")


@pytest.mark.parametrize("copies", ["lazy", "eager"])
@pytest.mark.parametrize("kind", ["plain", "asan", "tsan"])
def test_right_kernels_pass(kind, copies):
    assert selftest(kind, copies, "all") == "bank conflicts: 0\n"


WRONG = r"status 1:\nwrong .*, expected"
RACE = r"ThreadSanitizer: data race[\s\S]*selftest\.cuh:\d+[\s\S]*selftest\.cuh:\d+"

CAUGHT = [
    # case, defect, what catches it: kind of build, copies, report
    ("copy", "unmasked tail", "asan", "lazy", r"AddressSanitizer: heap-buffer-overflow[\s\S]*selftest\.cuh"),
    ("copy", "misaligned", "plain", "lazy", r"selftest\.cuh:\d+: misaligned address .*block \(0, 0, 0\), thread"),
    ("scatter", "slot off by one", "plain", "lazy", WRONG),
    ("sum", "half warp", "plain", "lazy", r"ballot in divergent code: .* waits in shfl_xor at .*selftest\.cuh:\d+"),
    ("sum", "divergent barrier", "plain", "lazy", "sync_block in divergent code: .* waits in sync_block at"),
    ("sum", "return before barrier", "plain", "lazy", "deadlock .*: 32 of 128 threads have ended; 96 of 128 wait in"),
    ("rotate", "missing warp barrier", "plain", "lazy", WRONG),
    ("rotate", "missing warp barrier", "tsan", "lazy", RACE),
    ("transpose", "missing barrier", "plain", "lazy", WRONG),
    ("transpose", "missing barrier", "tsan", "lazy", RACE),
    ("transpose", "shared overflow", "asan", "lazy", "AddressSanitizer: use-after-poison"),
    ("matmul fp16", "lax wait", "plain", "lazy", WRONG),
    ("matmul fp16", "lax wait", "tsan", "lazy", RACE),
    # The next copies into the stage begin before these, which nobody waited for, are over.
    ("matmul fp16", "missing commit", "plain", "lazy", "two cp.async to one place are under way"),
    ("matmul fp16", "missing barrier after wait", "plain", "lazy", WRONG),
    ("matmul fp16", "missing barrier after wait", "tsan", "eager", RACE),
    ("matmul fp16", "prefetch before barrier", "tsan", "eager", RACE),
    ("matmul fp16", "prefetch into used stage", "plain", "eager", WRONG),
    ("matmul fp16", "prefetch into used stage", "tsan", "eager", RACE),
    ("matmul fp16", "outside shared", "plain", "lazy", r"ldmatrix at shared address \d+, outside every array"),
    ("histogram", "plain add", "tsan", "lazy", RACE),
]


@pytest.mark.parametrize(
    ("case", "defect", "kind", "copies", "report"), CAUGHT, ids=["-".join(row[:4]) for row in CAUGHT]
)
def test_defect_is_caught(case, defect, kind, copies, report):
    with pytest.raises(HostError, match=report):
        selftest(kind, copies, case, defect)


def test_missing_swizzle_costs_bank_conflicts():
    # Eight rows of 64 bytes lie in two of the eight groups of banks: four cycles instead of one, for each of the four
    # matrices of an ldmatrix. There are 3 of these for every 16 of the depth, which is filled up to 128, in each warp.
    warps = 4 * 2
    conflicts = 3 * 4 * 3 * (128 // 16) * warps
    assert selftest("plain", "lazy", "matmul fp16", "no swizzle") == f"bank conflicts: {conflicts}\n"


@pytest.mark.parametrize(
    ("case", "defect", "kind", "copies"),
    [
        ("matmul fp16", "lax wait", "plain", "eager"),
        ("matmul fp16", "prefetch before barrier", "plain", "lazy"),
        ("matmul fp16", "prefetch before barrier", "plain", "eager"),
        ("matmul fp16", "prefetch before barrier", "tsan", "lazy"),
        ("histogram", "plain add", "plain", "lazy"),
    ],
)
def test_why_all_kinds_and_both_times_of_copying_are_needed(case, defect, kind, copies):
    selftest(kind, copies, case, defect)


def test_launches_in_a_process_of_other_languages():
    library = ctypes.CDLL(str(cuda_host.build("selftest", [SOURCE], shared=True)))
    run = library.selftest_run
    run.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
    right, wrong, error = 0, 1, 2
    assert run(b"all", b"none") == right
    # An error leaves half of the block's threads where they were; the next launch is not harmed.
    assert run(b"sum", b"half warp") == error
    assert run(b"sum", b"return before barrier") == error
    assert run(b"scatter", b"slot off by one") == wrong
    assert run(b"all", b"none") == right
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: run(b"sum", b"none"), range(20))) == [right] * 20


@pytest.mark.full
def test_other_processors_switch_stacks_through_the_system():
    assert selftest("plain", "lazy", "all", extra_flags=["-DVOCO_UCONTEXT"]) == "bank conflicts: 0\n"
    with pytest.raises(HostError, match="deadlock"):
        selftest("plain", "lazy", "sum", "return before barrier", extra_flags=["-DVOCO_UCONTEXT"])


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_machine_code(arch, tmp_path):
    cubin = tmp_path / "selftest.cubin"
    subprocess.run([*NVCC_COMMAND, "-cubin", f"-arch={arch}", "-o", cubin], check=True)
    sass = subprocess.run([cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    for instruction in (
        "HMMA.16816.F32 ", "HMMA.16816.F32.BF16 ", "LDSM.16.M88.4 ", "LDSM.16.MT88.4 ", "LDGSTS", "LDGDEPBAR",
        "LDG.E.128", "LDG.E.64", "STG.E.128", "STG.E.64", "STS.128", "SHFL.BFLY", "SHFL.IDX", "VOTE", "BAR.SYNC",
    ):  # fmt: skip
        assert instruction in sass, instruction
    assert "STL" not in sass and "LDL" not in sass


@needs_nvcc
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_wrappers_on_a_gpu(tmp_path):
    executable = tmp_path / "selftest"
    subprocess.run([*NVCC_COMMAND, "-arch=native", "-o", executable], check=True)
    subprocess.run([executable, "all"], check=True)
