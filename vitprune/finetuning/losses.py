"""Losses of fine-tuning: the task's, distillation of logits, embeddings and tokens; and AS-ViT's own for the budget."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vitprune.recipe.schema import LossWeights

LOSSES = ("task", "distillation", "tokens")
"""The names of the losses that training sums."""


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became infinite or NaN; the model has the last weights that were known to be good."""


def budget_loss(costs_B: Tensor, dense_costs_B: Tensor, budget: float) -> Tensor:
    """|ratio − budget|, the ratio of MACs (AS-ViT) or seconds averaged over the images; dimensionless."""
    return ((costs_B / dense_costs_B).mean() - budget).abs()


def distillation_loss(student_logits_BC: Tensor, teacher_logits_BC: Tensor) -> Tensor:
    """KL(teacher ‖ student), summed over classes and averaged over images, in nats."""
    return F.kl_div(
        student_logits_BC.float().log_softmax(-1),
        teacher_logits_BC.float().log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )


def embedding_loss(student_BE: Tensor, teacher_BE: Tensor) -> Tensor:
    """1 − cosine of each image's two embeddings, averaged: distillation where there are no classes."""
    return 1.0 - F.cosine_similarity(student_BE.float(), teacher_BE.float(), dim=-1).mean()


def token_loss(student_BND: Tensor, teacher_BND: Tensor, there_BN: Tensor) -> Tensor:
    """1 − cosine of tokens to the teacher's at their places, averaged over those that are there, then over images."""
    distances_BN = 1.0 - F.cosine_similarity(student_BND.float(), teacher_BND.float(), dim=-1)
    return ((distances_BN * there_BN).sum(1) / there_BN.sum(1)).mean()


def answer_losses(
    answers: Tensor, taught: Tensor | None, labels_B: Tensor | None, weights: LossWeights, *, is_classifier: bool
) -> dict[str, Tensor]:
    """What training minimises beside the budget, weighted: task (labels and logits) and distillation (a teacher)."""
    losses = {}
    if labels_B is not None and weights.task and is_classifier:
        losses["task"] = weights.task * F.cross_entropy(answers.float(), labels_B)
    if taught is not None and weights.distillation:
        distil = distillation_loss if is_classifier else embedding_loss
        losses["distillation"] = weights.distillation * distil(answers, taught)
    return losses
