"""Latency budgets with a made-up clock: what is measured, met, corrected and checked. Time decides no test."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from made_up_clock import Clock
from tiny import Tolerance
from torch.testing import assert_close
from transformers import PreTrainedModel

import vitprune
from vitprune.budget.calibration import calibrate, mean_ratio
from vitprune.budget.latency import budget_latency, check_latency, meet_latency
from vitprune.budget.latency_measurement import measure_latency
from vitprune.budget.latency_table import CostTable
from vitprune.models.module import pruning_of
from vitprune.recipe.schema import PruningSpec
from vitprune.reports.results import Latency, Timing
from vitprune.reports.run_report import shortfall

EXACT = Tolerance(rtol=0.0, atol=0.0)
# what calibration accepts
CLOSE = 0.01
BATCH = 8


def models(**spec: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    dense = tiny.build("vit")
    return dense, vitprune.prune_(copy.deepcopy(dense), PruningSpec(**spec))


def made_up(pruned: PreTrainedModel, *, fixed: float = 0.0) -> CostTable:
    """Time goes with tokens: 2 s a token and block."""
    blocks = len(pruning_of(pruned).cost.linear)
    return CostTable(
        batch_size=BATCH,
        tokens=(1.0, 65.0),
        curves=((2.0, 130.0),),
        kinds=(0,) * blocks,
        stages=(fixed, fixed),
        outside_blocks=0.0,
        dense_tokens=65,
        dense_seconds=130.0 * blocks,
    )


def test_a_budget_is_no_table() -> None:
    _, pruned = models()
    with pytest.raises(TypeError, match=r"float is no table of costs; pass what vitprune\.measure_latency gives"):
        budget_latency(pruned, 0.6)  # type: ignore[arg-type]
    assert pruning_of(pruned).latency is None


@pytest.mark.parametrize("budget", [0.8, 0.65])
@pytest.mark.parametrize("spec", [tiny.AS_VIT, {}], ids=["as-vit", "redundancy"])
def test_calibration_counts_by_the_table_and_macs_go_on(spec: dict[str, Any], budget: float) -> None:
    _, pruned = models(**spec)
    budget_latency(pruned, made_up(pruned, fixed=10.0))
    calibrate(pruned, list(tiny.images(32).split(BATCH)), budget, progress=False)
    with torch.no_grad(), vitprune.trace(pruned) as seen:
        pruned(tiny.images(32))
    stages = pruning_of(pruned).before_blocks
    kept = [torch.ones(32, 64, dtype=torch.bool), *seen.keep_masks]
    counts = [kept[sum(stage <= block for stage in stages)].sum(1).double() for block in range(6)]
    tokens = 6 + torch.stack(counts).sum(0)
    expected = (2.0 * tokens + 10.0 * len(stages)) / (6 * 130.0)
    assert_close(seen.costs / seen.dense_costs, expected, rtol=1e-9, atol=0.0)
    assert abs(expected.mean().item() - budget) <= CLOSE
    assert seen.dense_macs[0].item() == pruning_of(pruned).cost.dense(64, 1)
    assert abs((seen.macs / seen.dense_macs).mean().item() - budget) > CLOSE


def test_without_a_table_costs_are_macs() -> None:
    _, pruned = models(**tiny.AS_VIT, thresholds=[0.008, 0.012])
    budget_latency(pruned, made_up(pruned))
    budget_latency(pruned, None)
    with torch.no_grad(), vitprune.trace(pruned) as seen:
        pruned(tiny.images(4))
    assert_close(seen.costs, seen.macs, **EXACT)
    assert_close(seen.dense_costs, seen.dense_macs, **EXACT)


@pytest.mark.parametrize("execution", ["masked", "packed"])
def test_training_has_the_costs_of_inference_and_their_gradient(execution: Any) -> None:
    _, pruned = models(**tiny.AS_VIT, thresholds=[0.008, 0.012], temperature=1e-3)
    budget_latency(pruned, made_up(pruned, fixed=10.0))
    pruning_of(pruned).execution = execution
    with torch.no_grad(), vitprune.trace(pruned) as inference:
        pruned(tiny.images(8))
    with vitprune.trace(pruned.train()) as training:
        pruned(tiny.images(8))
    assert_close(training.costs.detach(), inference.costs, rtol=1e-6, atol=0.0)
    training.costs.mean().backward()
    gradient = pruning_of(pruned).levels.grad
    assert gradient is not None
    assert gradient[-1] < 0, "a higher threshold takes less time"


def test_a_budget_that_takes_too_long_names_the_nearest() -> None:
    _, pruned = models(**tiny.AS_VIT)
    budget_latency(pruned, made_up(pruned, fixed=300.0))
    with pytest.raises(
        ValueError, match=r"budget.latency: 60.0% can't be met .* the nearest is \d+.\d%; allow more time"
    ):
        calibrate(pruned, [tiny.images(8)], 0.6, progress=False)


def test_what_is_asked_is_what_the_clock_measures(clock: Clock) -> None:
    dense, pruned = models()
    images = tiny.images(32)[torch.randperm(32)]
    budget_latency(pruned, measure_latency(dense, pruned, images, BATCH))
    calibrate(pruned, [images], 0.7, progress=False)
    found = check_latency(dense, pruned, images, 0.7, BATCH, 4)
    assert found.predicted == pytest.approx(0.7, abs=CLOSE)
    assert found.measured == pytest.approx(0.7, rel=0.05)
    assert found.table is not None
    assert found.table.dense_tokens == 65


@pytest.mark.parametrize(("measured", "missed"), [(0.571, False), (0.629, False), (0.5, True), (0.7, True)])
def test_a_budget_that_is_missed_is_said_to_be(measured: float, missed: bool) -> None:
    times = [Timing(median=seconds, fastest=seconds, slowest=seconds) for seconds in (1.0, measured)]
    found = Latency(asked=0.6, predicted=0.6, batch_size=4, dense=times[0], pruned=times[1], table=None)
    said = shortfall(found)
    assert found.met == (measured != 0.7), "it may cost less"
    assert (said is not None) == missed
    how = "isn't used up: only" if found.met else "is missed:"
    assert said is None or said.startswith(f"The latency budget of 60.0% {how} {measured:.1%} was measured")


def test_a_table_that_is_wrong_is_corrected(clock: Clock) -> None:
    dense, pruned = models()
    images = tiny.images(32)[torch.randperm(32)]
    budget_latency(pruned, measure_latency(dense, pruned, images, BATCH))
    clock.slower = 1.2
    rounds = []

    def settle() -> None:
        rounds.append(calibrate(pruned, [images], 0.7, progress=False).ratio)

    meet_latency(dense, pruned, images, 0.7, BATCH, settle, repeats=4)
    assert 2 <= len(rounds) <= 4
    found = check_latency(dense, pruned, images, 0.7, BATCH, 4)
    assert found.measured == pytest.approx(0.7, rel=0.05)
    assert found.table is not None
    assert found.table.factor == pytest.approx(1.2, rel=0.1)
    assert mean_ratio(pruned, [images]) == pytest.approx(0.7, abs=CLOSE)
