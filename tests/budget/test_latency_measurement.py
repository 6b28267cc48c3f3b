"""The cost table, measured with a made-up clock. Time decides no test."""

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
from vitprune.budget.latency_measurement import measure_latency
from vitprune.models.module import pruning_of
from vitprune.recipe.schema import PruningSpec

EXACT = Tolerance(rtol=0.0, atol=0.0)
BATCH = 8


def models(**spec: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    dense = tiny.build("vit")
    return dense, vitprune.prune_(copy.deepcopy(dense), PruningSpec(**spec))


@pytest.mark.parametrize("spec", [tiny.AS_VIT, {}], ids=["as-vit", "redundancy"])
def test_the_table_finds_what_the_clock_counts(clock: Clock, spec: dict[str, Any]) -> None:
    dense, pruned = models(**spec)
    table = measure_latency(dense, pruned, tiny.images(BATCH), BATCH)
    assert (table.batch_size, table.dense_tokens) == (BATCH, 65)
    assert table.dense_seconds == pytest.approx((20 + BATCH * 65) * 6 / BATCH)
    assert table.outside_blocks == pytest.approx(0.0)
    for tokens in (20.0, 40.0, 60.0):
        found = table.block(len(table.kinds) - 2, torch.tensor([tokens], dtype=torch.float64)).item()
        # an image takes a multiple of four rows
        assert 20 / BATCH + tokens - 0.5 <= found <= 20 / BATCH + tokens + 4.5
    assert_close(torch.tensor(table.stages), torch.zeros(len(table.stages)), rtol=0.0, atol=1e-6)


def test_measuring_leaves_the_model_as_it_was(clock: Clock) -> None:
    dense, pruned = models(**tiny.AS_VIT, thresholds=[0.008, 0.012])
    before = copy.deepcopy(pruned.state_dict())
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in pruned.modules()]
    measure_latency(dense, pruned.train(), tiny.images(4), 4, repeats=1)
    assert_close(dict(pruned.state_dict()), dict(before), **EXACT)
    assert [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in pruned.modules()] == hooks
    assert pruning_of(pruned).latency is None
    assert pruned.training
