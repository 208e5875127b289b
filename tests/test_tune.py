"""The tuner of launch parameters: candidates, what it leaves out, and that it leaves the tables as they are."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import tune_triton
from bench.shapes import AttentionShape
from voco_kernels import Image, Text
from voco_kernels.backends.triton import launch
from voco_kernels.backends.triton.launch import Launch

ROOT = Path(__file__).parent.parent
SHAPE = AttentionShape("tiny", "a test", ((Image(6, 2), Text(4)),), isolated=True, heads=1, kv_heads=1)
KEY = (80, 32, "half")

pytest.importorskip("triton")


def test_the_shipped_parameters_come_first_and_none_twice():
    shipped = Launch(64, 32, 4, 2)
    found = list(tune_triton.candidates(shipped))
    assert found[0] == shipped and len(set(found)) == len(found) > 50
    assert all(c.edge_step <= c.step for c in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted on a machine with a GPU")
@pytest.mark.parametrize("kernel", ["forward", "dkv"])
def test_tuning_measures_and_restores(kernel, monkeypatch, capsys):
    before = dict(launch.TABLES[kernel])
    others = [before[KEY], Launch(16, 16, 4, 2), Launch(16, 16, 8, 2)]
    monkeypatch.setattr(tune_triton, "candidates", lambda shipped: iter(others))
    seconds = iter([2e-3, 1e-3])

    def time(run):
        run()
        if (took := next(seconds, None)) is None:
            raise RuntimeError("out of shared memory")
        return took

    problem = tune_triton.Problem(SHAPE, 32, torch.float16, torch.device("cpu"), launch.GEOMETRY)
    best = tune_triton.tune(kernel, [problem], 32, torch.float16, time, float("inf"))
    assert [parameters for _, parameters in best] == [others[1], others[0]]
    assert [score for score, _ in best] == pytest.approx([1.0, 2.0])
    assert launch.TABLES[kernel] == before
    assert "out of shared memory" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted on a machine with a GPU")
def test_wrong_results_are_not_timed():
    problem = tune_triton.Problem(SHAPE, 32, torch.float16, torch.device("cpu"), launch.GEOMETRY)
    out, lse = problem.run("forward")
    assert tune_triton.measured([problem], "forward", [(out + 1, lse)], lambda run: 1.0) == "wrong"
    assert tune_triton.measured([problem], "forward", [(out, lse)], lambda run: 1.0) == pytest.approx(1e3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    done = subprocess.run([sys.executable, "-m", "bench.tune_triton"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip() == "tune_triton needs an NVIDIA GPU, and there is none"
