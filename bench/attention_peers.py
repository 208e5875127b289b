"""Everyone that attention is timed against: ours, SDPA, FlexAttention, the varlen split, and kernels compiled at run time.

Peers get queries, keys and values in the layout that they like best and without paying for it; the library gets [N, H, D].
Nothing is made before a candidate runs, so leaving some out costs nothing.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from voco_llama.bench import measure
from voco_llama.bench.measure import LIMIT, PART, PEER, Candidate
from voco_llama.bench.results import version_of

from bench import attention_jit_peers as jit
from bench.attention_masks import PaddedMask, block_masks
from bench.attention_problem import BATCHED, PACKED, ROWS, Form, Problem, unplanned
from bench.attention_split import split, varlen_implementations
from voco_kernels import voco_attention
from voco_kernels.backends import ATTENTION, load_module, resolved

# Families: a row is called like its family, and may say in brackets which one of several it is.
OURS, SPLIT, FLEX, FLEX_BUILT, FLEX_MASK, DENSE, DENSE_BUILT, DENSE_MASK, CAUSAL = (
    "voco", "varlen split", "FlexAttention", "FlexAttention, mask built", "FlexAttention's mask", "SDPA, dense mask",
    "SDPA, dense mask built", "dense mask", "SDPA, causal",
)  # fmt: skip
FLEX_FLASH, FA4, FA4_MASK, CUDNN, CUDNN_MASK = (
    "FlexAttention, FLASH backend", "FlashAttention 4, mask_mod", "FlashAttention 4's block mask", "cuDNN flex attention",
    "cuDNN flex attention's plan",
)  # fmt: skip

MOST_MASK_BYTES = 4 * 2**30
MASKED = {"efficient": SDPBackend.EFFICIENT_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
UNMASKED = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}

# What the library is built for: (family, backward) -> shape -> its median divided by ours.
_FLEX_TARGET = dict.fromkeys(("sft", "anyres", "video", "long_video", "chat", "gqa"), 1.5)
TARGETS = {
    (SPLIT, False): {"video": 1.5, "long_video": 1.5, "gqa": 1.5, "sft": 1.15, "anyres": 1.0},
    (SPLIT, True): {"video": 1.2, "sft": 1.0, "anyres": 0.8},
    (FLEX, False): {**_FLEX_TARGET, "image": 1.4, "frames": 2.2},
    (FLEX, True): _FLEX_TARGET,
    (DENSE, False): {"sft": 4.0, "video": 70.0, "image": 2.7, "frames": 11.0},
    (DENSE, True): {"image": 2.0, "frames": 8.0},
}
# The same for the share of the lower roof that the forward reaches.
ROOF_TARGETS = {"video": 0.60, "long_video": 0.60, "anyres": 0.42}


def compile_anew() -> None:
    """Forget what was compiled for other shapes, and make it an error where torch.compile would give up from now on.

    Whatever was compiled counts towards a limit, behind which it runs eager code: that would be timed as compiled.
    """
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def family_of(name: str) -> str:
    """The family of a row: its name without what stands in brackets."""
    return name.split(" (")[0]


def candidates(problem: Problem, *, backward: bool, compiler: Callable | None = torch.compile) -> list[Candidate]:
    """Ours first, then all peers; those that are not here, or cannot serve the shape, say why.

    Args:
        backward: whether the gradients are part of the task.
        compiler: what FlexAttention is compiled with; None leaves it out.
    """
    add = partial(_candidate, problem, backward)
    found = [*_ours(problem, add, backward), *_splits(problem, add)]
    if compiler is not None:
        compile_anew()
        found += _flex(problem, add, backward, compiler)
    for more in (_dense, _causal, _compiled_at_run_time):
        found += more(problem, add, backward)
    return found


def _candidate(
    problem: Problem,
    backward: bool,
    name: str,
    attention: Callable[..., torch.Tensor],
    form: Form = PACKED,
    *,
    role: str = PEER,
    absent: str | None = None,
    kept_bytes: int = 0,
    **facts,
) -> Candidate:
    """A candidate for `attention(q, k, v)` on inputs in `form`; a limit is not checked, since its result is another one."""
    check = None if role == LIMIT else partial(problem.check, form=form)
    target = TARGETS.get((family_of(name), backward), {}).get(problem.shape.name)
    run = problem.run(attention, form, backward=backward)
    return Candidate(name, run, check, target, role, absent, facts, kept_bytes=kept_bytes)


# ---- ours --------------------------------------------------------------------------------------------------------------


def our_name(backend: str) -> str:
    """The row of one of our backends."""
    return f"{OURS} {backend}"


def _ours(problem: Problem, add, backward: bool) -> Iterator[Candidate]:
    """The backend that is looked at, with its plan kept and made anew, then the others of ours."""
    first, layout = resolved(problem.backend, problem.packed[0]), problem.layout
    add = partial(add, role=measure.OURS)
    yield add(our_name(first), lambda q, k, v: voco_attention(q, k, v, layout, backend=first))
    yield add(
        f"{our_name(first)}, plan built", lambda q, k, v: voco_attention(q, k, v, unplanned(layout), backend=first)
    )
    for name in ("triton", "cuda", "torch") if problem.device.type == "cuda" else ("torch",):
        if name != first:
            attention = partial(voco_attention, layout=layout, backend=name)
            yield add(our_name(name), attention, absent=_absent_backend(name, problem.packed[0]))


def _absent_backend(name: str, q: torch.Tensor) -> str | None:
    """Why one of our backends cannot be timed; None where it can."""
    module = load_module(ATTENTION, name)
    return module.unavailable_reason() or module.unsupported_reason(q)


# ---- the varlen split --------------------------------------------------------------------------------------------------


def _splits(problem: Problem, add) -> Iterator[Candidate]:
    for name, found in varlen_implementations(problem.device).items():
        row = f"{SPLIT} ({name})"
        if isinstance(found, str):
            yield add(row, _absent, absent=found)
        else:
            yield add(row, split(problem.layout, found), implementation=found.name)


# ---- FlexAttention -----------------------------------------------------------------------------------------------------


def _flex(problem: Problem, add, backward: bool, compiler: Callable) -> Iterator[Candidate]:
    """With blocks of 128; on a GPU also of 64 and over FlashAttention 4, each of which has to be compiled anew."""
    on_gpu = problem.device.type == "cuda"
    flex = compiler(flex_attention, dynamic=False)
    build = block_masks(problem.layout, compiler(create_block_mask, dynamic=False))
    kept = cache(build)
    absent = "FlexAttention has no backward on a CPU" if backward and not on_gpu else None
    add = partial(add, form=BATCHED, absent=absent)

    def attention(mask: Callable, q, k, v, **options):
        return flex(q, k, v, block_mask=mask(), enable_gqa=problem.grouped, **options)

    yield add(FLEX, partial(attention, kept), block=128)
    yield add(FLEX_BUILT, partial(attention, build), block=128)
    if not backward:
        yield Candidate(FLEX_MASK, build, role=PART, facts={"block": 128})
    if on_gpu:
        yield add(f"{FLEX} (blocks of 64)", partial(attention, partial(kept, 64)), block=64)
    over_fa4 = partial(attention, partial(kept, jit.block_of(problem.device)), kernel_options={"BACKEND": "FLASH"})
    yield add(FLEX_FLASH, over_fa4, absent=absent or _flash_absent(problem.device))


def _flash_absent(device: torch.device) -> str | None:
    """Why FlexAttention cannot run over FlashAttention 4 here."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return f"BACKEND='FLASH' needs torch 2.10, this is {torch.__version__}"
    return jit.absent_fa4(device)


