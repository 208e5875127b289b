"""The harness for Triton kernels without a GPU: the interpreter that computes bfloat16, and compiling without running.

The kernels here are interpreted in this process and compiled in the child of `fake_cuda.run_jobs`.
"""

import fake_cuda
import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _scores(q_tile, k_tile, scale, BASE_2: tl.constexpr):
    """(weights without their maximum, maximum) [R], as a helper with constexpr arguments returns them."""
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
    row_max = tl.max(scores, 1)
    if BASE_2:
        weights = tl.exp2(scores - row_max[:, None])
    else:
        weights = tl.exp(scores - row_max[:, None])
    return weights, row_max


@triton.jit
def gather_kernel(
    q_ptr, k_ptr, index_ptr, range_ptr, out_ptr, norm_ptr, stride_q, stride_k, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One program: out [ROWS, DIM] = sum over steps of softmax(q k^T) k, for the keys that `index_ptr` names in a range."""
    tl.static_assert(DIM % 16 == 0)
    rows, dims, lane = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, KEYS)
    q_tile = tl.load(q_ptr + rows[:, None] * stride_q + dims[None, :])
    acc = tl.zeros([ROWS, DIM], tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    begin, end = tl.load(range_ptr), tl.load(range_ptr + 1)
    if begin >= 0:
        for start in tl.range(begin, end, KEYS):
            start = tl.multiple_of(start, 16)
            tokens = tl.load(index_ptr + start + lane)
            k_tile = tl.load(k_ptr + tokens.to(tl.int64)[:, None] * stride_k + dims[None, :])
            weights, row_max = _scores(q_tile, k_tile, scale, True)
            acc = tl.dot(weights.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
            norm += tl.log2(tl.sum(weights, 1)) + row_max
    tl.store(out_ptr + rows[:, None] * DIM + dims[None, :], acc.to(out_ptr.dtype.element_ty))
    tl.store(norm_ptr + rows, norm)


def launch_gather(dtype="float16", rows=64, keys=64, dim=64, stride=64, begin=0, end=128, **options):
    """Launch `gather_kernel` on random numbers; returns (q, k, index, range, out, norm)."""
    q, k = torch.randn(rows, dim).to(getattr(torch, dtype)), torch.randn(256, stride).to(getattr(torch, dtype))
    index, limits = torch.randperm(256).int(), torch.tensor([begin, end], dtype=torch.int32)
    out, norm = torch.full((rows, dim), float("nan"), dtype=q.dtype), torch.full((rows,), float("nan"))
    gather_kernel[(1,)](
        q, k, index, limits, out, norm, q.stride(0), stride, 0.25, ROWS=rows, KEYS=keys, DIM=dim, **options
    )  # fmt: skip
    return q, k[:, :dim], index, limits, out, norm


@triton.jit
def running_kernel(x_ptr, out_ptr, offset, stride, SIZE: tl.constexpr):
    """out [SIZE] = running sum of the numbers that lie `stride` apart, found by offsets that need 64 bits."""
    lane = tl.arange(0, SIZE)
    far = (lane + offset).to(tl.int64) * stride
    near = far - tl.cast(offset, tl.int64) * stride
    tl.store(out_ptr + lane, tl.cumsum(tl.load(x_ptr + near), 0))


@triton.jit
def transpose_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    """The tile passes through shared memory, in one piece."""
    lane = tl.arange(0, SIZE)
    offsets = lane[:, None] * SIZE + lane[None, :]
    tl.store(out_ptr + offsets, tl.trans(tl.load(x_ptr + offsets)))


@pytest.fixture
def interpreter():
    if torch.cuda.is_available():
        pytest.skip("kernels run on the GPU here")
    import triton_interpreter

    return triton_interpreter


def test_patched_interpreter(interpreter):
    interpreter.self_test()
    interpreter.install()
    interpreter.self_test()


def test_interpreter_needs_the_patch(interpreter, monkeypatch):
    for owner, name, _ in interpreter.PATCHES:
        monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)
    wrong = set(interpreter.faults())
    assert {"float32 to bfloat16", "a + b", "fma", "sum(a < b)", "dot"} <= wrong, "patch no longer needed"
    with pytest.raises(AssertionError, match="cast_impl is not patched"):
        interpreter.self_test()


def test_self_test_names_what_a_new_triton_lacks(interpreter, monkeypatch):
    monkeypatch.delattr(interpreter.InterpreterBuilder, "create_dot")
    for check in (interpreter.self_test, interpreter.install):
        with pytest.raises(AssertionError, match=r"no InterpreterBuilder\.create_dot to patch"):
            check()


def test_self_test_names_what_is_wrong(interpreter, monkeypatch):
    monkeypatch.setattr(interpreter, "_rounded", lambda handle: handle)
    with pytest.raises(AssertionError, match=r"bfloat16 wrongly in: .*a \+ b, "):
        interpreter.self_test()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interpreted_kernel(interpreter, dtype):
    q, k, index, _, out, norm = launch_gather(str(dtype).removeprefix("torch."), rows=32, keys=32, begin=32, end=160)
    expected, expected_norm = torch.zeros(32, 64, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
    for start in range(32, 160, 32):
        tile = k[index[start : start + 32].long()].double()
        scores = q.double() @ tile.T * 0.25
        weights = torch.exp2(scores - scores.amax(1, keepdim=True))
        expected += weights @ tile
        expected_norm += weights.sum(1).log2() + scores.amax(1)
    torch.testing.assert_close(norm.double(), expected_norm, rtol=1e-5, atol=1e-5)
    bound = 4 * torch.finfo(dtype).eps * expected.abs().max()
    assert (out.double() - expected).abs().max() <= bound


def test_interpreted_loop_may_be_empty(interpreter):
    for begin, end in ((64, 64), (-1, 64)):
        *_, out, norm = launch_gather(begin=begin, end=end)
        assert not out.any() and not norm.any()


def test_interpreted_offsets_of_64_bits(interpreter):
    x, out = torch.randn(16, 3), torch.zeros(16)
    running_kernel[(1,)](x, out, 2**30, 3, SIZE=16)
    torch.testing.assert_close(out, x[:, 0].cumsum(0))


def test_fake_cuda_refuses_to_interpret(interpreter):
    with pytest.raises(RuntimeError, match="are interpreted"), fake_cuda.target(80):
        pass


def gather_on_meta():
    """Nothing is read, so tensors need no memory."""
    with torch.device("meta"):
        launch_gather()


def three_launches():
    launch_gather(end=64)
    launch_gather(end=128)
    launch_gather(dtype="bfloat16", rows=128)


def too_much_shared_memory():
    transpose_kernel[(1,)](torch.zeros(256, 256), torch.zeros(256, 256), SIZE=256, num_warps=32)


JOBS = {
    "sm_80": (80, "test_triton_harness:launch_gather", {"num_stages": 2}),
    "sm_90": (90, "test_triton_harness:launch_gather", {"num_stages": 2}),
    "odd stride": (80, "test_triton_harness:launch_gather", {"num_stages": 2, "stride": 82}),
    "one stage": (80, "test_triton_harness:launch_gather", {"num_stages": 1}),
    "spills": (80, "test_triton_harness:launch_gather", {"rows": 128, "dim": 128, "stride": 128, "num_warps": 1}),
    "float32": (80, "test_triton_harness:launch_gather", {"dtype": "float32", "rows": 16, "keys": 16}),
    "three": (90, "test_triton_harness:three_launches", {}),
    "meta": (80, "test_triton_harness:gather_on_meta", {}),
}


@pytest.fixture(scope="module")
def reports():
    return fake_cuda.run_jobs(JOBS)


def resources_of(reports, job):
    [report] = reports[job]
    return report.resources


def test_launch_is_written_down(reports):
    [report] = reports["sm_80"]
    assert (report.name, report.grid, report.num_warps, report.num_stages) == ("gather_kernel", [1, 1, 1], 4, 2)
    assert report.constants == {"ROWS": 64, "KEYS": 64, "DIM": 64}
    pointers = {"q_ptr", "k_ptr", "index_ptr", "range_ptr", "out_ptr", "norm_ptr"}
    assert set(report.aligned) == pointers | {"stride_q", "stride_k"}
    [odd] = reports["odd stride"]
    assert set(report.aligned) - set(odd.aligned) == {"stride_k"}


def test_every_launch_has_its_kernel(reports):
    first, again, other = reports["three"]
    assert first == again
    assert other.constants["ROWS"] == 128 and other.resources.HGMMA == 2 * first.resources.HGMMA


def test_matrix_instructions_of_each_target(reports):
    ampere, hopper = resources_of(reports, "sm_80"), resources_of(reports, "sm_90")
    assert (ampere.arch, hopper.arch) == ("sm_80", "sm_90a")
    assert ampere.HMMA and ampere.LDSM and not ampere.HGMMA
    assert hopper.HGMMA and not hopper.HMMA
    for kernel in (ampere, hopper):
        assert 0 < kernel.registers <= 255 and kernel.shared > 0 and kernel.instructions > 100


def test_asynchronous_copies_need_aligned_strides_and_stages(reports):
    assert resources_of(reports, "sm_80").LDGSTS and resources_of(reports, "sm_90").LDGSTS
    assert not resources_of(reports, "one stage").LDGSTS
    assert not resources_of(reports, "odd stride").LDGSTS


def test_spills_are_seen(reports):
    spilled, kept = resources_of(reports, "spills"), resources_of(reports, "sm_80")
    assert spilled.stack and spilled.LDL and spilled.STL
    assert not (kept.stack or kept.LDL or kept.STL)


def test_float32_is_multiplied_by_scalars(reports):
    kernel = resources_of(reports, "float32")
    assert kernel.FFMA and not kernel.HMMA


def test_meta_tensors_compile_to_the_same(reports):
    assert reports["meta"][0].aligned == reports["sm_80"][0].aligned


def test_failed_jobs_are_named():
    jobs = {
        "large": (80, "test_triton_harness:too_much_shared_memory", {}),
        "gone": (80, "test_triton_harness:nothing_of_this_name", {}),
    }
    with pytest.raises(RuntimeError) as error:
        fake_cuda.run_jobs(jobs)
    assert "job 'large' failed" in str(error.value) and "OutOfResources" in str(error.value)
    assert "job 'gone' failed" in str(error.value) and "nothing_of_this_name" in str(error.value)
