"""Pruned against dense on the same images: how good the answers are, and how much work they take.

Tensor suffixes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.data.batches import Batches, each, named
from vitprune.data.images import Images
from vitprune.measure.answers import AnswerKind
from vitprune.measure.breakdown import Observed, break_down
from vitprune.measure.metrics import QualityMetric, correlation, metrics_of
from vitprune.measure.outputs import ImageModel, inputs_of, names_of_answers, require_same_kind, require_same_width
from vitprune.measure.statistics import paired_difference, part_interval
from vitprune.models.module import pruning_of
from vitprune.models.trace import eval_mode, trace
from vitprune.recipe.errors import RecipeError
from vitprune.recipe.schema import EvaluateSpec
from vitprune.recipe.values import as_spec
from vitprune.reports.results import (
    Breakdown,
    Comparison,
    Distribution,
    KeptPatches,
    Macs,
    MetricPair,
    NotFinite,
)
from vitprune.runtime import distributed
from vitprune.runtime.progress import track

_DEFAULTS = EvaluateSpec()
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def compare(
    dense: nn.Module,
    pruned: nn.Module,
    images: Batches,
    spec: EvaluateSpec | Mapping[str, Any] = _DEFAULTS,
    *,
    progress: bool = True,
) -> Comparison:
    """Compare both models on the same images: metrics (where there are labels), agreement, MACs, kept patches.

    images: `Images`, or any batches, whose labels are the model's class ids (B,), or (B, outputs) where it gives
    several labels or numbers, and whose other entries are what the model takes. Under a launcher each process takes its
    share of `Images`, of batches all; all get the result. How answers are compared follows from their kind
    (`answers.AnswerKind`). The models stay on their device, in their dtype and in the mode they are in.

    Raises ValueError where there is no image, `pruned` isn't pruned, or isn't made of `dense`, as their answers tell,
    or where a metric doesn't fit the model.
    """
    return compare_closely(dense, pruned, images, spec, progress=progress)[0]


def compare_closely(
    dense: nn.Module,
    pruned: nn.Module,
    images: Batches,
    spec: EvaluateSpec | Mapping[str, Any] = _DEFAULTS,
    *,
    progress: bool = True,
) -> tuple[Comparison, Breakdown]:
    """As `compare`, and what lies behind it: by class, and which images, of `Images` that aren't streamed."""
    dense_answers, pruned_answers = ImageModel.of(dense), ImageModel.of(pruned)
    require_same_kind(pruned_answers, dense_answers)
    kind = dense_answers.kind
    spec = as_spec(EvaluateSpec, spec)
    metrics = metrics_of(kind, spec.metrics)
    state = distributed.init()
    own, total = images, None
    if isinstance(images, Images):
        own = images.share(state.process_index, state.num_processes)
        total = None if own.length is None else math.ceil(own.length / spec.batch_size)
    batches = each(own, spec.batch_size)
    seen: list[Observed] = []
    with eval_mode(dense, pruned), torch.no_grad():
        for batch in track(batches, "comparing", total=total, unit="batch", shown=progress):
            before = dense_answers(inputs_of(batch, dense))
            with trace(pruned) as watched:
                after = pruned_answers(inputs_of(batch, pruned))
            require_same_width(after, before)
            seen.append(Observed.of(kind, before, after, watched, named(batch).get("labels")))
    found = (seen, own.skipped, own.whole) if isinstance(own, Images) else (seen, 0, None)
    everybodys = distributed.all_gather(found) if isinstance(own, Images) else [found]
    parts = [one for theirs, _, _ in everybodys for one in theirs]
    if not parts:
        raise RecipeError.at(("data", "eval"), "there is no image to compare the models on")
    skipped = sum(count for _, count, _ in everybodys)
    rows = None if found[2] is None else [row for _, _, theirs in everybodys for row in theirs or ()]
    names = names_of_answers(dense_answers.model, images.class_names if isinstance(images, Images) else None)
    together = Observed.together(parts)
    comparison = _comparison(kind, together, pruning_of(pruned).before_blocks, metrics, skipped)
    return comparison, break_down(kind, together, rows, names)


