"""The recipe: what can be asked of vitprune, its defaults, and how it is read.

Knows the meaning of every key and which go together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    model_validator,
)
from pydantic import field_validator as check

from vitprune.recipe.errors import RecipeError as RecipeError
from vitprune.recipe.finetune_spec import Execution as Execution
from vitprune.recipe.finetune_spec import FinetuneSpec as FinetuneSpec
from vitprune.recipe.finetune_spec import LossWeights as LossWeights
from vitprune.recipe.finetune_spec import ThresholdMode as ThresholdMode
from vitprune.recipe.pruning_spec import PruningSpec as PruningSpec
from vitprune.recipe.values import LISTS_TOO, Fraction, Fractions, HubOrLocal, LocalPath, PairsOrFile, Spec, Text
from vitprune.recipe.yaml_source import Source, dump

Task = Literal["single-label", "multi-label", "regression"]
Metric = Literal[
    "accuracy",
    "top-5-accuracy",
    "f1",
    "mean-average-precision",
    "label-accuracy",
    "mean-squared-error",
    "mean-absolute-error",
    "correlation",
]


class ModelSpec(Spec):
    """The dense model to start from."""

    checkpoint: HubOrLocal
    """Hub id or local folder of a ViT, such as facebook/deit-small-patch16-224."""
    revision: Text | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision in calibration and evaluation. Fine-tuning trains float32 weights and converts them at its end."""
    task: Task | None = None
    """What its head is for, where config.json (`problem_type`) doesn't say it rightly: one label an image, several, or
    numbers. Without either one label, or a number where the head has a single output."""
    prompt: Text | None = None
    """Text with {} for a class's name: compares a model of two towers by zero-shot classification."""

    @check("prompt")
    @classmethod
    def _with_a_place(cls, value: str | None) -> str | None:
        if value is not None and "{}" not in value:
            raise ValueError(f"is {value!r}, without {{}} for the class's name; write 'a photo of a {{}}'")
        return value


class SplitSpec(Spec):
    """A part of the dataset."""

    # A recipe may leave the split out: both places that hold one know which they mean.
    model_config = ConfigDict(json_schema_extra={"required": []})

    split: Text
    """Name of the split, such as train, validation or test."""
    limit: PositiveInt | None = None
    """Use that many images, a seeded random sample; all if left out."""


def _split(name: str) -> BeforeValidator:
    return BeforeValidator(lambda value: {"split": name, **value} if isinstance(value, dict) else value)


class DataSpec(Spec):
    """The images."""

    path: HubOrLocal
    """Hub id, image folder, or parquet or arrow files."""
    name: Text | None = None
    """Configuration of a Hub dataset that has several."""
    train: Annotated[SplitSpec, _split("train")] = SplitSpec(split="train")
    """Images to calibrate and fine-tune with."""
    eval: Annotated[SplitSpec, _split("test")] = SplitSpec(split="test")
    """Images to evaluate with."""
    image_column: Text | None = None
    """The column of images; found by its type if left out."""
    label_column: Text | None = None
    """The column of labels; found by its type, or by the name label or labels, if left out."""
    labels: Literal["auto", "ignore"] = "auto"
    """Whether labels are taken, where there are some; ignore: as if there were none."""
    label_names: PairsOrFile | None = None
    """For classes of the data whose names aren't the checkpoint's: {name: the checkpoint's name or id}, or a YAML or
    JSON file with such pairs. Case, underscores and lists of names need no pair."""
    streaming: bool = False
    """Read while running instead of downloading first."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with an image that cannot be read: stop, or count it and go on."""
    workers: NonNegativeInt = 0
    """Processes that load images beside the main one."""


class BudgetSpec(Spec):
    """What the pruned model may cost: macs or latency, not both."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["macs"]}, {"required": ["latency"]}]})

    macs: Fractions | None = None
    """Multiply-accumulates, as a part of the dense model's, averaged over images: 65% or 0.65. With a list, such as
    [80%, 65%, 50%], the checkpoint has several operating points; it comes with the first."""
    latency: Fraction | None = None
    """Time, as a part of the dense model's, measured where the recipe runs: 60% or 0.6."""
    device: Literal["cpu", "cuda", "mps", "xpu"] | None = None
    """With latency: where that is; a run elsewhere is refused. If left out any device will do."""
    batch_size: PositiveInt | None = None
    """With latency: images at a time; 16 if left out."""

    @check("device", "batch_size")
    @classmethod
    def _of_latency(cls, value: object, info: ValidationInfo) -> object:
        if value is not None and info.data.get("latency", value) is None:
            raise ValueError("has a meaning with budget.latency only; leave it out, or write latency: 60% for macs")
        return value

    @check("macs")
    @classmethod
    def _points(cls, value: object) -> object:
        if isinstance(value, tuple) and (not value or len(set(value)) < len(value)):
            trouble = "names the same budget twice" if value else "is an empty list"
            raise ValueError(f"{trouble}; write a budget such as 65%, or several such as [80%, 65%, 50%]")
        if isinstance(value, tuple) and 1.0 in value and len(value) > 1:
            raise ValueError("has 100% among others; leave it out, as vitprune.set_budget(model, 1) drops nothing")
        return value

    @model_validator(mode="after")
    def _one_of_them(self) -> BudgetSpec:
        if self.macs is None and self.latency is None:
            raise ValueError("says nothing; write {macs: 65%} or {latency: 60%}")
        if self.macs is not None and self.latency is not None:
            raise ValueError("has both macs and latency; keep the one that matters (--set budget.macs= takes macs out)")
        return self

    @property
    def part(self) -> float:
        """What is asked for, of the dense model's MACs or time."""
        return self.points[0]

    @property
    def points(self) -> tuple[float, ...]:
        """All budgets that are asked for, the one that the checkpoint comes with first."""
        asked = self.latency if self.macs is None else self.macs
        assert asked is not None
        return tuple(asked) if isinstance(asked, Sequence) else (asked,)

    @property
    def strictest(self) -> float:
        """The lowest of them, at which stages are searched and weights are trained."""
        return min(self.points)

    @property
    def timed_batch(self) -> int:
        return self.batch_size or 16


