"""A training step of 7B-shaped decoder layers (a small shape on a CPU) over one pool of samples, by every recipe."""

import pytest
from voco_llama.bench.clock import release

from bench.training_problem import Problem, trained_on

TASKS = {"training step": False, "training step, checkpointed": True}


@pytest.fixture(scope="module")
def problem_of(device):
    """A function that makes the problem at its first call; results that are there already need none."""
    made = []

    def get() -> Problem:
        if not made:
            made.append(Problem(device))
        return made[0]

    yield get
    made.clear()
    release(device)


@pytest.mark.parametrize("task", TASKS)
def test_step(measure, problem_of, device, task):
    shape, dtype = trained_on(device)

    def made():
        return problem_of().candidates(TASKS[task])

    measure(task, shape.name, made, work=lambda: problem_of().work, dtype=dtype)
