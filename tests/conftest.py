"""Every test is repeatable: one thread, one seed, and hypothesis examples that are the same in every run."""

import importlib.util

import pytest
import torch
from hypothesis import HealthCheck, settings

import voco_kernels.backends.torch as torch_backend
from bench.verified import report_lines

# Without a GPU, kernels are interpreted; Triton decides at its import. With one, the same tests run there.
if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    import triton_interpreter

    triton_interpreter.install()

torch.set_num_threads(1)
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=40,
    # Fixtures that tests use with hypothesis hold nothing that an example changes.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture
def row_chunks(monkeypatch):
    """A function that makes the torch backend cut rows into small chunks, so that short runs have inner edges."""

    def cut(rows: int, long_run: int) -> None:
        for name, value in (("ROW_CHUNK", rows), ("CPU_ROW_CHUNK", rows), ("LONG_RUN", long_run)):
            monkeypatch.setattr(torch_backend, name, value)

    return cut


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("kernels on a GPU")
    for line in report_lines():
        terminalreporter.write_line(line)
