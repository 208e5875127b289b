"""What several processes need: the distribution that was asked for, every record once, and teachers that stay whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import DistributedType
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainingArguments
from transformers.integrations import deepspeed

from voco_llama import VocoLlavaConfig
from voco_llama.collator import IGNORED


def check(trainer: Trainer) -> None:
    """RuntimeError where a run is not distributed as it was asked to be, which accelerate does not say.

    On CPUs, for one, it turns FSDP into DDP: each process then holds the whole model. ValueError where accelerate was asked
    to cut batches, which are packed and of which each process must have its own.
    """
    for name in ("split_batches", "dispatch_batches"):
        if getattr(trainer.args.accelerator_config, name):
            raise ValueError(f"trainer.accelerator_config.{name} must be false for batches that are packed, but was true")
    found, wanted = trainer.accelerator.distributed_type, _asked(trainer.args)
    for kind, source in wanted.items():
        if found is not kind:
            processes = trainer.accelerator.num_processes
            raise RuntimeError(
                f"training must be distributed by {kind.value}, as {source} asks, but accelerate runs it as {found.value} "
                f"on {trainer.args.device.type} with {processes} process{'es' if processes > 1 else ''}; its FSDP needs "
                "several GPUs or other accelerators"
            )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if trainer.accelerator.num_processes != started:
        raise RuntimeError(
            f"training must run with all {started} processes that were started (WORLD_SIZE), but accelerate uses "
            f"{trainer.accelerator.num_processes}"
        )


def _asked(arguments: TrainingArguments) -> dict[DistributedType, str]:
    """Kinds of distribution that settings or `accelerate launch` ask for, and where."""
    settings = {DistributedType.FSDP: ("fsdp", "ACCELERATE_USE_FSDP")}
    settings[DistributedType.DEEPSPEED] = ("deepspeed", "ACCELERATE_USE_DEEPSPEED")
    asked = {}
    for kind, (setting, variable) in settings.items():
        if getattr(arguments, setting):
            asked[kind] = f"trainer.{setting}"
        elif os.environ.get(variable, "false").lower() in ("true", "1"):
            asked[kind] = f"{variable}={os.environ[variable]}"
    return asked


class Order(Sampler[int]):
    """Indices of an epoch: each once, in an order drawn from the seed and the epoch alone, so that it does not depend on the
    number of processes; then, until `multiple` divides their number, `size`, which stands for no record.

    Otherwise accelerate would repeat records in the last step of an epoch.

    Args:
        size: number of records.
        multiple: samples that all processes together take at a time; 1 where the last of them may be fewer.
    """

    def __init__(self, size: int, multiple: int, seed: int):
        self.size, self.multiple, self.seed, self.epoch = size, multiple, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of that epoch from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.size, generator=generator).tolist()
        yield from [self.size] * (len(self) - self.size)


class Filled(Dataset):
    """A dataset, and behind its samples one without labels, which adds nothing to loss or gradients, for `Order` to use."""

    def __init__(self, dataset: Dataset, config: VocoLlavaConfig):
        self.dataset = dataset
        placeholders = config.image_token_id, config.voco_token_id
        self._token = next(token for token in range(3) if token not in placeholders)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index < len(self.dataset):
            return self.dataset[index]
        return {"input_ids": torch.tensor([self._token]), "labels": torch.tensor([IGNORED])}


@contextmanager
def whole_weights() -> Iterator[None]:
    """Models loaded within it are whole in each process, where DeepSpeed's ZeRO-3 would split those of transformers.

    A frozen teacher is no part of the engine, which would bring its weights together.
    """
    splitting = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = splitting
