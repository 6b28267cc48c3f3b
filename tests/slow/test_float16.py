"""Training in float16 under a gradient scaler, which begins at 65,536 and halves where a gradient overflows."""

from __future__ import annotations

from typing import get_args

import pytest
import tiny
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

import vitprune
from vitprune.models.module import pruning_of
from vitprune.recipe.schema import Execution

STEPS, IMAGES = 20, 8
# a mask's gradient is steep as 1/4τ, and τ is 1e-4 in the paper: its gradients are that large, so the scaler has to go
# down to some hundred
STEEP = 10


def skipped(model: PreTrainedModel, family: str) -> int:
    """Steps that the scaler leaves out."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=65_536.0)
    left_out = 0
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            answer = tiny.answer(tiny.forward(model, tiny.inputs(family, IMAGES)))
            loss = F.cross_entropy(answer.float(), torch.arange(IMAGES) % answer.shape[1])
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        left_out += scaler.get_scale() < scale
    return left_out


@pytest.mark.parametrize("execution", get_args(Execution))
@pytest.mark.parametrize("family", ["vit", "dinov2"])
@pytest.mark.parametrize(("policy", "more"), [("redundancy-merge", 1), ("as-vit", STEEP)])
def test_masks_do_not_keep_a_scaler_from_stepping(policy: str, more: int, family: str, execution: Execution) -> None:
    torch.manual_seed(0)
    by_dense = skipped(tiny.build(family), family)
    model = vitprune.prune_(tiny.build(family), tiny.POLICIES[policy])
    pruning_of(model).execution = execution
    assert skipped(model, family) <= by_dense + more
