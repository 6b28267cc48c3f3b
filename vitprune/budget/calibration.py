"""Levels for a budget without any training: thresholds from the score distribution of a few hundred images.

Knows how levels follow from scores and costs. Every process of a distributed run that calibrates on the same images
gets the same levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitprune.budget.schedule import STRONGEST, Schedule, Tried, search, unreachable
from vitprune.data.batches import Batches, each
from vitprune.measure.outputs import ImageModel, inputs_of
from vitprune.models.hooks import pruned_part
from vitprune.models.module import Pruning, all_or_nothing, pruning_of
from vitprune.models.structure import Inputs, first_image, run_on_images
from vitprune.models.trace import Trace, eval_mode, trace, watching
from vitprune.recipe.errors import RecipeError
from vitprune.recipe.values import read_budget
from vitprune.runtime.progress import Task, task

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
    """levels: one a stage. ratio: cost of pruned ÷ dense, averaged over the images. passes: over all images.

    tried: where stages were searched, the schedules that were tried, the one that was taken first. measure: what the
        distance of their answers to the dense model's is, `answers.AnswerKind.unit`.
    """

    levels: tuple[float, ...]
    ratio: float
    images: int
    passes: int
    tried: tuple[Tried, ...] = ()
    measure: str = ""


def calibrate(model: nn.Module, batches: Batches, budget: float | str, *, progress: bool = True) -> Calibration:
    """Set the levels of a pruned model so that it meets a budget, in place.

    With `before_blocks: auto` it looks for the stages, too: few of them, at which answers to these images are near to
    the dense model's, by KL divergence of its classes, squared error of its numbers or
    cosine of its embeddings (`answers.AnswerKind.distance`).

    model: pruned; or what it is a part of, or is wrapped in.
    batches: a random sample of images, a few hundred in all, processed as the model expects them: `Images`, a tensor
        (B, C, H, W), or a list, a DataLoader or another iterable of such tensors, of dicts with `pixel_values`, or of
        pairs (images, labels).
    budget: MACs of the pruned pass ÷ MACs of the dense pass, in (0, 1] or such as "65%"; seconds where the model has a
        latency table (`latency.budget_latency`).

    Raises:
        ValueError: the model isn't pruned, there are no images, or no levels reach the budget; it stays as it was then.
    """
    pruning, model = pruning_of(model), pruned_part(model)
    first = pruning.before_blocks
    batches = _listed(batches, model)
    budget = _checked(batches, budget)
    if pruning.spec.select != "threshold" and not pruning.spec.is_searched:
        batches = [first_image(batches[0])]  # the counts of one image are those of all
    with all_or_nothing(pruning), task("calibrating", unit="pass", shown=progress) as bar:
        pruning.keep_points(None)
        passes = _Passes(model, batches, bar)
        patches = passes.patches()
        if pruning.spec.select == "threshold":
            pruning.settle(patches=patches)
        tried, measure = [], ""
        if pruning.spec.is_searched:
            tried, measure = find_schedule(passes, patches, budget)
        schedule = tried[0].schedule if tried else Schedule.even(first)
        pruning.settle(before_blocks=schedule.before_blocks)

        def ratio_at(strength: float) -> float:
            return _set_rates(pruning, passes, schedule.rates(strength))

        def found(ratio: float) -> Calibration:
            levels = tuple(pruning.levels.tolist())
            return Calibration(levels, ratio, passes.images, passes.count, tuple(tried), measure)

        start = schedule.strength(pruning.cost, patches, pruning.num_prefix_tokens, budget)
        if start == 0.0 and (ratio := _keep_everything(pruning, passes)) <= budget:
            return found(ratio)
        # the stronger, the less it costs
        _search(ratio_at, budget, start=start, top=STRONGEST)
        if pruning.spec.select == "threshold":
            # each batch had thresholds of its own; now with the averages
            ratio = _scale(pruning, passes, budget)
        else:
            ratio = passes.run(Trace(pruning, pruning.before_blocks))
        if not _meets(ratio, budget):
            raise _unmet(pruning, ratio, budget)
        return found(ratio)


def find_schedule(passes: _Passes, patches: int, budget: float) -> tuple[list[Tried], str]:
    """The schedules that were tried at a budget, the one to take first, and what their distance is measured in."""
    model, bar = passes.model, passes.bar
    pruning, answers = pruning_of(model), ImageModel.of(model)
    prefix, num_blocks = pruning.num_prefix_tokens, len(pruning.cost.linear)
    bar.rename("looking for a schedule")
    pruning.settle(before_blocks=pruning.before_blocks)
    dense = passes.answers(Trace(pruning, pruning.before_blocks), answers)
    # how far the formula is off, which other schedules will be, too
    error = 0.0

    def try_(schedule: Schedule) -> Tried | None:
        nonlocal error
        pruning.settle(before_blocks=schedule.before_blocks)
        ratio = distance = math.inf
        off = error
        for _ in range(2):
            strength = schedule.strength(pruning.cost, patches, prefix, budget - off)
            setter = _LevelSetter(pruning, schedule.before_blocks, rates=schedule.rates(strength))
            distance = answers.kind.distance(passes.answers(setter, answers), dense).item()
            ratio = setter.ratio
            if abs(ratio - budget) <= 2 * TOLERANCE:
                break
            off += ratio - budget
        if not _meets(ratio, budget) or not math.isfinite(distance):
            return None
        error = off
        return Tried(schedule, ratio, distance)

    tried = search(try_, num_blocks)
    bar.rename("calibrating")
    return tried, answers.kind.unit


def scale_to_budget(
    model: nn.Module, batches: Batches, budget: float | str, *, must_meet: bool = False, progress: bool = True
) -> float:
    """Scale all thresholds by one common factor so that a trained model meets its budget; return the ratio got.

    batches, budget: as for `calibrate`. must_meet: raise ValueError for a budget that no factor gets down to, or up to
    where more could be kept; otherwise it is the nearest that is got.

    Raises ValueError for thresholds that were never found, or were left by `set_budget(model, 1)`.
    """
    pruning, model = pruning_of(model), pruned_part(model)
    batches = _listed(batches, model)
    budget = _checked(batches, budget)
    if pruning.is_forgotten:
        raise ValueError("the model's thresholds were never found, so there are none to scale; call vitprune.calibrate")
    if not pruning.levels.isfinite().all():
        raise ValueError(
            "the model was turned to dropping nothing, at which it has no thresholds to scale; call "
            "vitprune.set_budget(model, ...) with a budget that it was calibrated for before"
        )
    with all_or_nothing(pruning), task("meeting the budget", unit="pass", shown=progress) as bar:
        pruning.keep_points(None)
        passes = _Passes(model, batches, bar)
        ratio = _scale(pruning, passes, budget)
        if must_meet and not _meets(ratio, budget) and (ratio > budget or not _keeps_most(pruning, passes, ratio)):
            raise _unmet(pruning, ratio, budget)
        return ratio


def _meets(ratio: float, budget: float) -> bool:
    """Whether that is as near as levels that are found come."""
    return abs(ratio - budget) <= 5 * TOLERANCE


def _keeps_most(pruning: Pruning, passes: _Passes, ratio: float) -> bool:
    """Whether hardly a patch more could be kept: a last block that computes what the head reads costs less, too."""
    levels = pruning.levels.detach().clone()
    with torch.no_grad():
        pruning.levels.fill_(0.0)
        most = passes.run(Trace(pruning, pruning.before_blocks))
        pruning.levels.copy_(levels)
    return _meets(ratio, most)


def _unmet(pruning: Pruning, ratio: float, budget: float) -> RecipeError:
    key, unit = ("macs", "MACs") if pruning.latency is None else ("latency", "time")
    return RecipeError.at(("budget", key), unreachable(budget, pruning.before_blocks, ratio, unit))


def _listed(batches: Batches, model: PreTrainedModel) -> list[Inputs]:
    """The batches one by one, where the model is, without labels. Raises TypeError for what holds no images."""
    return [inputs_of(batch, model) for batch in each(batches)]


def _checked(batches: Sequence[Inputs], budget: float | str) -> float:
    if not batches:
        raise ValueError("calibration needs at least one image")
    return read_budget(budget)


@torch.no_grad()
def mean_ratio(model: nn.Module, batches: Batches) -> float:
    """Cost of the pruned pass ÷ that of the dense pass, averaged over the images of `batches`, as for `calibrate`."""
    with trace(model) as watched:
        part = pruned_part(model)
        for inputs in _listed(batches, part):
            run_on_images(part, inputs)
    return watched.ratio


@dataclass
class _Passes:
    """Runs the model over all images and counts how often.

    Not in inference mode: BEiT keeps tensors from its first forward, which training couldn't use.
    """

    model: nn.Module
    batches: Sequence[Inputs]
    bar: Task
    count: int = 0

    @property
    def images(self) -> int:
        return sum(len(b if isinstance(b, Tensor) else next(iter(b.values()))) for b in self.batches)

    @torch.no_grad()
    def patches(self) -> int:
        """Patches of an image of this size."""
        with trace(self.model) as watched, eval_mode(self.model):
            run_on_images(self.model, first_image(self.batches[0]))
        return watched.merged_into[0].shape[1]

    def run(self, watched: Trace) -> float:
        """The ratio of costs over all images."""
        self._run(watched, lambda inputs: run_on_images(self.model, inputs))
        return watched.ratio

    def answers(self, watched: Trace, answers: ImageModel) -> Tensor:
        """What the model answers to all images, float32."""
        found: list[Tensor] = []
        self._run(watched, lambda inputs: found.append(answers(inputs).float()))
        return torch.cat(found)

    @torch.no_grad()
    def _run(self, watched: Trace, call: Callable[[Inputs], object]) -> None:
        with watching(watched), eval_mode(self.model):
            for inputs in self.batches:
                call(inputs)
        self.count += 1
        self.bar.advance()
        self.bar.note(f"{watched.ratio:.1%}")


@dataclass(eq=False)
class _LevelSetter(Trace):
    """At each stage the level at which a part of the stage's patches leaves, stage after stage within one pass.

    rates: the part, one a stage. found, temperatures: by stage, of each batch, with how many images it has.
    """

    rates: tuple[float, ...] = ()
    found: dict[int, list[tuple[int, Tensor]]] = field(default_factory=dict)
    temperatures: dict[int, list[tuple[int, Tensor]]] = field(default_factory=dict)

    def level(self, stage: int, scores_BM: Tensor, valid_BM: Tensor, current: Tensor) -> Tensor:
        rate = torch.tensor(self.rates[stage], device=scores_BM.device)
        scores = scores_BM[scores_BM.isfinite()]
        if self.pruning.spec.select == "threshold":
            if not len(scores):  # only what always stays: nothing can leave, whatever the level
                return current
            patches = valid_BM.sum() - len(valid_BM) * self.pruning.num_prefix_tokens
            place = (rate * patches / len(scores)).clamp(0, 1).to(scores.dtype)
            level = scores.quantile(place)
            self.temperatures.setdefault(stage, []).append((len(valid_BM), _temperature(scores, place)))
        else:
            level = 1 - rate
        self.found.setdefault(stage, []).append((len(valid_BM), level))
        return level

    def apply(self) -> None:
        """Give the model the average levels, and temperatures that fit the scores unless the spec fixes them."""
        with torch.no_grad():
            for stage, levels in self.found.items():
                self.pruning.levels[stage] = _mean(levels)
                if self.pruning.spec.temperature is None and stage in self.temperatures:
                    temperature = _mean(self.temperatures[stage])
                    if temperature > 0:
                        self.pruning.temperatures[stage] = temperature


def _mean(of_batches: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Over images: a last batch of few counts for few."""
    images = sum(count for count, _ in of_batches)
    return torch.stack([value * (count / images) for count, value in of_batches]).sum()


