"""VoCo attention in stock Hugging Face models: `attn_implementation="voco"`.

`register()` adds an attention function and a mask function to transformers' registries. A layout travels as the keyword
`voco_layout`, is made once per forward, and reaches every layer. Without a layout the implementation is plain causal
attention, which is what decoding and stage 2 need: after a masked prefill the cache keeps only public keys
(`keep_public_keys`), so no later step needs a mask of its own.

`attach(model, build_layout)` does all of that for a stock model: it makes the layout at each prefill, and drops from the
cache what the text may not see.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..attention import voco_attention
from ..errors import reject
from ..layout import VocoLayout

NAME = "voco"

# What transformers calls the cache, in a model's keywords and in its outputs: "past_key_values" before 5.24, "cache" since.
# Calls into transformers use the name of the installed version; our callers may use either.
CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = next(x for x in CACHE_NAMES if x in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters)

# Rows per masked SDPA call when several new tokens meet a filled cache; bounds the mask to this many rows.
ROW_CHUNK = 256


@dataclass(frozen=True, eq=False)
class PrefillMask:
    """What the mask function hands to every layer when more than one token is processed: O(B * S), never a square.

    `generate` treats it as a finished 4-D mask, hence `ndim`, `shape` and `contiguous`.

    Attributes:
        padding (bool [B, keys seen so far] or None): the 2-D attention mask.
        offset: number of keys in the cache before this forward.
        causal_layout: plain causal attention with padding as a layout; None without padding or behind a filled cache.
        shape: (B, 1, queries, keys) of the mask that this stands for.
    """

    padding: torch.Tensor | None
    offset: int
    causal_layout: VocoLayout | None
    shape: tuple[int, int, int, int]
    ndim: int = 4

    def contiguous(self) -> "PrefillMask":
        """Itself; part of the interface of a mask tensor."""
        return self


def register() -> None:
    """Make `attn_implementation="voco"` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, voco_attention_forward)
    AttentionMaskInterface.register(NAME, voco_mask)


def voco_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | PrefillMask | None = None,
    **kwargs,
) -> torch.Tensor | PrefillMask | None:
    """The mask function: one row of keys for one new token, else a `PrefillMask`."""
    if isinstance(attention_mask, PrefillMask):
        return attention_mask
    if q_length == 1:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            **kwargs,
        )
    # Static caches count in a tensor. Reading it costs one synchronisation a prefill, and none in a traced graph,
    # where a prefill starts with an empty cache.
    if isinstance(q_offset, torch.Tensor):
        q_offset = 0 if torch.compiler.is_compiling() else int(q_offset)
    layout = None
    if attention_mask is not None and q_offset == 0:
        layout = _causal_layout(attention_mask[:, :q_length])
    return PrefillMask(attention_mask, q_offset, layout, (batch_size, 1, q_length, kv_length))


