"""Levels for a budget without any training: thresholds from the score distribution of a few hundred images.

Knows how levels follow from scores and costs; leaves the images to the caller. Every process of a distributed run that
calibrates on the same images gets the same levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vitprune.anatomy import Inputs, first_image, run_on_images
from vitprune.cost import CostModel
from vitprune.tracing import Pruning, Trace, eval_mode, pruning_of, trace, watching

# how near the calibrated ratio of costs has to come to the budget
TOLERANCE = 0.002
MAX_PASSES = 10
# τ is so wide that this part of a stage's scores lies within τ to one side of the threshold: about what the paper's
# 1e-4 holds at 196 patches
TEMPERATURE_SHARE = 0.005
# how far around a threshold its scores' density is looked at, as a part of the scores
NEIGHBOURHOOD = 0.1


@dataclass(frozen=True)
class Calibration:
    """levels: one a stage. ratio: cost of pruned ÷ dense, averaged over the images. passes: over all images."""

    levels: tuple[float, ...]
    ratio: float
    images: int
    passes: int


def calibrate(model: nn.Module, batches: Sequence[Inputs], budget: float, *, progress: bool = True) -> Calibration:
    """Sets the levels of a pruned model so that it meets a budget, in place.

    batches: pixel values (B, C, H, W) of a random sample of images, a few hundred in all; processed as the model
        expects them. budget: MACs of the pruned pass ÷ MACs of the dense pass, in (0, 1]; seconds where the model has
        a latency table (`latency.budget_latency`).

    Raises:
        ValueError: the model isn't pruned, there are no images, or no levels reach the budget.
    """
    pruning = pruning_of(model)
    _check(batches, budget)
    if pruning.spec.select != "threshold":
        batches = [first_image(batches[0])]  # the counts of one image are those of all
    with tqdm(desc="calibrating", unit="pass", disable=not progress, leave=False) as bar:
        passes = _Passes(model, batches, bar)
        start = uniform_rate(pruning.cost, pruning.before_blocks, passes.patches(), pruning.num_prefix_tokens, budget)

        def ratio_at(rate: float) -> float:
            return _set_rate(pruning, passes, rate)

        if start == 0.0 and (ratio := _keep_everything(pruning, passes)) <= budget:
            return Calibration(tuple(pruning.levels.tolist()), ratio, passes.images, passes.count)
        # of a stage's patches, `rate` leave; the more, the less it costs
        _search(ratio_at, budget, start=start, top=0.95)
        if pruning.spec.select == "threshold":
            # each batch had thresholds of its own; now with the averages
            ratio = _scale(pruning, passes, budget)
        else:
            ratio = passes.run(Trace(pruning, pruning.before_blocks))
    if abs(ratio - budget) > 5 * TOLERANCE:
        key, unit = ("macs", "MACs") if pruning.latency is None else ("latency", "time")
        raise ValueError(
            f"budget.{key}: {budget:.1%} can't be met by pruning before blocks {list(pruning.before_blocks)}: "
            f"the nearest is {ratio:.1%}; allow more {unit} or prune before earlier blocks"
        )
    return Calibration(tuple(pruning.levels.tolist()), ratio, passes.images, passes.count)


def scale_to_budget(model: nn.Module, batches: Sequence[Inputs], budget: float, *, progress: bool = True) -> float:
    """Scales all thresholds by one common factor so that a trained model meets its budget; returns the ratio got."""
    pruning = pruning_of(model)
    _check(batches, budget)
    with tqdm(desc="meeting the budget", unit="pass", disable=not progress, leave=False) as bar:
        return _scale(pruning, _Passes(model, batches, bar), budget)


def _check(batches: Sequence[Inputs], budget: float) -> None:
    if not batches:
        raise ValueError("calibration needs at least one image")
    require_budget(budget)


def require_budget(budget: float) -> None:
    """Raises ValueError for a budget that is no part of the dense model's cost."""
    if not 0 < budget <= 1:
        raise ValueError(f"budget is {budget}, should be a part of the dense MACs above 0 and at most 1, such as 0.65")


@torch.no_grad()
def mean_ratio(model: nn.Module, batches: Sequence[Inputs]) -> float:
    """Cost of the pruned pass ÷ that of the dense pass, averaged over the images."""
    with trace(model) as watched:
        for inputs in batches:
            run_on_images(model, inputs)
    return (watched.costs / watched.dense_costs).mean().item()


@dataclass
class _Passes:
    """Runs the model over all images and counts how often.

    Not in inference mode: BEiT keeps tensors from its first forward, which training couldn't use.
    """

    model: nn.Module
    batches: Sequence[Inputs]
    bar: tqdm
    count: int = 0

    @property
    def images(self) -> int:
        return sum(len(b if isinstance(b, Tensor) else next(iter(b.values()))) for b in self.batches)

    @torch.no_grad()
    def patches(self) -> int:
        """Patches of an image of this size."""
        with trace(self.model) as watched, eval_mode(self.model):
            run_on_images(self.model, first_image(self.batches[0]))
        return watched.keep_masks[0].shape[1]

    @torch.no_grad()
    def run(self, watched: Trace) -> float:
        with watching(watched), eval_mode(self.model):
            for inputs in self.batches:
                run_on_images(self.model, inputs)
        self.count += 1
        ratio = (watched.costs / watched.dense_costs).mean().item()
        self.bar.update()
        self.bar.set_postfix_str(f"{ratio:.1%}")
        return ratio


