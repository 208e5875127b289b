"""Training runs of a tiny model: what they leave, how they go on, and what they refuse."""

import dataclasses
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer
from typer.testing import CliRunner
from voco_llama import VocoLlavaForConditionalGeneration, VocoProcessor, cli
from voco_llama.training import (
    DataConfig,
    LoraConfig,
    ObjectiveConfig,
    TrainingConfig,
    VideoConfig,
    checkpoints,
    curves,
    outputs,
    run,
    train,
)
from voco_llama.training import models as training_models
from voco_llama.training.dataset import ConversationDataset
from voco_llama.training.run import arguments_of
from voco_llama.training.trainer import VocoTrainer, _Bookkeeping

RECORDS = 10
# 10 samples by 2, 2 batches a step: 3 steps an epoch, the last of one batch. Checkpoints are at 2, 4 and 8 (within an epoch)
# and at 6 (between two).
STEPS = 9


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A checkpoint folder whose keys have the names of the hub."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = models.voco_llava()
    state = {hub_name(name): x.clone() for name, x in model.state_dict().items()}
    model.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model.processor.save_pretrained(folder)
    return folder


def hub_name(name: str) -> str:
    for ours, theirs in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(name)


def records(count: int = RECORDS) -> list[dict]:
    """Conversations about an image each; one of text alone."""
    found = []
    for i in range(count):
        turns = [{"from": "human", "value": f"what is {i}"}, {"from": "gpt", "value": f"a {chr(97 + i)} thing"}]
        record = {"conversations": turns}
        if i != 3:
            record["image"] = models.picture(i)
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        found.append(record)
    return found


