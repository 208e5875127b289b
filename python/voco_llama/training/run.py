"""One training run, from its configuration to a folder that loads with AutoModel."""

import importlib.util
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, PrinterCallback
from transformers.trainer_pt_utils import get_model_param_count

from voco_llama import VocoCollator, VocoLlavaForConditionalGeneration, VocoProcessor

from . import checkpoints, distributed, models, objectives, outputs
from .config import TrainingConfig
from .curves import LogFiles, losses_of
from .dataset import ConversationDataset
from .launch import LAUNCH
from .progress import Lines
from .trainer import VocoTrainer

ZERO3 = "zero3"


@dataclass(frozen=True)
class TrainingResult:
    """What a run left: the folder of the trained model, and (step, loss) of its log."""

    model: Path
    losses: list[tuple[int, float]]


def train(config: TrainingConfig, records: Sequence[dict] | None = None, resume: bool = True) -> TrainingResult:
    """Train as `config` says, and write the model to `config.out / "model"`.

    In `config.out` are also checkpoints, `config.yaml` and `run.json` (settings, versions, numbers), `log.jsonl` and
    `loss.png`. The model has the dtype of the computation (bfloat16 with `trainer.bf16`), LoRA is merged into it, and its
    keys have the names of the checkpoint that the run began with.

    Args:
        records: conversations in place of `config.data.conversations`; any sequence of dicts in LLaVA's format, where
            `image` may be a PIL image.
        resume: go on from the last complete checkpoint in `config.out`, if there is one, with the losses of a run that was
            never stopped. If not, the run in `config.out` is deleted.

    Raises:
        ValueError: settings, data or a checkpoint that cannot be trained; `config.out` belongs to other settings.
        OSError: a checkpoint or the model cannot be written; those before are kept.
        ImportError: an optional package is missing; the message says which.
    """
    arguments = arguments_of(config)
    with arguments.main_process_first(local=False):
        if not resume and arguments.should_save:
            outputs.clear(config.out)
        outputs.check(config.out, config)
    checkpoint = checkpoints.newest(config.out)
    set_seed(arguments.seed)
    with _loading(config):
        model, processor = models.load(config, arguments)
        trained = _trained(model, config, arguments)
    context = model.config.text_config.max_position_embeddings if model.config.positions == "continuous" else None
    # The others find in the report what the first one has noted.
    with arguments.main_process_first(local=False):
        data = ConversationDataset.of(config, processor, records, arguments.seed, context)
    lines = Lines()
    trainer = VocoTrainer(
        model=trained,
        args=arguments,
        train_dataset=data,
        data_collator=VocoCollator(model.config),
        callbacks=[LogFiles(config.out), lines],
    )
    distributed.check(trainer)
    if config.lora is not None and trainer.is_fsdp_enabled:
        raise ValueError("lora must be absent under FSDP, where nobody has tried it; use DDP or DeepSpeed")
    for other in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):
        trainer.remove_callback(other)
    facts = _facts(trainer, data)
    with arguments.main_process_first(local=False):
        outputs.check_facts(config.out, facts)
        if arguments.should_save:
            checkpoints.remove_unfinished(config.out)
            outputs.write(config.out, config, facts)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        lines.close()
    data.gather(lambda counts: trainer.accelerator.reduce(counts.to(arguments.device), "sum").cpu())
    if arguments.should_save:
        outputs.write(config.out, config, {**facts, "data": data.summary()})
    folder = config.out / outputs.MODEL
    _export(trainer, processor, folder, config)
    return TrainingResult(folder, losses_of(trainer.state.log_history))


