"""The thin VoCo LLaVA: stock LLaVA layers, VoCo attention in the LLaMA, two-stage inference around `generate`."""

import hashlib
import itertools
import json
from collections.abc import Callable, Sized

import torch
from transformers import LlavaForConditionalGeneration, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from voco_kernels import VocoKV, VocoLayout
from voco_kernels.integrations import transformers as voco_transformers
from voco_kernels.integrations.transformers import CACHE_NAME

from . import stages
from .configuration import VocoLlavaConfig
from .layouts import layout_of
from .processing import VocoProcessor
from .video import frames_of

voco_transformers.register()


class VocoLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA whose text sees an image only through its VoCo tokens (VoCo-LLaMA, arXiv 2406.12275).

    The LLaMA always runs with `attn_implementation="voco"`; prompts without VoCo tokens are plain causal.
    """

    config: VocoLlavaConfig
    config_class = VocoLlavaConfig

    def __init__(self, config: VocoLlavaConfig):
        super().__init__(config)
        self.set_attn_implementation({"text_config": voco_transformers.NAME})
        self._processor: VocoProcessor | None = None
        self._fingerprint: tuple[tuple, str] | None = None
        # What training minimises, in place of cross-entropy over all logits (`voco_llama.training.objectives`). It runs
        # inside of `forward`, where every launcher has the weights at hand and sees their use.
        self.objective: Callable | None = None

    # ---- loading -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, but weights that the checkpoint lacks are an error, never random.

        Raises:
            ValueError: the checkpoint misses weights of the model, or holds them in other shapes.
        """
        # transformers would raise for wrong shapes without naming one.
        kwargs["ignore_mismatched_sizes"] = True
        model, info = super().from_pretrained(name_or_path, *args, output_loading_info=True, **kwargs)
        for name, what in (("missing_keys", "lacks"), ("mismatched_keys", "holds in another shape")):
            keys = sorted(map(str, info.get(name) or ()))
            if keys:
                shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
                raise ValueError(f"checkpoint {name_or_path} {what}: {shown}")
        return (model, info) if output_loading_info else model

    @property
    def processor(self) -> VocoProcessor:
        """The processor of the checkpoint this model was loaded from, unless another one was set."""
        if self._processor is None:
            self._processor = VocoProcessor.from_pretrained(self.config._name_or_path)
        return self._processor

    @processor.setter
    def processor(self, processor: VocoProcessor) -> None:
        self._processor = processor

    def fingerprint(self) -> str:
        """SHA-256 over the configuration and every tensor: what compressed images are tied to.

        Tensors are hashed again only after a parameter or the configuration has changed.
        """
        tensors = self.state_dict()
        state = (_state_of(self.config), *((x.data_ptr(), x._version) for x in tensors.values()))
        if self._fingerprint is None or self._fingerprint[0] != state:
            settings = _settings(self.config.to_diff_dict())
            digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
            for name, x in sorted(tensors.items()):
                digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
                digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            self._fingerprint = (state, digest.hexdigest())
        return self._fingerprint[1]

    # ---- layouts -----------------------------------------------------------------------------------------------------

    def layout_of(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> VocoLayout:
        """The layout of a padded batch [B, S], padding kept."""
        return layout_of(self.config, input_ids, attention_mask, keep_padding=True)

    # ---- single pass -------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        voco_layout: VocoLayout | None = None,
        segment_ids: torch.Tensor | None = None,
        public: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ):
        """LLaVA's forward under the VoCo mask.

        With an empty cache the mask comes from `voco_layout`, or from the plain tensors `segment_ids`, `public`,
        `cu_seqlens` of a packed batch (`VocoCollator`), or from `input_ids`; afterwards the cache keeps only what later
        tokens may see. With a filled cache the forward is plain causal.

        Args:
            input_ids (int64 [B, S]; [1, N] where packed), pixel_values ([images, 3, H, W]), labels ([B, S], -100 ignored).
            voco_layout: B * S tokens, padding kept.
            segment_ids, public ([N]), cu_seqlens ([documents + 1]), position_ids ([1, N]): a packed batch.
            cache, past_key_values: one cache, under either of the names that versions of transformers have for it.

        Returns:
            LlavaCausalLMOutputWithPast; of a model with an `objective`, given `labels`, its `loss` alone.

        Raises:
            ValueError: the LLaMA was switched to another attention than "voco", which would ignore the mask; an image with
                VoCo tokens behind a filled cache; an incomplete packed batch.
        """
        cache = voco_transformers.one_cache(cache, past_key_values)
        if cache is not None and stages.length_of(cache):
            voco_layout = None
            new = input_ids if input_ids is not None else inputs_embeds
            attention_mask = voco_transformers.decode_mask(cache, attention_mask, new.shape[1])
            if input_ids is not None and input_ids.shape[1] > 1:
                voco_transformers.refuse_private_tokens(self.layout_of(input_ids))
        elif voco_layout is None and segment_ids is not None:
            for name, value in (("public", public), ("cu_seqlens", cu_seqlens), ("position_ids", position_ids)):
                if value is None:
                    raise ValueError(f"{name} must be given where segment_ids are, but was None")
            voco_layout = VocoLayout(segment_ids, public, cu_seqlens, position_ids.view(-1), self.config.isolated)
        elif voco_layout is None and input_ids is not None:
            padding = attention_mask
            if isinstance(attention_mask, voco_transformers.PrefillMask):
                padding = attention_mask.padding
            voco_layout = self.layout_of(input_ids, padding)
        implementation = self.config.text_config._attn_implementation
        if voco_layout is not None:
            if implementation != voco_transformers.NAME:
                raise ValueError(f'attn_implementation must be "voco" for the language model, but was "{implementation}"')
            if position_ids is None:
                batch = (input_ids if input_ids is not None else inputs_embeds).shape[0]
                position_ids = voco_layout.position_ids.view(batch, -1)
        if labels is not None and self.objective is not None:
            hidden = self.last_hidden_states(input_ids, pixel_values, position_ids, voco_layout)
            count = kwargs.get("num_items_in_batch")
            loss = self.objective(self, hidden, labels, input_ids, pixel_values, cu_seqlens, count)
            return LlavaCausalLMOutputWithPast(loss=loss)
        if self.training and pixel_values is None and input_ids is not None and _in_a_group():
            inputs_embeds, input_ids = self._embed(input_ids, None), None
        output = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            labels=labels,
            logits_to_keep=logits_to_keep,
            image_sizes=image_sizes,
            voco_layout=voco_layout,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        cache = getattr(output, CACHE_NAME)
        if voco_layout is not None and cache is not None:
            batch = (input_ids if input_ids is not None else inputs_embeds).shape[0]
            voco_transformers.keep_public_keys(cache, voco_layout, batch)
        return output

    def last_hidden_states(self, input_ids, pixel_values, position_ids, voco_layout: VocoLayout) -> torch.Tensor:
        """[B, S, E], of which an `objective` makes as many logits as it needs; arguments as those of `forward`."""
        options = {"position_ids": position_ids, "voco_layout": voco_layout, "use_cache": False}
        return self.model(inputs_embeds=self._embed(input_ids, pixel_values), **options).last_hidden_state

    def _embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """[B, S, E] of tokens and images; for several processes, text without images gets one that adds nothing.

        Each must use the same weights in the same order in every step, or they wait for each other.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = stages.image_features(self, pixel_values).to(embeddings.dtype)
            return embeddings.masked_scatter(self.model.get_placeholder_mask(input_ids, embeddings, features), features)
        if not self.training or not _in_a_group():
            return embeddings
        edge = self.config.vision_config.image_size
        return embeddings + 0 * stages.image_features(self, embeddings.new_zeros(1, 3, edge, edge)).sum()

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, cache=None, attention_mask=None, past_key_values=None, **kwargs
    ):
        """As in transformers, with the attention mask in terms of the keys that the cache still holds."""
        cache = voco_transformers.one_cache(cache, past_key_values)
        if cache is not None and stages.length_of(cache):
            next_sequence_length = voco_transformers.num_new_tokens(
                cache, next_sequence_length, kwargs.get("is_first_iteration")
            )
            new = input_ids.shape[1] if next_sequence_length is None else next_sequence_length
            attention_mask = voco_transformers.decode_mask(cache, attention_mask, new)
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            **{CACHE_NAME: cache},
            **kwargs,
        )

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """As in transformers, but the images of a prompt are repeated as a set, not each on its own."""
        pixels = kwargs.pop("pixel_values", None)
        if pixels is not None and expand_size > 1:
            per_row = (input_ids == self.config.image_token_id).sum(1)
            per_row = (per_row * pixels.shape[0] // per_row.sum()).tolist()
            pixels = torch.cat([part.repeat(expand_size, 1, 1, 1) for part in pixels.split(per_row)])
        expanded, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return expanded, {**kwargs, "pixel_values": pixels} if pixels is not None else kwargs

    # ---- two stages --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def compress(
        self,
        images=None,
        num_voco_tokens: int | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        batch_size: int = 32,
    ) -> list[VocoKV]:
        """Stage 1: compress images into the K/V of their VoCo tokens, each image alone.

        Args:
            images: a list of PIL images, paths or uint8 arrays [H, W, 3], made into tokens by `processor`.
            num_voco_tokens: VoCo tokens per image; the processor's default where None.
            input_ids ([images, S]), pixel_values ([images, 3, H, W]): instead of `images`, one segment a row.
            batch_size: images per forward.

        Returns:
            One VocoKV per image, on the model's device, with `segments` and `meta` (model, processor, image).

        Raises:
            ValueError: an image that cannot be read; a row that is not one closed segment (`two_stage=True` in `generate`
                compresses such a segment in its context); a prompt longer than the context.
        """
        meta = {"model": self.fingerprint()}
        if images is not None:
            images = list(images) if isinstance(images, list | tuple) else [images]
            if not images:
                return []
            input_ids, pixel_values = self._segments_of(images, num_voco_tokens)
            meta["processor"] = self.processor.fingerprint()
        elif input_ids is None or pixel_values is None:
            raise ValueError("images must be given, or input_ids and pixel_values, but were None")
        results = []
        for begin in range(0, input_ids.shape[0], batch_size):
            rows = slice(begin, begin + batch_size)
            results += stages.compress(self, input_ids[rows], pixel_values[rows], meta)
        return results

    def _segments_of(self, images: list, num_voco_tokens: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids [images, S], pixel_values [images, 3, H, W]) of images, each the only one of its row."""
        tokens = self.processor(images, [self.processor.image_token] * len(images), num_voco_tokens)
        return tokens["input_ids"], tokens["pixel_values"]

    def store_keys(self, images: list, num_voco_tokens: int | None = None) -> list[str]:
        """For each image the name of its compressed form in a `VocoStore`: a SHA-256 over all that it depends on.

        That is the model (configuration and every tensor), its dtype, the processor's settings, and of the image its pixels
        as the vision tower gets them and the tokens of its segment, VoCo tokens among them.
        """
        if not images:
            return []
        input_ids, pixel_values = self._segments_of(list(images), num_voco_tokens)
        common = (self.fingerprint(), self.processor.fingerprint(), str(self.dtype))
        return [stages.store_key(*common, ids, pixels) for ids, pixels in zip(input_ids, pixel_values)]

    def compress_video(
        self,
        video,
        num_voco_tokens: int | None = None,
        *,
        fps: float | None = None,
        num_frames: int | None = None,
        batch_size: int = 32,
        store=None,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> VocoKV:
        """Stage 1 of a video: compress its frames, each alone, as they are decoded.

        With the number of frames only the result grows, of which there are two for a moment at the end.

        Args:
            video: a path to a video file, or an iterable of frames: PIL images, paths of images or uint8 arrays [H, W, 3].
            num_voco_tokens: VoCo tokens per frame; the processor's default where None.
            fps, num_frames: which frames (see `video.frames_of`); of a file one a second where both are None.
            batch_size: frames per forward, and in memory.
            store: a `VocoStore`; frames that it holds are not compressed again, wherever they stood then.
            progress: called with the number of frames done and of all (None where it is not known) after each batch.

        Returns:
            One VocoKV of all frames in order, on the model's device: a segment per frame, and what is common to the `meta`
            of all. It may stand among the `voco_kv` of `ask` and `generate` for its frames.

        Raises:
            ValueError: a model that is not isolated; no frames; whatever `compress` and `frames_of` refuse.
        """
        if not self.config.isolated:
            raise ValueError(
                "isolated must be True in the model's configuration, so that frames can be compressed alone, but was False; "
                "generate(two_stage=True) compresses them in their context"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but was {batch_size}")
        frames = frames_of(video, fps=fps, num_frames=num_frames)
        total = len(frames) if isinstance(frames, Sized) else None
        left, parts = iter(frames), []
        while batch := list(itertools.islice(left, batch_size)):
            if store is None:
                parts += self.compress(batch, num_voco_tokens, batch_size=batch_size)
            else:
                parts += [kv.to(self.device) for kv in store.get_or_compress(batch, self, num_voco_tokens)]
            if progress is not None:
                progress(len(parts), total)
        if not parts:
            raise ValueError("video must hold at least one frame, but holds none")
        return VocoKV.cat(parts)

    @torch.no_grad()
    def cache_images(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> Cache:
        """Full caching: the K/V of every token of an uncompressed prefix, as a cache to pass on.

        Args:
            input_ids ([1, S]): a prefix without VoCo tokens; pixel_values ([images, 3, H, W]): its images.
        """
        output = self(
            input_ids=input_ids.to(self.device),
            pixel_values=pixel_values.to(self.device),
            use_cache=True,
            logits_to_keep=1,
        )
        return getattr(output, CACHE_NAME)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *,
        voco_kv: VocoKV | list[VocoKV] | None = None,
        two_stage: bool = False,
        **kwargs,
    ):
        """`generate` of transformers, also over compressed images.

        Args:
            inputs, input_ids ([B, S]): prompts with vision and VoCo placeholders (`processor`), the same in every mode.
            voco_kv: compressed images, one per image of all prompts in order, instead of `pixel_values`: stage 2 alone. One
                of several segments (`compress_video`) stands for as many images.
            two_stage: with `pixel_values`, compress first (segment by segment, in context where a segment is not closed)
                and keep only public keys; memory then does not grow with the number of images.
            kwargs: as in transformers; the cache of a conversation may be called `cache` or `past_key_values`.

        Returns:
            As in transformers: the given prompts followed by new tokens.

        Raises:
            ValueError: `voco_kv` of another model, processor or VoCo count; prompts longer than the context, or without
                text at the end; images of which there are neither pixels nor K/V; a cache that does not hold the images.
        """
        cache = voco_transformers.rename_cache(kwargs)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None:
            return super().generate(**kwargs)
        attention_mask = kwargs.get("attention_mask")
        layout = self.layout_of(input_ids, attention_mask)
        self._check_context(layout)
        if voco_kv is not None or two_stage:
            return _generate_in_stages(self, super().generate, input_ids, layout, voco_kv, **kwargs)
        self._check_images(input_ids, layout, kwargs.get("pixel_values"), cache)
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = layout.position_ids.view(input_ids.shape)
        return super().generate(input_ids, **kwargs)

    def ask(
        self,
        question: str,
        *,
        images=None,
        voco_kv: VocoKV | list[VocoKV] | None = None,
        num_voco_tokens: int | None = None,
        **kwargs,
    ) -> str:
        """The answer to one question about images or compressed images, through the processor's chat template.

        Args:
            images: PIL images, paths or uint8 arrays [H, W, 3]; read in a single pass (num_voco_tokens=0: uncompressed).
            voco_kv: compressed images and videos instead.
            num_voco_tokens: VoCo tokens per image of `images`.
            kwargs: for `generate`; greedy unless they say otherwise.
        """
        if (images is None) == (voco_kv is None):
            raise ValueError("images or voco_kv must be given, and not both")
        if voco_kv is None:
            frames, counts = len(images), num_voco_tokens
        else:
            voco_kv = [voco_kv] if isinstance(voco_kv, VocoKV) else voco_kv
            of_source = [[kv.num_tokens] if kv.segments is None else [n for _, n in kv.segments] for kv in voco_kv]
            frames, counts = [len(x) for x in of_source], list(itertools.chain.from_iterable(of_source))
        prompt = self.processor.prompt(question, frames)
        tokens = self.processor(images, prompt, counts).to(self.device)
        new = self.generate(**tokens, voco_kv=voco_kv, **{"do_sample": False, "max_new_tokens": 64, **kwargs})
        new = new[0, tokens["input_ids"].shape[1] :]
        return self.processor.decode(new, skip_special_tokens=True).strip()

    def _check_images(self, input_ids, layout: VocoLayout, pixel_values, cache: Cache | None) -> None:
        """ValueError where images of the prompts have neither pixels nor keys in the cache that later text may see."""
        if cache is not None and stages.length_of(cache):
            private = (~layout.public & (layout.segment_ids >= 0)).view(input_ids.shape)
            if bool(private[:, getattr(cache, "voco_prompt_length", 0) :].any()):
                raise ValueError(
                    f"{CACHE_NAME} must come from a single pass over the beginning of input_ids that holds all images "
                    "with VoCo tokens, but did not"
                )
        elif pixel_values is None and bool((input_ids == self.config.image_token_id).any()):
            raise ValueError("pixel_values or voco_kv must be given for input_ids with images, but both were None")

    def _check_context(self, layout: VocoLayout) -> None:
        last = int(layout.position_ids.max()) if layout.num_tokens else 0
        limit = self.config.text_config.max_position_embeddings
        if last >= limit:
            raise ValueError(f"input_ids must fit the context of {limit} positions, but reach position {last}")


def _in_a_group() -> bool:
    """Whether this process trains together with others."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _generate_in_stages(model, generate, input_ids, layout, voco_kv, **kwargs):
    """Stage 2 of prompts whose images come from `voco_kv` or are compressed first."""
    if CACHE_NAME in kwargs:
        raise ValueError(f"{CACHE_NAME} must be None where voco_kv or two_stage is given, but was a cache")
    config = kwargs.get("generation_config") or model.generation_config
    if kwargs.get("use_cache", config.use_cache) is False:
        raise ValueError("use_cache must be True where voco_kv or two_stage is given, but was False")
    for name in ("position_ids", "attention_mask"):
        kwargs.pop(name, None)
    prompts = stages.public_prompts(model, input_ids, layout, voco_kv, kwargs.pop("pixel_values", None))
    if prompts.pixel_values is not None:
        kwargs["pixel_values"] = prompts.pixel_values
    for name in ("max_length", "min_length"):
        if kwargs.get(name) is not None:
            # Lengths count the given prompts, of which stage 2 sees the public part.
            kwargs[name] = max(0, kwargs[name] - input_ids.shape[1] + prompts.input_ids.shape[1])
    beams, returned = (kwargs.get(name) or getattr(config, name) or 1 for name in ("num_beams", "num_return_sequences"))
    if max(beams, returned) > 1:
        prompts.cache.batch_repeat_interleave(max(beams, returned))
    kwargs[CACHE_NAME] = prompts.cache
    output = generate(prompts.input_ids, attention_mask=prompts.attention_mask, **kwargs)
    given = input_ids.to(prompts.input_ids.device).repeat_interleave(returned, dim=0)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    sequences = torch.cat([given, sequences[:, prompts.input_ids.shape[1] :]], dim=1)
    if isinstance(output, torch.Tensor):
        return sequences
    output.sequences = sequences
    return output


def _state_of(config: PreTrainedConfig) -> tuple:
    """Whatever changes when the configuration does; much cheaper than its dict, since stage 2 asks for every prompt."""
    return tuple(_state_of(x) if isinstance(x, PreTrainedConfig) else str(x) for x in vars(config).values())


def _settings(config: dict) -> dict:
    """A configuration without what does not change results."""
    noise = {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache", "model_type"}
    return {
        key: _settings(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in noise and not str(key).startswith("_attn")
    }