@dataclass(eq=False)
class _LevelSetter(Trace):
    """At each stage the level at which `rate` of the stage's patches leave, stage after stage within one pass."""

    rate: float = 0.0
    found: dict[int, list[Tensor]] = field(default_factory=dict)
    temperatures: dict[int, list[Tensor]] = field(default_factory=dict)

    def level(self, stage: int, scores_BM: Tensor, valid_BM: Tensor, current: Tensor) -> Tensor:
        rate = torch.tensor(self.rate, device=scores_BM.device)
        scores = scores_BM[scores_BM.isfinite()]
        if self.pruning.spec.select == "threshold":
            if not len(scores):  # anchors only: nothing can leave, whatever the level
                return current
            patches = valid_BM.sum() - len(valid_BM) * self.pruning.num_prefix_tokens
            place = (rate * patches / len(scores)).clamp(0, 1).to(scores.dtype)
            level = scores.quantile(place)
            self.temperatures.setdefault(stage, []).append(_temperature(scores, place))
        else:
            level = 1 - rate
        self.found.setdefault(stage, []).append(level)
        return level

    def apply(self) -> None:
        """Gives the model the average levels, and temperatures that fit the scores unless the spec fixes them."""
        with torch.no_grad():
            for stage, levels in self.found.items():
                self.pruning.levels[stage] = torch.stack(levels).mean()
                if self.pruning.spec.temperature is None and stage in self.temperatures:
                    temperature = torch.stack(self.temperatures[stage]).mean()
                    if temperature > 0:
                        self.pruning.temperatures[stage] = temperature


def _temperature(scores: Tensor, place: Tensor) -> Tensor:
    """Distance from the score at quantile `place` within which `TEMPERATURE_SHARE` of the scores lie, to one side."""
    low, high = (place - NEIGHBOURHOOD).clamp(min=0), (place + NEIGHBOURHOOD).clamp(max=1)
    return TEMPERATURE_SHARE * (scores.quantile(high) - scores.quantile(low)) / (high - low)


def set_rate(model: nn.Module, batches: Sequence[Inputs], rate: float) -> None:
    """Gives a pruned model the levels at which the part `rate` of its patches leaves at each stage, in place."""
    with tqdm(disable=True) as bar:
        _set_rate(pruning_of(model), _Passes(model, batches, bar), rate)


def _set_rate(pruning: Pruning, passes: _Passes, rate: float) -> float:
    setter = _LevelSetter(pruning, pruning.before_blocks, rate=rate)
    ratio = passes.run(setter)
    setter.apply()
    return ratio


def _keep_everything(pruning: Pruning, passes: _Passes) -> float:
    """The highest levels at which nothing leaves that anybody would miss, from where training can go on."""
    _set_rate(pruning, passes, 0.0)  # for the temperatures
    with torch.no_grad():
        pruning.levels.fill_(0.0 if pruning.spec.select == "threshold" else 1.0)
    return passes.run(Trace(pruning, pruning.before_blocks))


def _scale(pruning: Pruning, passes: _Passes, budget: float) -> float:
    thresholds = pruning.levels.detach().clone()
    if pruning.spec.select != "threshold":
        raise ValueError(f"only thresholds can be scaled to a budget, not select: {pruning.spec.select}")

    def ratio_at(factor: float) -> float:
        with torch.no_grad():
            pruning.levels.copy_(thresholds * factor)
        return passes.run(Trace(pruning, pruning.before_blocks))

    return _search(ratio_at, budget, start=1.0, top=1e3)


def _search(ratio_at: Callable[[float], float], budget: float, *, start: float, top: float) -> float:
    """Finds x in [0, top] with ratio_at(x) = budget ± TOLERANCE for a falling function; leaves it at the best x seen.

    False position between the nearest points on either side; the older side's weight is halved (Illinois).
    """
    seen: dict[float, float] = {}

    def probe(x: float) -> float:
        if x not in seen:
            seen[x] = ratio_at(x)
        return seen[x] - budget

    low, error_low = 0.0, 1.0 - budget  # at 0 nothing leaves
    high: float | None = None
    error_high = 0.0
    x = start
    while len(seen) < MAX_PASSES:
        error = probe(x)
        if abs(error) <= TOLERANCE:
            break
        if error > 0:
            low, error_low, error_high = x, error, error_high / 2
        else:
            high, error_high, error_low = x, error, error_low / 2
        if high is None:
            if low >= top:
                break
            # no upper end yet: go where a straight line from (0, 1) would reach the budget, at least 2 % further
            slope = (1.0 - budget - error) / x if x > 0 else 0.0
            x = min(top, max(1e-3, 1.02 * x, x + 1.2 * error / slope if slope > 0 else 2 * x))
        elif high <= low:  # even at 0 too much leaves
            break
        else:
            x = low + (high - low) * error_low / (error_low - error_high)
    best = min(seen, key=lambda x: abs(seen[x] - budget))
    if best != x:
        ratio_at(best)
    return seen[best]


def uniform_tokens(
    before_blocks: tuple[int, ...], num_blocks: int, patches: int, prefix: int, rate: float
) -> list[float]:
    """Tokens of each block if every stage took the part `rate` of the patches it finds."""
    return [
        prefix + patches * (1 - rate) ** sum(stage <= block for stage in before_blocks) for block in range(num_blocks)
    ]


def uniform_rate(cost: CostModel, before_blocks: tuple[int, ...], patches: int, prefix: int, budget: float) -> float:
    """The `rate` of `uniform_tokens` whose blocks cost the budget: where a search for levels starts."""
    low, high = 0.0, 0.95
    for _ in range(30):
        rate = (low + high) / 2
        tokens = uniform_tokens(before_blocks, len(cost.linear), patches, prefix, rate)
        macs = sum(cost.pruned_block(block, n) for block, n in enumerate(tokens)) + cost.outside(patches)
        low, high = (rate, high) if macs > budget * cost.dense(patches, prefix) else (low, rate)
    return low
