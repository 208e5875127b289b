"""First tokens and short answers about images: in two stages, from stored K/V, in a single pass, and uncompressed.

The model has random weights: a small one on a CPU, one of the size of Llama-3.2-1B with CLIP-L on a GPU. Frames come as
pixels that are ready for the vision tower.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from transformers import CLIPVisionConfig, LlamaConfig
from voco_llama import VocoLlavaForConditionalGeneration
from voco_llama.bench.measure import OURS, Candidate
from voco_llama.configuration import VocoLlavaConfig
from voco_llama.stages import image_features

from bench.kv_problem import rotate_half
from voco_kernels import VocoKV
from voco_kernels.integrations.transformers import CACHE_NAME

STORED, STAGES, SINGLE, UNCOMPRESSED = (
    "voco, stored K/V", "voco, two stages", "voco, single pass", "uncompressed",
)  # fmt: skip
VOCO, QUESTION = 2, 32
START, IMAGE, VOCO_ID = 1, 2, 3
FIRST_WORD, WORDS = 4, 96
MOST_IN_ONE_PASS = 64
# Logits of the ways to compute the same thing may differ by this share of their size.
SPREAD = {torch.float32: 1e-3, torch.bfloat16: 6e-2}


# Of the vision tower and of the LLaMA.
SIZES = {
    "cpu": (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
         "patch_size": 4},
        {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2},
    ),
    "cuda": (
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
         "image_size": 224, "patch_size": 14},
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8},
    ),
}  # fmt: skip


def config_of(kind: str) -> VocoLlavaConfig:
    """The model's configuration on a kind of device."""
    tower, sizes = SIZES[kind]
    vision = CLIPVisionConfig(**tower)
    text = LlamaConfig(**sizes, vocab_size=FIRST_WORD + WORDS, max_position_embeddings=2**20, initializer_range=0.06)
    return VocoLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        voco_token_id=VOCO_ID,
        image_start_id=START,
        num_voco_tokens=VOCO,
        max_voco_tokens=VOCO,
        positions="compact",
        tie_word_embeddings=False,
    )


@cache
def model_of(device: torch.device) -> VocoLlavaForConditionalGeneration:
    """One model with random weights for all sizes."""
    torch.manual_seed(0)
    with device:
        model = VocoLlavaForConditionalGeneration(config_of(device.type))
    return model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


class Problem:
    """`frames` frames and a question behind them, compressed and not.

    Attributes:
        prompt: the frames with their VoCo tokens, and the question [1, S]; `plain` without VoCo tokens.
        segments: a row per frame, for stage 1.
    """

    def __init__(self, frames: int, device: torch.device, new_tokens: int = 1):
        generator = torch.Generator(device).manual_seed(0)
        self.model, self.new_tokens = model_of(device), new_tokens
        config = self.model.config
        side = config.vision_config.image_size
        ids = partial(torch.tensor, device=device)
        frame = ids([START] + [IMAGE] * config.image_seq_length + [VOCO_ID] * VOCO)
        question = torch.randint(FIRST_WORD, FIRST_WORD + WORDS, (QUESTION,), generator=generator, device=device)
        self.segments = frame.repeat(frames, 1)
        self.prompt = torch.cat([frame.repeat(frames), question])[None]
        self.plain = torch.cat([frame[:-VOCO].repeat(frames), question])[None]
        size = (frames, 3, side, side)
        self.pixels = torch.randn(size, generator=generator, device=device, dtype=self.model.dtype)
        # A single pass is held to the dense reference by the tests. Where it is too long, all must agree with the first.
        self.truth = self.single_pass() if frames <= MOST_IN_ONE_PASS else None

    def generate(self, ids: torch.Tensor, **images) -> torch.Tensor:
        """The logits [new tokens, vocabulary] of a greedy answer."""
        output = self.model.generate(
            ids, **images, max_new_tokens=self.new_tokens, min_new_tokens=self.new_tokens, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return torch.cat(output.logits)

    def compress(self) -> VocoKV:
        """Stage 1 of all frames."""
        return VocoKV.cat(self.model.compress(input_ids=self.segments, pixel_values=self.pixels))

    @torch.no_grad()
    def compress_by_loop(self) -> VocoKV:
        """Stage 1 as one writes it without the library: a forward, then every layer's VoCo tokens, rotated back."""
        output = self.model.model(input_ids=self.segments, pixel_values=self.pixels, use_cache=True)
        layers = getattr(output, CACHE_NAME).layers
        rotary = self.model.model.language_model.rotary_emb
        index = torch.arange(self.segments.shape[1], device=self.segments.device)[-VOCO:]
        angle = (index.float()[:, None] * rotary.inv_freq.float()).repeat(1, 2)
        cos, sin = (x / rotary.attention_scaling for x in (angle.cos(), angle.sin()))
        keys, values = [], []
        for layer in layers:
            k = layer.keys[:, :, -VOCO:].float()
            keys.append((k * cos - rotate_half(k) * sin).to(layer.keys.dtype))
            values.append(layer.values[:, :, -VOCO:])
        # [layers, frames, H, tokens, D], tokens of all frames one behind the other
        k, v = (torch.stack(x).transpose(2, 3).flatten(1, 2) for x in (keys, values))
        return VocoKV(k, v)

    @torch.no_grad()
    def look(self) -> torch.Tensor:
        """The vision tower and the projector alone."""
        return image_features(self.model, self.pixels)

    def check_compressed(self, kv: VocoKV) -> None:
        """Raise AssertionError unless K/V are those of frames that were compressed one at a time."""
        frames = range(0, len(self.segments), max(1, len(self.segments) // 4))
        for i in frames:
            rows = slice(i, i + 1)
            alone = self.model.compress(input_ids=self.segments[rows], pixel_values=self.pixels[rows])[0]
            for name in ("k", "v"):
                x, true = getattr(kv, name)[:, i * VOCO : (i + 1) * VOCO], getattr(alone, name)
                error, size = (x - true).abs().max(), true.abs().max()
                assert error <= SPREAD[x.dtype] * size, f"{name} of frame {i} is off by {error:.3g} of {size:.3g}"

    def two_stages(self) -> torch.Tensor:
        """Stage 1, injection and stage 2."""
        return self.generate(self.prompt, voco_kv=self.compress())

    def single_pass(self) -> torch.Tensor:
        """Everything in one masked forward."""
        return self.generate(self.prompt, pixel_values=self.pixels)

    def uncompressed(self) -> torch.Tensor:
        """Everything in one causal forward, without VoCo tokens."""
        return self.generate(self.plain, pixel_values=self.pixels)

    def stored(self) -> Callable[[], torch.Tensor]:
        """Injection and stage 2, of K/V that are there."""
        kv = self.compress()
        return lambda: self.generate(self.prompt, voco_kv=kv)

    def check(self, logits: torch.Tensor) -> None:
        """Raise AssertionError unless logits are those of a single pass."""
        if self.truth is None:
            self.truth = logits
        error, size = (logits - self.truth).abs().max(), self.truth.abs().max()
        bound = SPREAD[self.model.dtype] * size
        assert error <= bound, f"logits are off by {error:.3g}, more than {bound:.3g}"


def candidates(problem: Problem) -> list[Candidate]:
    """What answers the question; from stored K/V first, since all of it is for that."""
    return [
        Candidate(STORED, problem.stored(), problem.check, role=OURS),
        Candidate(STAGES, problem.two_stages, problem.check, role=OURS),
        Candidate(SINGLE, problem.single_pass, problem.check, role=OURS),
        Candidate(UNCOMPRESSED, problem.uncompressed),
    ]
