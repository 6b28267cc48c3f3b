"""Operating points: one set of weights, levels for several budgets, and what lies between by interpolation."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from torch import nn

from vitprune.models.module import Pruning, pruning_of
from vitprune.recipe.pruning_spec import OperatingPoint
from vitprune.recipe.values import read_budget


def points_of(model: nn.Module) -> tuple[OperatingPoint, ...]:
    """Give the budgets that a pruned model has levels for, the highest first; none where it was calibrated for one."""
    return pruning_of(model).spec.points or ()


@torch.no_grad()
def set_budget(model: nn.Module, budget: float | str) -> float:
    """Turn a pruned model to another budget, in place; return the part of the dense MACs that is to be expected.

    At a budget that it was calibrated for the levels are those found then; between two they are interpolated
    (monotonically, over what was got), and the expected part is the budget itself. At 1 no patch is dropped. No data
    is needed, and the weights stay.

    budget: a part of the dense model's MACs on average, such as 0.5 or "50%".

    Raises:
        ValueError: the model isn't pruned, has no operating points, or none so low or so high.
    """
    budget, pruning = read_budget(budget), pruning_of(model)
    points = pruning.spec.points or ()
    if not points:
        raise ValueError(
            "the model has levels for one budget alone; find them for several: budget: {macs: [80%, 65%, 50%]} in a "
            "recipe, or vitprune.find_points(model, batches, ['80%', '65%', '50%'])"
        )
    if budget == 1:  # which is no point: every such model has it
        pruning.levels.fill_(pruning.keeps_all)
        return _kept_whole(pruning)
    for point in points:
        if point.budget == budget:
            _give(pruning, np.array(point.levels), np.array(point.temperatures))
            return point.ratio
    low, high = points[-1].budget, points[0].budget
    if not low < budget < high:
        raise ValueError(
            f"budget is {budget:g}, outside of what the model was calibrated for, {low:g} to {high:g}; name one "
            "between, 1 for the dense model, or calibrate for it"
        )
    _give(pruning, *(_between(points, budget, name) for name in ("levels", "temperatures")))
    return budget


def _kept_whole(pruning: Pruning) -> float:
    """What a pruned model takes that drops nothing, as its last block may compute no more than the head reads."""
    cost, prefix, patches = pruning.cost, pruning.num_prefix_tokens, pruning.spec.patches
    if patches is None:  # keep ratios were found at no certain size
        return 1.0
    blocks = sum(cost.pruned_block(block, float(patches + prefix)) for block in range(len(cost.linear)))
    return (blocks + cost.outside(patches)) / cost.dense(patches, prefix)


def _between(points: tuple[OperatingPoint, ...], budget: float, name: str) -> NDArray[np.float64]:
    """Levels or temperatures of each stage, (stages,), over the parts that were got; logarithms of positive ones."""
    rising = sorted(points, key=lambda point: point.ratio)
    ratios = np.array([point.ratio for point in rising])
    values = np.array([getattr(point, name) for point in rising])
    positive = (values > 0).all(0)
    values = np.where(positive, np.log(np.where(values > 0, values, 1.0)), values)
    found = PchipInterpolator(ratios, values)(np.clip(budget, ratios[0], ratios[-1]))
    return np.where(positive, np.exp(found), found)


def _give(pruning: Pruning, levels: NDArray[np.float64], temperatures: NDArray[np.float64]) -> None:
    pruning.levels.copy_(torch.from_numpy(levels))
    pruning.temperatures.copy_(torch.from_numpy(temperatures))
