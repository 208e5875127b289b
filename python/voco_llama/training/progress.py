"""What a run says on a terminal: a bar, and a line per logging step."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback


class Lines(TrainerCallback):
    """Prints to standard error: in a terminal under a bar, elsewhere lines alone."""

    def __init__(self):
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        times = TimeElapsedColumn(), TimeRemainingColumn()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)

    def on_train_begin(self, args, state, control, **kwargs):
        """Show the bar."""
        if state.is_world_process_zero and not args.disable_tqdm:
            self.bar.start()
            self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        """Move it."""
        if self.bar.tasks:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print a line."""
        if state.is_world_process_zero and "loss" in logs:
            self.console.print(line(state.global_step, state.max_steps, logs))

    def close(self) -> None:
        """Take the bar away, which hides the terminal's cursor; of a run that fails, too, so this is no event of it."""
        self.bar.stop()


def line(step: int, steps: int, logs: dict[str, float]) -> str:
    """One step of a log in words."""
    parts = [f"step {step}/{steps}", f"loss {logs['loss']:.4f}"]
    parts += [f"{name} {logs[name]:.4f}" for name in ("sft", "kl") if name in logs]
    parts += [f"learning rate {logs['learning_rate']:.2e}"] if "learning_rate" in logs else []
    parts += [f"gradient {logs['grad_norm']:.2f}"] if "grad_norm" in logs else []
    if "tokens_per_second" in logs:
        parts += [f"{logs['tokens_per_second']:,.0f} tokens/s", f"{logs['images_per_second']:,.1f} images/s"]
    return "  ".join(parts)
