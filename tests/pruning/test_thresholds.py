"""Who stays: thresholds, counts, the straight-through mask and random scores."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import Tolerance
from torch import Tensor
from torch.testing import assert_close

from vitprune.pruning.learning.soft_mask import BAND, near_threshold, straight_through
from vitprune.pruning.selection import above_threshold, random_scores, top_counts

EXACT = Tolerance(rtol=0.0, atol=0.0)
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-7)
INF = math.inf


def stays(scores: Tensor, threshold: float, at_least: int) -> list[list[int]]:
    keep = above_threshold(scores, torch.tensor(threshold), at_least)
    return [row.nonzero().flatten().tolist() for row in keep]


def test_what_is_above_the_threshold_stays() -> None:
    scores = torch.tensor([[INF, 0.1, 0.3, 0.2, 0.5], [INF, 0.4, 0.1, -INF, -INF]])
    # 0.2 is not above 0.2; padding never stays
    assert stays(scores, 0.2, at_least=2) == [[0, 2, 4], [0, 1]]


def test_where_enough_are_sure_to_stay_the_best_are_not_looked_for() -> None:
    scores = torch.tensor([[INF, 0.1, 0.3], [INF, 0.4, 0.1]])
    keep = above_threshold(scores, torch.tensor(9.0), at_least=2, certain=1)
    assert keep.tolist() == [[True, False, True], [True, True, False]]
    # who says so answers for it
    assert above_threshold(scores, torch.tensor(9.0), at_least=2, certain=2).sum() == 2


def test_the_best_stay_below_the_threshold() -> None:
    scores = torch.tensor([[INF, 0.1, 0.3, 0.2, 0.5], [INF, 0.4, 0.1, -INF, -INF]])
    assert stays(scores, 9.0, at_least=3) == [[0, 2, 4], [0, 1, 2]]
    assert stays(scores, 9.0, at_least=1) == [[0], [0]]


def test_more_than_an_image_has_is_all_that_it_has() -> None:
    scores = torch.tensor([[INF, 0.1, 0.3], [INF, 0.4, -INF]])
    assert stays(scores, 9.0, at_least=7) == [[0, 1, 2], [0, 1]]


@pytest.mark.parametrize(("threshold", "expected"), [(-INF, [0, 1, 2]), (INF, [0, 1])])
def test_infinite_thresholds_keep_all_or_as_few_as_they_may(threshold: float, expected: list[int]) -> None:
    assert stays(torch.tensor([[INF, 0.3, 0.1, -INF]]), threshold, at_least=2) == [expected]


def test_equal_scores_stay_in_the_order_of_the_tokens() -> None:
    scores = torch.tensor([[0.5, 0.7, 0.5, 0.7, 0.5, 0.5]])
    keep = top_counts(scores, torch.tensor([4]))
    assert keep[0].nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_top_counts_are_the_best_of_each_image() -> None:
    scores, counts = torch.randn(5, 12), torch.tensor([0, 1, 5, 12, 20])
    scores[2, 3:] = -INF
    for row, count, ours in zip(scores, counts, top_counts(scores, counts), strict=True):
        ranked = sorted((i for i in range(12) if row[i] > -INF), key=lambda i: -row[i].item())
        assert ours.nonzero().flatten().tolist() == sorted(ranked[: int(count)])


def test_no_tokens_are_no_decision() -> None:
    assert top_counts(torch.zeros(3, 0), torch.zeros(3)).shape == (3, 0)


def test_the_straight_through_mask_is_hard_with_a_soft_gradient() -> None:
    temperature = 0.05
    scores = torch.tensor([[INF, 0.30, 0.21, 0.19, 0.02, -INF]], requires_grad=True)
    threshold = torch.tensor(0.2, requires_grad=True)
    keep = torch.tensor([[True, True, True, False, True, False]])  # the fifth is among those that always stay
    mask = straight_through(scores, threshold, torch.tensor(temperature), keep)
    assert_close(mask, keep.float(), **FLOAT32)

    weights = torch.tensor([[1.0, -2.0, 3.0, 0.5, 1.5, 4.0]])
    (mask * weights).sum().backward()
    soft = [1 / (1 + math.exp(-(s - 0.2) / temperature)) for s in scores.tolist()[0]]
    slopes = [w * m * (1 - m) / temperature for w, m in zip(weights.tolist()[0], soft, strict=True)]
    assert scores.grad is not None
    assert threshold.grad is not None
    assert_close(scores.grad, torch.tensor([slopes]), **FLOAT32)
    assert_close(threshold.grad.item(), -sum(slopes), **FLOAT32)


def test_random_scores_depend_on_position_and_stage_only() -> None:
    positions = torch.arange(64).repeat(2, 1)
    scores = random_scores(positions, stage=3)
    assert_close(scores, random_scores(positions, stage=3), **EXACT)
    assert_close(scores[0], scores[1], **EXACT)
    assert not torch.equal(scores, random_scores(positions, stage=2))
    # another order, another batch, a few tokens only: the same numbers for the same positions
    for few in (torch.randperm(64)[:20][None], torch.tensor([[3, 1]]), torch.tensor([[5], [2]])):
        assert_close(random_scores(few, stage=3), scores[0][few], **EXACT)


def test_random_scores_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    random_scores(torch.arange(9)[None], stage=0)
    assert_close(torch.rand(1), expected, **EXACT)


def test_ties_among_those_that_always_stay_do_not_depend_on_the_batch() -> None:
    alone = torch.full((1, 20), 0.1)
    beside_a_longer_image = torch.cat([alone, torch.full((1, 60), -INF)], 1)
    assert stays(alone, 9.0, at_least=3) == [[0, 1, 2]]
    assert stays(beside_a_longer_image, 9.0, at_least=3) == [[0, 1, 2]]


def test_near_a_threshold_is_where_its_mask_has_a_gradient() -> None:
    temperature, threshold = torch.tensor(0.01), torch.tensor(0.5, requires_grad=True)
    scores = torch.linspace(0.0, 1.0, 1001)[None]
    (gradient,) = torch.autograd.grad(
        straight_through(scores, threshold, temperature, scores > threshold).sum(), threshold
    )
    near = near_threshold(scores, threshold.detach(), temperature)
    assert near.sum() == pytest.approx(2 * BAND * 10, abs=2)
    (gradient_near,) = torch.autograd.grad(
        (straight_through(scores, threshold, temperature, scores > threshold) * near).sum(), threshold
    )
    assert abs(1 - gradient_near / gradient) < 2 / (1 + math.exp(BAND - 0.1))


def test_what_always_stays_or_is_not_there_is_near_no_threshold() -> None:
    scores = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.5]])
    assert near_threshold(scores, torch.tensor(0.5), torch.tensor(1e-4)).tolist() == [[False, False, False, True]]
    assert not near_threshold(scores, torch.tensor(-torch.inf), torch.tensor(1e-4)).any()
