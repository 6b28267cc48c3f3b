"""Budget and distillation loss by hand."""

from __future__ import annotations

import pytest
import torch
from tiny import Tolerance
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from vitprune.finetuning.losses import answer_losses, budget_loss
from vitprune.measure.answers import KINDS, Embedding
from vitprune.recipe.schema import LossWeights

FLOAT32 = Tolerance(rtol=1e-5, atol=1e-7)


LABEL = KINDS["single-label"]


def test_the_budget_loss_is_the_distance_of_the_mean_ratio() -> None:
    # ratios 0.5 and 0.9: what counts is their mean, not each image's own distance
    macs, dense = torch.tensor([50.0, 180.0]), torch.tensor([100.0, 200.0])
    assert_close(budget_loss(macs, dense, 0.6).item(), 0.1, **FLOAT32)
    assert_close(budget_loss(macs, dense, 0.7).item(), 0.0, **FLOAT32)
    assert_close(budget_loss(macs, dense, 0.9).item(), 0.2, **FLOAT32)


@pytest.mark.parametrize(("budget", "sign"), [(0.6, 1.0), (0.8, -1.0)])
def test_the_budget_loss_pulls_towards_the_budget_from_both_sides(budget: float, sign: float) -> None:
    macs = torch.tensor([50.0, 180.0], requires_grad=True)
    budget_loss(macs, torch.tensor([100.0, 200.0]), budget).backward()
    assert macs.grad is not None
    assert_close(macs.grad, sign * torch.tensor([0.5 / 100, 0.5 / 200]), **FLOAT32)


def test_the_answers_losses_are_weighted_and_left_out_where_nothing_teaches_them() -> None:
    answers, taught, labels = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    weights = LossWeights(task=2.0, distillation=0.5)
    losses = answer_losses(answers, taught, labels, weights, LABEL)
    assert_close(losses["task"], 2.0 * cross_entropy(answers, labels))
    assert_close(losses["distillation"], 0.5 * LABEL.distance(answers, taught))
    embedded = answer_losses(answers, taught, labels, weights, Embedding())
    assert_close(embedded, {"distillation": 0.5 * Embedding().distance(answers, taught)})
    assert answer_losses(answers, taught, None, weights, LABEL).keys() == {"distillation"}
    assert answer_losses(answers, None, labels, weights, LABEL).keys() == {"task"}
