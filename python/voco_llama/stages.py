"""The two stages of VoCo inference: segments become K/V, text runs over K/V.

Stage 1 forwards a segment causally and keeps the K/V of its public tokens, keys before RoPE. Stage 2 puts such K/V into a
cache and forwards the text behind it. Because text sees public keys only, and RoPE is relative, stage 2 is a plain causal
LLaMA over the public tokens: their positions are shifted so that the last run of text starts where a plain prompt would.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, DynamicCache

from voco_kernels import VocoKV, VocoLayout, extract_kv, inject_kv
from voco_kernels.integrations.transformers import CACHE_NAME

from .processing import pixels_digest

# RoPE types whose frequencies depend on the length of the input: K/V made at one length would not fit another.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True, eq=False)
class Run:
    """A contiguous run of one document: open text (`segment` 0) or one segment.

    Attributes:
        tokens: its tokens, as a slice of the document.
        segment: 0, or the segment id.
        public (bool [n]), positions (int64 [n]): of its tokens.
        closed: for a segment, whether it sees nothing public outside itself, so that it may be compressed alone.
    """

    tokens: slice
    segment: int
    public: torch.Tensor
    positions: torch.Tensor
    closed: bool


@dataclass(frozen=True, eq=False)
class PublicPrompts:
    """What stage 2 generates from: public tokens [B, P], their mask, and the cache of all but the last text run.

    `pixel_values` are the uncompressed images that stand in the last text runs; None without any.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    cache: DynamicCache
    pixel_values: torch.Tensor | None


def length_of(cache: Cache) -> int:
    """Number of keys in a cache."""
    return int(cache.get_seq_length())


def rotary_of(language_model: torch.nn.Module) -> tuple[torch.Tensor, float]:
    """(inv_freq float32 [D/2], attention_scaling) of a LLaMA; ValueError where they depend on the input's length."""
    rotary = language_model.rotary_emb
    if rotary.rope_type in LENGTH_DEPENDENT_ROPE:
        raise ValueError(
            f"rope_type must be one with fixed frequencies for stored K/V, but was {rotary.rope_type!r}: its frequencies "
            "depend on the length of the input"
        )
    return rotary.inv_freq.float(), float(rotary.attention_scaling)


def compress(model, input_ids: torch.Tensor, pixel_values: torch.Tensor, meta: dict[str, str]) -> list[VocoKV]:
    """Stage 1 of rows that are one closed segment each: one VocoKV per row."""
    layout = model.layout_of(input_ids)
    rows, width = input_ids.shape
    segments, public = layout.segment_ids.view(rows, width), layout.public.view(rows, width)
    inside = (segments > 0) & (segments == segments[:, :1])
    if not bool(inside.all()):
        row = int((~inside.all(1)).nonzero()[0])
        raise ValueError(
            f"input_ids must hold one closed segment a row (an image and its VoCo tokens, nothing else), but row {row} has "
            f"{int((~inside[row]).sum())} of {width} tokens outside of its first segment; compress it in its context with "
            "generate(two_stage=True)"
        )
    model._check_context(layout)
    device = model.device
    inv_freq, scaling = rotary_of(model.model.language_model)
    output = model.model(
        input_ids=input_ids.to(device), pixel_values=pixel_values.to(device, model.dtype), use_cache=True
    )
    results = []
    for row, kv in enumerate(_extract_rows(getattr(output, CACHE_NAME), public, inv_freq, scaling)):
        info = {**meta, "image": pixels_digest(pixel_values[row]), "prompt": _digest(input_ids[row])}
        counts = (width - kv.num_tokens, kv.num_tokens)
        results.append(VocoKV(kv.k, kv.v, segments=[counts], meta=info))
    return results


