"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any, get_args

import evaluate
import numpy as np
import pytest
import torch

from vitprune.measure.answers import KINDS, Embedding
from vitprune.measure.metrics import METRICS, NO_CLASS, metrics_of, recorded
from vitprune.recipe.schema import Metric, Task

RANKED = [[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [5, 1, 2, 3, 0], [1, 2, 3, 4, 5]]
TRUE = [0, 0, 0, 1]
# three labels and one that no image has
SCORED = [[3.0, -1.0, 0.5, -9.0], [2.0, -2.0, -0.5, -9.0], [1.0, 4.0, 0.25, -9.0], [0.5, -3.0, -1.0, -9.0]]
HAS = [[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


def metric_of(task: Task, name: str) -> Any:
    return METRICS[task][name](keep_in_memory=True)


@pytest.mark.parametrize(
    ("task", "name", "value"),
    [
        ("single-label", "accuracy", 2 / 4),
        ("single-label", "top-5-accuracy", 4 / 4),
        # class 0: precision 1, recall 1/3; class 1: precision 1/2, recall 1; class 5: 0
        ("single-label", "f1", (1 / 2 + 2 / 3 + 0) / 3),
        # label 0: first and third of its ranking are right; label 1: the first; label 2: the first
        ("multi-label", "mean-average-precision", ((1 + 2 / 3) / 2 + 1 + 1) / 3),
        # label 0: precision 2/4, recall 1; label 1: right; label 2: precision 1/2, recall 1
        ("multi-label", "f1", (2 / 3 + 1 + 2 / 3) / 3),
        ("multi-label", "label-accuracy", 13 / 16),
        ("regression", "mean-squared-error", float(np.square(np.subtract(SCORED, HAS)).mean())),
        ("regression", "mean-absolute-error", float(np.abs(np.subtract(SCORED, HAS)).mean())),
    ],
)
def test_values(task: Task, name: str, value: float) -> None:
    metric = metric_of(task, name)
    assert isinstance(metric, evaluate.Metric)
    answers, true = (RANKED, TRUE) if task == "single-label" else (SCORED, HAS)
    metric.add_batch(predictions=answers[:3], references=true[:3])
    metric.add_batch(predictions=answers[3:], references=true[3:])
    assert metric.compute() == {name: pytest.approx(value)}


def test_correlation_is_pearsons_of_each_number_and_none_of_what_never_changes() -> None:
    answers, true = [[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]], [[3.0, 1.0], [2.0, 2.0], [0.0, 3.0]]
    expected = (np.corrcoef([1, 2, 4], [3, 2, 0])[0, 1] + 0) / 2
    value = metric_of("regression", "correlation").compute(predictions=answers, references=true)
    assert value == {"correlation": pytest.approx(expected)}


def test_f1_of_one_label_is_that_label_s() -> None:
    # precision 1/2, recall 1/2; of what hasn't the label more is right
    answers, true = [[1.0], [1.0], [-1.0], [-1.0], [-1.0]], [[1.0], [0.0], [1.0], [0.0], [0.0]]
    assert metric_of("multi-label", "f1").compute(predictions=answers, references=true) == {"f1": pytest.approx(0.5)}


def test_only_five_count() -> None:
    metric = metric_of("single-label", "top-5-accuracy")
    assert metric.compute(predictions=[[0, 1, 2, 3, 4, 5]], references=[5]) == {"top-5-accuracy": 0.0}


@pytest.mark.parametrize("name", METRICS["single-label"])
def test_fewer_than_five_classes(name: str) -> None:
    metric = metric_of("single-label", name)
    assert metric.compute(predictions=[[1, 0], [0, 1]], references=[1, 0]) == {name: 1.0}


@pytest.mark.parametrize("name", METRICS["multi-label"])
def test_no_label_at_all_is_no_failure(name: str) -> None:
    value = metric_of("multi-label", name).compute(predictions=[[-1.0, -2.0]], references=[[0.0, 0.0]])[name]
    assert value in (0.0, 1.0)


def test_an_answer_that_is_no_number_is_wrong() -> None:
    ids = recorded(KINDS["single-label"], torch.tensor([[math.nan, 1.0], [0.0, 1.0]]), torch.tensor([False, True]))
    assert ids.tolist() == [[NO_CLASS, NO_CLASS], [1, 0]]
    worse = [[math.nan, 1.0], [-5.0, 1.0]]
    precision = metric_of("multi-label", "mean-average-precision")
    value = precision.compute(predictions=worse, references=[[1.0, 1.0], [0.0, 0.0]])
    assert value == {"mean-average-precision": pytest.approx(1 / 2)}
    value = metric_of("multi-label", "label-accuracy").compute(predictions=worse, references=[[0.0, 1.0], [0.0, 1.0]])
    assert value == {"label-accuracy": 3 / 4}


def test_of_equal_answers_the_first_counts_as_it_does_for_agreement() -> None:
    answers_BC = torch.randn(256, 10, generator=torch.Generator().manual_seed(0)).round()
    ids = recorded(KINDS["single-label"], answers_BC, torch.ones(256, dtype=torch.bool))
    assert ids.shape == (256, 5)
    assert torch.equal(ids[:, 0], answers_BC.argmax(-1))


def test_a_metric_fits_the_task() -> None:
    assert [metric.label for metric in metrics_of(KINDS["regression"], None)] == ["mean-squared-error"]
    assert [metric.label for metric in metrics_of(KINDS["multi-label"], ("f1",))] == ["f1"]
    assert metrics_of(KINDS["single-label"], ()) == ()
    assert metrics_of(Embedding(), ("accuracy",)) == ()
    with pytest.raises(ValueError, match="'accuracy' doesn't fit a model whose task is multi-label; its metrics are"):
        metrics_of(KINDS["multi-label"], ("accuracy",))
    assert {name for metrics in METRICS.values() for name in metrics} == set(get_args(Metric))
