"""What "auto" takes on GPUs, from results: `python -m bench.choose FILE...` writes `voco_kernels/measured.json`.

A file is one of `make gpu-bench` or `make gpu-check`, committed below `bench/results`. The cuda backend is chosen for a GPU
family, a head_dim, a dtype and a task where it is ahead of triton on every shape that both were timed on.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

from voco_llama.bench.files import write_atomically
from voco_llama.bench.results import load

from bench.attention_peers import our_name
from bench.shapes import GPU
from bench.verified import ROOT, family_of
from voco_kernels import choice

FILE = ROOT / "voco_kernels" / "measured.json"
TASKS = (choice.FORWARD, choice.BOTH)


def entries(path: Path) -> list[dict]:
    """How far cuda is ahead by a file of results, as rows of `measured.json`. ValueError where it is not of a GPU."""
    content = load(path)
    if content.get("capability") is None:
        raise ValueError(f"{path} must hold results of a GPU, but is of {content['device']}")
    times, ratios = {}, defaultdict(list)
    for row in content["rows"]:
        # What went wrong took for ever; what was not run says nothing.
        if row["suite"] == "attention" and not row["status"].startswith("not run"):
            ms = row["p50_ms"] if row["status"] == "ok" else math.inf
            times[row["task"], row["shape"], row["dtype"], row["name"]] = ms
    for (task, shape, dtype, name), ms in times.items():
        other = times.get((task, shape, dtype, our_name("triton")))
        if name == our_name("cuda") and other is not None and task in TASKS:
            ratios[GPU[shape].head_dim, dtype, task].append(0.0 if ms == math.inf else other / ms)
    family, name = family_of(content["capability"]), str(path.resolve().relative_to(ROOT))
    return [
        {"family": family, "head_dim": d, "dtype": dtype, "task": task, "ahead": round(min(found), 3), "results": name}
        for (d, dtype, task), found in sorted(ratios.items())
    ]


def chosen(found: list[dict]) -> list[dict]:
    """The worst entry of each kind, where even that one is ahead."""
    worst = {}
    for entry in sorted(found, key=lambda entry: -entry["ahead"]):
        worst[entry["family"], entry["head_dim"], entry["dtype"], entry["task"]] = entry
    return [entry for _, entry in sorted(worst.items()) if entry["ahead"] > 1]


def main(arguments: list[str] | None = None) -> int:
    """2 for a file that cannot be used, else 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.choose", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    try:
        found = [entry for path in parser.parse_args(arguments).files for entry in entries(path)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    content = {"format_version": choice.FORMAT_VERSION, "entries": chosen(found)}
    write_atomically(FILE, (json.dumps(content, indent=1) + "\n").encode())
    choice.measured.cache_clear()
    print(choice.in_words())
    return 0


if __name__ == "__main__":
    sys.exit(main())
