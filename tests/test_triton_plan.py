"""The Triton kernels that plan tiles: they make the very arrays of `build_tiles`, and stay inside their tensors.

Without a GPU they are interpreted. Chunks are so small that short layouts have many, each of more than one block.
"""

import dataclasses

import fake_cuda
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import Pack, attention_layouts, documents, expand, packs

from voco_kernels import Image, Text, VocoLayout, tiles
from voco_kernels.tiles import Geometry, TilePlan, build_tiles

triton_plan = pytest.importorskip("voco_kernels.backends.triton.plan")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Geometry(rows=8, small_rows=2, keys=4)
EQUAL = Geometry(rows=8, small_rows=0, keys=8)
BLOCK, CHUNKS = 32, 4
MARGIN, POISON = 64, 2**30 + 7
NAMES = [field.name for field in dataclasses.fields(TilePlan)[2:]]


def guarded(values: torch.Tensor) -> torch.Tensor:
    """A copy of `values` with a poisoned margin on both sides."""
    memory = torch.full((values.numel() + 2 * MARGIN,), POISON, dtype=torch.int64).to(values.dtype).to(DEVICE)
    inside = memory[MARGIN : MARGIN + values.numel()].view(values.shape)
    return inside.copy_(values)


@pytest.fixture
def allocated(monkeypatch):
    """Small chunks, and the int32 tensors that were allocated since: poisoned, with margins."""
    tensors = []

    def ints(layout, *shape):
        tensors.append(guarded(torch.full(shape, POISON, dtype=torch.int32)))
        return tensors[-1]

    for name, value in (("BLOCK", BLOCK), ("CHUNKS", CHUNKS), ("WARPS", 1), ("_ints", ints)):
        monkeypatch.setattr(triton_plan, name, value)
    return tensors


def assert_margins(tensors) -> None:
    for tensor in tensors:
        memory = torch.as_strided(tensor, (tensor.numel() + 2 * MARGIN,), (1,), 0)
        margins = torch.cat([memory[:MARGIN], memory[memory.numel() - MARGIN :]])
        assert (margins == POISON).all(), "written outside of a tensor"


def uncut(plan: TilePlan, num_tokens: int) -> dict[str, torch.Tensor]:
    """The tensors of a plan on the CPU, lists of tiles as long as on a device."""
    tensors = {name: getattr(plan, name).cpu() for name in NAMES}
    for name in ("row_tiles", "key_tiles"):
        missing = num_tokens - tensors[name].shape[0]
        tensors[name] = torch.nn.functional.pad(tensors[name], (0, 0, 0, missing))
    return tensors


def assert_same_plan(layout, geometry, expected=None) -> None:
    plan = triton_plan.build_tiles_on_gpu(layout.to(DEVICE), geometry)
    expected = uncut(build_tiles(layout, geometry) if expected is None else expected, layout.num_tokens)
    assert plan.geometry == geometry and not plan.counted
    for name in NAMES:
        got = getattr(plan, name)
        assert got.dtype == torch.int32 and got.is_contiguous()
        assert torch.equal(got.cpu(), expected[name]), f"{name}:\n{got}\n{expected[name]}"


# ---- equal to build_tiles ----------------------------------------------------------------------------------------------

layouts = st.booleans().flatmap(
    lambda isolated: attention_layouts(isolated)
    | packs().map(lambda pack: pack.layout(isolated))
    | documents().map(lambda docs: VocoLayout.from_spans(docs, isolated=isolated))
)


@pytest.mark.parametrize("geometry", [SMALL, EQUAL], ids=["small", "equal"])
@settings(max_examples=20)
@given(layout=layouts)
def test_any_layout(allocated, geometry, layout):
    allocated.clear()
    assert_same_plan(layout, geometry)
    assert_margins(allocated)


def mixed(length: int) -> Pack:
    """A pack of `length` tokens: every kind of token, segments of every phase to the blocks, documents that may be empty."""
    segment, public, ends = [], [], [0, 0]
    for step in range(1, length + 1):
        run = [0] * (step % 4) + [step] * (5 + step % 7) + [-1] * (step % 3 == 0)
        public += [s == 0 or (s > 0 and at % 4 == 3) for at, s in enumerate(run)]
        segment += run
        ends += [len(segment)] * (step % 3)
        if len(segment) >= length:
            break
    return Pack(segment[:length], public[:length], [*(e for e in ends if e < length), length, length])


def one_segment(length: int, public: tuple[int, ...]) -> Pack:
    """A segment over all chunks, with public tokens at some places, between two rows of text."""
    flags = [at in public for at in range(length)]
    return Pack([0, *[1] * length, 0], [True, *flags, True], [0, length + 2])


NAMED = {
    "no documents": expand([]),
    "only empty documents": expand([[], []]),
    "padding": Pack([-1] * 150, [False] * 150, [0, 70, 150]),
    "text": expand([[Text(150)]]),
    "documents of one token": expand([*[[Text(1)]] * 40, [], *[[Text(1)]] * 30]),
    "segments of two tokens": expand([[Image(1, 1)] * 20, [Image(1, 1)] * 15]),
    "public at the end": one_segment(140, (139,)),
    "public at the start": one_segment(140, (0,)),
    "public inside": one_segment(140, (40, 100)),
    "long runs": expand([[Image(90, 3), Text(40), Image(7, 2)], [Text(50)]]),
    "one token": expand([[Text(1)]]),
} | {f"{length} mixed": mixed(length) for length in (31, 32, 33, 127, 128, 129)}


