"""The CUDA attention kernels under sanitizers on the host, how much they compute, and their machine code.

What they compute is in tests/test_cuda_attention.py.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import cuda_host
import numpy as np
import pytest
import torch
from fake_cuda import cuobjdump
from hypothesis import given
from hypothesis import strategies as st
from reference import mask_of_layout
from strategies import attention_layouts
from test_attention import LAYOUTS, inputs, spans

from voco_kernels import Image, Text, VocoLayout
from voco_kernels.backends.cuda import attention as backend
from voco_kernels.tiles import Geometry, TilePlan, build_tiles, useful_pairs

HERE = Path(__file__).resolve().parent
BUDGET = HERE / "cuda_attention_budget.json"
LONG = [Text(70), Image(130, 70), Text(90), Image(150, 3), Text(140)]


# ---- how much is computed ----------------------------------------------------------------------------------------------


def computed_by_stepping(plan: TilePlan, which: str, warp_rows: int) -> int:
    """Pairs, by going through each warp's steps as the kernels do."""
    pairs, never = 0, 2**31 - 1

    def step(index, begin, end, size):
        tokens = [int(index[i]) if index is not None else i for i in range(begin, min(begin + size, end))]
        return tokens + [never] * (size - len(tokens))

    if which == "dkv":
        for begin, count, *bounds in plan.key_tiles.tolist():
            own, late, readers = (None, *bounds[:3:2]), (plan.late_index, *bounds[3:5]), (plan.reader_index, *bounds[5::2])
            keys = [int(plan.key_index[begin + min(i, count - 1)]) for i in range(64)]
            after = [int(plan.after[key]) for key in keys]
            for first in range(0, count, 16):
                for kind, (index, low, high) in enumerate((own, late, readers)):
                    for at in range(low, high, 16):
                        rows = step(index, at, high, 16)
                        sees = rows[-1] >= (after if kind == 2 else keys)[first]
                        pairs += 256 * (sees and rows[0] < (after[first + 15] if kind == 1 else never))
        return pairs
    for begin, count, public, _, public_end, own, _, own_end in plan.row_tiles.tolist():
        for first in range(0, count, warp_rows):
            used = min(count - first, warp_rows)
            last = int(plan.row_index[begin + first + used - 1])
            for index, low, high in ((plan.key_index, public, public_end), (None, own, own_end)):
                seen = sum(step(index, at, high, 32)[0] <= last for at in range(low, high, 32))
                pairs += 32 * seen * -(-used // 16) * 16
    return pairs


@pytest.mark.parametrize("which", ["forward", "dq", "dkv"])
@pytest.mark.parametrize("isolated", [False, True], ids=["seeing", "isolated"])
@given(data=st.data())
def test_computed_pairs(which, isolated, data):
    layouts = st.one_of(attention_layouts(isolated), st.sampled_from([spans(LONG, isolated=isolated), LAYOUTS["padding"]]))
    layout = data.draw(layouts, "layout")
    found = backend.computed_pairs(layout, 128, which)
    assert found == computed_by_stepping(build_tiles(layout, backend.GEOMETRY), which, 32 if which == "forward" else 16)
    assert found >= useful_pairs(layout) and (not found or 0 < layout.tile_efficiency(128, "cuda", which=which) <= 1)


def test_less_is_computed_than_tiles_have():
    """Warps without rows, and without keys to see, do nothing."""
    layout = spans(*[[Image(256, 2)]] * 4, isolated=True)
    assert layout.tile_efficiency(128, "cuda") > 0.8 > 0.74 > layout.tile_efficiency(128, "triton")
    with pytest.raises(ValueError, match=r"^head_dim must be one of 64, 96, 128, 256, but was 80$"):
        layout.tile_efficiency(80, "cuda")


# ---- under sanitizers --------------------------------------------------------------------------------------------------

# Every kind of tile and step, in few tokens.
SMALL = spans([Text(5), Image(34, 3), Text(20), Image(14, 2), Text(3)], [Image(66, 2), Text(9)], isolated=False)


def problem_file(layout: VocoLayout, folder: Path, head_dim: int, geometry: Geometry, heads: tuple[int, int]) -> Path:
    """A problem as tests/cuda/attention_cases.cpp reads it."""
    plan, n = build_tiles(layout, geometry), layout.num_tokens
    sizes = [n, heads[0], heads[0] // heads[1], len(plan.row_tiles), len(plan.key_tiles)]
    lists = (plan.row_tiles, plan.key_tiles, plan.row_index, plan.key_index, plan.reader_index, plan.late_index, plan.after)
    parts = [np.array(sizes, np.int32), *(x.numpy() for x in lists), mask_of_layout(layout).astype(np.int32)]
    parts += [x.float().numpy() for x in inputs(layout, torch.bfloat16, heads, head_dim)]
    path = folder / "problem"
    path.write_bytes(b"".join(part.tobytes() for part in parts))
    return path


def sanitized(
    kind: str, head_dim: int, folder: Path, wrong: str = "", *, lazy=True, hopper=False, layout=SMALL, heads=(2, 1)
) -> str:
    """What a build of that kind prints; of Hopper's kernels, or of all others."""
    if reason := cuda_host.missing(kind):
        pytest.skip(reason)
    sources = [HERE / "cuda" / "attention_cases.cpp", *([cuda_host.CSRC / "tensor_map.cu"] if hopper else [])]
    flags = ["-DVOCO_T=__nv_bfloat16", f"-DVOCO_D={head_dim}", *(["-DVOCO_HOPPER"] if hopper else [])]
    executable = cuda_host.build("attention_cases", sources, kind, extra_flags=flags)
    geometry = backend.HOPPER_GEOMETRY if hopper else backend.GEOMETRY
    arguments = [problem_file(layout, folder, head_dim, geometry, heads), *([wrong] if wrong else [])]
    return cuda_host.run(executable, arguments, lazy=lazy)


# A plain build finds nothing that these do not; without them it is what there is.
KINDS = ["asan", "tsan", pytest.param("plain", marks=pytest.mark.full)]
ALL_HEAD_DIMS = [64, *(pytest.param(head_dim, marks=pytest.mark.full) for head_dim in (96, 128, 256))]


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", ALL_HEAD_DIMS)
def test_sanitizers_find_nothing(kind, head_dim, lazy, tmp_path):
    assert sanitized(kind, head_dim, tmp_path, lazy=lazy) == "0 failures\nbank conflicts: 0\n"


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=pytest.mark.full)])
def test_sanitizers_find_nothing_on_hopper(kind, head_dim, lazy, tmp_path):
    assert sanitized(kind, head_dim, tmp_path, lazy=lazy, hopper=True) == "0 failures\nbank conflicts: 0\n"


