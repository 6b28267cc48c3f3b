"""Kinds of answers: what a loss is, how far an answer is from the dense model's, when two are the same.

Shapes: B images, C classes, labels or numbers, E width of an embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig

from vitprune.recipe.schema import Task
from vitprune.reports.text import percent

PROBLEM_TYPES: Mapping[Task, Literal["single_label_classification", "multi_label_classification", "regression"]] = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
"""transformers' name for each task, `problem_type` in a checkpoint's config."""


class AnswerKind(ABC):
    """What follows from what the numbers of an answer are.

    unit: what `distance` is measured in. negligible: a change of it that shows in hardly an answer. described: what a
    model answers with. takes_labels: whether there is a task to learn from them.
    """

    name: ClassVar[Task | Literal["embedding"]]
    unit: ClassVar[str]
    negligible: ClassVar[float] = 0.0
    described: ClassVar[str]
    takes_labels: ClassVar[bool] = True

    @abstractmethod
    def task_loss(self, answers_BC: Tensor, labels: Tensor) -> Tensor:
        """Compute what transformers trains such a model with: a mean over images, and over the numbers of each."""

    @abstractmethod
    def distance(self, student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
        """Measure how far answers are from the teacher's, averaged over images; 0 where they are the same."""

    @abstractmethod
    def likeness(self, dense_BC: Tensor, pruned_BC: Tensor) -> Tensor:
        """Measure for each image, (B,) float32, how like two answers are: 1 is the same."""

    @abstractmethod
    def difference(self, dense_BC: Tensor, pruned_BC: Tensor) -> Tensor:
        """Measure for each image, (B,) float32, how far apart two answers are, 0 where they are the same."""

    @abstractmethod
    def describe(self, answer_C: Tensor, names: Mapping[int, str]) -> str:
        """Say one image's answer in words; nothing where there are none for it. names: of classes by id."""

    @abstractmethod
    def describe_label(self, label: int | list[float], names: Mapping[int, str]) -> str:
        """Say in words what is right for an image, as `data.labels.Labels.read` gives it."""


