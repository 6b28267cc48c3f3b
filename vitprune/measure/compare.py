"""Pruned against dense on the same images: how good the answers are, and how much work they take.

Tensor suffixes: B images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from vitprune.data.images import Images
from vitprune.measure.metrics import RANKED, load_metric
from vitprune.measure.timing import placed
from vitprune.models.module import pruning_of
from vitprune.models.outputs import ImageModel, require_same_kind, require_same_width
from vitprune.models.trace import Trace, eval_mode, trace
from vitprune.recipe.schema import EvaluateSpec
from vitprune.reports.results import (
    Comparison,
    Distribution,
    KeptPatches,
    Macs,
    MetricPair,
    NotFinite,
)
from vitprune.runtime import distributed

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NO_CLASS = -1


def compare(
    dense: nn.Module, pruned: nn.Module, images: Images, spec: EvaluateSpec, *, progress: bool = True
) -> Comparison:
    """Compare both models on the same images: metrics (where there are labels), agreement, MACs, kept patches.

    Under a launcher each process takes its share of the images; all get the result. Of models without classes
    embeddings are compared. The models stay on their device, in their dtype and in the mode they are in.

    Raises ValueError where there is no image, `pruned` isn't pruned, or isn't made of `dense`, as their answers tell.
    """
    dense_answers, pruned_answers = ImageModel.of(dense), ImageModel.of(pruned)
    require_same_kind(pruned_answers, dense_answers)
    state = distributed.init()
    own = images.share(state.process_index, state.num_processes)
    batches = own.loader(spec.batch_size)
    total = None if images.streamed else len(batches)
    seen: list[_Seen] = []
    with eval_mode(dense, pruned), torch.no_grad():
        for batch in track(
            batches, "Comparing", total=total, console=Console(stderr=True), transient=True, disable=not progress
        ):
            x_BCHW = batch["pixel_values"]
            before = dense_answers(placed(x_BCHW, dense))
            with trace(pruned) as watched:
                after = pruned_answers(placed(x_BCHW, pruned))
            require_same_width(after, before)
            seen.append(
                _Seen.of(before, after, watched, batch.get("labels"), is_classifier=dense_answers.is_classifier)
            )
    everybodys = distributed.all_gather((seen, own.skipped))
    together = [one for theirs, _ in everybodys for one in theirs]
    if not together:
        raise ValueError("data.eval: there is no image to compare the models on")
    skipped = sum(count for _, count in everybodys)
    return _comparison(_Seen.together(together), pruning_of(pruned).before_blocks, spec.metrics, skipped)


@dataclass(frozen=True)
class _Seen:
    """What was seen of some images. A few numbers each, not logits: those of ImageNet would fill the memory.

    ranked: ids (B, `RANKED`) of the likeliest classes by the dense model and by the pruned one, where there are
    classes; else cosines_B of their embeddings. kept_BS: patches left after each stage, of `patches`.
    """

    macs_B: Tensor
    dense_macs_B: Tensor
    kept_BS: Tensor
    patches: int
    ranked: tuple[Tensor, Tensor] | None
    cosines_B: Tensor | None
    labels_B: Tensor | None
    finite_B: tuple[Tensor, Tensor]

    @classmethod
    def of(
        cls, dense: Tensor, pruned: Tensor, watched: Trace, labels_B: Tensor | None, *, is_classifier: bool
    ) -> _Seen:
        return cls(
            macs_B=watched.macs.cpu(),
            dense_macs_B=watched.dense_macs.cpu(),
            kept_BS=torch.stack([mask.sum(dim=1) for mask in watched.keep_masks], dim=1).cpu(),
            patches=watched.keep_masks[0].shape[1],
            ranked=(_ranked(dense), _ranked(pruned)) if is_classifier else None,
            cosines_B=None if is_classifier else F.cosine_similarity(dense.float(), pruned.float(), dim=-1).cpu(),
            labels_B=labels_B if is_classifier else None,
            finite_B=(_are_finite(dense), _are_finite(pruned)),
        )

    @classmethod
    def together(cls, parts: Sequence[_Seen]) -> _Seen:
        def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
            there = [tensor for tensor in tensors if tensor is not None]
            return torch.cat(there) if there else None

        ranked = [part.ranked for part in parts if part.ranked is not None]
        return cls(
            macs_B=torch.cat([part.macs_B for part in parts]),
            dense_macs_B=torch.cat([part.dense_macs_B for part in parts]),
            kept_BS=torch.cat([part.kept_BS for part in parts]),
            patches=parts[0].patches,
            ranked=(torch.cat([dense for dense, _ in ranked]), torch.cat([own for _, own in ranked]))
            if ranked
            else None,
            cosines_B=joined([part.cosines_B for part in parts]),
            labels_B=joined([part.labels_B for part in parts]),
            finite_B=(
                torch.cat([part.finite_B[0] for part in parts]),
                torch.cat([part.finite_B[1] for part in parts]),
            ),
        )


def _comparison(seen: _Seen, before_blocks: Sequence[int], metrics: Sequence[str], skipped: int) -> Comparison:
    agreement, pairs, finite_B = None, {}, seen.finite_B[0] & seen.finite_B[1]
    if seen.ranked is not None:
        agreement = float(((seen.ranked[0][:, 0] == seen.ranked[1][:, 0]) & finite_B).double().mean())
        if seen.labels_B is not None:
            labels = seen.labels_B.tolist()
            values = [{name: _value(name, ranked.tolist(), labels) for name in metrics} for ranked in seen.ranked]
            pairs = {name: MetricPair(dense=values[0][name], pruned=values[1][name]) for name in metrics}
    return Comparison(
        images=len(seen.macs_B),
        skipped=skipped,
        metrics=pairs,
        agreement=agreement,
        similarity=None if seen.cosines_B is None else float(seen.cosines_B.double().where(finite_B, 0.0).mean()),
        not_finite=NotFinite(dense=int((~seen.finite_B[0]).sum()), pruned=int((~seen.finite_B[1]).sum())),
        macs=Macs(dense=float(seen.dense_macs_B.mean()), pruned=_distribution(seen.macs_B)),
        kept=tuple(
            KeptPatches(before_block=block, patches=seen.patches, kept=_distribution(kept_B))
            for block, kept_B in zip(before_blocks, seen.kept_BS.T, strict=True)
        ),
    )


def _value(name: str, predictions: Sequence[Sequence[int]], references: Sequence[int]) -> float:
    result = load_metric(name).compute(predictions=predictions, references=references)
    assert result is not None  # as it is in the other processes of a distributed metric
    return result[name]


def _ranked(logits: Tensor) -> Tensor:
    """(B, 5) ids of the likeliest classes, likeliest first; all where there are fewer. −1 for answers that are none."""
    ids_BR = logits.topk(min(RANKED, logits.shape[-1]), dim=-1).indices.cpu()
    return ids_BR.masked_fill(~_are_finite(logits)[:, None], NO_CLASS)


def _are_finite(answers: Tensor) -> Tensor:
    """Whether all numbers of an image's answer are, (B,)."""
    return answers.isfinite().flatten(1).all(1).cpu()


def _distribution(values: Tensor) -> Distribution:
    values = values.double()
    quantiles = torch.quantile(values, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    names = ("q05", "q25", "q50", "q75", "q95")
    return Distribution(mean=float(values.mean()), **dict(zip(names, quantiles, strict=True)))