@pytest.mark.full
def test_stages_are_used_again_within_a_tile_on_hopper(tmp_path):
    """A stage that is given back before its products are done is a race; fewer steps would not show it."""
    layout = spans([Image(510, 2)], isolated=True)
    found = sanitized("tsan", 64, tmp_path, hopper=True, layout=layout, heads=(1, 1))
    assert found == "0 failures\nbank conflicts: 0\n"


@pytest.mark.parametrize("hopper", [False, True], ids=["sm_80", "hopper"])
def test_the_values_are_looked_at(hopper, tmp_path):
    assert "0 failures" not in sanitized("asan", 64, tmp_path, "values", hopper=hopper)


def test_an_access_out_of_bounds_is_seen(tmp_path):
    with pytest.raises(cuda_host.HostError, match="heap-buffer-overflow"):
        sanitized("asan", 64, tmp_path, "short")


def test_a_race_is_seen(tmp_path):
    with pytest.raises(cuda_host.HostError, match="data race"):
        sanitized("tsan", 64, tmp_path, "twice")


# ---- machine code ------------------------------------------------------------------------------------------------------

KERNELS = {"forward": "forward", "query_gradient": "backward", "key_gradient": "backward"}
HOPPER_KERNELS = {
    "hopper_forward": "hopper_forward",
    "hopper_query_gradient": "hopper_backward",
    "hopper_key_gradient": "hopper_backward",
}
SYMBOL = re.compile(rf"\d({'|'.join([*KERNELS, *HOPPER_KERNELS])})_kernelI\d+(__half|__nv_bfloat16)Li(\d+)E")
COUNTED, HOPPER_COUNTED = ("HMMA", "LDSM", "LDGSTS"), ("HGMMA", "UTMALDG", "SYNCS", "LDGSTS")


