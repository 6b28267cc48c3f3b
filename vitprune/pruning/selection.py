"""What a stage decides: which tokens of each image stay, and into which the others are merged.

A score of +inf marks a token that always stays (prefix, the most important patch), −inf one that isn't there (padding,
dropped before).

Shapes: B images, M tokens that an image has at the stage (padded to the largest image; prefix first), K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, assert_never

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitprune.pruning.costs import CostModel, Costs
from vitprune.pruning.layout import on_device
from vitprune.pruning.scores import SCORES, Row, Score, ScoredTokens, TokenStats, bipartite
from vitprune.recipe.pruning_spec import PruningSpec


@dataclass(frozen=True)
class Policy:
    """Everything that one forward of a pruned model needs to know, fixed while it runs.

    levels: one a stage: thresholds for `select: threshold`, else the part of its patches that an image keeps.
    temperatures: one a stage, τ of the straight-through gradient.
    latency: what the budget counts instead of MACs.
    read_levels: levels as numbers, where that can be had without waiting for the device.
    """

    spec: PruningSpec
    before_blocks: tuple[int, ...]
    num_prefix_tokens: int
    has_class_token: bool
    cost: CostModel
    levels: Tensor
    temperatures: Tensor
    latency: Costs | None = None
    read_levels: Callable[[], tuple[float, ...]] | None = None

    @cached_property
    def known_levels(self) -> tuple[float, ...]:
        """Levels as the host knows them: to leave a stage out, and to count by."""
        return tuple(self.levels.tolist()) if self.read_levels is None else self.read_levels()

    @cached_property
    def score(self) -> Score | None:
        """What patches are scored by; None for `select: random | tome`, which have scores of their own."""
        if self.spec.select in ("random", "tome"):
            return None
        return SCORES[self.spec.score](self.spec, has_class_token=self.has_class_token)

    @property
    def row(self) -> Row | None:
        """Whose attention row the score is made of."""
        return None if self.score is None else self.score.row

    @property
    def compares_keys(self) -> bool:
        scored = self.score is not None and self.score.compares_keys
        return scored or self.spec.select == "tome" or self.spec.dropped == "merge"

    @property
    def reads_patches(self) -> bool:
        """Whether the model's answer depends on the patches behind the last block, not on the prefix tokens alone."""
        return self.cost.read is None

    def keeps_all(self, level: float) -> bool:
        """Whether nothing can leave at a stage of such a level; no score is negative."""
        return level < 0 if self.spec.select == "threshold" else level >= 1

    def stages(self, *, every: bool = False) -> dict[int, int]:
        """Stage by block that it comes before; a stage at which nothing can leave is none, unless all are wanted."""
        levels = zip(self.before_blocks, self.known_levels, strict=True)
        return {block: stage for stage, (block, level) in enumerate(levels) if every or not self.keeps_all(level)}

    def stage_macs(self, tokens_B: Tensor, kept_B: Tensor) -> Tensor:
        """MACs of deciding a stage for each image: attention row and similarities, (B,)."""
        cost, patches_B = self.cost, tokens_B - self.num_prefix_tokens
        macs_B = torch.zeros_like(tokens_B)
        if self.score is not None:
            macs_B = macs_B + cost.attention_row(tokens_B) + self.score.macs(cost, patches_B)
        if self.spec.select == "tome":
            macs_B = macs_B + cost.bipartite(patches_B)
        elif self.spec.dropped == "merge":
            kept_patches_B = kept_B - self.num_prefix_tokens
            macs_B = macs_B + cost.merge(patches_B - kept_patches_B, kept_patches_B)
        return macs_B


class Observer(Protocol):
    """Watches the stages of a forward; calibration also sets their levels as it watches."""

    def level(self, stage: int, scores_BM: Tensor, valid_BM: Tensor, current: Tensor) -> Tensor: ...


class StageTokens(ScoredTokens, Protocol):
    """The tokens of a stage. positions_BM: index of each in the dense sequence."""

    @property
    def positions_BM(self) -> Tensor: ...


