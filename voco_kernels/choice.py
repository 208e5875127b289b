"""Which backend "auto" takes for attention on a GPU: triton, or cuda where a committed result file shows it ahead.

The table is `measured.json`, which `python -m bench.choose` writes from results; nothing else decides.
"""

import json
from functools import cache
from importlib.resources import files

import torch

FORMAT_VERSION = 1
FORWARD, BOTH = "forward", "forward + backward"


@cache
def measured() -> dict[tuple[str, int, str, str], dict]:
    """{(family such as "sm_90", head_dim, dtype, task): {"ahead": triton's time over cuda's, at least, "results": file}}."""
    content = json.loads((files(__package__) / "measured.json").read_text(encoding="utf-8"))
    if content["format_version"] != FORMAT_VERSION:
        raise RuntimeError(f"measured.json must have format_version {FORMAT_VERSION}, but has {content['format_version']}")
    return {(e["family"], e["head_dim"], e["dtype"], e["task"]): e for e in content["entries"]}


def prefers_cuda(q: torch.Tensor, *, backward: bool) -> bool:
    """Whether cuda was measured to be ahead of triton for such queries on their GPU, with or without the gradients."""
    if not measured():
        return False
    major, minor = torch.cuda.get_device_capability(q.device)
    task = BOTH if backward else FORWARD
    return (f"sm_{major}{minor}", q.shape[2], str(q.dtype).removeprefix("torch."), task) in measured()


def in_words() -> str:
    """One line: what "auto" takes on GPUs, and why."""
    rows = [
        f"cuda for {task}, head_dim {head_dim}, {dtype} on {family} ({entry['ahead']:.2f} times as fast: {entry['results']})"
        for (family, head_dim, dtype, task), entry in sorted(measured().items())
    ]
    return "; ".join([*rows, "triton for all else"]) if rows else "triton; no results of a GPU show cuda ahead of it"
