"""Training in two processes on CPUs: the losses and weights of one process, whichever way the work is shared out."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate.commands.config.config_args import load_config_from_file
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from training_worker import configured, loaded, run
from transformers.integrations import deepspeed as integration
from voco_llama import VocoLlavaForConditionalGeneration
from voco_llama.training import distributed
from voco_llama.training.launch import LAUNCH
from voco_llama.training.run import arguments_of

WORKER = Path(__file__).with_name("training_worker.py")
ZERO3 = LAUNCH / "zero3.json"
# A batch of rank 0 without images in the second step; in the third, rank 1 has no records left.
RECORDS = {"count": 10, "text_only": [3, 4, 5]}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = models.voco_llava()
    model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return str(folder)


def job(base: str, out: Path, trainer: dict | None = None, **options) -> dict:
    return {"records": RECORDS, "model": base, "out": str(out), "trainer": {"use_cpu": True, **(trainer or {})}, **options}


def alone(base: str, out: Path, trainer: dict | None = None, **options) -> dict:
    """The same in one process, with batches of the same size in all."""
    found = run(**job(base, out, {"per_device_train_batch_size": 4, **(trainer or {})}, **options))
    assert found["error"] is None
    return found


def processes(folder: Path, jobs: dict, count: int = 2, seconds: int = 300, environment: dict | None = None) -> list:
    """What each of several processes found; none of them is left behind."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    paths = os.pathsep.join([str(WORKER.parent), str(WORKER.parents[1]), str(WORKER.parents[1] / "python")])
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    process = subprocess.Popen(
        [*command, str(WORKER), str(file)],
        env={**os.environ, **own, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            # The launcher's workers have sessions of their own; it ends them when it is asked to end.
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-4000:]
    return [json.loads(file.with_suffix(f".{rank}").read_text()) for rank in range(count)]


def assert_losses(found: list, expected: list) -> None:
    assert [step for step, _ in found] == [step for step, _ in expected]
    for (_, loss), (_, wanted) in zip(found, expected):
        assert loss == pytest.approx(wanted, rel=1e-5)


def assert_agree(found: list[dict], expected: dict, one: Path, other: Path) -> None:
    """Equal losses, and equal weights that load."""
    for process in found:
        assert process["error"] is None
        assert_losses(process["losses"], expected["losses"])
    asked = sorted(i for process in found for i in process["asked"])
    assert asked == sorted(2 * list(range(RECORDS["count"])))
    weights, truth = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert weights.keys() == truth.keys()
    for name, x in truth.items():
        torch.testing.assert_close(weights[name], x, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    VocoLlavaForConditionalGeneration.from_pretrained(one / "model")


def parts_of_the_loss(out: Path) -> list[dict]:
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{part: entry[part] for part in ("sft", "kl") if part in entry} for entry in log]


# ---- DDP and ZeRO-3 ------------------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "checkpointed": {"trainer": {"gradient_checkpointing": True}},
    "lora": {"lora": {"r": 4, "alpha": 8, "dropout": 0.0}},
    "self": {"objective": {"kind": "mixed"}},
    "teacher": {"objective": {"kind": "distill", "teacher": None}},
}


def variant(name: str, base: str, extra: dict) -> dict:
    options = dict(VARIANTS[name])
    if "teacher" in options.get("objective", {}):
        options["objective"] = {**options["objective"], "teacher": base}
    return {**options, "trainer": {**options.get("trainer", {}), **extra}}


@pytest.mark.full
@pytest.mark.parametrize("kind", ["ddp", "zero3"])
def test_two_processes_train_as_one_does(base, tmp_path, kind):
    extra = {"deepspeed": str(ZERO3)} if kind == "zero3" else {}
    jobs = [job(base, tmp_path / name, **variant(name, base, extra)) for name in VARIANTS]
    found = processes(tmp_path, {"runs": jobs}, seconds=500)
    for i, name in enumerate(VARIANTS):
        one = tmp_path / f"{name}-alone"
        expected = alone(base, one, **variant(name, base, {}))
        assert_agree([process[i] for process in found], expected, tmp_path / name, one)
        for entry, wanted in zip(parts_of_the_loss(tmp_path / name), parts_of_the_loss(one), strict=True):
            assert entry == pytest.approx(wanted, rel=1e-4), name


@pytest.mark.full
@pytest.mark.parametrize("kind", ["ddp", "zero3"])
def test_two_processes_go_on_after_a_kill(base, tmp_path, kind):
    extra = {"save_strategy": "steps", "save_steps": 2}
    extra |= {"deepspeed": str(ZERO3)} if kind == "zero3" else {}
    stopped = job(base, tmp_path / "out", extra, stop_at=5)  # within the second epoch, after a checkpoint in it
    jobs = [stopped, job(base, tmp_path / "out", extra)]
    found = processes(tmp_path, {"runs": jobs})
    expected = alone(base, tmp_path / "alone")
    for first, second in found:
        assert (first["error"], second["error"]) == ("killed", None)
        assert_losses(second["losses"], expected["losses"])
    weights, truth = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("out", "alone"))
    for name, x in truth.items():
        torch.testing.assert_close(weights[name], x, rtol=1e-4, atol=1e-5)


