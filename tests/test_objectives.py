"""Objectives of training against their plain formulas, document by document, in stock attention."""

import copy
import sys
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import VISION, VOCO, additive_mask, ids_of, llama, pixels, stock_of, twin, voco_llava
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.llama import modeling_llama
from voco_llama import VocoCollator
from voco_llama.training import objectives
from voco_llama.training.config import ObjectiveConfig

MIXED = ObjectiveConfig("mixed", weight=0.3, temperature=2.0)
CONFIGS = {
    "sft": ObjectiveConfig("sft"),
    "distill": ObjectiveConfig("distill"),
    "warm distill": ObjectiveConfig("distill", temperature=3.0),
    "mixed": MIXED,
}


# ---- losses of logits --------------------------------------------------------------------------------------------------


def plain_losses(logits, targets, aim, temperature: float) -> list[torch.Tensor]:
    """[cross-entropy, KL] of each token, written as in the papers."""
    entropy = -logits.softmax(-1)[torch.arange(len(targets)), targets].log()
    if aim is None:
        return [entropy]
    p, q = (aim / temperature).softmax(-1), (logits / temperature).softmax(-1)
    return [entropy, (p * (p / q).log()).sum(-1) * temperature**2]


def mixed_of(parts: list[torch.Tensor], kl_weight: float) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else (1 - kl_weight) * parts[0] + kl_weight * parts[1]


def inputs(tokens: int, width: int, vocabulary: int, distilled: bool, dtype=torch.float64):
    """(hidden, weight, targets, teacher), of another width than the student."""
    hidden, weight = (torch.randn(n, width, dtype=dtype, requires_grad=True) for n in (tokens, vocabulary))
    teacher = tuple(torch.randn(n, width + 3, dtype=dtype) for n in (tokens, vocabulary)) if distilled else None
    return hidden, weight, torch.randint(vocabulary, (tokens,)), teacher