def runs_of(layout: VocoLayout, begin: int, end: int) -> list[Run]:
    """The runs of one document, tokens begin to end of the layout, padding left out."""
    segments, public, positions = (
        x[begin:end].cpu() for x in (layout.segment_ids, layout.public, layout.position_ids)
    )
    edges = [0, *((segments[1:] != segments[:-1]).nonzero()[:, 0] + 1).tolist(), end - begin]
    runs, seen_public = [], False
    for first, last in itertools.pairwise(edges):
        if first == last or segments[first] < 0:
            continue
        tokens = slice(first, last)
        closed = layout.isolated or not seen_public
        runs.append(Run(tokens, int(segments[first]), public[tokens], positions[tokens], closed))
        seen_public = seen_public or bool(public[tokens].any())
    return runs


def shift_of(runs: list[Run]) -> int:
    """What to subtract from positions so that the last run, of text, stands where a plain prompt would have it."""
    before = sum(int(run.public.sum()) for run in runs[:-1])
    return int(runs[-1].positions[0]) - before


def per_segment(kv: VocoKV) -> list[VocoKV]:
    """The K/V of each segment (a video has one per frame), as views; K/V of unknown segments count as those of one."""
    if kv.segments is None or len(kv.segments) == 1:
        return [kv]
    counts = [voco for _, voco in kv.segments]
    tensors = (kv.k, kv.v, kv.k_scale, kv.v_scale)
    parts = zip(*([None] * len(counts) if x is None else x.split(counts, dim=1) for x in tensors), strict=True)
    return [VocoKV(*part, [segment], kv.meta) for part, segment in zip(parts, kv.segments, strict=True)]


@torch.no_grad()
def forward_runs(
    language_model: torch.nn.Module, runs: list[Run], shift: int, embeddings, stored: Iterator[VocoKV] | None
) -> tuple[DynamicCache, list[torch.Tensor]]:
    """Walk the runs of one document: compress or inject segments, forward text.

    Args:
        language_model: a LlamaModel with VoCo attention.
        embeddings: run -> its input embeddings [1, n, E].
        stored: the K/V of the segments, in order; where None they are compressed, alone if closed, else in context.

    Returns:
        The cache of all public tokens, and the hidden states [1, n, E] of each text run.
    """
    cache = DynamicCache(config=language_model.config)
    inv_freq, scaling = rotary_of(language_model)
    hidden = []

    def places(run: Run) -> torch.Tensor:
        return (run.positions - shift).to(language_model.device)

    def forward(run: Run, into: DynamicCache) -> torch.Tensor:
        return language_model(
            inputs_embeds=embeddings(run), position_ids=places(run)[None], use_cache=True, **{CACHE_NAME: into}
        ).last_hidden_state

    def compressed_alone(run: Run) -> VocoKV:
        alone = DynamicCache(config=language_model.config)
        forward(run, alone)
        index = run.public.nonzero()[:, 0].to(language_model.device)
        return _extract(alone, 0, index, places(run)[index], inv_freq, scaling)

    def sees_no_cache(run: Run) -> bool:
        return run.segment > 0 and (stored is not None or run.closed)

    for apart, group in itertools.groupby(runs, sees_no_cache):
        group = list(group)
        if apart:
            parts = [compressed_alone(run) if stored is None else next(stored) for run in group]
            positions = torch.cat([(run.positions - shift)[run.public] for run in group])
            append(cache, parts, positions.to(language_model.device), inv_freq, scaling, language_model.dtype)
            continue
        for run in group:
            past = length_of(cache)
            states = forward(run, cache)
            if run.segment:
                _drop_private(cache, past, run.public)
            else:
                hidden.append(states)
    return cache, hidden


