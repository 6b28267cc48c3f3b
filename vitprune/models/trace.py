"""What forwards of a pruned model did: `Trace`, and the ways to ask for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitprune.models import context
from vitprune.models.module import Pruning, pruning_of
from vitprune.pruning.forward import Forward


@dataclass(eq=False)
class Trace:
    """What forwards of a pruned model did, image after image in the order in which they came.

    keep_masks: for each stage a bool (images, patches) over the original patches: those still tokens of their own.
    macs: (images,) float64, multiply-accumulates executed for each image (in training: what inference would execute);
        carries the gradient to the thresholds in training.
    dense_macs: (images,) float64, the dense model's.
    costs, dense_costs: (images,) float64, what the budget counts: MACs, or seconds where the model has a latency table.
    before_blocks: the stages.
    """

    pruning: Pruning
    before_blocks: tuple[int, ...]
    _keep_masks: list[list[Tensor]] = field(default_factory=list)
    _macs: list[Tensor] = field(default_factory=list)
    _dense_macs: list[Tensor] = field(default_factory=list)
    _costs: list[Tensor] = field(default_factory=list)
    _dense_costs: list[Tensor] = field(default_factory=list)

    @property
    def keep_masks(self) -> list[Tensor]:
        self._require_forwards()
        patches = {masks[-1].shape[1] for masks in self._keep_masks}
        if len(patches) > 1:
            raise ValueError(
                f"the trace saw images of different sizes ({', '.join(map(str, sorted(patches)))} patches), whose "
                "masks are no one tensor; use a trace for each size (macs and costs are there for all)"
            )
        return [torch.cat(masks) for masks in zip(*self._keep_masks, strict=True)]

    @property
    def macs(self) -> Tensor:
        return self._joined(self._macs)

    @property
    def dense_macs(self) -> Tensor:
        return self._joined(self._dense_macs)

    @property
    def costs(self) -> Tensor:
        return self._joined(self._costs)

    @property
    def dense_costs(self) -> Tensor:
        return self._joined(self._dense_costs)

    def _joined(self, parts: list[Tensor]) -> Tensor:
        self._require_forwards()
        return torch.cat(parts)

    def _require_forwards(self) -> None:
        if not self._macs:
            raise ValueError("the trace saw no forward; run the model inside `with vitprune.trace(model)`")

    @property
    def ratio(self) -> float:
        """Cost of the pruned pass ÷ that of the dense pass, averaged over the images."""
        return (self.costs / self.dense_costs).mean().item()

    def level(self, stage: int, scores_BM: Tensor, valid_BM: Tensor, current: Tensor) -> Tensor:
        """Called at each stage; a subclass may answer with a level of its own (calibration does)."""
        return current

    def record(self, forward: Forward) -> None:
        """Take over what a forward that ended well did."""
        counter = forward.counter
        assert counter is not None
        patches_B = counter.dense_tokens_B - self.pruning.num_prefix_tokens
        self._keep_masks.append(forward.keep_masks)
        self._macs.append(counter.macs_B + self.pruning.cost.outside(patches_B))
        self._dense_macs.append(self.pruning.cost.dense(patches_B, self.pruning.num_prefix_tokens))
        latency = forward.policy.latency
        self._costs.append(self._macs[-1] if latency is None else latency.pruned(counter.seconds_B))
        self._dense_costs.append(self._dense_macs[-1] if latency is None else latency.dense(counter.dense_tokens_B))


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
