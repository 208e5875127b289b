"""From images and text to token ids with vision and VoCo placeholders."""

import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers import BatchFeature
from transformers.models.llava.processing_llava import LlavaProcessor

# The prompt of the released VoCo-LLaMA code: images, then the system prompt, which speaks of them, and the conversation.
VICUNA_TEMPLATE = (
    "{% set seen = namespace(image=false) %}"
    "{% for message in messages %}{% if message['content'] is not string %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% set seen.image = true %}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "A chat between a curious user and an artificial intelligence assistant{% if seen.image %} of the image{% endif %}. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else ' ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def open_image(source, name: str | None = None) -> Image.Image:
    """An RGB image from a path, a binary file, a PIL image or a uint8 array [H, W, 3]; ValueError that says what is wrong.

    Args:
        name: what errors call the image; `source` where None.
    """
    name = f"image {source if name is None else name}"
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] not in (3, 4)):
            raise ValueError(
                f"image must be a uint8 array [H, W, 3], but was {source.dtype} of shape {list(source.shape)}"
            )
        return Image.fromarray(source).convert("RGB")
    if not isinstance(source, str | os.PathLike | io.BytesIO | Image.Image):
        raise ValueError(f"image must be a PIL image, a path or a uint8 array, but was {type(source).__name__}")
    try:
        if isinstance(source, Image.Image):
            return source.convert("RGB")
        with Image.open(source) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"{name} does not exist") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image file that Pillow can read") from error
    except MemoryError:
        raise
    # Pillow's decoders meet damaged files with errors of many types.
    except Exception as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


