"""The build: its settings, the CUDA module, and wheels built and installed as a user does."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import voco_kernels
from voco_kernels.backends import cuda

ROOT = Path(__file__).parent.parent
NO_NVCC = {"CUDACXX": "/nonexistent/nvcc"}


def run(*command, cwd, **environment):
    # The wheel must be what is imported, not the source tree that a caller may have put on the path.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=inherited | environment, text=True, capture_output=True)


def succeed(*command, cwd, **environment):
    done = run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done


@pytest.fixture
def module():
    if reason := cuda.unavailable_reason():
        pytest.skip(reason)
    return cuda.load()


def test_module_is_of_this_version(module):
    assert module.version() == voco_kernels.__version__


def test_module_names_what_it_was_compiled_for(module):
    archs = module.compiled_archs()
    assert archs and all(re.fullmatch(r"(sm|compute)_\d+[af]?", arch) for arch in archs)
    assert module.cuda_runtime_version() >= 12000


def test_module_answers_without_a_driver(module):
    if module.driver_version() == 0:
        with pytest.raises(RuntimeError, match=r"CUDA device query: .*cudaErrorInsufficientDriver, code 35"):
            module.device_query()
    else:
        assert isinstance(module.device_query(), list)


@pytest.mark.gpu
def test_device_query_agrees_with_torch(module):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    devices = module.device_query()
    assert len(devices) == torch.cuda.device_count()
    for index, device in enumerate(devices):
        expected = torch.cuda.get_device_properties(index)
        assert device["name"] == expected.name
        assert device["compute_capability"] == (expected.major, expected.minor)
        assert device["total_memory"] == expected.total_memory
        assert device["sm_count"] == expected.multi_processor_count
        assert device["shared_memory_per_block_optin"] == expected.shared_memory_per_block_optin


class OtherVersion:
    @staticmethod
    def version():
        return "0.0.1"


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (ModuleNotFoundError("No module named 'voco_kernels._cuda'"), "built without nvcc"),
        (ImportError("undefined symbol: cuLaunch"), "does not load: undefined symbol: cuLaunch"),
        (OtherVersion, "built for version 0.0.1"),
    ],
)
def test_unavailable_reason(monkeypatch, outcome, reason):
    def import_module(name):
        assert name == "voco_kernels._cuda"
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    fresh = importlib.util.module_from_spec(cuda.__spec__)
    cuda.__spec__.loader.exec_module(fresh)
    monkeypatch.setattr(fresh, "import_module", import_module)
    assert reason in fresh.unavailable_reason()
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        fresh.load()


def test_invalid_setting_is_an_error():
    done = run(sys.executable, "setup.py", "--name", cwd=ROOT, VOCO_CUDA="bogus")
    assert done.returncode != 0
    assert "VOCO_CUDA must be auto, off or require, but was 'bogus'" in done.stderr


def build_wheel(folder: Path, **environment) -> tuple[Path, str]:
    """Build the wheel in isolation from a copy of the tree; returns it and the build's log."""
    skipped = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so")
    tree = shutil.copytree(ROOT, folder / "tree", ignore=skipped)
    # What an editable install of another Python leaves behind; no wheel may pick it up.
    (tree / "voco_kernels" / "_cuda.cpython-30-left-behind.so").touch()
    command = (sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(folder / "dist"), ".")
    done = succeed(*command, cwd=tree, **environment)
    [wheel] = (folder / "dist").iterdir()
    return wheel, done.stdout + done.stderr


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("pure"), VOCO_CUDA="auto", **NO_NVCC)


@pytest.fixture(scope="module")
def cuda_wheel(tmp_path_factory):
    if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        pytest.skip("needs nvcc")
    return build_wheel(tmp_path_factory.mktemp("cuda"), VOCO_CUDA="require")


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory):
    """A new environment that holds nothing but the library's dependencies, with the torch of this one."""
    folder = tmp_path_factory.mktemp("environment")
    succeed(sys.executable, "-m", "venv", str(folder), cwd=folder)
    python = str(folder / "bin" / "python")
    torch_version = torch.__version__.split("+")[0]
    succeed(python, "-m", "pip", "install", f"torch=={torch_version}", "numpy", "safetensors", cwd=folder)
    return python


def install(python: str, wheel: Path) -> None:
    succeed(python, "-m", "pip", "install", "--no-deps", "--force-reinstall", str(wheel), cwd=wheel.parent)
    succeed(python, "-m", "pip", "check", cwd=wheel.parent)


def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def source_files() -> set[str]:
    """What a wheel must hold of the packages: every Python file, data, and what training is started with."""
    files = set()
    for base, package in ((ROOT, "voco_kernels"), (ROOT / "python", "voco_llama")):
        for path in (base / package).rglob("*"):
            data = path.suffix in (".py", ".json", ".yaml", ".safetensors", ".png", ".txt", ".npz", ".jinja")
            if data or (path.is_file() and path.parent.name == "launch" and path.suffix == ".md"):
                files.add(str(path.relative_to(base)))
    return files


