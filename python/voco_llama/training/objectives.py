"""What training minimises: cross-entropy of answers, and KL from the uncompressed model, in chunks of tokens."""

import inspect
import types
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from voco_kernels import VocoLayout
from voco_llama import VocoLlavaConfig, VocoLlavaForConditionalGeneration
from voco_llama.collator import IGNORED

from .config import ObjectiveConfig

# Labelled tokens whose logits exist at a time: for a vocabulary of 32,000, 131 MB in float32.
CHUNK = 1024


def of(
    config: ObjectiveConfig,
    teacher: VocoLlavaForConditionalGeneration | None = None,
    *,
    liger: bool = False,
    chunk: int = CHUNK,
) -> "Objective":
    """The objective of a configuration, to be set as `model.objective`.

    Args:
        config: what is minimised.
        teacher: the frozen model where `config.teacher` names one. It is changed: to eval mode, without gradients, and at
            its first use to the device and the dtype in which the student computes.
        liger: use Liger's fused losses, which need a GPU.
        chunk: labelled tokens whose logits exist at a time. Liger chooses for itself.

    Raises:
        ValueError: a teacher where the configuration has none, or none where it has one.
        ImportError: `liger` without Liger.
    """
    wanted = config.kind != "sft" and config.teacher != "self"
    if wanted != (teacher is not None):
        must, was = ("a model", "None") if wanted else ("None", "a model")
        kind = f"objective.kind {config.kind!r} and objective.teacher {config.teacher!r}"
        raise ValueError(f"teacher must be {must} for {kind}, but was {was}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, but was {chunk}")
    if liger:
        _liger()
    return Objective(config, None if teacher is None else teacher.eval().requires_grad_(False), liger, chunk)


