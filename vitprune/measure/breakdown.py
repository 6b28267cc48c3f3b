"""What was seen of each image that both models answered, and what lies behind the numbers of a comparison.

Tensor suffixes: B images, S stages, R ranked classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitprune.measure.answers import AnswerKind
from vitprune.measure.metrics import recorded
from vitprune.models.trace import Trace
from vitprune.reports.results import Breakdown, ClassResult, Histogram

BINS = 24
SAME = 1e-9  # parts of the MACs that differ by less are the same
SHOWN = 6  # images of the easiest, and of the hardest
APART = 12


@dataclass(frozen=True)
class Observed:
    """What was seen of some images. A few numbers each, not logits: those of ImageNet would fill the memory.

    likeness_B: of pruned and dense answers. difference_B: how far they are apart. answers: what metrics need of the
    dense ones and of the pruned ones; None where nothing does. kept_BS: patches left after each stage, of `patches`.
    """

    macs_B: Tensor
    dense_macs_B: Tensor
    kept_BS: Tensor
    patches: int
    likeness_B: Tensor
    difference_B: Tensor
    answers: tuple[Tensor, Tensor] | None
    labels: Tensor | None
    finite_B: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, kind: AnswerKind, dense: Tensor, pruned: Tensor, watched: Trace, labels: Tensor | None) -> Observed:
        finite_B = (_are_finite(dense), _are_finite(pruned))
        labelled = labels is not None and kind.takes_labels
        wanted = labelled or kind.name in ("regression", "single-label")
        return cls(
            macs_B=watched.macs.cpu(),
            dense_macs_B=watched.dense_macs.cpu(),
            kept_BS=watched.kept_patches.cpu(),
            patches=watched.num_patches,
            likeness_B=kind.likeness(dense, pruned).cpu(),
            difference_B=kind.difference(dense, pruned).cpu(),
            answers=(recorded(kind, dense, finite_B[0]), recorded(kind, pruned, finite_B[1])) if wanted else None,
            labels=torch.as_tensor(labels).cpu() if labels is not None and labelled else None,
            finite_B=finite_B,
        )

    @classmethod
    def together(cls, parts: Sequence[Observed]) -> Observed:
        def pair(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
            return torch.cat([dense for dense, _ in pairs]), torch.cat([pruned for _, pruned in pairs])

        answers = [part.answers for part in parts if part.answers is not None]
        labels = [part.labels for part in parts if part.labels is not None]
        return cls(
            macs_B=torch.cat([part.macs_B for part in parts]),
            dense_macs_B=torch.cat([part.dense_macs_B for part in parts]),
            kept_BS=torch.cat([part.kept_BS for part in parts]),
            patches=parts[0].patches,
            likeness_B=torch.cat([part.likeness_B for part in parts]),
            difference_B=torch.cat([part.difference_B for part in parts]),
            answers=pair(answers) if answers else None,
            labels=torch.cat(labels) if labels else None,
            finite_B=pair([part.finite_B for part in parts]),
        )


def break_down(kind: AnswerKind, seen: Observed, rows: Sequence[int] | None, names: Mapping[int, str]) -> Breakdown:
    """What lies behind a comparison. rows: of each image in its split, if that is known."""
    ratio_B = (seen.macs_B / seen.dense_macs_B).double()
    differ = bool(ratio_B.max() - ratio_B.min() > SAME)
    counts, edges = np.array([len(ratio_B)]), ratio_B[[0, 0]].numpy()
    if differ:
        counts, edges = np.histogram(ratio_B.numpy(), bins=BINS)
    classes = _by_class(seen, ratio_B, names) if kind.name == "single-label" else ()
    found = Breakdown(
        macs=Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist())),
        by="label" if seen.labels is not None else "dense answer",
        classes=tuple(sorted(classes, key=lambda one: one.agreement)),
    )
    if rows is None:
        return found
    assert len(rows) == len(ratio_B)

    def numbers(order_B: Tensor, most: int) -> tuple[int, ...]:
        return tuple(rows[place] for place in order_B[:most].tolist())

    order_B = ratio_B.argsort(stable=True)
    differs_B = seen.difference_B > 0 if kind.name == "regression" else seen.likeness_B < 1
    furthest_B = seen.difference_B.double().nan_to_num(torch.inf).argsort(descending=True, stable=True)
    apart_B = furthest_B[differs_B[furthest_B] | ~(seen.finite_B[0] & seen.finite_B[1])[furthest_B]]
    extremes = {"easiest": (order_B, SHOWN), "hardest": (order_B.flip(0), SHOWN)} if differ else {}
    picked = {**extremes, "apart": (apart_B, APART)}
    return found.model_copy(update={name: numbers(*which) for name, which in picked.items()})


def _by_class(seen: Observed, ratio_B: Tensor, names: Mapping[int, str]) -> list[ClassResult]:
    """Of each label that occurs, or of each dense answer where images have none."""
    assert seen.answers is not None
    dense_B, pruned_B = (ranked_BR[:, 0] for ranked_BR in seen.answers)
    class_B, found = dense_B if seen.labels is None else seen.labels, []
    for index in class_B[class_B >= 0].unique().tolist():
        own_B = class_B == index

        def right(answers_B: Tensor, own_B: Tensor = own_B, index: int = index) -> float | None:
            return None if seen.labels is None else float((answers_B[own_B] == index).double().mean())

        found.append(
            ClassResult(
                name=names.get(index, str(index)),
                images=int(own_B.sum()),
                dense=right(dense_B),
                pruned=right(pruned_B),
                agreement=float(((dense_B == pruned_B) & (dense_B >= 0))[own_B].double().mean()),
                ratio=float(ratio_B[own_B].mean()),
            )
        )
    return found


def _are_finite(answers: Tensor) -> Tensor:
    """Whether all numbers of an image's answer are, (B,)."""
    return answers.isfinite().flatten(1).all(1).cpu()
