"""Intervals hold what they promise, over many draws of images."""

from __future__ import annotations

import numpy as np
import pytest

from vitprune.measure.statistics import paired_difference, part_interval

DRAWS = 1_000


def covered(lost: float, won: float, images: int) -> float:
    """Of how many draws the interval holds the true difference. lost, won: parts of all images there are."""
    generator = np.random.default_rng(1)
    drawn = generator.multinomial(images, [lost, won, 1 - lost - won], size=DRAWS)
    cases, counts = np.unique(drawn[:, :2], axis=0, return_counts=True)
    intervals = [paired_difference(int(one_lost), int(one_won), images).interval for one_lost, one_won in cases]
    return sum(n for n, (low, high) in zip(counts, intervals, strict=True) if low <= won - lost <= high) / DRAWS


@pytest.mark.parametrize(("lost", "won", "images"), [(0.03, 0.02, 2000), (0.02, 0.02, 500), (0.1, 0.04, 1000)])
def test_the_interval_of_a_difference_holds_it_in_95_of_100_draws(lost: float, won: float, images: int) -> None:
    assert covered(lost, won, images) == pytest.approx(0.95, abs=0.02)


def test_mcnemars_test_is_the_binomial_one() -> None:
    assert paired_difference(1, 9, 100).p_value == pytest.approx(2 * (1 + 10) / 2**10)
    assert paired_difference(5, 5, 100).p_value == pytest.approx(1.0)
    assert paired_difference(0, 0, 100).p_value == 1.0


def test_without_any_difference_it_is_not_certain_that_there_is_none() -> None:
    low, high = paired_difference(0, 0, 200).interval
    assert -0.02 < low < 0 < high < 0.02


def test_the_interval_lies_around_the_difference_and_shrinks_with_images() -> None:
    few, many = (paired_difference(30 * n, 10 * n, 1000 * n).interval for n in (1, 16))
    for low, high in (few, many):
        assert low < -0.02 < high
    assert (few[1] - few[0]) / (many[1] - many[0]) == pytest.approx(4, rel=0.1)


def test_the_interval_of_a_part_stays_within_bounds() -> None:
    low, high = part_interval(100, 100)
    assert 0.95 < low < high <= 1.0
    assert part_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # Wilson's, as tables have it