@dataclass(frozen=True)
class Decision:
    """What a stage decided. Tokens are numbered within their image.

    keep_BM: bool; False where there is none.
    dst_BM: for a token that leaves, the kept token that it is merged into, where the decision says so.
    metric_TK: where it doesn't, by what the most similar kept patch is found. Neither: what leaves is dropped.
    kept_B, kept: tokens that each image keeps, where they are counted already; where the host knows.
    scores_BM, level: what was compared, where anything was.
    """

    keep_BM: Tensor
    dst_BM: Tensor | None = None
    metric_TK: Tensor | None = None
    kept_B: Tensor | None = None
    kept: tuple[int, ...] | None = None
    scores_BM: Tensor | None = None
    level: Tensor | None = None

    @property
    def drops(self) -> bool:
        """Whether what leaves is gone for good."""
        return self.dst_BM is None and self.metric_TK is None


def decide(
    policy: Policy, stage: int, stats: TokenStats, tokens: StageTokens, observers: tuple[Observer, ...] = ()
) -> Decision:
    """Apply the policy at one stage to what the attention of the block before says about the tokens."""
    prefix, merges = policy.num_prefix_tokens, policy.spec.dropped == "merge"
    by_kernels = tokens.kernels is not None and policy.spec.select == "threshold"
    scores_BM, dst_BM = _scores(policy, stage, stats, tokens, marked=not by_kernels or len(observers) > 0)
    level = policy.levels[stage]
    for observer in observers:
        level = observer.level(stage, scores_BM.detach(), tokens.valid_BM, level)
    if by_kernels:
        assert tokens.kernels is not None
        assert tokens.layout is not None
        metric_TK = stats.metric_TK if merges else None
        least = prefix + policy.spec.min_tokens
        keep_BM, kept_B, dst_BM = tokens.kernels.select(scores_BM, level, least, metric_TK, prefix, tokens.layout)
        return Decision(keep_BM, dst_BM, kept_B=kept_B, scores_BM=scores_BM, level=level)
    # observers may have changed the level
    known_level = None if observers or tokens.layout is None else policy.known_levels[stage]
    keep_BM, kept = _select(policy, scores_BM, level, known_level, tokens)
    if not merges or dst_BM is not None:
        return Decision(keep_BM, dst_BM if merges else None, kept=kept, scores_BM=scores_BM, level=level)
    assert stats.metric_TK is not None
    metric_TK = stats.metric_TK.detach()
    return Decision(keep_BM, metric_TK=metric_TK, kept=kept, scores_BM=scores_BM, level=level)


def _scores(
    policy: Policy, stage: int, stats: TokenStats, tokens: StageTokens, *, marked: bool
) -> tuple[Tensor, Tensor | None]:
    """Scores (B, M), and by ToMe the anchor that each candidate would be merged into (B, M).

    marked: what always stays or isn't there is, as kernels don't need it.
    """
    prefix = policy.num_prefix_tokens
    if policy.spec.select == "tome":
        assert stats.metric_TK is not None
        return bipartite(stats.metric_TK[tokens.index_BM], tokens.valid_BM, prefix)
    if policy.score is None:
        scores_BM = random_scores(tokens.positions_BM, stage)
    else:
        scores_BM = policy.score.of(stats, tokens)
        found_at = policy.spec.patches
        if found_at is not None and not (isinstance(tokens.num_patches, int) and tokens.num_patches == found_at):
            # as they would be at the image size that the thresholds were found at
            scores_BM = scores_BM * (tokens.num_patches / found_at) ** policy.score.size_power
    if not marked:
        return scores_BM, None
    scores_BM = F.pad(scores_BM[:, prefix:], (prefix, 0), value=torch.inf)
    if tokens.layout is None:
        return scores_BM.masked_fill(~tokens.valid_BM, -torch.inf), None
    if tokens.layout.is_even:
        return scores_BM, None
    return scores_BM.masked_fill_(on_device(~tokens.layout.valid_BM, scores_BM.device), -torch.inf), None


