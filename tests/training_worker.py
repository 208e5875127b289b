"""What one process of a training of several does: `torchrun tests/training_worker.py JOBS.json`.

JOBS.json holds {"runs": [...]} or {"shards": {...}} (see `run` and `shards`). Each process leaves JSON beside it.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import models
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from voco_llama import VocoCollator, VocoLlavaForConditionalGeneration
from voco_llama.training import LoraConfig, ObjectiveConfig, TrainingConfig, objectives, train
from voco_llama.training import models as training_models
from voco_llama.training.dataset import ConversationDataset
from voco_llama.training.trainer import VocoTrainer


class Records(Sequence):
    """Conversations about an image each, but for those of text alone, which writes down which ones are asked for."""

    def __init__(self, count: int, text_only: Sequence[int] = ()):
        self.count, self.text_only, self.asked = count, set(text_only), []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict:
        self.asked.append(i)
        answer = f"a {chr(97 + i) * (i % 4 + 1)} thing"
        turns = [{"from": "human", "value": f"what is {i}"}, {"from": "gpt", "value": answer}]
        if i in self.text_only:
            return {"conversations": turns}
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        return {"image": models.picture(i), "conversations": turns}


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


def configured(model: str, out: str, trainer: dict, objective: dict | None = None, lora: dict | None = None, **options):
    """A TrainingConfig of what JSON can hold."""
    settings = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        # Adam divides gradients by their size: where a gradient is 0 but for rounding, that is all that is left.
        "adam_epsilon": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        **trainer,
    }
    options = {"num_voco_tokens": [1, 2, 4], **options}
    return TrainingConfig(
        model=model,
        out=Path(out),
        trainer=settings,
        objective=ObjectiveConfig(**objective or {}),
        lora=None if lora is None else LoraConfig(**lora),
        **{**options, "num_voco_tokens": tuple(options["num_voco_tokens"])},
    )


def run(records: dict, stop_at: int | None = None, **settings) -> dict:
    """One training run: its losses, the records it asked for, and the error that it ended with.

    Args:
        records: arguments of `Records`.
        stop_at: the step within which the run is stopped as by a signal.
        settings: arguments of `configured`.
    """
    data, original = Records(**records), VocoTrainer.training_step

    def training_step(self, *args):
        if stop_at is not None and self.state.global_step >= stop_at:
            raise Killed
        return original(self, *args)

    VocoTrainer.training_step = training_step
    try:
        losses, error = train(configured(**settings), data).losses, None
    except Killed:
        losses, error = [], "killed"
    except (RuntimeError, ValueError) as problem:
        losses, error = [], f"{type(problem).__name__}: {problem}"
    finally:
        VocoTrainer.training_step = original
    return {"losses": losses, "asked": data.asked, "error": error}


def shards(model: str, out: str, steps: int) -> dict:
    """Training under plain `fully_shard`, beside training of the whole model: losses, and how far gradients are apart.

    The weights are saved to `out` by torch.distributed.checkpoint, and whole in `out`.pt.
    """
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    rank, processes = mesh.get_rank(), mesh.size()
    whole, split = (loaded(model) for _ in range(2))
    for module in split.modules():
        if isinstance(module, LlamaDecoderLayer):
            fully_shard(module, mesh=mesh)
    fully_shard(split, mesh=mesh)
    collator, records = VocoCollator(whole.config), Records(2 * processes * steps, text_only=(2, 3))
    data = ConversationDataset.of(configured(model, out, {}), whole.processor, records, seed=0)
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.01) for x in (whole, split)]
    losses, apart = [], []
    for step in range(steps):
        batches = [collator([data[2 * (step * processes + i) + j] for j in (0, 1)]) for i in range(processes)]
        count = sum((batch["labels"] != -100).sum() for batch in batches)
        expected = [whole(**batch, num_items_in_batch=count).loss for batch in batches]
        sum(expected).backward()
        loss = split(**batches[rank], num_items_in_batch=count).loss
        (loss * processes).backward()  # gradients are averaged
        wanted = {name: x.grad for name, x in whole.named_parameters() if x.grad is not None}
        found = {name: x.grad.full_tensor() for name, x in split.named_parameters() if x.grad is not None}
        assert wanted.keys() == found.keys()
        apart.append(max(float((found[name] - x).abs().max() / x.abs().max().clamp(min=1e-6)) for name, x in wanted.items()))
        losses.append([float(loss), float(expected[rank])])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state = get_model_state_dict(split)
    dcp.save(state, checkpoint_id=out)
    full = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()}
    if rank == 0:
        torch.save(full, f"{out}.pt")
    local = {name: x.to_local().numel() for name, x in state.items() if isinstance(x, DTensor)}
    with torch.no_grad():
        for x in split.parameters():
            x.zero_()
    dcp.load(state, checkpoint_id=out)
    same = all(torch.equal(x.full_tensor(), full[name]) for name, x in state.items() if isinstance(x, DTensor))
    torch.distributed.destroy_process_group()
    return {"losses": losses, "apart": apart, "numel": sum(local.values()), "reloaded": same}


def loaded(folder: str) -> VocoLlavaForConditionalGeneration:
    """A model to be trained, its vision tower frozen, with the objective of a plain fine-tuning."""
    model = VocoLlavaForConditionalGeneration.from_pretrained(folder).train()
    training_models.freeze(model, llama=True)
    model.objective = objectives.of(ObjectiveConfig())
    return model


def main(file: Path) -> None:
    """Do the jobs in `file`; what this process found is in `file` with its rank as suffix."""
    jobs = json.loads(file.read_text())
    if any("deepspeed" in job["trainer"] for job in jobs.get("runs", ())):
        import deepspeed

        # On GPUs accelerate does this.
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    found = [run(**job) for job in jobs["runs"]] if "runs" in jobs else shards(**jobs["shards"])
    file.with_suffix(f".{os.environ['RANK']}").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
