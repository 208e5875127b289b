"""A plain causal LLaMA over transformers' static cache, on a GPU as CUDA graphs: what every system of table 7 runs on.

Launches by Python take longer than a GPU needs for one token, and would hide what a shorter cache saves.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from transformers import AttentionInterface, LlamaModel
from transformers.cache_utils import StaticCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from voco_kernels.integrations.transformers import CACHE_NAME

ATTENTION = "voco_static_sdpa"
# SDPA's kernels copy a mask whose rows are not of whole 16 bytes.
SLOTS_MULTIPLE = 16


def static_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """SDPA over a static cache, causal among the new tokens where there is no mask (the cache was empty).

    transformers' own has to look at the cache's length, which a CUDA graph cannot, and copies keys that query heads share,
    or did so in some versions. Here the query heads that share keys become rows of one head.

    Args:
        query [B, Hq, n, D]; key, value [B, Hkv, slots, D]; attention_mask ([1, 1, n, slots], added; the dtype of query).

    Returns:
        [B, n, Hq, D], and None for the weights, as transformers expects.
    """
    batch, heads, new, head_dim = query.shape
    groups = heads // key.shape[1]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if attention_mask is None:
        key, value = key[:, :, :new], value[:, :, :new]
        out = sdpa(query, key, value, is_causal=new > 1, scale=scaling, enable_gqa=groups > 1)
    else:
        rows = query.reshape(batch, key.shape[1], groups * new, head_dim)
        mask = attention_mask if 1 in (groups, new) else attention_mask.repeat(1, 1, groups, 1)
        out = sdpa(rows, key, value, attn_mask=mask, scale=scaling).reshape(batch, heads, new, head_dim)
    return out.transpose(1, 2), None


def plain_llama(model) -> LlamaModel:
    """The LLaMA of a VoCo LLaVA as a plain causal model: the same weights, attention over a static cache.

    Its norms are torch's, one kernel where transformers' take eight: with a few tokens, kernels cost more than their work.
    """
    # No mask function is registered with it, so that transformers hands on the masks that it is given.
    AttentionInterface.register(ATTENTION, static_attention)
    trained = model.model.language_model
    config = copy.deepcopy(trained.config)
    config._attn_implementation = ATTENTION
    with torch.device("meta"):
        llama = LlamaModel(config)
    llama.load_state_dict(trained.state_dict(), assign=True)
    llama.rotary_emb = trained.rotary_emb  # its frequencies are in no state dict
    for module in list(llama.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, LlamaRMSNorm):
                fused = torch.nn.RMSNorm(config.hidden_size, config.rms_norm_eps, device="meta")
                fused.weight = norm.weight
                setattr(module, name, fused)
    return llama.eval()


class StaticMemory:
    """transformers' StaticCache with all layers in one tensor, so that one launch fills or resets it.

    Attributes:
        cache: the StaticCache.
        tensor: its keys and values, [2, L, B, Hkv, slots, D].
        lengths (int64 [L]): how many tokens each layer holds.
    """

    def __init__(self, config, batch: int, slots: int, dtype: torch.dtype, device: torch.device):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers = config.num_hidden_layers
        shape = (2, layers, batch, config.num_key_value_heads, slots, head_dim)
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(layers, dtype=torch.int64, device=device)
        self.cache = StaticCache(config=config, max_cache_len=slots)
        for i, layer in enumerate(self.cache.layers):
            layer.lazy_initialization(self.tensor[0, i], self.tensor[1, i])
            layer.keys, layer.values = self.tensor[0, i], self.tensor[1, i]
            layer.cumulative_length = self.lengths[i]

    @property
    def slots(self) -> int:
        """Places for tokens."""
        return self.tensor.shape[-2]


class StaticRun:
    """One system's way from stored K/V to an answer: greedy, without stopping, for a batch of questions of one length.

    Whoever calls it has put the K/V of `past` tokens into the first slots of `memory`.

    Attributes:
        memory: the StaticMemory, of its own.
        tokens (int64 [B, answer]): what `answer` wrote.
        logits ([B, vocabulary]), token (int64 [B, 1]): of the last new token, which the next step reads.
    """

    @torch.no_grad()
    def __init__(
        self,
        model,
        llama: LlamaModel,
        text: torch.Tensor,
        past: int,
        answer: int,
        image: Callable[[], torch.Tensor] | None = None,
    ):
        """Allocate everything, and capture the graphs.

        Args:
            model: a VoCo LLaVA; llama: its `plain_llama`.
            text (int64 [B, T]): token ids of the questions.
            past: tokens whose K/V are stored.
            answer: tokens of the answer.
            image: makes the embeddings [B, n, E] of what stands before the text; None where its K/V are stored.
        """
        device = text.device
        self._embed, self._head, self._llama = model.get_input_embeddings(), model.lm_head, llama
        self._text, self._past, self._image = text, past, image
        self._new = text.shape[1] + (0 if image is None else image().shape[1])
        needed = past + self._new + max(answer, 2)
        slots = -(-needed // SLOTS_MULTIPLE) * SLOTS_MULTIPLE
        self.memory = StaticMemory(llama.config, len(text), slots, model.dtype, device)
        self._slots = torch.arange(slots, device=device)
        self._positions = past + torch.arange(self._new, device=device)
        self.tokens = torch.zeros(len(text), answer, dtype=torch.int64, device=device)
        self.token = torch.zeros(len(text), 1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(len(text), model.config.text_config.vocab_size, dtype=model.dtype, device=device)
        # Without anything in the cache, causal attention needs no mask and has faster kernels.
        self._mask = self._causal(self._positions) if past else None
        self.first = _captured(self._first, device)
        self.step = _captured(self._step, device)

    def _causal(self, positions: torch.Tensor) -> torch.Tensor:
        """The mask [1, 1, n, slots] of tokens at `positions`, to be added: SDPA would convert a bool one in every layer."""
        hidden = self._slots > positions[:, None]
        return torch.zeros_like(hidden, dtype=self.logits.dtype).masked_fill_(hidden, -torch.inf)[None, None]

    @torch.no_grad()
    def _first(self) -> None:
        """From the stored K/V and the questions to the first token."""
        self.memory.lengths.fill_(self._past)
        embeds = self._embed(self._text)
        if self._image is not None:
            embeds = torch.cat([self._image(), embeds], dim=1)
        self._forward(embeds, self._positions, self._mask)

    @torch.no_grad()
    def _step(self) -> None:
        """From the last token to the next one."""
        position = self.memory.lengths[:1].clone()  # the layers count on while they run
        self._forward(self._embed(self.token), position, self._causal(position))

    def _forward(self, embeds: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> None:
        output = self._llama(
            inputs_embeds=embeds,
            position_ids=positions[None],
            attention_mask=mask,
            use_cache=True,
            **{CACHE_NAME: self.memory.cache},
        )
        self.logits.copy_(self._head(output.last_hidden_state[:, -1]))
        self.token.copy_(self.logits.argmax(-1, keepdim=True))

    def rewind(self, token: torch.Tensor) -> None:
        """As after `first`, with `token` (int64 [B, 1]) for what comes next."""
        self.memory.lengths.fill_(self._past + self._new)
        self.token.copy_(token)

    def answer(self) -> torch.Tensor:
        """All tokens [B, answer] of the answers."""
        self.first()
        self.tokens[:, 0] = self.token[:, 0]
        for i in range(1, self.tokens.shape[1]):
            self.step()
            self.tokens[:, i] = self.token[:, 0]
        return self.tokens


def _captured(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """On a GPU the replay of a CUDA graph of `run`, which is run once before; elsewhere `run` itself."""
    if device.type != "cuda":
        return run
    aside, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        run()
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # The outer one: a capture that fails does not put back the stream itself.
    with torch.cuda.stream(current), torch.cuda.graph(graph):
        run()
    return graph.replay


def loader(
    tensors: Sequence[torch.Tensor], bind: Callable[[Sequence[torch.Tensor]], Callable[[], None]], *, from_host: bool
) -> Callable[[], None]:
    """What brings stored tensors to where a run reads them.

    Args:
        tensors: on the device.
        bind: from tensors on the device, makes the function that puts them there.
        from_host: whether they start in (pinned) host memory instead.
    """
    if not from_host:
        return bind(tensors)
    pinned = [x.cpu().pin_memory() for x in tensors]
    staged = [torch.empty_like(x) for x in tensors]
    put = bind(staged)

    def load() -> None:
        for x, source in zip(staged, pinned, strict=True):
            x.copy_(source, non_blocking=True)
        put()

    return load
