"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import evaluate
import pytest

from vitprune.measure.metrics import METRICS, load_metric

RANKED = [[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [5, 1, 2, 3, 0], [1, 2, 3, 4, 5]]
TRUE = [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accuracy", 2 / 4),
        ("top-5-accuracy", 4 / 4),
        # class 0: precision 1, recall 1/3; class 1: precision 1/2, recall 1; class 5: 0
        ("f1", (1 / 2 + 2 / 3 + 0) / 3),
    ],
)
def test_values(name: str, value: float) -> None:
    metric = load_metric(name)
    assert isinstance(metric, evaluate.Metric)
    metric.add_batch(predictions=RANKED[:3], references=TRUE[:3])
    metric.add_batch(predictions=RANKED[3:], references=TRUE[3:])
    assert metric.compute() == {name: pytest.approx(value)}


def test_only_five_count() -> None:
    assert load_metric("top-5-accuracy").compute(predictions=[[0, 1, 2, 3, 4, 5]], references=[5]) == {
        "top-5-accuracy": 0.0
    }


@pytest.mark.parametrize("name", METRICS)
def test_fewer_than_five_classes(name: str) -> None:
    assert load_metric(name).compute(predictions=[[1, 0], [0, 1]], references=[1, 0]) == {name: 1.0}


def test_unknown() -> None:
    with pytest.raises(ValueError, match="no metric 'recall'; the metrics are accuracy, top-5-accuracy, f1"):
        load_metric("recall")
