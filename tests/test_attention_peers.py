"""Everyone that attention is timed against, on a CPU with tiny shapes: that they agree, and that a wrong one is found."""

from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from test_flash import dense_varlen
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import create_block_mask
from voco_llama.bench import measure
from voco_llama.bench.clock import Clock
from voco_llama.bench.results import version_of

import voco_kernels.backends.torch as torch_backend
from bench import attention_masks, attention_problem, attention_split, test_plan
from bench import attention_peers as peers
from bench.attention_masks import MaskRule, PaddedMask
from bench.attention_problem import BATCHED, CHECKED, ROWS, Problem, results_of
from bench.shapes import ATTENTION, GPU, AttentionShape
from voco_kernels import Image, Text
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


# A shape with a key head that is neither the first nor the last.
MIDDLE = replace(TINY["video"], heads=6, kv_heads=3)


@pytest.fixture(autouse=True)
def settings_of_the_compiler():
    """What `compile_anew` sets does not stay behind."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
        yield


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
    assert found[peers.CAUSAL].check is None
    assert all(c.check is not None for c in found.values() if c.role in (measure.OURS, measure.PEER))
    assert (found[peers.DENSE].target, found[peers.FLEX].target, found[peers.FLEX_BUILT].target) == (70.0, 1.5, None)
    assert {c.target for name, c in found.items() if name.startswith(peers.SPLIT)} == {1.5}
    assert {c.target for c in candidates_of("video", True) if c.name.startswith(peers.SPLIT)} == {1.2}
    # As design.md wants them.
    flex = dict.fromkeys(("sft", "anyres", "video", "long_video", "chat", "gqa"), 1.5)
    wanted = {
        ("varlen split", False): {"video": 1.5, "long_video": 1.5, "gqa": 1.5, "sft": 1.15, "anyres": 1.0},
        ("varlen split", True): {"video": 1.2, "sft": 1.0, "anyres": 0.8},
        ("FlexAttention", False): flex | {"image": 1.4, "frames": 2.2},
        ("FlexAttention", True): flex,
        ("SDPA, dense mask", False): {"sft": 4.0, "video": 70.0, "image": 2.7, "frames": 11.0},
        ("SDPA, dense mask", True): {"image": 2.0, "frames": 8.0},
    }
    assert wanted == peers.TARGETS
    assert peers.ROOF_TARGETS == {"video": 0.60, "long_video": 0.60, "anyres": 0.42}
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


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_what_is_kept_is_made_once_and_what_is_built_in_every_run(monkeypatch):
    made = Counter()

    def counting(name, make):
        def counted(*arguments, **options):
            made[name] += 1
            return make(*arguments, **options)

        return counted

    plans = type(torch_backend._blocks_of)(counting("plan", torch_backend._build_blocks))
    monkeypatch.setattr(torch_backend, "_blocks_of", plans)
    monkeypatch.setattr(PaddedMask, "build", counting("dense mask", PaddedMask.build))
    monkeypatch.setattr(peers, "create_block_mask", counting("block mask", create_block_mask))
    again = {}
    for candidate in candidates_of("sft", False):
        if candidate.absent is None:
            candidate.run()
            made.clear()
            candidate.run(), candidate.run()
            again[candidate.name] = dict(made)
    assert again == {
        "voco torch": {}, "voco torch, plan built": {"plan": 2}, peers.CAUSAL: {},
        peers.FLEX: {}, peers.FLEX_BUILT: {"block mask": 2}, peers.FLEX_MASK: {"block mask": 2},
        peers.DENSE: {}, peers.DENSE_BUILT: {"dense mask": 2}, peers.DENSE_MASK: {"dense mask": 2},
    }  # fmt: skip


def test_giving_up_on_compiling_is_an_error():
    compiled = torch.compile(lambda x, by: x * by, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        for some in ((2, 3), (4, 5)):  # the first ones do not count any more
            peers.compile_anew()
            for by in some:
                assert compiled(torch.ones(1), by) == by
        with pytest.raises(FailOnRecompileLimitHit):
            compiled(torch.ones(1), 6)


def test_every_shape_is_compiled_anew(monkeypatch):
    calls, host = [], TINY["sft"].layout()
    for module in (peers, test_plan):
        monkeypatch.setattr(module, "compile_anew", lambda module=module: calls.append(module))
    candidates_of("sft", False)
    assert calls == [peers]
    list(test_plan._others(host))
    assert calls == [peers, test_plan]


@pytest.mark.parametrize("backward", [False, True])
def test_only_a_backward_is_recorded(backward):
    seen, problem = set(), problem_of("sft")

    def attention(q, k, v):
        seen.add((torch.is_grad_enabled(), q.requires_grad, k.requires_grad, v.requires_grad))
        return q + k + v

    assert len(problem.run(attention, backward=backward)()) == (4 if backward else 1)
    assert seen == {(backward,) * 4}


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


# What may go wrong in a head of which a check of the first and the last one knows nothing.
DEFECTS = {
    "zero head": lambda x: x.zero_(),
    "zero rows": lambda x: x[41:45].zero_(),
    "NaN": lambda x: x[44, 3].fill_(torch.nan),
    "factor": lambda x: x.mul_(1.2),
    "other rows": lambda x: x.copy_(x.roll(1, 0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHECKED)
def test_a_wrong_head_between_is_found(name, dtype):
    problem = Problem(MIDDLE, CPU, dtype)
    assert problem.chosen == [(slice(0, 2), slice(0, 1)), (slice(4, 6), slice(2, 3))]
    dense = next(c for c in peers.candidates(problem, backward=True, compiler=None) if c.name == peers.DENSE)
    right = dense.run()
    dense.check(right)
    place, head = CHECKED.index(name), 2 if name in ("out", "dq") else 1
    near = [problem.padded.unpack(x).clone() for x in right]
    near[place][:, head] *= 1 + 4 * torch.finfo(dtype).eps
    problem.check(tuple(near))
    for defect in DEFECTS.values():
        wrong = [problem.padded.unpack(x).clone() for x in right]
        defect(wrong[place][:, head])
        with pytest.raises(AssertionError, match=f"{name}, .* rows, part . of head [12]: "):
            problem.check(tuple(wrong))


def test_the_first_and_the_last_head_are_held_to_the_truth():
    problem = Problem(MIDDLE, CPU, torch.float32)
    right = problem.whole
    for head in (0, -1):
        wrong = right["dv"].clone()
        wrong[:, head] *= 1.001
        with pytest.raises(AssertionError, match="dv, .*eager"):
            problem.check((right["out"], right["dq"], right["dk"], wrong))


@pytest.mark.parametrize(("head", "factor", "said"), [(2, 1.001, "dv, .*eager"), (1, torch.inf, "dv .* not finite")])
def test_what_others_are_compared_with_is_checked(head, factor, said, monkeypatch):
    def broken(*inputs):
        # Heads are worked out one by one; this is the one with these values.
        found, is_it = results_of(*inputs), torch.equal(inputs[2], problem.packed[2][:, head : head + 1])
        return found | {"dv": found["dv"] * (factor if is_it else 1)}

    problem = Problem(MIDDLE, CPU, torch.float32)
    monkeypatch.setattr(attention_problem, "results_of", broken)
    with pytest.raises(AssertionError, match=said):
        problem.check((results_of(*problem.packed, problem.layout, "torch")["out"],))


def test_a_mask_that_is_too_large_is_not_made(monkeypatch):
    mask = PaddedMask(TINY["sft"].layout())
    assert mask.bytes == 4 * 2 * 17 * 17 == mask.build().nbytes
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


@pytest.fixture
def sdpa(monkeypatch):
    """sdpa(candidates): what each that calls SDPA restricts it to and asks of it."""

    def recorded(candidates):
        found, allowed, call = {}, [], peers.scaled_dot_product_attention

        @contextmanager
        def restricted(backend):
            allowed.append(backend)
            yield
            allowed.pop()

        def attention(q, k, v, **options):
            asked = {name: x if isinstance(x, bool) else x.dtype for name, x in options.items()}
            found[candidate.name] = allowed[-1:], asked
            return call(q, k, v, **options)

        monkeypatch.setattr(peers, "sdpa_kernel", restricted)
        monkeypatch.setattr(peers, "scaled_dot_product_attention", attention)
        for candidate in candidates:
            if candidate.name.startswith("SDPA"):
                candidate.run()
        return found

    return recorded


@pytest.mark.parametrize("backward", [False, True])
def test_sdpa_on_a_gpu_is_restricted_to_what_a_row_is_called_after(backward, gpu, sdpa):
    found = sdpa(peers.candidates(gpu("chat", (9, 0)), backward=backward, compiler=None))
    flash, efficient, cudnn = [
        [getattr(SDPBackend, f"{name}_ATTENTION")] for name in ("FLASH", "EFFICIENT", "CUDNN")
    ]
    # "efficient" takes equal heads only.
    equal, grouped = ({"enable_gqa": grouped, "attn_mask": torch.float32} for grouped in (False, True))
    causal = {"enable_gqa": True, "is_causal": True}
    built = {} if backward else {f"{peers.DENSE_BUILT} (efficient)": (efficient, equal)}
    assert found == built | {
        f"{peers.DENSE} (efficient)": (efficient, equal), f"{peers.DENSE} (cuDNN)": (cudnn, grouped),
        f"{peers.CAUSAL} (flash)": (flash, causal), f"{peers.CAUSAL} (cuDNN)": (cudnn, causal),
    }  # fmt: skip


def test_sdpa_on_a_cpu_is_what_it_is(sdpa):
    dense = [], {"enable_gqa": False, "attn_mask": torch.float32}
    causal = [], {"enable_gqa": False, "is_causal": True}
    found = sdpa(candidates_of("sft", False))
    assert found == {peers.DENSE: dense, peers.DENSE_BUILT: dense, peers.CAUSAL: causal}


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


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_blocks_on_a_gpu_are_as_large_as_a_row_says(gpu, monkeypatch):
    made = []

    def create(*arguments, BLOCK_SIZE, **options):
        made.append(BLOCK_SIZE)
        return create_block_mask(*arguments, BLOCK_SIZE=BLOCK_SIZE, **options)

    monkeypatch.setattr(peers, "create_block_mask", create)
    found = {c.name: c for c in peers.candidates(gpu("sft", (9, 0)), backward=False, compiler=uncompiled)}
    for name, block in ((peers.FLEX, 128), (f"{peers.FLEX} (blocks of 64)", 64)):
        made.clear()
        found[name].run()
        assert made == [block] == [found[name].facts["block"]]


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


@pytest.mark.parametrize(("name", "length"), [("sft", 32), ("video", 80)])
def test_rows_of_a_padded_batch_on_a_gpu_are_of_whole_16_numbers(name, length, monkeypatch):
    monkeypatch.setitem(attention_masks.ROW_MULTIPLE, "cpu", attention_masks.ROW_MULTIPLE["cuda"])
    problem = problem_of(name)
    documents, mask = problem.layout.num_documents, PaddedMask(problem.layout, torch.bfloat16)
    q, *_ = problem.inputs(problem.padded)
    assert q.shape == (documents, 2, length, 16) and torch.equal(problem.padded.unpack(q), problem.packed[0])
    assert mask.build().shape == (documents, 1, length, length) and mask.build().dtype == torch.bfloat16
    assert mask.bytes == mask.build().nbytes
    found = {c.name: c for c in peers.candidates(problem, backward=True, compiler=None)}
    found[peers.DENSE].check(found[peers.DENSE].run())
    assert found[peers.CAUSAL].run()[0].shape == q.shape


def test_what_is_measured_on_a_gpu_is_bfloat16():
    assert attention_masks.dtype_of(CPU) == torch.float32
    assert attention_masks.dtype_of(torch.device("cuda")) == torch.bfloat16


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
