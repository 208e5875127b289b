"""Which backends there are, what an import brings along, and which way imports point."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import voco_kernels
from voco_kernels import backend_status, backends

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "voco_kernels"


# ---- imports -----------------------------------------------------------------------------------------------------------


def modules_after(code: str) -> set[str]:
    """The modules that a fresh Python has after running `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


HEAVY = {"triton", "transformers", "matplotlib", "torch._dynamo", "torch._inductor", "flash_attn", "voco_llama"}
USE = """
import torch, voco_kernels as vk
layout = vk.VocoLayout.from_spans([[vk.Image(3, 1), vk.Text(2)]], isolated=True)
q = torch.randn(6, 2, 32, requires_grad=True)
vk.voco_attention(q, q, q, layout, return_lse=True)[0].sum().backward()
kv = vk.extract_kv(torch.randn(1, 6, 2, 32), torch.randn(1, 6, 2, 32), torch.tensor([3]))
vk.inject_kv(kv, torch.zeros(1, 4, 2, 32), torch.zeros(1, 4, 2, 32), torch.tensor([0]), torch.tensor([5]), torch.rand(16))
"""
LIST = "import voco_kernels as vk; assert [row.name for row in vk.backend_status()]"


@pytest.fixture(scope="module")
def heavy():
    """What torch itself imports is not ours to decide."""
    return HEAVY - modules_after("import torch")


def test_import_is_light(heavy):
    assert {"triton", "transformers", "matplotlib"} <= heavy
    ours = modules_after("import voco_kernels")
    assert not heavy & ours
    assert "voco_kernels._cuda" not in ours
    assert not {name for name in ours if name.startswith("voco_kernels.backends.") or "integrations" in name}


def test_use_is_light(heavy):
    """Attention and the K/V path on a CPU need none of them either; the list of backends only asks the compiled module."""
    ours = modules_after(USE)
    assert not heavy & ours
    assert "voco_kernels._cuda" not in ours
    assert not heavy & modules_after(LIST)


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, absolute, wherever in the file the import stands."""
    package = [*path.relative_to(ROOT).with_suffix("").parts][:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *([node.module] if node.module else [])]
            names |= {".".join([*module, alias.name]) for alias in node.names} | {".".join(module)}
    return names


SOURCES = sorted(LIBRARY.rglob("*.py"))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_the_checks_below_read_imports():
    found = imports_of(LIBRARY / "backends" / "torch.py")
    assert {"torch", "voco_kernels.plan", "voco_kernels.layout.VocoLayout"} <= found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    """voco_llama -> public API -> layout and plan -> backends, which do not know each other; nothing heavy at the root."""
    names = imports_of(path)
    assert not {name for name in names if within(name, "voco_llama")}
    if path.parent.name != "integrations":
        assert not {name for name in names if within(name, "voco_kernels.integrations")}
        assert not {name for name in names if within(name, "transformers")}
    place = path.relative_to(LIBRARY).parts
    if place[0] == "backends" and place[1] != "__init__.py":
        own = f"voco_kernels.backends.{place[1].removesuffix('.py')}"
        other = {name for name in names if within(name, "voco_kernels.backends") and not within(name, own)}
        assert not other, f"a backend imports {other}"
        public = {f"voco_kernels.{name}" for name in ("attention", "ops", "kv_cache", "kv_file", "draw")}
        assert not {name for name in names for module in public if within(name, module)}
    if path.parent == LIBRARY and path.name in ("layout.py", "plan.py", "tiles.py", "errors.py"):
        assert not {name for name in names if within(name, "voco_kernels.backends")}


@pytest.mark.parametrize("path", sorted((ROOT / "python").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_model_uses_public_names_only(path):
    allowed = {"voco_kernels", *(f"voco_kernels.{name}" for name in voco_kernels.__all__)}
    used = {name for name in imports_of(path) if within(name, "voco_kernels")}
    assert {name for name in used if name not in allowed and not within(name, "voco_kernels.integrations")} == set()


# ---- the list of backends ----------------------------------------------------------------------------------------------


def test_every_backend_of_the_contract_has_a_row():
    rows = {row.name: row for row in backend_status()}
    assert set(rows) == {"reference", "torch", "flash", "triton", "cuda"}
    assert rows["torch"].serves == ("attention", "kv", "decode") and rows["torch"].reason is None
    assert rows["reference"].serves == ("attention",) and rows["reference"].reason is None
    assert rows["flash"].serves == ("attention",)
    assert rows["triton"].serves == ("attention", "kv")
    assert rows["cuda"].serves == ("attention", "kv", "decode")


@pytest.mark.parametrize("table", backends.TABLES.values(), ids=backends.TABLES)
def test_unknown_backends_are_named(table):
    with pytest.raises(ValueError, match=r"^backend must be one of auto, .*torch.*, but was 'fast'$"):
        backends.load(table, "fast")


def test_a_backend_of_attention_does_not_serve_the_kv_path():
    with pytest.raises(ValueError, match=r"but was 'flash': it serves attention only$"):
        backends.load(backends.KV, "flash")


def test_a_backend_that_the_machine_cannot_run_gives_its_reason(monkeypatch):
    """Asked for by name, it never falls back to another one."""
    module = backends.load(backends.ATTENTION, "torch")
    monkeypatch.setattr(module, "unavailable_reason", lambda: "the machine is off")
    q = torch.randn(3, 1, 8)
    layout = voco_kernels.VocoLayout.from_spans([[voco_kernels.Text(3)]], isolated=True)
    with pytest.raises(ValueError, match="backend 'torch' cannot be used here: the machine is off"):
        voco_kernels.voco_attention(q, q, q, layout, backend="torch")
    assert {row.name: row.reason for row in backend_status()}["torch"] == "the machine is off"


def test_a_backend_that_cannot_serve_a_call_gives_its_reason(monkeypatch):
    module = backends.load(backends.ATTENTION, "reference")
    monkeypatch.setattr(module, "unsupported_reason", lambda q, layout: f"head_dim {q.shape[-1]} is odd")
    q = torch.randn(3, 1, 7)
    layout = voco_kernels.VocoLayout.from_spans([[voco_kernels.Text(3)]], isolated=True)
    with pytest.raises(ValueError, match=re.escape("backend 'reference' cannot serve this call: head_dim 7 is odd")):
        voco_kernels.voco_attention(q, q, q, layout, backend="reference")


def test_public_names_exist_and_are_documented():
    for name in voco_kernels.__all__:
        value = getattr(voco_kernels, name)
        assert name.startswith("__") or value.__doc__, name
