"""The model that is trained: what its forward gives out."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from suite import FLOAT32
from torch.testing import assert_close

import vitprune
from vitprune.finetuning.student import FinalTokens, Student, taken
from vitprune.finetuning.thresholds import ThresholdTraining
from vitprune.measure.outputs import ImageModel
from vitprune.models.module import pruning_of


@pytest.mark.parametrize("family", ["vit", "dinov2", "siglip-tower"])
def test_final_tokens_are_those_of_the_dense_sequence(family: str) -> None:
    dense = tiny.build(family)
    spec = tiny.spec_for(family, tiny.POLICIES["redundancy-merge"])
    pruned = vitprune.prune_(copy.deepcopy(dense), spec).eval()
    pruning, x = pruning_of(pruned), tiny.images(3)
    student = Student(ImageModel(pruned), ThresholdTraining.of(pruning, "scaled", 0.6), wants_tokens=True)
    with torch.no_grad(), vitprune.trace(pruned) as seen:
        out = student(x)
    with torch.no_grad(), FinalTokens(ImageModel(dense)).taken() as tokens:
        dense(x)
    assert out.final_BND is not None
    assert out.there_BN is not None
    assert out.final_BND.shape == tokens[0].shape
    prefix = pruning.num_prefix_tokens
    assert out.there_BN[:, :prefix].all()
    assert torch.equal(out.there_BN[:, prefix:], seen.keep_masks[-1])
    assert 0 < seen.keep_masks[-1].sum() < seen.keep_masks[-1].numel()


def test_a_model_that_keeps_everything_has_the_teachers_tokens() -> None:
    dense = tiny.build("vit")
    spec = tiny.POLICIES["redundancy-merge"].model_copy(update={"thresholds": (0.0, 0.0, 0.0)})
    pruned = vitprune.prune_(copy.deepcopy(dense), spec).train()
    pruning_of(pruned).execution = "packed"
    student = Student(ImageModel(pruned), ThresholdTraining.of(pruning_of(pruned), "scaled", 1.0), wants_tokens=True)
    x = tiny.images(2)
    out = student(x)
    with torch.no_grad(), taken(FinalTokens(ImageModel(dense))) as tokens:
        dense(x)
    assert_close(out.final_BND.detach(), tokens[0], **FLOAT32)