def _comparison(
    kind: AnswerKind,
    seen: Observed,
    before_blocks: Sequence[int],
    metrics: Sequence[type[QualityMetric[Any]]],
    skipped: int,
) -> Comparison:
    finite_B = seen.finite_B[0] & seen.finite_B[1]
    return Comparison(
        images=len(seen.macs_B),
        skipped=skipped,
        answers=kind.name,
        metrics=_metrics(kind, seen, finite_B, metrics),
        **_likeness(kind, seen, finite_B),
        not_finite=NotFinite(dense=int((~seen.finite_B[0]).sum()), pruned=int((~seen.finite_B[1]).sum())),
        macs=Macs(
            dense=float(seen.dense_macs_B.mean()),
            pruned=_distribution(seen.macs_B),
            ratio=float((seen.macs_B.double() / seen.dense_macs_B.double()).mean()),
        ),
        kept=tuple(
            KeptPatches(before_block=block, patches=seen.patches, kept=_distribution(kept_B))
            for block, kept_B in zip(before_blocks, seen.kept_BS.T, strict=True)
        ),
    )


def _likeness(kind: AnswerKind, seen: Observed, finite_B: Tensor) -> dict[str, Any]:
    """How like the dense model's answers are, by the field of a comparison that it has its place in."""
    if kind.name == "regression":
        assert seen.answers is not None
        if not finite_B.any():
            return {"agreement": None}
        dense, pruned = (one[finite_B].numpy() for one in seen.answers)
        difference = float(seen.difference_B[finite_B].double().mean())
        return {"agreement": None, "correlation": correlation(dense, pruned), "deviation": math.sqrt(difference)}
    like_B = seen.likeness_B.double().where(finite_B, 0.0)
    mean = float(like_B.mean())
    if kind.name == "embedding":
        return {"agreement": None, "similarity": mean}
    interval = part_interval(int(like_B.sum()), len(like_B)) if kind.name == "single-label" else None
    return {"agreement": mean, "agreement_interval": interval}


def _metrics(
    kind: AnswerKind, seen: Observed, finite_B: Tensor, metrics: Sequence[type[QualityMetric[Any]]]
) -> dict[str, MetricPair]:
    if seen.answers is None or seen.labels is None:
        return {}
    answers, labels = seen.answers, seen.labels
    if kind.name == "regression":  # there is no worst number that one which is none could count as
        answers, labels = (answers[0][finite_B], answers[1][finite_B]), labels[finite_B]
    if not len(labels):
        return {}
    return {
        metric.label: MetricPair(
            dense=_value(metric, answers[0], labels),
            pruned=_value(metric, answers[1], labels),
            is_fraction=metric.is_fraction,
            **(_certainty(answers, labels) if metric.label == "accuracy" else {}),
        )
        for metric in metrics
    }


def _certainty(answers: tuple[Tensor, Tensor], labels: Tensor) -> dict[str, Any]:
    """How sure the difference in accuracy is."""
    dense_B, pruned_B = (ranked_BR[:, 0] == labels for ranked_BR in answers)
    lost, won = int((dense_B & ~pruned_B).sum()), int((pruned_B & ~dense_B).sum())
    found = paired_difference(lost, won, len(labels))
    return {"interval": found.interval, "p_value": found.p_value}


def _value(metric: type[QualityMetric[Any]], answers: Tensor, labels: Tensor) -> float:
    result = metric(keep_in_memory=True).compute(predictions=answers.tolist(), references=labels.tolist())
    assert result is not None  # as it is in the other processes of a distributed metric
    return result[metric.label]


def _distribution(values: Tensor) -> Distribution:
    values = values.double()
    quantiles = torch.quantile(values, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    names = ("q05", "q25", "q50", "q75", "q95")
    return Distribution(mean=float(values.mean()), **dict(zip(names, quantiles, strict=True)))
