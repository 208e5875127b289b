"""What methods of `VocoLayout` ask of backends: the tiles that they work through, and how much of those is useful."""

from .backends import ATTENTION, load_module
from .errors import reject
from .layout import VocoLayout
from .tiles import Geometry, TilePlan, tile_plan, useful_pairs

KERNELS = ("forward", "dq", "dkv")


def prepared_tiles(layout: VocoLayout, geometry: Geometry) -> TilePlan:
    """The tiles of a layout, made by Triton on a GPU where it runs: in four launches."""
    if layout.device.type == "cuda":
        triton = load_module(ATTENTION, "triton")
        if triton.unavailable_reason() is None:
            return triton.plan_of(layout, geometry)
    return tile_plan(layout, geometry)


def tile_efficiency(layout: VocoLayout, head_dim: int, backend: str, which: str) -> float:
    """See `VocoLayout.tile_efficiency`."""
    if backend not in ATTENTION or not hasattr(load_module(ATTENTION, backend), "computed_pairs"):
        reject("backend", "one with tiles (triton, cuda)", repr(backend))
    if which not in KERNELS:
        reject("which", f"one of {KERNELS}", repr(which))
    module = load_module(ATTENTION, backend)
    known = module.HEAD_DIMS
    if head_dim not in known:
        is_range = isinstance(known, range)
        reject("head_dim", f"{known[0]} to {known[-1]}" if is_range else f"one of {', '.join(map(str, known))}", head_dim)
    computed = module.computed_pairs(layout, head_dim, which)
    return useful_pairs(layout) / computed if computed else 1.0
