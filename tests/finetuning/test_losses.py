"""Budget and distillation loss by hand."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import Tolerance
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from vitprune.finetuning.losses import answer_losses, budget_loss, distillation_loss, embedding_loss
from vitprune.recipe.schema import LossWeights

FLOAT32 = Tolerance(rtol=1e-5, atol=1e-7)


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


def test_distillation_is_the_divergence_from_the_teacher_in_nats() -> None:
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p = [math.exp(x) / sum(map(math.exp, t)) for x in t]
        q = [math.exp(x) / sum(map(math.exp, s)) for x in s]
        total += sum(p_c * math.log(p_c / q_c) for p_c, q_c in zip(p, q, strict=True))
    assert_close(distillation_loss(student, teacher).item(), total / 4, **FLOAT32)


def test_distillation_is_zero_for_the_same_answer_and_float32_in_half_precision() -> None:
    logits = torch.randn(4, 6).bfloat16()
    loss = distillation_loss(logits + 3.0 - 3.0, logits + 3.0 - 3.0)
    assert loss.dtype == torch.float32
    assert_close(loss.item(), 0.0, **FLOAT32)


def test_distillation_pulls_the_student_to_the_teachers_probabilities() -> None:
    student = torch.zeros(1, 3, requires_grad=True)
    teacher = torch.tensor([[2.0, 0.0, -1.0]])
    distillation_loss(student, teacher).backward()
    assert student.grad is not None
    # the gradient is q − p
    assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1), **FLOAT32)
    assert student.grad[0, 0] < 0 < student.grad[0, 2]


def test_embedding_loss_is_one_less_the_mean_cosine() -> None:
    student = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    teacher = torch.tensor([[0.0, 2.0], [3.0, 4.0]])
    assert embedding_loss(student, teacher).item() == pytest.approx(1 - (0 + 1) / 2)


def test_the_answers_losses_are_weighted_and_left_out_where_nothing_teaches_them() -> None:
    answers, taught, labels = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    weights = LossWeights(task=2.0, distillation=0.5)
    losses = answer_losses(answers, taught, labels, weights, is_classifier=True)
    assert_close(losses["task"], 2.0 * cross_entropy(answers, labels))
    assert_close(losses["distillation"], 0.5 * distillation_loss(answers, taught))
    embedded = answer_losses(answers, taught, labels, weights, is_classifier=False)
    assert_close(embedded, {"distillation": 0.5 * embedding_loss(answers, taught)})
    assert answer_losses(answers, taught, None, weights, is_classifier=True).keys() == {"distillation"}
    assert answer_losses(answers, None, labels, weights, is_classifier=True).keys() == {"task"}
