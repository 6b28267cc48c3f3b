"""What every family does on a device that lacks what CPUs have, such as MPS without float64."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import tiny
import torch
from suite import (
    ARCHETYPES,
    ARCHETYPES_AND_POLICIES,
    FAMILIES_AND_POLICIES,
    OF_LARGEST,
    pruned,
    run,
    run_by_reference,
    with_borderline,
)
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vitprune
from vitprune.models.module import pruning_of
from vitprune.recipe.schema import Execution


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("policy", ["redundancy-merge", "as-vit", "tome"])
@pytest.mark.parametrize("family", ARCHETYPES)
def test_a_gpu_decides_and_answers_as_the_reference(family: str, policy: str) -> None:
    model, x = pruned(family, policy), tiny.inputs(family, 5)
    oracle = run_by_reference(model, x)
    nn.Module.to(model, "cuda")
    answers, trace = run(model, {name: values.cuda() for name, values in x.items()})
    for ours, theirs in zip(trace.merged_into, oracle.merged_into, strict=True):
        assert torch.equal(ours.cpu(), theirs)
    assert_close(answers.cpu() / oracle.largest, oracle.answers / oracle.largest, **OF_LARGEST)


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


# of what a forward or a backward might call, what torch documents to be without a deterministic kernel on CUDA
# (torch.use_deterministic_algorithms); of whole numbers cumsum has one, and bincount without weights
NOT_DETERMINISTIC = {
    "histc",
    "index_reduce",
    "kthvalue",
    "median",
    "nanmedian",
    "put",
    "put_",
    "scatter_reduce",
    "scatter_reduce_",
    "upsample_bicubic2d_backward",
    "upsample_bilinear2d_backward",
    "upsample_linear1d_backward",
}


class Deterministic(TorchDispatchMode):
    """Notes operators that aren't."""

    def __init__(self) -> None:
        super().__init__()
        self.others: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = func.__name__.partition(".")[0], args[0] if args else None
        of_fractions = isinstance(given, Tensor) and given.is_floating_point()
        if name in NOT_DETERMINISTIC or (name in ("cumsum", "cumprod") and of_fractions):
            self.others.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("family", "policy"), ARCHETYPES_AND_POLICIES)
def test_all_operators_are_deterministic_on_a_gpu(family: str, policy: str) -> None:
    model, x = pruned(family, with_borderline(policy)), tiny.inputs(family, 3)
    with Deterministic() as in_inference, torch.no_grad():
        tiny.forward(model, x)
    assert not in_inference.others
    with Deterministic() as by_dense:
        tiny.answer(tiny.forward(tiny.build(family).train(), x)).sum().backward()
    model.train()
    for execution in get_args(Execution):
        pruning_of(model).execution = execution
        with Deterministic() as in_training, vitprune.trace(model) as trace:
            loss = tiny.answer(tiny.forward(model, x)).sum() + (trace.macs / trace.dense_macs).sum()
            loss.backward()
        assert in_training.others <= by_dense.others
