"""How many operators a pruned forward is: on every device each costs a launch, whatever it does."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

import vitprune
from vitprune.recipe import PruningSpec

BLOCKS, STAGES = 12, [1, 4, 7]
# a dense ViT of 12 blocks is 149
DENSE = 149
# with three stages, in loops and in operators; one attention call a block, as where a kernel takes all images
IN_LOOPS, IN_OPERATORS = 190, 345
MOST = 350


class Counter(TorchDispatchMode):
    """Counts operators, views aside, and attention and what joins its parts by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = self.others = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(func):
            self.attention += 1
        elif not func.is_view:
            self.others += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def count(model: PreTrainedModel, x_BCHW: Tensor) -> Counter:
    with Counter() as counter:
        model(x_BCHW)
    return counter


def deep() -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {**tiny.SHAPE, "num_hidden_layers": BLOCKS}
    return ViTForImageClassification(ViTConfig(**shape, intermediate_size=96)).eval()


def test_a_dense_forward_is_what_others_are_counted_against() -> None:
    counter = count(deep(), tiny.images(16))
    assert counter.attention == BLOCKS
    assert counter.attention + counter.others == DENSE


@pytest.mark.parametrize(("ways", "most"), [("loops", IN_LOOPS), ("operators", IN_OPERATORS)])
def test_a_stage_is_few_operators(ways: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if ways == "operators":
        tiny.in_operators(monkeypatch)
    model, x_BCHW = vitprune.prune_(deep(), PruningSpec(before_blocks=STAGES)), tiny.images(16)
    vitprune.calibrate(model, [x_BCHW], 0.65, progress=False)
    with torch.no_grad(), vitprune.trace(model) as trace:
        model(x_BCHW)
    assert all(len(set(mask.sum(1).tolist())) > 4 for mask in trace.keep_masks), "images of equal lengths are easy"
    counter = count(model, x_BCHW)
    # behind each block whose attention is several calls their parts are joined
    joins = BLOCKS - STAGES[0] - 1
    assert counter.others - joins + BLOCKS <= most
    assert ways == "operators" or counter.others + counter.attention <= MOST
