"""Finds operating points: levels of one pruned model for several budgets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from vitprune.budget.calibration import calibrate, scale_to_budget
from vitprune.data.batches import Batches, each
from vitprune.data.images import Images
from vitprune.models.module import all_or_nothing, pruning_of
from vitprune.models.points import set_budget
from vitprune.recipe.errors import RecipeError
from vitprune.recipe.pruning_spec import OperatingPoint
from vitprune.recipe.values import read_budget


def find_points(
    model: nn.Module, batches: Batches, budgets: Sequence[float | str], *, progress: bool = True
) -> tuple[OperatingPoint, ...]:
    """Find levels for each budget, in place; the model has those of the first budget afterwards.

    Thresholds, calibrated for the lowest budget where they aren't yet, are scaled by a common factor for each, which
    keeps how the stages share; keep ratios are found anew. batches: as for `calibrate`.

    Raises:
        ValueError: as `calibrate`; or two budgets have the same levels. The model stays as it was then.
    """
    pruning, parts = pruning_of(model), [read_budget(budget) for budget in budgets]
    if 1.0 in parts:
        raise RecipeError.at(
            ("budget", "macs"), "100% needs no levels; leave it out, as vitprune.set_budget(model, 1) drops nothing"
        )
    if not isinstance(batches, Images | Tensor):
        batches = [*each(batches)]
    with all_or_nothing(pruning):
        if not pruning.levels.isfinite().all():
            calibrate(model, batches, min(parts), progress=progress)
        found: list[OperatingPoint] = []
        for part in sorted(parts):  # from the strictest on: that is where thresholds are now
            if pruning.spec.select == "threshold":
                ratio = scale_to_budget(model, batches, part, must_meet=True, progress=progress)
            else:
                ratio = calibrate(model, batches, part, progress=progress).ratio
            levels, temperatures = pruning.levels.tolist(), pruning.temperatures.tolist()
            found.append(
                OperatingPoint(budget=part, ratio=ratio, levels=tuple(levels), temperatures=tuple(temperatures))
            )
        ratios = [point.ratio for point in found]
        if any(second <= first for first, second in pairwise(ratios)):
            named = ", ".join(f"{point.budget:g}" for point in found)
            raise RecipeError.at(
                ("budget", "macs"), f"{named} come to the same work in part; name fewer, further apart"
            )
        pruning.keep_points(tuple(reversed(found)))
        set_budget(model, parts[0])
    return tuple(reversed(found))
