"""Triton kernels compiled for a GPU that is not there, by the launches that a GPU would get.

Inside `target` Triton believes in a GPU of that compute capability: `kernel[grid](...)` on CPU tensors specialises on its
arguments (multiples of 16, ones, dtypes) and compiles as it would there, and the launch is written down instead of run.
`resources` reads from the machine code what a kernel needs.

A process that interprets kernels cannot compile them, so the tests compile in a child: `run_jobs` starts one with
`python -m fake_cuda`, which answers in JSON.

The child uses Triton's ordinary cache. Its key holds the source, arguments, options, target and compiler, so what comes from
there is what would be compiled again; after the first run these tests take seconds.
"""

import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

# Shared memory that one block may ask for, in bytes: Triton refuses kernels that need more, as on the GPU.
MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Launch:
    """One `kernel[grid](...)`.

    Attributes:
        constants: constexpr arguments by name, and other arguments that are compiled in (None, 1).
        aligned: names of the arguments that the compiler knows to be multiples of 16 (pointers: in bytes).
        kernel: Triton's compiled kernel; its `asm` has the text of every stage ("ttgir", "ptx") and the "cubin".
    """

    name: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    constants: dict[str, object]
    aligned: list[str]
    kernel: object


@dataclass(frozen=True)
class Resources:
    """What a kernel needs, from its machine code.

    Attributes:
        arch: that it was compiled for, such as "sm_80" or "sm_90a".
        registers: of a thread.
        stack: bytes of a thread; spilled registers live here.
        shared: bytes of a block.
        instructions: how many there are, without NOP; the fields in capitals count some of them. LDL and STL load from and
            store to the stack, HMMA (sm_80) and HGMMA (Hopper) multiply matrices, LDGSTS is cp.async, LDSM ldmatrix, UTMALDG
            a TMA load, FFMA a scalar multiplication.
        wide_loads, wide_stores: accesses of 16 bytes to global memory.
    """

    arch: str
    registers: int
    stack: int
    shared: int
    instructions: int
    LDL: int
    STL: int
    HMMA: int
    HGMMA: int
    LDGSTS: int
    LDSM: int
    UTMALDG: int
    FFMA: int
    wide_loads: int
    wide_stores: int


@dataclass(frozen=True)
class Report:
    """A launch as the child describes it: as in `Launch`, where values that JSON lacks have become strings."""

    name: str
    grid: list[int]
    num_warps: int
    num_stages: int
    constants: dict[str, object]
    aligned: list[str]
    resources: Resources


class _Launcher:
    """What Triton calls to run a kernel, after it has been compiled and loaded."""

    def __init__(self, src, metadata):
        self.src, self.metadata = src, metadata

    def __call__(self, *arguments):
        driver = _driver_config().active
        compiled = self.src.fn.device_caches[driver.capability][0].values()
        names = self.src.fn.arg_names
        attributes = self.src.attrs.items()
        driver.launches.append(
            Launch(
                name=self.metadata.name,
                grid=arguments[:3],
                num_warps=self.metadata.num_warps,
                num_stages=self.metadata.num_stages,
                constants={names[path[0]]: value for path, value in self.src.constants.items()},
                aligned=[names[path[0]] for path, values in attributes if ["tt.divisibility", 16] in values],
                kernel=next(kernel for kernel in compiled if kernel.metadata is self.metadata),
            )
        )


class _Driver:
    """The part of Triton's driver that a launch asks, for a GPU of one compute capability."""

    launcher_cls = _Launcher

    def __init__(self, capability: int):
        self.capability = capability
        self.launches: list[Launch] = []
        properties = {"max_shared_mem": MAX_SHARED[capability]}
        # Module, function, registers, spills and the threads a block may have: nothing is loaded, so nothing is unloaded.
        loaded = (None, None, 0, 0, 1024)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties, load_binary=lambda name, kernel, shared, device: loaded
        )

    def get_current_device(self) -> int:
        # Kernels are cached per device and belong to one target; no machine has a device with such a number.
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def _driver_config():
    from triton.runtime import driver

    return driver