def configured(base: Path, out: Path, trainer: dict | None = None, **options) -> TrainingConfig:
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        **(trainer or {}),
    }
    return TrainingConfig(**{"model": str(base), "out": out, "num_voco_tokens": (1, 2, 4), "trainer": settings, **options})


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run that was never stopped: (config, result)."""
    config = configured(base, tmp_path_factory.mktemp("whole") / "out", {"report_to": "tensorboard"})
    return config, train(config, records())


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


def stopped_at(monkeypatch, config: TrainingConfig, step: int, given=None) -> None:
    """Run until a step has begun, and stop within it."""
    with monkeypatch.context() as patch:
        original = VocoTrainer.training_step

        def training_step(self, *args):
            if self.state.global_step >= step:
                raise Killed
            return original(self, *args)

        patch.setattr(VocoTrainer, "training_step", training_step)
        with pytest.raises(Killed):
            train(config, given or records())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert torch.equal(x, other[name]), name


# ---- what a run leaves -------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_model_that_everything_loads(whole, base):
    config, result = whole
    assert result.model == config.out / "model"
    assert [step for step, _ in result.losses] == list(range(1, STEPS + 1))
    assert result.losses[-1][1] < 0.6 * result.losses[0][1]
    before, after = weights(base), weights(result.model)
    assert before.keys() == after.keys()  # the names of the hub
    changed = {name for name, x in before.items() if not torch.equal(x, after[name])}
    assert {name for name in before if name.startswith("vision_tower")} == before.keys() - changed
    model = AutoModelForImageTextToText.from_pretrained(result.model, dtype="auto")
    assert isinstance(model, VocoLlavaForConditionalGeneration) and model.dtype == torch.float32
    assert (model.config.num_voco_tokens, model.config.max_voco_tokens) == (1, 4)
    processor = AutoProcessor.from_pretrained(result.model)
    assert isinstance(processor, VocoProcessor) and (processor.num_voco_tokens, processor.max_voco_tokens) == (1, 4)
    assert "use_cache" not in json.loads((result.model / "config.json").read_text())
    assert {file.name for file in config.out.iterdir()} == {
        *("checkpoint-8", "checkpoint-9", "config.yaml", "run.json", "log.jsonl", "loss.png", "model", "runs"),
    }


def test_a_run_says_what_it_was(whole):
    config, _ = whole
    assert TrainingConfig.load(config.out / "config.yaml") == config
    facts = json.loads((config.out / "run.json").read_text())
    assert (facts["records"], facts["samples_per_step"], facts["processes"]) == (RECORDS, 4, 1)
    model = models.voco_llava()
    tower = sum(x.numel() for x in model.model.vision_tower.parameters())
    assert facts["parameters"] == {"trained": sum(x.numel() for x in model.parameters()) - tower, "frozen": tower}
    assert facts["versions"]["torch"] == torch.__version__


def test_the_log_has_a_line_for_each_step(whole, base):
    config, result = whole
    log = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    assert curves.losses_of(log) == result.losses
    assert {"learning_rate", "grad_norm", "epoch", "tokens_per_second", "images_per_second"} <= log[0].keys()
    assert "sft" not in log[0]  # which is all of the loss
    assert (config.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((config.out / "runs").rglob("events.out.tfevents.*"))


def test_rates_count_tokens_images_and_labels(base, tmp_path):
    given = records(4)[:3]
    one = {"max_steps": 1, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 3}
    config = configured(base, tmp_path / "out", one, num_voco_tokens=(2,))
    train(config, given)
    first = json.loads((config.out / "log.jsonl").read_text().splitlines()[0])
    text = models.processor().conversation(("what is 0", "a a thing"), [1]).removeprefix("<image>\n")
    text = len(text.replace("</s>", "*"))
    # start, vision, a space and a newline, VoCo, again a space and a newline, the text's letters
    tokens = 1 + models.VISION + 2 + 2 + 2 + text
    assert first["tokens_per_second"] / first["images_per_second"] == pytest.approx(tokens, rel=1e-3)
    answer = len(" a a thing") + 1
    assert first["labelled_share"] == pytest.approx(answer / tokens, abs=1e-4)


def test_rates_leave_out_what_saving_takes(base, tmp_path, monkeypatch):
    clock, tokens = [0.0], []
    step, save = VocoTrainer.training_step, Trainer._save_checkpoint

    def training_step(self, model, inputs, *args):
        clock[0] += 1
        tokens.append(inputs["labels"].numel())
        return step(self, model, inputs, *args)

    def save_checkpoint(self, *args):
        clock[0] += 100
        save(self, *args)

    # Drawing, which another callback does, is part of saving.
    monkeypatch.setattr(curves, "draw", lambda *_: clock.append(clock.pop() + 10))
    monkeypatch.setattr("voco_llama.training.trainer.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(VocoTrainer, "training_step", training_step)
    monkeypatch.setattr(Trainer, "_save_checkpoint", save_checkpoint)
    often = {"max_steps": 2, "save_steps": 1, "gradient_accumulation_steps": 1}
    config = configured(base, tmp_path / "out", often)
    train(config, records())
    log = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    assert [entry["tokens_per_second"] for entry in log[:2]] == tokens


@pytest.mark.parametrize(("state", "epoch"), [(None, 0), (0.67, 0), (2.0, 2)])
def test_data_and_order_are_told_the_epoch(state, epoch):
    """Both, since accelerate tells an order its epoch in some cases only."""
    data, order = [], []
    told, also = SimpleNamespace(set_epoch=data.append), SimpleNamespace(set_epoch=order.append)
    trainer = SimpleNamespace(train_dataset=told, _order=also)
    _Bookkeeping(trainer).on_epoch_begin(None, SimpleNamespace(epoch=state), None)
    assert data == order == [epoch]


@pytest.mark.parametrize(("data_seed", "expected"), [(7, 7), (None, 3)])
def test_records_are_taken_in_the_order_of_the_data_seed(base, tmp_path, monkeypatch, data_seed, expected):
    class Asked(list):
        def __getitem__(self, index):
            asked.append(index)
            return super().__getitem__(index)

    asked, told = [], []
    monkeypatch.setattr(ConversationDataset, "set_epoch", lambda self, _: told.append(self))
    all_at_once = {"max_steps": 1, "per_device_train_batch_size": 5, "seed": 3, "data_seed": data_seed}
    train(configured(base, tmp_path / "out", all_at_once), Asked(records()))
    assert asked == torch.randperm(RECORDS, generator=torch.Generator().manual_seed(expected)).tolist()
    assert {data.seed for data in told} == {3}  # of which VoCo counts are drawn


@pytest.mark.parametrize(("processes", "drops", "length"), [(1, False, 10), (2, False, 16), (2, True, 10)])
def test_several_processes_fill_an_epoch_whose_end_is_not_dropped(processes, drops, length):
    arguments = SimpleNamespace(world_size=processes, dataloader_drop_last=drops, seed=0, data_seed=None)
    trainer = SimpleNamespace(
        args=arguments,
        _train_batch_size=4,
        train_dataset=list(range(10)),
        model=SimpleNamespace(config=models.voco_config()),
        _get_dataloader=lambda sampler_fn, **_: sampler_fn(None),
    )
    assert len(VocoTrainer.get_train_dataloader(trainer)) == length


def test_each_token_of_a_step_weighs_the_same(base, tmp_path):
    """However its samples are shared out among batches."""
    given = [{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "ab" * n}]} for n in (1, 20)]
    losses = []
    for batch in (1, 2):
        sizes = {"max_steps": 1, "per_device_train_batch_size": batch, "gradient_accumulation_steps": 2 // batch}
        losses.append(train(configured(base, tmp_path / str(batch), sizes), given).losses[0][1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_run_says_what_it_skipped_and_cut(base, tmp_path):
    """Beyond the context of the model, too, which would stop the run otherwise."""
    long = {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a" * 600}]}
    config = configured(base, tmp_path / "out", {"num_train_epochs": 1}, data=DataConfig((), on_error="skip"))
    train(config, [*records(4), long, {"conversations": []}, long])
    facts = json.loads((config.out / "run.json").read_text())
    assert facts["data"] == {"records": 7, "skipped": 1, "truncated": 2} and facts["records"] == 7


def test_counts_are_those_of_all_processes(base, tmp_path, monkeypatch):
    """Of another one, too, which has cut and skipped every record, and for which 3 more of everything stand in here."""
    seen, original = [], VocoTrainer.training_step

    def training_step(self, model, inputs, *args):
        seen.append(inputs["labels"])
        return original(self, model, inputs, *args)

    monkeypatch.setattr(VocoTrainer, "training_step", training_step)
    monkeypatch.setattr(Accelerator, "reduce", lambda self, x, reduction="sum": {"sum": x + 3}[reduction])
    config = configured(base, tmp_path / "out", {"max_steps": 1, "gradient_accumulation_steps": 1})
    train(config, records(2))
    data = json.loads((config.out / "run.json").read_text())["data"]
    assert data == {"records": 2, "skipped": 2, "truncated": 2}
    labelled = sum(int((labels != -100).sum()) for labels in seen)
    share = (labelled + 3) / (sum(labels.numel() for labels in seen) + 3)
    first = json.loads((config.out / "log.jsonl").read_text().splitlines()[0])
    assert first["labelled_share"] == pytest.approx(share, abs=1e-4)


def test_a_sample_may_exceed_the_context_where_images_share_positions(base, tmp_path):
    """Under compact positions, tokens are no measure of the context."""
    proc, images = models.processor(), models.pictures(2)
    tokens = proc(None, proc.conversation(("?", ""), 2), 2)["input_ids"].shape[1]
    # The second image's vision tokens have the positions of the first one's.
    turns = [("human", "<image><image>?"), ("gpt", "a" * (512 + models.VISION - tokens))]
    long = {"image": images, "conversations": [{"from": role, "value": value} for role, value in turns]}
    for positions, cut in (("compact", 0), ("continuous", 1)):
        config = configured(base, tmp_path / positions, {"max_steps": 1}, positions=positions, num_voco_tokens=(2,))
        train(config, [long])
        assert json.loads((config.out / "run.json").read_text())["data"]["truncated"] == cut


def test_parameters_that_zero3_has_split_are_counted_whole(monkeypatch):
    class Data(list):
        def summary(self):
            return {}

    model = torch.nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    for parameter in model.parameters():
        # As DeepSpeed leaves them between their uses.
        parameter.ds_numel, parameter.data = parameter.numel(), torch.empty(0)
    monkeypatch.setattr("transformers.trainer_pt_utils.is_deepspeed_zero3_enabled", lambda: True)
    sizes = {"train_batch_size": 1, "gradient_accumulation_steps": 1, "world_size": 1}
    arguments = SimpleNamespace(**sizes, device=torch.device("cpu"))
    facts = run._facts(SimpleNamespace(model=model, args=arguments), Data())
    assert facts["parameters"] == {"trained": 6, "frozen": 3}


def test_a_run_that_fails_gives_the_terminal_its_cursor_back(base, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    stopped_at(monkeypatch, configured(base, tmp_path / "out"), 0)
    written = capfd.readouterr().err
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1  # hidden, and shown


def test_smoothing_takes_as_much_from_either_side():
    losses = np.random.default_rng(0).random(200)
    found = curves.smoothed(list(losses))
    for i, half in ((0, 0), (2, 2), (50, 5), (197, 2), (199, 0)):
        assert found[i] == pytest.approx(losses[i - half : i + half + 1].mean())
    # So a loss that falls evenly is not lifted, and of few values nothing is made.
    assert curves.smoothed([float(-x) for x in range(300)]) == pytest.approx([-x for x in range(300)])
    assert curves.smoothed([3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]


def test_the_first_process_writes_log_and_curve_and_draws_at_the_end_without_checkpoints(tmp_path):
    files, arguments = curves.LogFiles(tmp_path), SimpleNamespace()
    for first in (False, True):
        state = SimpleNamespace(is_world_process_zero=first, log_history=[{"step": 1, "loss": 2.0}])
        for event in ("train_begin", "log", "train_end"):
            getattr(files, f"on_{event}")(arguments, state, None)
        assert {file.name for file in tmp_path.iterdir()} == ({"log.jsonl", "loss.png"} if first else set())


# ---- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "damage"),
    [(3, None), (7, None), (5, ("checkpoint-4", "optimizer.pt"))],
    ids=["within an epoch", "between epochs", "from a checkpoint before a damaged one"],
)
def test_a_stopped_run_goes_on_as_if_it_had_not(whole, base, tmp_path, monkeypatch, caplog, step, damage):
    config = configured(base, tmp_path / "out")
    stopped_at(monkeypatch, config, step)
    if damage:
        file = config.out.joinpath(*damage)
        file.write_bytes(file.read_bytes()[:-7])
    (config.out / checkpoints.UNFINISHED / "checkpoint-5").mkdir(parents=True)  # what it was writing
    begun, epochs = [], []
    monkeypatch.setattr(VocoTrainer, "_load_from_checkpoint", noted(begun, VocoTrainer._load_from_checkpoint))
    monkeypatch.setattr(ConversationDataset, "set_epoch", noted(epochs, ConversationDataset.set_epoch))
    result = train(config, records())
    at = 2 if damage else step // 2 * 2
    assert [Path(folder).name for folder in begun] == [f"checkpoint-{at}"]
    assert epochs == list(range(at // 3, 3))  # in which VoCo counts are drawn
    assert result.losses == whole[1].losses
    assert_same(weights(result.model), weights(whole[1].model))
    log = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    assert curves.losses_of(log) == whole[1].losses
    assert ("optimizer.pt has" in caplog.text) == bool(damage)
    assert not (config.out / checkpoints.UNFINISHED).exists()


def test_batches_may_be_others_when_a_run_goes_on(whole, base, tmp_path, monkeypatch):
    config = configured(base, tmp_path / "out")
    stopped_at(monkeypatch, config, 5)
    smaller = changed(config, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for (step, loss), (at, expected) in zip(train(smaller, records()).losses, whole[1].losses, strict=True):
        assert step == at and loss == pytest.approx(expected, rel=1e-4)


def noted(seen: list, original):
    def call(self, folder, *args):
        seen.append(folder)
        return original(self, folder, *args)

    return call


def test_a_run_that_is_done_writes_its_model_again(whole):
    config, result = whole
    before = weights(result.model)
    shutil.rmtree(result.model)
    assert train(config, records()).losses == result.losses
    assert_same(weights(result.model), before)


def test_a_run_cannot_go_on_from_damaged_checkpoints_alone(base, tmp_path, monkeypatch):
    config = configured(base, tmp_path / "out")
    stopped_at(monkeypatch, config, 3)
    (config.out / "checkpoint-2" / "contents.json").unlink()
    with pytest.raises(ValueError, match="out must hold a complete checkpoint to go on from, but all 1 in"):
        train(config, records())


def changed(config: TrainingConfig, **trainer) -> TrainingConfig:
    return dataclasses.replace(config, trainer={**config.trainer, **trainer})


def test_a_folder_belongs_to_one_configuration(whole, tmp_path):
    config, _ = whole
    before = {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}
    for other, message in (
        (changed(config, learning_rate=2e-3), r"differs in trainer.learning_rate \(was 0.001, is 0.002\); choose another"),
        (changed(config, seed=1), r"differs in trainer.seed \(was None, is 1\)"),
        (dataclasses.replace(config, num_voco_tokens=(1,)), r"num_voco_tokens \(was \[1, 2, 4\], is \[1\]\)"),
        (dataclasses.replace(config, lora=LoraConfig()), r"lora.alpha .*lora.r \(was None, is 128\)"),
        (changed(config, per_device_train_batch_size=3), r"samples per step \(was 4, is 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            train(other, records())
    with pytest.raises(ValueError, match=r"number of records \(was 10, is 9\)"):
        train(config, records(9))
    assert before == {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}


def test_what_changes_nothing_that_is_learnt_may_change(whole):
    config, _ = whole
    moved = dataclasses.replace(changed(config, logging_steps=5, save_steps=3, dataloader_num_workers=1), liger=False)
    outputs.check(config.out, moved)
    outputs.check(config.out, changed(config, per_device_train_batch_size=1, gradient_accumulation_steps=4))
    with pytest.raises(ValueError, match="dataloader_drop_last"):
        outputs.check(config.out, changed(config, dataloader_drop_last=True))


FREE = {
    "logging_steps": 5, "log_level": "info", "save_steps": 3, "save_total_limit": 7, "report_to": "none", "run_name": "x",
    "dataloader_num_workers": 3, "dataloader_pin_memory": True, "dataloader_prefetch_factor": 4, "disable_tqdm": True,
    "dataloader_persistent_workers": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4,
    "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}, "use_cpu": True,
    "torch_empty_cache_steps": 5, "fsdp": "full_shard", "fsdp_config": {"version": 2}, "deepspeed": "zero3",
    "ddp_timeout": 100,
}  # fmt: skip
FIXED = {
    "learning_rate": 1.0, "lr_scheduler_type": "linear", "warmup_steps": 5, "weight_decay": 0.5, "max_grad_norm": 3.0,
    "seed": 5, "data_seed": 5, "max_steps": 5, "num_train_epochs": 5, "optim": "sgd", "bf16": True, "adam_beta1": 0.5,
    "dataloader_drop_last": True, "average_tokens_across_devices": False, "ignore_data_skip": True,
}  # fmt: skip


def test_which_settings_may_change(tmp_path):
    data = DataConfig((tmp_path / "a.json",), "images")
    config = TrainingConfig("model", tmp_path, data)
    outputs.write(tmp_path, config, {})
    for name, value in FREE.items():
        outputs.check(tmp_path, changed(config, **{name: value}))
    for change in ({"conversations": (tmp_path / "b.json",)}, {"images": "elsewhere"}):
        outputs.check(tmp_path, dataclasses.replace(config, data=dataclasses.replace(data, **change)))
    for name, value in FIXED.items():
        with pytest.raises(ValueError, match=rf"differs in trainer.{name} \(was None"):
            outputs.check(tmp_path, changed(config, **{name: value}))
    for change in ({"max_length": 5}, {"on_error": "skip"}, {"video": VideoConfig(num_frames=2)}):
        with pytest.raises(ValueError, match=rf"differs in data.{next(iter(change))}"):
            outputs.check(tmp_path, dataclasses.replace(config, data=dataclasses.replace(data, **change)))
    changes = {"model": "other", "stage": "align", "system": "avg_pool", "num_voco_tokens": (3,), "lora": LoraConfig()}
    for name, value in (changes | {"objective": ObjectiveConfig("distill"), "positions": "compact"}).items():
        with pytest.raises(ValueError, match=f"differs in {name}"):
            outputs.check(tmp_path, dataclasses.replace(config, **{name: value}))


def test_nothing_of_a_run_is_left_when_it_is_cleared(tmp_path):
    for name in ("config.yaml", "run.json", "log.jsonl", "loss.png", "skipped.jsonl", "notes.txt", "log.txt"):
        (tmp_path / name).touch()
    mine = ("models", "checkpoint-best", "checkpoint-3-mine")
    for name in ("model", "runs", ".unfinished", "checkpoint-3", *mine):
        (tmp_path / name / "inner").mkdir(parents=True)
    outputs.clear(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "log.txt", *mine}


def test_a_fresh_run_deletes_the_one_before_and_nothing_else(base, tmp_path):
    config = configured(base, tmp_path / "out", {"max_steps": 2})
    train(config, records())
    (config.out / "notes.txt").write_text("mine")
    other = changed(config, learning_rate=2e-3, max_steps=1)
    result = train(other, records(), resume=False)
    assert [step for step, _ in result.losses] == [1]
    assert [path.name for path in checkpoints.all_in(config.out)] == ["checkpoint-1"]
    assert (config.out / "notes.txt").read_text() == "mine"
    assert yaml.safe_load((config.out / "config.yaml").read_text())["trainer"]["learning_rate"] == 2e-3


def test_checkpoints_of_something_else_are_left_alone(base, tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    for resume in (True, False):
        with pytest.raises(ValueError, match="out must be a folder of its own"):
            train(configured(base, tmp_path), records(), resume=resume)
    assert (tmp_path / "checkpoint-7").is_dir()


def test_a_model_of_something_else_is_left_alone(base, tmp_path):
    for name in ("model", "runs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text(name)
    for resume in (True, False):
        with pytest.raises(ValueError, match="out must be a folder of its own, but .* holds model and no config.yaml"):
            train(configured(base, tmp_path), records(), resume=resume)
    assert (tmp_path / "model" / "mine").read_text() == "model"
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "log.jsonl").write_text("mine")
    outputs.clear(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "log.jsonl"}


# ---- checkpoints -------------------------------------------------------------------------------------------------------


def full_disk(patch) -> None:
    def save(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(torch, "save", save)


def small_files(size: int):
    """Real write errors of the libraries: no file of this process may be larger."""

    def limit(patch) -> None:
        original = Trainer._save_checkpoint

        def save(self, *args):
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            try:
                original(self, *args)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        patch.setattr(Trainer, "_save_checkpoint", save)

    return limit


@pytest.mark.parametrize(
    "broken",
    [
        full_disk,
        pytest.param(small_files(100_000), marks=pytest.mark.full),
        pytest.param(small_files(700_000), marks=pytest.mark.full),
    ],
    ids=["full disk", "weights", "optimiser"],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(whole, base, tmp_path, monkeypatch, broken):
    config = configured(base, tmp_path / "out", {"save_total_limit": 1})
    stopped_at(monkeypatch, config, 3)
    with monkeypatch.context() as patch:
        broken(patch)
        with pytest.raises(OSError, match="checkpoint-4 cannot be written .*; what was saved before is kept"):
            train(config, records())
    assert [path.name for path in checkpoints.all_in(config.out)] == ["checkpoint-2"]
    assert not (config.out / checkpoints.UNFINISHED).exists() or not list((config.out / checkpoints.UNFINISHED).iterdir())
    assert train(config, records()).losses == whole[1].losses


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    for content in ("old", "new"):
        with checkpoints.written_whole(target) as folder:
            (folder / "file").write_text(content)
            assert not target.exists() or (target / "file").read_text() == "old"
    assert (target / "file").read_text() == "new"
    # What was being written when the process was killed is no part of it.
    (tmp_path / checkpoints.UNFINISHED / "model" / "half").mkdir(parents=True)
    with checkpoints.written_whole(target) as folder:
        (folder / "file").write_text("new")
    assert [path.name for path in target.iterdir()] == ["file"]
    for error, raised in ((OSError(errno.ENOSPC, "full"), OSError), (Killed(), Killed)):
        with pytest.raises(raised), checkpoints.written_whole(target) as folder:
            (folder / "file").write_text("half")
            raise error
        assert (target / "file").read_text() == "new" and not folder.exists()
    assert [path.name for path in tmp_path.iterdir() if path.name != checkpoints.UNFINISHED] == ["model"]


def test_folders_are_written_side_by_side(tmp_path):
    with checkpoints.written_whole(tmp_path / "one") as one:
        with checkpoints.written_whole(tmp_path / "other") as other:
            (other / "file").write_text("other")
        (one / "file").write_text("one")
    assert {path.name: (path / "file").read_text() for path in tmp_path.iterdir()} == {"one": "one", "other": "other"}


def sealed(out: Path, step: int) -> Path:
    folder = out / f"checkpoint-{step}"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(step))
    (folder / "inner" / "part").write_bytes(b"123")
    checkpoints.seal(folder)
    return folder


def test_the_newest_complete_checkpoint_is_found(tmp_path, caplog):
    assert checkpoints.newest(tmp_path) is None
    found = [sealed(tmp_path, step) for step in (9, 10, 100, 200)]
    assert checkpoints.newest(tmp_path) == found[3]
    (found[3] / "weights").write_bytes(bytes(199))
    (found[2] / "inner" / "part").unlink()
    assert checkpoints.newest(tmp_path) == found[1]
    assert "weights has 199 bytes of 200" in caplog.text and "inner/part is missing" in caplog.text
    (found[1] / "contents.json").write_text("{")
    assert checkpoints.newest(tmp_path) == found[0]


def test_rotation_removes_the_oldest_complete_ones(tmp_path):
    found = [sealed(tmp_path, step) for step in (9, 10, 100, 200)]
    (found[3] / "weights").unlink()
    checkpoints.rotate(tmp_path, None)
    assert len(checkpoints.all_in(tmp_path)) == 4
    checkpoints.rotate(tmp_path, 2)
    assert checkpoints.all_in(tmp_path) == found[1:]


# ---- what is trained ---------------------------------------------------------------------------------------------------


def changes(base: Path, result) -> set[str]:
    before, after = weights(base), weights(result.model)
    return {name for name, x in before.items() if not torch.equal(x, after[name])}


def test_alignment_trains_the_projector_alone_and_has_no_voco_tokens(base, tmp_path, monkeypatch):
    seen = []
    original = VocoTrainer.training_step

    def training_step(self, model, inputs, *args):
        seen.append(inputs["input_ids"])
        return original(self, model, inputs, *args)

    monkeypatch.setattr(VocoTrainer, "training_step", training_step)
    result = train(configured(base, tmp_path / "out", {"max_steps": 2}, stage="align"), records())
    assert changes(base, result) == {f"multi_modal_projector.linear_{i}.{x}" for i in (1, 2) for x in ("weight", "bias")}
    ids = torch.cat([x.flatten() for x in seen])
    assert (ids == models.IMAGE).any() and not (ids == models.VOCO).any()
    config = AutoModelForImageTextToText.from_pretrained(result.model).config
    assert (config.num_voco_tokens, config.max_voco_tokens, config.masked) == (2, 8, True)  # as they were


def test_gradient_checkpointing_changes_nothing_but_memory(whole, base, tmp_path, monkeypatch):
    calls = []
    attention = type(models.voco_llava().model.language_model.layers[0].self_attn)
    forward = attention.forward

    def counted(self, *args, **kwargs):
        calls.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", counted)
    config = configured(base, tmp_path / "out", {"gradient_checkpointing": True})
    stopped_at(monkeypatch, config, 4)
    # Steps of 2, 2, 1 and 2 batches through 2 layers, forward and once more for the backward.
    assert len(calls) == 2 * 2 * (2 + 2 + 1 + 2)
    log = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    assert curves.losses_of(log) == whole[1].losses[:4]
    # Weights after 4 steps have seen 4 gradients of everything.
    assert_same(weights(config.out / "checkpoint-4"), after_four(whole[0], tmp_path, monkeypatch))


def after_four(config: TrainingConfig, folder: Path, monkeypatch) -> dict[str, torch.Tensor]:
    other = dataclasses.replace(config, out=folder / "plain")
    stopped_at(monkeypatch, other, 4)
    return weights(other.out / "checkpoint-4")


def test_bfloat16_computes_and_saves_in_bfloat16_and_trains_in_float32(base, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(VocoTrainer, "create_optimizer", noting_dtypes(seen, VocoTrainer.create_optimizer))
    result = train(configured(base, tmp_path / "out", {"max_steps": 1, "bf16": True, "learning_rate": 0.0}), records())
    assert set(seen) == {torch.float32}
    # Where nothing is learnt, a checkpoint has the weights as they were, most of which bfloat16 cannot hold.
    before = weights(base)
    assert_same(weights(tmp_path / "out" / "checkpoint-1"), before)
    assert_same(weights(result.model), {name: x.bfloat16() for name, x in before.items()})
    assert sum((x.bfloat16() != x).sum() for x in before.values()) > 0.9 * sum(x.numel() for x in before.values())
    assert AutoModelForImageTextToText.from_pretrained(result.model, dtype="auto").dtype == torch.bfloat16


def noting_dtypes(seen: list, original):
    def call(self, *args):
        seen.extend(x.dtype for x in self.model.parameters() if x.requires_grad)
        return original(self, *args)

    return call


@pytest.mark.parametrize("options", [{"stage": "align"}, {"lora": LoraConfig(r=4)}], ids=["align", "lora"])
def test_a_llama_that_stays_frozen_is_held_in_bfloat16(base, tmp_path, options):
    config = configured(base, tmp_path / "out", {"bf16": True}, **options)
    arguments = arguments_of(config)
    model, _ = training_models.load(config, arguments)
    trained = run._trained(model, config, arguments)
    assert {x.dtype for x in trained.parameters() if x.requires_grad} == {torch.float32}
    llama = [x for name, x in trained.named_parameters() if "_proj.weight" in name or "_proj.base_layer" in name]
    assert {(x.dtype, x.requires_grad) for x in llama} == {(torch.bfloat16, False)}


def test_a_teacher_is_held_in_bfloat16(base, tmp_path):
    config = configured(base, tmp_path, {"bf16": True}, objective=ObjectiveConfig(kind="distill", teacher=str(base)))
    arguments = arguments_of(config)
    teacher = run._trained(training_models.load(config, arguments)[0], config, arguments).objective.teacher
    assert {x.dtype for x in teacher.parameters()} == {torch.bfloat16}


def test_the_dtype_of_the_computation():
    for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("", torch.float32)):
        arguments = SimpleNamespace(bf16=kind == "bf16", fp16=kind == "fp16")
        assert training_models.computed_dtype(arguments) == dtype


def test_a_frozen_llama_goes_on_beside_a_projector_in_float32(base, tmp_path, monkeypatch):
    """A checkpoint has a dtype, which is that of the LLaMA."""
    results = []
    short = {"max_steps": 2, "save_steps": 1, "gradient_accumulation_steps": 1, "bf16": True}
    for name, step in (("whole", None), ("stopped", 1)):
        config = configured(base, tmp_path / name, short, stage="align")
        if step:
            stopped_at(monkeypatch, config, step)
        results.append(train(config, records()))
    assert results[0].losses == results[1].losses
    assert_same(*(weights(result.model.parent / "checkpoint-2") for result in results))


def test_distillation_from_a_frozen_teacher_is_logged_in_its_parts(base, tmp_path, monkeypatch):
    objective = ObjectiveConfig(kind="mixed", teacher=str(base), weight=0.25)
    four = {"max_steps": 4, "logging_steps": 2}  # the log is a mean of steps, a step a sum of batches
    config = configured(base, tmp_path / "out", four, objective=objective, num_voco_tokens=(2,))
    stopped_at(monkeypatch, config, 3)
    result = train(config, records())
    for step, line in zip((2, 4), (config.out / "log.jsonl").read_text().splitlines()):
        entry = json.loads(line)
        assert entry["step"] == step and entry["kl"] > 0.1
        assert entry["loss"] == pytest.approx(0.75 * entry["sft"] + 0.25 * entry["kl"], rel=1e-5)
    assert not [name for name in weights(result.model) if "teacher" in name]


def test_a_teacher_has_weights_of_its_own(base, tmp_path):
    torch.manual_seed(1)
    teacher = models.voco_llava()
    teacher.save_pretrained(tmp_path / "teacher")
    objective = ObjectiveConfig(kind="distill", teacher=str(tmp_path / "teacher"))
    one = {"max_steps": 1, "gradient_accumulation_steps": 1}
    config = configured(base, tmp_path / "out", one, objective=objective)
    question, answer = "what", "a thing"  # of text alone, so that both get the same tokens
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    result = train(config, [{"conversations": turns}])
    proc = models.processor()
    tokens = proc(None, proc.conversation((question, answer), 0))["input_ids"]
    student = VocoLlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
    rows = slice(-len(f" {answer}") - 2, -1)
    with torch.no_grad():
        found, aim = (model(tokens).logits[0, rows].log_softmax(-1) for model in (student, teacher))
    expected = (aim.exp() * (aim - found)).sum(-1).mean()
    assert result.losses[0][1] == pytest.approx(float(expected), rel=1e-3) and expected > 0.1


def test_the_upper_bound_is_trained_without_the_mask(base, tmp_path):
    result = train(configured(base, tmp_path / "out", {"max_steps": 1}, system="upper_bound"), records())
    assert not AutoModelForImageTextToText.from_pretrained(result.model).config.masked


@pytest.mark.parametrize("name", ["split_batches", "dispatch_batches"])
def test_packed_batches_are_not_cut(base, tmp_path, name):
    config = configured(base, tmp_path / "out", {"accelerator_config": {name: True}})
    with pytest.raises(ValueError, match=f"trainer.accelerator_config.{name} must be false for batches that are packed"):
        train(config, records())
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_liger_needs_a_gpu(base, tmp_path):
    with pytest.raises(ValueError, match="liger must be false or auto where there is no GPU, but was true"):
        train(configured(base, tmp_path / "out", liger=True), records())
    assert not (tmp_path / "out").exists()


def test_liger_is_used_where_there_is_a_gpu_and_the_package(tmp_path, monkeypatch):
    def used(liger, device: str, installed: bool) -> bool:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name if installed and name == "liger_kernel" else None)
        config = TrainingConfig("model", tmp_path, liger=liger)
        return run._uses_liger(config, SimpleNamespace(device=torch.device(device)))

    assert used("auto", "cuda", True)
    assert not used("auto", "cuda", False) and not used("auto", "cpu", True)
    # Where it is asked for and missing, the objective says so.
    assert used(True, "cuda", False) and not used(False, "cuda", True)


# ---- LoRA --------------------------------------------------------------------------------------------------------------

LORA = LoraConfig(r=4, alpha=8, dropout=0.1)


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    config = configured(base, tmp_path_factory.mktemp("lora") / "out", lora=LORA)
    return config, train(config, records())


def test_lora_is_merged_into_the_linear_layers_of_the_llama(lora, base):
    _, result = lora
    before, after = weights(base), weights(result.model)
    assert before.keys() == after.keys()
    linear = {name for name in before if "language_model.model.layers" in name and "_proj" in name}
    embedding = "language_model.model.embed_tokens.weight"
    projector = {name for name in before if name.startswith("multi_modal_projector")}
    assert changes(base, result) == linear | projector | {embedding}
    rows = (before[embedding] != after[embedding]).any(1).nonzero().flatten().tolist()
    assert rows == [models.VOCO]


def test_the_merged_model_computes_what_the_adapters_do(lora, base):
    import peft

    config, result = lora
    plain = VocoLlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(plain, config.out / f"checkpoint-{STEPS}").eval()
    merged = VocoLlavaForConditionalGeneration.from_pretrained(result.model, dtype=torch.float32).eval()
    tokens = models.processor()(models.pictures(2), ["<image>\nwhat is it", "<image>\nwhat"], 4)
    with torch.no_grad():
        found, expected = merged(**tokens).logits, adapted(**tokens).logits
        untrained = VocoLlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()(**tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (untrained - expected).abs().max() > 0.1


def test_lora_goes_on(lora, base, tmp_path, monkeypatch):
    config = dataclasses.replace(lora[0], out=tmp_path / "out")
    stopped_at(monkeypatch, config, 5)
    with safe_open(config.out / "checkpoint-4" / "adapter_model.safetensors", "pt") as file:
        assert any("lora_A" in name for name in file.keys())  # noqa: SIM118 - not a mapping
    result = train(config, records())
    assert result.losses == lora[1].losses
    assert_same(weights(result.model), weights(lora[1].model))


def test_what_lora_begins_with_is_drawn_from_the_seed(base, tmp_path):
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        config = configured(base, tmp_path / str(state), {"max_steps": 1}, lora=LORA)
        found.append(weights(train(config, records()).model))
    assert_same(*found)


def test_lora_has_the_rank_scale_and_dropout_of_its_settings():
    """Low-rank updates are scaled with alpha / r (Hu et al., arXiv 2106.09685, section 4.1)."""
    model = training_models.with_lora(models.voco_llava(), LoraConfig(r=3, alpha=12, dropout=0.25))
    layer = model.get_submodule("base_model.model.model.language_model.layers.1.mlp.down_proj")
    down, up = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    assert down.shape == (3, 96) and up.shape == (64, 3)
    torch.nn.init.normal_(up)
    x = torch.randn(5, 96)
    torch.manual_seed(0)
    found = layer.train()(x)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(x, 0.25)
    torch.testing.assert_close(found, x @ layer.base_layer.weight.T + 4 * dropped @ down.T @ up.T)


def test_lora_is_refused_under_fsdp(base, tmp_path, monkeypatch):
    # As accelerate would have it on several GPUs.
    monkeypatch.setattr(run.distributed, "check", lambda trainer: setattr(trainer, "is_fsdp_enabled", True))
    with pytest.raises(ValueError, match="lora must be absent under FSDP"):
        train(configured(base, tmp_path / "out", lora=LORA), records())
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_lora_without_peft_says_what_to_install(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install "voco-kernels\[train\]"'):
        training_models.with_lora(models.voco_llava(), LORA)


# ---- checkpoints that do not fit ---------------------------------------------------------------------------------------


def config_with(**change):
    """The tiny model's configuration, with an embedding row for each token of its tokenizer."""
    config = models.voco_config(text={"vocab_size": len(models.tokenizer())})
    for name, value in change.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"voco_token_id": 9}, r"voco_token_id of base must be that of <voco> in its tokenizer \(4\), but was 9"),
        ({"voco_token_id": 99999}, "voco_token_id of base must be that of <voco>"),
        ({"image_token_id": 9}, r"image_token_id of base must be that of <image> in its tokenizer \(3\), but was 9"),
        ({"image_start_id": None}, r"image_start_id of base must be that of <s> in its tokenizer \(1\), but was None"),
    ],
)
def test_a_configuration_that_contradicts_the_tokenizer_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        training_models.check(config_with(**change), models.processor(), "base")


