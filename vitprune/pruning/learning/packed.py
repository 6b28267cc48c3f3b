"""The packed forward that learns: no threshold's gradient is lost, and no work is spent on what none learns from.

Extends the forward of inference by masks with gradients and borderline tokens. The gradient is the masked forward's but
for what lies beyond `soft_mask.BAND`, until the next stage.

Shapes: B images, N tokens of an image in the dense sequence, M tokens of an image at a stage, T rows before and T'
after it, X tokens that stay, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vitprune.pruning.attention import Attention, StatsRequest
from vitprune.pruning.forward import PackedForward
from vitprune.pruning.layout import Layout
from vitprune.pruning.learning.attention import BorderlinePass, LearningAttention
from vitprune.pruning.learning.borderline import BorderlineTokens, LearningBatch, split_borderline, unpack_means
from vitprune.pruning.learning.soft_mask import SoftMask, with_all_destinations
from vitprune.pruning.packed.reduction import RowMap, add_changes_, merge_destinations
from vitprune.pruning.selection import Decision, Observer, Policy, decide
from vitprune.pruning.token_batch import TokenBatch


class LearningForward(PackedForward):
    """A packed forward from which thresholds learn."""

    def __init__(self, policy: Policy, observers: tuple[Observer, ...] = ()) -> None:
        super().__init__(policy, observers, trains=True)
        self._borderline: BorderlineTokens | None = None
        self._borderline_XD: Tensor | None = None

    def _stages(self) -> dict[int, int]:
        """All, since a threshold learns where nothing leaves, too."""
        return {block: stage for stage, block in enumerate(self.policy.before_blocks)}

    def _request(self, block: int) -> StatsRequest:
        return replace(super()._request(block), gradient=True)

    def _attention_of(self, block: int, hidden_states: Tensor) -> Attention:
        if not isinstance(self.batch, LearningBatch):
            return super()._attention_of(block, hidden_states)
        return LearningAttention(self.batch, self._request(block), self._borderline_pass(block))

    def _borderline_pass(self, block: int) -> BorderlinePass | None:
        if self._borderline is None:
            return None
        assert self._borderline_XD is not None
        is_last = block + 1 == len(self.policy.cost.linear)
        averages = self.policy.reads_patches and self.policy.spec.dropped == "leave"
        ends = block + 1 in self.stages or (is_last and not averages)
        return BorderlinePass(self._borderline, self._borderline_XD, ends=ends)

    def leave_block(self, block: int, hidden_states: Tensor) -> Tensor:
        theirs = self._attention.borderline if isinstance(self._attention, LearningAttention) else None
        if theirs is not None:
            gone = theirs.after_XD is None
            self._borderline, self._borderline_XD = (None, None) if gone else (theirs.tokens, theirs.after_XD)
        return super().leave_block(block, hidden_states)

    def _reduce(self, stage: int, hidden_states: Tensor) -> Tensor:
        before, before_TD = self._present, hidden_states.flatten(0, 1)
        decision = decide(self.policy, stage, self._attention.stats, before, self.observers)
        soft = SoftMask.of(decision, self.policy.temperatures[stage])
        self.batch, after_TD = reduce_softly(before, before_TD, with_all_destinations(decision, before), soft)
        self._borderline, self._borderline_XD = split_borderline(before, before_TD, decision.keep_BM, soft)
        self._end_stage(self.batch, soft.mask_BM)
        return after_TD[None]

    def enter_norm(self, norm: Callable[[Tensor], Tensor]) -> None:
        if self._borderline_XD is not None:
            with torch.no_grad():
                self._borderline_XD = norm(self._borderline_XD[None])[0]

    def _unpack_last(self, hidden_states: Tensor) -> Tensor:
        """With what the dense sequence says to thresholds about tokens that were dropped."""
        batch = self.batch
        if isinstance(batch, LearningBatch) and batch.sizes_T is None:
            return unpack_means(batch, hidden_states[0], self._borderline, self._borderline_XD)
        return super()._unpack_last(hidden_states)


def reduce_softly(batch: TokenBatch, x_TD: Tensor, decision: Decision, soft: SoftMask) -> tuple[LearningBatch, Tensor]:
    """`reduction.reduce_tokens` with the gradients of masks; what is merged counts 1 − m.

    decision: with a destination also for tokens that stay, if any has one.
    """
    kept = tuple(decision.keep_BM.sum(1).tolist())
    rows = RowMap(batch, decision.keep_BM, Layout.fitting(kept, x_TD, learns=True))
    y_TD = x_TD.index_select(0, rows.source_T)
    near_X = soft.near_BM[decision.keep_BM]
    learns_T = near_X.new_zeros(rows.layout.num_rows)
    sizes_T = dst_Y = None
    if not decision.drops:
        dst_Y = merge_destinations(decision, rows)
        y_TD, sizes_T, learns_T = _merge_softly(batch, x_TD, y_TD, decision, soft, rows)
        near_X = near_X | learns_T.index_select(0, rows.after_X)
    after = replace(
        batch,
        layout=rows.layout,
        sizes_T=sizes_T,
        origin=rows.origin(dst_Y),
        covers_all=batch.covers_all and not decision.drops,
    )
    mask_T = rows.put(soft.mask_BM[decision.keep_BM], 1.0)
    return LearningBatch.of(after, mask_T, learns_T.index_copy(0, rows.after_X, near_X)), y_TD


def _merge_softly(
    batch: TokenBatch, x_TD: Tensor, y_TD: Tensor, decision: Decision, soft: SoftMask, rows: RowMap
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge (1 − m)·size of each token; kept ones give nothing, but with a gradient.

    Returns states (T', D), sizes (T',), and whose sizes learn, bool (T',).
    """
    assert decision.dst_BM is not None
    gives_BM = (batch.valid_BM ^ decision.keep_BM) | soft.near_BM
    places_Y = gives_BM.flatten().nonzero().squeeze(1)
    dst_rows_BM = rows.layout.rows_of(rows.slots(None)).gather(1, decision.dst_BM)
    left_Y, dst_Y = batch.rows_at(places_Y), dst_rows_BM.flatten().index_select(0, places_Y)
    old_sizes_T = batch.sizes_T if batch.sizes_T is not None else x_TD.new_ones(len(x_TD), dtype=torch.float32)
    given_Y = old_sizes_T.index_select(0, left_Y) * (1 - soft.mask_BM[gives_BM])
    sizes_T = rows.put(old_sizes_T.index_select(0, rows.before_X), 0.0).index_add_(0, dst_Y, given_Y)
    add_changes_(y_TD, x_TD.index_select(0, left_Y), dst_Y, given_Y / sizes_T.index_select(0, dst_Y))
    learns_T = torch.zeros(len(y_TD), dtype=torch.bool, device=y_TD.device)
    learns_T[dst_Y[soft.near_BM[gives_BM]]] = True
    if isinstance(batch, LearningBatch):  # whose size learned goes on to, and so does what it is merged into
        learns_T[rows.after_X[batch.learns_T.index_select(0, rows.before_X)]] = True
        learns_T[dst_Y[batch.learns_T.index_select(0, left_Y)]] = True
    return y_TD, sizes_T, learns_T