def voco_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | PrefillMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    voco_layout: VocoLayout | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls in every layer.

    Args:
        query ([B, Hq, S, D]), key, value ([B, Hkv, K, D]): after RoPE and cache update.
        attention_mask: what `voco_mask` returned.
        voco_layout: the layout of the B * S tokens (`keep_padding=True` for a padded batch); only with an empty cache.

    Returns:
        ([B, S, Hq, D], None)

    Raises:
        ValueError: dropout, a sliding window, soft-capped scores or attention weights are asked for; a layout that does
            not fit the tokens, or that comes with a filled cache.
    """
    _refuse_options(module, dropout, kwargs)
    if not getattr(module, "is_causal", True):
        # A vision tower that was switched to "voco" together with its language model.
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    batch, _, length, _ = query.shape
    prefill = attention_mask if isinstance(attention_mask, PrefillMask) else None
    if attention_mask is not None and prefill is None and length > 1:
        # A 4-D mask of the caller's own.
        if voco_layout is not None:
            reject("attention_mask", "a 2-D mask or None where a layout is given", f"{attention_mask.ndim}-D")
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    offset = prefill.offset if prefill is not None else 0
    if voco_layout is not None:
        if offset or voco_layout.num_tokens != batch * length:
            reject(
                "voco_layout",
                f"of the {batch} x {length} tokens of this forward, with an empty cache (keep_padding=True for a batch)",
                f"of {voco_layout.num_tokens} tokens, with {offset} keys in the cache",
            )
        return _packed(query, key, value, voco_layout, scaling), None
    if length == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if prefill is not None and prefill.causal_layout is not None:
        return _packed(query, key, value, prefill.causal_layout, scaling), None
    if offset == 0:
        key, value = key[:, :, :length], value[:, :, :length]
        return sdpa_attention_forward(module, query, key, value, None, dropout, scaling, is_causal=True)
    return _behind_cache(query, key, value, prefill, scaling), None


def keep_public_keys(cache: Cache, layout: VocoLayout, batch_size: int) -> None:
    """Drop from a cache, right after a masked prefill, every key that later text may not see. In place.

    Rows keep their public keys in order. Where rows have different numbers of them, shorter rows are padded on the left,
    and the cache remembers which slots are padding (`decode_mask` reads it).

    Args:
        cache: a DynamicCache or StaticCache that holds exactly the layout's B * S tokens, in B rows.
        layout: the layout of the prefill.
        batch_size: B.

    Raises:
        ValueError: the cache has other layers than full attention, or holds another number of tokens.
    """
    if not bool((~layout.public & (layout.segment_ids >= 0)).any()):
        # Nothing to hide; padding is the attention mask's business. The cache may have been used before.
        cache.voco_prompt_length, cache.voco_prefix_mask = 0, None
        return
    public = layout.public.view(batch_size, -1)
    counts = public.sum(1)
    kept, length = int(counts.max()), public.shape[1]
    # A stable sort of the flags moves the public keys of each row to its end, in order.
    index = public.long().sort(dim=1, stable=True).indices[:, length - kept :]
    valid = torch.arange(kept, device=public.device) >= kept - counts[:, None]
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, StaticLayer):
            reject("cache", "made of full-attention layers", f"one with {type(layer).__name__}")
        if int(layer.get_seq_length()) != length:
            reject("cache", f"one that holds {length} tokens", f"one with {int(layer.get_seq_length())}")
        rows = index[:, None, :, None].to(layer.keys.device).expand(-1, layer.keys.shape[1], -1, -1)
        keys = layer.keys.gather(2, rows.expand(-1, -1, -1, layer.keys.shape[3]))
        values = layer.values.gather(2, rows.expand(-1, -1, -1, layer.values.shape[3]))
        if isinstance(layer, StaticLayer):
            layer.keys[:, :, :kept], layer.values[:, :, :kept] = keys, values
            layer.cumulative_length.fill_(kept)
        else:
            layer.keys, layer.values = keys, values
    cache.voco_prompt_length = length
    cache.voco_prefix_mask = valid


def decode_mask(
    cache: Cache | None, attention_mask: torch.Tensor | None, query_length: int
) -> torch.Tensor | PrefillMask | None:
    """The 2-D attention mask in terms of the slots that `keep_public_keys` left, from one in terms of all tokens."""
    prefix = getattr(cache, "voco_prefix_mask", None)
    if prefix is None or (attention_mask is not None and attention_mask.ndim != 2):
        return attention_mask
    seen = int(cache.get_seq_length()) + query_length
    if attention_mask is None:
        if bool(prefix.all()):
            return None
        tail = prefix.new_ones(prefix.shape[0], seen - prefix.shape[1])
    elif attention_mask.shape[1] == seen and prefix.shape[1] != cache.voco_prompt_length:
        return attention_mask  # It is one already.
    else:
        tail = attention_mask[:, cache.voco_prompt_length :]
    if prefix.shape[0] != tail.shape[0]:
        prefix = prefix.repeat_interleave(tail.shape[0] // prefix.shape[0], dim=0)
    return torch.cat([prefix.to(tail.dtype), tail], dim=1)


def num_new_tokens(cache: Cache, next_sequence_length: int | None, is_first_iteration: bool | None) -> int | None:
    """How many of `generate`'s input ids are new, where it counted them as the ids that exceed the cache.

    It does so when a conversation goes on behind the cache of its first part; keys that `keep_public_keys` dropped stand
    for ids, too.
    """
    prefix = getattr(cache, "voco_prefix_mask", None)
    if prefix is None or next_sequence_length is None or not is_first_iteration:
        return next_sequence_length
    return next_sequence_length - (cache.voco_prompt_length - prefix.shape[1])


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache of a call that may give it under either name; ValueError where it has both."""
    if cache is not None and past_key_values is not None:
        reject("cache", "None where past_key_values (its other name) is given", type(cache).__name__)
    return past_key_values if cache is None else cache