class Objective:
    """Cross-entropy ("sft"), KL from the uncompressed model ("distill", VoCo-LLaMA's equations 1 and 5), or both ("mixed").

    No module, so that a model whose attribute it is has none of the teacher's weights.

    Attributes:
        parts: of the last call, "sft" and, with distillation, "kl": detached scalars on the device, averaged as the loss is.
    """

    def __init__(
        self, config: ObjectiveConfig, teacher: VocoLlavaForConditionalGeneration | None, liger: bool, chunk: int
    ):
        self.config, self.teacher = config, teacher
        self.parts: dict[str, torch.Tensor] = {}
        self._liger, self._chunk = liger, chunk
        self._weight = {"sft": 0.0, "distill": 1.0, "mixed": config.weight}[config.kind]

    def __call__(
        self,
        model: VocoLlavaForConditionalGeneration,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The loss of a batch, from within the student's `forward`.

        Args:
            model: the student.
            hidden ([B, S, E]): its last hidden states.
            labels (int64 [B, S]): of which label i is predicted at token i - 1; -100 is ignored.
            input_ids (int64 [B, S]), pixel_values ([images, 3, H, W]), cu_seqlens ([documents + 1]): what `hidden` was made
                from. Distillation needs a packed batch (B = 1).
            num_items_in_batch: labels of the whole step, by which the sum over this batch is divided; of this batch where
                None.

        Returns:
            A float32 scalar; 0, with gradients of 0, where no token has a label.

        Raises:
            ValueError: distillation of a batch that is not packed; a teacher of another vocabulary, or whose context the
                uncompressed documents exceed.
        """
        following = functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
        rows = (following != IGNORED).nonzero()[:, 0]
        targets = following[rows]
        hidden, weight = hidden.flatten(0, 1).index_select(0, rows), model.lm_head.weight
        if not torch.is_grad_enabled():
            hidden, weight = hidden.detach(), weight.detach()
        # Here and not within the loss, whose gradients autograd does not see: a weight that autocast converts there would
        # stay in its cache without gradients.
        hidden, weight = _as_in_linear(hidden), _as_in_linear(weight)
        teacher = None
        if self._weight:
            if cu_seqlens is None:
                raise ValueError("cu_seqlens must be given for distillation, which takes packed batches, but was None")
            teacher = self._teacher(model, weight, input_ids, pixel_values, cu_seqlens, rows)
        count = targets.numel() if num_items_in_batch is None else num_items_in_batch
        count = count.to(hidden.device) if isinstance(count, torch.Tensor) else count
        arguments = hidden, weight, targets, teacher, self._weight, self.config.temperature, count
        if self._liger and targets.numel():
            loss, parts = _liger_loss(*arguments)
        else:
            loss, parts = chunked_loss(*arguments, chunk=self._chunk)
        self.parts = dict(zip(("sft", "kl"), parts.unbind()))
        return loss

    @torch.no_grad()
    def _teacher(
        self, student, student_weight, input_ids, pixel_values, cu_seqlens, rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden [rows, E], weight [V, E]) whose product are the teacher's logits of what follows the student's `rows`."""
        input_ids, layout, places = uncompressed(student.config, input_ids, cu_seqlens)
        teacher, weight = self.teacher, student_weight
        if teacher is None:
            teacher = student
        else:
            _check_teacher(teacher.config, student.config)
            # A module's `to` visits all of its tensors, so it is left out where there is nothing to do.
            if (teacher.device, teacher.dtype) != (weight.device, weight.dtype):
                teacher.to(weight.device, weight.dtype)
            weight = teacher.lm_head.weight
        hidden = teacher.last_hidden_states(input_ids, pixel_values, layout.position_ids[None], layout)
        # The token before the one that is predicted, which is another one than the student's behind VoCo tokens.
        hidden = hidden[0].index_select(0, places[rows + 1] - 1)
        return _as_in_linear(hidden), weight.detach()


# ---- the uncompressed model ---------------------------------------------------------------------------------------------


def uncompressed(
    config: VocoLlavaConfig, input_ids: torch.Tensor, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, VocoLayout, torch.Tensor]:
    """A packed batch as the model without compression gets it: no VoCo tokens, plain causal within each document.

    Args:
        input_ids (int64 [1, N]), cu_seqlens (int32 [documents + 1]).

    Returns:
        (input_ids [1, M], layout of M tokens, places int64 [N]): where each token that is no VoCo token stands among the M.

    Raises:
        ValueError: under `positions="compact"`, documents that exceed the context without it.
    """
    kept = input_ids[0] != config.voco_token_id
    before = functional.pad(kept.cumsum(0), (1, 0))
    cu_seqlens, input_ids = before[cu_seqlens.long()].to(torch.int32), input_ids[:, kept]
    # Under continuous positions the VoCo documents, which are longer, have been checked.
    if config.positions == "compact":
        longest, limit = int(cu_seqlens.diff().max()), config.text_config.max_position_embeddings
        if longest > limit:
            raise ValueError(
                f"documents without VoCo tokens must fit the context of {limit} positions for distillation, but one has "
                f"{longest} tokens"
            )
    segment_ids = torch.zeros_like(input_ids[0], dtype=torch.int32)
    layout = VocoLayout.from_ids(segment_ids, segment_ids == 0, cu_seqlens, isolated=config.isolated)
    return input_ids, layout, before[:-1]


def _check_teacher(teacher: VocoLlavaConfig, student: VocoLlavaConfig) -> None:
    for name, of_teacher, of_student in (
        ("vocabulary", teacher.text_config.vocab_size, student.text_config.vocab_size),
        ("image token", teacher.image_token_id, student.image_token_id),
    ):
        if of_teacher != of_student:
            raise ValueError(f"objective.teacher must have the student's {name} ({of_student}), but has {of_teacher}")


# ---- losses of chunks ---------------------------------------------------------------------------------------------------


def chunked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    teacher: tuple[torch.Tensor, torch.Tensor] | None,
    kl_weight: float,
    temperature: float,
    count: torch.Tensor | int,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(1 - kl_weight) * cross-entropy + kl_weight * KL(teacher || student), without all logits at a time.

    Args:
        hidden ([T, E]), weight ([V, E]): the student's logits are their product, in their dtype; the losses of these are
            float32 (float64 of float64).
        targets (int64 [T]): the tokens that follow.
        teacher: hidden [T, E'] and weight [V, E'] of the teacher; None without distillation, where `kl_weight` is 0.
        temperature: divides all logits of KL, which is multiplied with its square: its gradients, which are as 1 / square,
            then stay of the size of those of cross-entropy (Hinton et al., arXiv 1503.02531, section 2).
        count: what sums over tokens are divided by.
        chunk: tokens whose logits exist at a time.

    Returns:
        (loss, parts [1 or 2]): cross-entropy and KL, without gradients.
    """

    def losses(logits: torch.Tensor, rows: slice) -> list[torch.Tensor]:
        parts = [functional.cross_entropy(logits, targets[rows], reduction="sum") / count]
        if teacher is not None:
            with torch.no_grad():
                aim = (teacher[0][rows] @ teacher[1].T).to(logits.dtype).div_(temperature).log_softmax(-1)
            found = (logits / temperature).log_softmax(-1)
            divergence = functional.kl_div(found, aim, reduction="sum", log_target=True)
            parts.append(divergence * (temperature**2 / count))
        return parts

    shares = (1 - kl_weight, kl_weight) if teacher is not None else (1.0,)
    return _ChunkedLoss.apply(hidden, weight, losses, shares, chunk)


class _ChunkedLoss(torch.autograd.Function):
    """The weighted sum of losses of the logits hidden @ weight.T, where gradients are made together with the loss.

    So each chunk's logits are made once, and the weight is used once in a step, in the forward: under ZeRO-3 processes with
    different numbers of chunks would otherwise wait for each other.
    """

    @staticmethod
    def forward(ctx, hidden, weight, losses: Callable, shares: tuple[float, ...], chunk: int):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        hidden_needs, weight_needs = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if hidden_needs else None
        # Summed over chunks, so in float32.
        grad_weight = torch.zeros_like(weight, dtype=wide) if weight_needs else None
        parts = torch.zeros(len(shares), dtype=wide, device=hidden.device)
        for begin in range(0, hidden.shape[0], chunk):
            rows = slice(begin, begin + chunk)
            logits = (hidden[rows] @ weight.T).to(wide).requires_grad_()
            with torch.enable_grad():
                found = losses(logits, rows)
                loss = sum(share * part for share, part in zip(shares, found))
            parts += torch.stack(found).detach()
            if not (hidden_needs or weight_needs):
                continue
            gradient = torch.autograd.grad(loss, logits)[0].to(hidden.dtype)
            if hidden_needs:
                grad_hidden[rows] = gradient @ weight
            if weight_needs:
                grad_weight += gradient.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype) if weight_needs else None)
        ctx.mark_non_differentiable(parts)
        return sum(share * part for share, part in zip(shares, parts)), parts

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, _):
        return *(None if x is None else gradient * x for x in ctx.saved_tensors), None, None, None


def _as_in_linear(x: torch.Tensor) -> torch.Tensor:
    """A tensor as autocast would hand it to a linear layer."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


# ---- Liger --------------------------------------------------------------------------------------------------------------


def _liger():
    """Liger's public modules; ImportError that says how to install them."""
    try:
        import liger_kernel.transformers as liger
    except ImportError as error:
        raise ImportError('liger needs Liger\'s kernels: pip install "voco-kernels[train]"') from error
    return liger


def _liger_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    teacher: tuple[torch.Tensor, torch.Tensor] | None,
    kl_weight: float,
    temperature: float,
    count: torch.Tensor | int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`chunked_loss` by Liger's kernels, of at least one token."""
    liger, wide = _liger(), {"accum_dtype": torch.float32}
    entropy = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum", **wide)(weight, hidden, targets) / count
    if teacher is None:
        return entropy, entropy.detach()[None]
    # With beta = 0 it is KL(teacher || student), the mean over tokens, without the square of the temperature.
    divergence = liger.LigerFusedLinearJSD(jsd_beta=0.0, temperature=temperature, **wide)
    divergence = divergence(hidden, weight, *teacher, None) * (temperature**2 * targets.numel() / count)
    return torch.lerp(entropy, divergence, kl_weight), torch.stack([entropy, divergence]).detach()


def apply_liger(model: VocoLlavaForConditionalGeneration) -> None:
    """Run Liger's RMSNorm, SwiGLU and RoPE in the LLaMA of a model, in place. They need a GPU.

    Of this model alone: Liger's own patch would change every LLaMA of the process.

    Raises:
        ImportError: without Liger.
    """
    _liger()
    from liger_kernel.transformers.functional import liger_rms_norm, liger_swiglu
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    def norm(self, hidden_states):
        return liger_rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def mlp(self, x):
        return self.down_proj(liger_swiglu(self.gate_proj(x), self.up_proj(x)))

    attention = _with_global(LlamaAttention.forward, "apply_rotary_pos_emb", liger_rotary_pos_emb)
    for module in model.model.language_model.modules():
        for kind, forward in ((LlamaRMSNorm, norm), (LlamaMLP, mlp), (LlamaAttention, attention)):
            if isinstance(module, kind):
                module.forward = types.MethodType(forward, module)


def _with_global(function: Callable, name: str, value) -> Callable:
    """A copy of a function that finds something else under the name of one of its module's globals."""
    function = inspect.unwrap(function)
    if name not in function.__code__.co_names:
        raise ImportError(f"liger needs a version of transformers whose {function.__qualname__} calls {name}")
    changed = {**function.__globals__, name: value}
    copy = types.FunctionType(function.__code__, changed, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
