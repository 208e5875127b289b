"""The table at the end of `make gpu-check`, from what its results file holds."""

from bench.gpu_kv import CONCATENATION, COPY, COPY_TARGET, HOST_TARGET, LOOP, MICROSECONDS_TARGET, NOTHING
from bench.gpu_peers import DENSE, FLEX, FLEX_BUILT, OURS, ROOF_TARGETS, SPLIT

PLAN_TARGET = 30.0  # microseconds on a GPU, for 16k tokens
MISSING = "-"
COLUMNS = (
    "shape", "fwd ms", "roof %", "split", "flex", "+mask", "dense", "fwd+bwd ms", "roof %", "split", "flex", "dense",
    "extra MiB",
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
    parts = []
    if ceilings := found.get("ceilings"):
        parts.append(f"matmul {ceilings['matmul_tflops']:.0f} TFLOP/s, copy {ceilings['copy_gb_per_s']:.0f} GB/s")
    if plan := found.get("plan"):
        parts.append(
            f"plan of {plan['tokens']} tokens: {plan['device']['p50_us']:.0f} us (<= {PLAN_TARGET:.0f}) on the device, "
            f"{plan['cpu']['p50_us']:.0f} us on the CPU"
        )
    return "; ".join(parts) or "no ceilings measured"


def _row(found: dict, name: str) -> list[str]:
    entry = found["shapes"].get(name, {})
    rows = {
        (comparison["task"], row["name"]): row
        for comparison in found["comparisons"]
        if comparison["shape"] == name
        for row in comparison["rows"]
    }
    forward, both = entry.get("forward", {}), entry.get("forward_backward", {})
    extra = [side.get("extra_bytes") for side in (forward, both)]
    return [
        _time(rows.get(("forward", OURS))),
        _share(forward.get("roof"), ROOF_TARGETS.get(name)),
        *(_ratio(rows.get(("forward", peer))) for peer in (SPLIT, FLEX, FLEX_BUILT, DENSE)),
        _time(rows.get(("forward_backward", OURS))),
        _share(both.get("roof"), None),
        *(_ratio(rows.get(("forward_backward", peer))) for peer in (SPLIT, FLEX, DENSE)),
        " / ".join(MISSING if x is None else f"{x / 2**20:.0f}" for x in extra),
    ]


def _kv_lines(found: dict) -> list[str]:
    """A line per shape of the K/V path: every row in microseconds, and what is wanted."""
    lines = []
    for comparison in found["comparisons"]:
        if comparison["task"] != "injection":
            continue
        us = {row["name"]: 1e3 * row["p50_ms"] for row in comparison["rows"] if "p50_ms" in row}
        ours = next((us[name] for name in us if name not in (NOTHING, COPY, LOOP, CONCATENATION)), None)
        parts = [f"{name} {value:.1f} us" for name, value in us.items()]
        if ours is not None and NOTHING in us and COPY in us:
            parts.append(f"beyond an empty kernel {ours - us[NOTHING]:.1f} us (image: <= {MICROSECONDS_TARGET:g})")
            parts.append(f"times a copy {ours / us[COPY]:.2f} (long_video: <= {COPY_TARGET:g})")
        if entry := found.get("kv", {}).get(comparison["shape"]):
            parts.append(f"host beyond the launch {entry['host_us']:.1f} us (<= {HOST_TARGET:g})")
        lines.append(f"inject {comparison['shape']}: {'; '.join(parts)}")
    return lines


def _time(row: dict | None) -> str:
    if row is None or "p50_ms" not in row:
        return MISSING
    return f"{row['p50_ms']:.3f}"


def _share(share: float | None, target: float | None) -> str:
    if share is None:
        return MISSING
    return f"{100 * share:.0f}" + (f" [{100 * target:.0f}]" if target else "")


def _ratio(row: dict | None) -> str:
    if row is None or row.get("ratio") is None:
        return MISSING
    return f"{row['ratio']:.2f}" + (f" [{row['target']:g}]" if row["target"] else "")


def _verdict(found: dict) -> str:
    return f"FAILED: {', '.join(found['failed'])}" if found["failed"] else "all passed"