@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "open"])
@pytest.mark.parametrize("name", NAMED)
def test_named_layouts(allocated, name, isolated):
    assert_same_plan(NAMED[name].layout(isolated), SMALL)
    assert_margins(allocated)


def test_greatest_weight(allocated, monkeypatch):
    """Runs that are longer than the weights can tell are alike. In real sizes that takes a million tokens."""
    for module in (triton_plan, tiles):
        monkeypatch.setattr(module, "LIGHTEST", 4 * (127 - 10))
    docs = [[Text(60)], [Image(70, 2)], [Text(110)], [Text(20)]]
    assert_same_plan(VocoLayout.from_spans(docs, isolated=False), SMALL)


def test_shipped_sizes():
    docs = [[Image(290, 2), Text(9)], [Text(30), *[Image(30, 2)] * 2, Text(140)]]
    assert_same_plan(VocoLayout.from_spans(docs, isolated=False), Geometry())


# ---- nonsense ----------------------------------------------------------------------------------------------------------

HUGE = 2**31 - 1
runs = st.lists(st.tuples(st.sampled_from([-HUGE, -1, 0, 1, 2, HUGE]), st.integers(1, 20)), max_size=9)
cuts = st.lists(st.integers(-3, 120) | st.sampled_from([-HUGE, HUGE]), min_size=1, max_size=6)


@pytest.mark.parametrize("geometry", [SMALL, EQUAL], ids=["small", "equal"])
@settings(max_examples=12)
@example(runs=[(1, 20)], cuts=[0, 9, 20], isolated=False, seed=0)
@given(runs=runs, cuts=cuts, isolated=st.booleans(), seed=st.integers(0, 99))
def test_nonsense_stays_inside(allocated, geometry, runs, cuts, isolated, seed):
    """Nothing is written outside of tensors, and a kernel that works through the tiles stays inside its own."""
    allocated.clear()
    ids = [name for name, length in runs for _ in range(length)]
    n = len(ids)
    segment, ends = (guarded(torch.tensor(x, dtype=torch.int32)) for x in (ids, cuts))
    public = guarded(torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5)
    layout = VocoLayout(segment, public, ends, torch.zeros(n, dtype=torch.int64, device=DEVICE), isolated)
    plan = triton_plan.build_tiles_on_gpu(layout, geometry)
    assert_margins(allocated)
    for index in (plan.row_index, plan.key_index):
        assert index.sort().values.tolist() == list(range(n))
    for index in (plan.reader_index, plan.late_index):
        assert ((index >= 0) & (index < max(n, 1))).all()
    assert ((plan.after >= 0) & (plan.after <= n)).all()
    for table, ranges in ((plan.row_tiles, ((2, 5), (5, 8))), (plan.key_tiles, ((2, 5), (5, 7), (7, 10)))):
        assert (table >= 0).all() and (table <= n).all() and (table[:, 0] + table[:, 1] <= n).all()
        assert not table[int((table[:, 1] > 0).sum()) :].any()
        for first, last in ranges:
            assert (table[:, first : last - 1] <= table[:, first + 1 : last]).all()


# ---- without a GPU: what would be launched -----------------------------------------------------------------------------


def launch_plan(tokens: int, isolated: bool) -> None:
    layout = VocoLayout.from_spans([[Image(576, 2), Text(tokens - 578)]], isolated=isolated)
    triton_plan.build_tiles_on_gpu(layout, Geometry())


JOBS = {
    f"sm_{arch}, {tokens} tokens": (arch, "test_triton_plan:launch_plan", {"tokens": tokens, "isolated": isolated})
    for arch in (80, 90)
    for tokens, isolated in ((16_384, True), (100_001, False))
}


def test_launches():
    for name, launches in fake_cuda.run_jobs(JOBS).items():
        kernels = [launch.name for launch in launches]
        assert kernels == ["count_kernel", "index_kernel", "draft_kernel", "list_kernel"]
        chunks = 64 if "16384" in name else 196  # of two blocks: 391 blocks are more than 256 chunks
        assert [launch.grid for launch in launches] == [[chunks, 1, 1]] * 2 + [[chunks, 2, 1]] * 2
        for launch in launches:
            used = launch.resources
            print(f"{name}, {launch.name}: {used.registers} registers, {used.shared} bytes of shared memory")
            assert not (used.stack or used.LDL or used.STL), f"{launch.name} spills"
            # Two blocks fit on a multiprocessor, so that 128 of them need not wait for each other on the least GPU.
            assert used.registers <= 128 and used.shared <= 16 * 1024
            # Another number of tokens must not compile again.
            assert not {"num_tokens", "chunk", "num_chunks", "num_documents"} & {*launch.constants, *launch.aligned}


# ---- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "open"])
@pytest.mark.parametrize("tokens", [1000, 16_384, 100_001, 1_000_000])
def test_on_a_device(tokens, isolated):
    frames = [Image(256, 2), Text(5), Image(30, 2), Image(1, 1)]
    docs = [[Image(576, 2), Text(tokens // 4)], [], *[frames] * (tokens // 2 // 297), [Text(1)]]
    layout = VocoLayout.from_spans(docs, isolated=isolated).to("cuda")
    expected = build_tiles(layout, Geometry())
    assert_same_plan(layout, Geometry(), expected)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = triton_plan.build_tiles_on_gpu(layout, Geometry())
    graph.replay()
    torch.cuda.synchronize()
    for name in NAMES:
        assert torch.equal(getattr(plan, name), getattr(expected, name)), name
