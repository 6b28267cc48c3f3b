"""What a recipe says of pruning: where, by what and how."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import PositiveInt, ValidationInfo
from pydantic import field_validator as check

from vitprune.recipe.errors import RecipeError
from vitprune.recipe.values import LISTS_TOO, Blocks, Fraction, KeepRatios, NonNegative, Positive, Spec, Thresholds

ScoreName = Literal["head-weighted-class-attention", "head-weighted-mean-attention", "redundancy"]

METHOD = "vitprune"
"""The name by which transformers knows a pruned checkpoint."""
FORMAT = 2
"""Of its entry in config.json. 1 had another score by the name of `redundancy`."""
ANCHORS = 0.5
"""By ToMe every second patch stays, since it is what the others are compared with."""


FIRST_DEPTHS = (1 / 12, 4 / 12, 7 / 12)
"""Where stages lie until they are searched, as parts of the depth."""


def at_depths(depths: Iterable[float], num_blocks: int) -> tuple[int, ...]:
    """The blocks at such parts of the depth; from 1 on, no block twice."""
    return tuple(sorted({min(max(round(depth * num_blocks), 1), num_blocks - 1) for depth in depths}))


class OperatingPoint(Spec):
    """Levels of every stage for one budget. ratio: MACs of pruned ÷ dense on the images that they were found on."""

    budget: Fraction
    """Part of the dense model's MACs that was asked for."""
    ratio: Positive
    """Part that was got when it was calibrated."""
    levels: Annotated[tuple[float, ...], LISTS_TOO]
    """One per stage: thresholds, or keep ratios."""
    temperatures: Annotated[tuple[float, ...], LISTS_TOO]
    """One per stage."""


