"""What the behaviour suites share: models of all families under all policies, and how alike answers must be."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import Inputs, Tolerance
from torch import Tensor
from transformers import PreTrainedModel

import vitprune
from vitprune.recipe import Execution, PruningSpec
from vitprune.tracing import pruning_of

EXACT = Tolerance(rtol=0.0, atol=0.0)
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-5)
COUNTED = Tolerance(rtol=1e-9, atol=0.0)

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)
every_family_and_policy = pytest.mark.parametrize(("family", "policy"), tiny.FAMILIES_AND_POLICIES)


def pruned(family: str, policy: str | PruningSpec) -> PreTrainedModel:
    spec = tiny.POLICIES[policy] if isinstance(policy, str) else policy
    return vitprune.prune_(tiny.build(family), tiny.spec_for(family, spec))


def with_ghosts(policy: str) -> PruningSpec:
    """Temperatures at which tokens are near their threshold."""
    return tiny.POLICIES[policy].model_copy(update={"temperature": 1e-2})


@torch.no_grad()
def run(model: PreTrainedModel, x: Inputs) -> tuple[Tensor, vitprune.Trace]:
    with vitprune.trace(model) as trace:
        result = tiny.answer(tiny.forward(model, x))
    return result, trace


def gradients(model: PreTrainedModel, x: Inputs, execution: Execution) -> tuple[Tensor, dict[str, Tensor]]:
    """What a training pass answers, and all gradients of a loss with a share for the MACs."""
    pruning_of(model).execution = execution
    model.zero_grad()
    with vitprune.trace(model) as trace:
        answer = tiny.answer(tiny.forward(model.train(), x))
    torch.manual_seed(0)
    loss = (answer * torch.randn_like(answer)).mean() + (trace.macs / trace.dense_macs).mean()
    loss.backward()
    return answer.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
