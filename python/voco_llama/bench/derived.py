"""What follows from a row's time and its facts: rates of training steps, and the peaks that they are measured by."""

import torch

# Dense bfloat16 with float32 accumulation, in FLOP/s, from NVIDIA's data sheets, under the names that the driver gives. The
# other variants of Hopper (PCIe, NVL) and slices of a GPU (MIG) are slower, and unknown here on purpose.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
RATE_FACTS = {"useful_tokens", "model_flops", "peak_flops"}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of dense matmuls that a device is sold with; None for a CPU, an unknown GPU or a dtype other than bfloat16."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device))


def derived(row: dict) -> dict:
    """Rates of a row of a file of results.

    Args:
        row: a JSON row; `facts` of a training step hold useful_tokens (a run's tokens, without padding), model_flops (FLOPs
            that a run needs, without recomputation) and peak_flops (FLOP/s, or None).

    Returns:
        tokens_per_s: useful tokens per second at the median; mfu: model FLOPs per second as a share of the peak (0 to 1),
        None without a peak. Both are None for a row that was not timed. Empty for a row that is no training step.
    """
    facts = row["facts"]
    if not facts.keys() >= RATE_FACTS:
        return {}
    if row["p50_ms"] is None:
        return {"tokens_per_s": None, "mfu": None}
    seconds, peak = row["p50_ms"] / 1e3, facts["peak_flops"]
    mfu = None if peak is None else round(facts["model_flops"] / seconds / peak, 4)
    return {"tokens_per_s": round(facts["useful_tokens"] / seconds, 1), "mfu": mfu}
