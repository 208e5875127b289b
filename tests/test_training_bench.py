"""The training step that is measured: lengths, batches, recipes against the truth, FLOPs, and what follows from a row."""

import sys
from collections import Counter
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from reference import OPEN, assert_error_rule, mask_of_layout
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama
from voco_llama.bench import derived as rates

import bench.training_problem as problem_module
from bench.lengths import LONGEST, QUANTILES, SHORTEST, length_at, text_lengths
from bench.training_problem import (
    GRADIENT_EPS,
    INPUTS,
    LOSS,
    LOSS_EPS,
    Problem,
    Training,
    Truth,
    assert_agree,
    fitted,
    gate_shape,
    layers_that_fit,
    step_flops,
    verdicts_on,
)
from bench.training_recipes import (
    BUILT,
    FLEX,
    GROUPED,
    OURS,
    RANDOM,
    SEVEN_B,
    SMALL,
    Pool,
    Recipe,
    alone,
    bins_of,
    dense_mask,
    recipes_of,
)
from voco_kernels import VocoLayout

CPU = torch.device("cpu")
TINY = replace(
    SMALL,
    hidden=64,
    heads=2,
    intermediate=96,
    vocab=50,
    vision=9,
    text_divisor=20,
    samples=7,
    batch=3,
    capacity=60,
    targets={GROUPED: 1.5, RANDOM: 2.5},
    mfu_target=0.3,
)


EPS = torch.finfo(torch.float32).eps


def uncompiled(function, **options):
    return function


@pytest.fixture(scope="module")
def training() -> Training:
    return Training.of(Pool(TINY, CPU, torch.float32))


@pytest.fixture(scope="module")
def recipes(training) -> dict[str, Recipe]:
    return {recipe.name: recipe for recipe in recipes_of(training.pool, uncompiled)}


@pytest.fixture(scope="module")
def truth(training) -> Truth:
    return Truth(training)


# ---- lengths -----------------------------------------------------------------------------------------------------------


def test_lengths_follow_the_committed_distribution():
    lengths = text_lengths(2000)
    assert min(lengths) >= SHORTEST and max(lengths) <= LONGEST and max(lengths) > 0.95 * LONGEST
    for share, bound in QUANTILES:
        assert sum(length <= bound for length in lengths) / 2000 == pytest.approx(share, abs=0.01)
    assert (length_at(0), length_at(0.25), length_at(1)) == (30, 120, 800)


def test_lengths_are_the_same_everywhere():
    assert text_lengths(12) == [132, 245, 178, 108, 282, 658, 155, 344, 82, 208, 55, 433]
    assert text_lengths(12, seed=1) != text_lengths(12)
    assert sorted(text_lengths(12, seed=1)) == sorted(text_lengths(12))


def test_lengths_refuse_what_they_cannot_be_of():
    with pytest.raises(ValueError, match="samples must be at least 1, but was 0"):
        text_lengths(0)
    with pytest.raises(ValueError, match=r"share must be 0 to 1, but was 1\.5"):
        length_at(1.5)


# ---- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SEVEN_B, SMALL, gate_shape(SEVEN_B), gate_shape(SMALL), TINY], ids=lambda s: s.name)
def test_every_recipe_trains_every_token_once(shape):
    """Narrow models: what is looked at does not depend on the width."""
    pool = Pool(replace(shape, hidden=2), CPU, torch.float32)
    assert pool.tokens == sum(pool.lengths) and pool.labelled == sum(text.length for _, text in pool.documents)
    for recipe in [*recipes_of(pool, uncompiled), alone(pool)]:
        assert len(recipe.batches) >= 2
        assert sorted(i for batch in recipe.batches for i in batch.samples) == list(range(shape.samples))
        seen = torch.cat([batch.index[batch.valid] for batch in recipe.batches])
        assert torch.equal(seen.sort().values, torch.arange(pool.tokens))
        for batch in recipe.batches:
            assert torch.equal(batch.positions[batch.valid], pool.positions[batch.index[batch.valid]])
            # Each place predicts the target of the token that stands there.
            assert torch.equal(batch.targets, pool.targets[batch.index.flatten()[batch.labelled]])
            assert batch.valid.flatten()[batch.labelled].all()
        assert sum(len(batch.targets) for batch in recipe.batches) == pool.labelled


def test_targets_are_the_text():
    """[vision vision VoCo text text]: the VoCo token predicts the first text token, the last one nothing."""
    shape = replace(TINY, vision=2, voco=1, text_divisor=95, samples=1, hidden=2)
    pool = Pool(shape, CPU, torch.float32)
    assert pool.lengths == [5]
    assert (pool.targets >= 0).tolist() == [False, False, True, True, False]


