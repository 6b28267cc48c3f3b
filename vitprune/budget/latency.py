"""A latency budget: met by the measured cost table, checked by measurement, and the table corrected by what it missed.

Shapes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from vitprune.budget.latency_table import CostTable
from vitprune.measure.outputs import ImageModel
from vitprune.measure.timing import PlacedBatches, Runner, placed, time_in_turn, whole_batches
from vitprune.models.module import pruning_of
from vitprune.models.trace import eval_mode, trace
from vitprune.reports.results import Latency, MeasuredCosts, Timing

# how near to what was asked, as a part of it, correcting ends
CLOSE = 0.02
ROUNDS = 3
# different batches of real images that a check is measured on, and how often at least
BATCHES = 4
FEWEST = 3


def budget_latency(model: nn.Module, table: CostTable | None) -> None:
    """Count a pruned model's budget in the dense model's time from here on; without a table, in its MACs again.

    `calibrate`, `finetune`, `scale_to_budget` and `trace(...).costs` count by the table. It isn't saved with the model.

    table: of `measure_latency`; the budget itself is `calibrate`'s. Raises TypeError for anything else.
    """
    if not isinstance(table, CostTable | None):
        kind = type(table).__name__
        raise TypeError(
            f"{kind} is no table of costs; pass what vitprune.measure_latency gives, the budget to calibrate"
        )
    pruning_of(model).latency = table


@torch.no_grad()
def check_latency(
    dense: nn.Module, pruned: nn.Module, images: Tensor, asked: float, batch_size: int, repeats: int
) -> Latency:
    """Time both models on the same batches, in turn, and say what the table expects of these very images.

    images: pixel values (B, C, H, W) of real images by chance. repeats: measurements of a batch, in all.
    """
    before, after = ImageModel.of(dense), ImageModel.of(pruned)
    pruning = pruning_of(pruned)
    batches = whole_batches(images, batch_size)[:BATCHES]
    # all in one measurement, so that measured is what predicted is the mean of
    together = [torch.cat(batches)]
    with eval_mode(dense, pruned):
        runners = {
            name: Runner(lambda x, model=model: [model(batch) for batch in x.split(batch_size)], placed_batches)
            for name, model, placed_batches in (
                ("dense", before, PlacedBatches(together, dense)),
                ("pruned", after, PlacedBatches(together, pruned)),
            )
        }
        timings, _ = time_in_turn(runners, max(FEWEST, math.ceil(repeats / len(batches))), warm_up=1)
        predicted = None
        if pruning.latency is not None:
            with trace(pruned) as seen:
                runners["pruned"].call(placed(together[0], pruned))
            predicted = float(seen.costs.sum() / seen.dense_costs.sum())
    table = pruning.latency
    return Latency(
        asked=asked,
        predicted=predicted,
        batch_size=batch_size,
        dense=_of_one(timings["dense"], len(batches)),
        pruned=_of_one(timings["pruned"], len(batches)),
        table=MeasuredCosts(**asdict(table)) if isinstance(table, CostTable) else None,
    )


def meet_latency(
    dense: nn.Module,
    pruned: nn.Module,
    images: Tensor,
    asked: float,
    batch_size: int,
    settle: Callable[[], object],
    *,
    repeats: int,
) -> None:
    """Settles on levels, measures, and corrects the table by what it was wrong until what is asked is measured.

    settle: gives the pruned model the levels at which its table promises what is asked. images: as in `check_latency`.
    """
    table = pruning_of(pruned).latency
    assert isinstance(table, CostTable)
    tried: list[tuple[float, CostTable]] = []
    for _ in range(ROUNDS):
        budget_latency(pruned, table)
        settle()
        found = check_latency(dense, pruned, images, asked, batch_size, repeats)
        tried.append((abs(found.measured / asked - 1), table))
        if tried[-1][0] <= CLOSE:
            return
        assert found.predicted is not None
        table = table.corrected(found.measured / found.predicted)
    nearest = min(tried, key=lambda attempt: attempt[0])
    if nearest is not tried[-1]:
        budget_latency(pruned, nearest[1])
        settle()


def _of_one(timing: Timing, batches: int) -> Timing:
    """Seconds of one batch, of a timing of several."""
    median, fastest, slowest = (x / batches for x in (timing.median, timing.fastest, timing.slowest))
    return Timing(median=median, fastest=fastest, slowest=slowest)
