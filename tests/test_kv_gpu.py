"""The K/V path on a GPU: every form of cache by every backend, the bits of the emulation, graphs, streams, no waiting."""

import pytest
import torch
from kv_samples import (
    DTYPES,
    FORMS,
    INV_FREQ,
    POSITIONS,
    SENTINEL,
    D,
    H,
    L,
    T,
    quantised_kv,
    random_kv,
    rows_of,
)
from reference import assert_rounded_once, eager_rotated, rotated

from voco_kernels import ExtractionPlan, InjectionPlan, VocoKV, extract_kv, inject_kv
from voco_kernels.backends import cuda, resolved_kv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

BUILT = pytest.mark.skipif(cuda.unavailable_reason() is not None, reason=str(cuda.unavailable_reason()))
CUDA = pytest.param("cuda", marks=BUILT)
KERNELS = [CUDA, "triton"]
BACKENDS = [*KERNELS, "torch"]
SLOTS = torch.tensor([7, 0, -1, 11, 4])


def moved(x):
    """A tensor, a list of them or a VocoKV, with its strides, on the GPU."""
    if isinstance(x, VocoKV):
        return x.to("cuda")
    if isinstance(x, torch.Tensor):
        storage = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype, device="cuda")
        view = storage.as_strided(x.shape, x.stride(), x.storage_offset())
        return view.copy_(x)
    return [moved(layer) for layer in x]


