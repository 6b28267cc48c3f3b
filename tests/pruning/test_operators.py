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
from vitprune.models.module import pruning_of
from vitprune.recipe.schema import PruningSpec

BLOCKS, STAGES = 12, [1, 4, 7]
# a dense ViT of 12 blocks is 149
DENSE = 149
# with three stages, in loops and in operators; one attention call a block, as where a kernel takes all images
IN_LOOPS, IN_OPERATORS = 178, 345
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


class Waits(TorchDispatchMode):
    """Counts operators whose result the host needs, for which it would wait for a GPU."""

    WAITING = frozenset({torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.WAITING
        return func(*args, **(kwargs or {}))


def test_a_stage_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For how many tokens each image keeps, as every shape depends on it."""
    model = vitprune.prune_(tiny.build("vit"), tiny.POLICIES["redundancy-merge"])
    stages, asked = pruning_of(model).before_blocks, 0
    lists = Tensor.tolist

    def tolist(tensor: Tensor) -> Any:
        nonlocal asked
        asked += 1
        return lists(tensor)

    monkeypatch.setattr(Tensor, "tolist", tolist)
    tiny.in_operators(monkeypatch)  # as on a device
    with torch.no_grad(), Waits() as waits:
        model(tiny.images(5))
    assert waits.count == 0
    # beside all levels, once a forward
    assert asked == len(stages) + 1
