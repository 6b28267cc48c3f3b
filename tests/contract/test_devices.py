"""What every family does on a device that lacks what CPUs have, such as MPS without float64."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch
import torchgen
import yaml
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
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # which convolutions take by default
        answers, trace = run(model, {name: values.cuda() for name, values in x.items()})
    for ours, theirs in zip(trace.merged_into, oracle.merged_into, strict=True):
        assert torch.equal(ours.cpu(), theirs)
    assert_close(answers.cpu() / oracle.largest, oracle.answers / oracle.largest, **OF_LARGEST)


COMPOSED = {"CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"}


@cache
def kernels_by_operator() -> dict[str, set[str]]:
    """Dispatch keys that each of torch's own operators has a kernel for, by torch's list of them."""
    packaged = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = {entry["func"].partition("(")[0]: entry for entry in yaml.safe_load(packaged.read_text())}

    def keys_of(entry: dict[str, Any]) -> set[str]:
        if "structured_delegate" in entry:
            return keys_of(entries[entry["structured_delegate"]])
        dispatch = entry.get("dispatch", {"CompositeImplicitAutograd": ""})
        return {key.strip() for keys in dispatch for key in keys.split(",")}

    return {name: keys_of(entry) for name, entry in entries.items()}


class MissingOnMPS(TorchDispatchMode):
    """Notes operators that have no kernel for Apple's GPUs, and aren't made of others."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        name = ".".join(filter(None, [schema.name.removeprefix("aten::"), schema.overload_name]))
        chosen_for_cpu = name.startswith("_scaled_dot_product_flash_attention_for_cpu")  # by torch's own attention
        if not (chosen_for_cpu or kernels_by_operator()[name] & {"MPS", *COMPOSED}):
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def test_what_mps_lacks_is_seen() -> None:
    with MissingOnMPS() as lacking:
        torch.geqrf(torch.eye(2))
    assert lacking.names == {"geqrf"}


@pytest.mark.parametrize(("family", "policy"), ARCHETYPES_AND_POLICIES)
def test_all_operators_are_there_on_mps(family: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.in_operators(monkeypatch)
    model, x = pruned(family, with_borderline(policy)), tiny.inputs(family, 3)
    with MissingOnMPS() as by_dense:
        tiny.answer(tiny.forward(tiny.build(family).train(), x)).sum().backward()
    with MissingOnMPS() as lacking, torch.no_grad():
        tiny.forward(model, x)
    model.train()
    for execution in get_args(Execution):
        pruning_of(model).execution = execution
        with lacking, vitprune.trace(model):
            tiny.answer(tiny.forward(model, x)).sum().backward()
    assert lacking.names <= by_dense.names


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
