"""The losses that pruning adds to the task's own: compute budget and distillation, of logits or of embeddings."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


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
