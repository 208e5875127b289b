"""Training configurations: every key is checked, and the shipped ones say what they do."""

import dataclasses
import json
import math
import re
from typing import ClassVar

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments
from voco_llama.training import DataConfig, LoraConfig, TrainingConfig, VideoConfig, run
from voco_llama.training.launch import LAUNCH
from voco_llama.training.recipes import recipes, title
from voco_llama.training.run import arguments_of

MINIMAL = "model: llava-hf/llava-1.5-7b-hf\nout: runs/one\n"


def load(folder, text: str) -> TrainingConfig:
    file = folder / "config.yaml"
    file.write_text(text)
    return TrainingConfig.load(file)


# ---- values ------------------------------------------------------------------------------------------------------------


def test_what_is_not_given_has_a_default(tmp_path):
    config = load(tmp_path, MINIMAL)
    assert (config.stage, config.system, config.num_voco_tokens, config.data) == ("sft", "voco", (2,), None)
    assert (config.objective.kind, config.lora, config.liger, config.trainer) == ("sft", None, "auto", {})


@pytest.mark.parametrize("text", ["2e-5", "2E-5", "2.0e-5", "0.00002", "+2e-5", "2.e-05", "0.0000000002e5"])
def test_numbers_are_numbers_whichever_way_they_are_written(tmp_path, text):
    config = load(tmp_path, f"{MINIMAL}trainer:\n  learning_rate: {text}\nobjective:\n  temperature: {text}\n")
    assert config.trainer["learning_rate"] == config.objective.temperature == 2e-5
    assert arguments_of(config).learning_rate == 2e-5


def test_names_that_look_a_little_like_numbers_stay_text(tmp_path):
    assert load(tmp_path, "model: 7e\nout: 1e5x\n").model == "7e"


def test_every_value_reaches_its_setting(tmp_path):
    config = load(
        tmp_path,
        MINIMAL
        + """
data:
  conversations: [a.json, b.jsonl]
  images: shards/{000..003}.tar
  on_error: skip
  max_length: 512
  video: {fps: 2}
stage: sft
num_voco_tokens: [1, 2, 8]
objective: {kind: mixed, teacher: some/teacher, weight: 0.25, temperature: 2}
lora: {r: 8, alpha: 16, dropout: 0}
liger: false
positions: compact
trainer: {max_steps: 7, bf16: true, lr_scheduler_type: cosine}
""",
    )
    assert config.data == DataConfig(
        conversations=(tmp_path / "a.json", tmp_path / "b.jsonl"),
        images=str(tmp_path / "shards/{000..003}.tar"),
        on_error="skip",
        max_length=512,
        video=VideoConfig(fps=2.0),
    )
    assert config.num_voco_tokens == (1, 2, 8)
    assert dataclasses.astuple(config.objective) == ("mixed", "some/teacher", 0.25, 2.0)
    assert config.lora == LoraConfig(8, 16, 0.0)
    assert (config.liger, config.positions) == (False, "compact")
    assert config.trainer == {"max_steps": 7, "bf16": True, "lr_scheduler_type": "cosine"}


def test_a_single_value_is_a_list_of_one(tmp_path):
    config = load(tmp_path, f"{MINIMAL}num_voco_tokens: 4\ndata:\n  conversations: a.json\n")
    assert config.num_voco_tokens == (4,)
    assert config.data.conversations == (tmp_path / "a.json",)


def test_the_same_number_twice_is_one_number(tmp_path):
    assert load(tmp_path, f"{MINIMAL}num_voco_tokens: [2, 2]\nsystem: avg_pool\n").num_voco_tokens == (2, 2)


def test_paths_are_relative_to_the_file_and_what_is_no_folder_there_is_a_name_on_the_hub(tmp_path):
    (tmp_path / "base").mkdir()
    teacher = "objective: {kind: distill, teacher: ../base}\n"
    inner = tmp_path / "configs"
    inner.mkdir()
    config = load(inner, f"model: ../base\nout: ../runs/one\n{teacher}")
    assert config.model == config.objective.teacher == str(tmp_path / "base")
    assert config.out == tmp_path / "runs" / "one"
    assert load(inner, MINIMAL).model == "llava-hf/llava-1.5-7b-hf"
    assert load(inner, "model: /elsewhere/base\nout: /runs\n").out.as_posix() == "/runs"


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(tmp_path, "model: x\nout: ~/run\n").out == tmp_path / "run"


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_settings_written_down_are_the_same_settings(tmp_path_factory, data):
    config = TrainingConfig(
        model="some/model",
        out=tmp_path_factory.getbasetemp() / "out",
        data=data.draw(
            st.none()
            | st.builds(
                DataConfig,
                conversations=st.just((tmp_path_factory.getbasetemp() / "a.json",)),
                max_length=st.integers(1, 9999),
                video=st.builds(VideoConfig, fps=st.none() | st.floats(0.1, 30)),
            )
        ),
        num_voco_tokens=tuple(data.draw(st.lists(st.integers(1, 128), min_size=1, max_size=4))),
        lora=data.draw(st.none() | st.builds(LoraConfig, r=st.integers(1, 64), dropout=st.floats(0, 0.9))),
        liger=data.draw(st.sampled_from([True, False, "auto"])),
        trainer=data.draw(st.fixed_dictionaries({}, optional={"learning_rate": st.floats(1e-9, 1)})),
    )
    assert load(tmp_path_factory.getbasetemp(), yaml.safe_dump(config.to_dict())) == config


