"""The K/V kernels under sanitizers on the host, and their machine code; what they compute is in tests/test_kv_path.py."""

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import cuda_host
import pytest
from fake_cuda import cuobjdump

HERE = Path(__file__).resolve().parent
SOURCES = [HERE / "cuda" / "kv_cases.cpp", cuda_host.CSRC / "kv_cache.cu"]
BUDGET = HERE / "cuda_budget.json"


def executable(kind: str) -> Path:
    if reason := cuda_host.missing(kind):
        pytest.skip(reason)
    return cuda_host.build("kv_cases", SOURCES, kind)


@pytest.mark.parametrize(
    ("kind", "argument"),
    [("plain", []), ("asan", []), ("tsan", ["brief"]), pytest.param("tsan", [], marks=pytest.mark.full)],
)
def test_every_kind_of_problem(kind, argument):
    assert cuda_host.run(executable(kind), argument).strip() == "0 failures"


def test_the_values_are_looked_at():
    """Two tokens of one slot: one of them is not where it should be."""
    assert cuda_host.run(executable("plain"), ["twice"]).strip() != "0 failures"


def test_an_access_out_of_bounds_is_seen():
    with pytest.raises(cuda_host.HostError, match="heap-buffer-overflow"):
        cuda_host.run(executable("asan"), ["short"])


def test_a_race_is_seen():
    with pytest.raises(cuda_host.HostError, match="data race"):
        cuda_host.run(executable("tsan"), ["twice"])


# ---- machine code ------------------------------------------------------------------------------------------------------


def machine_code(arch: str, folder: Path) -> dict[str, dict[str, int]]:
    """Registers, bytes of stack, spilling and wide accesses of every K/V kernel on a GPU family such as sm_90."""
    cubin = folder / f"{arch}.cubin"
    command = [cuda_host.find_nvcc(), "-std=c++17", "-cubin", f"-arch={arch}", "-I", cuda_host.CSRC / "include"]
    subprocess.run([*command, cuda_host.CSRC / "kv_cache.cu", "-o", cubin], check=True)
    dump = [cuobjdump(), "--dump-resource-usage", "--dump-sass", cubin]
    text = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    usage = {name: (int(r), int(s)) for name, r, s in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", text)}
    kernels = {}
    for name, code in re.findall(r"Function : (\w+)(.*?)(?=Function :|\Z)", text, re.DOTALL):
        opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE))
        accesses = {kind: [op for op in opcodes.elements() if op.startswith(kind)] for kind in ("LDG", "STG", "LDL", "STL")}
        kernels[readable(name)] = {
            "registers": usage[name][0],
            "stack": usage[name][1],
            "local": len(accesses["LDL"]) + len(accesses["STL"]),
            "wide loads": sum(".128" in op for op in accesses["LDG"]),
            "wide stores": sum(".128" in op for op in accesses["STG"]),
        }
    return kernels


def readable(symbol: str) -> str:
    """"inject_aligned int8 -> bfloat16" out of a mangled name."""
    kernel = re.search(r"inject_aligned|extract_aligned|move_any", symbol)[0]
    arguments = symbol.split(kernel, 1)[1].split("EEv", 1)[0]
    if kernel == "move_any":
        return f"{kernel} {'inject' if 'E0' in arguments else 'extract'}"
    # Itanium mangling; a repeated argument is a substitution.
    types = re.findall(r"6__half|13__nv_bfloat16|13__nv_fp8_e4m3|S\d?_|[fa]", arguments)
    names = {"6__half": "float16", "13__nv_bfloat16": "bfloat16", "13__nv_fp8_e4m3": "float8", "f": "float32", "a": "int8"}
    return f"{kernel} {' -> '.join(names.get(t, names[types[0]]) for t in types)}"


@pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90", marks=pytest.mark.full)])
def test_machine_code_keeps_to_the_budget(arch, tmp_path):
    """Nothing spills, all that can be is moved 16 bytes at a time, and registers leave room for 1,024 threads."""
    if cuda_host.find_nvcc() is None:
        pytest.skip("needs nvcc")
    found = machine_code(arch, tmp_path)
    assert len(found) == 20
    budget = json.loads(BUDGET.read_text())[arch]
    for name, kernel in found.items():
        assert kernel["stack"] == kernel["local"] == 0, (name, kernel)
        assert kernel["registers"] <= budget[name]["registers"] + 4, (name, kernel)
        assert {key: kernel[key] for key in ("wide loads", "wide stores")} == {
            key: budget[name][key] for key in ("wide loads", "wide stores")
        }, (name, kernel)
        if "aligned" in name:
            # Two halves of a key and of a value, 16 bytes each for 16-bit numbers.
            stored = 8 if name.endswith("float32") else 4
            assert kernel["registers"] <= 80 and kernel["wide stores"] >= stored, (name, kernel)


if __name__ == "__main__":  # write the budget anew: python tests/test_cuda_kv.py
    with tempfile.TemporaryDirectory() as folder:
        measured = {arch: machine_code(arch, Path(folder)) for arch in ("sm_80", "sm_90")}
    BUDGET.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n")
