"""`make bench` and `make gpu-bench`: every suite in a process of its own, one file of results, and a report of it.

    python -m bench.run --device cpu --fresh
    python -m bench.run --device cuda --part attention kv

A part is the suite of that name. It begins nothing after `--minutes`, and what it did not reach is done by the next run,
which goes on with the file of results where commit, versions and machine are the same, and begins a new one where not. The
exit status is 0 where all passed, 1 where something failed, and 2 where the device is not there.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from time import monotonic

import torch
from voco_llama.bench.results import IDENTITY, Results, describe_machine, file_name, load

from bench.verified import ROOT

PARTS = ("plan", "kv", "attention", "two_stage", "table7", "training", "scaling")
# What one test may need beyond the time after which none begins.
LAST_TEST = 90
REPORT = ROOT / "build" / "report"


def prepare(path: Path, machine: dict, fresh: bool) -> str:
    """Leave an old file only where a run may go on with it; what was done, in words.

    Raises ValueError where the file is no file of results.
    """
    if path.is_file() and not fresh:
        old = load(path)
        changed = [key for key in IDENTITY if old[key] != machine[key]]
        if not changed:
            return f"going on with {path}, which has {len(old['rows'])} rows"
    Results(path, machine).write()
    return f"writing to {path}"


def run_part(part: str, path: Path, options: argparse.Namespace) -> bool:
    """Run a suite; whether it passed. It is ended where it hangs."""
    command = [sys.executable, "-m", "pytest", f"bench/test_{part}.py", "--benchmark-only", "--disable-warnings", "-v"]
    command += ["--device", options.device, "--results", str(path), "--resume", "--minutes", str(options.minutes)]
    command += ["--seconds", str(options.seconds)]
    if options.commit:
        command += ["--commit", options.commit]
    try:
        return subprocess.run(command, cwd=ROOT, timeout=60 * options.minutes + LAST_TEST).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"{part}: ended, since it took more than {options.minutes:g} minutes and {LAST_TEST} seconds", flush=True)
        return False


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
    print(prepare(path, machine, options.fresh), flush=True)
    failed = []
    for part in options.part:
        began = monotonic()
        print(f"\n{part}", flush=True)
        if not run_part(part, path, options):
            failed.append(part)
        print(f"{part}: {monotonic() - began:.0f} s", flush=True)
    report = [sys.executable, "-m", "voco_llama.cli", "bench", "report", str(path), "--out", str(REPORT)]
    if subprocess.run(report, cwd=ROOT).returncode:
        failed.append("report")
    print(f"FAILED: {', '.join(failed)}" if failed else f"all passed; results in {path}, report in {REPORT}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
