"""Losses of fine-tuning: the task's, distillation of answers and tokens; and AS-ViT's own for the budget."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vitprune.measure.answers import AnswerKind
from vitprune.recipe.schema import LossWeights

LOSSES = ("task", "distillation", "tokens")
"""The names of the losses that training sums."""


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became infinite or NaN; the model has the last weights that were known to be good."""


def budget_loss(costs_B: Tensor, dense_costs_B: Tensor, budget: float) -> Tensor:
    """|ratio − budget|, the ratio of MACs (AS-ViT) or seconds averaged over the images; dimensionless."""
    return ((costs_B / dense_costs_B).mean() - budget).abs()


def token_loss(student_BND: Tensor, teacher_BND: Tensor, there_BN: Tensor) -> Tensor:
    """1 − cosine of tokens to the teacher's at their places, averaged over those that are there, then over images."""
    distances_BN = 1.0 - F.cosine_similarity(student_BND.float(), teacher_BND.float(), dim=-1)
    return ((distances_BN * there_BN).sum(1) / there_BN.sum(1)).mean()


def answer_losses(
    answers_BC: Tensor, taught_BC: Tensor | None, labels: Tensor | None, weights: LossWeights, kind: AnswerKind
) -> dict[str, Tensor]:
    """What training minimises beside the budget, weighted: task (labels) and distillation (a teacher)."""
    losses = {}
    if labels is not None and weights.task and kind.takes_labels:
        losses["task"] = weights.task * kind.task_loss(answers_BC, labels)
    if taught_BC is not None and weights.distillation:
        losses["distillation"] = weights.distillation * kind.distance(answers_BC, taught_BC)
    return losses
