"""Two-stage inference as `compress` and `generate` have it: stage 1, and answers of a few tokens in all ways to give them.

These are eager calls. On a GPU Python takes most of their time; suite "table7" measures what graphs leave.
"""

import pytest
from voco_llama.bench.measure import OURS, PART, Candidate

from bench.end_to_end import Problem, candidates

IMAGES = (1, 32)
NEW_TOKENS = 16


@pytest.mark.parametrize("images", IMAGES)
def test_compress(measure, device, images):
    def made():
        problem = Problem(images, device)
        return [
            Candidate("voco", problem.compress, problem.check_compressed, role=OURS),
            Candidate("forward, then a loop over layers", problem.compress_by_loop, problem.check_compressed),
            Candidate("the vision tower alone", problem.look, role=PART),
        ]

    measure("stage 1", name_of(images), made)


@pytest.mark.parametrize("images", IMAGES)
def test_answer(measure, device, images):
    measure(f"answer of {NEW_TOKENS} tokens", name_of(images), lambda: candidates(Problem(images, device, NEW_TOKENS)))


def name_of(images: int) -> str:
    return f"{images} image{'s' * (images > 1)}"