def arguments_of(config: TrainingConfig) -> TrainingArguments:
    """`config.trainer` as transformers' TrainingArguments.

    `deepspeed: zero3` is the file of that name in `launch`. What differs from their defaults: a log every 10 steps,
    TensorBoard where it is installed, 2 checkpoints kept, and gradient checkpointing of the kind that is not reentrant.

    Raises:
        ValueError: whatever TrainingArguments refuse; several GPUs in one process.
    """
    found = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
    settings = {
        "logging_steps": 10,
        "save_total_limit": 2,
        "report_to": found,
        # Without a GPU torch warns that there is nothing to pin for.
        "dataloader_pin_memory": torch.cuda.is_available(),
        **config.trainer,
    }
    if settings.get("deepspeed") == ZERO3:
        settings["deepspeed"] = str(LAUNCH / f"{ZERO3}.json")
    if settings.get("gradient_checkpointing") or settings.get("activation_checkpointing"):
        settings.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
    for name in ("checkpointing", "checkpointing_kwargs"):
        # The later of its two names, of which the earlier one is deprecated.
        if f"gradient_{name}" in settings and f"activation_{name}" in TrainingArguments.__dataclass_fields__:
            settings.setdefault(f"activation_{name}", settings.pop(f"gradient_{name}"))
    arguments = TrainingArguments(
        output_dir=str(config.out), remove_unused_columns=False, label_names=["labels"], **settings
    )
    if arguments.n_gpu > 1:
        raise ValueError(
            f"one process must use one GPU, but this one sees {arguments.n_gpu}: start it with `accelerate launch`, or "
            "choose one with CUDA_VISIBLE_DEVICES"
        )
    return arguments


def _loading(config: TrainingConfig):
    """PEFT reads weights that it adds to, which then must not be split yet; DeepSpeed splits them later."""
    return nullcontext() if config.lora is None else distributed.whole_weights()


def _trained(model: VocoLlavaForConditionalGeneration, config: TrainingConfig, arguments: TrainingArguments):
    """The model with its objective, Liger's kernels and LoRA."""
    liger = _uses_liger(config, arguments)
    teacher = None
    if config.objective.kind != "sft" and config.objective.teacher != "self":
        dtype = models.computed_dtype(arguments)
        with distributed.whole_weights():
            teacher = VocoLlavaForConditionalGeneration.from_pretrained(config.objective.teacher, dtype=dtype)
    model.objective = objectives.of(config.objective, teacher, liger=liger)
    if liger:
        objectives.apply_liger(model)
    return model if config.lora is None else models.with_lora(model, config.lora)


def _uses_liger(config: TrainingConfig, arguments: TrainingArguments) -> bool:
    on_gpu = arguments.device.type == "cuda"
    if config.liger == "auto":
        return on_gpu and importlib.util.find_spec("liger_kernel") is not None
    if config.liger and not on_gpu:
        raise ValueError("liger must be false or auto where there is no GPU, but was true")
    return config.liger


def _facts(trainer: VocoTrainer, data: ConversationDataset) -> dict:
    """What a run is about, in numbers."""
    arguments = trainer.args
    # Of what ZeRO-3 has split, a parameter itself knows nothing.
    every, trained = (get_model_param_count(trainer.model, trainable_only=only) for only in (False, True))
    return {
        "records": len(data),
        "samples_per_step": arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        "processes": arguments.world_size,
        "device": torch.cuda.get_device_name() if arguments.device.type == "cuda" else arguments.device.type,
        "parameters": {"trained": trained, "frozen": every - trained},
        "data": data.summary(),
        "versions": outputs.versions(),
    }


def _export(trainer: VocoTrainer, processor: VocoProcessor, folder: Path, config: TrainingConfig) -> None:
    """Write the trained model, in the dtype of the computation, and its processor."""
    accelerator, dtype = trainer.accelerator, models.computed_dtype(trainer.args)
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    # All processes take part in putting the parts together.
    state = accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    with checkpoints.written_whole(folder, is_main=trainer.args.should_save, barrier=accelerator.wait_for_everyone) as new:
        if trainer.args.should_save:
            model = _whole(config, trainer, state) if sharded else accelerator.unwrap_model(trainer.model)
            model = models.merged(model)
            state = model.state_dict()
            state = {name: x.to(dtype) if x.is_floating_point() else x for name, x in state.items()}
            model.save_pretrained(new, state_dict=state)
            _say_dtype(new / "config.json", dtype)
            processor.save_pretrained(new)


def _whole(config: TrainingConfig, trainer: VocoTrainer, state: dict[str, torch.Tensor]):
    """The model with these weights, loaded anew: LoRA cannot be merged into one that is split, which also knows other names
    for its weights than the checkpoint."""
    with distributed.whole_weights():
        model, _ = models.load(config, trainer.args)
        if config.lora is not None:
            model = models.with_lora(model, config.lora)
    model.load_state_dict(state)
    return model


def _say_dtype(file: Path, dtype: torch.dtype) -> None:
    """transformers writes the dtype of the model in memory, not of what it was given to save."""
    content = json.loads(file.read_text())
    content["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
