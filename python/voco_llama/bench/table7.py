"""Table 7 of the VoCo-LLaMA paper, measured: what a question about an image costs with and without stored K/V.

Every system runs the same plain LLaMA over the same kind of static cache, on a GPU from CUDA graphs (`static.py`).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from .. import VocoLlavaConfig, VocoLlavaForConditionalGeneration
from ..demo import MODEL
from .clock import Clock, release
from .measure import OURS, PEER, Candidate, Comparison, compare
from .paper import FULL, NO_CACHE
from .static import StaticRun, loader, plain_llama
from .systems import Questions, System, Truth, flops_of_question, truths

SUITE = "table7"
FIRST, ANSWER, DECODE = "time to first token", "time for {} tokens", "decode of {} requests"
FROM_HOST = ", from host memory"
COUNTED_TEXTS = (32, 64, 128)

# Wanted of the first VoCo row on one H200 at the shapes of LLaVA-1.5-7B, as how many times longer the others take: time to
# first token 75 % below no cache, not above full caching, 60 % below it from host memory; a decode step 30 % below it.
TARGETS = {(FIRST, NO_CACHE): 4.0, (FIRST, FULL): 1.0, (FIRST + FROM_HOST, FULL): 2.5, (DECODE, FULL): 1.4286}
# And of its K/V against full caching, of its FLOPs to the first token at 32 tokens of text against no cache.
WANTED_CHANGES = {"kv_change": -0.998, "flops_change": -0.948}


# ---- models ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model to measure.

    Attributes:
        config: of a model with random weights; None for the packaged demo model.
        dtype: of weights and K/V.
        vocos: VoCo tokens per image, unless a call says otherwise.
        targets: whether the project's targets are about it.
    """

    name: str
    config: Callable[[], VocoLlavaConfig] | None
    dtype: torch.dtype
    vocos: tuple[int, ...]
    targets: bool = False

    def build(self, device: torch.device) -> VocoLlavaForConditionalGeneration:
        """The model, on a device; random weights are made there."""
        if self.config is None:
            model = VocoLlavaForConditionalGeneration.from_pretrained(MODEL, dtype=self.dtype)
        else:
            torch.manual_seed(0)
            before = torch.get_default_dtype()
            torch.set_default_dtype(self.dtype)
            try:
                with torch.device(device):
                    model = VocoLlavaForConditionalGeneration(self.config())
            finally:
                torch.set_default_dtype(before)
        return model.to(device).eval().requires_grad_(False)