@pytest.mark.parametrize(("token", "name"), [("</s>", "end"), ("<pad>", "padding"), ("<image>", "image"), ("<s>", "start")])
def test_the_voco_token_is_a_token_of_its_own(token, name):
    number = models.tokenizer().convert_tokens_to_ids(token)
    with pytest.raises(ValueError, match=f"voco_token_id of base must be a token of its own, but is the {name} token"):
        training_models.check(config_with(voco_token_id=number), models.processor(voco_token=token), "base")


def test_a_checkpoint_without_a_voco_token_is_to_be_converted():
    with pytest.raises(ValueError, match="must have the VoCo token <compressed> .* `voco convert` adds it"):
        training_models.check(config_with(), models.processor(voco_token="<compressed>"), "base")


def test_every_token_needs_a_row():
    with pytest.raises(ValueError, match=rf"for each of its {len(models.tokenizer())} tokens, but base has 64 rows"):
        training_models.check(models.voco_config(text={"vocab_size": 64}), models.processor(), "base")


def test_more_voco_tokens_than_before_are_said(base, tmp_path, caplog):
    for counts, largest in (((2, 8, 1), 8), ((2, 16, 1), 16)):
        config = configured(base, tmp_path, num_voco_tokens=counts)
        model, processor = training_models.load(config, arguments_of(config))
        said = "at most 8 VoCo tokens per image; from now on it is trained for 16" in caplog.text
        assert said == bool(caplog.text) == (largest > 8)
        for part in (model.config, processor):
            assert (part.num_voco_tokens, part.max_voco_tokens) == (2, largest)


