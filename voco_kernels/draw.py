"""Pictures of layouts: who sees whom, as a PNG."""

from pathlib import Path

import torch

from .errors import reject
from .layout import VocoLayout, document_of

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
    if not 0 < layout.num_tokens <= MAX_TOKENS:
        reject("layout", f"of 1 to {MAX_TOKENS} tokens to be drawn", f"of {layout.num_tokens}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    draw_on(figure.add_subplot(), layout.to("cpu"))
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
