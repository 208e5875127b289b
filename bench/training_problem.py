"""A training step of LLaMA decoder layers, held to the truth and made ready to be timed, for every recipe of one pool.

A step is forward and backward of the whole pool in micro-batches that add up their gradients, then one step of AdamW. The
optimizer is part of it because without one nothing is trained; its learning rate is 0, so that every step of every recipe
does the same work on the same weights. Inputs are embeddings, as LLaVA hands projected images and looked-up text to its
LLaMA, and get gradients, as the projector is trained. Labels are the text; logits are made for labelled tokens only.

There is no room for float64 at full size. So recipes are judged beforehand on a model of GATE_LAYERS such layers and on
GATE_SAMPLES such samples, by the same code: loss and gradients against each sample alone in plain matmuls, under the error
rule of `tests/reference.py`.

At full size every recipe is then held to the first one only, by the lengths of differences: of its loss, of the gradients of
some weights, and of each sample's inputs. That shows a mask that is wrong for many tokens, positions of another scale, and
samples that are lost or trained twice. It shows no smaller mistake (text one position further changes too little for
bfloat16), and nothing that is wrong with all recipes: of these, only the small model proves that they are not made.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama import modeling_llama
from voco_llama.bench.clock import release
from voco_llama.bench.derived import peak_flops
from voco_llama.bench.measure import OURS as OURS_ROLE
from voco_llama.bench.measure import PEER, Candidate, Work, first_line
from voco_llama.bench.results import version_of
from voco_llama.flops import llama_flops

from bench.lengths import LONGEST
from bench.training_recipes import (
    BUILT,
    OURS,
    SEVEN_B,
    SMALL,
    Batch,
    Pool,
    Recipe,
    TrainingShape,
    alone,
    recipes_of,
)
from tests.reference import OPEN, assert_error_rule, kinds_of
from voco_kernels import VocoLayout
from voco_kernels.tiles import useful_pairs

OPTIMIZER = "AdamW, fused, learning rate 0, moments in the dtype of the weights"
GATE_LAYERS, GATE_SAMPLES = 2, 6
LOSS, INPUTS = "loss", "gradient of the inputs"

# What transformers calls it; newer versions by the first name.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if hasattr(PreTrainedModel, f"{name}_enable")
)

# How far a recipe may be from the first one at full size, as the length of the difference over that of the first one's, in
# units of the dtype's eps (32 are 0.25 in bfloat16). A loss hardly feels a mask, so it shows lost and repeated samples only.
# Gradients of SMALL in bfloat16 differ between right recipes by 0.01 with 2 layers, 0.02 with 8 and 0.07 with 32, and from
# plain matmuls by 0.02, 0.05 and 0.12. With a causal mask, without documents, or with half of all positions, that of the
# first q_proj with 2 layers differs by 0.8 or more; where no text sees the first VoCo token, or the token before, by 0.4.
LOSS_EPS, GRADIENT_EPS = 4, 32

# Bytes that a step needs in bfloat16, without Liger, which needs less. A weight has a gradient and two moments. For the
# backward of a layer a token keeps about 13 numbers as wide as the model and 4 as wide as its MLP. Logits exist in bfloat16
# and in float32, as do their gradients, and their logarithms. A tenth of the memory is left to fragments and workspaces.
WEIGHT_BYTES, LOGIT_BYTES = 8, 16
HIDDEN_BYTES, MLP_BYTES = 26, 8
USED_SHARE = 0.9


def step_flops(config: LlamaConfig, tokens: int, pairs: int, labelled: int) -> int:
    """Model FLOPs of forward and backward, without recomputation: a backward is two matmuls for each of the forward's.

    Args:
        tokens: all tokens without padding.
        pairs: (query, key) pairs that the mask allows.
        labelled: tokens for which logits are made.
    """
    return 3 * llama_flops(config, tokens, pairs, labelled)


class Training:
    """A model, its optimizer and a pool of samples.

    Attributes:
        liger: the version of Liger whose kernels run, for every recipe; None where they do not.
    """

    def __init__(self, model, pool: Pool, *, liger: str | None, kernels: Callable[[], AbstractContextManager] = nullcontext):
        self.model, self.pool, self.liger = model.train(), pool, liger
        self._embeddings = pool.embeddings.to(model.dtype)
        self._kernels = liger_kernels if liger else kernels
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    @classmethod
    def of(cls, pool: Pool, layers: int | None = None) -> "Training":
        """Random weights in `layers` layers (None: all of the shape's), and Liger's kernels on a GPU that has them."""
        torch.manual_seed(0)
        config = replace(pool.shape, layers=layers or pool.shape.layers).config()
        with torch.device(pool.device):
            model = AutoModelForCausalLM.from_config(config, dtype=pool.embeddings.dtype)
        liger = version_of("liger-kernel") if pool.device.type == "cuda" else None
        return cls(model, pool, liger=liger)

    def plain(self) -> "Training":
        """The same model and pool without Liger."""
        return Training(self.model, self.pool, liger=None)

    def exact(self) -> "Training":
        """A copy in float64, also where transformers computes in float32."""
        return Training(deepcopy(self.model).double(), self.pool, liger=None, kernels=exact_kernels)

    def step(self, recipe: Recipe, checkpointed: bool = False) -> torch.Tensor:
        """One training step; returns the mean loss of all labelled tokens, a scalar on the device."""
        try:
            losses = [loss for _, loss, _ in self._accumulated(recipe, checkpointed)]
            self._optimizer.step()
        finally:
            self._optimizer.zero_grad()
        return torch.stack(losses).sum()

    def gradients(self, recipe: Recipe, checkpointed: bool = False) -> dict[str, torch.Tensor]:
        """What must not depend on the recipe, on the CPU: the loss [1], and gradients of all inputs and of some weights."""
        inputs, losses = torch.zeros_like(self._embeddings, device="cpu"), []
        layers = self.model.model.layers
        try:
            for batch, loss, gradient in self._accumulated(recipe, checkpointed):
                losses.append(loss)
                inputs[batch.index[batch.valid].cpu()] = gradient[batch.valid].cpu()
            results = {
                LOSS: torch.stack(losses).sum()[None].to(inputs.dtype),
                INPUTS: inputs,
                "gradient of the first q_proj": layers[0].self_attn.q_proj.weight.grad,
                "gradient of the last down_proj": layers[-1].mlp.down_proj.weight.grad,
            }
            return {name: x.cpu() for name, x in results.items()}
        finally:
            self._optimizer.zero_grad()

    def _accumulated(self, recipe: Recipe, checkpointed: bool) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
        """Forward and backward of every micro-batch: (it, its part of the loss, the gradient of its inputs)."""
        if checkpointed:
            getattr(self.model, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
        else:
            getattr(self.model, f"{CHECKPOINTING}_disable")()
        for batch in recipe.batches:
            with self._kernels():
                loss, inputs = self.loss(recipe, batch)
                loss.backward()
            yield batch, loss.detach(), inputs.grad

    def loss(self, recipe: Recipe, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """A micro-batch's part of the mean loss, and the inputs [B, S, hidden] that it was made from."""
        if self.model.config._attn_implementation != recipe.attention:
            self.model.set_attn_implementation(recipe.attention)
        inputs = self._embeddings[batch.index].requires_grad_()
        out = self.model.model(
            inputs_embeds=inputs, position_ids=batch.positions, use_cache=False, **recipe.made(batch)
        )
        hidden = out.last_hidden_state.flatten(0, 1).index_select(0, batch.labelled)
        return self._summed_loss(hidden, batch.targets) / self.pool.labelled, inputs

    def _summed_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        head = self.model.lm_head
        if self.liger:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            return liger_fused_linear_cross_entropy(hidden, head.weight, targets, reduction="sum")
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return cross_entropy(head(hidden).to(wide), targets, reduction="sum")

    @property
    def model_flops(self) -> int:
        """Useful FLOPs of a step."""
        pairs = useful_pairs(VocoLayout.from_spans(self.pool.documents, isolated=True))
        return step_flops(self.model.config, self.pool.tokens, pairs, self.pool.labelled)


@contextmanager
def liger_kernels() -> Iterator[None]:
    """Liger's RMSNorm, SwiGLU and RoPE in stock LLaMA for as long as it lasts; Liger's own patch would stay for good."""
    from liger_kernel.transformers.functional import liger_rms_norm, liger_swiglu
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    def norm(self, hidden_states):
        return liger_rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def mlp(self, x):
        return self.down_proj(liger_swiglu(self.gate_proj(x), self.up_proj(x)))

    with (
        patch.object(modeling_llama.LlamaRMSNorm, "forward", norm),
        patch.object(modeling_llama.LlamaMLP, "forward", mlp),
        patch.object(modeling_llama, "apply_rotary_pos_emb", liger_rotary_pos_emb),
    ):
        yield


@contextmanager
def exact_kernels() -> Iterator[None]:
    """RMSNorm in the dtype of its input: transformers' own is float32 at best. Rotary angles are float32 for everyone."""

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    with patch.object(modeling_llama.LlamaRMSNorm, "forward", norm):
        yield


# ---- the gate ----------------------------------------------------------------------------------------------------------


class Truth:
    """Loss and gradients of a small training in float64, and by plain matmuls in its dtype."""

    def __init__(self, training: Training):
        truth = alone(training.pool)
        self.eager = training.plain().gradients(truth)
        self.x64 = training.exact().gradients(truth)
        self.kinds = kinds_of(VocoLayout.from_spans(training.pool.documents, isolated=True))

    def check(self, results: dict[str, torch.Tensor]) -> None:
        """Raise AssertionError unless what `Training.gradients` returned keeps the error rule."""
        for name, x in results.items():
            kinds = self.kinds if name == INPUTS else [OPEN] * len(x)
            assert_error_rule(name, x, self.eager[name], self.x64[name], kinds)


def gate_shape(shape: TrainingShape) -> TrainingShape:
    """The same widths with few layers and samples, in at least two micro-batches of every recipe."""
    capacity = 3 * (shape.vision + shape.voco + LONGEST // shape.text_divisor)
    return replace(shape, layers=GATE_LAYERS, samples=GATE_SAMPLES, batch=GATE_SAMPLES // 2, capacity=capacity)


def verdicts_on(training: Training, recipes: list[Recipe]) -> dict[tuple[str, bool], Exception | None]:
    """(name of a recipe, whether with gradient checkpointing) -> what is wrong with it, or why it cannot run, or None."""
    truth, verdicts = Truth(training), {}
    for recipe in recipes:
        for checkpointed in (False, True):
            verdict = None
            try:
                if recipe.absent is None:
                    truth.check(training.gradients(recipe, checkpointed))
            # Kept as words: a traceback would keep tensors of the device.
            except AssertionError as error:
                verdict = AssertionError(first_line(error))
            except Exception as error:
                verdict = RuntimeError(first_line(error))
            verdicts[recipe.name, checkpointed] = verdict
    return verdicts


def assert_agree(results: dict[str, torch.Tensor], first: dict[str, torch.Tensor], lengths: list[int]) -> None:
    """Raise AssertionError unless what `Training.gradients` returned is what it returned for the first recipe, and a little.

    Args:
        lengths: tokens of every sample, whose inputs are compared sample by sample.
    """
    for name, expected in first.items():
        eps = (LOSS_EPS if name == LOSS else GRADIENT_EPS) * torch.finfo(expected.dtype).eps
        sizes = lengths if name == INPUTS else [len(expected)]
        for i, (x, true) in enumerate(zip(results[name].split(sizes), expected.split(sizes), strict=True)):
            error, length = (float(y.double().norm()) for y in (x.double() - true.double(), true))
            # Written so that a NaN fails.
            which = f"{name} of sample {i}" if name == INPUTS else name
            assert error <= eps * length, f"{which} is {error:.3e} off the first recipe's, granted {eps * length:.3e}"


# ---- ready to be timed -------------------------------------------------------------------------------------------------


def layers_that_fit(shape: TrainingShape, recipes: list[Recipe], free: int) -> int:
    """How many layers, at most the shape's and at least one, a step without checkpointing has room for in `free` bytes."""
    batches = [batch for recipe in recipes for batch in recipe.batches]
    slots, labelled = max(b.index.numel() for b in batches), max(b.labelled.numel() for b in batches)
    weights = 4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate
    layer = WEIGHT_BYTES * weights + slots * (HIDDEN_BYTES * shape.hidden + MLP_BYTES * shape.intermediate)
    # The matrix of the embeddings is not trained; the head is.
    ends = shape.vocab * ((2 + WEIGHT_BYTES) * shape.hidden + LOGIT_BYTES * labelled)
    return max(1, min(shape.layers, int((USED_SHARE * free - ends) // layer)))


def fitted(pool: Pool, recipes: list[Recipe], free: int | None) -> Training:
    """A training of as many layers as every recipe has room for in `free` bytes; of all layers where that is None."""
    layers = pool.shape.layers if free is None else layers_that_fit(pool.shape, recipes, free)
    while True:
        training = Training.of(pool, layers)
        if free is None or layers == 1 or all(_has_room(training, recipe) for recipe in recipes):
            return training
        del training
        release(pool.device)
        layers //= 2


def _has_room(training: Training, recipe: Recipe) -> bool:
    try:
        if recipe.absent is None:
            training.step(recipe)
    except torch.OutOfMemoryError:
        return False
    # Anything else is found again, and reported, when the recipe is measured.
    except Exception:
        release(training.pool.device)
    return True


def trained_on(device: torch.device) -> tuple[TrainingShape, torch.dtype]:
    """What is trained on a device, but for the number of layers, and in which dtype."""
    return (SEVEN_B, torch.bfloat16) if device.type == "cuda" else (SMALL, torch.float32)


class Problem:
    """Everything that is measured on a device: the published size in bfloat16 on a GPU, a small one in float32 on a CPU.

    Attributes:
        shape, dtype: what is trained, but for the number of layers.
        work: useful FLOPs of a step.
    """

    def __init__(self, device: torch.device):
        self.shape, self.dtype = trained_on(device)
        small = Training.of(Pool(gate_shape(self.shape), device, self.dtype))
        self._verdicts = verdicts_on(small, recipes_of(small.pool))
        del small
        release(device)
        pool = Pool(self.shape, device, self.dtype)
        self._recipes = recipes_of(pool)
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        self._training = fitted(pool, self._recipes, free)
        self.work = Work(flops=self._training.model_flops)
        self._peak = peak_flops(device, self.dtype)
        self._first: dict[str, torch.Tensor] | None = None

    def candidates(self, checkpointed: bool) -> list[Candidate]:
        """All recipes, ours first. What a layout costs is asked once, without checkpointing."""
        recipes = [recipe for recipe in self._recipes if not (checkpointed and recipe.name == BUILT)]
        return [
            Candidate(
                recipe.name,
                partial(self._training.step, recipe, checkpointed),
                partial(self._check, recipe, checkpointed),
                self.shape.targets.get(recipe.name),
                OURS_ROLE if recipe.name in (OURS, BUILT) else PEER,
                recipe.absent,
                self.facts(recipe, checkpointed),
            )
            for recipe in recipes
        ]

    def facts(self, recipe: Recipe, checkpointed: bool) -> dict:
        """What rates follow from, and what a reader wants to know.

        `padded_tokens` are all that go through the layers, padding included; `model_flops` are without recomputation.
        """
        useful, shape = self._training.pool.tokens, self.shape
        is_aimed = recipe.name == OURS and not checkpointed
        return {
            "useful_tokens": useful,
            "padded_tokens": recipe.slots,
            "padding_share": round(1 - useful / recipe.slots, 4),
            "model_flops": self.work.flops,
            "peak_flops": self._peak,
            "mfu_target": shape.mfu_target if is_aimed else None,
            "layers": self._training.model.config.num_hidden_layers,
            "hidden": shape.hidden,
            "checkpointing": checkpointed,
            "liger": self._training.liger,
            "optimizer": OPTIMIZER,
            "samples": shape.samples,
            "micro_batches": len(recipe.batches),
            "vision": shape.vision,
            "voco": shape.voco,
            "text": f"synthetic lengths of bench/lengths.py, divided by {shape.text_divisor}",
        }

    def _check(self, recipe: Recipe, checkpointed: bool, loss: torch.Tensor) -> None:
        """Hold a recipe to its verdict on the small model and, with the loss of a step, to the first recipe checked."""
        verdict = self._verdicts[recipe.name, checkpointed]
        if verdict is not None:
            raise verdict
        results = self._training.gradients(recipe, checkpointed) | {LOSS: loss[None].to(self.dtype).cpu()}
        first = results if self._first is None else self._first
        assert_agree(results, first, self._training.pool.lengths)
        self._first = first  # after the check, so that nothing is compared with a NaN
