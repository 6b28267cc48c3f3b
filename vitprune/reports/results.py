"""What is found out about a pruned model, as values: `report.json` is a `Report`.

Knows names, units and the file. `docs/report.md` explains each field.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    computed_field,
)

from vitprune.recipe.schema import Task
from vitprune.runtime.files import write_text_whole

REPORT_JSON = "report.json"
"""A `Report`, in a checkpoint's folder and where `evaluate` writes."""
LATENCY_TOLERANCE = 0.05  # of the latency that was asked for
SURE = 0.05  # of McNemar's test
PAYS = 1.05  # a speed-up worth having: less is lost in the noise


class Result(BaseModel):
    """A value that was found out; never changes."""

    # What follows from other fields is in the file for those who read it with other software, and ignored on loading.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Distribution(Result):
    """How a quantity is spread over images: mean and 5, 25, 50, 75, 95 % quantiles."""

    mean: float
    q05: float
    q25: float
    q50: float
    q75: float
    q95: float


class MetricPair(Result):
    """One metric of both models on the same images. `is_fraction`: whether it goes from 0 to 1, more being better.

    `interval`: where the difference lies at 95 %; `p_value`: how likely so uneven a split of the images that only one
    model gets right is where both are as good (McNemar's exact test). Both of accuracy alone.
    """

    dense: float
    pruned: float
    is_fraction: bool = True
    interval: tuple[float, float] | None = None
    p_value: float | None = None

    @computed_field
    @property
    def difference(self) -> float:
        """Pruned less dense."""
        return self.pruned - self.dense

    @property
    def differs(self) -> bool:
        """Whether so many images tell the models apart at all."""
        return self.p_value is not None and self.p_value < SURE


class Macs(Result):
    """Multiply-accumulates of one image, patch embedding and head included."""

    dense: PositiveFloat
    pruned: Distribution
    ratio: PositiveFloat
    """Pruned by dense, averaged over the images: what a budget bounds."""


class KeptPatches(Result):
    """How many of an image's `patches` are still tokens of their own after the stage before `before_block`."""

    before_block: int
    patches: int
    kept: Distribution


class NotFinite(Result):
    """How many images each model answered with what is no number, such as an overflow in float16."""

    dense: int = 0
    pruned: int = 0


class Comparison(Result):
    """Dense and pruned model on the same `images`; `skipped` broken ones were left out. `answers`: of which kind.

    `agreement`: part of the images with the same top-1 answer, or of labels with the same yes or no; of images with its
    95 % `agreement_interval`. `similarity`: mean
    cosine of the two embeddings of an image, of models without classes. Of numbers: `correlation` of pruned with dense
    over the images, and `deviation`, the root of the mean squared difference. `metrics` is empty for images without
    labels.
    """

    images: int
    skipped: int
    answers: Task | Literal["embedding"] = "single-label"
    metrics: dict[str, MetricPair]
    agreement: float | None
    agreement_interval: tuple[float, float] | None = None
    similarity: float | None = None
    correlation: float | None = None
    deviation: float | None = None
    not_finite: NotFinite = NotFinite()
    macs: Macs
    kept: tuple[KeptPatches, ...]


