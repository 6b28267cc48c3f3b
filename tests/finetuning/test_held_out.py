"""Held-out images: which state is the best."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from vitprune.finetuning.held_out import GROUP, NEAR, SENSITIVITY, HeldOut, _is_gain
from vitprune.finetuning.thresholds import ThresholdTraining
from vitprune.recipe.schema import ThresholdMode


class Pictures:
    """Three groups, of 2, 2 and 1 images."""

    length: int | None = None

    def loader(self, batch_size: int) -> Any:
        assert batch_size == GROUP
        return [{"pixel_values": torch.zeros(count, 3, 2, 2)} for count in (2, 2, 1)]


class Updates:
    """Stands for an update whose student has such losses."""

    def __init__(self, losses: list[float], ratios: tuple[float, ...] = (0.6, 0.6, 0.6)) -> None:
        self.ratios = ratios
        self.student = nn.Dropout().train()
        self.losses = losses
        self.seen = self.taught = 0
        self.thresholds = ThresholdTraining("calibrated", scales=False, budget=0.6, starts=(0.1,), units=(0.01,))

    def teach(self, batch: Any) -> None:
        self.taught += 1

    def look(self, batch: Any, taught: None) -> dict[str, float]:
        assert not self.student.training
        images, self.seen = len(batch["pixel_values"]), self.seen + 1
        loss = self.losses[(self.seen - 1) // 3]
        # the last image alone has another loss
        ratio = self.ratios[(self.seen - 1) // 3]
        return {"task": loss + (images == 1), "distillation": 0.5, "ratio": ratio, "kept/before_block_4": 0.25}


def test_a_check_is_the_mean_over_the_images_and_the_lowest_loss_is_kept() -> None:
    update: Any = Updates([3.0, 2.0, 2.5])
    images: Any = Pictures()
    held = HeldOut(images, (4,), 0.6)
    assert held.kept_step == 0
    assert [held.look(update, step) for step in (0, 10, 20)] == [True, True, False]
    assert held.count == 5
    assert held.kept_step == 10
    first = held.checks[0]
    assert first.losses == pytest.approx({"task": 3.2, "distillation": 0.5})
    assert first.loss == pytest.approx(3.7)
    assert (first.ratio, first.kept) == (pytest.approx(0.6), pytest.approx((0.25,)))
    assert update.student.training
    assert update.taught == 3  # the teacher is asked once


@pytest.mark.parametrize(("negligible", "kept"), [(0.0, 10), (0.001, 0)])
def test_a_gain_that_shows_in_no_answer_is_none(negligible: float, kept: int) -> None:
    update: Any = Updates([0.0007, 0.0005])
    images: Any = Pictures()
    held = HeldOut(images, (4,), 0.6, negligible)
    assert [held.look(update, step) for step in (0, 10)] == [True, kept > 0]
    assert held.kept_step == kept


class Growing(Updates):
    """Whose ratio falls as the factor grows, and which grows dearer or cheaper as it learns; more costs gain."""

    mode: ThresholdMode = "scaled"

    def __init__(self, drift: list[float], slope: float = -0.3) -> None:
        super().__init__([])
        self.slope = slope
        self.thresholds = ThresholdTraining(self.mode, scales=True, budget=0.6, starts=(0.1,), units=(0.01,))
        self.drift = drift

    def look(self, batch: Any, taught: None) -> dict[str, float]:
        self.seen += 1
        ratio = 0.6 + self.drift[0] + self.slope * self.thresholds.log_factor
        return {"task": 1.0 - ratio, "ratio": ratio, "kept/before_block_4": 0.25}


class Staying(Growing):
    mode: ThresholdMode = "calibrated"


@pytest.mark.parametrize("kind", [Growing, Staying])
def test_states_are_compared_at_one_ratio(kind: type[Growing]) -> None:
    update: Any = kind([0.0])
    images: Any = Pictures()
    held = HeldOut(images, (4,), 0.6)
    assert held.look(update, 0)
    looks = []
    for step, drift in ((10, -0.04), (20, -0.04), (30, -0.042), (40, 0.03)):
        update.drift, before = [drift], update.seen
        held.look(update, step)
        looks.append((update.seen - before) // 3)
        assert update.thresholds.log_factor == 0.0, "training goes on as it was"
    assert [check.ratio for check in held.checks] == pytest.approx([0.6] * 5, abs=NEAR)
    assert looks == [3, 1, 1, 2], "what a look has found out the next one knows"
    assert held.checks[2].ratio == pytest.approx(0.6, abs=NEAR)
    assert held.log_factor == pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize("slope", [-1.2, -0.8, -0.15])
def test_how_much_the_ratio_follows_the_factor_is_found_out(slope: float) -> None:
    update: Any = Growing([0.0], slope)
    images: Any = Pictures()
    held = HeldOut(images, (4,), 0.6)
    held.look(update, 0)
    update.drift = [0.03]
    for step in (10, 20, 30):
        held.look(update, step)
    assert held.sensitivity == pytest.approx(slope)
    assert [check.ratio for check in held.checks] == pytest.approx([0.6] * 4, abs=NEAR)


def test_what_chance_says_of_the_ratio_is_not_believed() -> None:
    update: Any = Growing([0.0], 0.2)
    images: Any = Pictures()
    held = HeldOut(images, (4,), 0.6)
    held.look(update, 0)
    update.drift = [0.03]
    held.look(update, 10)
    assert held.sensitivity == SENSITIVITY


@pytest.mark.parametrize(("length", "group"), [(None, GROUP), (256, GROUP), (128, GROUP), (64, 8), (16, 2), (3, 1)])
def test_few_images_are_in_small_groups(length: int | None, group: int) -> None:
    images: Any = Pictures()
    images.length = length
    assert HeldOut(images, (4,), 0.6)._group == group


def test_what_was_not_finite_before_gains_when_it_is() -> None:
    assert _is_gain([math.inf, 2.0], [1.0, 2.0])


def test_without_an_image_there_is_nothing_to_choose_by() -> None:
    images: Any = type("Nothing", (), {"loader": lambda self, size: [], "length": 0})()
    update: Any = Updates([])
    held = HeldOut(images, (4,), 0.6)
    assert not held.look(update, 0)
    assert held.checks == []


def test_what_costs_more_than_the_budget_is_no_better_for_that() -> None:
    update: Any = Updates([3.0, 1.0, 2.0], ratios=(0.6, 0.7, 0.61))
    images: Any = Pictures()
    held = HeldOut(images, (4,), 0.6)
    assert [held.look(update, step) for step in (0, 10, 20)] == [True, False, True]
    assert [check.counts for check in held.checks] == [True, False, True]
    assert held.kept_step == 20


def test_images_that_need_more_than_the_budget_need_it_before_training_too() -> None:
    update: Any = Updates([3.0, 2.0, 1.0], ratios=(0.65, 0.66, 0.7))
    images: Any = Pictures()
    held = HeldOut(images, (4,), 0.6)
    assert [held.look(update, step) for step in (0, 10, 20)] == [True, True, False]


def test_a_gain_is_more_than_chance() -> None:
    before = [1.0, 2.0, 3.0, 4.0]
    assert _is_gain(before, [0.9, 1.9, 2.9, 3.9])
    assert not _is_gain(before, [1.1, 2.1, 3.1, 4.1])
    assert not _is_gain(before, [0.4, 2.5, 2.4, 4.4])  # lower on average, by two groups of four
    assert _is_gain([1.0], [2.0])  # of a single group nobody can tell
