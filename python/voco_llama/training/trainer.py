"""transformers' Trainer for packed batches: checkpoints that are whole, weights that come back, and rates in its log."""

import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback

from voco_llama.collator import IGNORED

from . import checkpoints, distributed


class VocoTrainer(Trainer):
    """`Trainer` whose checkpoints are complete or not there, and whose log has tokens and images per second."""

    _unfinished: Path | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_Bookkeeping(self))
        # It would be saved, and generation with the trained model would have no cache. Training has none anyway.
        vars(self.model.config).pop("use_cache", None)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model, trial) -> None:
        self._saving = time.perf_counter()
        out, barrier = Path(self.args.output_dir), self.accelerator.wait_for_everyone
        target = out / f"checkpoint-{self.state.global_step}"
        with checkpoints.written_whole(target, is_main=self.args.should_save, barrier=barrier) as folder:
            self._unfinished = folder.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._unfinished = None
            barrier()
            if self.args.should_save:
                checkpoints.seal(folder)
        if self.args.should_save:
            checkpoints.rotate(out, self.args.save_total_limit)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """The weights of a checkpoint.

        transformers would look for the names of modules, find those of the hub, and train on from the first weights.
        """
        if self.is_fsdp_enabled or not isinstance(self.model, PreTrainedModel):  # PEFT's models are none
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        self.model.load_state_dict(saved.state_dict())

    # ---- data --------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self):
        """As in transformers, with every record once in an epoch, however many processes there are."""
        arguments, batch = self.args, self._train_batch_size
        fills = arguments.world_size > 1 and not arguments.dataloader_drop_last
        seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
        self._order = distributed.Order(len(self.train_dataset), batch * arguments.world_size if fills else 1, seed)
        return self._get_dataloader(
            dataset=distributed.Filled(self.train_dataset, self.model.config),
            description="Training",
            batch_size=batch,
            sampler_fn=lambda _: self._order,
            is_training=True,
        )

    # ---- log ---------------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """As in transformers, and counts tokens, labels, images and the parts of the loss."""
        labels, pixels = inputs["labels"], inputs.get("pixel_values")
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._tokens += labels.numel()
        self._images += 0 if pixels is None else len(pixels)
        self._labelled = self._labelled + (labels != IGNORED).sum()
        for name, part in self.model.objective.parts.items():
            self._parts[name] = self._parts.get(name, 0) + part
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers, with the parts of the loss and rates over all processes since the last time."""
        if "loss" in logs:
            seconds, steps = time.perf_counter() - self._since, self.state.global_step - self._logged
            counts = [self._tokens, self._images, self._labelled, *self._parts.values()]
            counts = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=self.args.device) for x in counts])
            tokens, images, labelled, *parts = self.accelerator.reduce(counts, "sum").tolist()
            if len(parts) > 1:
                logs |= {name: part / steps for name, part in zip(self._parts, parts)}
            logs["tokens_per_second"], logs["images_per_second"] = round(tokens / seconds, 1), round(images / seconds, 2)
            logs["labelled_share"] = round(labelled / tokens, 4)
            self._count_anew()
        super().log(logs, start_time)

    def _count_anew(self) -> None:
        self._tokens, self._images, self._labelled, self._parts = 0, 0, 0, {}
        self._since, self._logged = time.perf_counter(), self.state.global_step


class _Bookkeeping(TrainerCallback):
    """What a trainer has to do between its steps; the last of its callbacks."""

    def __init__(self, trainer: VocoTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin to count, from the checkpoint that a run goes on from."""
        self.trainer._count_anew()

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Tell the data its epoch, which accelerate does not where there are several processes or batches are skipped."""
        # A run that goes on is in the middle of one.
        epoch = int(state.epoch or 0)
        self.trainer.train_dataset.set_epoch(epoch)
        self.trainer._order.set_epoch(epoch)

    def on_save(self, args, state, control, **kwargs):
        """Leave the time that saving took, and other callbacks with it, out of the rates."""
        self.trainer._since += time.perf_counter() - self.trainer._saving
