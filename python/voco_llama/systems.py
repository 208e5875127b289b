"""The systems that the paper compares, a word each: what an image becomes, and what the text sees of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """One way of showing an image to a LLaMA.

    Attributes:
        name: the word in a training configuration.
        what: one line about it.
        source: where it is described.
        compressor: what makes fewer tokens of an image before the LLaMA (`voco_llama.baselines`); None where the LLaMA gets
            all vision tokens.
        voco_tokens: whether VoCo tokens stand behind an image.
        masked: whether text sees an image only through its VoCo tokens.
        weights_of: the system whose training makes its weights; its own name unless it is inference only.
    """

    name: str
    what: str
    source: str
    compressor: str | None = None
    voco_tokens: bool = False
    masked: bool = False
    weights_of: str = ""

    @property
    def trains(self) -> bool:
        """Whether it has weights of its own."""
        return self.weights_of == self.name


_VOCO = "VoCo-LLaMA (arXiv 2406.12275)"
SYSTEMS = {
    system.name: system
    for system in (
        System(
            "voco",
            "text sees VoCo tokens only",
            f"{_VOCO}, section 3.2",
            voco_tokens=True,
            masked=True,
            weights_of="voco",
        ),
        System(
            "upper_bound",
            "VoCo tokens are there, and text sees everything",
            f"{_VOCO}, section 4.2",
            voco_tokens=True,
            weights_of="upper_bound",
        ),
        System(
            "lower_bound",
            "the upper bound's weights under the VoCo mask",
            f"{_VOCO}, section 4.2",
            voco_tokens=True,
            masked=True,
            weights_of="upper_bound",
        ),
        System(
            "full_caching", "the K/V of all vision tokens are cached", f"{_VOCO}, table 7", weights_of="upper_bound"
        ),
        System(
            "avg_pool",
            "mean of vision tokens, then a linear layer",
            f"{_VOCO}, section 4.2",
            compressor="avg_pool",
            weights_of="avg_pool",
        ),
        System(
            "q_former",
            "queries of a Q-Former",
            "BLIP-2 (arXiv 2301.12597), section 3.1",
            compressor="q_former",
            weights_of="q_former",
        ),
        System(
            "llama_vid",
            "a context token guided by the text, and pooled content tokens",
            "LLaMA-VID (arXiv 2311.17043), section 3.2",
            compressor="llama_vid",
            weights_of="llama_vid",
        ),
    )
}


def system_of(name: str) -> System:
    """The system of that name; ValueError that lists all."""
    if name not in SYSTEMS:
        raise ValueError(f"system must be one of {', '.join(SYSTEMS)}, but was {name!r}")
    return SYSTEMS[name]
