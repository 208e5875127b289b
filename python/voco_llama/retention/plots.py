"""Plots of retention: against the number of tokens per system, and per kind of question. matplotlib is imported to draw."""

import io

from .plan import COUNTS, ELASTIC, FEW
from .results import LOWER, UPPER, Row, Scores, Value, row_of
from .tables import NAMES
from .task import GENERAL, KINDS, question_prior

# Colour-blind safe (Okabe-Ito).
COLOURS = {"voco": "#0072b2", "avg_pool": "#e69f00", "q_former": "#009e73", "llama_vid": "#d55e00"}
MARKERS = {"voco": "o", "avg_pool": "s", "q_former": "D", "llama_vid": "^"}
GREY = "#888888"


def pictures(scores: Scores) -> dict[str, bytes]:
    """{file name: PNG}."""
    return {"retention-tokens.png": _png(_tokens(scores)), "retention-kinds.png": _png(_kinds(scores))}


def _png(figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _figure(scores: Scores, title: str):
    from matplotlib.figure import Figure

    figure = Figure((8.2, 4.2), layout="constrained")
    axes = figure.subplots()
    smoke = " (smoke run, no result)" if any(result["smoke"] for result in scores.results) else ""
    axes.set_title(title + smoke, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _tokens(scores: Scores):
    """Retention rate, mean of the kinds without boxes, against the tokens of an image."""
    figure, axes = _figure(scores, "Retention rate, mean of " + ", ".join(GENERAL))
    lines = [(NAMES[s], s, "-", [row_of(s, n) for n in (COUNTS if s == "voco" else FEW)]) for s in NAMES]
    lines.append(("VoCo, elastic (ours)", "voco", "--", [Row("voco", ELASTIC, "voco", n) for n in ELASTIC]))
    for name, system, style, rows in lines:
        found = [(row.tokens, scores.retention(row, GENERAL)) for row in rows]
        points = [(n, value) for n, value in found if isinstance(value, Value)]
        if points:
            axes.errorbar(
                [n for n, _ in points],
                [100 * value.mean for _, value in points],
                [100 * (value.spread or 0) for _, value in points],
                color=COLOURS[system], marker=MARKERS[system], linestyle=style, capsize=3, label=name,
            )  # fmt: skip
    axes.axhline(100, color=GREY, linewidth=1)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(COUNTS, map(str, COUNTS))
    axes.minorticks_off()
    axes.set_xlabel("tokens of an image (LLaMA-VID: content tokens)")
    axes.set_ylabel("retention rate, %")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _kinds(scores: Scores):
    """Accuracy of each kind of question at one token, between the bounds."""
    figure, axes = _figure(scores, "Accuracy at one token")
    bars = [("Upper bound", UPPER, "#444444"), *((NAMES[s], row_of(s, 1), COLOURS[s]) for s in NAMES)]
    bars.append(("Lower bound", LOWER, "#bbbbbb"))
    width = 0.8 / len(bars)
    for i, (name, row, colour) in enumerate(bars):
        found = [(x, scores.accuracy(row, (kind,))) for x, kind in enumerate(KINDS)]
        found = [(x, value) for x, value in found if value is not None]
        if found:
            axes.bar(
                [x + (i - (len(bars) - 1) / 2) * width for x, _ in found],
                [100 * value.mean for _, value in found],
                width,
                yerr=[100 * (value.spread or 0) for _, value in found],
                color=colour, label=name, error_kw={"linewidth": 0.8},
            )  # fmt: skip
    for x, kind in enumerate(KINDS):
        axes.hlines(100 * question_prior(kind), x - 0.45, x + 0.45, color="black", linewidth=1, linestyle=":")
    axes.set_xticks(range(len(KINDS)), KINDS)
    axes.set_ylabel("accuracy, % (dotted: question alone)")
    axes.set_ylim(0, 105)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, ncols=len(bars), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    return figure
