"""`make gpu-check`: test, check and time the kernels on this machine's NVIDIA GPU, and record what was verified.

One step that fails does not stop the others. The exit status is 0 where all passed, 1 where something failed, and 2 where
there is no GPU. Peers that cannot run, and targets that are missed, are no failures.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from voco_llama.bench.clock import WARM_UPS, Clock, measure_ceilings
from voco_llama.bench.measure import OURS, Candidate, Comparison, Row, Work, compare, first_line
from voco_llama.bench.results import Results, describe_machine, file_name

from bench import attention_peers, gpu_checks, gpu_kv, verified
from bench.attention_problem import Problem, unplanned
from bench.decode_problem import Problem as DecodeProblem
from bench.decode_problem import able
from bench.gpu_table import BOTH, FORWARD, INJECTION, PLAN, PLAN_CPU, PLAN_DEVICE, table_lines
from bench.kv_problem import Problem as KVProblem
from bench.shapes import DECODE, GPU, GPU_KV, KV, AttentionShape, KVShape

# Seconds that stay for timing however long tests and sanitizers take, and what compiling FlexAttention for a shape may need.
TIMING_RESERVE, FLEX_RESERVE = 200, 60
PLAN_SHAPE = "video"


@dataclass
class Settings:
    """What is checked, and where results go: as `make gpu-check` has it, where a test does not say otherwise.

    Attributes:
        minutes: after which nothing is begun any more.
        seconds: of timed rounds per comparison.
        compiler: for FlexAttention.
        ceiling: (size of the matmul, bytes of the copy) that say what the device does at best.
    """

    device: torch.device
    backend: str = "triton"
    dtype: torch.dtype = torch.bfloat16
    shapes: dict[str, AttentionShape] = field(default_factory=lambda: GPU)
    kv_backends: tuple[str, ...] = gpu_kv.BACKENDS
    kv_shapes: dict[str, KVShape] = field(default_factory=lambda: GPU_KV)
    tests: Path = verified.ROOT / "tests"
    sanitizers: tuple[str, ...] = gpu_checks.SANITIZERS
    results: Path = verified.ROOT / "bench" / "results"
    verified: Path = verified.FILE
    commit: str | None = None
    minutes: float = 9.0
    seconds: float = 2.0
    compiler: Callable = torch.compile
    ceiling: tuple[int, int] = (8192, 2**30)


class GpuCheck:
    """A run: `found` is what the results file holds, `failed` the titles of steps that failed."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.began = monotonic()
        self.deadline = self.began + 60 * settings.minutes
        self.failed: list[str] = []
        self.proved: set[str] = set()
        machine = describe_machine(settings.device, settings.commit)
        self.path = settings.results / file_name(machine).replace(".json", f"-check-{machine['date'][:10]}.json")
        self.results = Results(self.path, machine)
        self.found: dict[str, Any] = self.results.content
        self.found |= {"backend": settings.backend, "checks": {}, "backends": {}, "sanitizers": {}}
        self.dtype = str(settings.dtype).removeprefix("torch.")

    def run(self) -> int:
        """All steps, then the table; the exit status."""
        settings = self.settings
        self.say(f"gpu-check on {self.found['device']}: tests, checks, then timing; at most {settings.minutes:g} minutes")
        self.step("compiled module", self.build)
        self.verify()
        self.measure()
        self.found |= {"seconds": round(monotonic() - self.began), "failed": self.failed}
        self.results.write()
        self.say(f"written to {self.path}")
        self.say("\n".join(["", *table_lines(self.found)]))
        return 1 if self.failed else 0

    def say(self, text: str, end: str = "\n") -> None:
        """One line of progress, at once."""
        print(text, end=end, flush=True)

    def step(self, title: str, function: Callable[[], str], since: float | None = None) -> None:
        """Run a step, which returns what it found in one line; say how long it took (since it began elsewhere)."""
        began = monotonic() if since is None else since
        self.say(f"[{monotonic() - self.began:3.0f} s] {title}:", end=" ")
        try:
            said = function()
        # Whatever went wrong, the other steps still have something to say.
        except Exception as error:
            self.failed.append(title)
            said = f"FAILED: {first_line(error)}"
        self.say(f"{said} ({monotonic() - began:.1f} s)")

    def build(self) -> str:
        """Build the CUDA module in place where it is missing, and leave out backends of the K/V path that cannot run."""
        settings, said = self.settings, "not asked for"
        if "cuda" in settings.kv_backends:
            said = gpu_checks.build_module(self.deadline - TIMING_RESERVE)
        able = tuple(name for name in settings.kv_backends if gpu_kv.unavailable_reason(name) is None)
        for name in set(settings.kv_backends) - set(able):
            self.found["backends"][f"{name} K/V path"] = f"not run: {gpu_kv.unavailable_reason(name)}"
        self.settings = replace(settings, kv_backends=able)
        return said

    # ---- tests and checks ----------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Tests and sanitizers in other processes, and meanwhile the checks in this one; then the record."""
        settings, until = self.settings, self.deadline - TIMING_RESERVE
        # Processes mostly compile kernels, each on one core.
        workers = max(2, min(6, (os.cpu_count() or 2) // 2))
        with tempfile.TemporaryDirectory() as reports, ThreadPoolExecutor(workers) as pool:
            began = monotonic()
            files = gpu_checks.start_gpu_tests(pool, settings.tests, Path(reports), until)
            watched = (settings.backend, *(("cuda",) if "cuda" in settings.kv_backends else ()))
            arguments = (settings.device.type, watched, settings.kv_backends, until)
            tools = {tool: pool.submit(gpu_checks.run_sanitizer, tool, *arguments) for tool in settings.sanitizers}
            for name, shape in settings.shapes.items():
                self.step(f"check {name}", lambda shape=shape: self.check(shape))
            for backend in gpu_checks.OTHER_BACKENDS:
                self.step(f"check backend {backend}", lambda backend=backend: self.check_backend(backend))
            for backend in (*settings.kv_backends, "torch"):
                self.step(f"check K/V path {backend}", lambda backend=backend: self.check_kv(backend))
            for backend in able(settings.device):
                self.step(f"check decoding {backend}", lambda backend=backend: self.check_decoding(backend))
            self.found["tests"] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
            for name, future in files.items():
                self.step(f"tests/{name}", lambda future=future: self.count_tests(future), since=began)
            for tool, future in tools.items():
                self.step(tool, lambda tool=tool, future=future: self.judge_sanitizer(tool, future), since=began)
        self.step("record", self.record)

    def check(self, shape: AttentionShape) -> str:
        """The plan, the same bits twice, and the error rule on the shrunken and on the full shape."""
        settings = self.settings
        where = (settings.device, settings.dtype, settings.backend)
        entry = self.found["checks"][shape.name] = {"same_bits": False}
        if settings.backend == "triton":
            gpu_checks.check_plan(shape, settings.device)
        gpu_checks.check_repeatable(shape, *where)
        entry["same_bits"] = True
        entry["small"] = gpu_checks.small_errors(shape, *where)
        entry["full"] = gpu_checks.full_errors(Problem(shape, *where))
        entry["errors"] = gpu_checks.merged(entry["small"], entry["full"])
        return f"same bits twice; error / bound {max(entry['errors'].values()):.2f}"

    def check_backend(self, backend: str) -> str:
        """The error rule on shrunken shapes for another backend; shapes that it refuses do not count."""
        settings, errors, reason = self.settings, [], ""
        for shape in settings.shapes.values():
            try:
                errors.append(gpu_checks.small_errors(shape, settings.device, settings.dtype, backend))
                if backend == "cuda":
                    gpu_checks.check_repeatable(shape, settings.device, settings.dtype, backend)
                    errors.append(gpu_checks.full_errors(Problem(shape, settings.device, settings.dtype, backend)))
            except ValueError as error:
                reason = first_line(error)
        if not errors:
            self.found["backends"][backend] = f"not run: {reason}"
            return f"not run: {reason}"
        self.found["backends"][backend] = worst = gpu_checks.merged(*errors)
        refused = len(settings.shapes) - len(errors)
        return f"{len(errors)} shapes, {refused} refused; error / bound {max(worst.values()):.2f}"

    def check_kv(self, backend: str) -> str:
        """Extraction and injection of the smaller shapes against the reference; then the kernels count as verified."""
        checked = [shape for name, shape in self.settings.kv_shapes.items() if name in KV]
        for shape in checked:
            gpu_kv.check(shape, self.settings.device, self.settings.dtype, backend)
        self.proved.add(f"{backend} K/V path")
        return f"{len(checked)} shapes keep to the error rule"

    def check_decoding(self, backend: str) -> str:
        """Every kind of shared prefix against the reference; then the kernels count as verified."""
        settings, stored = self.settings, (self.settings.dtype, torch.int8, torch.float8_e4m3fn)
        for shape in DECODE.values():
            for kind in stored:
                problem = DecodeProblem(shape, settings.device, settings.dtype, kind)
                problem.check(problem.shared(backend))
        self.proved.add(f"{backend} decoding")
        return f"{len(DECODE) * len(stored)} problems keep to the error rule"

    def count_tests(self, future: Future) -> str:
        """Add a file's tests to the counts; fail where one of them failed."""
        tests: gpu_checks.Tests = future.result()
        total = self.found["tests"]
        for name, count in tests.counts().items():
            total[name] += count
        total["failures"] += tests.failed
        if any(title.endswith("test_device_query_agrees_with_torch") for title in tests.passed):
            self.proved.add("compiled module")
        said = ", ".join(f"{count} {name}" for name, count in tests.counts().items())
        if tests.failed:
            raise RuntimeError(f"{said}: {', '.join(tests.failed[:5])}")
        return said

    def judge_sanitizer(self, tool: str, future: Future) -> str:
        """Keep what the tool found; fail where that was an error."""
        self.found["sanitizers"][tool] = said = future.result()
        if said.startswith("fail"):
            raise RuntimeError(said)
        return said

    def record(self) -> str:
        """Add this run to the file of verifications, if all went well so far."""
        settings, found = self.settings, self.found
        if self.failed:
            return f"none, because of: {', '.join(self.failed)}"
        if not found["tests"]["passed"]:
            raise RuntimeError("none, because no test ran that needs a GPU")
        errors = {settings.backend: gpu_checks.merged(*(entry["errors"] for entry in found["checks"].values()))}
        errors |= {name: entry for name, entry in found["backends"].items() if isinstance(entry, dict)}
        self.proved |= {group for group in verified.GROUPS if group in errors}
        self.proved |= set(verified.TRITON_GROUPS) if settings.backend == "triton" else set()
        # On Hopper the kernels of such head_dims were its own.
        on_hopper = "cuda" in errors and found["capability"] == [9, 0] and "sm_90a" in gpu_checks.compiled_archs()
        self.proved |= {"cuda on Hopper"} if on_hopper else set()
        record = {key: found[key] for key in sorted(verified.RECORD_KEYS - {"errors", "tests"})}
        record |= {
            "errors": errors,
            "tests": {name: found["tests"][name] for name in ("passed", "failed", "skipped")},
            "sanitizers": found["sanitizers"],
        }
        family = verified.family_of(found["capability"]) if found["capability"] else "none"
        hashes = verified.hashes_of(source for group in sorted(self.proved) for source in verified.GROUPS[group])
        content = verified.add(verified.load(settings.verified), family, record, hashes)
        verified.write_json(settings.verified, content)
        return f"{', '.join(sorted(self.proved))} on {family}, in {settings.verified}"

    # ---- timing --------------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """The device's ceilings, the plan, and every shape against its peers."""
        clock = Clock(self.settings.device)
        self.step("ceilings", lambda: self.time_ceilings(clock))
        self.step("plan", lambda: self.time_plan(clock))
        for name, shape in self.settings.shapes.items():
            self.step(f"time {name}", lambda shape=shape: self.time_shape(shape, clock))
        for name, shape in self.settings.kv_shapes.items():
            self.step(f"time K/V {name}", lambda shape=shape: self.time_kv(shape, clock))

    def time_ceilings(self, clock: Clock) -> str:
        """What the device does at best."""
        ceilings = measure_ceilings(clock, self.settings.dtype, *self.settings.ceiling)
        self.results.set_ceilings(self.dtype, ceilings)
        return f"matmul {ceilings.flops / 1e12:.0f} TFLOP/s, copy {ceilings.bytes / 1e9:.0f} GB/s read and written"

    def time_plan(self, clock: Clock) -> str:
        """How long a plan takes for a layout that was never seen, on the device and on the CPU."""
        shape = self.settings.shapes[PLAN_SHAPE]
        host, rounds, rows = shape.layout(), 15, []
        cpu = torch.device("cpu")
        for name, device, timer in ((PLAN_DEVICE, clock.device, clock), (PLAN_CPU, cpu, Clock(cpu))):
            layouts = [unplanned(host.to(device)) for _ in range(rounds + WARM_UPS)]
            seconds = timer.times(lambda layouts=layouts: layouts.pop().prepare(), rounds)
            rows.append(Row(name, "ok", role=OURS, seconds=seconds, facts={"tokens": host.num_tokens}))
        self.results.add(Comparison("plan", PLAN, shape.name, rows))
        on_device, on_cpu = (row.percentile(50) * 1e6 for row in rows)
        return f"{host.num_tokens} tokens, {on_device:.0f} us on the device, {on_cpu:.0f} us on the CPU"

    def time_shape(self, shape: AttentionShape, clock: Clock) -> str:
        """Forward, and forward with backward, of ours and of the peers."""
        settings = self.settings
        if monotonic() > self.deadline:
            return "not run: no time was left"
        problem = Problem(shape, settings.device, settings.dtype, settings.backend)
        medians = []
        for task, backward in ((FORWARD, False), (BOTH, True)):
            compiler = settings.compiler if self.deadline - monotonic() > FLEX_RESERVE else None
            candidates = attention_peers.candidates(problem, backward=backward, compiler=compiler)
            candidates = [candidate for candidate in candidates if is_compared(candidate)]
            rows = compare(candidates, clock, seconds=settings.seconds)
            if compiler is None:
                rows.append(Row(attention_peers.FLEX, "not run: no time was left to compile it"))
            work = Work(shape.flops(backward=backward), shape.moved_bytes(settings.dtype, backward=backward))
            self.results.add(Comparison("attention", task, shape.name, rows, work, self.dtype))
            assert rows[0].status == "ok", f"{task}: {rows[0].status}"
            medians.append(f"{task} {rows[0].percentile(50) * 1e3:.3f} ms")
        return ", ".join(medians)

    def time_kv(self, shape: KVShape, clock: Clock) -> str:
        """Injection of ours and of the loops, as graph replays, and what a call costs the host."""
        settings = self.settings
        if monotonic() > self.deadline:
            return "not run: no time was left"
        if not settings.kv_backends:
            return "not run: no backend can"
        problem = KVProblem(shape, settings.device, settings.dtype)
        candidates = gpu_kv.candidates(problem, settings.kv_backends)
        rows = compare(candidates, clock, seconds=settings.seconds)
        host = gpu_kv.host_microseconds(shape, settings.device, settings.kv_backends[0])
        rows[0].facts["host_us"] = round(host, 2)
        work = Work(moved_bytes=shape.moved_bytes(settings.dtype))
        self.results.add(Comparison("kv", INJECTION, shape.name, rows, work, self.dtype))
        assert rows[0].status == "ok", rows[0].status
        return f"{rows[0].percentile(50) * 1e6:.1f} us, {host:.1f} us on the host beyond the launch"


def is_compared(candidate: Candidate) -> bool:
    """Whether there is time for it here; `make gpu-bench` measures all."""
    family = attention_peers.family_of(candidate.name)
    several = family in (attention_peers.SPLIT, attention_peers.DENSE)
    return candidate.role == OURS or several or candidate.name in (attention_peers.FLEX, attention_peers.FLEX_BUILT)


def main(arguments: list[str] | None = None) -> int:
    """See the module; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--commit", help="the commit that this is, where it is no git checkout")
    parser.add_argument("--minutes", type=float, default=Settings.minutes, help="default %(default)s")
    options = parser.parse_args(arguments)
    if torch.version.cuda is None or not torch.cuda.is_available():
        print(f"gpu-check: no NVIDIA GPU here (torch {torch.__version__} sees none), so nothing was run")
        return 2
    settings = Settings(torch.device("cuda", torch.cuda.current_device()), commit=options.commit, minutes=options.minutes)
    return GpuCheck(settings).run()


if __name__ == "__main__":
    sys.exit(main())
