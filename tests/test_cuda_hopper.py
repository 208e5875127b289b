"""The wrappers of voco/hopper.cuh and their emulation: kernels that are right pass, and each seeded defect is caught.

The kernels and their defects are in tests/cuda/hopper_selftest.cuh; hopper_selftest.cu compares them with references.
"""

import ctypes
import subprocess

import cuda_host
import pytest
import torch
from cuda_host import HostError
from fake_cuda import cuobjdump

SOURCES = [cuda_host.ROOT / "tests" / "cuda" / "hopper_selftest.cu", cuda_host.CSRC / "tensor_map.cu"]
NVCC = cuda_host.find_nvcc()
# An -arch=sm_90a would also make PTX for compute_90, which has no wgmma.
NVCC_COMMAND = (NVCC, "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a", "-I", cuda_host.CSRC / "include")

pytestmark = pytest.mark.skipif(cuda_host.missing() is not None, reason=str(cuda_host.missing()))
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


def selftest(kind, copies, case, defect="none", **options):
    if reason := cuda_host.missing(kind):
        pytest.skip(reason)
    executable = cuda_host.build("hopper_selftest", SOURCES, kind, **options)
    return cuda_host.run(executable, [case, defect], lazy=copies == "lazy")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.mark.parametrize(
    ("kind", "copies", "case"),
    [
        ("plain", "lazy", "all"),
        ("plain", "eager", "all"),
        slow("asan", "lazy", "all"),
        slow("asan", "eager", "all"),
        ("tsan", "lazy", "gather"),
        ("tsan", "eager", "pipeline fp16"),
        ("tsan", "lazy", "turns"),
        slow("tsan", "lazy", "all"),
        slow("tsan", "eager", "all"),
    ],
)
def test_right_kernels_pass(kind, copies, case):
    lines = selftest(kind, copies, case).splitlines()
    assert len(lines) == (15 if case == "all" else 1) and all(line.endswith(": right") for line in lines)


WRONG = r"status 1:\nwrong .*, expected"
HERE = r"hopper_selftest\.cuh:\d+"
RACE = rf"ThreadSanitizer: data race[\s\S]*{HERE}[\s\S]*{HERE}"

CAUGHT = [
    # case, defect, what catches it: kind of build, copies, report
    ("box", "misaligned tile", "plain", "lazy", rf"{HERE}: tma_load to shared address \d+, not a multiple of 1024"),
    slow("box", "too many tokens", "asan", "lazy", "tma_load of global memory that is not there, for token 61"),
    ("box", "no barrier fence", "plain", "lazy", "tma_load with an mbarrier without fence_mbarriers"),
    ("box", "no block barrier", "tsan", "lazy", RACE),
    ("box", "no wait", "plain", "lazy", WRONG),
    slow("box", "no wait", "tsan", "eager", RACE),
    ("box", "no swizzle", "plain", "lazy", WRONG),
    ("product fp16", "no swizzle", "plain", "lazy", WRONG),
    ("product bf16", "half warpgroup", "plain", "lazy", "deadlock .*: 64 of 128 threads .*; 64 of 128 wait in wgmma"),
    ("product fp16", "other operands", "plain", "lazy", "wgmma with other operands than the rest of the warpgroup"),
    ("product fp16", "no proxy fence", "plain", "lazy", rf"operand a at shared address \d+, written at .*{HERE} by"),
    ("product fp16", "no register fence", "plain", "lazy", "wgmma without wgmma_fence"),
    ("product fp16", "early sums", "plain", "lazy", WRONG),
    ("product fp16", "uncommitted", "plain", "lazy", "wgmma_wait for sums that are still under way"),
    ("product fp16", "no product wait", "plain", "lazy", rf"{HERE}: a wgmma that the thread has not waited for at its end"),
    ("product fp16", "swapped strides", "plain", "lazy", WRONG),
    ("register product fp16", "swapped strides", "plain", "lazy", r"operand b at shared address \d+, outside every array"),
    ("product fp16", "outside shared", "plain", "lazy", r"operand b at shared address \d+, outside every array"),
    ("pipeline fp16", "no empty wait", "plain", "lazy", "too many arrivals in a phase of the mbarrier, 1 expected"),
    ("pipeline fp16", "no empty wait", "plain", "eager", r"deadlock .* wait for phase \d+ of the mbarrier .*1 of 1 arr"),
    ("pipeline fp16", "few bytes", "plain", "lazy", "0 of 1 arrivals and -16 bytes are missing"),
    ("pipeline fp16", "many bytes", "plain", "eager", "0 of 1 arrivals and 16 bytes are missing"),
    ("pipeline fp16", "no full wait", "plain", "lazy", "too many arrivals"),
    ("pipeline fp16", "no full wait", "tsan", "eager", RACE),
    ("pipeline fp16", "early release", "tsan", "lazy", RACE),
    slow("pipeline fp16", "early release", "tsan", "eager", RACE),
    slow("pipeline fp16", "one warp releases", "tsan", "lazy", RACE),
    ("pipeline fp16", "many arrivals", "plain", "lazy", "too many arrivals"),
    ("pipeline fp16", "many registers", "plain", "lazy", "more than 64 K registers: 66560"),
    ("gather", "lax copy wait", "plain", "eager", "which has not called fence_async since"),
    ("gather", "no proxy fence", "plain", "lazy", "which has not called fence_async since"),
    ("gather", "no empty wait", "plain", "lazy", "too many arrivals"),
    ("chain", "lax product wait", "plain", "lazy", WRONG),
    ("turns", "no turn", "plain", "lazy", WRONG),
    slow("turns", "no turn", "tsan", "lazy", RACE),
    ("turns", "other count", "plain", "lazy", "named barrier 1 for 224 threads, and elsewhere for 256"),
]


