"""The log of a run: a line of JSON per logging step, and the loss curve as a picture."""

import io
import json
from pathlib import Path

from transformers import TrainerCallback

from voco_llama.bench.files import write_atomically

LOG = "log.jsonl"
CURVE = "loss.png"
# Steps of the log that the smoothed curve remembers, roughly.
MEMORY = 20


class LogFiles(TrainerCallback):
    """Keeps `log.jsonl` and `loss.png` of a run up to date.

    A run that goes on from a checkpoint has the log of that checkpoint, so the files show one run without a break.
    """

    def __init__(self, out: Path):
        self.out = out

    def on_train_begin(self, args, state, control, **kwargs):
        """Write what is known; a killed run may have logged more than its last checkpoint knows."""
        if state.is_world_process_zero:
            lines = "".join(json.dumps(entry) + "\n" for entry in state.log_history)
            write_atomically(self.out / LOG, lines.encode())

    def on_log(self, args, state, control, **kwargs):
        """Append a line."""
        if state.is_world_process_zero:
            with (self.out / LOG).open("a") as log:
                log.write(json.dumps(state.log_history[-1]) + "\n")

    def on_save(self, args, state, control, **kwargs):
        """Draw the curve."""
        if state.is_world_process_zero:
            draw(losses_of(state.log_history), self.out / CURVE)

    def on_train_end(self, args, state, control, **kwargs):
        """Draw it for the last time."""
        self.on_save(args, state, control)


def losses_of(log: list[dict]) -> list[tuple[int, float]]:
    """(step, loss) of a log."""
    return [(entry["step"], float(entry["loss"])) for entry in log if "loss" in entry]


def smoothed(losses: list[float]) -> list[float]:
    """Exponential average of about the last `MEMORY` values; at the beginning, of those there are."""
    result, total, weight, keep = [], 0.0, 0.0, 1 - 1 / MEMORY
    for loss in losses:
        total, weight = keep * total + loss, keep * weight + 1
        result.append(total / weight)
    return result


def draw(losses: list[tuple[int, float]], path: Path) -> None:
    """A PNG of the loss by step, as it is and smoothed, put in place at once."""
    from matplotlib.figure import Figure

    steps, values = [step for step, _ in losses], [loss for _, loss in losses]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, values, color="0.75", linewidth=1, label="logged")
    axes.plot(steps, smoothed(values), color="tab:blue", linewidth=1.5, label=f"mean of about {MEMORY} values")
    axes.set(xlabel="step", ylabel="loss per answer token")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())
