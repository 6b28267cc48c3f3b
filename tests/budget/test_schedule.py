"""Where stages lie and how they share the work: formulas, and a search among made-up distances. Runs no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from vitprune.budget.schedule import (
    DEPTHS,
    MOST_STAGES,
    MOST_TRIES,
    STEP,
    STRONGEST,
    WORTH_A_MOVE,
    WORTH_A_STAGE,
    Schedule,
    Tried,
    is_better,
    moves,
    search,
)
from vitprune.pruning.costs import CostModel
from vitprune.recipe.pruning_spec import at_depths

PATCHES, PREFIX, BLOCKS = 196, 1, 12
D = 384
COST = CostModel(
    linear=(12 * D * D,) * BLOCKS,
    width=D,
    head_width=64,
    patch=768 * D,
    head=1000 * D,
    read=1,
    projections=3 * D * D,
)
SCHEDULES = [
    Schedule.even((1, 4, 7)),
    Schedule.even((3,)),
    Schedule((2, 5, 11), (1.0, 1.5, 0.25)),
    Schedule((1, 2, 3, 4), (2.25, 1.0, 2 / 3, 1.0)),
]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
every_depth = pytest.mark.parametrize("num_blocks", [6, 12, 24, 32])


# --- formulas ---


def written_out_tokens(schedule: Schedule, strength: float) -> list[float]:
    """Tokens of each block: each stage keeps e^(−strength·share) of the patches it finds."""
    patches, tokens = float(PATCHES), []
    for block in range(BLOCKS):
        if block in schedule.before_blocks:
            patches *= math.exp(-strength * schedule.shares[schedule.before_blocks.index(block)])
        tokens.append(PREFIX + patches)
    return tokens


def written_out_macs(schedule: Schedule, strength: float) -> float:
    tokens = written_out_tokens(schedule, strength)
    blocks = sum(COST.pruned_block(block, count) for block, count in enumerate(tokens))
    return blocks + COST.patch * PATCHES + COST.head


@every_schedule
@pytest.mark.parametrize("strength", [0.0, 0.3, 2.0])
def test_each_stage_takes_a_part_of_what_it_finds(schedule: Schedule, strength: float) -> None:
    assert schedule.tokens(strength, BLOCKS, PATCHES, PREFIX) == pytest.approx(written_out_tokens(schedule, strength))
    found = float(PATCHES)
    for stage, rate in zip(schedule.before_blocks, schedule.rates(strength), strict=True):
        assert 0 <= rate < 1
        found -= rate * found
        assert PREFIX + found == pytest.approx(written_out_tokens(schedule, strength)[stage])


@every_schedule
@pytest.mark.parametrize("budget", [0.5, 0.65, 0.8, 0.9])
def test_blocks_cost_the_budget_at_the_strength_for_it(schedule: Schedule, budget: float) -> None:
    strength = schedule.strength(COST, PATCHES, PREFIX, budget)
    assert written_out_macs(schedule, strength) == pytest.approx(budget * COST.dense(PATCHES, PREFIX), rel=1e-6)


# of the last block a pruned model leaves out what no head reads
@every_schedule
@pytest.mark.parametrize("budget", [0.95, 1.0])
def test_nothing_is_taken_of_a_budget_that_is_met_already(schedule: Schedule, budget: float) -> None:
    assert written_out_macs(schedule, 0.0) < budget * COST.dense(PATCHES, PREFIX)
    assert schedule.strength(COST, PATCHES, PREFIX, budget) == 0.0


@every_schedule
def test_where_nothing_meets_the_budget_the_strongest_is_taken(schedule: Schedule) -> None:
    assert written_out_macs(schedule, STRONGEST) > 0.01 * COST.dense(PATCHES, PREFIX)
    assert schedule.strength(COST, PATCHES, PREFIX, 0.01) == pytest.approx(STRONGEST)


def test_an_even_schedule_prunes_alike_everywhere() -> None:
    assert Schedule.even((1, 4, 7)) == Schedule((1, 4, 7), (1.0, 1.0, 1.0))
    assert len(set(Schedule.even((1, 4, 7)).rates(0.4))) == 1


def test_stages_lie_at_parts_of_the_depth() -> None:
    assert at_depths(DEPTHS[0], 12) == (1, 4, 7)
    assert at_depths(DEPTHS[0], 24) == (2, 8, 14)
    # two that come to the same block are one
    assert at_depths((0.1, 0.15, 0.5), 6) == (1, 3)


# --- the search ---


class MadeUp:
    """ImageModel by a made-up distance; None for schedules that can't meet the budget."""

    def __init__(self, distance: Callable[[Schedule], float | None]) -> None:
        self.distance = distance
        self.asked: list[Schedule] = []

    def __call__(self, schedule: Schedule) -> Tried | None:
        self.asked.append(schedule)
        distance = self.distance(schedule)
        return None if distance is None else Tried(schedule, 0.65, distance)


