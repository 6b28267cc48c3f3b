"""How good answers are: `evaluate` metrics that work offline.

Shapes: B images, C classes, labels or numbers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

import evaluate
import numpy as np
from datasets import Features, Sequence, Value
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, average_precision_score, f1_score
from torch import Tensor

from vitprune.measure.answers import AnswerKind
from vitprune.recipe.schema import Task

RANKED = 5
NO_CLASS = -1
Given = TypeVar("Given")
Floats = NDArray[np.float64]


class QualityMetric(evaluate.Metric, Generic[Given]):
    """A metric of one number. `compute()` gives `{label: value}`; is_fraction: whether that goes from 0 to 1."""

    label: ClassVar[str]
    is_fraction: ClassVar[bool] = True
    inputs: ClassVar[str]
    columns: ClassVar[Features]

    @abstractmethod
    def value(self, answers: Given, true: Given) -> float:
        """Compute the metric of these images, at least one."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=self.inputs,
            features=self.columns,
        )

    def _compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        return {self.label: self.value(predictions, references)}


class RankedMetric(QualityMetric[Any]):
    """A metric of class ids ranked by an image classifier."""

    inputs = """`predictions`: for each image the ids of its most likely classes, most likely first; `RANKED` of them,
    or all where a model has fewer classes. `references`: the id of its true class."""
    columns = Features({"predictions": Sequence(Value("int64")), "references": Value("int64")})


class ScoredMetric(QualityMetric[Any]):
    """A metric of several numbers an image."""

    inputs = """`predictions`: for each image a number for each label: its logit, or the value itself in regression.
    `references`: what it should be; of labels 1 or 0, above or not above 0.5."""
    columns = Features({"predictions": Sequence(Value("float64")), "references": Sequence(Value("float64"))})

    def _compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        return {self.label: self.value(np.asarray(predictions), np.asarray(references))}


class Accuracy(RankedMetric):
    """Top-1: the part of the images that got their true class."""

    label = "accuracy"

    def value(self, answers: list[list[int]], true: list[int]) -> float:
        return float(accuracy_score(true, [ids[0] for ids in answers]))


class Top5Accuracy(RankedMetric):
    """The part of the images that have their true class among their five most likely ones."""

    label = "top-5-accuracy"

    def value(self, answers: list[list[int]], true: list[int]) -> float:
        hits = [label in ids[:RANKED] for ids, label in zip(answers, true, strict=True)]
        return sum(hits) / len(hits)


class F1(RankedMetric):
    """Macro F1 of the top-1 answers: averaged over the classes that occur among answers or truths."""

    label = "f1"

    def value(self, answers: list[list[int]], true: list[int]) -> float:
        first = [ids[0] for ids in answers]
        classes = sorted({*true, *(index for index in first if index >= 0)})  # an answer that is none is no class
        return float(f1_score(true, first, labels=classes, average="macro"))


class MeanAveragePrecision(ScoredMetric):
    """Average precision of each label over all images, averaged over the labels that some image has."""

    label = "mean-average-precision"

    def value(self, answers: Floats, true: Floats) -> float:
        has_BC = true > 0.5
        there_C = has_BC.any(0)
        if not there_C.any():
            return 0.0
        finite_BC = np.isfinite(answers)
        lowest = np.min(answers, initial=0.0, where=finite_BC) - 1.0
        ranked_BC = np.where(finite_BC, answers, lowest)  # what is no number comes last
        return float(average_precision_score(has_BC[:, there_C], ranked_BC[:, there_C], average="macro"))


class LabelF1(ScoredMetric):
    """Macro F1 of labels given at a probability of 0.5, averaged over those that occur among answers or truths."""

    label = "f1"

    def value(self, answers: Floats, true: Floats) -> float:
        has_BC, given_BC = true > 0.5, answers > 0
        there_C = (has_BC | given_BC).any(0)
        if not there_C.any():
            return 1.0
        pairs = zip(has_BC[:, there_C].T, given_BC[:, there_C].T, strict=True)  # of a single label sklearn has two
        return float(np.mean([f1_score(has_B, given_B) for has_B, given_B in pairs]))


class LabelAccuracy(ScoredMetric):
    """The part of all labels of all images that are rightly given or not given, at a probability of 0.5."""

    label = "label-accuracy"

    def value(self, answers: Floats, true: Floats) -> float:
        return float((((answers > 0) == (true > 0.5)) & np.isfinite(answers)).mean())


class MeanSquaredError(ScoredMetric):
    """The squared error, averaged over numbers and images."""

    label, is_fraction = "mean-squared-error", False

    def value(self, answers: Floats, true: Floats) -> float:
        return float(np.square(answers - true).mean())


class MeanAbsoluteError(ScoredMetric):
    """The absolute error, averaged over numbers and images."""

    label, is_fraction = "mean-absolute-error", False

    def value(self, answers: Floats, true: Floats) -> float:
        return float(np.abs(answers - true).mean())


class Correlation(ScoredMetric):
    """Pearson's, over images, averaged over numbers; 0 for a number that is the same for all images."""

    label, is_fraction = "correlation", False

    def value(self, answers: Floats, true: Floats) -> float:
        return correlation(answers, true)


def correlation(one_BC: Floats, other_BC: Floats) -> float:
    """Compute Pearson's correlation over images, averaged over numbers; 0 for one that is the same for all images."""
    one_BC, other_BC = one_BC - one_BC.mean(0), other_BC - other_BC.mean(0)
    spread_C = np.sqrt(np.square(one_BC).sum(0) * np.square(other_BC).sum(0))
    together_C = (one_BC * other_BC).sum(0)
    return float(np.divide(together_C, spread_C, out=np.zeros_like(spread_C), where=spread_C > 0).mean())


# the first is reported where none is asked for
METRICS: Mapping[Task, Mapping[str, type[QualityMetric[Any]]]] = {
    "single-label": {metric.label: metric for metric in (Accuracy, Top5Accuracy, F1)},
    "multi-label": {metric.label: metric for metric in (MeanAveragePrecision, LabelF1, LabelAccuracy)},
    "regression": {metric.label: metric for metric in (MeanSquaredError, MeanAbsoluteError, Correlation)},
}


def metrics_of(kind: AnswerKind, asked: tuple[str, ...] | None) -> tuple[type[QualityMetric[Any]], ...]:
    """The metrics that were asked for, or else the first that fits; none for embeddings.

    Raises ValueError for one that doesn't fit the kind of answer.
    """
    if kind.name == "embedding":
        return ()
    known = METRICS[kind.name]
    for name in asked or ():
        if name not in known:
            raise ValueError(
                f"{name!r} doesn't fit a model whose task is {kind.name}; its metrics are {', '.join(known)}"
            )
    return tuple(known.values())[:1] if asked is None else tuple(known[name] for name in asked)


def recorded(kind: AnswerKind, answers_BC: Tensor, finite_B: Tensor) -> Tensor:
    """What metrics need of answers, on the CPU: ids of the likeliest classes, (B, `RANKED`) at most, or all numbers.

    `NO_CLASS` stands for the answers that are no numbers: those where not `finite_B`.
    """
    if kind.name != "single-label":
        return answers_BC.cpu().double()
    # of equal ones, as half precision often has, the first, as argmax has it, by which answers are the same or not
    ids_BR = answers_BC.sort(dim=-1, descending=True, stable=True).indices[:, :RANKED].cpu()
    return ids_BR.masked_fill(~finite_B[:, None], NO_CLASS)
