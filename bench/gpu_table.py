"""The table at the end of `make gpu-check`, from what its results file holds."""

from itertools import groupby

from voco_llama.bench import measure

from bench.attention_peers import DENSE, FLEX, FLEX_BUILT, ROOF_TARGETS, SPLIT, family_of
from bench.gpu_kv import COPY, COPY_TARGET, HOST_TARGET, MICROSECONDS_TARGET, NOTHING

# As the tasks and the rows of plans are called.
FORWARD, BOTH, INJECTION, PLAN = "forward", "forward + backward", "into a cache", "what is made once per batch"
PLAN_DEVICE, PLAN_CPU = "tiles, on the device", "tiles, on the CPU"

PLAN_TARGET = 30.0  # microseconds on a GPU, for 16k tokens
MISSING = "-"
COLUMNS = (
    "shape", "fwd ms", "roof %", "split", "flex", "+mask", "dense", "fwd+bwd ms", "roof %", "split", "flex", "dense",
    "peak MiB",
)  # fmt: skip


def table_lines(found: dict) -> list[str]:
    """About twenty lines: the machine, the checks, the plan, and a row per shape with targets in brackets."""
    shapes = [[name, *_row(found, name)] for name in found["checks"]]
    widths = [max(len(row[i]) for row in [COLUMNS, *shapes]) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in [COLUMNS, *shapes]
    ]
    explained = "medians; split, flex (+mask: built in every call) and dense as ratios to ours; what is wanted in brackets"
    return [_machine(found), _checks(found), _limits(found), explained, *lines, *_kv_lines(found), _verdict(found)]


def _machine(found: dict) -> str:
    capability = ".".join(map(str, found["capability"])) if found["capability"] else "none"
    return (
        f"{found['device']}, capability {capability}, driver {found['driver']}, torch {found['torch']}, triton "
        f"{found['triton']}, python {found['python']}, commit {found['commit']}"
        f"{' with uncommitted changes' if found['uncommitted_changes'] else ''}"
    )


def _checks(found: dict) -> str:
    tests = found["tests"]
    same = sum(entry["same_bits"] for entry in found["checks"].values())
    errors = [share for entry in found["checks"].values() for share in entry.get("errors", {}).values()]
    parts = [
        f"tests {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped",
        *(f"{tool} {said}" for tool, said in found["sanitizers"].items()),
        f"same bits twice {same} of {len(found['checks'])}",
        f"largest error / bound {max(errors):.2f}" if errors else "no errors measured",
    ]
    return "; ".join(parts)


def _limits(found: dict) -> str:
    parts = [
        f"{dtype}: matmul {ceilings['matmul_tflops']:.0f} TFLOP/s, copy {ceilings['copy_gb_per_s']:.0f} GB/s"
        for dtype, ceilings in found["ceilings"].items()
    ]
    plans = {row["name"]: row for row in found["rows"] if row["task"] == PLAN}
    if plans:
        on_device, on_cpu = (1e3 * plans[name]["p50_ms"] for name in (PLAN_DEVICE, PLAN_CPU))
        tokens = plans[PLAN_DEVICE]["facts"]["tokens"]
        parts.append(
            f"plan of {tokens} tokens: {on_device:.0f} us (<= {PLAN_TARGET:.0f}) on the device, {on_cpu:.0f} us on the CPU"
        )
    return "; ".join(parts) or "no ceilings measured"


def _row(found: dict, name: str) -> list[str]:
    here = [row for row in found["rows"] if row["shape"] == name and row["p50_ms"] is not None]
    # The fastest of each family, and the first of ours.
    rows = {(row["task"], family_of(row["name"])): row for row in sorted(here, key=lambda row: -row["p50_ms"])}
    ours = {row["task"]: row for row in reversed(here) if row["role"] == measure.OURS}
    forward, both = ours.get(FORWARD), ours.get(BOTH)
    peaks = [None if row is None else row["peak_bytes"] for row in (forward, both)]
    return [
        _time(forward),
        _share(forward, ROOF_TARGETS.get(name)),
        *(_ratio(rows.get((FORWARD, peer))) for peer in (SPLIT, FLEX, FLEX_BUILT, DENSE)),
        _time(both),
        _share(both, None),
        *(_ratio(rows.get((BOTH, peer))) for peer in (SPLIT, FLEX, DENSE)),
        " / ".join(MISSING if x is None else f"{x / 2**20:.0f}" for x in peaks),
    ]


def _kv_lines(found: dict) -> list[str]:
    """A line per shape of the K/V path: every row in microseconds, and what is wanted."""
    lines = []
    injections = [row for row in found["rows"] if row["task"] == INJECTION]
    for shape, group in groupby(injections, lambda row: row["shape"]):
        rows = list(group)
        us = {row["name"]: 1e3 * row["p50_ms"] for row in rows if row["p50_ms"] is not None}
        ours = us.get(rows[0]["name"])
        parts = [f"{name} {value:.1f} us" for name, value in us.items()]
        if ours is not None and NOTHING in us and COPY in us:
            parts.append(f"beyond an empty kernel {ours - us[NOTHING]:.1f} us (image: <= {MICROSECONDS_TARGET:g})")
            parts.append(f"times a copy {ours / us[COPY]:.2f} (long_video: <= {COPY_TARGET:g})")
        if (host := rows[0]["facts"].get("host_us")) is not None:
            parts.append(f"host beyond the launch {host:.1f} us (<= {HOST_TARGET:g})")
        lines.append(f"inject {shape}: {'; '.join(parts)}")
    return lines


def _time(row: dict | None) -> str:
    if row is None:
        return MISSING
    return f"{row['p50_ms']:.3f}"


def _share(row: dict | None, target: float | None) -> str:
    if row is None or row["roof"] is None:
        return MISSING
    return f"{100 * row['roof']:.0f}" + (f" [{100 * target:.0f}]" if target else "")


def _ratio(row: dict | None) -> str:
    if row is None or row["ratio"] is None:
        return MISSING
    return f"{row['ratio']:.2f}" + (f" [{row['target']:g}]" if row["target"] else "")


def _verdict(found: dict) -> str:
    return f"FAILED: {', '.join(found['failed'])}" if found["failed"] else "all passed"