def far_from(planted: Schedule) -> Callable[[Schedule], float]:
    def distance(schedule: Schedule) -> float:
        if len(schedule.before_blocks) != len(planted.before_blocks):
            return 10.0
        blocks = zip(schedule.before_blocks, planted.before_blocks, strict=True)
        shares = zip(schedule.shares, planted.shares, strict=True)
        return 0.1 + sum(abs(a - b) for a, b in blocks) + sum(abs(math.log(a / b, STEP)) for a, b in shares)

    return distance


@pytest.mark.parametrize(
    "planted",
    [
        Schedule.even((2, 5, 8)),
        Schedule.even((2, 6, 8)),
        Schedule((1, 5, 8), (1.0, STEP, 1.0)),
        Schedule((3, 6, 10), (1.0, 1.0, 1.0)),
        Schedule((1, 3, 5, 8), (1.0, 1.0, 1.0, 1.0)),
    ],
    ids=str,
)
def test_a_planted_optimum_is_found(planted: Schedule) -> None:
    found = search(MadeUp(far_from(planted)), 12)
    assert found[0].schedule.before_blocks == planted.before_blocks
    assert found[0].schedule.shares == pytest.approx(planted.shares)
    assert found[0].distance == pytest.approx(0.1)


def test_first_those_at_parts_of_the_depth_are_tried() -> None:
    made_up = MadeUp(lambda schedule: 1.0)
    search(made_up, 12)
    assert made_up.asked[: len(DEPTHS)] == [Schedule.even(at_depths(depths, 12)) for depths in DEPTHS]


@every_depth
def test_of_equals_the_one_with_the_fewest_stages_is_taken(num_blocks: int) -> None:
    found = search(MadeUp(lambda schedule: 1.0), num_blocks)
    assert len(found[0].schedule.before_blocks) == 1


@every_depth
def test_a_stage_has_to_be_worth_it(num_blocks: int) -> None:
    def distance(worth: float) -> Callable[[Schedule], float]:
        return lambda schedule: (1 - worth) ** len(schedule.before_blocks)

    stages = [len(search(MadeUp(distance(worth)), num_blocks)[0].schedule.before_blocks) for worth in (0.02, 0.2)]
    assert stages == [1, MOST_STAGES]


@every_depth
def test_so_many_schedules_are_tried_and_none_twice(num_blocks: int) -> None:
    # each share that grows brings answers nearer: there is no end to it
    made_up = MadeUp(lambda schedule: 1 / sum(schedule.shares))
    found = search(made_up, num_blocks)
    assert len(made_up.asked) == len(set(made_up.asked)) == MOST_TRIES
    assert len(found) == MOST_TRIES


def test_all_that_were_tried_are_told_the_nearest_first_behind_the_one_to_take() -> None:
    made_up = MadeUp(lambda schedule: 1.0 + 0.01 * len(schedule.before_blocks))
    first, *others = search(made_up, 12)
    assert len(first.schedule.before_blocks) == 1
    assert [tried.distance for tried in others] == sorted(tried.distance for tried in others)
    assert {tried.schedule for tried in (first, *others)} == set(made_up.asked)


@every_depth
def test_what_cannot_meet_the_budget_is_skipped(num_blocks: int) -> None:
    made_up = MadeUp(lambda schedule: 1.0 / schedule.before_blocks[-1] if schedule.before_blocks[0] > 1 else None)
    found = search(made_up, num_blocks)
    assert found
    assert all(tried.schedule.before_blocks[0] > 1 for tried in found)
    assert len(made_up.asked) <= MOST_TRIES