def rename_cache(kwargs: dict) -> Cache | None:
    """Give the cache among a call's keywords, under whichever name, the name `CACHE_NAME`, in place; and return it."""
    cache = one_cache(*(kwargs.pop(name, None) for name in CACHE_NAMES))
    if cache is not None:
        kwargs[CACHE_NAME] = cache
    return cache


def refuse_private_tokens(layout: VocoLayout) -> None:
    """ValueError where tokens that go behind a filled cache, plain causally, hold keys that later text may not see."""
    if bool((~layout.public & (layout.segment_ids >= 0)).any()):
        reject("input_ids", "text, or images without VoCo tokens, behind a filled cache", "with a segment")


LayoutBuilder = Callable[[torch.Tensor, torch.Tensor | None], VocoLayout]


def attach(model: torch.nn.Module, build_layout: LayoutBuilder) -> Callable[[], None]:
    """Give a stock model VoCo attention in `forward` and `generate`.

    At every forward with an empty cache the layout is made from `input_ids` (already expanded for beams) and passed on as
    `voco_layout`; afterwards the cache is reduced to public keys. With a filled cache nothing is passed: the model is plain
    causal then.

    Args:
        model: a model that was loaded with `attn_implementation="voco"` (for LLaVA `{"text_config": "voco"}`).
        build_layout: (input_ids [B, S], attention_mask [B, S] or None) -> layout of the B * S tokens, for example
            `functools.partial(VocoLayout.from_input_ids, ...)` with `keep_padding=True`, called with
            `attention_mask=` by keyword.

    Returns:
        A function that undoes it.

    Positions are the model's own ("continuous") unless `position_ids` are passed: for compact positions give
    `layout.position_ids.view(B, S)` to `forward` or `generate`.
    """
    implementation = model.config.get_text_config()._attn_implementation
    if implementation != NAME:
        reject("model", f'one with attn_implementation="{NAME}"', f'one with "{implementation}"')

    def before(module, args, kwargs):
        # Under the name that the model does not know it would be ignored.
        cache = rename_cache(kwargs)
        input_ids = args[0] if args else kwargs.get("input_ids")
        mask = kwargs.get("attention_mask")
        if cache is not None and int(cache.get_seq_length()):
            kwargs.pop("voco_layout", None)
            new = input_ids if input_ids is not None else kwargs["inputs_embeds"]
            kwargs["attention_mask"] = decode_mask(cache, mask, new.shape[1])
            if input_ids is not None and new.shape[1] > 1:
                refuse_private_tokens(build_layout(input_ids, attention_mask=None))
        elif kwargs.get("voco_layout") is None:
            if input_ids is None:
                reject("input_ids", "given (the layout is made from them), or voco_layout", "None")
            two_dimensional = mask.padding if isinstance(mask, PrefillMask) else mask
            kwargs["voco_layout"] = build_layout(input_ids, attention_mask=two_dimensional)
        return args, kwargs

    def after(module, args, kwargs, output):
        layout, cache = kwargs.get("voco_layout"), getattr(output, CACHE_NAME, None)
        if layout is not None and cache is not None:
            shape = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
            keep_public_keys(cache, layout, shape.shape[0])
        return output

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    if prepare is not None:
        # A static cache's mask is made here, before the forward, so the mask has to be right here already.
        @wraps(prepare)
        def prepare_with_cache_mask(input_ids, **kwargs):
            cache, mask = rename_cache(kwargs), kwargs.get("attention_mask")
            if cache is not None and int(cache.get_seq_length()):
                new = num_new_tokens(cache, kwargs.get("next_sequence_length"), kwargs.get("is_first_iteration"))
                kwargs["next_sequence_length"] = new
                kwargs["attention_mask"] = decode_mask(cache, mask, input_ids.shape[1] if new is None else new)
            return prepare(input_ids, **kwargs)

        model.prepare_inputs_for_generation = prepare_with_cache_mask

    def detach() -> None:
        for hook in hooks:
            hook.remove()
        if prepare is not None:
            del model.prepare_inputs_for_generation

    return detach