def test_a_system_without_voco_tokens_leaves_their_number_alone(base, tmp_path, caplog):
    config = configured(base, tmp_path, system="avg_pool", num_voco_tokens=(9,))
    model, processor = training_models.load(config, arguments_of(config))
    for part in (model.config, processor):
        assert (part.num_voco_tokens, part.max_voco_tokens) == (0, 8)
    assert model.config.num_compressed_tokens == 9 and not caplog.text


def test_positions_are_those_of_the_checkpoint_where_none_are_asked_for(tmp_path):
    for positions, other in (("compact", "continuous"), ("continuous", "compact")):
        model = models.voco_llava(positions=positions)
        for part in (model, model.processor):
            part.save_pretrained(tmp_path / positions)
        for asked, expected in ((None, positions), (other, other)):
            config = configured(tmp_path / positions, tmp_path / "out", positions=asked)
            assert training_models.load(config, arguments_of(config))[0].config.positions == expected


def test_nothing_is_written_before_settings_and_data_are_known_to_be_right(base, tmp_path):
    config = configured(base, tmp_path / "out")
    for given, message in (([], "records must hold at least one"), (None, "data must be given")):
        with pytest.raises(ValueError, match=message):
            train(config, given)
    with pytest.raises((ValueError, OSError), match="nowhere"):
        train(dataclasses.replace(config, model=str(tmp_path / "nowhere")), records())
    assert not (tmp_path / "out" / "config.yaml").exists()