# ---- SDPA over a padded batch ------------------------------------------------------------------------------------------


def _kernels(device: torch.device, backends: dict[str, SDPBackend]) -> dict[str, SDPBackend | None]:
    """What SDPA is restricted to, by the words in brackets; on a CPU nothing, since it has one way of doing it."""
    return {f" ({name})": backend for name, backend in backends.items()} if device.type == "cuda" else {"": None}


def _sdpa(backend: SDPBackend | None, q, k, v, **options) -> torch.Tensor:
    if backend is None:
        return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)
    groups = q.shape[1] // k.shape[1]
    if backend is SDPBackend.EFFICIENT_ATTENTION and groups > 1:
        # It takes equal heads only, so its users repeat the others, as transformers does.
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


def _dense(problem: Problem, add, backward: bool) -> Iterator[Candidate]:
    mask, absent = PaddedMask(problem.layout, problem.dtype), None
    if mask.bytes > MOST_MASK_BYTES:
        absent = f"its mask would have {mask.bytes / 2**30:.1f} GiB"
    kept, facts = cache(mask.build), {"mask_bytes": mask.bytes}
    add = partial(add, form=problem.padded, absent=absent, **facts)

    def attention(make: Callable, backend: SDPBackend | None, q, k, v):
        return _sdpa(backend, q, k, v, attn_mask=make())

    kernels = _kernels(problem.device, MASKED)
    for name, backend in kernels.items():
        yield add(f"{DENSE}{name}", partial(attention, kept, backend), kept_bytes=mask.bytes)
    if backward:
        return
    name, backend = next(iter(kernels.items()))
    yield add(f"{DENSE_BUILT}{name}", partial(attention, mask.build, backend))
    yield Candidate(DENSE_MASK, mask.build, role=PART, absent=absent, facts=facts)


def _causal(problem: Problem, add, backward: bool) -> Iterator[Candidate]:
    # There ours has left this limit far behind in the forward, and a round would take seconds.
    absent = "left out of the backward on a CPU" if backward and problem.device.type == "cpu" else None
    for name, backend in _kernels(problem.device, UNMASKED).items():
        attention = partial(_sdpa, backend, is_causal=True)
        yield add(f"{CAUSAL}{name}", attention, problem.padded, role=LIMIT, absent=absent)


# ---- kernels that are compiled at run time -----------------------------------------------------------------------------


def _compiled_at_run_time(problem: Problem, add, backward: bool) -> Iterator[Candidate]:
    fa4, cudnn = jit.FlashAttention4(problem), jit.CudnnFlex(problem, backward)
    for name, mask_name, peer, absent in (
        (FA4, FA4_MASK, fa4, jit.absent_fa4(problem.device)),
        (CUDNN, CUDNN_MASK, cudnn, jit.absent_cudnn(problem.device)),
    ):
        facts = {} if absent else {"version": version_of(peer.PACKAGE)}
        yield add(name, peer.attention, ROWS, absent=absent, **facts)
        if not backward:
            yield Candidate(mask_name, peer.plan, role=PART, absent=absent, facts=facts)


def _absent(q, k, v):
    raise RuntimeError("what is absent must not be run")