@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 8), st.integers(2, 20)),
    chunk=st.sampled_from([1, 3, 100]),
    kl_weight=st.sampled_from([None, 0.3, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    count=st.sampled_from([1, 7, torch.tensor(5)]),
    needs=st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_chunks_give_the_plain_formula(sizes, chunk, kl_weight, temperature, count, needs):
    hidden, weight, targets, teacher = inputs(*sizes, distilled=kl_weight is not None)
    hidden.requires_grad_(needs[0]), weight.requires_grad_(needs[1])
    arguments = targets, teacher, kl_weight or 0.0, temperature, count, chunk
    loss, parts = objectives.chunked_loss(hidden, weight, *arguments)
    aim = None if teacher is None else teacher[0] @ teacher[1].T
    expected = [x.sum() / count for x in plain_losses(hidden @ weight.T, targets, aim, temperature)]
    torch.testing.assert_close(parts, torch.stack(expected).detach())
    truth = mixed_of(expected, kl_weight or 0.0)
    torch.testing.assert_close(loss, truth)
    leaves = [x for x in (hidden, weight) if x.requires_grad]
    # Of a loss that is scaled, as for several processes.
    torch.testing.assert_close(torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * truth, leaves))
    assert not parts.requires_grad


class PeakOfTensors(TorchDispatchMode):
    """Counts the elements of the largest tensor, and of all tensors that lived at a time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.largest = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = x.numel()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
                self.largest, self.peak = max(self.largest, x.numel()), max(self.peak, sum(self.live.values()))
        return out


def test_logits_of_all_tokens_exist_at_no_time():
    tokens, width, vocabulary, chunk = 256, 4, 50, 8
    hidden, weight, targets, teacher = inputs(tokens, width, vocabulary, distilled=True)
    with PeakOfTensors() as chunked:
        objectives.chunked_loss(hidden, weight, targets, teacher, 0.5, 1.0, tokens, chunk)[0].backward()
    assert chunked.largest <= max(chunk * vocabulary, tokens * width)
    # Student and teacher, a few tensors each, and the gradients.
    assert chunked.peak < tokens * vocabulary / 2
    with PeakOfTensors() as plain:
        losses = plain_losses(hidden @ weight.T, targets, teacher[0] @ teacher[1].T, 1.0)
        mixed_of(losses, 0.5).mean().backward()
    assert plain.largest == tokens * vocabulary and plain.peak > 2 * plain.largest


# ---- models ------------------------------------------------------------------------------------------------------------


def document(letters: str, answer: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A sample of letters (`models.ids_of`) whose last `answer` tokens are learnt."""
    ids = torch.tensor(ids_of(letters, seed))
    images = letters.count("v") // VISION
    sample = {"input_ids": ids, "labels": torch.where(torch.arange(len(ids)) >= len(ids) - answer, ids, -100)}
    return sample | ({"pixel_values": pixels(images, seed).double()} if images else {})


IMAGE = "b" + "v" * VISION
DOCUMENTS = [
    document(f"{IMAGE}ccttttt", 3, seed=1),
    document("bttttt", 4, seed=2),
    document(f"bt{IMAGE}ct{IMAGE}ccctttt", 4, seed=3),
    # The first word of an answer follows a VoCo token, whom the teacher has not.
    document(f"{IMAGE}cctt", 2, seed=4),
    document(f"{IMAGE}tt", 2, seed=5),
]


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return voco_llava().double().train()


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(1)
    return voco_llava().double()


@pytest.fixture
def batch(student):
    return VocoCollator(student.config)(DOCUMENTS)


def plain_gradients(student, teacher, config: ObjectiveConfig, documents=DOCUMENTS):
    """(loss, {parameter: gradient}) in float64: each document alone, the student under a dense mask in transformers' eager
    attention, the teacher as stock LLaVA."""
    masked, stock = twin(student, "eager"), stock_of(teacher).double()
    losses, labels = [], 0
    for sample in documents:
        ids, images = sample["input_ids"][None], sample.get("pixel_values")
        layout = student.layout_of(ids)
        mask = additive_mask(layout, 1, torch.float64)
        hidden = masked.model(ids, images, mask, layout.position_ids[None], use_cache=False).last_hidden_state
        bare = [int(i) for i in ids[0] if i != VOCO]
        with torch.no_grad():
            aim = stock(torch.tensor([bare]), images, use_cache=False).logits[0]
        for i, label in enumerate(sample["labels"].tolist()):
            if label != -100:
                place = len([x for x in ids[0, :i] if x != VOCO]) - 1
                parts = plain_losses(
                    masked.lm_head(hidden[:, i - 1]), torch.tensor([label]), aim[None, place], config.temperature
                )
                losses.append(mixed_of(parts, {"sft": 0, "distill": 1, "mixed": config.weight}[config.kind]))
                labels += 1
    loss = torch.cat(losses).sum() / labels
    parameters = dict(masked.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return loss.detach(), dict(zip(parameters, gradients))


def gradients_of(student, objective, batch, **options):
    """(loss, {parameter: gradient}) of a step, which leaves nothing behind."""
    student.objective = objective
    try:
        loss = student(**batch, **options).loss
        loss.backward()
        return loss.detach(), {name: x.grad for name, x in student.named_parameters()}
    finally:
        student.objective = None
        student.zero_grad()


def assert_same(step, truth):
    # RMSNorm is float32 in every model, and so is the stock loss.
    for x, expected in zip(step, truth):
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_batches_are_documents_on_their_own(student, batch, name):
    step = gradients_of(student, objectives.of(CONFIGS[name], chunk=5), batch)
    assert_same(step, plain_gradients(student, student, CONFIGS[name]))
    assert step[0] > 1


def test_a_teacher_of_its_own(student, teacher, batch):
    config = replace(MIXED, teacher="folder")
    step = gradients_of(student, objectives.of(config, teacher, chunk=5), batch)
    assert_same(step, plain_gradients(student, teacher, config))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(student, batch, reentrant):
    truth = gradients_of(student, objectives.of(MIXED), batch)
    other = copy.deepcopy(student)
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    other.enable_input_require_grads()
    step = gradients_of(other, objectives.of(MIXED), batch)
    assert_same(step, truth)
    assert other.training


def test_sft_is_the_stock_loss(student, batch):
    for options in ({}, {"num_items_in_batch": 40}, {"num_items_in_batch": torch.tensor(40)}):
        assert_same(gradients_of(student, objectives.of(CONFIGS["sft"], chunk=4), batch, **options),
                    gradients_of(student, None, batch, **options))  # fmt: skip


def test_sft_of_a_padded_batch(student):
    ids = torch.tensor([ids_of("bttttt"), [*ids_of("bttt", 1), 0, 0]])
    labels = torch.where(torch.arange(6) > 2, ids, -100)
    labels[1, 4:] = -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()}
    assert_same(gradients_of(student, objectives.of(CONFIGS["sft"]), batch), gradients_of(student, None, batch))


def test_parts_of_a_step_add_up(student):
    """Micro-batches whose number of labels is that of the step, as Trainer gives it."""
    pack, objective = VocoCollator(student.config), objectives.of(MIXED)
    whole, _ = gradients_of(student, objective, pack(DOCUMENTS))
    parts = objective.parts
    assert whole == pytest.approx(float(0.7 * parts["sft"] + 0.3 * parts["kl"]))
    labels = sum(int((sample["labels"] != -100).sum()) for sample in DOCUMENTS)
    micro, kl = 0, 0
    for some in (DOCUMENTS[:2], DOCUMENTS[2:]):
        micro += gradients_of(student, objective, pack(some), num_items_in_batch=torch.tensor(labels))[0]
        kl += objective.parts["kl"]
    torch.testing.assert_close((micro, kl), (whole, parts["kl"]))


def test_where_nothing_is_hidden_there_is_nothing_to_distil(student):
    objective = objectives.of(CONFIGS["warm distill"])
    text = VocoCollator(student.config)([DOCUMENTS[1], DOCUMENTS[4]])
    loss, gradients = gradients_of(student, objective, text)
    assert abs(loss) < 1e-12
    assert all(x is None or x.abs().max() < 1e-8 for x in gradients.values())
    assert set(objective.parts) == {"sft", "kl"} and objective.parts["sft"] > 1


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_without_labels_is_0_with_a_graph(student, batch, name):
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for options in ({}, {"num_items_in_batch": torch.tensor(0)}):
        loss, gradients = gradients_of(student, objectives.of(CONFIGS[name]), batch, **options)
        assert loss == 0
        used = {name: x for name, x in gradients.items() if "vision_tower" not in name}
        assert all(x is not None and not x.any() for x in used.values())


def test_evaluation_makes_no_gradients(student, batch, monkeypatch):
    other = copy.deepcopy(student)
    other.objective = objectives.of(MIXED)
    truth = other(**batch).loss
    monkeypatch.setattr(torch.autograd, "grad", None)
    with torch.no_grad():
        loss = other(**batch).loss
    torch.testing.assert_close(loss, truth.detach())
    assert not loss.requires_grad


def test_the_teacher_keeps_no_graph_and_leaves_the_mode(student, batch):
    other, seen = copy.deepcopy(student), []
    other.model.language_model.register_forward_hook(
        lambda module, inputs, output: seen.append((torch.is_grad_enabled(), module.training))
    )
    gradients_of(other, objectives.of(MIXED), batch)
    assert seen == [(True, True), (False, True)] and torch.is_grad_enabled()


def test_the_teacher_is_no_part_of_the_student(student, teacher):
    names = set(student.state_dict())
    teacher.train().requires_grad_(True)
    student.objective = objectives.of(replace(MIXED, teacher="folder"), teacher)
    assert set(student.state_dict()) == names == set(dict(student.named_parameters()))
    assert not any(x is teacher for x in student.modules())
    student.objective = None
    assert not teacher.training and not any(x.requires_grad for x in teacher.parameters())


def test_bad_input(student, teacher, batch):
    with pytest.raises(ValueError, match="cu_seqlens must be given for distillation.*None"):
        unpacked = {name: batch[name] for name in ("input_ids", "labels", "pixel_values")}
        gradients_of(student, objectives.of(MIXED), unpacked)
    with pytest.raises(ValueError, match="teacher must be a model for objective.kind 'mixed'.*'folder', but was None"):
        objectives.of(replace(MIXED, teacher="folder"))
    for config in (MIXED, replace(MIXED, kind="sft", teacher="folder")):
        with pytest.raises(ValueError, match="teacher must be None .* but was a model"):
            objectives.of(config, teacher)
    with pytest.raises(ValueError, match="chunk must be at least 1, but was 0"):
        objectives.of(MIXED, chunk=0)
    other = voco_llava(text={"vocab_size": 999})
    with pytest.raises(ValueError, match=r"objective.teacher must have the student's vocabulary \(\d+\), but has 999"):
        gradients_of(student, objectives.of(replace(MIXED, teacher="folder"), other), batch)
    other = copy.deepcopy(teacher)
    other.config.image_token_id = 7
    with pytest.raises(ValueError, match=r"objective.teacher must have the student's image token \(3\), but has 7"):
        gradients_of(student, objectives.of(replace(MIXED, teacher="folder"), other), batch)


def test_compact_documents_may_not_fit_the_teacher():
    student = voco_llava(positions="compact", text={"max_position_embeddings": 32}).train()
    sample = document(IMAGE + "ct" + IMAGE + "ct" + IMAGE + "ct", 1)
    batch = VocoCollator(student.config)([sample])
    assert gradients_of(student, objectives.of(CONFIGS["sft"]), batch)[0] > 0
    with pytest.raises(ValueError, match="must fit the context of 32 positions for distillation, but one has 33 tokens"):
        gradients_of(student, objectives.of(MIXED), batch)


# ---- bfloat16 and LoRA -------------------------------------------------------------------------------------------------


def under_autocast(student, objective, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return gradients_of(student, objective, batch)


@pytest.mark.parametrize("name", CONFIGS)
def test_autocast_is_as_near_to_the_truth_as_the_plain_formula(student, batch, name):
    """A float32 model under autocast, as Trainer runs it; the plain formula takes all logits from `lm_head`."""
    config, small = CONFIGS[name], copy.deepcopy(student).float()

    def plain(model, hidden, labels, input_ids, pixel_values, cu_seqlens, num_items_in_batch):
        rows = (labels[0] != -100).nonzero()[:, 0]
        aim = None
        if config.kind != "sft":
            bare, layout, places = objectives.uncompressed(model.config, input_ids, cu_seqlens)
            with torch.no_grad():
                found = model.last_hidden_states(bare, pixel_values, layout.position_ids[None], layout)
                # Not the weight itself, whose conversion without gradients autocast would keep.
                aim = functional.linear(found[0, places[rows] - 1], model.lm_head.weight.detach()).float()
        parts = plain_losses(model.lm_head(hidden[0, rows - 1]).float(), labels[0, rows], aim, config.temperature)
        return mixed_of(parts, {"sft": 0, "distill": 1, "mixed": config.weight}[config.kind]).mean()

    truth = gradients_of(student, objectives.of(config), batch)
    expected = under_autocast(small, plain, batch)
    step = under_autocast(small, objectives.of(config, chunk=5), batch)
    assert step[0].dtype == torch.float32
    for key in ("model.language_model.layers.0.self_attn.q_proj.weight", "lm_head.weight"):
        x, eager, x64 = (gradients[key].double() for _, gradients in (step, expected, truth))
        small_error = 4 * torch.finfo(torch.bfloat16).eps * x64.abs().max()
        assert (x - x64).abs().max() <= 2 * (eager - x64).abs().max() + small_error
    assert abs(step[0] - truth[0]) <= 2 * abs(expected[0] - truth[0]) + 1e-2 * truth[0]


def test_gradients_of_a_weight_are_summed_in_float32():
    """In bfloat16 a sum of many chunks would stop growing."""
    tokens = 1024
    hidden = torch.ones(tokens, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = objectives.chunked_loss(hidden, weight, torch.zeros(tokens, dtype=torch.long), None, 0.0, 1.0, 1, 1)
    loss.backward()
    assert weight.grad.flatten().tolist() == [-tokens / 2, tokens / 2]


def test_autocast_keeps_no_weight_without_its_gradients(student, batch):
    """Under one autocast, what follows still trains `lm_head`."""
    small = copy.deepcopy(student).float()
    with torch.autocast("cpu", torch.bfloat16):
        gradients_of(small, objectives.of(MIXED), batch)
        small.lm_head(torch.ones(1, small.config.text_config.hidden_size)).sum().backward()
    assert small.lm_head.weight.grad is not None


def test_a_teacher_computes_as_the_student_does(student, teacher, batch):
    small, other = copy.deepcopy(student).float(), copy.deepcopy(teacher)
    objective = objectives.of(replace(MIXED, teacher="folder"), other)
    loss, _ = under_autocast(small, objective, batch)
    assert {x.dtype for x in other.parameters()} == {torch.bfloat16}
    truth, _ = gradients_of(student, objectives.of(replace(MIXED, teacher="folder"), teacher), batch)
    assert loss == pytest.approx(float(truth), rel=0.02)


def test_lora_distils_from_itself(student, batch):
    peft = pytest.importorskip("peft")
    small = copy.deepcopy(student).float()
    batch = {name: x.float() if name == "pixel_values" else x for name, x in batch.items()}
    targets = ["q_proj", "v_proj", "down_proj"]
    lora = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, exclude_modules=".*vision_tower.*")
    peft.get_peft_model(small, lora)
    loss, gradients = gradients_of(small, objectives.of(CONFIGS["distill"]), batch)
    assert {name for name, x in gradients.items() if x is not None} == {n for n in gradients if "lora_" in n}
    assert all(x.any() for name, x in gradients.items() if "lora_B" in name)
    merged = copy.deepcopy(small)
    for module in merged.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    merged.objective = objectives.of(CONFIGS["distill"])
    torch.testing.assert_close(merged(**batch).loss, loss, rtol=1e-4, atol=1e-5)


# ---- Liger -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("kl_weight", [None, 0.3, 1.0])
@pytest.mark.parametrize("weight_needs", [True, False])
def test_ligers_losses_are_ours(kl_weight, weight_needs):
    """In Triton's interpreter, or on a GPU."""
    pytest.importorskip("liger_kernel")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, weight, targets, teacher = inputs(9, 16, 40, kl_weight is not None, torch.float32)
    weight.requires_grad_(weight_needs)

    def run(function, where, **options):
        leaves = [x.detach().to(where).requires_grad_(x.requires_grad) for x in (hidden, weight)]
        other = None if teacher is None else tuple(x.to(where) for x in teacher)
        loss, parts = function(*leaves, targets.to(where), other, kl_weight or 0.0, 2.0, 7, **options)
        (5 * loss).backward()
        return [x if x is None else x.cpu() for x in (loss, parts, *(leaf.grad for leaf in leaves))]

    truth = run(objectives.chunked_loss, "cpu", chunk=4)
    for x, expected in zip(run(objectives._liger_loss, device), truth, strict=True):
        assert (x is None) == (expected is None)
        if x is not None:
            torch.testing.assert_close(x.detach(), expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_liger_in_an_objective(student, batch):
    pytest.importorskip("liger_kernel")
    small = copy.deepcopy(student).float()
    batch = {name: x.float() if name == "pixel_values" else x for name, x in batch.items()}
    ours, ligers = objectives.of(MIXED), objectives.of(MIXED, liger=True)
    truth = gradients_of(small, ours, batch)
    for x, expected in zip(gradients_of(small, ligers, batch), truth):
        torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ligers.parts, ours.parts, rtol=1e-4, atol=1e-5)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert gradients_of(small, ligers, batch)[0] == 0


def test_liger_changes_one_model_alone(student, batch, monkeypatch):
    """Its functions in plain torch, counted: not all of its kernels run in Triton's interpreter."""
    functions = pytest.importorskip("liger_kernel.transformers.functional")
    rope = pytest.importorskip("liger_kernel.transformers.rope")
    calls = Counter()

    def counted(name, function):
        return lambda *args: calls.update([name]) or function(*args)

    def norm(x, weight, eps):
        return (weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    monkeypatch.setattr(functions, "liger_rms_norm", counted("norm", norm))
    monkeypatch.setattr(functions, "liger_swiglu", counted("mlp", lambda gate, up: functional.silu(gate) * up))
    monkeypatch.setattr(rope, "liger_rotary_pos_emb", counted("rope", modeling_llama.apply_rotary_pos_emb))
    kept = modeling_llama.LlamaRMSNorm.forward, modeling_llama.LlamaMLP.forward, modeling_llama.apply_rotary_pos_emb
    other = copy.deepcopy(student)
    objectives.apply_liger(other)
    assert_same(gradients_of(other, objectives.of(MIXED), batch), gradients_of(student, objectives.of(MIXED), batch))
    # Student and teacher, in two layers.
    assert calls == {"norm": 2 * 5, "mlp": 2 * 2, "rope": 2 * 2}
    llama()(torch.tensor([[5, 6, 7]]))
    assert calls == {"norm": 2 * 5, "mlp": 2 * 2, "rope": 2 * 2}
    assert kept == (
        modeling_llama.LlamaRMSNorm.forward, modeling_llama.LlamaMLP.forward, modeling_llama.apply_rotary_pos_emb
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ligers_kernels_give_the_same_results(student, batch):
    pytest.importorskip("liger_kernel")
    truth = gradients_of(student, objectives.of(MIXED), batch)
    other = copy.deepcopy(student).float().cuda()
    objectives.apply_liger(other)
    batch = {name: x.cuda().float() if name == "pixel_values" else x.cuda() for name, x in batch.items()}
    loss, gradients = gradients_of(other, objectives.of(MIXED, liger=True), batch)
    torch.testing.assert_close(loss.cpu(), truth[0], rtol=1e-3, atol=1e-4, check_dtype=False)
    for name, expected in truth[1].items():
        torch.testing.assert_close(gradients[name].cpu(), expected, rtol=1e-2, atol=1e-3, check_dtype=False)


def test_without_liger_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(ImportError, match=r'pip install "voco-kernels\[train\]"'):
        objectives.of(MIXED, liger=True)
