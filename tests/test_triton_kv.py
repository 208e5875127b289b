"""The K/V kernels of the `triton` backend: what is theirs beside the tests that all backends of the K/V path share."""

import re

import pytest
import torch
from cuda_backend import emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_samples import DTYPES, INV_FREQ, POSITIONS, SENTINEL, D, H, L, T, quantised_kv, random_kv
from reference import assert_rounded_once, eager_rotated, rotated

from voco_kernels import VocoKV, extract_kv, inject_kv
from voco_kernels.backends import torch_kv

pytest.importorskip("triton")

from voco_kernels.backends.triton import kv as backend

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted only where there is no GPU")


def inv_freq_of(head_dim: int) -> torch.Tensor:
    return 10000.0 ** (-torch.arange(head_dim // 2).float() / (head_dim // 2))


def moved_by(name: str, kv, cache, slots, positions, inv_freq, scaling):
    """(k_cache, v_cache, what is extracted from them), caches made by `cache()`."""
    k_cache, v_cache = cache(), cache()
    inject_kv(kv, k_cache, v_cache, slots, positions, inv_freq, scaling, backend=name)
    read = slots[slots >= 0]
    where = (positions[slots >= 0], inv_freq, scaling)
    return k_cache, v_cache, extract_kv(k_cache, v_cache, read, *where, backend=name)


# ---- the same bits as the other kernels --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*DTYPES, torch.int8, torch.float8_e4m3fn], ids=str)
def test_bits_are_those_of_cuda(make):
    """Both write out their multiply-adds, and reduce angles by the same steps."""
    kv = (random_kv if make.is_floating_point and make.itemsize > 1 else quantised_kv)(make, tokens=60, head_dim=64)
    slots, positions = torch.randperm(64)[:60], torch.randint(-(2**20), 2**20 + 1, (60,))

    def cache():
        return torch.full((L, 64, H, 64), SENTINEL, dtype=make if kv.k_scale is None else torch.float32)

    arguments = (kv, cache, slots, positions, inv_freq_of(64), 1.25)
    with emulated():
        want = moved_by("cuda", *arguments)
    got = moved_by("triton", *arguments)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert torch.equal(got[2].k, want[2].k) and torch.equal(got[2].v, want[2].v)


def test_every_float8_is_decoded():
    """By shifting bits, since Triton takes the type only on later GPUs."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, 16, 1, 16)
    one = torch.ones(1, 16, 1)
    k_cache, v_cache = torch.zeros(2, 1, 16, 1, 16)
    nothing = torch.zeros(16, dtype=torch.int64)
    inject_kv(VocoKV(codes, codes, one, one), k_cache, v_cache, torch.arange(16), nothing, INV_FREQ, backend="triton")
    assert torch.equal(v_cache.nan_to_num(nan=1e9), codes.float().nan_to_num(nan=1e9))
    assert v_cache.isnan().sum() == 2
    # At position 0 a key stays as it is, but what is paired with NaN becomes NaN.
    finite = ~k_cache.isnan()
    assert finite.sum() == 252 and torch.equal(k_cache[finite], codes.float()[finite])


# ---- layouts -----------------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw):
    """(a function that makes caches [L, slots, H, D] or [L, blocks, block, H, D] of random strides, slots, head_dim)."""
    head_dim = 2 * draw(st.sampled_from([1, 3, 8, 16, 20, 24]), "head_dim / 2")
    blocks, block = draw(st.integers(1, 4), "blocks"), draw(st.integers(1, 5), "block")
    shape = [L, blocks, block, H, head_dim] if draw(st.booleans(), "paged") else [L, blocks * block, H, head_dim]
    order = draw(st.permutations(range(len(shape))), "order in memory")
    gaps = [draw(st.sampled_from([1, 1, 2]), "gap") for _ in shape]
    shift = draw(st.sampled_from([0, 0, 1, 8]), "shift")

    def make(dtype):
        room = [shape[i] * gaps[i] for i in order]
        storage = torch.full((shift + torch.Size(room).numel(),), SENTINEL, dtype=dtype)
        whole = storage[shift:].view(room).permute([order.index(i) for i in range(len(order))])
        return whole[tuple(slice(None, None, gap) for gap in gaps)], storage

    every = draw(st.permutations(range(blocks * block)), "slots")
    slots = every[: draw(st.integers(1, len(every)), "tokens")]
    skipped = draw(st.integers(0, len(slots) - 1), "skipped")
    return make, torch.tensor([-1 if i < skipped else slot for i, slot in enumerate(slots)]), head_dim


@settings(max_examples=20)
@given(layouts(), st.sampled_from(DTYPES), st.sampled_from([torch.int32, torch.int64]), st.booleans())
def test_any_layout(layout, dtype, index_dtype, separate):
    """Against the portable backend: values and all that is not named bit for bit, keys to one rounding."""
    make, slots, head_dim = layout
    kv = random_kv(dtype, tokens=len(slots), head_dim=head_dim)
    positions = torch.randint(-5000, 5000, (len(slots),))
    inv_freq, kept = inv_freq_of(head_dim), slots >= 0
    where = (slots.to(index_dtype), positions.to(index_dtype), inv_freq, 1.25)
    results = []
    for module in (backend, torch_kv):
        (k_cache, k_storage), (v_cache, v_storage) = make(dtype), make(dtype)
        # In an order that no step describes, so that a table is needed.
        order = [2, 0, 1] if separate else range(L)
        sides = [[x[i] for i in order] for x in (k_cache, v_cache)]
        module.injection(*sides, *where)(kv.k, kv.v, None, None)
        results.append((torch.stack(sides[0]).view(L, -1, H, head_dim), k_storage, v_storage))
    (k, k_storage, v_storage), (_, portable_storage, portable_v) = results
    assert torch.equal(v_storage, portable_v)
    assert torch.equal(k_storage == SENTINEL, portable_storage == SENTINEL)
    true, eager = rotated(kv.k, positions, inv_freq, 1.25), eager_rotated(kv.k.float(), positions, inv_freq, 1.25)
    assert_rounded_once("k_cache", k[:, slots[kept]], eager[:, kept], true[:, kept])


@pytest.mark.parametrize("head_dim", [6, 160, 512])
def test_head_dims_that_fill_a_tile_or_not(head_dim):
    kv, inv_freq = random_kv(torch.bfloat16, head_dim=head_dim, heads=3), inv_freq_of(head_dim)
    slots = torch.tensor([7, 0, -1, 11, 4])
    kept = slots >= 0
    k, v, back = moved_by(
        "triton", kv, lambda: torch.full((L, 12, 3, head_dim), SENTINEL).bfloat16(), slots, POSITIONS, inv_freq, 1.25
    )
    true, eager = rotated(kv.k, POSITIONS, inv_freq, 1.25), eager_rotated(kv.k.float(), POSITIONS, inv_freq, 1.25)
    assert_rounded_once("k_cache", k[:, slots[kept]], eager[:, kept], true[:, kept])
    assert torch.equal(v[:, slots[kept]], kv.v[:, kept]) and torch.equal(back.v, kv.v[:, kept])
    untouched = [slot for slot in range(12) if slot not in slots]
    assert (k[:, untouched] == SENTINEL).all() and (v[:, untouched] == SENTINEL).all()


def test_columns_may_lie_far_apart():
    """Offsets beyond 2^31 elements come of columns as well as of slots; the memory between them is never touched."""
    step = 2**30
    try:
        storage = torch.empty(3 * step + 2, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("there is no room for 6 GiB of addresses")
    k_cache, v_cache = (storage[i:].as_strided((1, 1, 1, 4), (1, 1, 1, step)) for i in (0, 1))
    kv = random_kv(torch.float16, layers=1, tokens=1, heads=1, head_dim=4)
    slots, positions, inv_freq = torch.tensor([0]), torch.tensor([3]), inv_freq_of(4)
    k, v, back = moved_by("triton", kv, iter([k_cache, v_cache]).__next__, slots, positions, inv_freq, 1.0)
    assert_rounded_once("k", k, eager_rotated(kv.k.float(), positions, inv_freq), rotated(kv.k, positions, inv_freq))
    assert torch.equal(v, kv.v) and torch.equal(back.v, kv.v)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(0, H, D), (0, 4, H, D), (2, 0, H, D)])
def test_caches_without_slots(shape):
    """Every slot is out of range; where a block holds none, nothing is divided by its size."""
    caches, slots = torch.zeros(2, L, *shape), torch.tensor([0, -1, 5, 1, 2])
    kv = random_kv()
    backend.injection(*caches, slots, POSITIONS, INV_FREQ, 1.0)(kv.k, kv.v, None, None)
    out = torch.zeros(2, L, T, H, D)
    backend.extraction(*caches, slots, POSITIONS, INV_FREQ, 1.0, *out)()
    assert out.isnan().all()


# ---- launches ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that are launched, in order."""
    seen = []
    for name in ("inject_kernel", "extract_kernel"):
        kernel = getattr(backend, name)

        class Recorder:
            def __init__(self, name=name, kernel=kernel):
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid):
                seen.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(backend, name, Recorder())
    return seen


def test_layers_share_a_launch(launches):
    """Stacked, in tensors of their own, or apart: one launch for each run of layers with the same strides."""
    slots = torch.arange(T)
    stacked = torch.zeros(2, L, T, H, D)
    separate = [[torch.zeros(T, H, D) for _ in range(L)] for _ in "kv"]
    other = torch.zeros(T, 2 * H, D)[:, ::2]
    uneven = [[torch.zeros(T, H, D), torch.zeros(T, H, D), other.clone(), other] for _ in "kv"]
    uneven[1][2:] = [torch.zeros(T, H, D) for _ in "vv"]
    for caches, count in ((stacked, 1), (separate, 1), (uneven, 2)):
        kv = random_kv(layers=len(caches[0]))
        inject_kv(kv, *caches, slots, POSITIONS, INV_FREQ, backend="triton")
        extract_kv(*caches, slots, backend="triton")
        assert launches == ["inject_kernel"] * count + ["extract_kernel"] * count
        launches.clear()
    nothing = torch.zeros(0, dtype=torch.int64)
    inject_kv(random_kv(tokens=0), *stacked, nothing, nothing, INV_FREQ, backend="triton")
    assert not launches


def test_a_table_of_layers_is_not_made_while_a_graph_is_captured(monkeypatch):
    """Its way to the device cannot be captured; layers at even steps need none."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    message = "backend 'triton' needs a plan that was made before the capture began"
    with pytest.raises(ValueError, match=re.escape(message)):
        backend._on_device([[0, 1], [0, 1]], torch.device("cuda"))
    backend.injection(*torch.zeros(2, L, T, H, D), torch.arange(T), POSITIONS, INV_FREQ, 1.0)


def test_an_fma_that_rounds_twice_is_noticed(monkeypatch):
    """As in older versions of the interpreter; large angles would be wrong here, and right on a GPU."""
    # Importing it turns the interpreter on, which must not happen beside a GPU.
    import triton_interpreter

    def rounded_twice(self, a, b, c):
        return triton_interpreter.TensorHandle(a.data * b.data + c.data, c.dtype)

    assert "fma of float32" not in triton_interpreter.faults()
    monkeypatch.setattr(triton_interpreter.InterpreterBuilder, "create_fma", rounded_twice)
    assert "fma of float32" in triton_interpreter.faults()
