"""What forwards of a pruned model did: `Trace`, and the ways to ask for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from vitprune.models import context
from vitprune.models.module import Pruning, pruning_of
from vitprune.pruning.costs import CostCounter, widened
from vitprune.pruning.selection import Policy


@dataclass(frozen=True)
class _Pass:
    """What one forward cost, worked out when it is asked for: a device without float64 is spared it."""

    policy: Policy
    counter: CostCounter

    @cached_property
    def macs_B(self) -> Tensor:
        return self.counter.macs_B() + self.policy.cost.outside(self._patches_B)

    @cached_property
    def dense_macs_B(self) -> Tensor:
        return self.policy.cost.dense(self._patches_B, self.policy.num_prefix_tokens)

    @property
    def costs_B(self) -> Tensor:
        latency = self.policy.latency
        return self.macs_B if latency is None else latency.pruned(self.counter.seconds_B(latency))

    @property
    def dense_costs_B(self) -> Tensor:
        latency = self.policy.latency
        return self.dense_macs_B if latency is None else latency.dense(widened(self.counter.dense_tokens_B))

    @cached_property
    def _patches_B(self) -> Tensor:
        return widened(self.counter.dense_tokens_B) - self.policy.num_prefix_tokens


class Past(Protocol):
    """What is known of a forward that ended: of a `Forward`, or of a graph that was made of one."""

    @property
    def policy(self) -> Policy: ...
    @property
    def counter(self) -> CostCounter | None: ...
    @property
    def merged_into(self) -> list[Tensor]: ...


@dataclass(eq=False)
class Trace:
    """What forwards of a pruned model did, image after image in the order in which they came.

    keep_masks: for each stage a bool (images, patches) over the original patches: those still tokens of their own.
    merged_into: for each stage an int64 (images, patches): the patch whose token stands for each, itself where it is
        one of its own still; −1 where none does, as of patches that are left (`dropped: leave`) and of padding.
    macs: (images,) float64, multiply-accumulates executed for each image (in training: what inference would execute);
        carries the gradient to the thresholds in training.
    dense_macs: (images,) float64, the dense model's.
    costs, dense_costs: (images,) float64, what the budget counts: MACs, or seconds where the model has a latency table.
    before_blocks: the stages.
    """

    pruning: Pruning
    before_blocks: tuple[int, ...]
    _merged_into: list[list[Tensor]] = field(default_factory=list)
    _passes: list[_Pass] = field(default_factory=list)

    @property
    def keep_masks(self) -> list[Tensor]:
        return [owners == torch.arange(owners.shape[1], device=owners.device) for owners in self.merged_into]

    @property
    def merged_into(self) -> list[Tensor]:
        self._require_forwards()
        if not all(self._merged_into):
            raise ValueError("the model's graph doesn't say what became of which patch; export it with tells_patches")
        patches = {stages[-1].shape[1] for stages in self._merged_into}
        if len(patches) > 1:
            raise ValueError(
                f"the trace saw images of different sizes ({', '.join(map(str, sorted(patches)))} patches), whose "
                "masks are no one tensor; use a trace for each size (macs and costs are there for all)"
            )
        return [torch.cat(stages) for stages in zip(*self._merged_into, strict=True)]

    @property
    def num_patches(self) -> int:
        """Patches of the largest dense image."""
        return int(self._joined(lambda one: one.counter.dense_tokens_B - one.policy.num_prefix_tokens).max())

    @property
    def kept_patches(self) -> Tensor:
        """(images, stages): patches that each image has left behind each stage."""
        return self._joined(lambda one: one.counter.kept_BS - one.policy.num_prefix_tokens)

    @property
    def macs(self) -> Tensor:
        return self._joined(lambda one: one.macs_B)

    @property
    def dense_macs(self) -> Tensor:
        return self._joined(lambda one: one.dense_macs_B)

    @property
    def costs(self) -> Tensor:
        return self._joined(lambda one: one.costs_B)

    @property
    def dense_costs(self) -> Tensor:
        return self._joined(lambda one: one.dense_costs_B)

    def _joined(self, of: Callable[[_Pass], Tensor]) -> Tensor:
        self._require_forwards()
        return torch.cat([of(one) for one in self._passes])

    def _require_forwards(self) -> None:
        if not self._passes:
            raise ValueError("the trace saw no forward; run the model inside `with vitprune.trace(model)`")

    @property
    def ratio(self) -> float:
        """Cost of the pruned pass ÷ that of the dense pass, averaged over the images."""
        return (self.costs / self.dense_costs).mean().item()

    def level(self, stage: int, scores_BM: Tensor, valid_BM: Tensor, current: Tensor) -> Tensor:
        """Called at each stage; a subclass may answer with a level of its own (calibration does)."""
        return current

    def record(self, forward: Past) -> None:
        """Take over what a forward that ended well did."""
        assert forward.counter is not None
        self._merged_into.append(forward.merged_into)
        self._passes.append(_Pass(forward.policy, forward.counter))


@contextmanager
def trace(model: nn.Module) -> Iterator[Trace]:
    """Record what the model's forwards inside the `with` do. Belongs to the thread that enters it."""
    pruning = pruning_of(model)
    with watching(Trace(pruning, pruning.before_blocks)) as watched:
        yield watched


@contextmanager
def watching(watched: Trace) -> Iterator[Trace]:
    """As `trace`, with a trace of one's own making."""
    with context.within(traces=(*context.current().traces, watched)):
        yield watched


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards each part has its own mode again, also when a forward fails."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