# ---- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stge: sft", "stge is no setting; did you mean stage?"),
        ("zzz: 1", "zzz is no setting$"),
        ("3: 1", "3 is no setting"),
        ("data: {images: x}", "data.conversations must be given, but is missing"),
        ("data: {conversations: a, max_lenght: 3}", "data.max_lenght is no setting; did you mean max_length?"),
        ("data: {conversations: a, max_length: many}", "data.max_length must be a whole number, but was 'many'"),
        ("data: {conversations: [3]}", "data.conversations must be a path, but was 3"),
        ("data: {conversations: a, max_length: 0}", "data.max_length must be at least 1, but was 0"),
        ("data: {conversations: a, video: {num_frames: 0}}", "data.video.num_frames at least 1, but were None and 0"),
        ("data: {conversations: a, video: {fps: 0}}", "data.video.fps must be above 0 .* but were 0.0 and None"),
        ("data: {conversations: a, video: {fps: .inf}}", "data.video.fps must be above 0 .* but were inf and None"),
        ("data: [a]", "data must be a mapping of conversations"),
        ("data: {conversations: a, video: {fps: 1, num_frames: 2}}", "data.video must have fps or num_frames"),
        ("stage: all", "stage must be 'align' or 'sft', but was 'all'"),
        ("num_voco_tokens: two", "num_voco_tokens must be a whole number, but was 'two'"),
        ("num_voco_tokens: true", "num_voco_tokens must be a whole number, but was True"),
        ("num_voco_tokens: 0", r"num_voco_tokens must be numbers of at least 1, but was \[0\]"),
        ("num_voco_tokens: []", r"num_voco_tokens must be numbers of at least 1, but was \[\]"),
        ("liger: perhaps", "liger must be true or false or 'auto', but was 'perhaps'"),
        ("lora: {r: 0}", "lora.r and lora.alpha must be at least 1"),
        ("lora: {alpha: 0}", "lora.r and lora.alpha must be at least 1"),
        ("lora: {dropout: 1.0}", "lora.dropout from 0 to below 1"),
        ("lora: {dropout: -0.1}", "lora.dropout from 0 to below 1"),
        ("lora: {}\nstage: align", "lora must be absent in stage 'align'"),
        ("system: vocoo", "system must be one of voco, upper_bound"),
        ("system: lower_bound", "it uses the weights of upper_bound"),
        ("system: avg_pool\nnum_voco_tokens: [1, 2]", r"num_voco_tokens must be one number for system 'avg_pool'"),
        ("objective: {kind: distil}", "objective.kind must be 'sft' or 'distill' or 'mixed', but was 'distil'"),
        ("objective: {kind: mixed, weight: 1}", "objective.weight must be between 0 and 1"),
        ("objective: {kind: mixed, weight: 0}", "objective.weight must be between 0 and 1"),
        ("objective: {kind: distill, temperature: 0}", "objective.temperature above 0"),
        ("objective: {kind: distill}\nstage: align", "objective.kind must be 'sft' for system 'voco' in stage 'align'"),
        ("objective: {kind: distill}\nsystem: upper_bound", "objective.kind must be 'sft' for system 'upper_bound'"),
        ("trainer: {learning_rat: 1}", "trainer.learning_rat is no argument .* did you mean learning_rate?"),
        ("trainer: {learning_rate: fast}", "trainer.learning_rate must be a number, but was 'fast'"),
        ("trainer: {learning_rate: true}", "trainer.learning_rate must be a number, but was True"),
        ("trainer: {max_steps: 1.5}", "trainer.max_steps must be a whole number, but was 1.5"),
        ("trainer: {bf16: 'yes'}", "trainer.bf16 must be true or false, but was 'yes'"),
        ("trainer: {output_dir: x}", r"trainer.output_dir must be absent \(the folder is `out`\), but was 'x'"),
        ("trainer: {label_smoothing_factor: 0.1}", "trainer.label_smoothing_factor must be absent"),
        ("trainer: [a]", "trainer must be a mapping"),
        ("model: [x]", "model must be text"),
    ],
)
def test_a_mistake_is_named(tmp_path, text, message):
    first = "" if text.startswith("model") else "model: x\n"
    with pytest.raises(ValueError, match=message):
        load(tmp_path, f"{first}out: y\n{text}\n")