@pytest.mark.parametrize(
    ("case", "defect", "kind", "copies", "report"),
    CAUGHT,
    ids=["-".join(getattr(row, "values", row)[:4]) for row in CAUGHT],
)
def test_defect_is_caught(case, defect, kind, copies, report):
    with pytest.raises(HostError, match=report):
        selftest(kind, copies, case, defect)


@pytest.mark.parametrize(
    ("case", "defect", "copies"),
    [
        ("box", "no wait", "eager"),
        ("product fp16", "early sums", "eager"),
        ("pipeline fp16", "no full wait", "eager"),
        ("pipeline fp16", "early release", "lazy"),
        ("pipeline fp16", "early release", "eager"),
        ("pipeline fp16", "one warp releases", "lazy"),
    ],
)
def test_values_alone_do_not_show(case, defect, copies):
    selftest("plain", copies, case, defect)


@pytest.mark.full
def test_other_processors_switch_stacks_through_the_system():
    selftest("plain", "lazy", "all", extra_flags=["-DVOCO_UCONTEXT"])


@needs_nvcc
def test_machine_code(tmp_path):
    cubin = tmp_path / "selftest.cubin"
    command = [*NVCC_COMMAND, "-cubin", "-Xptxas", "-v", SOURCES[0], "-o", cubin]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    # C7510 to C7520: wgmma one after the other, or registers that wgmma must wait for.
    assert "registers" in report and "C75" not in report, report
    sass = subprocess.run([cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    widths = [f"HGMMA.64x{columns}x16.F32 " for columns in (32, 64, 96, 128, 192, 256)]
    for instruction in (
        *widths, "HGMMA.64x64x16.F32.BF16 ", "HGMMA.64x128x16.F32.BF16 ", "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR.LE gsb0, 0x",
        "UTMALDG.3D ", "UTMACCTL.PF ", "SYNCS.EXCH.64 ", "SYNCS.ARRIVE.TRANS64 ", "SYNCS.ARRIVE.TRANS64.A1T0 ",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT ", "FENCE.VIEW.ASYNC", "LDGSTS.E.BYPASS.128 ", "BAR.SYNC", "BAR.ARV ",
        "USETMAXREG.DEALLOC.CTAPOOL 0x28 ", "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8 ",
    ):  # fmt: skip
        assert instruction in sass, instruction
    # One operand in registers, with the other of either major, or MN-major operands.
    assert ".tnspB" in sass and ".tnspA" in sass
    assert "STL" not in sass and "LDL" not in sass


@needs_nvcc
def test_the_driver_is_not_linked(tmp_path):
    """It is not on every machine that can import the module; there, make_tensor_map says so."""
    library = tmp_path / "library.so"
    command = [*NVCC_COMMAND, "-shared", "-Xcompiler", "-fPIC", SOURCES[1], "-o", library]
    subprocess.run(command, check=True)
    needed = subprocess.run(["readelf", "--dynamic", library], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needed and "libcuda" not in needed

    class TensorLayout(ctypes.Structure):
        _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("tokens", "heads", "columns"))]
        _fields_ += [("token_stride", ctypes.c_int64), ("head_stride", ctypes.c_int64)]

    make_tensor_map = ctypes.CDLL(str(library))["_ZN4voco15make_tensor_mapEPNS_9TensorMapERKNS_12TensorLayoutEi"]
    layout = TensorLayout(1 << 20, 100, 2, 64, 128, 64)
    insufficient_driver, invalid_value = 35, 1
    expected = 0 if torch.cuda.is_available() else insufficient_driver
    memory = ctypes.create_string_buffer(256)
    aligned = (ctypes.addressof(memory) + 127) // 128 * 128
    assert make_tensor_map(ctypes.c_void_p(aligned), ctypes.byref(layout), 64) == expected
    assert make_tensor_map(ctypes.c_void_p(aligned), ctypes.byref(layout), 257) == invalid_value


@needs_nvcc
@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
def test_wrappers_on_a_gpu(tmp_path):
    executable = tmp_path / "selftest"
    subprocess.run([*NVCC_COMMAND, *SOURCES, "-o", executable], check=True)
    subprocess.run([executable, "all"], check=True)
