"""First tokens and short answers about images: in two stages, from stored K/V, in a single pass, and uncompressed.

The model has random weights: a small one on a CPU, one of the size of Llama-3.2-1B with CLIP-L on a GPU. Frames come as
pixels that are ready for the vision tower.
"""

import copy
from functools import cache, cached_property, partial

import torch
from transformers import CLIPVisionConfig, LlamaConfig
from voco_llama import VocoLlavaForConditionalGeneration
from voco_llama.bench.measure import LIMIT, OURS, Candidate
from voco_llama.configuration import VocoLlavaConfig
from voco_llama.stages import image_features

from bench.kv_problem import rotate_half
from tests.reference import OPEN, assert_error_rule
from tests.reference import VOCO as VOCO_KIND
from voco_kernels import VocoKV
from voco_kernels.integrations.transformers import CACHE_NAME

STORED, STAGES, SINGLE, UNCOMPRESSED = (
    "voco, stored K/V", "voco, two stages", "voco, single pass", "uncompressed",
)  # fmt: skip
VOCO, QUESTION = 2, 32
START, IMAGE, VOCO_ID = 1, 2, 3
FIRST_WORD, WORDS = 4, 96
MOST_IN_ONE_PASS = 64
WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}


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


@cache
def wide_model_of(device: torch.device) -> VocoLlavaForConditionalGeneration:
    """The same model in the next wider dtype, which says what is true."""
    model = model_of(device)
    return copy.deepcopy(model).to(WIDER[model.dtype])


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

    @cached_property
    def truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the wider model, and of this one in the same way: a single pass, or two stages where that is too long.

        The tests hold both to the dense reference.
        """
        way = Problem.single_pass if len(self.segments) <= MOST_IN_ONE_PASS else Problem.two_stages
        wide = copy.copy(self)
        wide.model, wide.pixels = wide_model_of(self.pixels.device), self.pixels.to(WIDER[self.model.dtype])
        return way(wide), way(self)

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

    def two_stages(self) -> torch.Tensor:
        """Stage 1, injection and stage 2."""
        return self.generate(self.prompt, voco_kv=self.compress())

    def single_pass(self) -> torch.Tensor:
        """Everything in one masked forward."""
        return self.generate(self.prompt, pixel_values=self.pixels)

    def uncompressed(self) -> torch.Tensor:
        """Everything in one causal forward, without VoCo tokens."""
        return self.generate(self.plain, pixel_values=self.pixels)

    @cached_property
    def kv(self) -> VocoKV:
        """K/V of all frames as a store has them."""
        return self.compress()

    def stored(self) -> torch.Tensor:
        """Injection and stage 2, of K/V that are there."""
        return self.generate(self.prompt, voco_kv=self.kv)

    def check(self, logits: torch.Tensor) -> None:
        """Raise AssertionError unless logits keep the error rule, up to where another token was chosen in a near tie."""
        true, eager = self.truth
        same = (logits.argmax(1) == true.argmax(1)) & (eager.argmax(1) == true.argmax(1))
        compared = slice(0, 1 + int(same.cumprod(0).sum()))
        rows = [x[compared] for x in (logits, eager, true.double())]
        assert_error_rule("logits", *rows, [OPEN] * len(rows[0]))

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
        """Raise AssertionError unless K/V of some frames keep the error rule."""
        wide = wide_model_of(self.pixels.device)
        for i in range(0, len(self.segments), max(1, len(self.segments) // 4)):
            rows, tokens = slice(i, i + 1), slice(i * VOCO, (i + 1) * VOCO)
            inputs = {"input_ids": self.segments[rows], "pixel_values": self.pixels[rows]}
            (eager,), (true,) = self.model.compress(**inputs), wide.compress(**inputs)
            for name in ("k", "v"):
                x = getattr(kv, name)[:, tokens].transpose(0, 1)
                others = [getattr(eager, name).transpose(0, 1), getattr(true, name).transpose(0, 1).double()]
                assert_error_rule(f"{name} of frame {i}", x, *others, [VOCO_KIND] * VOCO)


def candidates(problem: Problem) -> list[Candidate]:
    """What answers the question; from stored K/V first, since all of it is for that."""
    return [
        Candidate(STORED, problem.stored, problem.check, role=OURS),
        Candidate(STAGES, problem.two_stages, problem.check, role=OURS),
        Candidate(SINGLE, problem.single_pass, problem.check, role=OURS),
        Candidate(UNCOMPRESSED, problem.uncompressed, role=LIMIT),
    ]