def test_what_is_no_configuration_is_said(tmp_path):
    with pytest.raises(ValueError, match="model must be given, but is missing"):
        load(tmp_path, "out: x")
    with pytest.raises(ValueError, match="must hold keys and values, but holds list"):
        load(tmp_path, "- a")
    with pytest.raises(ValueError, match="must hold keys and values, but holds NoneType"):
        load(tmp_path, "")
    with pytest.raises(ValueError, match="must be YAML, but cannot be read: .* line 1"):
        load(tmp_path, "a: [")
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be YAML"):
        TrainingConfig.load(tmp_path / "config.yaml")
    with pytest.raises(FileNotFoundError, match="absent.yaml"):
        TrainingConfig.load(tmp_path / "absent.yaml")


# ---- arguments of the Trainer --------------------------------------------------------------------------------------------


def test_gradient_checkpointing_is_not_reentrant_under_either_of_its_names(tmp_path, recwarn):
    later = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    for name in ("gradient_checkpointing", *(["activation_checkpointing"] if later else [])):
        arguments = arguments_of(load(tmp_path, f"{MINIMAL}trainer: {{{name}: true}}"))
        assert arguments.gradient_checkpointing and arguments.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert not arguments_of(load(tmp_path, MINIMAL)).gradient_checkpointing
    assert not [warning for warning in recwarn if "deprecated" in str(warning.message)]


def test_the_run_decides_what_is_not_set(tmp_path):
    arguments = arguments_of(load(tmp_path, MINIMAL))
    assert (arguments.logging_steps, arguments.save_total_limit, arguments.report_to) == (10, 2, ["tensorboard"])
    arguments = arguments_of(load(tmp_path, f"{MINIMAL}trainer: {{logging_steps: 3, report_to: none}}"))
    assert (arguments.logging_steps, arguments.report_to) == (3, [])


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    """Trainer would split packed batches among them."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="one process must use one GPU, but this one sees 2: start it with `accelerate"):
        arguments_of(load(tmp_path, MINIMAL))


def test_the_kind_of_gradient_checkpointing_may_be_set(tmp_path):
    text = f"{MINIMAL}trainer: {{gradient_checkpointing: true, gradient_checkpointing_kwargs: {{use_reentrant: true}}}}"
    assert arguments_of(load(tmp_path, text)).gradient_checkpointing_kwargs == {"use_reentrant": True}


# ---- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(recipes()))
def test_a_recipe_loads_and_has_the_batch_that_it_states(tmp_path, name, monkeypatch):
    text = recipes()[name]
    config = load(tmp_path, text)
    trainer = config.trainer
    processes = 1 if "for one GPU" in text else int(re.search(r"Batches are for (\d+) GPUs", text)[1])
    stated = re.search(r"Batches are for [^=]*= (\d+) samples", text)
    one = trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"]
    assert processes * one == int(stated[1])
    assert config.out.parent == tmp_path / "out"
    assert title(text) and not title(text).startswith("#")
    # A GPU that is not here would be needed for bfloat16 in some versions.
    here = {key: value for key, value in trainer.items() if key not in ("bf16", "deepspeed")}
    arguments = arguments_of(dataclasses.replace(config, trainer=here))
    assert trainer["bf16"] and arguments.lr_scheduler_type == "cosine"
    assert arguments.get_warmup_steps(1000) == math.ceil(0.03 * 1000)


def test_recipes_for_zero3_get_it(tmp_path, monkeypatch):
    """What is started with zero3.yaml must have DeepSpeed's settings, or each GPU would hold the whole model."""
    given = {}

    class Fake:
        """Without DeepSpeed, which would act upon every model that is loaded afterwards."""

        __dataclass_fields__: ClassVar = TrainingArguments.__dataclass_fields__
        n_gpu = 0

        def __init__(self, **settings):
            given.update(settings)

    monkeypatch.setattr(run, "TrainingArguments", Fake)
    for name, text in recipes().items():
        given.clear()
        arguments_of(load(tmp_path, text))
        path = str(LAUNCH / "zero3.json") if "zero3.yaml" in text else None
        assert given.get("deepspeed") == path, name
    assert json.loads((LAUNCH / "zero3.json").read_text())["zero_optimization"]["stage"] == 3


def test_the_recipes_are_those_of_the_paper():
    shipped = {name: yaml.safe_load(text) for name, text in recipes().items()}
    assert set(shipped) == {"align", "finetune", "video", "lora", "distill"}
    finetune, align = shipped["finetune"], shipped["align"]
    assert float(finetune["trainer"]["learning_rate"]) == 2e-5 and finetune["trainer"]["num_train_epochs"] == 2
    assert finetune["stage"] == "sft" and finetune["data"]["max_length"] == 2048 and finetune["num_voco_tokens"] == 2
    assert finetune["trainer"]["bf16"] and finetune["trainer"]["gradient_checkpointing"]
    assert align["stage"] == "align" and float(align["trainer"]["learning_rate"]) == 1e-3
    assert align["trainer"]["num_train_epochs"] == 1
    assert shipped["video"]["data"]["video"] and shipped["video"]["positions"] == "compact"
    assert shipped["distill"]["objective"]["kind"] == "mixed" and "lora" in shipped["lora"]
