"""`make bench` and `make gpu-bench`: every suite in a process of its own, one file of results, and a report of it.

    python -m bench.run --device cpu --fresh
    python -m bench.run --device cuda --part attention kv

A part is the suite of that name. It begins nothing after `--minutes`, and what it did not reach is done by the next run,
which goes on with the file of results where commit, versions and machine are the same, and begins a new one where not. The
exit status is 0 where all passed, 1 where something failed, 2 where the device is not there or an argument is wrong, and 3
where all passed but some was not reached.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from time import monotonic

import torch
from voco_llama.bench.results import Results, describe_machine, differences, file_name, load

from bench.conftest import UNFINISHED
from bench.verified import ROOT

PARTS = ("plan", "kv", "attention", "two_stage", "table7", "training", "scaling", "decode")
# What one test may need beyond the time after which none begins.
LAST_TEST = 90
REPORT = ROOT / "build" / "report"


def prepare(path: Path, machine: dict, parts: Iterable[str], fresh: bool) -> str:
    """Leave of an old file what a run may go on with, without rows that are to be measured anew; what was done, in words.

    Raises ValueError where the file is no file of results, or of another device.
    """
    if not path.is_file():
        Results(path, machine).write()
        return f"writing to {path}"
    old = load(path)
    if old["device"] != machine["device"]:
        raise ValueError(f"--results must be of this device ({machine['device']}), but {path} is of {old['device']}")
    if changed := differences(old, machine):
        Results(path, machine).write()
        return f"writing to {path} anew, since this run is of {changed[0]}"
    results = Results(path, machine, resume=True)
    results.drop(parts if fresh else ())
    results.write()
    return f"going on with {path}, which keeps {len(results.content['rows'])} rows"


def run_part(part: str, path: Path, options: argparse.Namespace) -> str:
    """Run a suite: "passed", "unfinished" or "FAILED". It is ended where it hangs."""
    command = [sys.executable, "-m", "pytest", f"bench/test_{part}.py", "--benchmark-only", "--disable-warnings", "-v"]
    command += ["--device", options.device, "--results", str(path), "--resume", "--minutes", str(options.minutes)]
    command += ["--seconds", str(options.seconds)]
    if options.commit:
        command += ["--commit", options.commit]
    try:
        status = subprocess.run(command, cwd=ROOT, timeout=60 * options.minutes + LAST_TEST).returncode
    except subprocess.TimeoutExpired:
        print(f"{part}: ended, since it took more than {options.minutes:g} minutes and {LAST_TEST} seconds", flush=True)
        return "FAILED"
    return {0: "passed", UNFINISHED: "unfinished"}.get(status, "FAILED")


def main(arguments: list[str] | None = None) -> int:
    """See the module; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="suites to run (all)")
    parser.add_argument("--results", type=Path, help="file to write; one in bench/results named by the machine")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file holds")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which a part begins nothing (%(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long to time a comparison (%(default)s)")
    parser.add_argument("--commit", help="the commit that this is, where it is no git checkout")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"gpu-bench: no NVIDIA GPU here (torch {torch.__version__} sees none), so nothing was run")
        return 2
    machine = describe_machine(torch.device(options.device), options.commit)
    path = (options.results or ROOT / "bench" / "results" / file_name(machine)).absolute()
    try:
        print(prepare(path, machine, options.part, options.fresh), flush=True)
    except ValueError as error:
        parser.error(str(error))
    became: dict[str, str] = {}
    for part in options.part:
        began = monotonic()
        print(f"\n{part}", flush=True)
        became[part] = run_part(part, path, options)
        print(f"{part}: {became[part]}, {monotonic() - began:.0f} s", flush=True)
    report = [sys.executable, "-m", "voco_llama.cli", "bench", "report", str(path), "--out", str(REPORT)]
    became["report"] = "FAILED" if subprocess.run(report, cwd=ROOT).returncode else "passed"
    print(f"\nresults in {path}, report in {REPORT}")
    print("; ".join(f"{part}: {what}" for part, what in became.items()), flush=True)
    if "FAILED" in became.values():
        return 1
    if "unfinished" in became.values():
        print("time ended before all was reached; the same command goes on with it")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