# ---- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(base, tmp_path) -> Path:
    """A YAML file with its data beside it."""
    (tmp_path / "images").mkdir()
    content = []
    for i, record in enumerate(records()):
        if "image" in record:
            record["image"].save(tmp_path / "images" / f"{i}.png")
            record["image"] = f"{i}.png"
        content.append(record)
    (tmp_path / "train.json").write_text(json.dumps(content))
    config = configured(base, tmp_path / "unused").to_dict()
    config |= {"out": "out", "data": {"conversations": "train.json", "images": "images"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "config.yaml"


def voco(*arguments) -> str:
    result = CliRunner().invoke(cli.app, [str(x) for x in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_command_trains_files_as_records_are_trained(whole, files, tmp_path):
    report = json.loads(voco("train", files, "--json"))
    assert report["model"] == str(tmp_path / "out" / "model")
    assert [tuple(x) for x in report["losses"]] == whole[1].losses
    with pytest.raises(ValueError, match="choose another folder, or delete that run with --fresh"):
        files.write_text(files.read_text().replace("num_train_epochs: 3", "num_train_epochs: 1"))
        voco("train", files)
    assert voco("train", files, "--fresh") == f"model: {tmp_path / 'out' / 'model'}\n"
    assert [path.name for path in checkpoints.all_in(tmp_path / "out")] == ["checkpoint-2", "checkpoint-3"]
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 3 + 1


def test_the_command_can_write_elsewhere(files, tmp_path):
    files.write_text(files.read_text().replace("num_train_epochs: 3", "max_steps: 1"))
    voco("train", files, "--out", tmp_path / "other")
    assert (tmp_path / "other" / "model").is_dir() and not (tmp_path / "out").exists()


def test_recipes_are_listed_and_printed():
    listed = voco("recipe")
    assert "finetune" in listed and "align" in listed
    assert yaml.safe_load(voco("recipe", "lora"))["lora"]["r"] == 128
    assert json.loads(voco("recipe", "--json"))["lora"].startswith("LoRA of a 7B")
    with pytest.raises(ValueError, match="name must be one of align, distill, .* but was 'nothing'"):
        voco("recipe", "nothing")


@pytest.mark.full
def test_a_killed_process_goes_on_as_if_it_had_not_been(whole, files, tmp_path):
    """SIGKILL at three moments, with data-loader workers."""
    content = yaml.safe_load(files.read_text())
    content["trainer"] |= {"dataloader_num_workers": 2, "save_steps": 1}
    files.write_text(yaml.safe_dump(content))
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{root / 'python'}"}
    command = [sys.executable, "-m", "voco_llama.cli", "train", str(files), "--json"]
    log = tmp_path / "out" / "log.jsonl"
    for lines in (1, 4, 8):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        until = time.monotonic() + 120
        while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) >= lines):
            assert time.monotonic() < until
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert [tuple(x) for x in json.loads(done.stdout)["losses"]] == whole[1].losses
    assert_same(weights(tmp_path / "out" / "model"), weights(whole[1].model))