class PruningSpec(Spec):
    """Where, by what and how tokens are pruned."""

    before_blocks: Blocks = "auto"
    """Prune before these blocks, counted from 0; before every block from 1 on; or, auto, where calibration finds that
    answers change least."""
    score: ScoreName = "redundancy"
    """What a token is judged by: what the class token sees in it (AS-ViT), or how little it resembles those in which
    the class token sees more (redundancy)."""
    redundancy_exponent: NonNegative = 0.25
    """How much class attention counts: score = redundancy × (patches × class attention)^exponent; 0: not at all."""
    select: Literal["threshold", "top-k", "random", "tome"] = "threshold"
    """By a threshold, so that images keep different numbers of tokens, or one of the baselines with fixed numbers."""
    thresholds: Thresholds = "calibrated"
    """One per stage, for select: threshold. A token stays where its score is above."""
    keep_ratios: KeepRatios = "calibrated"
    """One per stage, for the other selects: the part of its patches that a stage keeps."""
    dropped: Literal["leave", "merge"] = "merge"
    """What becomes of dropped tokens: they are gone, or averaged by size into the most similar kept one."""
    min_tokens: PositiveInt = 1
    """So many patches of an image always stay."""
    temperature: Positive | None = None
    """Softness of the threshold in training; if left out 1e-4, or fitted to the scores where those are calibrated."""
    patches: PositiveInt | None = None
    """How many patches an image had when the thresholds were found; scores are scaled to it at other image sizes."""
    points: Annotated[tuple[OperatingPoint, ...], LISTS_TOO] | None = None
    """Levels for several budgets, which calibration finds (budget.macs with a list); the highest first."""

    @check("before_blocks")
    @classmethod
    def _increasing(cls, stages: tuple[int, ...] | str) -> tuple[int, ...] | str:
        if not stages:
            raise ValueError("names no block; write 'auto', 'every' or a list such as [4, 7, 10]")
        if isinstance(stages, tuple) and any(first >= second for first, second in pairwise(stages)):
            raise ValueError(f"is {list(stages)}, which does not increase; write {sorted(set(stages))}")
        return stages

    @check("redundancy_exponent")
    @classmethod
    def _of_redundancy(cls, value: float, info: ValidationInfo) -> float:
        score = info.data.get("score", "redundancy")
        if score != "redundancy" and value != cls.model_fields["redundancy_exponent"].default:
            raise ValueError(f"has no meaning with score: {score}; leave it out")
        return value

    @check("select", "dropped")
    @classmethod
    def _as_tome(cls, value: str, info: ValidationInfo) -> str:
        if value == "tome" and info.data.get("score", "redundancy") != "redundancy":
            raise ValueError("is 'tome', which needs pruning.score to be 'redundancy'")
        if info.field_name == "dropped" and info.data.get("select") == "tome" and value != "merge":
            raise ValueError(f"is {value!r}, but select: tome needs 'merge'")
        return value

    @check("thresholds", "keep_ratios")
    @classmethod
    def _per_stage(cls, values: tuple[float, ...] | str, info: ValidationInfo) -> tuple[float, ...] | str:
        select = info.data.get("select")
        if isinstance(values, str) or select is None:
            return values
        if (select == "threshold") != (info.field_name == "thresholds"):
            right = "thresholds" if select == "threshold" else "keep_ratios"
            raise ValueError(f"has no meaning with select: {select}; leave it out or use {right}")
        stages = info.data.get("before_blocks")
        if stages == "auto" and select != "tome":
            raise ValueError("has numbers, but before_blocks doesn't say for which stages; name the blocks there")
        if isinstance(stages, tuple) and len(values) != len(stages):
            raise ValueError(
                f"has {len(values)} numbers for the {len(stages)} stages {list(stages)}; give one per stage"
            )
        if info.field_name == "keep_ratios" and select == "tome" and min(values, default=1.0) < ANCHORS:
            raise ValueError(f"has {min(values)}, but by ToMe at most half of them leave at a stage; give 0.5 or more")
        return values

    @check("points")
    @classmethod
    def _points_per_stage(
        cls, points: tuple[OperatingPoint, ...] | None, info: ValidationInfo
    ) -> tuple[OperatingPoint, ...] | None:
        stages = info.data.get("before_blocks")
        for point in points or ():
            for name, values in (("levels", point.levels), ("temperatures", point.temperatures)):
                if isinstance(stages, tuple) and len(values) != len(stages):
                    raise ValueError(
                        f"has {len(values)} {name} at {100 * point.budget:g}% for the {len(stages)} stages "
                        f"{list(stages)}; give one per stage"
                    )
        return points

    @property
    def is_calibrated(self) -> bool:
        """Whether levels are found for a budget."""
        return (self.thresholds if self.select == "threshold" else self.keep_ratios) == "calibrated"

    @property
    def is_searched(self) -> bool:
        """Whether calibration looks for the stages, too. ToMe's are those that were published: every block."""
        return self.before_blocks == "auto" and self.select != "tome"

    def stages(self, num_blocks: int) -> tuple[int, ...]:
        """The blocks of a model of `num_blocks` before which it is pruned, or, where they are searched, until then.

        ValueError where that cannot be.
        """
        if num_blocks < 2:
            text = "has no block to name: the model has a single one, and pruning comes between two"
            raise RecipeError.at(("pruning", "before_blocks"), text)
        if not isinstance(self.before_blocks, str):
            stages = tuple(self.before_blocks)
        else:
            stages = at_depths(FIRST_DEPTHS, num_blocks) if self.is_searched else tuple(range(1, num_blocks))
        for stage in stages:
            if stage >= num_blocks:
                text = f"stage {stage} is outside the model's {num_blocks} blocks (1 to {num_blocks - 1})"
                raise RecipeError.at(("pruning", "before_blocks"), text)
        for name, values in (("thresholds", self.thresholds), ("keep_ratios", self.keep_ratios)):
            if isinstance(values, tuple) and len(values) != len(stages):
                text = f"has {len(values)} numbers for {len(stages)} stages in {num_blocks} blocks; give one per stage"
                raise RecipeError.at(("pruning", name), text)
        return stages