class SingleLabel(AnswerKind):
    """Logits of classes, one of which is right: softmax."""

    name = "single-label"
    unit = "KL"
    negligible = 0.001
    described = "logits of classes"

    def task_loss(self, answers_BC: Tensor, labels: Tensor) -> Tensor:
        """Compute the cross-entropy with class ids (B,)."""
        return F.cross_entropy(answers_BC.float(), labels)

    def distance(self, student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
        """Compute KL(teacher ‖ student), summed over classes, in nats."""
        log_p, log_q = teacher_BC.float().log_softmax(-1), student_BC.float().log_softmax(-1)
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    def likeness(self, dense_BC: Tensor, pruned_BC: Tensor) -> Tensor:
        """Tell whether the likeliest class is the same."""
        return (dense_BC.argmax(-1) == pruned_BC.argmax(-1)).float()

    def difference(self, dense_BC: Tensor, pruned_BC: Tensor) -> Tensor:
        """Compute the total variation of the probabilities, from 0 to 1."""
        return (dense_BC.float().softmax(-1) - pruned_BC.float().softmax(-1)).abs().sum(-1) / 2

    def describe(self, answer_C: Tensor, names: Mapping[int, str]) -> str:
        """Name the likeliest class, with its probability."""
        probability, best = answer_C.float().softmax(-1).max(-1)
        return f"{_name(int(best), names)} {percent(probability.item())}"

    def describe_label(self, label: int | list[float], names: Mapping[int, str]) -> str:
        """Name the class."""
        assert isinstance(label, int)
        return _name(label, names)


class MultiLabel(AnswerKind):
    """Logits of labels, each of which is right or not: sigmoid."""

    name = "multi-label"
    unit = "binary KL"
    described = "logits of labels, any number of which may be right"

    def task_loss(self, answers_BC: Tensor, labels: Tensor) -> Tensor:
        """Compute the binary cross-entropy with labels (B, C), 0 or 1, or between where they are uncertain."""
        return F.binary_cross_entropy_with_logits(answers_BC.float(), labels)

    def distance(self, student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
        """Compute KL(teacher ‖ student) of each label's two outcomes, averaged over labels, in nats."""
        teacher_BC, student_BC = teacher_BC.float(), student_BC.float()
        p_BC = teacher_BC.sigmoid()
        yes_BC = p_BC * (F.logsigmoid(teacher_BC) - F.logsigmoid(student_BC))
        no_BC = (1 - p_BC) * (F.logsigmoid(-teacher_BC) - F.logsigmoid(-student_BC))
        return (yes_BC + no_BC).mean()

    def likeness(self, dense_BC: Tensor, pruned_BC: Tensor) -> Tensor:
        """Measure the part of the labels that both or neither give, at a probability of 0.5."""
        return ((dense_BC > 0) == (pruned_BC > 0)).float().mean(-1)

    def difference(self, dense_BC: Tensor, pruned_BC: Tensor) -> Tensor:
        """Compute the mean difference of the labels' probabilities."""
        return (dense_BC.float().sigmoid() - pruned_BC.float().sigmoid()).abs().mean(-1)

    def describe(self, answer_C: Tensor, names: Mapping[int, str]) -> str:
        """Name the labels above a probability of 0.5."""
        return self.describe_label(answer_C.float().sigmoid().tolist(), names)

    def describe_label(self, label: int | list[float], names: Mapping[int, str]) -> str:
        """Name the labels that are given."""
        assert isinstance(label, list)
        given = [_name(index, names) for index, part in enumerate(label) if part > 0.5]
        return ", ".join(given) or "none"


class Regression(AnswerKind):
    """Numbers."""

    name = "regression"
    unit = "squared error"
    described = "numbers (regression)"

    def task_loss(self, answers_BC: Tensor, labels: Tensor) -> Tensor:
        """Compute the squared error of labels (B, C)."""
        return F.mse_loss(answers_BC.float(), labels)

    def distance(self, student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
        """Compute the squared error of the student, as if the teacher were right."""
        return F.mse_loss(student_BC.float(), teacher_BC.float())

    def likeness(self, dense_BC: Tensor, pruned_BC: Tensor) -> Tensor:
        """Compute 1 − the squared difference."""
        return 1 - self.difference(dense_BC, pruned_BC)

    def difference(self, dense_BC: Tensor, pruned_BC: Tensor) -> Tensor:
        """Compute the squared difference; not as 1 − likeness, where a small one would be lost."""
        return (dense_BC.float() - pruned_BC.float()).square().mean(-1)

    def describe(self, answer_C: Tensor, names: Mapping[int, str]) -> str:
        """Say the numbers."""
        return self.describe_label(answer_C.float().tolist(), names)

    def describe_label(self, label: int | list[float], names: Mapping[int, str]) -> str:
        """Say the numbers."""
        assert isinstance(label, list)
        return ", ".join(f"{number:.4g}" for number in label)


class Embedding(AnswerKind):
    """A vector whose direction matters; there is no label for it."""

    name = "embedding"
    unit = "1 - cosine"
    described = "embeddings, having no classes"
    takes_labels = False

    def task_loss(self, answers_BC: Tensor, labels: Tensor) -> Tensor:
        """Raise TypeError: nothing says what an embedding should be."""
        raise TypeError("a model without classes learns nothing from labels")

    def distance(self, student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
        """Compute 1 − cosine."""
        return 1 - self.likeness(teacher_BC, student_BC).mean()

    def likeness(self, dense_BC: Tensor, pruned_BC: Tensor) -> Tensor:
        """Compute the cosine."""
        return F.cosine_similarity(dense_BC.float(), pruned_BC.float(), dim=-1)

    def difference(self, dense_BC: Tensor, pruned_BC: Tensor) -> Tensor:
        """Compute 1 − cosine."""
        return 1 - self.likeness(dense_BC, pruned_BC)

    def describe(self, answer_C: Tensor, names: Mapping[int, str]) -> str:
        """Say nothing: a direction has no words."""
        return ""

    def describe_label(self, label: int | list[float], names: Mapping[int, str]) -> str:
        """Raise TypeError: nothing says what an embedding should be."""
        raise TypeError("a model without classes has no labels")


def _name(index: int, names: Mapping[int, str]) -> str:
    return names.get(index, str(index))


KINDS: Mapping[Task, AnswerKind] = {
    "single-label": SingleLabel(),
    "multi-label": MultiLabel(),
    "regression": Regression(),
}


def task_of(config: PreTrainedConfig) -> Task:
    """Tell what a classification head is for: what `problem_type` says, or else, as in transformers, its outputs.

    One output alone is a number, as there would be nothing to choose among.
    """
    for task, problem_type in PROBLEM_TYPES.items():
        if config.problem_type == problem_type:
            return task
    return "regression" if config.num_labels == 1 else "single-label"
