"""The paper's tables 1 to 6 from whatever results there are."""

from collections.abc import Sequence

from voco_llama.bench.markdown import table

from .build import VISION
from .plan import COUNTS, ELASTIC, FEW
from .results import LOWER, UPPER, Row, Scores, Value, row_of
from .task import GENERAL, LOCATE, REGION, question_prior

NAMES = {"voco": "VoCo", "avg_pool": "Avg. pool", "q_former": "Q-Former", "llama_vid": "LLaMA-VID"}
FIXED = 16  # the fixed count of table 4
MISSING = "not run"
Line = tuple[str, str, Row]  # a name, tokens in words, where the numbers come from

_UPPER: Line = ("Upper bound", f"{VISION}", UPPER)
_LOWER: Line = ("Lower bound", "1", LOWER)


def markdown(scores: Scores) -> str:
    """All tables, and what they were made with."""
    systems = [(name, "1", row_of(system, 1)) for system, name in NAMES.items()]
    few = [
        (NAMES[system], str(count), row_of(system, count)) for count in FEW for system in ("llama_vid", "voco")
    ]
    caching = ("Full caching", f"{VISION}", Row("upper_bound", (1,), "full_caching", 1))
    counts = [("VoCo", str(count), row_of("voco", count)) for count in reversed(COUNTS)]
    every = [_UPPER, caching, *systems, _LOWER]
    boxes = [*every[:-1], *few[2:], _LOWER]
    parts = [
        _header(scores),
        *_table("Table 1: systems at one token", every, GENERAL, scores),
        *_table("Table 2: numbers of VoCo tokens", [_UPPER, *counts, _LOWER], GENERAL, scores),
        *_table("Table 3: LLaMA-VID and VoCo", [_UPPER, *few, _LOWER], GENERAL, scores),
        "N counts the content tokens of LLaMA-VID; its context token comes on top, so it has one token more than VoCo. In "
        "training all questions of an image guide it at once, and one in the evaluation.",
        "",
        *_fewer(scores),
        *_table('Table 5: localisation ("where is the 7", IoU above 0.5)', boxes, (LOCATE,), scores),
        *_table('Table 6: regions ("which digit is in box ...")', boxes, (REGION,), scores),
    ]
    return "\n".join(parts) + "\n"


def _header(scores: Scores) -> str:
    lines = ["# Retention on digits", ""]
    if any(result["smoke"] for result in scores.results):
        lines += ["**A smoke run, too short to be a result.**", ""]
    lines.append(
        "Accuracy in % on held-out digits and, below it, the retention rate (result - lower) / (upper - lower), the bounds "
        "being those of the same seed; mean and standard deviation over seeds."
    )
    if scores.results:
        one = scores.results[0]
        machines = sorted({f"{r['machine']['device']}, torch {r['machine']['torch']}" for r in scores.results})
        commits = sorted({str(r["machine"]["commit"])[:12] for r in scores.results})
        minutes = sum(sum(r["seconds"].values()) for r in scores.results) / 60
        lines.append(
            f"{len(scores.results)} runs of {one['settings']['steps']} steps, {minutes:.0f} minutes in all; "
            f"{one['settings']['questions']} questions; settings `{one['digest'][:12]}`; {'; '.join(machines)}; "
            f"commit {', '.join(commits)}; {min(r['machine']['date'][:10] for r in scores.results)} to "
            f"{max(r['machine']['date'][:10] for r in scores.results)}."
        )
    return "\n".join([*lines, ""])


def _table(title: str, lines: Sequence[Line], kinds: Sequence[str], scores: Scores) -> list[str]:
    """Two rows a system, as in the paper: accuracies, then retention rates."""
    columns = [(kind,) for kind in kinds] + ([tuple(kinds)] if len(kinds) > 1 else [])
    head = ["system", "tokens", *kinds, *(["mean"] if len(kinds) > 1 else []), "seeds"]
    rows = []
    for name, tokens, row in lines:
        accuracies = [scores.accuracy(row, column) for column in columns]
        seeds = accuracies[0].seeds if accuracies[0] else 0
        rows.append([name, tokens, *(text(x) for x in accuracies), str(seeds)])
        if seeds and row not in (UPPER, LOWER):
            rates = [scores.retention(row, column) for column in columns]
            rows.append(["", "", *(f"*{text(x)}*" for x in rates), ""])
    prior = [100 * sum(map(question_prior, column)) / len(column) for column in columns]
    rows.append(["Question alone (prior)", "", *(f"{x:.1f}" for x in prior), ""])
    return [f"## {title}", "", *table(head, rows, "lr" + "r" * (len(head) - 2)), ""]


def _fewer(scores: Scores) -> list[str]:
    """Table 4: one number of tokens in training, others afterwards."""
    head = ["trained at", *map(str, ELASTIC), "seeds"]
    rows = []
    for name, counts in ((f"{FIXED} tokens (the paper's)", (FIXED,)), (f"{ELASTIC[0]} to {ELASTIC[-1]} (ours)", ELASTIC)):
        used = [Row("voco", counts, "voco", count) for count in ELASTIC]
        accuracies = [scores.accuracy(row, GENERAL) for row in used]
        seeds = accuracies[0].seeds if accuracies[0] else 0
        rows.append([name, *(text(x) for x in accuracies), str(seeds)])
        if seeds:
            rows.append(["", *(f"*{text(scores.retention(row, GENERAL))}*" for row in used), ""])
    rows.append(["as many as evaluated", *(text(scores.accuracy(row_of("voco", n), GENERAL)) for n in ELASTIC), ""])
    title = "## Table 4: fewer VoCo tokens than in training, mean of the kinds"
    note = "The elastic model, which draws the number of each image, is this project's extension."
    return [title, "", *table(head, rows, "l" + "r" * (len(head) - 1)), "", note, ""]


def text(value: Value | str | None) -> str:
    """A cell: per cent with its spread, or why there is none."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    return f"{100 * value.mean:.1f}" + ("" if value.spread is None else f" ± {100 * value.spread:.1f}")