@every_depth
def test_where_nothing_meets_the_budget_nothing_is_found_nor_moved(num_blocks: int) -> None:
    made_up = MadeUp(lambda schedule: None)
    assert search(made_up, num_blocks) == []
    # in few blocks some of the first are the same
    first = list(dict.fromkeys(Schedule.even(at_depths(depths, num_blocks)) for depths in DEPTHS))
    assert made_up.asked == first


# --- what is better ---


def tried(stages: int, distance: float) -> Tried:
    return Tried(Schedule.even(tuple(range(1, stages + 1))), 0.65, distance)


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        (tried(3, 1 - WORTH_A_MOVE - 1e-6), tried(3, 1.0), True),
        (tried(3, 1 - WORTH_A_MOVE + 1e-6), tried(3, 1.0), False),
        (tried(4, 1 - WORTH_A_STAGE - 1e-6), tried(3, 1.0), True),
        (tried(4, 1 - WORTH_A_STAGE + 1e-6), tried(3, 1.0), False),
        (tried(2, 1 + WORTH_A_STAGE - 1e-6), tried(3, 1.0), True),
        (tried(2, 1 + WORTH_A_STAGE + 1e-6), tried(3, 1.0), False),
        (tried(3, 0.0), tried(3, 0.0), False),
    ],
    ids=["a move", "too small a move", "a stage", "too little for a stage", "a stage less", "too far", "the same"],
)
def test_answers_have_to_come_nearer_by_what_it_is_worth(new: Tried, old: Tried, expected: bool) -> None:
    assert is_better(new, old) == expected


# --- moves ---


def first_schedules(num_blocks: int) -> Iterator[Schedule]:
    return (Schedule.even(at_depths(depths, num_blocks)) for depths in DEPTHS)


@pytest.mark.parametrize("num_blocks", [2, 3, 6, 12, 24, 32])
def test_schedules_and_all_near_them_are_of_the_model(num_blocks: int) -> None:
    near = {schedule for first in first_schedules(num_blocks) for schedule in moves(first, num_blocks)}
    near |= {schedule for first in list(near) for schedule in moves(first, num_blocks)}
    for schedule in [*first_schedules(num_blocks), *near]:
        stages = schedule.before_blocks
        assert 1 <= len(stages) <= MOST_STAGES
        assert len(schedule.shares) == len(stages)
        assert stages[0] >= 1
        assert stages[-1] < num_blocks
        assert all(stage < following for stage, following in pairwise(stages))
        assert min(schedule.shares) > 0


@every_depth
def test_a_move_changes_one_thing(num_blocks: int) -> None:
    for first in first_schedules(num_blocks):
        stages, shares = first.before_blocks, first.shares
        for moved in moves(first, num_blocks):
            assert moved != first
            if len(moved.before_blocks) < len(stages):
                left_out = [i for i in range(len(stages)) if stages[i] not in moved.before_blocks]
                assert len(left_out) == 1
            elif len(moved.before_blocks) > len(stages):
                assert moved.before_blocks[:-1] == stages
            else:
                pairs = zip((*moved.before_blocks, *moved.shares), (*stages, *shares), strict=True)
                assert sum(new != old for new, old in pairs) == 1


def test_moves_of_one_schedule() -> None:
    schedule = Schedule((1, 2, 8), (1.0, 1.5, 1.0))
    found = list(moves(schedule, 12))
    assert Schedule((1, 2, 8), (1.5, 1.5, 1.0)) in found
    assert Schedule((1, 2, 8), (1.0, 1.5, 1 / STEP)) in found
    assert Schedule((1, 3, 8), (1.0, 1.5, 1.0)) in found
    assert Schedule((1, 2, 7), (1.0, 1.5, 1.0)) in found
    assert Schedule((1, 8), (1.0, 1.0)) in found
    assert Schedule((1, 2, 8, 11), (1.0, 1.5, 1.0, 1.0)) in found
    # not before the first block, and no two before the same one
    assert {moved.before_blocks for moved in found} == {
        (1, 2, 8), (1, 3, 8), (1, 2, 9), (1, 2, 7), (2, 8), (1, 8), (1, 2), (1, 2, 8, 11)
    }  # fmt: skip
