"""How sure a comparison on so many images is: what would another draw of as many images have said?

Both models see the same images, so only images count that one of them gets right and the other wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 20_000


@dataclass(frozen=True)
class PairedDifference:
    """Of two parts of the same images, the second less the first: `interval` at 95 %, McNemar's exact `p_value`."""

    interval: tuple[float, float]
    p_value: float


def paired_difference(lost: int, won: int, images: int) -> PairedDifference:
    """Judge a difference in accuracy. lost: images that only the first gets right; won: that only the second does.

    The interval is the bootstrap's percentiles (Efron & Tibshirani 1993, §13.3): images drawn anew with replacement. A
    count of none is taken for half an image, as without any difference the bootstrap would be sure that there is none.
    p: the binomial test of `lost` against `won` (McNemar 1947).
    """
    assert 0 <= lost + won <= images
    generator = np.random.default_rng(0)
    parts = np.array([max(lost, 0.5), max(won, 0.5), images - lost - won])
    parts = parts / parts.sum()
    drawn = generator.multinomial(images, parts, size=RESAMPLES)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile((drawn[:, 1] - drawn[:, 0]) / images, [tail, 1 - tail])
    p_value = stats.binomtest(won, lost + won).pvalue if lost + won else 1.0
    return PairedDifference((float(low), float(high)), float(p_value))


def part_interval(count: int, images: int) -> tuple[float, float]:
    """The 95 % interval of a part, `count` of `images` (Wilson 1927)."""
    found = stats.binomtest(count, images).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)
