"""Training images that are kept back: which state of a training is the best, and whether it gained anything.

Knows how states are compared: by what training minimises, on the same images, at the same ratio of costs. Images as
they are keep another part of their patches than the varied ones of training, whose ratio the common factor follows; so
a factor of their own makes up for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev

from torch import Tensor

from vitprune.data.images import Images
from vitprune.finetuning.losses import LOSSES
from vitprune.finetuning.step import TrainStep
from vitprune.finetuning.student import State
from vitprune.models.trace import eval_mode
from vitprune.reports.results import Check
from vitprune.runtime import distributed

# a state that costs so much more, than the budget or than before training, may be better only for that
ABOVE = 0.02
# images whose mean loss is one number of the comparison, whatever a batch of training is; of few images fewer, for
# so many numbers
GROUP, GROUPS = 16, 8
# what a ratio may differ from the first check's without a second look
NEAR = 0.005
LOOKS = 3
# change of the ratio ÷ change of the log of the factor, until a second look says what it is, between the others
SENSITIVITY, LEAST, MOST = -0.26, -0.1, -2.0


@dataclass
class HeldOut:
    """Looks at the student every so often, and keeps the best state.

    images: every process looks at all of them; what the main one finds counts. negligible: a loss that is lower by no
    more than that gained nothing. checks: so far, the first before any
    step. first: losses of each `GROUP` before any step. best: of the best check, unless that is the first, whose state
    the caller has. log_factor: of the factor that these images need beside that of training.
    sensitivity: of the ratio to it.
    """

    images: Images
    before_blocks: Sequence[int]
    budget: float
    negligible: float = 0.0
    count: int = 0
    checks: list[Check] = field(default_factory=list)
    best: State | None = None
    first: tuple[float, ...] = ()
    log_factor: float = 0.0
    sensitivity: float = SENSITIVITY
    _taught: list[Tensor | None] = field(default_factory=list, init=False)

    def look(self, update: TrainStep, step: int) -> bool:
        """Compare the student as it is, at the first check's ratio; return whether it is the best so far."""
        found = self._see(update)
        if found is None:
            return False
        for _ in range(LOOKS - 1 if self.checks and update.thresholds.scales else 0):
            seen = _ratio(found)
            off = seen - self.checks[0].ratio
            if not abs(off) > NEAR:
                break
            moved = -off / self.sensitivity
            self.log_factor += moved
            found = self._see(update)
            assert found is not None
            slope = (_ratio(found) - seen) / moved
            if slope < 0:  # otherwise it is chance
                self.sensitivity = min(LEAST, max(MOST, slope))
        means, groups = found
        losses = {name: means[name] if math.isfinite(means[name]) else None for name in LOSSES if name in means}
        loss = sum(means[name] for name in losses)
        kept = tuple(means[f"kept/before_block_{block}"] for block in self.before_blocks)
        # these images may need more than those of the calibration, before training as after it
        allowed = max([self.budget, *(check.ratio for check in self.checks[:1])])
        self.first = self.first or groups
        is_finite = math.isfinite(loss)
        counts = is_finite and (
            step == 0 or (means["ratio"] <= allowed + ABOVE and _is_gain(self.first, groups, self.negligible))
        )
        known = loss if is_finite else None
        own = Check(step=step, loss=known, losses=losses, ratio=means["ratio"], kept=kept, counts=counts)
        check = distributed.on_main(lambda: own)
        before = self._best
        self.checks.append(check)
        return self._best is not before

    def _see(self, update: TrainStep) -> tuple[dict[str, float], tuple[float, ...]] | None:
        """Means over the images, and the loss of each group; None without an image."""
        sums: dict[str, float] = {}
        images, groups = 0, list[float]()
        with eval_mode(update.student), update.thresholds.times(self.log_factor):
            for number, batch in enumerate(self.images.loader(self._group)):
                count = len(batch["pixel_values"])
                images += count
                if len(self._taught) == number:
                    self._taught.append(update.teach(batch))
                found = update.look(batch, self._taught[number])
                groups.append(sum(found[name] for name in LOSSES if name in found))
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + count * value
        self.count = images
        return ({name: value / images for name, value in sums.items()}, tuple(groups)) if images else None

    @property
    def kept_step(self) -> int:
        """The step of the best check; 0: nothing was gained."""
        return 0 if self._best is None else self._best.step

    @property
    def _best(self) -> Check | None:
        """The first of the lowest loss."""
        counting = ((check.loss, check) for check in self.checks if check.counts and check.loss is not None)
        return min(counting, key=lambda one: one[0], default=(0.0, None))[1]

    @property
    def _group(self) -> int:
        length = self.images.length
        return GROUP if length is None else max(1, min(GROUP, length // GROUPS))


def _ratio(found: tuple[Mapping[str, float], object]) -> float:
    """As the main process saw it."""
    return distributed.on_main(lambda: found[0]["ratio"])


def _is_gain(before: Sequence[float], after: Sequence[float], negligible: float = 0.0) -> bool:
    """Whether losses of the same groups fell by more than chance would let them: by one standard error of the mean.

    after: finite. negligible: nor is so much a gain.
    """
    if len(before) != len(after) or len(before) < 2 or not all(map(math.isfinite, before)):
        return True
    gains = [one - other for one, other in zip(before, after, strict=True)]
    return mean(gains) > max(negligible, stdev(gains) / math.sqrt(len(gains)))
