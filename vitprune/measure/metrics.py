"""How good answers are: `evaluate` metrics that work offline."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import evaluate
from datasets import Features, Sequence, Value
from sklearn.metrics import accuracy_score, f1_score

RANKED = 5


class RankedMetric(evaluate.Metric):
    """A metric of class ids ranked by an image classifier.

    `predictions`: for each image the ids of its most likely classes, most likely first; `RANKED` of them, or all where
    a model has fewer classes. `references`: the id of its true class. `compute()` gives `{label: value}`, the value a
    fraction, 0 to 1.
    """

    label: ClassVar[str]

    @abstractmethod
    def value(self, ranked: list[list[int]], true: list[int]) -> float:
        """The metric of these images, at least one."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=RankedMetric.__doc__ or "",
            features=Features({"predictions": Sequence(Value("int64")), "references": Value("int64")}),
        )

    def _compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        return {self.label: self.value(predictions, references)}


class Accuracy(RankedMetric):
    """Top-1: the part of the images that got their true class."""

    label = "accuracy"

    def value(self, ranked: list[list[int]], true: list[int]) -> float:
        return float(accuracy_score(true, [ids[0] for ids in ranked]))


class Top5Accuracy(RankedMetric):
    """The part of the images that have their true class among their five most likely ones."""

    label = "top-5-accuracy"

    def value(self, ranked: list[list[int]], true: list[int]) -> float:
        hits = [label in ids[:RANKED] for ids, label in zip(ranked, true, strict=True)]
        return sum(hits) / len(hits)


class F1(RankedMetric):
    """Macro F1 of the top-1 answers: averaged over the classes that occur among answers or truths."""

    label = "f1"

    def value(self, ranked: list[list[int]], true: list[int]) -> float:
        first = [ids[0] for ids in ranked]
        classes = sorted({*true, *(index for index in first if index >= 0)})  # an answer that is none is no class
        return float(f1_score(true, first, labels=classes, average="macro"))


METRICS: Mapping[str, type[RankedMetric]] = {metric.label: metric for metric in (Accuracy, Top5Accuracy, F1)}


def load_metric(name: str) -> RankedMetric:
    """A fresh metric that keeps what it is given in memory.

    Raises ValueError for a name that isn't in `METRICS`.
    """
    if name not in METRICS:
        raise ValueError(f"evaluate.metrics: there is no metric {name!r}; the metrics are {', '.join(METRICS)}")
    return METRICS[name](keep_in_memory=True)