def _temperature(scores: Tensor, place: Tensor) -> Tensor:
    """Distance from the score at quantile `place` within which `TEMPERATURE_SHARE` of the scores lie, to one side."""
    low, high = (place - NEIGHBOURHOOD).clamp(min=0), (place + NEIGHBOURHOOD).clamp(max=1)
    return TEMPERATURE_SHARE * (scores.quantile(high) - scores.quantile(low)) / (high - low)


def set_rate(model: nn.Module, batches: Sequence[Inputs], rate: float) -> None:
    """Give a pruned model the levels at which the part `rate` of its patches leaves at each stage, in place."""
    with task("", shown=False) as bar:
        pruning = pruning_of(model)
        _set_rates(pruning, _Passes(model, batches, bar), (rate,) * len(pruning.before_blocks))


def _set_rates(pruning: Pruning, passes: _Passes, rates: tuple[float, ...]) -> float:
    setter = _LevelSetter(pruning, pruning.before_blocks, rates=rates)
    ratio = passes.run(setter)
    setter.apply()
    return ratio


def _keep_everything(pruning: Pruning, passes: _Passes) -> float:
    """Set the highest thresholds that drop nothing: a valid start for training."""
    _set_rates(pruning, passes, (0.0,) * len(pruning.before_blocks))  # for the temperatures
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
    """Find x in [0, top] with ratio_at(x) = budget ± TOLERANCE for a falling function; leave it at the best x seen.

    False position between the nearest points on either side; where the same side moves twice the weight of the other
    is halved (Illinois).
    """
    seen: dict[float, float] = {}

    def probe(x: float) -> float:
        if x not in seen:
            seen[x] = ratio_at(x)
        return seen[x] - budget

    low, error_low = 0.0, 1.0 - budget  # at 0 nothing leaves
    high: float | None = None
    error_high = 0.0
    x, side = start, 0
    while len(seen) < MAX_PASSES:
        error = probe(x)
        if abs(error) <= TOLERANCE:
            break
        before, side = side, 1 if error > 0 else -1
        again = side == before
        if error > 0:
            low, error_low, error_high = x, error, error_high / 2 if again else error_high
        else:
            high, error_high, error_low = x, error, error_low / 2 if again else error_low
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