def _llava(vocab: int, image_token: int, **text) -> VocoLlavaConfig:
    """LLaVA-1.5's shapes over CLIP-L/14 at 336 pixels, with a LLaMA of 32 layers; text follows the image directly."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    llama = LlamaConfig(
        vocab_size=vocab,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
        pad_token_id=None,
        **text,
    )
    return VocoLlavaConfig(
        vision_config=vision,
        text_config=llama,
        image_token_id=image_token,
        voco_token_id=image_token + 2,
        image_start_id=None,
        image_seq_length=576,
        vision_feature_layer=-2,
        max_voco_tokens=128,
        tie_word_embeddings=False,
    )


def llava_7b() -> VocoLlavaConfig:
    """The shapes of LLaVA-1.5-7B."""
    return _llava(32064, 32000, intermediate_size=11008, num_key_value_heads=32)


def llama3_8b() -> VocoLlavaConfig:
    """The same with the LLaMA of Llama-3-8B, whose query heads share keys in groups of four."""
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    return _llava(128256, 128010, intermediate_size=14336, num_key_value_heads=8, rope_parameters=rope)


MODELS = {
    model.name: model
    for model in (
        Model("demo", None, torch.float32, (1, 2, 4, 8)),
        Model("llava-7b", llava_7b, torch.bfloat16, (1, 2, 8, 128), targets=True),
        Model("llama3-8b", llama3_8b, torch.bfloat16, (1, 2, 8, 128)),
    )
}


# ---- comparisons -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What is asked, and for how long.

    Attributes:
        vocos: VoCo tokens per image, each count a system; None for those of the model.
        text: tokens of a question; new_tokens: of its answer.
        requests: concurrent questions of the batched decode; None for 32 on a GPU, 4 without one.
        seconds: about how long to time one comparison.

    Raises:
        ValueError: numbers that are too small, or one of `vocos` twice.
    """

    vocos: tuple[int, ...] | None = None
    text: int = 32
    new_tokens: int = 32
    requests: int | None = None
    seconds: float = 3.0

    def __post_init__(self):
        vocos = self.vocos
        if vocos is not None and (not vocos or min(vocos) < 1 or len(set(vocos)) < len(vocos)):
            raise ValueError(f"vocos must be different numbers of at least 1, but were {list(vocos)}")
        for name, least in (("text", 1), ("new_tokens", 2), ("requests", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, but was {value}")
        if not self.seconds > 0:
            raise ValueError(f"seconds must be positive, but was {self.seconds}")

    def keys(self, device: torch.device, name: str) -> list[tuple[str, str, str]]:
        """Suite, task and shape of every comparison of a model, in order."""
        tasks = [(task + place).format(self.new_tokens) for task in (FIRST, ANSWER) for place in places_on(device)]
        tasks.append(DECODE.format(self.requests_on(device)))
        return [(SUITE, task, self.shape(name)) for task in tasks]

    def requests_on(self, device: torch.device) -> int:
        """Concurrent questions on a device."""
        return self.requests or (32 if device.type == "cuda" else 4)

    def shape(self, name: str) -> str:
        """How tables call a model that is asked this."""
        return f"{name}, {self.text} text tokens"


def places_on(device: torch.device) -> tuple[str, ...]:
    """Where stored K/V start, as a part of a task's name. Without a GPU the device and the host are one memory."""
    return ("", FROM_HOST) if device.type == "cuda" else ("",)


def comparisons(
    device: torch.device, name: str, settings: Settings = Settings(), report: Callable[[str], None] = lambda step: None
) -> Iterator[Comparison]:
    """Measure one of MODELS; yields each comparison as soon as it is there.

    Args:
        report: is told what is done next.

    Raises:
        ValueError: an unknown name, or questions longer than the model's context.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, but was {name!r}")
    yield from compare_systems(MODELS[name], device, settings, report)


def compare_systems(
    described: Model, device: torch.device, settings: Settings, report: Callable[[str], None]
) -> Iterator[Comparison]:
    """As `comparisons`, of any Model."""
    clock = Clock(device)
    report("weights")
    model = described.build(device)
    vocos = settings.vocos or described.vocos
    _check_context(model.config, vocos, settings)
    measured = Measured(described, model, settings, clock, report)
    yield from measured.single(vocos)
    release(device)
    yield measured.batched(vocos)


def _check_context(config: VocoLlavaConfig, vocos: Sequence[int], settings: Settings) -> None:
    longest = _image_tokens(config) + max(vocos) + settings.text + settings.new_tokens
    limit = config.text_config.max_position_embeddings
    if longest > limit:
        raise ValueError(
            f"image, VoCo tokens, text and new tokens must fit the model's context of {limit} positions, but were {longest}"
        )


def _image_tokens(config: VocoLlavaConfig) -> int:
    return config.image_seq_length + (config.image_start_id is not None)


class Measured:
    """The comparisons of one model."""

    def __init__(self, described: Model, model, settings: Settings, clock: Clock, report: Callable[[str], None]):
        self.described, self.model, self.settings, self.clock, self.report = described, model, settings, clock, report
        self.llama = plain_llama(model)
        self.params = sum(p.numel() for p in model.parameters())
        self.on_gpu = clock.device.type == "cuda"

    def single(self, vocos: Sequence[int]) -> Iterator[Comparison]:
        """One question: to the first token and to the last, what is stored on the device or in host memory."""
        settings = self.settings
        questions = Questions(self.model, self.llama, 1, settings.text, settings.new_tokens)
        self.report("plain forwards to compare with")
        counts = (*vocos, 0)
        prompts = [(questions.prompts(n)[0], questions.pixels[0]) for n in counts]
        expected = dict(zip(counts, truths(self.model, prompts)))
        systems = [*map(questions.voco, vocos), questions.full_caching(), questions.no_cache()]
        for task, to_first in ((FIRST, True), (ANSWER, False)):
            for place in places_on(self.clock.device):
                make = self._to_first if to_first else self._to_last
                candidates = [make(system, expected[system.voco], task + place) for system in systems]
                yield self._compare((task + place).format(settings.new_tokens), candidates)

    def _to_first(self, system: System, truth: Truth, task: str) -> Candidate:
        load = self._loader(system, task)

        def run() -> torch.Tensor:
            load()()
            system.ready.run.first()
            return system.ready.run.logits

        return self._candidate(system, task, run, lambda logits: truth.check_logits(logits[0]))

    def _to_last(self, system: System, truth: Truth, task: str) -> Candidate:
        load = self._loader(system, task)

        def run() -> torch.Tensor:
            load()()
            return system.ready.run.answer()

        def check(tokens: torch.Tensor) -> None:
            truth.check_answer(self.model, tokens[0], system.ready.run.logits[0])

        return self._candidate(system, task, run, check)

    def _loader(self, system: System, task: str) -> Callable[[], Callable[[], None]]:
        """What returns the `loader` of a task, made at the first call: in a run, where a failure is that run's alone."""

        @cache
        def made() -> Callable[[], None]:
            return loader(system.ready.stored, system.ready.bind, from_host=task.endswith(FROM_HOST))

        return made

    def batched(self, vocos: Sequence[int]) -> Comparison:
        """One decode step of many questions about different images."""
        settings = self.settings
        requests = settings.requests_on(self.clock.device)
        questions = Questions(self.model, self.llama, requests, settings.text, 2)
        self.report("plain forwards to compare with")
        checked = list(itertools.product((*vocos, 0), sorted({0, requests - 1})))
        prompts = [(torch.cat([questions.prompts(n)[i], questions.next[i]]), questions.pixels[i]) for n, i in checked]
        expected = dict(zip(checked, truths(self.model, prompts)))
        candidates = []
        for system in [*map(questions.voco, vocos), questions.full_caching()]:
            mine = {row: truth for (n, row), truth in expected.items() if n == system.voco}
            candidates.append(self._step(system, questions.next, mine))
        return self._compare(DECODE.format(requests), candidates)

    def _step(self, system: System, token: torch.Tensor, expected: dict[int, Truth]) -> Candidate:
        """A decode step that reads `token` (int64 [B, 1]) behind questions that are in the cache already."""

        @cache
        def asked() -> StaticRun:
            ready = system.ready
            ready.bind(ready.stored)()
            ready.run.first()
            ready.stored = ()  # the cache holds them now
            return ready.run

        def run() -> torch.Tensor:
            asked().rewind(token)
            asked().step()
            return asked().logits

        def check(logits: torch.Tensor) -> None:
            for row, truth in expected.items():
                truth.check_logits(logits[row])

        facts = {"requests": len(token), "kv_bytes_of_all": system.kv_bytes * len(token)}
        return self._candidate(system, DECODE, run, check, facts)

    def _candidate(self, system: System, task: str, run, check, facts: dict | None = None) -> Candidate:
        return Candidate(
            name=system.name,
            run=run,
            check=check,
            target=TARGETS.get((task, system.name)) if self.described.targets else None,
            role=OURS if system.voco else PEER,
            captured=self.on_gpu,
            facts=self._facts(system) | (facts or {}),
        )

    def _facts(self, system: System) -> dict:
        config, settings = self.model.config, self.settings
        image = _image_tokens(config)

        def counted(cached: int, tokens: int) -> dict[str, int]:
            """By tokens of text."""
            through = 0 if cached else image
            texts = sorted({settings.text, *COUNTED_TEXTS})
            return {str(text): flops_of_question(config, cached, through, text, tokens) for text in texts}

        to_first = counted(system.cached, 1)
        facts = {
            "kv_length": system.cached,
            "kv_bytes": system.kv_bytes,
            "flops": to_first[str(settings.text)],
            "flops_to_first": to_first,
            "flops_of_answer": counted(system.cached, settings.new_tokens),
            "params": self.params,
            "graphs": self.on_gpu,
            "text": settings.text,
            "new_tokens": settings.new_tokens,
        }
        if system.voco:
            text = str(COUNTED_TEXTS[0])
            facts["kv_change"] = round(system.cached / image - 1, 5)
            facts["flops_change"] = round(to_first[text] / counted(0, 1)[text] - 1, 5)
            if self.described.targets:
                facts["targets"] = WANTED_CHANGES
        return facts

    def _compare(self, task: str, candidates: list[Candidate]) -> Comparison:
        self.report(task)
        rows = compare(candidates, self.clock, seconds=self.settings.seconds)
        dtype = str(self.described.dtype).removeprefix("torch.")
        return Comparison(SUITE, task, self.settings.shape(self.described.name), rows, dtype=dtype)