class VocoProcessor(LlavaProcessor):
    """`LlavaProcessor` whose `<image>` becomes `<image>` * vision tokens, a newline, `<voco>` * VoCo tokens.

    Args:
        num_voco_tokens: VoCo tokens per image unless a call asks for another number.
        max_voco_tokens: the largest number the model was trained for; a call for more warns.
        voco_token: the VoCo token of the tokenizer.
        image_start_token: put before every image that does not already follow it (see `VocoLlavaConfig.image_start_id`);
            None for none.
        num_compressed_tokens: tokens of an image where something before the LLaMA makes fewer of it
            (`voco_llama.baselines`); None for all vision tokens.
        image_processor, tokenizer, ...: as in `LlavaProcessor`.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        num_additional_image_tokens=0,
        num_voco_tokens=2,
        max_voco_tokens=2,
        voco_token="<voco>",
        image_start_token="<s>",
        num_compressed_tokens=None,
        **kwargs,
    ):
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template or VICUNA_TEMPLATE,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        self.num_voco_tokens = num_voco_tokens
        self.max_voco_tokens = max_voco_tokens
        self.voco_token = voco_token
        self.voco_token_id = tokenizer.convert_tokens_to_ids(voco_token)
        self.image_start_token = image_start_token
        self.num_compressed_tokens = num_compressed_tokens

    def __call__(
        self,
        images=None,
        text: str | Sequence[str] | None = None,
        num_voco_tokens: int | Sequence[int] | None = None,
        return_tensors: str = "pt",
        **text_kwargs,
    ) -> BatchFeature:
        """Token ids, and pixels where images are given.

        Without `images` the prompt is the same: the model then takes the images from `voco_kv`.

        Args:
            images: one image or a list for all prompts together, in order: PIL images, paths, or uint8 arrays [H, W, 3].
            text: prompts with one `<image>` per image.
            num_voco_tokens: VoCo tokens per image, 0 for none (uncompressed); or one number for each image, in order.
            text_kwargs: for the tokenizer (`padding` is on by default, on the tokenizer's side).

        Returns:
            input_ids, attention_mask (int64 [B, S]); pixel_values (float32 [images, 3, H, W]) where images are given.

        Raises:
            ValueError: an image that cannot be read; more or fewer images than `<image>`; a negative number of tokens.
        """
        prompts = [text] if isinstance(text, str) else list(text or [])
        if not prompts:
            raise ValueError("text must be a prompt or a list of prompts, but was empty")
        wanted = sum(prompt.count(self.image_token) for prompt in prompts)
        counts = self._counts(self.num_voco_tokens if num_voco_tokens is None else num_voco_tokens, wanted)
        features = {}
        if images is not None:
            images = [open_image(x) for x in (images if isinstance(images, list | tuple) else [images])]
            if len(images) != wanted:
                raise ValueError(f"text must hold one {self.image_token} per image ({len(images)}), but holds {wanted}")
            if images:
                features["pixel_values"] = self.image_processor(images, return_tensors="pt")["pixel_values"]
        counts = iter(counts)
        expanded = [self.expand(prompt, counts) for prompt in prompts]
        # Not verbose: what a prompt takes of the context depends on the position policy; the model checks that.
        options = {"padding": True, "return_token_type_ids": False, "verbose": False, **text_kwargs}
        tokens = self.tokenizer(expanded, return_tensors=return_tensors, **options)
        return BatchFeature({**tokens, **features}, tensor_type=return_tensors)

    @property
    def num_image_tokens(self) -> int:
        """Tokens that stand for one image, VoCo tokens not counted."""
        if self.num_compressed_tokens is not None:
            return self.num_compressed_tokens
        size = dict(self.image_processor.size)
        if getattr(self.image_processor, "do_center_crop", False):
            size = dict(self.image_processor.crop_size)
        edge = size.get("shortest_edge")
        height, width = size.get("height", edge), size.get("width", edge)
        tokens = (height // self.patch_size) * (width // self.patch_size) + self.num_additional_image_tokens
        return tokens - (self.vision_feature_select_strategy == "default")

    def prompt(self, question: str, num_images: int | Sequence[int] = 1) -> str:
        """The chat template's prompt for one question about `num_images` images.

        A sequence has a number per source: the frames of a video stand side by side where the template has one image.
        """
        return self.conversation([question], num_images)

    def conversation(self, turns: Sequence[str], num_images: int | Sequence[int] = 1) -> str:
        """The chat template's text of questions and answers in turn, all images (see `prompt`) with the first question.

        After a question it ends as a prompt does, ready for the answer.
        """
        frames = [1] * num_images if isinstance(num_images, int) else list(num_images)
        messages = [
            {"role": "assistant" if i % 2 else "user", "content": [{"type": "text", "text": turn}]}
            for i, turn in enumerate(turns)
        ]
        messages[0]["content"] = [{"type": "image"}] * len(frames) + messages[0]["content"]
        text = self.apply_chat_template(messages, add_generation_prompt=len(turns) % 2 == 1)
        left = iter(frames)
        return re.sub(re.escape(self.image_token), lambda _: self.image_token * next(left, 1), text)

    def fingerprint(self) -> str:
        """SHA-256 over everything that decides what the model sees of an image: pixels and placeholder text."""
        settings = self.image_processor.to_dict()
        noise = ("image_processor_type", "processor_class", "_name_or_path", "transformers_version")
        settings = {key: value for key, value in settings.items() if key not in noise and value is not None}
        ids = self.tokenizer(self.expand(self.image_token, iter([1]))).input_ids
        return hashlib.sha256(json.dumps([settings, ids], sort_keys=True, default=str).encode()).hexdigest()

    def expand(self, prompt: str, counts: Iterator[int]) -> str:
        """A prompt with each `<image>` written out as its tokens, of which `counts` gives the VoCo tokens of the next image.

        The tokenizer itself puts the start token before a prompt that begins with an image.
        """

        def image(match: re.Match) -> str:
            count = next(counts)
            start = "" if match.start() == 0 else self.image_start_token or ""
            return start + self.image_token * self.num_image_tokens + (f"\n{self.voco_token * count}" if count else "")

        return re.sub(re.escape(self.image_token), image, prompt)

    def _counts(self, given: int | Sequence[int], images: int) -> list[int]:
        """One VoCo count per image, checked."""
        one_each = isinstance(given, list | tuple)
        counts = list(given) if one_each else [given] * images
        if len(counts) != images:
            raise ValueError(f"num_voco_tokens must hold one number per image ({images}), but holds {len(counts)}")
        for count in counts if one_each else [given]:
            if not isinstance(count, int) or count < 0:
                raise ValueError(f"num_voco_tokens must be an integer of at least 0, but was {count!r}")
        most = max(counts, default=0)
        if most > self.max_voco_tokens:
            warnings.warn(
                f"{most} VoCo tokens per image were asked for, and the model was trained for at most "
                f"{self.max_voco_tokens}",
                stacklevel=3,
            )
        return counts


def pixels_digest(pixel_values: torch.Tensor) -> str:
    """SHA-256 of one image's pixel values."""
    return hashlib.sha256(pixel_values.detach().cpu().contiguous().float().numpy().tobytes()).hexdigest()