# ---- FSDP2 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_fully_sharded_layers_train_as_whole_ones_do(base, tmp_path):
    out = tmp_path / "shards"
    found = processes(tmp_path, {"shards": {"model": base, "out": str(out), "steps": 3}})
    for process in found:
        for loss, wanted in process["losses"]:
            assert loss == pytest.approx(wanted, rel=1e-5)
        assert max(process["apart"]) < 1e-4
        assert process["reloaded"]
    whole, full = loaded(base), torch.load(f"{out}.pt", weights_only=True)
    assert sum(process["numel"] for process in found) == sum(x.numel() for x in whole.parameters())
    state = whole.state_dict()
    assert any(not torch.equal(x, full[name]) for name, x in state.items())
    dcp.load(state, checkpoint_id=str(out), no_dist=True)  # of one process
    for name, x in state.items():
        assert torch.equal(x, full[name]), name


# ---- what was asked for --------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_fsdp_that_is_ddp_is_refused(base, tmp_path):
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    jobs = [job(base, tmp_path / "asked", {"fsdp": True, "fsdp_config": config})]
    for process in processes(tmp_path, {"runs": jobs}):
        assert process[0]["error"].startswith("RuntimeError: training must be distributed by FSDP, as trainer.fsdp asks")
    assert not (tmp_path / "asked" / "run.json").exists()


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "WORLD_SIZE"])
def test_what_the_launcher_asks_for_is_kept(base, tmp_path, monkeypatch, variable):
    arguments = arguments_of(configured(base, str(tmp_path / "out"), {"use_cpu": True}))
    monkeypatch.setenv(variable, {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}[variable])

    class Trainer:
        args = arguments

        class accelerator:
            distributed_type, num_processes = distributed.DistributedType.NO, 1

    with pytest.raises(RuntimeError, match=variable):
        distributed.check(Trainer())
    monkeypatch.delenv(variable)
    distributed.check(Trainer())


# ---- data ----------------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 60), batch=st.integers(1, 5), ranks=st.integers(1, 4), epoch=st.integers(0, 3))
def test_every_record_is_used_once_in_an_epoch(size, batch, ranks, epoch):
    order = distributed.Order(size, batch * ranks, seed=7)
    order.set_epoch(epoch)
    found = list(order)
    assert len(found) == len(order) and len(order) % (batch * ranks) == 0 and len(order) - size < batch * ranks
    assert sorted(found[:size]) == list(range(size)) and set(found[size:]) <= {size}
    one = distributed.Order(size, 1, seed=7)
    one.set_epoch(epoch)
    # Drawn anew in each epoch, and the same in every run and version: a run that goes on depends on it.
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(7 + epoch)).tolist()
    assert list(one) == found[:size] == drawn


@pytest.mark.parametrize("taken", [(3, 4), (0, 1), (1, 0), (0, 2), (2, 1), (0, 5)])
def test_what_fills_an_epoch_is_text_without_labels(taken):
    image, voco = taken
    filled = distributed.Filled(["record"], models.voco_config(image_token_id=image, voco_token_id=voco))
    assert len(filled) == 1 and filled[0] == "record"
    assert filled[1]["labels"].tolist() == [-100] and filled[1]["input_ids"].shape == (1,)
    assert filled[1]["input_ids"].item() not in taken


def test_teachers_are_whole_and_what_follows_is_split_again():
    class Zero3:
        def is_zero3(self):
            return True

    asked = Zero3()
    integration.set_hf_deepspeed_config(asked)
    try:
        with pytest.raises(OSError), distributed.whole_weights():
            assert not integration.is_deepspeed_zero3_enabled()
            raise OSError
        assert integration.is_deepspeed_zero3_enabled()
    finally:
        integration.unset_hf_deepspeed_config()


def test_two_processes_share_the_records(base, tmp_path):
    found = processes(tmp_path, {"runs": [job(base, tmp_path / "out", {"num_train_epochs": 1})]})
    first, second = (process[0] for process in found)
    assert first["error"] is None and second["error"] is None
    assert sorted(first["asked"] + second["asked"]) == list(range(RECORDS["count"]))
    assert len(first["asked"]) == 6 and len(second["asked"]) == 4
    expected = alone(base, tmp_path / "alone", {"num_train_epochs": 1})
    # What fills the last step weighs nothing, and VoCo counts are drawn as in one process, or losses would differ.
    assert_losses(first["losses"], expected["losses"])


# ---- what is shipped -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero3", "MULTI_GPU")]
)
def test_accelerate_reads_the_configurations(name, kind):
    found = load_config_from_file(str(LAUNCH / f"{name}.yaml"))  # refuses keys that it does not know
    assert (found.distributed_type.value, found.num_processes, found.mixed_precision) == (kind, 8, "bf16")
