"""The log of a run: a line of JSON per logging step, and the loss curve as a picture."""

import io
import json
from pathlib import Path

from transformers import TrainerCallback

from voco_llama.bench.files import write_atomically

LOG = "log.jsonl"
CURVE = "loss.png"
# The smoothed curve is the mean of this share of all logged values to either side of each.
SHARE = 1 / 40


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
    """The mean of each value and as many to its left as to its right: `SHARE` of all, fewer at the ends.

    One of values before it alone would lie above a loss that falls.
    """
    last, widest = len(losses) - 1, int(SHARE * len(losses))
    halves = (min(i, last - i, widest) for i in range(len(losses)))
    return [sum(losses[i - half : i + half + 1]) / (2 * half + 1) for i, half in enumerate(halves)]


def draw(losses: list[tuple[int, float]], path: Path) -> None:
    """A PNG of the loss by step, as it is and smoothed, put in place at once."""
    from matplotlib.figure import Figure

    steps, values = [step for step, _ in losses], [loss for _, loss in losses]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, values, color="0.75", linewidth=1, label="logged")
    axes.plot(steps, smoothed(values), color="tab:blue", linewidth=1.5, label="smoothed")
    axes.set(xlabel="step", ylabel="loss per answer token")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())