class CalibrationSpec(Spec):
    """Finding thresholds for the budget without training."""

    images: PositiveInt = 256
    """Training images to look at, a seeded random sample."""
    batch_size: PositiveInt = 32
    """Images at a time."""


class EvaluateSpec(Spec):
    """Comparing pruned with dense."""

    metrics: Annotated[tuple[Metric, ...], LISTS_TOO] | None = None
    """What to report of both. If left out, accuracy; mean-average-precision of a model that gives several labels,
    mean-squared-error of one that gives numbers."""
    batch_size: PositiveInt = 32
    """Images at a time for the metrics."""
    batch_sizes: Annotated[tuple[PositiveInt, ...], LISTS_TOO] = (1, 16, 64)
    """Throughput is measured at these; none if empty."""
    repeats: PositiveInt = 7
    """Measurements of throughput, of which the median counts."""


class OutputSpec(Spec):
    """Where the result goes."""

    path: LocalPath = "runs/pruned"
    """Folder for the checkpoint and its report, seen from where the command runs."""
    overwrite: bool = False
    """Whether a result that is already there may be replaced."""
    pictures: bool = True
    """Whether some of the evaluation images are shown in report.html and the model card."""
    push_to_hub: Text | None = None
    """Repository on the Hub that the checkpoint is uploaded to as well, such as user/name; only locally if left out."""
    private: bool = False
    """Whether that is made private where it isn't there yet."""

    @check("private")
    @classmethod
    def _of_what_is_pushed(cls, private: bool, info: ValidationInfo) -> bool:
        if private and info.data.get("push_to_hub", "") is None:
            raise ValueError("has a meaning with output.push_to_hub only; leave it out, or name a repository")
        return private


def require_thresholds(pruning: PruningSpec, finetune: FinetuneSpec) -> None:
    """Raise ValueError where thresholds are to learn and there are none."""
    if finetune.thresholds == "learned" and pruning.select != "threshold":
        raise ValueError(
            f"thresholds: learned has none to learn, as pruning.select is '{pruning.select}'; leave thresholds out"
        )


class Recipe(Spec):
    """What `vitprune apply` does."""

    version: Literal[1]
    """Format of the recipe; write `version: 1`."""
    model: ModelSpec
    """The dense model to start from, such as {checkpoint: facebook/deit-small-patch16-224}."""
    data: DataSpec
    """The images, such as {path: imagenet-1k}."""
    pruning: PruningSpec = PruningSpec()
    """Where, by what and how tokens are pruned."""
    budget: BudgetSpec
    """What the pruned model may cost, such as {macs: 65%} or {latency: 60%}."""
    calibration: CalibrationSpec = CalibrationSpec()
    """Finding thresholds for the budget without training."""
    finetune: FinetuneSpec | None = None
    """Training at the budget; only calibrated if left out."""
    evaluate: EvaluateSpec = EvaluateSpec()
    """Comparing pruned with dense."""
    output: OutputSpec = OutputSpec()
    """Where the result goes."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Everything random starts from it."""

    @check("finetune")
    @classmethod
    def _thresholds_that_learn(cls, finetune: FinetuneSpec | None, info: ValidationInfo) -> FinetuneSpec | None:
        pruning = info.data.get("pruning")
        if finetune is not None and pruning is not None:
            require_thresholds(pruning, finetune)
        return finetune

    @property
    def reads_training_images(self) -> bool:
        """Whether `apply` needs any: to train on, or to find levels."""
        return self.finetune is not None or self.pruning.is_calibrated or len(self.budget.points) > 1

    def to_yaml(self) -> str:
        """The recipe with all defaults written out; `load_recipe` reads it back to an equal one."""
        return dump(self.model_dump(mode="json", exclude_none=True))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe. Local paths in it become absolute, seen from its own folder or else from where we run.

    `overrides` are `key.path=value` strings. Raises RecipeError with everything that is wrong.
    """
    source = Source.read(Path(path), overrides)
    here, cwd = Path(path).absolute().parent, Path.cwd()
    folders = {
        # What was typed in a shell is meant as seen from there.
        key[1]: (cwd, here) if source.place(key).line is None else (here, cwd)
        for key in (("model", "checkpoint"), ("data", "path"), ("data", "label_names"))
    }
    return source.validate(Recipe, folders)


def as_recipe(recipe: Recipe | str | Path) -> Recipe:
    """A recipe, also by its file's name. Raises as `load_recipe`, and TypeError for neither."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str | Path):
        raise TypeError(f"{type(recipe).__name__} is no recipe; pass a recipe's file, or what load_recipe(...) gives")
    return load_recipe(recipe)


def locate(error: RecipeError, path: str | Path, overrides: Sequence[str] = ()) -> RecipeError:
    """The error with its lines: what shows only beside the model (stage 99 of 12) was still written in the recipe."""
    if all(problem.place for problem in error.problems):
        return error
    try:
        source = Source.read(Path(path), overrides)
    except RecipeError:  # what can be read only once, such as a pipe
        return error
    return RecipeError(
        [problem._replace(place=problem.place or source.place(problem.key)) for problem in error.problems]
    )


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
