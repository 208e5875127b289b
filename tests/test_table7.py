"""Table 7: every system against a plain forward, what the gate catches, FLOPs against torch's counter, the command."""

import json
from functools import cache

import pytest
import torch
import typer
from models import IMAGE, SPREAD, VISION, voco_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner
from voco_llama.bench import cli, paper
from voco_llama.bench.paper import FULL, NO_CACHE
from voco_llama.bench.results import load
from voco_llama.bench.static import loader, plain_llama
from voco_llama.bench.systems import Questions, flops_of_question, truths
from voco_llama.bench.table7 import MODELS, Model, Settings, compare_systems

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
    system.bind(system.stored if stored is None else stored)()
    system.run.first()
    return system.run.logits


# ---- the gate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_rows_of_all_comparisons_pass_their_checks(dtype):
    settings = Settings(text=TEXT, new_tokens=NEW, requests=3, seconds=0.01)
    found = list(compare_systems(tiny(dtype), CPU, settings, lambda step: None))
    assert [c.task for c in found] == ["time to first token", f"time for {NEW} tokens", "decode of 3 requests"]
    assert settings.last(CPU, "tiny") == (found[-1].suite, found[-1].task, found[-1].shape)
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
    nothing = [torch.zeros_like(x) for x in systems[name].stored]
    with pytest.raises(AssertionError, match="off the plain forward"):
        truth.check_logits(logits_of(systems[name], nothing)[0])
    with pytest.raises(AssertionError, match="off the plain forward"):
        truth.check_logits(torch.full_like(truth.logits, float("nan")))


def test_rotation_is_part_of_the_injection():
    """VoCo keys are stored before RoPE; keys that are copied as they are make a wrong row."""
    questions, systems = systems_of(built())
    system = systems[f"voco {VOCO}"]
    logits_of(system)
    k = system.stored[0]
    system.run.memory.tensor[0, :, 0, :, :VOCO] = k.transpose(1, 2)
    system.run.first()
    with pytest.raises(AssertionError, match="off the plain forward"):
        truth_of(questions, system).check_logits(system.run.logits[0])


def test_every_token_of_an_answer_is_checked():
    questions, systems = systems_of(built())
    for system in systems.values():
        truth = truth_of(questions, system)
        system.bind(system.stored)()
        for _ in range(2):  # the second time from a cache that the first one filled
            tokens = system.run.answer()[0]
            truth.check_answer(questions.model, tokens, system.run.logits[0])
        assert IMAGE not in tokens  # behind one nothing is compared
        for place in range(NEW):
            other = tokens.clone()
            other[place] = (other[place] + 1) % 64
            with pytest.raises(AssertionError, match=f"token {place} of the answer"):
                truth.check_answer(questions.model, other, system.run.logits[0])
        with pytest.raises(AssertionError, match="last logits"):
            truth.check_answer(questions.model, tokens, system.run.logits[0] + 1e-3)


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
    for run in (questions.no_cache().run, questions._run(VOCO)):
        with OnOneDevice():
            run.first()
            run.step()
            run.rewind(questions.next)


@pytest.mark.parametrize("name", [f"voco {VOCO}", FULL, NO_CACHE])
def test_runs_stay_in_place(name):
    """A graph reads and writes the memory that it was captured with."""
    _, systems = systems_of(built())
    run = systems[name].run
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
        system.run.memory.tensor.zero_()
        load = loader(system.stored, system.bind, from_host=True)
        for x in system.stored:
            x.zero_()  # no longer the source
        load()
        system.run.first()
        assert torch.equal(system.run.logits, expected)


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
    new, slots = image + TEXT, system.run.memory.slots
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
        system.run.step()
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