def machine_code(arch: str, instances: list[tuple[str, str, int]], folder: Path) -> dict[str, dict[str, int]]:
    """Registers, local memory and some instructions of each (kernel, type, head_dim)."""
    source, cubin, on_hopper = folder / "instances.cu", folder / "instances.cubin", arch == "sm_90a"
    kernels, counted = (HOPPER_KERNELS, HOPPER_COUNTED) if on_hopper else (KERNELS, COUNTED)
    lines = [f'#include "voco/attention_{file}.cuh"' for file in sorted(set(kernels.values()))]
    for kernel, element, head_dim in instances:
        name = f"voco::attention::{kernel}_kernel<{element}, {head_dim}>"
        parameter = f"const __grid_constant__ voco::attention::{'HopperArguments' if on_hopper else 'Arguments'}"
        lines.append(f"template __global__ void {name}({parameter});")
    source.write_text("\n".join(lines))
    target = ["-gencode", f"arch=compute_{arch[3:]},code={arch}"]
    command = [cuda_host.find_nvcc(), "-std=c++17", "-cubin", *target, "-I", cuda_host.CSRC / "include"]
    command += [source, "-o", cubin]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert "C75" not in done.stdout, done.stdout  # products that wait for each other
    dump = [cuobjdump(), "--dump-resource-usage", "--dump-sass", cubin]
    text = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    usage = {name: (int(r), int(s)) for name, r, s in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", text)}
    found = {}
    for symbol, code in re.findall(r"Function : (\w+)(.*?)(?=Function :|\Z)", text, re.DOTALL):
        kernel, element, head_dim = SYMBOL.search(symbol).groups()
        opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z]+)", code, re.MULTILINE))
        numbers = {"registers": usage[symbol][0], "stack": usage[symbol][1], "local": opcodes["LDL"] + opcodes["STL"]}
        found[f"{kernel} {element} {head_dim}"] = numbers | {name: opcodes[name] for name in counted}
    return found


def all_instances(elements=("__half", "__nv_bfloat16"), head_dims=backend.HEAD_DIMS, kernels=KERNELS):
    return [(kernel, element, head_dim) for kernel in kernels for element in elements for head_dim in head_dims]


ON_HOPPER = {"head_dims": backend.HOPPER_HEAD_DIMS, "kernels": HOPPER_KERNELS}


@pytest.mark.parametrize(
    ("arch", "instances"),
    [
        ("sm_80", all_instances(["__nv_bfloat16"], [128])),
        pytest.param("sm_80", all_instances(), marks=pytest.mark.full),
        pytest.param("sm_90", all_instances(), marks=pytest.mark.full),
        ("sm_90a", all_instances(["__nv_bfloat16"], [128], HOPPER_KERNELS)),
        pytest.param("sm_90a", all_instances(**ON_HOPPER), marks=pytest.mark.full),
    ],
    ids=["sm_80 brief", "sm_80", "sm_90", "sm_90a brief", "sm_90a"],
)
def test_machine_code_keeps_to_the_budget(arch, instances, tmp_path):
    """Nothing spills, products are on tensor cores, and what they take comes by asynchronous copies and ldmatrix, or TMA."""
    counted = HOPPER_COUNTED if arch == "sm_90a" else COUNTED
    if cuda_host.find_nvcc() is None:
        pytest.skip("needs nvcc")
    found, budget = machine_code(arch, instances, tmp_path), json.loads(BUDGET.read_text())[arch]
    assert len(found) == len(instances)
    for name, kernel in found.items():
        assert kernel["stack"] == kernel["local"] == 0, (name, kernel)
        # On Hopper they are what warpgroups give up and get: with fewer, those who ask for more would wait for ever.
        most = 168 if arch == "sm_90a" else min(255, budget[name]["registers"] + 8)
        assert kernel["registers"] <= most and (kernel["registers"] == most or arch != "sm_90a"), (name, kernel)
        assert {key: kernel[key] for key in counted} == {key: budget[name][key] for key in counted}, (name, kernel)
        assert all(kernel[key] for key in counted), (name, kernel)


if __name__ == "__main__":  # write the budget anew: python tests/test_cuda_attention_host.py
    with tempfile.TemporaryDirectory() as folder:
        measured = {arch: machine_code(arch, all_instances(), Path(folder)) for arch in ("sm_80", "sm_90")}
        measured["sm_90a"] = machine_code("sm_90a", all_instances(**ON_HOPPER), Path(folder))
    BUDGET.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n")