def public_prompts(
    model, input_ids: torch.Tensor, layout: VocoLayout, voco_kv: VocoKV | list[VocoKV] | None, pixel_values
) -> PublicPrompts:
    """Everything of the prompts but their last text run, in one cache, rows padded on the left."""
    rows, width = input_ids.shape
    documents = [runs_of(layout, row * width, (row + 1) * width) for row in range(rows)]
    for row, runs in enumerate(documents):
        if not runs or runs[-1].segment:
            raise ValueError(f"input_ids must end with text in every row, but row {row} ends with an image or is empty")
    stored = None
    if voco_kv is not None:
        given = [voco_kv] if isinstance(voco_kv, VocoKV) else voco_kv
        parts = [per_segment(kv.to(model.device)) for kv in given]
        ids = input_ids.cpu()
        segments = [(ids[row, run.tokens], run) for row, runs in enumerate(documents) for run in runs if run.segment]
        _check_stored(model, parts, segments)
        stored = itertools.chain.from_iterable(parts)
    embed = _Embedder(model, input_ids, layout if stored is not None else None, pixel_values)
    caches = []
    for row, runs in enumerate(documents):
        shift = shift_of(runs)
        cache, _ = forward_runs(
            model.model.language_model, runs[:-1], shift, lambda run, row=row: embed(row, run), stored
        )
        caches.append(cache)
    last_runs = [runs[-1] for runs in documents]
    pixels = [embed.pixels(row, run) for row, run in enumerate(last_runs)]
    pixels = torch.cat(pixels) if any(len(part) for part in pixels) else None
    return _stack(model, input_ids, caches, last_runs, pixels)


