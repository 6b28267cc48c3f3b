"""What every family does on a device that lacks what CPUs have, such as MPS without float64."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import tiny
import torch
from suite import FAMILIES_AND_POLICIES, pruned, with_borderline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vitprune
from vitprune.models.module import pruning_of
from vitprune.recipe.schema import Execution


class NoFloat64(TorchDispatchMode):
    """Refuses every operator that gives float64, as MPS does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype == torch.float64:
                raise TypeError(f"{func} gives float64")
        return result


@pytest.mark.parametrize(("family", "policy"), FAMILIES_AND_POLICIES)
def test_no_float64(family: str, policy: str) -> None:
    """Neither in a forward, watched or not, nor in training; what a trace counts is float64 all the same."""
    model, x = pruned(family, with_borderline(policy)), tiny.inputs(family, 3)
    with NoFloat64(), torch.no_grad(), vitprune.trace(model) as trace:
        tiny.forward(model, x)
    with NoFloat64(), torch.no_grad():
        tiny.forward(model, x)
    assert trace.macs.dtype == torch.float64
    model.train()
    for execution in get_args(Execution):
        pruning_of(model).execution = execution
        with NoFloat64(), vitprune.trace(model):
            tiny.answer(tiny.forward(model, x)).sum().backward()
