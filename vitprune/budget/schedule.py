"""Where stages lie and how they share the work; and the search for the schedule whose answers change least."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vitprune.pruning.costs import CostModel
from vitprune.recipe.pruning_spec import FIRST_DEPTHS, at_depths

Number = TypeVar("Number", int, float)

# parts of the depth; the first are those that a model has until it is calibrated
DEPTHS = (
    FIRST_DEPTHS,
    (1 / 12, 4 / 12, 7 / 12, 10 / 12),
    (1 / 12, 3 / 12, 5 / 12, 7 / 12),
    (1 / 12, 5 / 12, 8 / 12),
    (2 / 12, 5 / 12, 8 / 12),
    (3 / 12, 6 / 12, 9 / 12),
)
MOST_STAGES = 4
# how much more a stage takes in one move of the search
STEP = 1.5
# a stage more has to bring answers so much nearer to the dense model's, and any other move so much
WORTH_A_STAGE, WORTH_A_MOVE = 0.05, 0.02
# schedules that are tried in all
MOST_TRIES = 32
# the strongest pruning that is considered: of a stage with share 1, e^−strength of the patches stay
STRONGEST = 6.0


@dataclass(frozen=True)
class Schedule:
    """Stages before these blocks. shares: how strongly each prunes, beside the others; 1 where all prune alike."""

    before_blocks: tuple[int, ...]
    shares: tuple[float, ...]

    @classmethod
    def even(cls, before_blocks: tuple[int, ...]) -> Schedule:
        return cls(before_blocks, (1.0,) * len(before_blocks))

    def rates(self, strength: float) -> tuple[float, ...]:
        """The part of the patches it finds that each stage takes: 1 − e^(−strength·share)."""
        return tuple(1 - math.exp(-strength * share) for share in self.shares)

    def tokens(self, strength: float, num_blocks: int, patches: int, prefix: int) -> list[float]:
        """Tokens of each block."""
        taken = [
            sum(share for stage, share in zip(self.before_blocks, self.shares, strict=True) if stage <= block)
            for block in range(num_blocks)
        ]
        return [prefix + patches * math.exp(-strength * share) for share in taken]

    def strength(self, cost: CostModel, patches: int, prefix: int, budget: float) -> float:
        """What makes the blocks cost the budget; the strongest where nothing does."""
        low, high = 0.0, STRONGEST
        for _ in range(40):
            strength = (low + high) / 2
            tokens = self.tokens(strength, len(cost.linear), patches, prefix)
            macs = sum(cost.pruned_block(block, n) for block, n in enumerate(tokens)) + cost.outside(patches)
            low, high = (strength, high) if macs > budget * cost.dense(patches, prefix) else (low, strength)
        return low


@dataclass(frozen=True)
class Tried:
    """A schedule at the budget. ratio: its cost by the dense model's; distance: of its answers to the dense model's."""

    schedule: Schedule
    ratio: float
    distance: float


def search(try_: Callable[[Schedule], Tried | None], num_blocks: int) -> list[Tried]:
    """Try schedules, and then changes of the best; all that were tried, the one to take first.

    try_: at the budget; None where the schedule can't meet it.
    """
    tried: dict[Schedule, Tried | None] = {}

    def attempt(schedule: Schedule) -> Tried | None:
        if schedule not in tried and len(tried) < MOST_TRIES:
            tried[schedule] = try_(schedule)
        return tried.get(schedule)

    best: Tried | None = None
    for depths in DEPTHS:
        found = attempt(Schedule.even(at_depths(depths, num_blocks)))
        if found is not None and (best is None or is_better(found, best)):
            best = found
    moved = best is not None
    while best is not None and moved and len(tried) < MOST_TRIES:
        moved = False
        for schedule in moves(best.schedule, num_blocks):
            found = attempt(schedule)
            if found is not None and is_better(found, best):
                best, moved = found, True
                break
    met = [found for found in tried.values() if found is not None]
    return sorted(met, key=lambda found: (found is not best, found.distance))


def is_better(new: Tried, old: Tried) -> bool:
    """Whether answers change less, by so much that it is worth its stages."""
    more = len(new.schedule.before_blocks) - len(old.schedule.before_blocks)
    if more < 0:
        return new.distance <= old.distance * (1 + WORTH_A_STAGE)
    return new.distance < old.distance * (1 - (WORTH_A_STAGE if more else WORTH_A_MOVE))


def moves(schedule: Schedule, num_blocks: int) -> Iterator[Schedule]:
    """Schedules near one: a stage takes more or less, comes earlier or later, is left out, or one comes behind."""
    stages, shares = schedule.before_blocks, schedule.shares
    for stage in range(len(stages)):
        for factor in (STEP, 1 / STEP):
            yield Schedule(stages, _at(shares, stage, shares[stage] * factor))
        for shift in (1, -1):
            moved = _at(stages, stage, stages[stage] + shift)
            if moved[0] >= 1 and max(moved) < num_blocks and sorted(set(moved)) == [*moved]:
                yield Schedule(moved, shares)
    if len(stages) > 1:
        for stage in range(len(stages)):
            yield Schedule(stages[:stage] + stages[stage + 1 :], shares[:stage] + shares[stage + 1 :])
    last = stages[len(stages) - 1]
    behind = min(last + max(1, num_blocks // 4), num_blocks - 1)
    if len(stages) < MOST_STAGES and behind > last:
        yield Schedule((*stages, behind), (*shares, shares[len(shares) - 1]))


def unreachable(budget: float, before_blocks: Sequence[int], nearest: float, unit: str) -> str:
    """What to say of a budget that stages can't meet."""
    return (
        f"{budget:.1%} can't be met by pruning before blocks {list(before_blocks)}: the nearest is {nearest:.1%}; "
        f"allow more {unit} or prune before earlier blocks"
    )


def _at(values: tuple[Number, ...], index: int, value: Number) -> tuple[Number, ...]:
    return (*values[:index], value, *values[index + 1 :])
