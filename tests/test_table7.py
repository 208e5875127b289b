"""Table 7: every system against a plain forward, what the gate catches, FLOPs against torch's counter, the command."""

import json
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import typer
from models import IMAGE, SPREAD, VISION, voco_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from typer.testing import CliRunner
from voco_llama.bench import cli, paper
from voco_llama.bench.measure import OURS, Comparison, Row
from voco_llama.bench.paper import FULL, NO_CACHE
from voco_llama.bench.results import Results, describe_machine, load
from voco_llama.bench.static import loader, plain_llama
from voco_llama.bench.systems import Questions, flops_of_question, plain_logits, truths
from voco_llama.bench.table7 import (
    ANSWER,
    DECODE,
    FIRST,
    FROM_HOST,
    MODELS,
    TARGETS,
    Measured,
    Model,
    Settings,
    compare_systems,
)

import bench.test_table7 as suite

CPU = torch.device("cpu")
TEXT, NEW, VOCO = 5, 4, 3
PREFIX = 1 + VISION  # BOS and the image


class Tiny(Model):
    """Random weights as MODELS have them, but large enough for images and attention to matter."""

    def build(self, device):
        model = super().build(device)
        with torch.no_grad():
            for x in model.model.multi_modal_projector.parameters():
                x.normal_(std=SPREAD)
        return model


def tiny(dtype=torch.float32) -> Tiny:
    return Tiny("tiny", lambda: voco_config(text={"num_hidden_layers": 3}), dtype, (1, VOCO))


@cache
def built(dtype=torch.float32):
    return tiny(dtype).build(CPU)


def systems_of(model, batch: int = 1) -> tuple[Questions, dict]:
    questions = Questions(model, plain_llama(model), batch, TEXT, NEW)
    return questions, {s.name: s for s in (questions.voco(VOCO), questions.full_caching(), questions.no_cache())}


def truth_of(questions, system, row: int = 0):
    (truth,) = truths(questions.model, [(questions.prompts(system.voco)[row], questions.pixels[row])])
    return truth


def logits_of(system, stored=None) -> torch.Tensor:
    system.ready.bind(system.ready.stored if stored is None else stored)()
    system.ready.run.first()
    return system.ready.run.logits


# ---- the gate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_rows_of_all_comparisons_pass_their_checks(dtype):
    settings = Settings(text=TEXT, new_tokens=NEW, requests=3, seconds=0.01)
    found = list(compare_systems(tiny(dtype), CPU, settings, lambda step: None))
    assert [c.task for c in found] == ["time to first token", f"time for {NEW} tokens", "decode of 3 requests"]
    assert settings.keys(CPU, "tiny") == [(c.suite, c.task, c.shape) for c in found]
    for comparison in found:
        names = ["voco 1", f"voco {VOCO}", FULL, NO_CACHE]
        assert [row.name for row in comparison.rows] == names[: 3 if comparison is found[-1] else 4]
        assert [row.role for row in comparison.rows[:3]] == ["ours", "ours", "peer"]
        assert all(row.status == "ok" and row.seconds and row.target is None for row in comparison.rows), comparison.rows
        json.dumps(comparison.as_rows(None), allow_nan=False)
    facts = found[-1].rows[1].facts
    # Keys and values of three layers with two heads of 16 numbers.
    assert facts["kv_bytes"] == 2 * 3 * 2 * 16 * VOCO * dtype.itemsize and facts["kv_bytes_of_all"] == 3 * facts["kv_bytes"]
    assert facts["kv_length"] == VOCO and facts["graphs"] is False and "targets" not in facts