def _select(
    policy: Policy, scores_BM: Tensor, level: Tensor, known_level: float | None, tokens: StageTokens
) -> tuple[Tensor, tuple[int, ...] | None]:
    """Which tokens stay, bool (B, M), and how many of each image, where the host can tell.

    known_level: the level, where the host knows it.
    """
    spec, prefix = policy.spec, policy.num_prefix_tokens
    match spec.select:
        case "threshold":
            certain = prefix + (0 if policy.score is None else policy.score.certain)
            return above_threshold(scores_BM, level, prefix + spec.min_tokens, certain=certain), None
        case "top-k" | "random" | "tome":
            if known_level is None or tokens.layout is None:
                counts_B = (level * (tokens.valid_BM.sum(1) - prefix)).round().long().clamp(min=spec.min_tokens)
                return top_counts(scores_BM, counts_B + prefix) | (scores_BM == torch.inf), None
            patches_B = np.array(tokens.layout.lengths) - prefix
            # in float32, as a device would round
            counts_B = np.round(np.float32(known_level) * patches_B.astype(np.float32)).astype(np.int64)
            least_B = (patches_B + 1) // 2 if spec.select == "tome" else 0  # the anchors
            counts_B = np.minimum(np.maximum(counts_B, np.maximum(least_B, spec.min_tokens)), patches_B) + prefix
            most = int(counts_B.max())
            counts = most if tokens.layout.is_even else on_device(counts_B, scores_BM.device)
            return top_counts(scores_BM, counts, most), tuple(counts_B.tolist())
        case _:
            assert_never(spec.select)


def above_threshold(scores_BM: Tensor, threshold: Tensor, at_least: int, *, certain: int = 0) -> Tensor:
    """bool (B, M): tokens with S(i) > θ, and in any case the `at_least` best of each image (prefix included).

    certain: as many tokens of each image are known to stay.
    """
    above_BM = ~(scores_BM <= threshold)  # so what is no number stays
    if certain >= at_least:
        return above_BM
    # a CPU answers at once, and then the best are among them; other devices would have to be waited for
    answers = above_BM.device.type == "cpu" and not torch.compiler.is_exporting()
    if answers and int(above_BM.sum(1).min()) >= at_least:
        return above_BM
    least_B1 = scores_BM.topk(min(at_least, scores_BM.shape[1]), dim=1).values[:, -1:]
    better_BM, equal_BM = scores_BM > least_B1, scores_BM == least_B1
    # of equal scores the first tokens: topk's own choice depends on the padding, and so on the batch
    room_B1 = at_least - better_BM.sum(1, keepdim=True)
    best_BM = better_BM | (equal_BM & (equal_BM.cumsum(1) <= room_B1))
    return above_BM | (best_BM & (scores_BM != -torch.inf))


def top_counts(scores_BM: Tensor, counts: Tensor | int, most: int | None = None) -> Tensor:
    """bool (B, M): the best tokens of each image; equal scores in the order of the tokens.

    Behind those that always stay comes what is no number. counts: so many of each image, (B,), or of all. most: the
    largest, where the host knows.
    """
    if scores_BM.numel() == 0:
        return torch.zeros_like(scores_BM, dtype=torch.bool)
    if most is None:
        most = min(int(torch.as_tensor(counts).max()), scores_BM.shape[1])
    ranked_BM = scores_BM.nan_to_num(torch.finfo(scores_BM.dtype).max, torch.inf, -torch.inf)
    order_BC = ranked_BM.sort(dim=1, descending=True, stable=True).indices[:, :most]
    keep_BM = torch.zeros_like(scores_BM, dtype=torch.bool)
    if isinstance(counts, int):
        keep_BM = keep_BM.scatter(1, order_BC, True)
    else:
        keep_BM = keep_BM.scatter(1, order_BC, torch.arange(most, device=scores_BM.device) < counts[:, None])
    return keep_BM & (scores_BM != -torch.inf)


def random_scores(positions_BM: Tensor, stage: int) -> Tensor:
    """A baseline's score: a fixed pseudo-random number per stage and position, so the batch doesn't matter; (B, M)."""
    generator = torch.Generator().manual_seed(stage)
    table = torch.rand(int(positions_BM.max()) + 1, generator=generator).to(positions_BM.device)
    return table[positions_BM.clamp(min=0)]  # where there is no token it doesn't matter