class _Embedder:
    """Input embeddings of runs of prompt rows.

    Args:
        stored: the layout, where its segments come from K/V; `pixel_values` then holds the other images alone.
    """

    def __init__(self, model, input_ids: torch.Tensor, stored: VocoLayout | None, pixel_values: torch.Tensor | None):
        self.model, self.input_ids, self.pixel_values = model, input_ids, pixel_values
        self.is_image = input_ids == model.config.image_token_id
        if stored is not None:
            self.is_image = self.is_image & (stored.segment_ids.view(input_ids.shape) == 0)
        images = 0 if pixel_values is None else pixel_values.shape[0]
        tokens = int(self.is_image.sum())
        self.tokens_per_image = tokens // images if images else 0
        if tokens != self.tokens_per_image * images or bool(tokens) != bool(images):
            raise ValueError(
                f"pixel_values must hold the images of the prompt that have no K/V ({tokens} vision tokens), but held "
                f"{images}"
            )
        # Vision tokens before each token, over all rows.
        self.before = self.is_image.flatten().cumsum(0).view(input_ids.shape) - self.is_image.long()

    def pixels(self, row: int, run: Run) -> torch.Tensor:
        """The images [images, 3, H, W] of a run; empty without any."""
        count = int(self.is_image[row, run.tokens].sum())
        if not count:
            return torch.empty(0)
        if count % self.tokens_per_image:
            raise ValueError(
                f"pixel_values must hold the images of the prompt that have no K/V, but its {len(self.pixel_values)} images "
                f"do not divide their {int(self.is_image.sum())} vision tokens"
            )
        first = int(self.before[row, run.tokens][0]) // self.tokens_per_image
        return self.pixel_values[first : first + count // self.tokens_per_image]

    def __call__(self, row: int, run: Run) -> torch.Tensor:
        ids = self.input_ids[row, run.tokens].to(self.model.device)
        embeds = self.model.get_input_embeddings()(ids)
        vision = self.is_image[row, run.tokens].to(embeds.device)
        if bool(vision.any()):
            pixels = self.pixels(row, run)
            features = image_features(self.model, pixels.to(embeds.device, self.model.dtype))
            if len(features) != int(vision.sum()):
                raise ValueError(
                    f"pixel_values must hold the images of the prompt that have no K/V, but {len(features)} features stand "
                    f"for {int(vision.sum())} vision tokens"
                )
            embeds = embeds.masked_scatter(vision[:, None], features.to(embeds.dtype))
        return embeds[None]


def image_features(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """[images * vision tokens, E]: LLaVA's projected features, whatever container this transformers returns them in."""
    features = model.model.get_image_features(pixel_values=pixel_values)
    features = getattr(features, "pooler_output", features)
    return torch.cat(list(features), dim=0)


def _check_stored(model, parts: list[list[VocoKV]], segments: list[tuple[torch.Tensor, Run]]) -> None:
    """ValueError where K/V do not fit the segments, (token ids, run), that they stand for.

    `parts` has the segments of each VocoKV that was given.
    """
    stored = [
        (f"voco_kv[{i}]" + (f", segment {j}," if len(part) > 1 else ""), kv)
        for i, part in enumerate(parts)
        for j, kv in enumerate(part)
    ]
    if len(stored) != len(segments):
        raise ValueError(f"voco_kv must hold one VocoKV per image of the prompts ({len(segments)}), but holds {len(stored)}")
    expected = {"model": model.fingerprint()}
    if any("processor" in kv.meta for _, kv in stored):
        expected["processor"] = model.processor.fingerprint()
    config = model.config.text_config
    shape = (config.num_hidden_layers, config.num_key_value_heads)
    for (name, kv), (ids, run) in zip(stored, segments, strict=True):
        for origin, value in expected.items():
            if kv.meta.get(origin, value) != value:
                raise ValueError(
                    f"{name} must be made by this {origin} ({value[:12]}...), but was made by {kv.meta[origin][:12]}..."
                )
        counts = (int((~run.public).sum()), int(run.public.sum()))
        if (kv.segments is not None and [tuple(s) for s in kv.segments] != [counts]) or kv.num_tokens != counts[1]:
            raise ValueError(
                f"{name} must be of {counts[0]} private and {counts[1]} VoCo tokens, as the prompt is, but was of "
                f"{kv.segments or [kv.num_tokens]}"
            )
        if (kv.k.shape[0], kv.k.shape[2]) != shape:
            raise ValueError(f"{name} must have [layers, heads] {list(shape)}, but was of shape {list(kv.k.shape)}")
        digest = _digest(ids)
        if kv.meta.get("prompt", digest) != digest:
            raise ValueError(f"{name} must be made of its segment's tokens in input_ids, but was made of others")
        if not run.closed:
            raise ValueError(
                f"{name} stands where its segment is not closed (public tokens before it, and the model is not "
                "isolated); use pixel_values with two_stage=True"
            )


def _stack(
    model, input_ids: torch.Tensor, caches: list[DynamicCache], last_runs: list[Run], pixel_values: torch.Tensor | None
) -> PublicPrompts:
    """Rows [padding, cached tokens, padding, last text run] of one length, and their caches behind left padding."""
    config, device = model.config, model.device
    pad = config.text_config.pad_token_id
    pad = 0 if pad is None else pad
    lengths = [length_of(cache) for cache in caches]
    texts = [input_ids[row, run.tokens].to(device) for row, run in enumerate(last_runs)]
    prefix, width = max(lengths), max(len(text) for text in texts)
    ids = torch.full((len(caches), prefix + width), pad, dtype=input_ids.dtype, device=device)
    mask = torch.zeros_like(ids)
    for row, (length, text) in enumerate(zip(lengths, texts, strict=True)):
        # What stands at cached places is never embedded; the VoCo token is what the prompt really has there.
        ids[row, prefix - length : prefix], mask[row, prefix - length : prefix] = config.voco_token_id, 1
        ids[row, prefix + width - len(text) :], mask[row, prefix + width - len(text) :] = text, 1
    merged = DynamicCache(config=config.text_config)
    if prefix:
        for layer in range(config.text_config.num_hidden_layers):
            parts = [(c.layers[layer].keys, c.layers[layer].values) if n else None for c, n in zip(caches, lengths)]
            shape = next(part for part in parts if part is not None)[0].shape
            padded = [
                [
                    torch.nn.functional.pad(part[i], (0, 0, prefix - part[i].shape[2], 0))
                    if part is not None
                    else torch.zeros(1, shape[1], prefix, shape[3], dtype=model.dtype, device=device)
                    for part in parts
                ]
                for i in (0, 1)
            ]
            merged.update(torch.cat(padded[0]), torch.cat(padded[1]), layer)
    return PublicPrompts(ids, mask, merged, pixel_values)


def _extract(cache: Cache, row: int, index, positions, inv_freq, scaling) -> VocoKV:
    keys = [layer.keys[row].transpose(0, 1) for layer in cache.layers]
    values = [layer.values[row].transpose(0, 1) for layer in cache.layers]
    return extract_kv(keys, values, index, positions, inv_freq, scaling)


def _extract_rows(cache: Cache, public: torch.Tensor, inv_freq, scaling) -> list[VocoKV]:
    """The K/V of each row's public tokens (bool [B, S]): one extraction for all rows that have them in the same places."""
    patterns, kinds = public.unique(dim=0, return_inverse=True)
    found: dict[int, VocoKV] = {}
    for kind, pattern in enumerate(patterns):
        rows, columns = (kinds == kind).nonzero()[:, 0], pattern.nonzero()[:, 0]
        device, count = cache.layers[0].keys.device, len(columns)
        chosen = (rows[:, None].to(device), slice(None), columns.to(device))
        keys, values = ([x[chosen].flatten(0, 1) for x in side] for side in zip(*((y.keys, y.values) for y in cache.layers)))
        positions = columns.repeat(len(rows)).to(device)
        kv = extract_kv(keys, values, torch.arange(len(positions), device=device), positions, inv_freq, scaling)
        for row, *sides in zip(rows.tolist(), kv.k.split(count, dim=1), kv.v.split(count, dim=1)):
            # Copies: one image must not keep the memory of all.
            found[row] = VocoKV(*(x.clone(memory_format=torch.contiguous_format) for x in sides))
    return [found[row] for row in range(len(public))]


def append(cache: DynamicCache, parts: list[VocoKV], positions: torch.Tensor, inv_freq, scaling, dtype) -> None:
    """Add compressed tokens behind the keys of a one-row cache; together, since a cache grows by being copied.

    Args:
        cache: made with a config, so that it has its layers; changed.
        positions (int64 [tokens]): of the tokens of all parts.
        dtype: of the keys and values in the cache.
    """
    for _, alike in itertools.groupby(parts, lambda kv: kv.k.dtype):
        first, *others = alike
        kv = VocoKV.cat([first, *others]) if others else first
        layers, tokens, heads, head_dim = kv.k.shape
        # As the cache keeps them, so that an empty one takes them as they are: [layers, 1, H, tokens, D].
        k, v = (kv.k.new_empty(layers, 1, heads, tokens, head_dim, dtype=dtype) for _ in "kv")
        slots = torch.arange(tokens, device=k.device)
        inject_kv(kv, k[:, 0].transpose(1, 2), v[:, 0].transpose(1, 2), slots, positions[:tokens], inv_freq, scaling)
        positions = positions[tokens:]
        empty = not length_of(cache)
        for layer in range(layers):
            if not empty:
                cache.update(k[layer], v[layer], layer)
                continue
            cache.update(k[layer, :, :, :0], v[layer, :, :, :0], layer)  # it only learns of what kind they are
            cache.layers[layer].keys, cache.layers[layer].values = k[layer], v[layer]


def _drop_private(cache: DynamicCache, past: int, public: torch.Tensor) -> None:
    """Of the tokens behind the first `past`, keep the keys of those that are public (bool [n])."""
    index = public.nonzero()[:, 0].to(cache.layers[0].keys.device)
    kept = torch.cat([torch.arange(past, device=index.device), past + index])
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.index_select(2, kept), layer.values.index_select(2, kept)


def store_key(model: str, processor: str, dtype: str, ids: torch.Tensor, pixels: torch.Tensor) -> str:
    """SHA-256 over what decides the K/V of a segment: fingerprints of model and processor, dtype, token ids and pixels."""
    return hashlib.sha256("\n".join((model, processor, dtype, _digest(ids), pixels_digest(pixels))).encode()).hexdigest()


def _digest(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.cpu().to(torch.int64).numpy().tobytes()).hexdigest()
