"""The machine code of the kernels for sm_80 and sm_90, compiled through their real launches, without a GPU."""

import json

import fake_cuda
import pytest
from triton_jobs import BUDGET, KERNELS, KV_KERNELS, KV_SHIPPED, SHIPPED, counted

triton = pytest.importorskip("triton")

QUICK = (
    "sm_80 head_dim 64 float16",
    "sm_90 head_dim 128 bfloat16",
    "sm_80 bfloat16 -> bfloat16, separate layers",
    "sm_90 int8 -> bfloat16",
)
EXTRA = {
    "odd": (80, "triton_jobs:attention", {"arch": 80, "head_dim": 64, "dtype": "bfloat16", "odd": True}),
    "far": (90, "triton_jobs:far_apart", {"arch": 90}),
    "odd rows": (80, "triton_jobs:move_kv", {"kv_dtype": "float16", "dtype": "float16", "stacked": True, "odd": True}),
}
ROOM = {80: 163 * 1024, 90: 227 * 1024}


@pytest.fixture(scope="module")
def reports_of():
    """A function that compiles a job once: name -> its launches."""
    done = {}

    def reports(name):
        if name not in done:
            done.update(fake_cuda.run_jobs({name: (SHIPPED | KV_SHIPPED | EXTRA)[name]}))
        return done[name]

    return reports


def quick_or_full(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in names]


@pytest.mark.parametrize("name", quick_or_full(SHIPPED))
def test_machine_code(name, reports_of):
    arch, _, arguments = SHIPPED[name]
    half, head_dim = arguments["dtype"] != "float32", arguments["head_dim"]
    reports = reports_of(name)
    assert tuple(report.name for report in reports) == KERNELS
    for report in reports:
        used = report.resources
        assert used.shared <= ROOM[arch], report.name
        if half and head_dim <= 128:
            assert (used.stack, used.LDL, used.STL) == (0, 0, 0), report.name
        if half:
            # Small tiles of rows use HMMA on Hopper, too; the others must not.
            assert used.HGMMA > 0 if arch == 90 else used.HMMA > 0, report.name
        if report.name == "dkv_kernel" and arch == 90:
            assert used.HMMA == 0
        if report.num_stages > 1:
            assert used.LDGSTS > 0, report.name
            # A stage of both operands lies in shared memory while the other is computed with.
            step = report.constants.get("K", report.constants.get("R"))
            width = report.constants["BLOCK_D"] * (2 if half else 4)
            assert used.shared >= 2 * step * width, report.name
        assert {"q_ptr", "k_ptr", "v_ptr", "stride_q", "stride_k", "stride_v"} <= set(report.aligned)


@pytest.mark.parametrize("name", quick_or_full(SHIPPED | KV_SHIPPED))
def test_within_budget(name, reports_of):
    """No kernel needs more than it did; `python tests/triton_jobs.py` writes the budget, and a diff shows what changed."""
    budget = json.loads(BUDGET.read_text())
    if budget["triton"] != triton.__version__:
        pytest.skip(f"the budget is of triton {budget['triton']}, this is {triton.__version__}")
    for report in reports_of(name):
        allowed, used = budget["kernels"][f"{report.name} {name}"], counted(report)
        over = {key: (used[key], allowed[key]) for key in used if used[key] > allowed[key]}
        assert not over, f"{report.name}: used and allowed {over}"


def test_the_budget_is_of_what_is_shipped():
    budget = json.loads(BUDGET.read_text())["kernels"]
    shipped = [(name, KERNELS) for name in SHIPPED] + [(name, KV_KERNELS) for name in KV_SHIPPED]
    assert set(budget) == {f"{kernel} {name}" for name, kernels in shipped for kernel in kernels}


def test_inputs_that_do_not_fit_keep_asynchronous_copies(reports_of):
    """The launcher copies them; as they are, each row would be loaded in pieces of two bytes."""
    for report in reports_of("odd"):
        assert report.resources.LDGSTS > 0 and {"k_ptr", "stride_k", "stride_kh"} <= set(report.aligned)


@pytest.mark.full
def test_offsets_of_64_bits_compile(reports_of):
    for report in reports_of("far"):
        assert report.constants["INDEX"] == "int64"
        assert report.resources.HGMMA > 0 and report.resources.LDGSTS > 0


def test_sizes_do_not_make_new_kernels(reports_of):
    """Numbers of tokens, tiles and heads change from batch to batch; none of them may be compiled in."""
    for report in reports_of(QUICK[0]):
        assert not {"num_tokens", "num_tiles", "heads", "kv_heads", "group"} & (set(report.constants) | set(report.aligned))


# ---- the K/V path ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick_or_full(KV_SHIPPED))
def test_machine_code_of_the_kv_path(name, reports_of):
    """Nothing spills, and what can be is moved 16 bytes at a time: two halves of a key and of a value."""
    reports = reports_of(name)
    # One launch each, whatever the number of layers.
    assert tuple(report.name for report in reports) == KV_KERNELS
    for report in reports:
        used = report.resources
        assert (used.stack, used.LDL, used.STL) == (0, 0, 0), report.name
        assert used.registers <= 128, (report.name, used.registers)
        assert used.wide_stores >= 4, (report.name, used)
        assert used.wide_loads >= 4 or "int8" in name or "float8" in name, (report.name, used)


def test_rows_that_are_not_aligned_compile(reports_of):
    inject, extract = (report.resources for report in reports_of("odd rows"))
    # The rows of K/V are aligned, but one width serves both sides.
    assert (inject.wide_loads, inject.wide_stores, inject.LDL, inject.STL) == (0, 0, 0, 0)
    assert (extract.wide_loads, extract.wide_stores, extract.LDL, extract.STL) == (0, 0, 0, 0)


def test_numbers_of_a_move_do_not_make_new_kernels(reports_of):
    """Tokens, layers, slots and strides change from call to call; only whether a dimension is contiguous is compiled in."""
    for report in reports_of("sm_90 int8 -> bfloat16"):
        numbers = {name for name in report.constants if name.islower() and not name.endswith(("_dim", "_ptr"))}
        assert not numbers and not {name for name in report.aligned if not name.endswith("_ptr")}
