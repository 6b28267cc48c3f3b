"""What the contract suites share: models of all families under all policies, and how alike answers must be."""

from __future__ import annotations

from typing import NamedTuple

import oracle
import pytest
import tiny
import torch
from tiny import Inputs, Tolerance
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

import vitprune
from vitprune.models import context
from vitprune.models.context import Exporting
from vitprune.models.module import pruning_of
from vitprune.pruning.padded import PaddedForward
from vitprune.recipe.schema import Execution, PruningSpec

EXACT = Tolerance(rtol=0.0, atol=0.0)
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-5)
COUNTED = Tolerance(rtol=1e-9, atol=0.0)
# sums of float32 in another order, on other CPUs too: they round by their largest terms
OF_LARGEST = Tolerance(rtol=0.0, atol=1e-5)

# families that differ in what pruning has to know of them; the others are held together differently
ARCHETYPES = tuple(tiny.ARCHETYPES)
ARCHETYPES_AND_POLICIES = [
    (family, policy)
    for family in ARCHETYPES
    for policy in (tiny.POLICIES if family == ARCHETYPES[0] else tiny.REPRESENTATIVE)
]
_OTHERS = [family for family in tiny.FAMILIES if family not in ARCHETYPES]
FAMILIES_AND_POLICIES = [
    *ARCHETYPES_AND_POLICIES,
    *((family, [*tiny.POLICIES][i % len(tiny.POLICIES)]) for i, family in enumerate(_OTHERS)),
]

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)


def pruned(family: str, policy: str | PruningSpec) -> PreTrainedModel:
    spec = tiny.POLICIES[policy] if isinstance(policy, str) else policy
    return vitprune.prune_(tiny.build(family), tiny.spec_for(family, spec))


def with_borderline(policy: str) -> PruningSpec:
    """Temperatures at which tokens are near their threshold."""
    return tiny.POLICIES[policy].model_copy(update={"temperature": 1e-2})


def run(model: PreTrainedModel, x: Inputs, *, grad: bool = False) -> tuple[Tensor, vitprune.Trace]:
    """ImageModel and what the forward did. grad: with gradients, as in training."""
    with torch.set_grad_enabled(grad), vitprune.trace(model) as trace:
        result = tiny.answer(tiny.forward(model, x))
    return result.detach(), trace


def run_as_graphs_do(model: PreTrainedModel, x: Inputs, patch: pytest.MonkeyPatch) -> tuple[Tensor, list[Tensor]]:
    """The model's answer and `merged_into`, of the forward that graphs are traced from."""
    patch.setattr(torch.compiler, "is_exporting", lambda: True)
    exporting = Exporting(tuple(pruning_of(model).levels.tolist()))
    with torch.no_grad(), context.within(exporting=exporting):
        answers = tiny.answer(tiny.forward(model, x))
    assert isinstance(exporting.forward, PaddedForward)
    return answers, exporting.forward.merged_into


class Reference(NamedTuple):
    """What the reference makes of some images; largest: of all numbers of its answers."""

    answers: Tensor
    merged_into: list[Tensor]
    macs: Tensor
    largest: Tensor


def run_by_reference(model: PreTrainedModel, x: Inputs) -> Reference:
    """By `pruning/reference.py`, an image at a time."""
    with oracle.reference_forwards():
        alone = [run(model, image) for image in tiny.each(x)]
    answers = torch.cat([answer for answer, _ in alone])
    merged = [torch.cat(stage) for stage in zip(*(trace.merged_into for _, trace in alone), strict=True)]
    return Reference(answers, merged, torch.cat([trace.macs for _, trace in alone]), answers.abs().max())


def same_decisions(trace: vitprune.Trace, reference: Reference, images: Tensor | slice = slice(None)) -> None:
    """The same patches stay, those that leave go into the same ones, and the same work is counted."""
    for ours, theirs in zip(trace.merged_into, reference.merged_into, strict=True):
        assert torch.equal(ours, theirs[images])
    assert_close(trace.macs.detach(), reference.macs[images], **COUNTED)


class Gradients(NamedTuple):
    """What a training pass answers, and the gradients of all parameters by name."""

    answers: Tensor
    of: dict[str, Tensor]


def gradients(model: PreTrainedModel, x: Inputs, execution: Execution) -> Gradients:
    """Of a loss with a share for the MACs."""
    pruning_of(model).execution = execution
    model.zero_grad()
    with vitprune.trace(model) as trace:
        answer = tiny.answer(tiny.forward(model.train(), x))
    torch.manual_seed(0)
    loss = (answer * torch.randn_like(answer)).mean() + (trace.macs / trace.dense_macs).mean()
    loss.backward()
    return Gradients(
        answer.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    )
