"""Pictures of layouts: who sees whom, and the tiles that kernels work through, as a PNG."""

from pathlib import Path

import torch

from .errors import reject
from .layout import VocoLayout, document_of
from .tiles import Geometry, TilePlan, build_tiles, executed_pairs, useful_pairs

MAX_TOKENS = 1024

# Colour-blind safe (Okabe-Ito); the own range is what compresses, the public range is what is left to see.
COLOURS = {"hidden": "#f2f2f2", "own range": "#56b4e9", "public range": "#e69f00"}
KINDS = {"vision": "#56b4e9", "VoCo": "#d55e00", "text": "#009e73", "padding": "#bbbbbb"}


def draw(layout: VocoLayout, path: str | Path) -> Path:
    """Write a picture of a layout's mask: queries down, keys across, a strip of token kinds along both sides.

    Args:
        layout: at most 1,024 tokens.
        path: the PNG file to write; its folder must exist.

    Returns:
        The path.

    Raises:
        ValueError: too many tokens, or none.
        ImportError: matplotlib is not installed.
    """
    figure = _figure(layout, (6.4, 5.6))
    draw_on(figure.add_subplot(), layout.to("cpu"))
    return _saved(figure, path)


def draw_plan(
    layout: VocoLayout, path: str | Path, geometry: Geometry | None = None, *, steps: tuple[int, int] = (64, 32)
) -> Path:
    """Write a picture of what a kernel computes for a layout: its mask, sorted as the kernel reads it, under the row tiles.

    Rows are in the order of `TilePlan.row_index` and keys in that of `TilePlan.key_index`, so that what is gathered stands
    side by side: private keys on the left, public ones on the right. Outlined is all that is computed; what is outlined and
    not coloured is computed for nothing.

    Args:
        layout: at most 1,024 tokens.
        path: the PNG file to write; its folder must exist.
        geometry: sizes of the tiles; what the Triton backend uses where None.
        steps: keys per step where nothing is masked, and where something may be.

    Returns:
        The path.

    Raises:
        ValueError: too many tokens, or none.
        ImportError: matplotlib is not installed.
    """
    figure = _figure(layout, (7.2, 5.6))
    draw_plan_on(figure.add_subplot(), layout.to("cpu"), geometry or Geometry(), steps)
    return _saved(figure, path)


