"""How many operators and kernels a forward launches, and how often the host waits for the device.

On CUDA each costs a few microseconds, and a wait all that the device still has to do. Counted on the CPU, with the CUDA
door's kernels in Triton's interpreter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from suite import ARCHETYPES, pruned
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from vitprune.models.module import pruning_of
from vitprune.pruning.kernels import cuda

A_STAGE, A_BLOCK = 12, 2
PADS = {"siglip2", "siglip2-tower"}
# allocate or relabel memory
FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh")
WAITS = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero", "equal"}
COPIES = {"from_numpy", "tensor", "as_tensor"}


class Count(TorchDispatchMode):
    """Operators that do something on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and name not in FREE:
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))


class Host(TorchFunctionMode):
    """What the host waits for, and what it copies to a device.

    known: what it needn't wait for (`Pruning.known_levels`).
    """

    def __init__(self, known: Tensor | None) -> None:
        super().__init__()
        self.known = known
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in WAITS and args[0] is not self.known:
            self.waits[name] += 1
        if name in COPIES:
            self.copies[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def kernels_counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    counted: Counter[str] = Counter()
    launch = cuda._launch

    def counting(name: str, *values: Any, **constants: Any) -> None:
        counted[name] += 1
        # the interpreter copies tensors to and fro by operators of its own
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            launch(name, *values, **constants)

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "_launch", counting)
        yield counted


def count(
    model: PreTrainedModel, images: int, family: str, monkeypatch: pytest.MonkeyPatch, known: Tensor | None = None
) -> tuple[int, int, str]:
    """Launches of a forward, waits, and all of it in words."""
    x, operators, host = tiny.inputs(family, images), Count(), Host(known)
    with torch.no_grad(), kernels_counted(monkeypatch) as kernels, operators, host:
        tiny.forward(model, x)
    everything = operators.launches + kernels + host.copies
    return everything.total(), host.waits.total(), f"{everything}, {host.waits}"


@pytest.mark.parametrize(
    ("family", "policy", "images"),
    [
        *((family, "redundancy-merge", 2) for family in ARCHETYPES),
        ("vit", "redundancy-merge", 1),
        ("vit", "as-vit-merge", 2),
        # what leaves is gone, so heads read an average in its place
        ("dinov3", "as-vit", 2),
        ("siglip-tower", "as-vit", 1),
    ],
)
def test_a_stage_is_a_handful_of_launches_and_one_wait(
    family: str, policy: str, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_dense, dense_waits, _ = count(tiny.build(family), images, family, monkeypatch)
    model = pruned(family, policy)
    stages, blocks = len(pruning_of(model).before_blocks), len(pruning_of(model).cost.linear)
    tiny.in_triton(monkeypatch)
    launches, waits, words = count(model, images, family, monkeypatch, pruning_of(model).levels)
    assert launches <= of_dense + A_STAGE * stages + A_BLOCK * blocks, (of_dense, launches, words)
    # padding leaves before the first block, and its counts are waited for as a stage's
    assert waits <= dense_waits + stages + (family in PADS), words


@pytest.mark.parametrize("policy", ["top-k-merge", "tome"])
def test_uniform_counts_are_waited_for_nowhere(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned("vit", policy)
    tiny.in_triton(monkeypatch)
    _, waits, words = count(model, 2, "vit", monkeypatch, pruning_of(model).levels)
    assert waits == 0, words
