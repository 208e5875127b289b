"""Builds CUDA C++ for the CPU with g++ and csrc/host, and runs it: kernels are tested without a GPU, under sanitizers.

A kind of build is plain, asan (AddressSanitizer: accesses out of bounds) or tsan (ThreadSanitizer, to which each CUDA
thread is a thread of its own: races in shared and global memory). Results are kept in the folder for temporary files, under
the hash of the preprocessed source and of the command, so that only what has changed is compiled again.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CACHE = Path(tempfile.gettempdir()) / f"voco-cuda-host-{os.getuid()}"

# No product is fused with a sum, and any memory may hold any type, as in nvcc; a word of CUDA's that the emulation does not
# have (__shared__) is an error. Kernels have parameters of an alignment that g++ would remark on.
HOST_FLAGS = ("-std=c++17", "-x", "c++", "-fPIC", "-DVOCO_HOST", "-ffp-contract=off", "-fno-strict-aliasing",
              "-Werror=attributes", "-Wno-psabi")  # fmt: skip
KIND_FLAGS = {
    "plain": ("-O2",),
    "asan": ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address"),
    "tsan": ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=thread"),
}
# The scheduler switches stacks, so no sanitizer may follow it; it tells them where it goes.
SCHEDULER_FLAGS = {"plain": ("-O3",), "asan": ("-O3", "-DVOCO_ASAN"), "tsan": ("-O3", "-DVOCO_TSAN")}
LINK_FLAGS = {"plain": (), "asan": ("-fsanitize=address",), "tsan": ("-fsanitize=thread",)}


class HostError(RuntimeError):
    """A compiler or a kernel failed; the message is all that it printed."""


def find_nvcc() -> str | None:
    home, path = os.environ.get("CUDA_HOME"), os.environ.get("PATH")
    folders = filter(None, (home and f"{home}/bin", path, "/usr/local/cuda/bin"))
    return shutil.which(os.environ.get("CUDACXX", "nvcc"), path=os.pathsep.join(folders))


def cuda_include() -> Path | None:
    """The folder of CUDA's headers: of CUDA_HOME, of the nvcc that is found, or of /usr/local/cuda."""
    nvcc = find_nvcc()
    homes = (os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda")
    includes = (Path(home) / "include" for home in homes if home)
    return next((include for include in includes if (include / "cuda_fp16.h").exists()), None)


def missing(kind: str = "plain") -> str | None:
    """What a build of that kind lacks on this machine; None where nothing is missing."""
    if shutil.which("g++") is None:
        return "needs g++"
    if cuda_include() is None:
        return "needs CUDA's headers (CUDA_HOME, nvcc on PATH, /usr/local/cuda)"
    library = {"asan": "libasan.so", "tsan": "libtsan.so"}.get(kind)
    if library and _call(["g++", f"-print-file-name={library}"]).strip() == library:
        return f"needs {library} of g++"
    return None


def build(
    name: str,
    sources: Sequence[Path],
    kind: str = "plain",
    *,
    shared: bool = False,
    extra_flags: Sequence[str] = (),
) -> Path:
    """Compiles sources (.cu or .cpp, without nvcc) and the emulation into an executable, or a shared object.

    Args:
        name: of the file that is made; a Python module's name where it is one.
        kind: plain, asan or tsan.
        shared: make `name`.so, of the plain kind, which any process can load.
        extra_flags: last in all commands, the compiler's and the linker's.

    Raises:
        HostError: with the compiler's messages.
    """
    flags = (*HOST_FLAGS, "-I", CSRC / "include", "-I", CSRC / "host", "-isystem", cuda_include())
    extra_flags = tuple(extra_flags)
    objects = [_compile(source, (*flags, *KIND_FLAGS[kind], *extra_flags)) for source in sources]
    for part in ("scheduler.cpp", "hopper.cpp", "wgmma.cpp"):
        objects.append(_compile(CSRC / "host" / part, (*flags, *SCHEDULER_FLAGS[kind], *extra_flags)))
    link_flags = (*LINK_FLAGS[kind], *(["-shared"] if shared else []))
    command = ["g++", *link_flags, *objects, *extra_flags]
    return _make(command, name + ".so" if shared else name)


def run(executable: Path, args: Sequence[str] = (), lazy: bool = True) -> str:
    """Runs an executable and returns all that it printed.

    Args:
        lazy: asynchronous copies happen as late as they may, else as early.

    Raises:
        HostError: with all that it printed, where it ended with another status than 0 or a sanitizer reported something.
    """
    environment = {
        **os.environ,
        "VOCO_COPIES": "lazy" if lazy else "eager",
        # Leaks are looked for on stacks, and those of the fibers are not known.
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "exitcode=66:history_size=4",
    }
    return _call([*_same_addresses(), str(executable), *map(str, args)], environment)


@functools.cache
def _same_addresses() -> tuple[str, ...]:
    """A prefix that switches off the random placement of memory, which ThreadSanitizer of older compilers dies of."""
    prefix = ("setarch", "--addr-no-randomize")
    if shutil.which("setarch") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        return ()
    return prefix


@functools.cache
def _compile(source: Path, flags: tuple) -> Path:
    command = ["g++", *flags, "-c", source]
    preprocessed = _call(["g++", *flags, "-E", source])
    return _make(command, Path(source).stem + ".o", preprocessed)


def _make(command: list, name: str, *contents: str) -> Path:
    """The file that the command makes with -o; made once for one compiler, command and contents."""
    text = "\n".join([_compiler(), *map(str, command), *contents])
    folder = CACHE / hashlib.sha256(text.encode()).hexdigest()[:24]
    target = folder / name
    if not target.exists():
        CACHE.mkdir(exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True)
        unfinished = folder / f"{os.getpid()}-{name}"
        _call([*command, "-o", unfinished])
        unfinished.replace(target)
    return target


@functools.cache
def _compiler() -> str:
    return _call(["g++", "--version"])


def _call(command: Sequence, environment: dict | None = None) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if done.returncode != 0:
        raise HostError(f"{' '.join(words)}\nended with status {done.returncode}:\n{done.stdout}")
    return done.stdout
