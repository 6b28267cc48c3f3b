"""Kinds of answers against numbers worked out by hand, and against the losses that transformers trains with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from vitprune.measure.answers import KINDS, PROBLEM_TYPES, Embedding, MultiLabel, Regression, SingleLabel, task_of
from vitprune.measure.outputs import ImageModel, declare_task
from vitprune.recipe.schema import Task

FLOAT32: tiny.Tolerance = {"rtol": 1e-5, "atol": 1e-6}


def model_for(task: Task, outputs: int) -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(**{**tiny.MLP, "num_labels": outputs}, problem_type=PROBLEM_TYPES[task])
    return ViTForImageClassification(config).eval()


LABELS: list[tuple[Task, int, Tensor]] = [
    ("single-label", 5, torch.tensor([0, 4, 2])),
    ("multi-label", 5, (torch.arange(15).view(3, 5) % 4 == 0).float()),
    ("multi-label", 1, torch.tensor([[1.0], [0.0], [1.0]])),
    ("regression", 1, torch.tensor([[0.5], [-2.0], [3.0]])),
    ("regression", 4, torch.arange(12.0).view(3, 4)),
]


@pytest.mark.parametrize(("task", "outputs", "labels"), LABELS)
@torch.no_grad()
def test_the_task_loss_is_that_of_transformers(task: Task, outputs: int, labels: Tensor) -> None:
    model = model_for(task, outputs)
    theirs: Any = model(tiny.images(3), labels=labels)
    answers = ImageModel(model)
    assert answers.kind.name == task
    assert_close(answers.kind.task_loss(answers(tiny.images(3)), labels), theirs.loss, **FLOAT32)


CLASSES = {0: "cat", 1: "dog"}


def test_answers_and_labels_in_words() -> None:
    logits = torch.tensor([0.0, math.log(3), -50.0])
    assert KINDS["single-label"].describe(logits, CLASSES) == "dog 75.0 %"
    assert KINDS["single-label"].describe(logits.flip(0), {}) == "1 75.0 %"
    assert KINDS["single-label"].describe_label(0, CLASSES) == "cat"
    assert KINDS["multi-label"].describe(logits, CLASSES) == "dog"
    assert KINDS["multi-label"].describe(torch.tensor([1.0, 2.0, 3.0]), CLASSES) == "cat, dog, 2"
    assert KINDS["multi-label"].describe_label([0.0, 0.0], CLASSES) == "none"
    assert KINDS["regression"].describe(torch.tensor([1.5, -2.25]), {}) == "1.5, -2.25"
    assert Embedding().describe(logits, CLASSES) == ""
    with pytest.raises(TypeError, match="no labels"):
        Embedding().describe_label(0, CLASSES)


@pytest.mark.parametrize(
    ("problem_type", "outputs", "task"),
    [
        (None, 5, "single-label"),
        (None, 1, "regression"),
        ("single_label_classification", 2, "single-label"),
        ("multi_label_classification", 1, "multi-label"),
        ("regression", 5, "regression"),
    ],
)
def test_the_task_is_what_the_config_says(problem_type: Any, outputs: int, task: Task) -> None:
    given: dict[str, Any] = {"num_labels": outputs, "problem_type": problem_type}
    assert task_of(ViTConfig(**given)) == task


def test_a_task_can_be_declared_where_there_is_a_head_for_it() -> None:
    model = model_for("single-label", 5)
    declare_task(model, "multi-label")
    assert ImageModel(model).kind.name == "multi-label"
    with pytest.raises(ValueError, match="ViTModel has no classification head"):
        declare_task(ViTModel(ViTConfig(**tiny.MLP)), "regression")
    with pytest.raises(ValueError, match="single output, so there is nothing to choose among"):
        declare_task(model_for("regression", 1), "single-label")


@pytest.mark.parametrize("kind", [*KINDS.values(), Embedding()], ids=lambda kind: kind.name)
@pytest.mark.parametrize("outputs", [1, 5])
def test_different_answers_are_never_the_same(kind: Any, outputs: int) -> None:
    if kind.name == "single-label" and outputs == 1:
        pytest.skip("a model with one output has another task")
    one, other = torch.randn(8, outputs), torch.randn(8, outputs)
    assert kind.distance(one, other) > 0.01
    assert kind.likeness(one, other).shape == (8,)
    assert kind.likeness(one, other).mean() < 0.9
    assert_close(kind.distance(one, one), torch.tensor(0.0), **FLOAT32)
    assert_close(kind.likeness(one, one), torch.ones(8), **FLOAT32)
    assert kind.distance(one.bfloat16(), other.bfloat16()).dtype == torch.float32


def test_the_distance_of_labels_is_the_divergence_of_each() -> None:
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    total = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        p, q = 1 / (1 + math.exp(-t)), 1 / (1 + math.exp(-s))
        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert_close(MultiLabel().distance(student, teacher).item(), total / 24, **FLOAT32)
    assert MultiLabel().distance(torch.tensor([[300.0]]), torch.tensor([[-300.0]])).isfinite()


def test_labels_are_alike_one_by_one_and_numbers_by_their_difference() -> None:
    dense, pruned = torch.tensor([[2.0, -1.0, 0.5, -3.0]]), torch.tensor([[1.0, 1.0, 0.1, -9.0]])
    assert MultiLabel().likeness(dense, pruned).tolist() == [0.75]
    assert Regression().likeness(dense, pruned).tolist() == pytest.approx([1 - (1 + 4 + 0.16 + 36) / 4])
    assert Regression().distance(pruned, dense).item() == pytest.approx((1 + 4 + 0.16 + 36) / 4)
    assert SingleLabel().likeness(dense, pruned).tolist() == [1.0]


def test_distillation_is_the_divergence_from_the_teacher_in_nats() -> None:
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p = [math.exp(x) / sum(map(math.exp, t)) for x in t]
        q = [math.exp(x) / sum(map(math.exp, s)) for x in s]
        total += sum(p_c * math.log(p_c / q_c) for p_c, q_c in zip(p, q, strict=True))
    assert_close(SingleLabel().distance(student, teacher).item(), total / 4, **FLOAT32)


def test_distillation_is_zero_for_the_same_answer_and_float32_in_half_precision() -> None:
    logits = torch.randn(4, 6).bfloat16()
    loss = SingleLabel().distance(logits + 3.0 - 3.0, logits + 3.0 - 3.0)
    assert loss.dtype == torch.float32
    assert_close(loss.item(), 0.0, **FLOAT32)


def test_distillation_pulls_the_student_to_the_teachers_probabilities() -> None:
    student = torch.zeros(1, 3, requires_grad=True)
    teacher = torch.tensor([[2.0, 0.0, -1.0]])
    SingleLabel().distance(student, teacher).backward()
    assert student.grad is not None
    # the gradient is q − p
    assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1), **FLOAT32)
    assert student.grad[0, 0] < 0 < student.grad[0, 2]


def test_embedding_loss_is_one_less_the_mean_cosine() -> None:
    student = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    teacher = torch.tensor([[0.0, 2.0], [3.0, 4.0]])
    assert Embedding().distance(student, teacher).item() == pytest.approx(1 - (0 + 1) / 2)
