"""Everyone that attention is timed against, on a CPU with tiny shapes: that they agree, and that a wrong one is found."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from reference import mask_of_layout
from test_flash import dense_varlen
from torch.nn.attention.flex_attention import create_block_mask
from voco_llama.bench import measure
from voco_llama.bench.clock import Clock
from voco_llama.bench.results import version_of

import voco_kernels.backends.torch as torch_backend
from bench import attention_peers as peers
from bench import attention_problem, attention_split, test_plan
from bench.attention_masks import MaskRule, PaddedMask, block_masks, key_intervals
from bench.attention_problem import BATCHED, ROWS, Problem, unplanned
from bench.shapes import ATTENTION, GPU, AttentionShape
from voco_kernels import Image, Text, VocoLayout
from voco_kernels.backends import flash
from voco_kernels.backends.flash import Implementation

CPU = torch.device("cpu")
_CHAT = ((Text(4), Image(6, 2), Text(5), Image(7, 1), Text(3)), (Image(3, 1), Text(2)))
TINY = {
    "sft": AttentionShape("sft", "", ((Image(9, 2), Text(6)), (Image(7, 1), Text(3))), True, 2, 2, 16),
    "video": AttentionShape("video", "", ((*[Image(8, 2)] * 7, Text(5)),), True, 2, 2, 16),
    "chat": AttentionShape("chat", "", _CHAT, False, 4, 2, 16),
    "turns": AttentionShape("turns", "segments see nothing, and VoCo tokens stand between text", _CHAT, True, 2, 1, 16),
}
SHAPES = pytest.mark.parametrize("name", TINY)
UNSEEN = ("FlashAttention", "cuDNN", peers.FLEX_FLASH, peers.SPLIT)  # how what needs a GPU is called


def uncompiled(function, **_):
    return function


def problem_of(name: str) -> Problem:
    return Problem(TINY[name], CPU, torch.float32)


def candidates_of(name: str, backward: bool):
    return peers.candidates(problem_of(name), backward=backward, compiler=uncompiled)


# ---- candidates --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@SHAPES
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_all_that_can_run_agree(name, backward):
    candidates = candidates_of(name, backward)
    first, *rows = measure.compare(candidates, Clock(CPU), seconds=0)
    assert (first.name, first.role, first.status) == ("voco torch", measure.OURS, "ok")
    ran = {row.name for row in rows if row.status == "ok"}
    expected = {"voco torch, plan built", peers.DENSE}
    if not backward:
        expected |= {peers.DENSE_BUILT, peers.DENSE_MASK, peers.CAUSAL, peers.FLEX, peers.FLEX_BUILT, peers.FLEX_MASK}
    assert ran == expected, {row.name: row.status for row in rows}
    absent = {row.name: row.status for row in rows if row.name not in ran}
    reasons = {status for row, status in absent.items() if not row.startswith(UNSEEN)}
    assert reasons == ({"not run: FlexAttention has no backward on a CPU", "not run: left out of the backward on a CPU"}
                       if backward else set())  # fmt: skip
    assert all("GPU" in status or backward for status in absent.values())
    assert len({row.name for row in rows}) == len(rows)


def test_every_peer_is_listed_once_per_task():
    names = [c.name for c in candidates_of("sft", False)]
    splits = [f"{peers.SPLIT} ({name})" for name in ("torch", "flash-attn", "FA3", "FA4")]
    assert names == [
        "voco torch", "voco torch, plan built", *splits, peers.FLEX, peers.FLEX_BUILT, peers.FLEX_MASK, peers.FLEX_FLASH,
        peers.DENSE, peers.DENSE_BUILT, peers.DENSE_MASK, peers.CAUSAL, peers.FA4, peers.FA4_MASK, peers.CUDNN,
        peers.CUDNN_MASK,
    ]  # fmt: skip
    both = [c.name for c in candidates_of("sft", True)]
    parts = {peers.FLEX_MASK, peers.DENSE_MASK, peers.DENSE_BUILT, peers.FA4_MASK, peers.CUDNN_MASK}
    assert both == [name for name in names if name not in parts]


def test_roles_and_targets():
    found = {c.name: c for c in candidates_of("video", False)}
    roles = {name: c.role for name, c in found.items() if c.role != measure.PEER}
    parts = (peers.FLEX_MASK, peers.DENSE_MASK, peers.FA4_MASK, peers.CUDNN_MASK)
    ours = ("voco torch", "voco torch, plan built")
    assert roles == dict.fromkeys(ours, measure.OURS) | dict.fromkeys(parts, measure.PART) | {peers.CAUSAL: measure.LIMIT}
    assert found[peers.CAUSAL].check is None and found[peers.DENSE].check is not None
    assert (found[peers.DENSE].target, found[peers.FLEX].target, found[peers.FLEX_BUILT].target) == (70.0, 1.5, None)
    assert {c.target for name, c in found.items() if name.startswith(peers.SPLIT)} == {1.5}
    assert {c.target for c in candidates_of("video", True) if c.name.startswith(peers.SPLIT)} == {1.2}
    for (family, _), shapes in peers.TARGETS.items():
        assert any(peers.family_of(name) == family for name in found) and set(shapes) <= {*ATTENTION, *GPU}


def test_nothing_is_made_before_a_candidate_runs(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("made too early")

    problem = problem_of("sft")
    for owner, name in ((MaskRule, "of"), (PaddedMask, "build"), (problem, "inputs"), (peers, "voco_attention")):
        monkeypatch.setattr(owner, name, fail)
    assert len(peers.candidates(problem, backward=False, compiler=uncompiled)) > 10
    assert not any(c.name.startswith("Flex") for c in peers.candidates(problem, backward=False, compiler=None))


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_candidate_is_found(backward):
    problem = problem_of("sft")

    def causal(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    wrong = peers._candidate(problem, backward, "blind", causal, problem.padded)
    [row] = measure.compare([wrong], Clock(CPU), seconds=0)
    assert row.status.startswith("wrong: out, ") and not row.seconds


def test_wrong_gradients_are_found():
    problem = problem_of("video")
    out, dq, dk, dv = peers.candidates(problem, backward=True, compiler=None)[0].run()
    problem.check((out, dq, dk, dv))
    with pytest.raises(AssertionError, match="dk, open rows"):
        problem.check((out, dq, torch.where(problem.layout.public[:, None, None], 0.9, 1.0) * dk, dv))


def test_a_mask_that_is_too_large_is_not_made(monkeypatch):
    mask = PaddedMask(TINY["sft"].layout())
    assert mask.bytes == 2 * 17 * 17 == mask.build().nbytes
    monkeypatch.setattr(peers, "MOST_MASK_BYTES", mask.bytes - 1)
    found = {c.name: c.absent for c in candidates_of("sft", False)}
    assert {found[name] for name in (peers.DENSE, peers.DENSE_BUILT, peers.DENSE_MASK)} == {"its mask would have 0.0 GiB"}
    assert found[peers.CAUSAL] is None
    sizes = {name: PaddedMask(shape.layout()).bytes for name, shape in GPU.items()}
    monkeypatch.undo()
    assert [name for name, size in sizes.items() if size > peers.MOST_MASK_BYTES] == ["long_video"]


# ---- a GPU, as far as a CPU can pretend to be one ----------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """Problems on the CPU that say they are on a GPU of a compute capability; SDPA takes whatever kernel it has."""

    def pretend(name: str, capability: tuple[int, int]) -> Problem:
        problem = problem_of(name)
        assert problem.truth  # made on the CPU
        problem.device = torch.device("cuda")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(peers, "sdpa_kernel", lambda backend: nullcontext())
        return problem

    return pretend


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name", ["sft", "chat"])
def test_what_a_gpu_gets(name, gpu):
    candidates = peers.candidates(gpu(name, (9, 0)), backward=False, compiler=uncompiled)
    rows = {row.name: row.status for row in measure.compare(candidates, Clock(CPU), seconds=0)}
    ran = {name for name, status in rows.items() if status == "ok"}
    assert ran == {
        "voco torch", "voco torch, plan built", peers.FLEX, peers.FLEX_BUILT, peers.FLEX_MASK,
        f"{peers.FLEX} (blocks of 64)", f"{peers.DENSE} (efficient)", f"{peers.DENSE} (cuDNN)",
        f"{peers.DENSE_BUILT} (efficient)", peers.DENSE_MASK, f"{peers.CAUSAL} (flash)", f"{peers.CAUSAL} (cuDNN)",
    }  # fmt: skip
    missing = "not run: flash-attn-4 is not installed"
    if version_of("flash-attn-4") is None:
        assert {rows[row] for row in (peers.FA4, peers.FA4_MASK, peers.FLEX_FLASH, f"{peers.SPLIT} (FA4)")} == {missing}
    if version_of("nvidia-cudnn-frontend") is None:
        assert rows[peers.CUDNN] == rows[peers.CUDNN_MASK] == "not run: nvidia-cudnn-frontend is not installed"
    # It is there, but not for a CPU.
    there = isinstance(flash.load_torch(), Implementation)
    assert rows[f"{peers.SPLIT} (torch)"].startswith("cannot run: " if there else "not run: ")


@pytest.mark.parametrize(("capability", "split_reason"), [((8, 0), None), ((7, 5), "FlashAttention needs")])
def test_what_an_older_gpu_gets(capability, split_reason, gpu):
    problem = gpu("video", capability)
    absent = {c.name: c.absent for c in peers.candidates(problem, backward=True, compiler=uncompiled)}
    for name in (peers.FA4, peers.FLEX_FLASH, peers.CUDNN):
        assert "9.0, not " in absent[name]
    assert (absent[f"{peers.SPLIT} (FA4)"] or "").startswith(split_reason or "its masks need compute capability 9.0")
    assert absent[peers.FLEX] is None and absent[f"{peers.CAUSAL} (flash)"] is None


# ---- the truth ---------------------------------------------------------------------------------------------------------


@SHAPES
def test_the_two_truths_agree(name, monkeypatch):
    dense, torch_backend = problem_of(name), problem_of(name)
    assert dense.truth  # made before the limit falls
    monkeypatch.setattr(attention_problem, "MOST_DENSE_TOKENS", 0)
    for (true, eager), (true2, eager2) in zip(dense.truth, torch_backend.truth, strict=True):
        for result in attention_problem.RESULTS:
            torch.testing.assert_close(true[result], true2[result], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(eager[result], eager2[result], rtol=1e-4, atol=1e-5)


def test_forms_lead_back():
    problem = problem_of("sft")
    for form, shape in ((BATCHED, (1, 2, 28, 16)), (ROWS, (1, 28, 2, 16)), (problem.padded, (2, 2, 17, 16))):
        q, *_ = problem.inputs(form)
        assert q.shape == shape and torch.equal(form.unpack(q), problem.packed[0])
        assert problem.inputs(form)[0] is q
    assert problem_of("video").padded is BATCHED


# ---- the varlen split --------------------------------------------------------------------------------------------------


@SHAPES
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_split_over_a_stubbed_implementation(name, backward, monkeypatch):
    found = {"dense": Implementation("dense 1", dense_varlen), "broken": Implementation("broken", lambda *_: 1 / 0)}
    monkeypatch.setattr(peers, "varlen_implementations", lambda device: found | {"gone": "not installed"})
    candidates = [c for c in candidates_of(name, backward) if c.name.startswith(peers.SPLIT)]
    rows = measure.compare(candidates, Clock(CPU), seconds=0)
    assert {row.name: row.status for row in rows} == {
        f"{peers.SPLIT} (dense)": "ok",
        f"{peers.SPLIT} (broken)": "cannot run: division by zero",
        f"{peers.SPLIT} (gone)": "not run: not installed",
    }
    assert rows[0].facts["implementation"] == "dense 1"


def test_split_with_copies_serves_all(monkeypatch):
    problem, found = problem_of("video"), Implementation("dense", dense_varlen)
    assert flash._split_of(problem.layout).refusal is None
    problem.check(problem.run(attention_split.split_with_copies(problem.layout, found), backward=True)())


# ---- masks -------------------------------------------------------------------------------------------------------------

# A segment that begins with a public token, one document without text and one that is empty.
GIST = VocoLayout.from_ids(
    torch.tensor([0, 0, 1, 1, 1, 0, 2, 2, 2, 3, 3, 0, 0]),
    torch.tensor([1, 1, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1], dtype=torch.bool),
    torch.tensor([0, 6, 9, 9, 13]),
    isolated=False,
)
LAYOUTS = {name: shape.layout() for name, shape in TINY.items()} | {
    "gist": GIST,
    "gist, isolated": VocoLayout(GIST.segment_ids, GIST.public, GIST.cu_seqlens, GIST.position_ids, True),
}
MASKS = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@MASKS
def test_the_rule_for_pairs(layout):
    token = torch.arange(layout.num_tokens)
    visible = MaskRule.of(layout).mask_mod()(0, 0, token[:, None], token[None])
    assert torch.equal(visible, torch.from_numpy(mask_of_layout(layout)))


@MASKS
def test_key_intervals(layout):
    bounds, token = key_intervals(layout), torch.arange(layout.num_tokens)[:, None]
    assert bounds.dtype == torch.int32 and bounds.shape[0] == 1 and bounds.shape[1] % 2 and bounds.is_contiguous()
    bounds = bounds[0].long()
    assert (bounds.diff(dim=0) >= 0).all() and bounds.min() >= 0 and bounds.max() <= layout.num_tokens
    visible = token < bounds[0]
    for begin, end in zip(bounds[1::2], bounds[2::2], strict=True):
        visible |= (token >= begin) & (token < end)
    assert torch.equal(visible.T, torch.from_numpy(mask_of_layout(layout)))


@MASKS
def test_the_mask_of_a_padded_batch(layout):
    mask, reference = PaddedMask(layout).build(), torch.from_numpy(mask_of_layout(layout))
    for row, begin, end in zip(mask[:, 0], layout.cu_seqlens[:-1], layout.cu_seqlens[1:], strict=True):
        n = end - begin
        assert torch.equal(row[:n, :n], reference[begin:end, begin:end])
        assert not row[:n, n:].any() and torch.equal(row[n:], torch.eye(len(row), dtype=torch.bool)[n:])


def test_an_unplanned_layout_gets_a_plan_of_its_own():
    layout = TINY["video"].layout()
    plan, other = flash._split_of(layout), unplanned(layout)
    assert flash._split_of(layout) is plan and flash._split_of(other) is not plan
    assert other.segment_ids.data_ptr() == layout.segment_ids.data_ptr()


# ---- what is made once per batch ---------------------------------------------------------------------------------------


@SHAPES
def test_what_is_made_once_per_batch(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", uncompiled)
    host = TINY[name].layout()
    candidates = [*test_plan._ours(TINY[name], host, host), *test_plan._others(host)]
    rows = {row.name: row for row in measure.compare(candidates, Clock(CPU), seconds=0)}
    lists = rows.pop(test_plan.LISTS).status
    assert lists == "ok" if name in ("sft", "video") else lists.startswith("not run: layout must ")
    assert {row.status for row in rows.values()} == {"ok"}, {row.name: row.status for row in rows.values()}
    assert list(rows)[:3] == [test_plan.BLOCKS, test_plan.PLAN_CPU, test_plan.LAYOUT]


LONG = AttentionShape("long", "", ((*[Image(126, 2)] * 4, Text(40)),), True)


def test_wrong_plans_are_found():
    host, long = TINY["sft"].layout(), LONG.layout()
    causal = create_block_mask(lambda b, h, row, key: key <= row, None, None, *[long.num_tokens] * 2, device=CPU)
    for check, made, layout, reason in (
        (test_plan.check_blocks, torch_backend._build_blocks(host)[:-1], host, "some rows are missing"),
        (test_plan.check_lists, replace(split := flash._build_split(host), calls=split.calls * 2), host, "more than once"),
        (test_plan.check_layout, replace(host, public=~host.public), host, "public differs"),
        (test_plan.check_dense, PaddedMask(host).build().tril(-1), host, "pairs, not"),
        (test_plan.check_flex, block_masks(long, create_block_mask)(), long, None),
        (test_plan.check_flex, causal, long, "other blocks"),
    ):
        with pytest.raises(AssertionError, match=reason) if reason else nullcontext():
            check(made, layout)