def _figure(layout: VocoLayout, size: tuple[float, float]):
    if not 0 < layout.num_tokens <= MAX_TOKENS:
        reject("layout", f"of 1 to {MAX_TOKENS} tokens to be drawn", f"of {layout.num_tokens}")
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _saved(figure, path: str | Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_png(str(path))
    return Path(path)


def draw_on(axes, layout: VocoLayout) -> None:
    """Draw the mask of a layout on the CPU on matplotlib axes, with its legend."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    n = layout.num_tokens
    segment = layout.segment_ids
    own = (segment[:, None] == segment[None, :]) & (segment[:, None] > 0)
    ranges = torch.where(layout.dense_mask(), torch.where(own, 1, 2), 0)
    axes.imshow(ranges.numpy(), cmap=ListedColormap(list(COLOURS.values())), vmin=0, vmax=2, interpolation="nearest")

    kinds = torch.where(segment == 0, 2, torch.where(segment < 0, 3, layout.public.long()))
    strip = {"cmap": ListedColormap(list(KINDS.values())), "vmin": 0, "vmax": 3, "interpolation": "nearest"}
    width = max(1.0, n / 28)
    axes.imshow(kinds[None, :].numpy(), extent=(-0.5, n - 0.5, -0.5 - 0.2 * width, -0.5 - 1.2 * width), **strip)
    axes.imshow(kinds[:, None].numpy(), extent=(-0.5 - 1.2 * width, -0.5 - 0.2 * width, n - 0.5, -0.5), **strip)
    document = document_of(layout.cu_seqlens, n)
    for edge in (document[1:] != document[:-1]).nonzero()[:, 0].tolist():
        axes.axhline(edge + 0.5, color="black", linewidth=0.8)
        axes.axvline(edge + 0.5, color="black", linewidth=0.8)
    if n <= 40:
        axes.set_xticks([i - 0.5 for i in range(n)], minor=True)
        axes.set_yticks([i - 0.5 for i in range(n)], minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)

    axes.set_xlim(-0.5 - 1.4 * width, n - 0.5)
    axes.set_ylim(n - 0.5, -0.5 - 1.4 * width)
    axes.set_aspect("equal")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.set_title(f"{n} tokens, segments {'isolated' if layout.isolated else 'see earlier public keys'}", fontsize=10)
    present = {name: colour for i, (name, colour) in enumerate(KINDS.items()) if bool((kinds == i).any())}
    handles = [Patch(color=colour, label=f"token: {name}") for name, colour in present.items()]
    handles += [Patch(color=colour, label=f"sees: {name}") for name, colour in list(COLOURS.items())[1:]]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False)


def draw_plan_on(axes, layout: VocoLayout, geometry: Geometry, steps: tuple[int, int]) -> None:
    """Draw the plan of a layout on the CPU on matplotlib axes, with its legend."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch, Rectangle

    plan, n = build_tiles(layout, geometry), layout.num_tokens
    rows, keys = plan.row_index.long(), plan.key_index.long()
    segment = layout.segment_ids
    own = (segment[:, None] == segment[None, :]) & (segment[:, None] > 0)
    ranges = torch.where(layout.dense_mask(), torch.where(own, 1, 2), 0)[rows][:, keys]
    axes.imshow(ranges.numpy(), cmap=ListedColormap(list(COLOURS.values())), vmin=0, vmax=2, interpolation="nearest")
    for top, height, left, width, is_edge in computed_boxes(plan, steps):
        style = {"linewidth": 0.7, "edgecolor": "#444444" if is_edge else "black", "linestyle": ":" if is_edge else "-"}
        axes.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, clip_on=False, **style))
    private = int(((segment > 0) & ~layout.public).sum())
    for edge in {private, n - int((segment < 0).sum())} - {0, n}:
        axes.axvline(edge - 0.5, color="#d55e00", linewidth=1.2)

    axes.set_xlabel("key, in the order of key_index: private | public | padding")
    axes.set_ylabel("query, in the order of row_index: segments | text | padding")
    useful, computed = useful_pairs(layout), executed_pairs(plan, "forward", *steps)
    title = f"{len(plan.row_tiles)} row tiles; {useful:,} of {computed:,} computed pairs are useful"
    axes.set_title(f"{title} ({useful / computed:.0%})" if computed else title, fontsize=10)
    handles = [Patch(color=colour, label=f"sees: {name}") for name, colour in list(COLOURS.items())[1:]]
    handles += [
        Patch(facecolor="none", edgecolor="black", label="steps without a mask"),
        Patch(facecolor="none", edgecolor="#444444", linestyle=":", label="steps at an edge"),
    ]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False)


def computed_boxes(plan: TilePlan, steps: tuple[int, int]) -> list[tuple[int, int, int, int, bool]]:
    """(top, height, left, width, whether at an edge) of the steps of all row tiles, in the order of row_index and key_index.

    An own range whose public keys stand elsewhere becomes several boxes; boxes end where the range does, also where the step
    goes on behind it.
    """
    slot = torch.empty_like(plan.key_index)
    slot[plan.key_index.long()] = torch.arange(slot.shape[0], dtype=slot.dtype)
    boxes = []
    for begin, count, *ranges in plan.row_tiles.tolist():
        for (first, full, end), is_public in ((ranges[:3], True), (ranges[3:], False)):
            whole = first + (full - first) // steps[0] * steps[0]
            for left, right, step, is_edge in ((first, whole, steps[0], False), (whole, end, steps[1], True)):
                for at in range(left, right, step):
                    keys = torch.arange(at, min(at + step, right))
                    places = (keys if is_public else slot[keys]).tolist()
                    boxes += [(begin, count, start, width, is_edge) for start, width in _runs_of(sorted(places))]
    return boxes


def _runs_of(places: list[int]) -> list[tuple[int, int]]:
    """(start, length) of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and place == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((place, 1))
    return runs