def test_packing_fills_rows_evenly():
    lengths = [image.vision + image.voco + text.length for image, text in SEVEN_B.documents]
    bins = bins_of(lengths, SEVEN_B.capacity)
    assert sorted(i for row in bins for i in row) == list(range(64))
    filled = [sum(lengths[i] for i in row) for row in bins]
    assert len(bins) == -(-sum(lengths) // SEVEN_B.capacity) and max(filled) <= SEVEN_B.capacity
    assert max(filled) - min(filled) < min(lengths)
    # Three samples of 6 fit into two rows of 10 by their sum only.
    assert sorted(map(len, bins_of([6, 6, 6], 10))) == [1, 1, 1]
    with pytest.raises(ValueError, match="capacity must be at least the longest sample's 6 tokens, but was 5"):
        bins_of([3, 6], 5)


def test_padding_is_what_rows_are_filled_up_with():
    pool = Pool(replace(SEVEN_B, hidden=2), CPU, torch.float32)
    slots = {recipe.name: recipe.slots for recipe in recipes_of(pool, uncompiled)}
    by_length, as_they_come = sorted(pool.lengths), pool.lengths
    for name, order in ((GROUPED, by_length), (RANDOM, as_they_come)):
        assert slots[name] == sum(16 * max(order[begin : begin + 16]) for begin in range(0, 64, 16))
    assert slots[OURS] == slots[BUILT] == pool.tokens
    assert pool.tokens < slots[FLEX] < pool.tokens + 4 * (128 + min(pool.lengths))
    assert slots[FLEX] < slots[GROUPED] < slots[RANDOM]


def test_what_a_layout_costs_is_paid_where_the_row_says_so(recipes):
    """A data loader hands over layouts with their tiles; the second row makes a bare one in every step."""
    (kept, again), (new, other) = (
        [recipes[name].made(recipes[name].batches[0])["voco_layout"] for _ in range(2)] for name in (OURS, BUILT)
    )
    assert kept is again and kept.tiles is not None
    assert new is not other and new is not kept and new.tiles is None
    assert (mask_of_layout(new) == mask_of_layout(kept)).all()


# ---- masks -------------------------------------------------------------------------------------------------------------


def test_dense_masks_are_those_of_the_reference(training, recipes):
    for batch in recipes[RANDOM].batches:
        mask, width = dense_mask(batch, TINY), batch.index.shape[1]
        assert mask.shape == (len(batch.samples), 1, width, width)
        for row, document in enumerate(batch.documents):
            layout = VocoLayout.from_spans([document], isolated=True)
            expected = torch.eye(width, dtype=torch.bool)
            expected[: layout.num_tokens, : layout.num_tokens] |= torch.from_numpy(mask_of_layout(layout))
            assert torch.equal(mask[row, 0], expected)


# ---- recipes against the truth -----------------------------------------------------------------------------------------


def test_all_recipes_train_the_same(training, recipes):
    verdicts = verdicts_on(training, list(recipes.values()))
    assert set(verdicts.values()) == {None} and len(verdicts) == 10


def test_flex_attention_has_the_same_loss(training, recipes, truth):
    """A CPU has no backward for it."""
    with torch.no_grad():
        loss = sum(training.loss(recipes[FLEX], batch)[0] for batch in recipes[FLEX].batches)
    assert_error_rule("loss", loss[None], truth.eager["loss"], truth.x64["loss"], [OPEN])
    assert recipes[FLEX].absent == "FlexAttention has no backward on a CPU"


def causal(batch):
    token = torch.arange(batch.index.shape[1])
    return {"attention_mask": (token[None, :] <= token[:, None]).expand(len(batch.index), 1, -1, -1)}


def no_documents(batch):
    """Packed samples that see each other."""
    spans = [span for document in batch.documents for span in document]
    return {"voco_layout": VocoLayout.from_spans([spans], isolated=True)}


def wrong_recipes(recipes: dict[str, Recipe]) -> dict[str, Recipe]:
    ours, padded = recipes[OURS], recipes[RANDOM]
    return {
        "causal": replace(padded, made=causal),
        "no documents": replace(ours, made=no_documents),
        "a batch lost": replace(ours, batches=ours.batches[1:]),
        "a batch twice": replace(ours, batches=[*ours.batches, ours.batches[0]]),
        "wrong positions": replace(
            ours, batches=[replace(batch, positions=batch.positions // 2) for batch in ours.batches]
        ),
    }


@pytest.mark.parametrize("defect", ["causal", "no documents", "a batch lost", "a batch twice", "wrong positions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_recipe_is_caught(defect, dtype):
    """Also in bfloat16, whose rounding hides more."""
    training = Training.of(Pool(replace(TINY, vision=20, text_divisor=10, capacity=160), CPU, dtype))
    recipes = {recipe.name: recipe for recipe in recipes_of(training.pool, uncompiled)}
    assert set(verdicts_on(training, [recipes[OURS], recipes[RANDOM]]).values()) == {None}
    wrong = wrong_recipes(recipes)[defect]
    assert all(isinstance(verdict, AssertionError) for verdict in verdicts_on(training, [wrong]).values())
    # And by what full sizes are held to.
    first, lengths = training.gradients(recipes[OURS]), training.pool.lengths
    assert_agree(training.gradients(recipes[RANDOM]), first, lengths)
    with pytest.raises(AssertionError, match="off the first recipe's"):
        assert_agree(training.gradients(wrong), first, lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agreement_is_granted_little(dtype):
    """By hand: a loss, a weight, and two samples of inputs, the first of them short."""
    eps = torch.finfo(dtype).eps
    first = {LOSS: torch.tensor([4.0]), "weight": torch.ones(3, 3), INPUTS: torch.tensor([[1.0], [100.0], [100.0]])}
    first = {name: x.to(dtype) for name, x in first.items()}
    assert (LOSS_EPS, GRADIENT_EPS) == (4, 32)
    assert_agree(first, first, [1, 2])
    for name, granted in ((LOSS, 4), ("weight", 32), (INPUTS, 32)):
        for factor in (granted - 2, granted + 2, float("nan")):
            x = first[name].clone()
            (x[:1] if name == INPUTS else x).mul_(1 + factor * eps)
            if factor == granted - 2:
                assert_agree(first | {name: x}, first, [1, 2])
                continue
            with pytest.raises(AssertionError, match=f"{name}{' of sample 0' * (name == INPUTS)} is .* off"):
                assert_agree(first | {name: x}, first, [1, 2])


def test_a_recipe_that_cannot_run_says_why(training, recipes):
    def broken(batch):
        raise ZeroDivisionError("no mask today\nwith details")

    (verdict, _) = verdicts_on(training, [replace(recipes[OURS], made=broken)]).values()
    assert type(verdict) is RuntimeError and str(verdict) == "no mask today"


def test_a_step_does_all_the_work_and_changes_no_weight(training, recipes, truth):
    before = {name: x.clone() for name, x in training.model.named_parameters()}
    loss = training.step(recipes[OURS])
    assert_error_rule("loss", loss[None], truth.eager["loss"], truth.x64["loss"], [OPEN])
    for name, x in training.model.named_parameters():
        assert torch.equal(x, before[name]) and x.grad is None, name
    trained = [x for x, state in training._optimizer.state.items() if state["exp_avg"].abs().max() > 0]
    # All but the embeddings of tokens: inputs are embeddings already.
    assert len(trained) == len(before) - 1


@pytest.fixture
def fake_liger(monkeypatch):
    """Liger's functions in plain torch, counted: its kernels need a GPU."""
    calls = Counter()

    def counted(function):
        return lambda *args, **kwargs: calls.update([function.__name__]) or function(*args, **kwargs)

    def rms_norm(x, weight, eps):
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    def swiglu(gate, up):
        return torch.nn.functional.silu(gate) * up

    def fused_linear_cross_entropy(hidden, weight, targets, reduction):
        return torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction=reduction)

    functional, rope = ModuleType("liger_kernel.transformers.functional"), ModuleType("liger_kernel.transformers.rope")
    for function in (rms_norm, swiglu, fused_linear_cross_entropy):
        setattr(functional, f"liger_{function.__name__}", counted(function))
    rope.liger_rotary_pos_emb = counted(modeling_llama.apply_rotary_pos_emb)
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    monkeypatch.setitem(sys.modules, rope.__name__, rope)
    return calls


@pytest.mark.parametrize("checkpointed", [False, True])
def test_liger_runs_in_every_layer_and_leaves_no_patch_behind(training, recipes, truth, fake_liger, checkpointed):
    kept = modeling_llama.LlamaRMSNorm.forward, modeling_llama.LlamaMLP.forward, modeling_llama.apply_rotary_pos_emb
    with_liger = Training(training.model, training.pool, liger="0.8")
    truth.check(with_liger.gradients(recipes[OURS], checkpointed))
    batches, runs = len(recipes[OURS].batches), 1 + checkpointed
    assert fake_liger == {
        "rms_norm": batches * (2 * TINY.layers * runs + 1),
        "swiglu": batches * TINY.layers * runs,
        "apply_rotary_pos_emb": batches * TINY.layers * runs,
        "fused_linear_cross_entropy": batches,
    }
    assert kept == (
        modeling_llama.LlamaRMSNorm.forward, modeling_llama.LlamaMLP.forward, modeling_llama.apply_rotary_pos_emb
    )  # fmt: skip


# ---- FLOPs and memory --------------------------------------------------------------------------------------------------


def test_flops_are_those_that_torch_counts():
    """Eager attention computes all pairs."""
    config = replace(TINY, layers=3, heads=4).config()
    config.num_key_value_heads = 2
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")
    inputs = torch.randn(1, 21, TINY.hidden, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        model.lm_head(hidden[:, 5:9]).sum().backward()
    # Some versions of transformers multiply rotary angles as matrices.
    rotary = 2 * 21 * (TINY.hidden // 4 // 2)
    assert counter.get_total_flops() - step_flops(config, 21, 21 * 21, 4) in (0, rotary)


def test_model_flops_count_the_pairs_of_the_mask_and_labelled_logits(training):
    layouts = (VocoLayout.from_spans([document], isolated=True) for document in training.pool.documents)
    pairs = sum(int(mask_of_layout(layout).sum()) for layout in layouts)
    tokens, labelled = sum(training.pool.lengths), sum(text.length for _, text in training.pool.documents)
    weights = 4 * 64 * 64 + 3 * 64 * 96
    assert training.model_flops == 2 * (6 * tokens * weights + 12 * pairs * 2 * 32) + 6 * labelled * 64 * 50


def test_layers_keep_as_much_memory_as_is_reckoned_with():
    """Bytes that autograd keeps of a layer in bfloat16, as the difference of two models."""

    def kept_bytes(layers: int) -> tuple[int, int]:
        shape = replace(TINY, hidden=128, heads=2, intermediate=344)
        training = Training.of(Pool(shape, CPU, torch.bfloat16), layers)
        recipe = recipes_of(training.pool, uncompiled)[3]
        weights = {x.untyped_storage().data_ptr() for x in training.model.parameters()}
        kept = {}

        def keep(x):
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            training.loss(recipe, recipe.batches[0])
        return sum(storage.nbytes() for storage in kept.values()), recipe.batches[0].index.numel()

    (less, slots), (more, _) = kept_bytes(1), kept_bytes(3)
    reckoned = problem_module.HIDDEN_BYTES * 128 + problem_module.MLP_BYTES * 344
    assert (more - less) / 2 / slots == pytest.approx(reckoned, rel=0.1)


def test_layers_are_as_many_as_fit():
    shape = replace(SEVEN_B, hidden=2, intermediate=2, vocab=2)
    recipes = recipes_of(Pool(shape, CPU, torch.float32), uncompiled)
    layers = [layers_that_fit(SEVEN_B, recipes, gib * 2**30) for gib in (1, 40, 78, 139, 10000)]
    assert layers[0] == 1 and layers[-1] == SEVEN_B.layers and layers == sorted(set(layers))


def test_layers_are_halved_until_every_recipe_has_room(monkeypatch):
    tried = []

    def step(self, recipe, checkpointed=False):
        layers = self.model.config.num_hidden_layers
        tried.append((layers, recipe.name))
        if recipe.name == RANDOM and layers > 2:
            raise torch.OutOfMemoryError("no room")
        if recipe.name == BUILT:
            raise RuntimeError("found again when it is measured")

    monkeypatch.setattr(Training, "step", step)
    pool = Pool(replace(TINY, layers=5), CPU, torch.float32)
    recipes = recipes_of(pool, uncompiled)
    training = fitted(pool, recipes, free=10**12)
    assert training.model.config.num_hidden_layers == len(training.model.model.layers) == 2
    names = [recipe.name for recipe in recipes if recipe.absent is None]
    assert tried == [(layers, name) for layers in (5, 2) for name in names]


# ---- what is measured --------------------------------------------------------------------------------------------------


@pytest.fixture
def problem(monkeypatch) -> Problem:
    monkeypatch.setattr(problem_module, "SMALL", TINY)
    return Problem(CPU)


def test_candidates_are_checked_before_they_are_timed(problem):
    candidates = {candidate.name: candidate for candidate in problem.candidates(True)}
    assert list(candidates) == [OURS, GROUPED, RANDOM, FLEX] and candidates[FLEX].absent
    for name in (OURS, GROUPED, RANDOM):
        candidates[name].check(candidates[name].run())
    loss = candidates[OURS].run()
    candidates[RANDOM].check(loss * (1 + 3 * EPS))
    with pytest.raises(AssertionError, match="loss is .* off the first recipe's"):
        candidates[RANDOM].check(loss * (1 + 6 * EPS))
    with pytest.raises(AssertionError, match="loss is nan off"):
        candidates[RANDOM].check(torch.tensor(float("nan")))
    problem._verdicts[RANDOM, False] = AssertionError("not what it should be")
    with pytest.raises(AssertionError, match="not what it should be"):
        problem.candidates(False)[3].check(loss)


def test_the_mask_of_the_full_size_is_checked_too(problem):
    """A recipe that is right on the small model only; its loss would pass."""
    problem._recipes[3] = replace(problem._recipes[3], made=causal)
    ours, _, _, wrong, _ = problem.candidates(False)
    loss = ours.run()
    ours.check(loss)
    with pytest.raises(AssertionError, match="gradient of .* off the first recipe's"):
        wrong.check(loss)


def test_a_first_recipe_without_a_number_is_wrong_itself(problem):
    ours, _, _, padded, _ = problem.candidates(False)
    with pytest.raises(AssertionError, match="loss is nan off"):
        ours.check(torch.tensor(float("nan")))
    padded.check(padded.run())


def test_a_checkpointed_task_recomputes_every_layer(problem, monkeypatch):
    """Its gradients are right above; here, that what is timed is switched on and off."""
    layers = Counter()
    forward = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: layers.update([self]) or forward(self, x))
    for checkpointed, runs in ((False, 1), (True, 2), (False, 1)):
        layers.clear()
        candidate = problem.candidates(checkpointed)[0]
        candidate.run()
        assert list(layers.values()) == [runs * candidate.facts["micro_batches"]] * TINY.layers
        assert candidate.facts["checkpointing"] is checkpointed


def test_targets_are_those_of_the_shape(problem):
    for checkpointed in (False, True):
        for candidate in problem.candidates(checkpointed):
            assert candidate.target == {GROUPED: 1.5, RANDOM: 2.5}.get(candidate.name)
            wanted = 0.3 if candidate.name == OURS and not checkpointed else None
            assert candidate.facts["mfu_target"] == wanted, candidate.name


def test_facts_are_what_rates_follow_from(problem):
    ours, _, _, padded, _ = problem.candidates(False)
    assert ours.facts["useful_tokens"] == ours.facts["padded_tokens"] == Pool(TINY, CPU, torch.float32).tokens
    assert ours.facts["padding_share"] == 0 and ours.facts["peak_flops"] is None
    facts = padded.facts
    assert facts["padding_share"] == pytest.approx(1 - facts["useful_tokens"] / facts["padded_tokens"], abs=1e-4)
    assert facts["model_flops"] == problem.work.flops
    assert (facts["layers"], facts["micro_batches"], facts["checkpointing"], facts["liger"]) == (2, 3, False, None)
    assert "synthetic" in facts["text"]


def test_rates_of_a_row():
    facts = {"useful_tokens": 3000, "model_flops": 4e12, "peak_flops": 1e13}
    assert rates.derived({"facts": facts, "p50_ms": 500.0}) == {"tokens_per_s": 6000.0, "mfu": 0.8}
    assert rates.derived({"facts": facts | {"peak_flops": None}, "p50_ms": 500.0})["mfu"] is None
    assert rates.derived({"facts": facts, "p50_ms": None}) == {"tokens_per_s": None, "mfu": None}
    assert rates.derived({"facts": {"useful_tokens": 3}, "p50_ms": 500.0}) == {}


def test_peaks_are_those_of_known_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu = torch.device("cuda")
    # Dense: NVIDIA's data sheets print twice as much, with sparsity.
    a100 = "A100-SXM4-40GB", "A100-SXM4-80GB", "A100-PCIE-40GB", "A100 80GB PCIe"
    sold = {f"NVIDIA {name}": 312e12 for name in a100} | {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
    assert set(rates.PEAK_FLOPS) == set(sold)
    for name, peak in sold.items():
        assert rates.peak_flops(gpu, torch.bfloat16) == peak, name
    assert rates.peak_flops(gpu, torch.float32) is None and rates.peak_flops(CPU, torch.bfloat16) is None
    name = "NVIDIA H200 MIG 1g.18gb"
    assert rates.peak_flops(gpu, torch.bfloat16) is None
