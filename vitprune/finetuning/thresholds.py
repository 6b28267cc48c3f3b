"""How thresholds move while weights are trained: in units of the patches that change sides, and with the budget held.

Weights that learn change scores, and with them how many patches a threshold keeps. So one common factor on all
thresholds follows the ratio that is seen, step after step. Where thresholds learn, a parameter of theirs is counted in
parts of a stage's patches, so that the optimizer's step means the same for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitprune.budget.calibration import TEMPERATURE_SHARE
from vitprune.models.module import Pruning
from vitprune.models.trace import Trace, watching
from vitprune.recipe.schema import ThresholdMode

# log of the factor ← log of the factor + GAIN · (ratio − budget) at each step: half of what is too much is gone after
# some five steps, while the ratio of a batch of 32 images, good to 0.01, changes the factor by 0.5 %
GAIN = 0.5
# a budget that no threshold reaches would carry it away
FARTHEST = math.log(1e3)
# of a MAC, for each unit of the log of the factor: where thresholds learn to keep more than the factor lets them, the
# loss counts MACs at so much
PRICE = 5.0


@dataclass
class ThresholdTraining:
    """The thresholds of one training. starts: where they begin; units: in each, what moves all of the stage's patches.

    scales: whether there are any; where counts are fixed the factor stays 1.
    log_factor: of the common factor. It and what learns are only told to the model while it is `watched`.
    """

    mode: ThresholdMode
    scales: bool
    budget: float
    starts: tuple[float, ...]
    units: tuple[float, ...]
    log_factor: float = 0.0

    @classmethod
    def of(cls, pruning: Pruning, mode: ThresholdMode, budget: float) -> ThresholdTraining:
        """Count by temperatures, which calibration makes as wide as a fixed part of a stage's scores."""
        units = (pruning.temperatures / TEMPERATURE_SHARE).tolist()
        scales = pruning.spec.select == "threshold"
        return cls(mode, scales, budget, tuple(pruning.levels.tolist()), tuple(units))

    @property
    def holds(self) -> bool:
        """Whether the factor follows the ratio."""
        return self.scales and self.mode != "calibrated"

    def follow(self, ratio: float) -> None:
        """Take notice of the ratio of costs that a step has seen."""
        if self.holds:
            moved = self.log_factor + GAIN * (ratio - self.budget)
            self.log_factor = max(-FARTHEST, min(FARTHEST, moved))

    @contextmanager
    def times(self, log_factor: float) -> Iterator[None]:
        """Another factor on top, inside."""
        before = self.log_factor
        self.log_factor += log_factor
        try:
            yield
        finally:
            self.log_factor = before

    def price(self, strength: float) -> float:
        """What the loss counts a part of the dense model's cost at, where thresholds learn.

        Without it each of them would learn to keep more, whatever that is worth, and the factor would take it back.
        """
        return strength * PRICE * self.log_factor

    def level(self, stage: int, parameter: Tensor) -> Tensor:
        """The threshold that a stage's parameter means."""
        start = self.starts[stage]
        moved = start + self.units[stage] * (parameter - start) if self.mode == "learned" else parameter
        return moved * math.exp(self.log_factor)

    @contextmanager
    def watched(self, pruning: Pruning) -> Iterator[Trace]:
        """`trace.trace`, with the thresholds as they are in training."""
        with watching(_Trained(pruning, pruning.before_blocks, training=self)) as seen:
            yield seen

    def levels(self, parameters_S: Tensor) -> Tensor:
        """All thresholds, (S,)."""
        return torch.stack([self.level(stage, parameter) for stage, parameter in enumerate(parameters_S)])

    def parameters(self, levels_S: Tensor) -> Tensor:
        """Parameters that mean such thresholds now, (S,): what `levels` makes of them."""
        found_S = levels_S * math.exp(-self.log_factor)
        if self.mode != "learned":
            return found_S
        starts_S, units_S = (found_S.new_tensor(values) for values in (self.starts, self.units))
        return starts_S + (found_S - starts_S) / units_S

    def translate(self, pruning: Pruning) -> list[RemovableHandle]:
        """While training lasts, the model's state has the thresholds that its parameters mean, and takes such.

        Of a model whose state others save and load on the way. Returns handles that end it.
        """

        def saved(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
            key = f"{prefix}thresholds"
            if key in state:
                state[key] = self.levels(state[key].detach())

        def loaded(module: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
            key = f"{prefix}thresholds"
            if key in state:
                state[key] = self.parameters(state[key])

        return [pruning.register_state_dict_post_hook(saved), pruning.register_load_state_dict_pre_hook(loaded)]

    @torch.no_grad()
    def settle(self, pruning: Pruning) -> None:
        """Give the model the thresholds that its parameters mean; training is over."""
        pruning.levels.copy_(self.levels(pruning.levels))


@dataclass(eq=False)
class _Trained(Trace):
    training: ThresholdTraining | None = None

    def level(self, stage: int, scores_BM: Tensor, valid_BM: Tensor, current: Tensor) -> Tensor:
        assert self.training is not None
        return self.training.level(stage, current)