@pytest.mark.parametrize("name", [f"voco {VOCO}", FULL, NO_CACHE])
def test_every_request_of_a_batch_is_its_own(name):
    questions, systems = systems_of(built(), batch=2)
    logits = logits_of(systems[name])
    for row in range(2):
        truth_of(questions, systems[name], row).check_logits(logits[row])
    with pytest.raises(AssertionError, match="off the plain forward"):
        truth_of(questions, systems[name], 1).check_logits(logits[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [f"voco {VOCO}", FULL, NO_CACHE])
def test_what_is_stored_decides(name, dtype):
    """Without it, the gate must fail, in either dtype."""
    questions, systems = systems_of(built(dtype))
    truth = truth_of(questions, systems[name])
    truth.check_logits(logits_of(systems[name])[0])
    nothing = [torch.zeros_like(x) for x in systems[name].ready.stored]
    with pytest.raises(AssertionError, match="off the plain forward"):
        truth.check_logits(logits_of(systems[name], nothing)[0])
    with pytest.raises(AssertionError, match="off the plain forward"):
        truth.check_logits(torch.full_like(truth.logits, float("nan")))


def test_rotation_is_part_of_the_injection():
    """VoCo keys are stored before RoPE; keys that are copied as they are make a wrong row."""
    questions, systems = systems_of(built())
    system = systems[f"voco {VOCO}"]
    logits_of(system)
    k = system.ready.stored[0]
    system.ready.run.memory.tensor[0, :, 0, :, :VOCO] = k.transpose(1, 2)
    system.ready.run.first()
    with pytest.raises(AssertionError, match="off the plain forward"):
        truth_of(questions, system).check_logits(system.ready.run.logits[0])


def test_every_token_of_an_answer_is_checked():
    questions, systems = systems_of(built())
    for system in systems.values():
        truth = truth_of(questions, system)
        system.ready.bind(system.ready.stored)()
        for _ in range(2):  # the second time from a cache that the first one filled
            tokens = system.ready.run.answer()[0]
            truth.check_answer(questions.model, tokens, system.ready.run.logits[0])
        assert IMAGE not in tokens  # behind one nothing is compared
        for place in range(NEW):
            other = tokens.clone()
            other[place] = (other[place] + 1) % 64
            with pytest.raises(AssertionError, match=f"token {place} of the answer"):
                truth.check_answer(questions.model, other, system.ready.run.logits[0])
        with pytest.raises(AssertionError, match="last logits"):
            truth.check_answer(questions.model, tokens, system.ready.run.logits[0] + 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_granted_what_the_rule_grants(dtype):
    """Twice the error of the plain forward and four roundings of the largest logit; an answer's logits four times that."""
    questions, systems = systems_of(built(dtype))
    system = systems[f"voco {VOCO}"]
    truth = truth_of(questions, system)
    prompt, pixels = questions.prompts(VOCO), questions.pixels
    wide = tiny(dtype).build(CPU).to(torch.float64 if dtype == torch.float32 else torch.float32)
    true, plain = (
        plain_logits(model, prompt[0], pixels[0])[0].double()
        for model in (wide, questions.model)
    )
    rule = float(2 * (plain - true).abs().max() + 4 * torch.finfo(dtype).eps * true.abs().max())
    assert truth.bound == pytest.approx(rule, rel=1e-3)
    off = torch.zeros_like(truth.logits)
    off[3] = rule
    truth.check_logits(truth.logits + 0.98 * off)
    with pytest.raises(AssertionError, match="off the plain forward"):
        truth.check_logits(truth.logits + 1.02 * off)

    system.ready.bind(system.ready.stored)()
    tokens = system.ready.run.answer()[0].clone()
    logits = plain_logits(questions.model, torch.cat([truth.ids, tokens[:-1]]), truth.pixels, NEW).double()
    truth.check_answer(questions.model, tokens, logits[-1] + 3.9 * off)
    with pytest.raises(AssertionError, match="last logits"):
        truth.check_answer(questions.model, tokens, logits[-1] + 4.1 * off)
    best, second = logits[-1].topk(2).values
    tokens[-1] = logits[-1].topk(2).indices[1]
    replace(truth, bound=float(best - second) / 3.9).check_answer(questions.model, tokens, logits[-1])
    with pytest.raises(AssertionError, match=f"token {NEW - 1} of the answer"):
        replace(truth, bound=float(best - second) / 4.1).check_answer(questions.model, tokens, logits[-1])


@pytest.mark.parametrize("name", [f"voco {VOCO}", FULL, NO_CACHE])
def test_questions_are_read_in_every_run(name):
    """Nothing of them is kept: another text in the same place has other logits, those of a plain forward."""
    questions, systems = systems_of(built())
    truth_of(questions, systems[name]).check_logits(logits_of(systems[name])[0])
    before = systems[name].ready.run.answer().clone()
    questions.text.copy_(questions.text.flip(1))
    truth_of(questions, systems[name]).check_logits(logits_of(systems[name])[0])
    assert not torch.equal(systems[name].ready.run.answer(), before)


def test_bytes_of_an_image_are_those_stored_of_each():
    _, systems = systems_of(built(), batch=3)
    for system in systems.values():
        stored = sum(x.nbytes for x in system.ready.stored) if system.cached else 0
        assert stored == 3 * system.kv_bytes, system.name


# ---- what is compared --------------------------------------------------------------------------------------------------


def test_a_system_without_room_leaves_the_others(monkeypatch):
    def no_room(self):
        raise torch.OutOfMemoryError("no room for it")

    monkeypatch.setattr(Questions, "_full_caching", no_room)
    settings = Settings(vocos=(VOCO,), text=TEXT, new_tokens=NEW, requests=2, seconds=0.01)
    found = list(compare_systems(tiny(), CPU, settings, lambda step: None))
    statuses = {"ours": "ok", FULL: "cannot run: no room for it", NO_CACHE: "ok"}
    assert len(found) == 3
    for comparison in found:
        for row in comparison.rows:
            assert row.status == statuses[row.role if row.role == OURS else row.name]


def test_targets_are_the_wanted_savings():
    """A system that takes t times as long as ours leaves ours a saving of 1 - 1 / t."""
    savings = {key: 1 - 1 / target for key, target in TARGETS.items()}
    assert savings == pytest.approx(
        {(FIRST, NO_CACHE): 0.75, (FIRST, FULL): 0, (FIRST + FROM_HOST, FULL): 0.6, (DECODE, FULL): 0.3}, abs=1e-4
    )


@pytest.mark.parametrize("aimed", [True, False])
def test_targets_stand_at_the_rows_they_are_about(monkeypatch, aimed):
    """The tasks of a GPU; what would be timed is only described here."""
    settings = Settings(vocos=(VOCO,), text=TEXT, new_tokens=NEW, requests=2)
    measured = Measured(replace(tiny(), targets=aimed), built(), settings, SimpleNamespace(device=CPU), lambda step: None)
    monkeypatch.setattr("voco_llama.bench.table7.places_on", lambda device: ("", FROM_HOST))
    monkeypatch.setattr(Measured, "_compare", lambda self, task, candidates: (task, candidates))
    found = dict([*measured.single((VOCO,)), measured.batched((VOCO,))])
    targets = {(task, c.name): c.target for task, candidates in found.items() for c in candidates if c.target is not None}
    first, host = FIRST, FIRST + FROM_HOST
    wanted = {(first, NO_CACHE): 4.0, (first, FULL): 1.0, (host, FULL): 2.5, ("decode of 2 requests", FULL): 1.4286}
    assert targets == (wanted if aimed else {})
    assert list(found) == [first, host, ANSWER.format(NEW), ANSWER.format(NEW) + FROM_HOST, "decode of 2 requests"]
    assert all(("targets" in c.facts) == (aimed and c.role == OURS) for candidates in found.values() for c in candidates)


def test_a_later_run_measures_again_what_failed(monkeypatch):
    """And only that; a failure is reported when all is measured."""
    keys, results = Settings().keys(CPU, "demo"), Results(None, describe_machine(CPU))
    status, made = "cannot run: no room", []

    def comparisons(device, model, settings):
        for i, key in enumerate(keys):
            made.append(key)
            row = Row("voco 1", status if i == 0 else "ok", role=OURS)
            row.seconds = [float(len(made))] if row.status == "ok" else []
            yield Comparison(*key, [row])

    def measures() -> bool:
        session = SimpleNamespace(seconds=1.0, results=results)
        try:
            suite.test_table7(SimpleNamespace(), "demo", CPU, session, results.add)
        except pytest.skip.Exception:
            return False
        return True

    def times():
        return [(row["task"], row["p50_ms"]) for row in results.content["rows"]]

    monkeypatch.setattr(suite, "comparisons", comparisons)
    first, second, third = (task for _, task, _ in keys)
    with pytest.raises(AssertionError, match=f"{first}, voco 1: cannot run: no room"):
        measures()
    assert times() == [(first, None), (second, 2000), (third, 3000)]
    status = "ok"
    assert measures()
    assert sorted(times()) == sorted([(first, 4000), (second, 2000), (third, 3000)])
    assert not measures() and len(made) == 6


# ---- what a CUDA graph needs -------------------------------------------------------------------------------------------


class OnOneDevice(TorchDispatchMode):
    """Fails where an operation takes or makes a tensor on another device than "meta"."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            assert not isinstance(x, torch.Tensor) or x.device.type == "meta", func
        return result


@pytest.mark.parametrize("model", [tiny(), MODELS["llama3-8b"]], ids=lambda model: model.name)
def test_nothing_that_a_graph_cannot_hold(model):
    """The device "meta" has no values that Python could read, and no copies from the host are made."""
    model = model.build(torch.device("meta"))
    questions = Questions(model, plain_llama(model), 2, TEXT, NEW)
    for run in (questions.no_cache().ready.run, questions._run(VOCO)):
        with OnOneDevice():
            run.first()
            run.step()
            run.rewind(questions.next)


def test_kernels_are_few_and_masks_are_aligned():
    """One kernel for a norm, and rows of masks in whole 16 bytes; slots are no more than that takes."""
    llama = plain_llama(built())
    assert not any(isinstance(x, LlamaRMSNorm) for x in llama.modules())
    assert sum(isinstance(x, torch.nn.RMSNorm) for x in llama.modules()) == 2 * 3 + 1
    for dtype in (torch.float32, torch.bfloat16):
        for text in (5, 6, 7):
            questions = Questions(built(dtype), llama, 1, text, NEW)
            slots = questions._run(VOCO).memory.slots
            assert slots * dtype.itemsize % 16 == 0 and 0 <= slots - (VOCO + text + NEW) < 16


@pytest.mark.parametrize("name", [f"voco {VOCO}", FULL, NO_CACHE])
def test_runs_stay_in_place(name):
    """A graph reads and writes the memory that it was captured with."""
    _, systems = systems_of(built())
    run = systems[name].ready.run
    layers = run.memory.cache.layers
    expected = [x.data_ptr() for side in run.memory.tensor for x in side]
    logits_of(systems[name])
    run.step()
    assert [x.data_ptr() for kind in ("keys", "values") for x in (getattr(layer, kind) for layer in layers)] == expected
    # Behind the first token and one more.
    length = (VOCO if name == f"voco {VOCO}" else PREFIX) + TEXT + 1
    assert run.memory.lengths.tolist() == [length] * 3 == [int(layer.get_seq_length()) for layer in layers]


def test_caches_in_host_memory(monkeypatch):
    """What a GPU copies from pinned memory; here memory that nobody pins."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x.clone())
    _, systems = systems_of(built())
    for system in systems.values():
        expected = logits_of(system).clone()
        system.ready.run.memory.tensor.zero_()
        load = loader(system.ready.stored, system.ready.bind, from_host=True)
        for x in system.ready.stored:
            x.zero_()  # no longer the source
        load()
        system.ready.run.first()
        assert torch.equal(system.ready.run.logits, expected)


# ---- FLOPs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"voco {VOCO}", FULL, NO_CACHE])
def test_flops_against_the_counter_of_torch(name):
    """The whole question, in SDPA's plain matmuls, which torch counts.

    These compute every pair of a query and a slot of the static cache, or of a query and a new token where the cache is
    empty, while the formula counts those that the causal mask allows; the difference is counted here. transformers makes
    the angles of RoPE with a matmul, which no paper counts.
    """
    model = built()
    _, systems = systems_of(model)
    system, config = systems[name], model.config
    image = 0 if system.cached else PREFIX
    new, slots = image + TEXT, system.ready.run.memory.slots
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits_of(system)
    executed = new * (new if image else slots)
    useful = new * system.cached + new * (new + 1) // 2
    text = config.text_config
    more = 4 * (executed - useful) * text.num_attention_heads * 16 * text.num_hidden_layers
    to_first, to_second = (flops_of_question(config, system.cached, image, TEXT, tokens) for tokens in (1, 2))
    assert counter.get_total_flops() - (to_first + more) in (0, 2 * new * 16 // 2)
    # And of one more token.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        system.ready.run.step()
    more = 4 * (slots - system.cached - new - 1) * text.num_attention_heads * 16 * text.num_hidden_layers
    assert counter.get_total_flops() - (to_second - to_first + more) in (0, 2 * 16 // 2)


def test_large_models_have_the_shapes_they_are_named_after():
    llava, llama3 = (MODELS[name].build(torch.device("meta")) for name in ("llava-7b", "llama3-8b"))
    assert sum(x.numel() for x in llava.parameters()) == 7_063_427_072
    assert sum(x.numel() for m in (llama3.model.language_model, llama3.lm_head) for x in m.parameters()) == 8_030_261_248
    assert {x.dtype for x in llava.parameters()} == {torch.bfloat16}
    assert llava.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    # The paper's own reductions, from its own numbers.
    base, full, ours = paper.TABLE7.values()
    assert round(1 - ours["time_ms"] / base["time_ms"], 3) == 0.696 and round(1 - ours["flops"] / base["flops"], 3) == 0.948
    assert round(1 - ours["kv_bytes"] / full["kv_bytes"], 3) == 0.998


# ---- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def table7():
    """A function that runs `voco bench table7 ...`."""
    app = typer.Typer()
    app.add_typer(cli.app, name="bench")
    app.callback()(lambda: None)

    def run(*arguments: str):
        return CliRunner().invoke(app, ["bench", "table7", "--device", "cpu", *arguments])

    return run


def test_command(table7, tmp_path, monkeypatch):
    short = ("--seconds", "0.01", "--new-tokens", "3", "--text", "6", "--voco", "2")
    done = table7(*short, "--json", "--out", str(tmp_path / "results.json"))
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content == load(tmp_path / "results.json") and {row["status"] for row in content["rows"]} == {"ok"}
    assert {row["shape"] for row in content["rows"]} == {"demo, 6 text tokens"}
    monkeypatch.setattr(cli, "_measured", lambda *arguments: content)
    done = table7(*short)
    assert done.exit_code == 0, done.output
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    # Two tokens of four layers with two heads of 32 numbers, keys and values, as a full cache has 65 of.
    assert ["K/V length", "0", "65", "2"] in lines and ["K/V, MB", "0", "0.133", "0.00410"] in lines
    assert ["time, ms", "440.5", "154.9", "134.0"] in lines and ["- against no cache, %", "", "-64.8", "-69.6"] in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "tpu"), "--device must be cpu or cuda, but was tpu"),
        (("--voco", "2", "--voco", "2"), "vocos must be different numbers"),
        (("--new-tokens", "1"), "new_tokens must be at least 2"),
        (("--text", "2000"), "must fit the model's context of 1024 positions"),
        (("--seconds", "0"), "seconds must be positive"),
        (("--out", "no/such/folder.json"), "--out must be a file in a folder that exists"),
    ],
)
def test_mistakes_of_the_caller(table7, arguments, message):
    done = table7(*arguments)
    assert isinstance(done.exception, ValueError) and message in str(done.exception)


def test_the_command_knows_every_model():
    assert [name.value for name in cli.Name] == list(MODELS)