class Histogram(Result):
    """How many images lie between each two neighbouring `edges`."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


class ClassResult(Result):
    """The images of one class. Accuracies are None where the images have no labels; `ratio`: their MACs by dense."""

    name: str
    images: int
    dense: float | None
    pruned: float | None
    agreement: float
    ratio: float


class Breakdown(Result):
    """What lies behind a comparison.

    macs: each image's MACs by those of the dense model. classes: with one class an image, `by` its label, or where
    there are none by the dense answer. easiest, hardest: rows of the split whose images took the fewest and the most
    MACs. apart: rows where pruned and dense differ most, the furthest first.
    """

    macs: Histogram
    by: Literal["label", "dense answer"] = "label"
    classes: tuple[ClassResult, ...] = ()
    easiest: tuple[int, ...] = ()
    hardest: tuple[int, ...] = ()
    apart: tuple[int, ...] = ()


class TriedSchedule(Result):
    """Stages before these blocks, sharing the work so, at the budget: `ratio` of the dense model's cost.

    `distance`: of its answers to the dense model's, in the search's `measure`.
    """

    before_blocks: tuple[int, ...]
    shares: tuple[float, ...]
    ratio: float
    distance: float


class ScheduleSearch(Result):
    """The schedules that were tried on so many calibration images; the first was taken.

    `measure`: "KL" of the classes, dense to pruned, or "1 - cosine" of the embeddings; "binary KL" of labels, "squared
    error" of numbers.
    """

    images: int
    measure: str
    tried: tuple[TriedSchedule, ...]


class Check(Result):
    """What the held-out training images said of the state after `step` steps, the thresholds held to the budget.

    `loss` is the sum of `losses`, which training minimises, None: not finite; `ratio` of costs; `kept`: part of the
    patches that are left after each stage; `counts`: whether it may be the best, as it costs no more than the budget
    and gained more than chance.
    """

    step: int
    loss: float | None
    losses: dict[str, float | None]
    ratio: float
    kept: tuple[float, ...]
    counts: bool = True


class Training(Result):
    """A fine-tuning: its steps, and the checks on so many held-out `images`, the first before any step.

    `kept_step`: of the state that was kept, that of the lowest loss; 0: nothing was gained, it is the calibrated one.
    """

    steps: int
    images: int
    kept_step: int
    checks: tuple[Check, ...]


class Timing(Result):
    """Seconds for one batch, over the repeats."""

    median: PositiveFloat
    fastest: float
    slowest: float


class PairedTiming(Result):
    """Dense and pruned model, timed in turn on the same batches."""

    dense: Timing
    pruned: Timing

    @computed_field
    @property
    def speedup(self) -> float:
        """Median of dense by median of pruned; below 1 pruned is slower."""
        return self.dense.median / self.pruned.median


class Throughput(PairedTiming):
    """Both models on the same batches, in turn. `ideal_speedup`: dense by pruned MACs of those images."""

    batch_size: PositiveInt
    ideal_speedup: PositiveFloat

    @computed_field
    @property
    def dense_images_per_second(self) -> float:
        return self.batch_size / self.dense.median

    @computed_field
    @property
    def pruned_images_per_second(self) -> float:
        return self.batch_size / self.pruned.median

    @computed_field
    @property
    def efficiency(self) -> float:
        """How much of the ideal speed-up is real."""
        return self.speedup / self.ideal_speedup


class PointResult(Result):
    """One of several budgets: both models on the same images, and on the same batches."""

    budget: float
    comparison: Comparison
    throughput: tuple[Throughput, ...] = ()

    @property
    def ratio(self) -> float:
        """MACs that were got, as a part of the dense model's."""
        return self.comparison.macs.ratio


class MeasuredCosts(Result):
    """A cost table as values; `latency_table.CostTable` says what they are."""

    batch_size: int
    tokens: tuple[float, ...]
    curves: tuple[tuple[float, ...], ...]
    kinds: tuple[int, ...]
    stages: tuple[float, ...]
    outside_blocks: float
    dense_tokens: int
    dense_seconds: float
    factor: float


class Latency(Result):
    """A latency budget and what was measured of it. `predicted`: by the table, for the images that were measured."""

    asked: PositiveFloat
    predicted: float | None
    batch_size: int
    dense: Timing
    pruned: Timing
    table: MeasuredCosts | None

    @computed_field
    @property
    def measured(self) -> float:
        """Median of pruned by median of dense."""
        return self.pruned.median / self.dense.median

    @computed_field
    @property
    def met(self) -> bool:
        """Whether the budget is."""
        return self.measured <= self.asked * (1 + LATENCY_TOLERANCE) + 1e-9


class Environment(Result):
    """What was measured with, and on what.

    numba: its version; None: without, stages on a CPU are slower. runtime: what ran the models, with their precision,
    where it wasn't torch.
    """

    vitprune: str
    torch: str
    transformers: str
    python: str
    cpu: str
    threads: int
    device: str
    dtype: str
    numba: str | None = None
    runtime: str | None = None


class Document(Result):
    """A result that is a file of its own."""

    schema_version: Literal[1] = Field(
        default=1, validation_alias=AliasChoices("schema", "schema_version"), serialization_alias="schema"
    )
    created: datetime | None = None

    def save(self, path: str | Path) -> None:
        """Write JSON: beside `path` first, so that there is never half a file."""
        text = self.model_dump_json(indent=2, by_alias=True) + "\n"
        write_text_whole(Path(path), text)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Raise ValueError for a file that is none of this schema, OSError for one that can't be read."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except ValidationError as error:
            kind = cls.__name__.lower()
            raise ValueError(f"{path} is no {kind} that this version of vitprune reads: {error}") from error


class Report(Document):
    """Everything that a run found out. `calibrated`: the comparison before fine-tuning, `training`: of it, where there
    was one. `breakdown`: of the comparison. `points`: all budgets that the checkpoint has levels for, where it is more
    than one, the highest first; everything else is about the one that it comes with.

    `schedule`: how the stages were found, where the recipe leaves them open.
    `budget`: of MACs; `latency`: of time. One of them is what was asked for.
    """

    environment: Environment
    recipe: dict[str, Any]
    budget: float | None
    comparison: Comparison
    breakdown: Breakdown | None = None
    calibrated: Comparison | None = None
    training: Training | None = None
    schedule: ScheduleSearch | None = None
    throughput: tuple[Throughput, ...] = ()
    points: tuple[PointResult, ...] = ()
    latency: Latency | None = None
    notes: tuple[str, ...] = ()
