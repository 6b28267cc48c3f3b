"""Thresholds in training: what a parameter means, and how the budget is held."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch.testing import assert_close

import vitprune
from vitprune.finetuning.thresholds import ThresholdTraining
from vitprune.models.module import Pruning, pruning_of
from vitprune.recipe.schema import PruningSpec, ThresholdMode

SPEC = PruningSpec(**tiny.AS_VIT, thresholds=[0.01, 0.02], temperature=1e-4)


def pruning() -> Pruning:
    return pruning_of(vitprune.prune_(tiny.build("vit"), SPEC))


@pytest.mark.parametrize("mode", ["scaled", "learned", "calibrated"])
def test_before_any_step_thresholds_are_what_they_were(mode: ThresholdMode) -> None:
    model = vitprune.prune_(tiny.build("vit"), SPEC)
    training, x = ThresholdTraining.of(pruning_of(model), mode, 0.6), tiny.images(3)
    with vitprune.trace(model.eval()) as expected, torch.no_grad():
        model(x)
    with training.watched(pruning_of(model)) as seen, torch.no_grad():
        model(x)
    assert torch.equal(seen.keep_masks[-1], expected.keep_masks[-1])


@pytest.mark.parametrize("mode", ["scaled", "learned"])
def test_a_models_state_has_its_thresholds_while_they_are_trained(mode: ThresholdMode) -> None:
    pruned = pruning()
    training = ThresholdTraining.of(pruned, mode, 0.6)
    handles = training.translate(pruned)
    training.log_factor = 0.3
    with torch.no_grad():
        pruned.levels.add_(torch.tensor([0.1, -0.05]))
    own, state = pruned.levels.detach().clone(), pruned.state_dict()
    assert_close(state["thresholds"], training.levels(own))
    pruned.load_state_dict(state)
    assert_close(pruned.levels.detach(), own)
    for handle in handles:
        handle.remove()
    assert_close(pruned.state_dict()["thresholds"], own)


def test_a_parameter_that_learns_counts_in_parts_of_the_patches() -> None:
    pruned = pruning()
    training = ThresholdTraining.of(pruned, "learned", 0.6)
    with torch.no_grad():
        pruned.levels.add_(torch.tensor([0.1, -0.05]))
    # half a hundredth of a stage's scores lies within one temperature of the threshold
    unit = 1e-4 / 0.005
    assert_close(training.levels(pruned.levels), torch.tensor([0.01 + 0.1 * unit, 0.02 - 0.05 * unit]))
    training.settle(pruned)
    assert_close(pruned.levels.detach(), torch.tensor([0.01 + 0.1 * unit, 0.02 - 0.05 * unit]))


def test_the_factor_follows_the_ratio_and_is_part_of_the_thresholds_afterwards() -> None:
    pruned = pruning()
    training = ThresholdTraining.of(pruned, "scaled", 0.6)
    training.follow(0.7)  # too much: more has to leave
    assert training.log_factor > 0
    high = training.log_factor
    training.follow(0.6)
    assert training.log_factor == pytest.approx(high)
    training.follow(0.4)
    assert training.log_factor < 0
    before = pruned.levels.detach().clone()
    training.settle(pruned)
    assert_close(pruned.levels.detach(), before * math.exp(training.log_factor))


def test_calibrated_thresholds_stay() -> None:
    pruned = pruning()
    training, before = ThresholdTraining.of(pruned, "calibrated", 0.6), pruned.levels.detach().clone()
    training.follow(0.9)
    training.settle(pruned)
    assert torch.equal(pruned.levels, before)


def test_macs_have_a_price_where_the_factor_takes_back_what_thresholds_learn() -> None:
    training = ThresholdTraining.of(pruning(), "learned", 0.6)
    assert training.price(2.0) == 0.0
    training.follow(0.7)
    assert training.price(2.0) > 0  # to keep more costs more
    assert training.price(4.0) == 2 * training.price(2.0)


def test_fixed_counts_are_left_alone() -> None:
    spec = PruningSpec(**tiny.AS_VIT, select="top-k", keep_ratios=[0.5, 0.5])
    pruned = pruning_of(vitprune.prune_(tiny.build("vit"), spec))
    training = ThresholdTraining.of(pruned, "scaled", 0.6)
    training.follow(0.9)
    assert training.log_factor == 0.0
    training.settle(pruned)
    assert pruned.levels.tolist() == [0.5, 0.5]


def test_a_budget_that_nothing_reaches_does_not_carry_the_factor_away() -> None:
    training = ThresholdTraining.of(pruning(), "scaled", 0.1)
    for _ in range(1000):
        training.follow(0.9)
    assert math.exp(training.log_factor) == pytest.approx(1e3)