def _refuse_options(module: torch.nn.Module, dropout: float, kwargs: dict) -> None:
    if dropout:
        reject("dropout", "0 for VoCo attention (attention_dropout in the config)", dropout)
    window = kwargs.get("sliding_window")
    if window is not None:
        reject("sliding_window", "None for VoCo attention", window)
    if kwargs.get("softcap") is not None:
        reject("softcap", "None for VoCo attention", kwargs["softcap"])
    wanted = kwargs.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False)
    if wanted:
        reject("output_attentions", "False for VoCo attention (weights are never formed)", wanted)


def _causal_layout(padding: torch.Tensor) -> VocoLayout:
    """Plain causal attention over the rows of a padded batch: open text, and padding."""
    batch, length = padding.shape
    valid = padding.reshape(-1).bool()
    ends = torch.arange(batch + 1, dtype=torch.int32, device=padding.device) * length
    segment_ids = valid.to(torch.int32) - 1
    return VocoLayout(segment_ids, valid, ends, torch.zeros_like(valid, dtype=torch.int64), False)


def _packed(query, key, value, layout: VocoLayout, scaling: float | None) -> torch.Tensor:
    """[B, S, Hq, D]: the batch's rows as documents of one packed sequence. A static cache's unused tail is left out."""
    batch, _, length, _ = query.shape
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        # As autocast does for SDPA: the rotation leaves queries and keys in float32, values are of the lower dtype.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    q, k, v = (x[:, :, :length].transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    return voco_attention(q, k, v, layout, scale=scaling).unflatten(0, (batch, length))


def _behind_cache(query, key, value, mask: PrefillMask, scaling: float | None) -> torch.Tensor:
    """[B, S, Hq, D]: new tokens see the cache and, causally, each other; a chunk of rows at a time."""
    batch, heads, length, _ = query.shape
    total = mask.offset + length
    index = torch.arange(total, device=query.device)
    chunks = []
    for begin in range(0, length, ROW_CHUNK):
        end = min(begin + ROW_CHUNK, length)
        keys = mask.offset + end
        visible = index[None, :keys] <= index[mask.offset + begin : keys, None]
        visible = visible[None, None].expand(batch, 1, -1, -1)
        if mask.padding is not None:
            visible = visible & mask.padding[:, None, None, :keys]
        # A padding row would see nothing and give NaN; its result is never used, so let it see everything.
        visible = visible | ~visible.any(-1, keepdim=True)
        chunks.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, begin:end],
                key[:, :, :keys],
                value[:, :, :keys],
                attn_mask=visible,
                scale=scaling,
                enable_gqa=heads != key.shape[1],
            )
        )
    return torch.cat(chunks, dim=2).transpose(1, 2)