def stacked(cache) -> torch.Tensor:
    """[L, slots, H, D] on the CPU."""
    cache = cache if isinstance(cache, torch.Tensor) else torch.stack(list(cache))
    return (cache.flatten(1, 2) if cache.ndim == 5 else cache).cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inject_into_every_form(backend, form, dtype):
    for kv in (random_kv(dtype), quantised_kv(torch.int8), quantised_kv(torch.float8_e4m3fn)):
        k_cache, v_cache = (moved(form(12, dtype)[0]) for _ in "kv")
        inject_kv(
            moved(kv), k_cache, v_cache, SLOTS.cuda(), POSITIONS.cuda(), INV_FREQ.cuda(), 1.25, backend=backend, check=True
        )
        k, v = (x.float() if s is None else x.float() * s[..., None] for x, s in ((kv.k, kv.k_scale), (kv.v, kv.v_scale)))
        kept, named = SLOTS >= 0, SLOTS[SLOTS >= 0]
        true, eager = rotated(k, POSITIONS, INV_FREQ, 1.25), eager_rotated(k, POSITIONS, INV_FREQ, 1.25)
        assert_rounded_once("k_cache", stacked(k_cache)[:, named], eager[:, kept], true[:, kept])
        assert torch.equal(stacked(v_cache)[:, named], v[:, kept].to(dtype))
        untouched = torch.ones(12, dtype=torch.bool)
        untouched[named] = False
        for cache in (k_cache, v_cache):
            assert (stacked(cache)[:, untouched] == SENTINEL).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["stacked", "layers", "hugging_face", "strided"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extract_from_every_form(backend, form, dtype):
    (keys, all_keys), (values, all_values) = rows_of(form, dtype)
    index = torch.tensor([11, 3, 3, 0, 7])
    rotation = (POSITIONS.cuda(), INV_FREQ.cuda(), 1.25)
    kv = extract_kv(moved(keys), moved(values), index.cuda(), *rotation, backend=backend, check=True).to("cpu")
    expected = rotated(all_keys[:, index], POSITIONS, INV_FREQ, 1.25, inverse=True)
    eager = eager_rotated(all_keys[:, index].float(), -POSITIONS, INV_FREQ, 1 / 1.25)
    assert_rounded_once("k", kv.k, eager, expected)
    assert torch.equal(kv.v, all_values[:, index])


@BUILT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_those_of_the_emulation(dtype):
    """Fused multiply-adds are written out in the kernels, so that a CPU computes the same bits."""
    from cuda_backend import emulated

    kv = random_kv(dtype, tokens=50, head_dim=64)
    positions = torch.randint(-(2**20), 2**20, (50,))
    inv_freq = 10000.0 ** (-torch.arange(32).float() / 32)
    got = [torch.zeros(L, 50, H, 64, dtype=dtype, device="cuda") for _ in "kv"]
    inject_kv(kv.to("cuda"), *got, torch.arange(50).cuda(), positions.cuda(), inv_freq.cuda(), backend="cuda")
    want = [torch.zeros(L, 50, H, 64, dtype=dtype) for _ in "kv"]
    with emulated():
        inject_kv(kv, *want, torch.arange(50), positions, inv_freq, backend="cuda")
    assert torch.equal(got[0].cpu(), want[0]) and torch.equal(got[1].cpu(), want[1])


@BUILT
def test_the_default_is_cuda_where_it_was_compiled():
    cache = torch.zeros(4, H, D, dtype=torch.bfloat16, device="cuda")
    assert resolved_kv("auto", torch.bfloat16, cache) == "cuda"
    assert resolved_kv("auto", torch.float64, cache.double()) == "torch"


@pytest.mark.parametrize("backend", KERNELS)
def test_graphs_hold_plans(backend):
    """Replays see other K/V, slots and positions; slots out of range are skipped."""
    kv = random_kv(torch.bfloat16).to("cuda")
    caches = [[torch.full((12, H, D), SENTINEL, dtype=torch.bfloat16, device="cuda") for _ in range(L)] for _ in "kv"]
    slots, positions, inv_freq = SLOTS.cuda(), POSITIONS.cuda(), INV_FREQ.cuda()
    injection = InjectionPlan(*caches, slots, positions, inv_freq, backend=backend)
    index = torch.arange(T, device="cuda")
    extraction = ExtractionPlan(*caches, index, positions, inv_freq, backend=backend)
    injection.inject(kv), extraction.extract()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        injection.inject(kv)
        extraction.extract()
    for side in caches:
        for layer in side:
            layer.fill_(SENTINEL)
    other = random_kv(torch.bfloat16)
    kv.k.copy_(other.k), kv.v.copy_(other.v)
    slots.copy_(torch.tensor([3, 12, 1, -5, 9]))
    positions.copy_(torch.tensor([5, 6, 7, 8, 9]))
    index.copy_(torch.tensor([3, 1, 9, 0, 12]))
    graph.replay()
    torch.cuda.synchronize()
    k, v = (torch.stack(side).cpu() for side in caches)
    true = rotated(other.k, torch.tensor([5, 6, 7, 8, 9]), INV_FREQ)
    eager = eager_rotated(other.k.float(), torch.tensor([5, 6, 7, 8, 9]), INV_FREQ)
    assert_rounded_once("k_cache", k[:, [3, 1, 9]], eager[:, [0, 2, 4]], true[:, [0, 2, 4]])
    assert torch.equal(v[:, [3, 1, 9]], other.v[:, [0, 2, 4]])
    assert (v[:, [0, 2, 4, 5, 6, 7, 8, 10, 11]] == SENTINEL).all()
    assert torch.equal(extraction.out.v.cpu()[:, :4], v[:, [3, 1, 9, 0]]) and extraction.out.v[:, 4].isnan().all()


@pytest.mark.parametrize("backend", KERNELS)
def test_calls_use_the_current_stream(backend):
    kv = random_kv(torch.bfloat16).to("cuda")
    caches = [torch.zeros(L, 12, H, D, dtype=torch.bfloat16, device="cuda") for _ in "kv"]
    plan = InjectionPlan(*caches, SLOTS.cuda(), POSITIONS.cuda(), INV_FREQ.cuda(), backend=backend)
    plan.inject(kv)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(int(1e8))
        for cache in caches:
            cache.fill_(SENTINEL)
        plan.inject(kv)
    stream.synchronize()
    assert torch.equal(caches[1][:, 7].cpu(), kv.v[:, 0].cpu()) and (caches[1][:, 1] == SENTINEL).all()


@BUILT
def test_nothing_waits():
    """`cuda` neither copies from nor waits for the device."""
    kv = random_kv(torch.bfloat16).to("cuda")
    caches = [[torch.zeros(12, H, D, dtype=torch.bfloat16, device="cuda") for _ in range(L)] for _ in "kv"]
    where = (SLOTS.cuda(), POSITIONS.cuda(), INV_FREQ.cuda())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        inject_kv(kv, *caches, *where, backend="cuda")
        extract_kv(*caches, where[0].clamp(min=0), *where[1:], backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", KERNELS)
def test_calls_run_on_the_device_of_their_tensors(backend):
    kv = random_kv(torch.bfloat16).to("cuda:1")
    caches = [torch.zeros(L, 12, H, D, dtype=torch.bfloat16, device="cuda:1") for _ in "kv"]
    inject_kv(kv, *caches, *(x.to("cuda:1") for x in (SLOTS, POSITIONS, INV_FREQ)), backend=backend)
    assert torch.cuda.current_device() == 0 and torch.equal(caches[1][:, 7], kv.v[:, 0])
