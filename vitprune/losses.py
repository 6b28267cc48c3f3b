"""The losses that pruning adds to the task's own: compute budget and distillation, of logits or of embeddings."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vitprune.recipe import LossWeights

LOSSES = ("budget", "task", "distillation")
"""The names of the losses that training sums."""


def budget_loss(costs_B: Tensor, dense_costs_B: Tensor, budget: float, overall: Tensor | None = None) -> Tensor:
    """|ratio − budget|, the ratio of MACs (AS-ViT) or seconds averaged over the images; dimensionless.

    overall: the ratio of a larger batch that these images are a part of. Then the parts' losses, averaged by images,
    are the larger batch's loss and have its gradient.
    """
    distance = (costs_B / dense_costs_B).mean() - budget
    return distance.abs() if overall is None else distance * (overall - budget).sign()


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


def answer_losses(
    answers: Tensor, taught: Tensor | None, labels_B: Tensor | None, weights: LossWeights, *, are_logits: bool
) -> dict[str, Tensor]:
    """What training minimises beside the budget, weighted: task (labels and logits) and distillation (a teacher)."""
    losses = {}
    if labels_B is not None and weights.task and are_logits:
        losses["task"] = weights.task * F.cross_entropy(answers.float(), labels_B)
    if taught is not None and weights.distillation:
        distil = distillation_loss if are_logits else embedding_loss
        losses["distillation"] = weights.distillation * distil(answers, taught)
    return losses
