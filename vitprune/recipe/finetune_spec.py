"""The recipe's section on fine-tuning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import PositiveInt, ValidationInfo, model_validator
from pydantic import field_validator as check

from vitprune.recipe.values import LISTS_TOO, Interval, NonNegative, Part, Positive, Spec

Execution = Literal["packed", "masked"]
ThresholdMode = Literal["scaled", "learned", "calibrated"]
Trained = Literal["all", "norms", "thresholds"]
Tracker = Literal["tensorboard", "trackio", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"]


LEARNING_RATES: dict[Trained, float] = {"all": 1e-5, "norms": 1e-3, "thresholds": 1e-5}
"""What a recipe that says nothing has; docs/results.md has what others were worth."""


class LossWeights(Spec):
    """What the fine-tuner minimises. The defaults need no labels: the dense model's answers are to stay."""

    task: NonNegative = 0.0
    """The labels' loss: cross-entropy, binary where an image has several of them, squared error for numbers."""
    budget: NonNegative = 2.0
    """Weight of the price of MACs, which holds thresholds to the budget; with thresholds: learned only."""
    distillation: NonNegative = 1.0
    """Divergence from the dense model's answers."""
    tokens: NonNegative = 0.0
    """1 - cosine between the tokens that are left at the end and the dense model's."""

    @check("distillation")
    @classmethod
    def _something_to_learn(cls, distillation: float, info: ValidationInfo) -> float:
        if distillation == 0 and info.data.get("task") == 0:
            raise ValueError("is 0 and so is task; one of them should be above 0")
        return distillation


class FinetuneSpec(Spec):
    """Training at the budget. Without this section thresholds are only calibrated."""

    epochs: Positive = 1.0
    """Passes over the training images; parts are fine."""
    steps: PositiveInt | None = None
    """Steps of the optimizer in all, in place of epochs; needed by a stream that doesn't tell its length."""
    batch_size: PositiveInt = 32
    """Images at a time, by all processes together."""
    gradient_accumulation_steps: PositiveInt = 1
    """Batches to a step of the optimizer."""
    train: Trained = "all"
    """Which weights learn: all, those of norms alone, or none beside the thresholds."""
    learning_rate: Positive | None = None
    """Highest learning rate of the weights; if left out, 1e-5 for all of them and 1e-3 for norms."""
    thresholds: ThresholdMode = "scaled"
    """scaled: a common factor holds them to the budget while weights learn; learned: gradients move them, too;
    calibrated: they stay as they were until the end."""
    threshold_learning_rate: Positive = 0.0005
    """Highest learning rate of thresholds that learn: the part of a stage's patches that a step moves, at most."""
    weight_decay: NonNegative = 0.05
    """AdamW's."""
    warmup: Part = 0.05
    """Part of the steps over which the learning rate rises, 5% or 0.05."""
    max_grad_norm: Positive = 1.0
    """Longer gradients are clipped."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """What the training computes in beside float32."""
    augmentation: Literal["none", "light", "strong"] = "light"
    """light: flips, and crops of 70 to 100 % of the area; strong: also colours, rotation, shift, shear and a blank
    rectangle, for images of three channels."""
    execution: Execution = "packed"
    """packed: tokens that no threshold learns from leave while training, too; masked: all stay, as published."""
    gradient_checkpointing: bool = False
    """Less memory for more time."""
    holdout: PositiveInt = 256
    """Training images kept back to choose the best state by, and to scale the thresholds to the budget at the end."""
    checks: PositiveInt = 5
    """How often, while it trains, the images kept back are looked at; once more before."""
    losses: LossWeights = LossWeights()
    """What the fine-tuner minimises."""
    trackers: Annotated[tuple[Tracker, ...], LISTS_TOO] = ()
    """Experiment trackers that are told of every step, such as [tensorboard]."""
    checkpoint_every: Interval = "15min"
    """How often the full state is kept, from which an interrupted run is resumed: 500 (steps) or 15min."""
    checkpoints_kept: PositiveInt = 2
    """The newest so many of these states stay while the run lasts."""

    @check("learning_rate")
    @classmethod
    def _of_weights(cls, rate: float | None, info: ValidationInfo) -> float | None:
        if rate is not None and info.data.get("train") == "thresholds":
            raise ValueError("has no meaning with train: thresholds; theirs is threshold_learning_rate")
        return rate

    @check("threshold_learning_rate")
    @classmethod
    def _of_thresholds(cls, rate: float, info: ValidationInfo) -> float:
        if rate != cls.model_fields["threshold_learning_rate"].default:
            _require_learned("", info)
        return rate

    @check("losses")
    @classmethod
    def _of_budget(cls, losses: LossWeights, info: ValidationInfo) -> LossWeights:
        if losses.budget != LossWeights().budget:
            _require_learned(f"has budget: {losses.budget:g}, which ", info)
        return losses

    @model_validator(mode="after")
    def _something_to_train(self) -> FinetuneSpec:
        if self.train == "thresholds" and self.thresholds != "learned":
            raise ValueError(f"trains thresholds, but these are {self.thresholds}; write thresholds: learned")
        return self

    @property
    def rate(self) -> float:
        """The highest learning rate of the weights."""
        return self.learning_rate or LEARNING_RATES[self.train]

    @property
    def images_per_step(self) -> int:
        """Images that one step of the optimizer sees, of all processes and all accumulated batches."""
        return self.batch_size * self.gradient_accumulation_steps


def _require_learned(what: str, info: ValidationInfo) -> None:
    mode = info.data.get("thresholds", "learned")
    if mode != "learned":
        raise ValueError(f"{what}has no meaning with thresholds: {mode}; leave it out or write thresholds: learned")