USE = """
import torch, voco_kernels as vk
layout = vk.VocoLayout.from_spans([[vk.Text(3), vk.Image(8, 2), vk.Text(5)]], isolated=True)
q = torch.randn(18, 2, 32)
out = vk.voco_attention(q, q, q, layout)
assert out.shape == q.shape and out.isfinite().all()
kv = vk.extract_kv([q], [q], torch.tensor([3, 4]))
caches = torch.zeros(2, 1, 4, 2, 32)
vk.inject_kv(kv, *caches, torch.tensor([2, 0]), torch.tensor([7, 8]), torch.ones(16))
assert torch.equal(caches[1, 0, 2], q[3])
"""
# A launch as the backend makes it, with addresses of the host: without a device the runtime answers before it looks at them.
LAUNCH = """
from voco_kernels.backends import cuda
module, no_strides = cuda.load(), (0, 0, 0, 1)
mover = module.KvMover(
    inject=True, device=-1, first_layer=0, k_caches=[4096], v_caches=[8192], cache_dtype=1, k_cache_strides=no_strides,
    v_cache_strides=no_strides, block_size=1, num_slots=1, slots=4096, wide_slots=True, positions=4096, wide_positions=True,
    inv_freq=4096, multiplier=1.0, tokens=1, heads=1, half=8,
)
mover.set_rows(1, 2, no_strides, no_strides, no_strides, no_strides)

def attention(kernel):
    return module.attention(
        kernel=kernel, device=-1, stream=0, dtype=1, head_dim=128, blocks=1, rows=[(4096, 256, 128)] * 8, lse=4096,
        delta=4096, plan=[4096] * 6, num_tiles=1, num_tokens=8, heads=2, group=1, scale=1.0,
    )

launches = [lambda: mover.launch(4096, 4096, 0, 0, 0)]
launches += [lambda kernel=kernel: attention(kernel) for kernel in ("forward", "hopper forward", "dq", "dkv")]
for launch in launches:
    try:
        launch()
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.full
def test_pure_wheel_holds_the_packages_and_nothing_else(pure_wheel):
    wheel, log = pure_wheel
    version = voco_kernels.__version__
    assert wheel.name == f"voco_kernels-{version}-py3-none-any.whl"
    assert {name for name in contents(wheel) if ".dist-info/" not in name} == source_files()
    assert log.count("voco-kernels: no CUDA module (no nvcc") == 1


@pytest.mark.full
def test_pure_wheel_works_and_gives_the_reason(pure_wheel, clean_python, tmp_path):
    install(clean_python, pure_wheel[0])
    code = USE + "from voco_kernels.backends import cuda; print(cuda.unavailable_reason())"
    assert "built without nvcc" in succeed(clean_python, "-c", code, cwd=tmp_path).stdout


@pytest.mark.full
def test_cuda_wheel_adds_one_module_that_needs_only_glibc(cuda_wheel, tmp_path):
    assert cuda_wheel[0].stat().st_size < 60e6
    [module] = {name for name in contents(cuda_wheel[0]) if ".dist-info/" not in name} - source_files()
    assert re.fullmatch(r"voco_kernels/_cuda\.cpython-\w+-[\w-]+\.so", module)
    with zipfile.ZipFile(cuda_wheel[0]) as archive:
        archive.extract(module, tmp_path)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", succeed("readelf", "-d", module, cwd=tmp_path).stdout)
    assert needed and all(re.match(r"(libc|libm|libdl|librt|libpthread|ld-linux[\w-]*)\.so", name) for name in needed)


@pytest.mark.full
def test_cuda_wheel_works_and_its_module_answers(cuda_wheel, clean_python, tmp_path):
    install(clean_python, cuda_wheel[0])
    code = USE + "from voco_kernels.backends import cuda; print(vk.__version__, cuda.load().version())"
    assert succeed(clean_python, "-c", code, cwd=tmp_path).stdout.split() == [voco_kernels.__version__] * 2


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_wheel_launches_and_gives_the_reason_of_the_runtime(cuda_wheel, clean_python, tmp_path):
    install(clean_python, cuda_wheel[0])
    said = succeed(clean_python, "-c", LAUNCH, cwd=tmp_path).stdout
    kernels = re.findall(r"^(.*) kernel: .*cudaError(?:InsufficientDriver|NoDevice)", said, re.MULTILINE)
    assert kernels == ["K/V", *["attention"] * 4], said


@pytest.mark.full
def test_cuda_wheel_shows_nothing_but_its_entry(cuda_wheel, tmp_path):
    with zipfile.ZipFile(cuda_wheel[0]) as archive:
        [module] = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extract(module, tmp_path)
    symbols = succeed("nm", "-D", "--defined-only", module, cwd=tmp_path).stdout.splitlines()
    assert [line.split()[-1] for line in symbols] == ["PyInit__cuda"]


@pytest.mark.full
def test_required_nvcc_is_asked_for_only_by_the_build(tmp_path):
    with pytest.raises(AssertionError, match="VOCO_CUDA=require needs nvcc"):
        build_wheel(tmp_path, VOCO_CUDA="require", **NO_NVCC)
    succeed(sys.executable, "setup.py", "--version", cwd=ROOT, VOCO_CUDA="require", **NO_NVCC)
