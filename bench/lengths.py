"""How long the text of image-instruction samples is: a synthetic distribution. No data set was read to make it.

Its shape follows what the LLaVA-665k mix is known to be made of. Every sample has a prompt around its question, so nothing
is shorter than 30 tokens. Short answers and single captions come next (to 120). Most samples are several short questions
about one image, merged into one conversation, or one explained answer (120 to 300). Detailed descriptions, and lists of
regions with their boxes, make the long tail, which is cut at 800. So the mean lies above the median, and a batch in random
order is padded to a length that few of its samples have, which is what a training recipe has to cope with.
"""

import random
from bisect import bisect_right

# (share of samples, tokens of text that they have at most); straight lines between.
QUANTILES = ((0.0, 30), (0.05, 60), (0.25, 120), (0.5, 190), (0.75, 300), (0.9, 460), (1.0, 800))
SHORTEST, LONGEST = QUANTILES[0][1], QUANTILES[-1][1]


def length_at(share: float) -> int:
    """Tokens of text that `share` (0 to 1) of all samples have at most; ValueError for another share."""
    if not 0 <= share <= 1:
        raise ValueError(f"share must be 0 to 1, but was {share!r}")
    shares = [point for point, _ in QUANTILES]
    right = min(bisect_right(shares, share), len(QUANTILES) - 1)
    (low, shortest), (high, longest) = QUANTILES[right - 1], QUANTILES[right]
    return round(shortest + (longest - shortest) * (share - low) / (high - low))


def text_lengths(samples: int, seed: int = 0) -> list[int]:
    """Tokens of text of `samples` samples in a random order that a seed fixes.

    The lengths themselves do not depend on the seed: they stand evenly along the distribution, so that a small pool has its
    shape, too, and its longest samples are long.

    Raises:
        ValueError: `samples` is below 1.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, but was {samples!r}")
    numbers = random.Random(seed)
    lengths = [length_at((i + 0.5) / samples) for i in range(samples)]
    # The numbers of a seed are the same in every version of Python; what `shuffle` makes of them is not promised to be.
    return sorted(lengths, key=lambda _: numbers.random())