@contextlib.contextmanager
def target(capability: int) -> Iterator[list[Launch]]:
    """Inside, every Triton launch compiles for `capability` (80 or 90) and is appended to the list this gives."""
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels of this process are interpreted (TRITON_INTERPRET); compile in a child, with run_jobs")
    config, driver = _driver_config(), _Driver(capability)
    before = config._active
    config.set_active(driver)
    try:
        yield driver.launches
    finally:
        config.set_active(before)


def cuobjdump() -> str:
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "cuobjdump"
    for tool in (bundled, shutil.which("cuobjdump"), toolkit):
        if tool and os.access(tool, os.X_OK):
            return str(tool)
    raise RuntimeError(f"no cuobjdump: neither {bundled}, nor on PATH, nor {toolkit}")


def resources(kernel) -> Resources:
    """Read the machine code of Triton's compiled kernel; raises unless it is for the target it was compiled for."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [cuobjdump(), "--dump-resource-usage", "--dump-sass", cubin.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    [arch] = set(re.findall(r"code for (sm_\w+)", text))
    if not re.fullmatch(rf"sm_{kernel.metadata.target.arch}a?", arch):
        raise RuntimeError(f"compiled for {kernel.metadata.target}, but the machine code is for {arch}")
    [(registers, stack)] = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", text, re.MULTILINE))
    counted = ("LDL", "STL", "HMMA", "HGMMA", "LDGSTS", "LDSM", "UTMALDG", "FFMA")
    return Resources(
        arch=arch,
        registers=int(registers),
        stack=int(stack),
        shared=kernel.metadata.shared,
        instructions=opcodes.total() - opcodes["NOP"],
        **{name: opcodes[name] for name in counted},
        wide_loads=len(re.findall(r"\bLDG\S*\.128\b", text)),
        wide_stores=len(re.findall(r"\bSTG\S*\.128\b", text)),
    )


def run_jobs(jobs: dict[str, tuple[int, str, dict]]) -> dict[str, list[Report]]:
    """Compile in a child process, whatever this process does with kernels.

    Args:
        jobs: name to (capability, "module:function", keyword arguments). The function launches kernels on CPU or meta
            tensors; its module must not import `triton_interpreter`. The arguments must go through JSON.

    Returns:
        The launches of each job. Raises RuntimeError with the tracebacks of all jobs that failed.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-m", "fake_cuda"]
    done = subprocess.run(command, env=environment, input=json.dumps(jobs), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    answers = json.loads(done.stdout)
    if failed := {name: answer for name, answer in answers.items() if isinstance(answer, str)}:
        raise RuntimeError("\n".join(f"job {name!r} failed:\n{trace}" for name, trace in failed.items()))
    return {
        name: [Report(**launch | {"resources": Resources(**launch["resources"])}) for launch in launches]
        for name, launches in answers.items()
    }


def _run_job(capability: int, function: str, arguments: dict) -> list[dict] | str:
    """The launches of one job, as JSON takes them, or the traceback of what went wrong."""
    module, name = function.split(":")
    try:
        launch = getattr(importlib.import_module(module), name)
        with target(capability) as launches:
            launch(**arguments)
        return [_described(launch) for launch in launches]
    except Exception:
        return traceback.format_exc()


def _described(launch: Launch) -> dict:
    described = {name: value for name, value in vars(launch).items() if name != "kernel"}
    return described | {"resources": asdict(resources(launch.kernel))}


def main() -> None:
    """Read jobs from stdin, write their launches to stdout; what Triton prints goes to stderr."""
    jobs = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        answers = {name: _run_job(*job) for name, job in jobs.items()}
    json.dump(answers, sys.stdout, default=str)


if __name__ == "__main__":
    main()
