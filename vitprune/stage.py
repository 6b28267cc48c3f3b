"""What a stage decides: which tokens of each image leave and who takes them in. The same for both executions.

Knows the policy of a recipe; leaves removing (`packed`) and masking (`masked`) of tokens to those who carry it out.

Shapes: B images, M tokens that an image has at the stage (padded to the largest image; prefix first), K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import assert_never

from vitprune import cpu_stage
from vitprune.attention import Findings
from vitprune.cost import CostModel
from vitprune.cost_table import Costs
from vitprune.layout import on_device
from vitprune.packed_attention import Query
from vitprune.pruning_spec import PruningSpec
from vitprune.scoring import TILE, bipartite, density_peaks, importance_weights, most_similar
from vitprune.thresholds import above_threshold, random_scores, top_counts
from vitprune.tokens import TokenBatch

# the more patches share what a class token sees, the less each has of it: S falls as 1/n
ATTENTION_BY_SIZE = 1.0
# the nearer patches lie, the more alike they are. Were keys smooth, δ would fall as 1/n; measured at 64 to 1,024
# patches with thresholds found at 256, MACs stay nearest to the budget at this power of n
REDUNDANCY_BY_SIZE = 0.55


@dataclass(frozen=True)
class Policy:
    """Everything that one forward of a pruned model needs to know, fixed while it runs.

    levels: one a stage: thresholds for `select: threshold`, else the part of its patches that an image keeps.
    temperatures: one a stage, τ of the straight-through gradient.
    latency: what the budget counts instead of MACs.
    """

    spec: PruningSpec
    before_blocks: tuple[int, ...]
    num_prefix_tokens: int
    has_class_token: bool
    cost: CostModel
    levels: Tensor
    temperatures: Tensor
    latency: Costs | None = None

    @property
    def reads_patches(self) -> bool:
        """Whether the model's answer depends on the patches behind the last block, not on the prefix tokens alone."""
        return self.cost.read is None

    @property
    def is_tome(self) -> bool:
        return self.spec.select == "tome"

    @property
    def is_redundancy(self) -> bool:
        return self.spec.is_redundancy

    @property
    def scores_of(self) -> Query | None:
        """Whose attention the score is made of; None where the score needs no attention."""
        if self.spec.select in ("random", "tome"):
            return None
        if self.spec.score == "head-weighted-mean-attention" or not self.has_class_token:
            return "mean"
        return "class"

    @property
    def needs_metric(self) -> bool:
        return self.is_redundancy or self.is_tome or self.spec.dropped == "merge"

    def keeps_all(self, level: float) -> bool:
        """Whether nothing can leave at a stage of such a level; no score is negative."""
        return level < 0 if self.spec.select == "threshold" else level >= 1


class Observer(Protocol):
    """Watches the stages of a forward; calibration also sets their levels as it watches."""

    def level(self, stage: int, scores_BM: Tensor, valid_BM: Tensor, current: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Decision:
    """What a stage decided.

    keep_BM: bool. scores_BM: +inf always stays, −inf isn't there. takers_BM: who takes in what leaves (`merge`), where
    the decision says so: in training, in loops, and by ToMe. metric_TK: elsewhere what tells who it is.
    kept: tokens that each image keeps, where the host knows already.
    """

    keep_BM: Tensor
    scores_BM: Tensor
    level: Tensor
    takers_BM: Tensor | None = None
    metric_TK: Tensor | None = None
    kept: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SeenTokens:
    """The tokens of a masked pass that are seen at a stage; how many the device alone knows.

    index_BM: row of each in what a block found. num_patches: of the dense image, (B, 1) where images differ.
    """

    valid_BM: Tensor
    positions_BM: Tensor
    index_BM: Tensor
    num_patches: int | Tensor
    layout: None = None


def decide(
    policy: Policy,
    stage: int,
    findings: Findings,
    tokens: TokenBatch | SeenTokens,
    observers: tuple[Observer, ...],
    *,
    learns: bool = False,
) -> Decision:
    """Applies the policy at one stage to what the block before found.

    learns: find a taker for tokens that stay, too, as the gradient of a mask asks what would be if they left.
    """
    prefix = policy.num_prefix_tokens
    scores_BM, takers_BM = _scores(policy, stage, findings, tokens)
    level = policy.levels[stage]
    for observer in observers:
        level = observer.level(stage, scores_BM.detach(), tokens.valid_BM, level)
    if isinstance(tokens, TokenBatch) and tokens.loops and policy.spec.select == "threshold":
        metric_TK = findings.metric_TK if policy.spec.dropped == "merge" else None
        known = scores_BM, level.item(), prefix + policy.spec.min_tokens, metric_TK, prefix, tokens.layout
        keep_BM, kept, takers_BM = cpu_stage.select(*known)
        return Decision(keep_BM, scores_BM, level, takers_BM, kept=kept)
    keep_BM = _select(policy, scores_BM, level, tokens)
    if policy.spec.dropped == "leave" or takers_BM is not None:
        return Decision(keep_BM, scores_BM, level, takers_BM if policy.spec.dropped == "merge" else None)
    assert findings.metric_TK is not None
    metric_TK = findings.metric_TK.detach()
    if not learns:
        return Decision(keep_BM, scores_BM, level, metric_TK=metric_TK)
    patches_BM = tokens.valid_BM.clone()
    patches_BM[:, :prefix] = False
    takers_BM = most_similar(metric_TK[tokens.index_BM], patches_BM, patches_BM & keep_BM)
    return Decision(keep_BM, scores_BM, level, takers_BM)


def _select(policy: Policy, scores_BM: Tensor, level: Tensor, tokens: TokenBatch | SeenTokens) -> Tensor:
    spec, prefix = policy.spec, policy.num_prefix_tokens
    match spec.select:
        case "threshold":
            # the most important patch stays whatever its score
            certain = prefix + int(policy.is_redundancy)
            return above_threshold(scores_BM, level, prefix + spec.min_tokens, certain=certain)
        case "top-k" | "random" | "tome":
            counts_B = (level * (tokens.valid_BM.sum(1) - prefix)).round().long().clamp(min=spec.min_tokens)
            return top_counts(scores_BM, counts_B + prefix) | (scores_BM == torch.inf)
        case _:
            assert_never(spec.select)


def _scores(
    policy: Policy, stage: int, findings: Findings, tokens: TokenBatch | SeenTokens
) -> tuple[Tensor, Tensor | None]:
    """Scores (B, M), and by ToMe each candidate's anchor (B, M)."""
    prefix, metric_TK = policy.num_prefix_tokens, findings.metric_TK
    if policy.is_tome:
        assert metric_TK is not None
        return bipartite(metric_TK[tokens.index_BM], tokens.valid_BM, prefix)
    if policy.spec.select == "random":
        scores_BN = random_scores(tokens.positions_BM[:, prefix:], stage)
    else:
        assert findings.attention_scores_BM is not None
        scores_BN = findings.attention_scores_BM[:, prefix:]
        if not policy.is_redundancy:
            scores_BN = _resized(policy, scores_BN, tokens)
    if policy.is_redundancy and isinstance(tokens, TokenBatch) and tokens.loops:
        assert metric_TK is not None
        assert findings.attention_scores_BM is not None
        known = metric_TK, findings.attention_scores_BM, tokens.num_patches, policy.spec.redundancy_exponent, prefix
        return _resized(policy, cpu_stage.density_peaks(*known, tokens.layout), tokens), None
    if policy.is_redundancy:
        assert metric_TK is not None
        scores_BN = _resized(policy, _redundancy(policy, scores_BN, metric_TK, tokens), tokens)
    scores_BM = F.pad(scores_BN, (prefix, 0), value=torch.inf)
    if tokens.layout is None:
        return scores_BM.masked_fill(~tokens.valid_BM, -torch.inf), None
    if tokens.layout.is_even:
        return scores_BM, None
    return scores_BM.masked_fill_(on_device(~tokens.layout.valid_BM, tokens.device), -torch.inf), None


def _resized(policy: Policy, scores: Tensor, tokens: TokenBatch | SeenTokens) -> Tensor:
    """Scores as they would be at the image size that the thresholds were found at, if that is known."""
    found_at = policy.spec.patches
    if found_at is None or (isinstance(tokens.num_patches, int) and tokens.num_patches == found_at):
        return scores
    power = REDUNDANCY_BY_SIZE if policy.is_redundancy else ATTENTION_BY_SIZE
    return scores * (tokens.num_patches / found_at) ** power


@torch.no_grad()
def _redundancy(policy: Policy, attention_BN: Tensor, metric_TK: Tensor, tokens: TokenBatch | SeenTokens) -> Tensor:
    """δ(i)·(n·S(i))^α, (B, N); the most important patch of an image has +inf.

    Without gradient: of what an earlier threshold does to later scores the straight-through estimate, steep as 1/τ,
    tells the wrong sign (docs/results.md).
    """
    prefix, exponent = policy.num_prefix_tokens, policy.spec.redundancy_exponent
    importance_BN = attention_BN
    if tokens.layout is None:  # where a layout says what is padding, nobody sees it, and it lies behind the patches
        importance_BN = importance_BN.masked_fill(~tokens.valid_BM[:, prefix:], -torch.inf)
    delta_BN = density_peaks(metric_TK, tokens.index_BM[:, prefix:], importance_BN)
    if exponent == 0:
        return delta_BN
    return delta_BN * importance_weights(attention_BN, tokens.num_patches, exponent)


def count_tokens(hidden_states: Tensor, valid_BN: Tensor | None) -> Tensor:
    """Tokens of each image of a dense sequence (B, N, D), (B,) float64; without padding where `valid_BN` tells it."""
    if valid_BN is not None:
        return valid_BN.sum(1).double()
    images, tokens = hidden_states.shape[:2]
    return torch.full((images,), tokens, dtype=torch.float64, device=hidden_states.device)


class Tally:
    """What one forward has cost so far, for each image.

    macs_B: multiply-accumulates of the blocks and stages, float64. seconds_B: what they take by the policy's table,
    float64; zeros without one. dense_tokens_B: tokens that the dense model has, padding not counted, float64.
    """

    def __init__(self, policy: Policy, dense_tokens_B: Tensor) -> None:
        self.policy = policy
        self.dense_tokens_B = dense_tokens_B
        self.macs_B = torch.zeros_like(dense_tokens_B)
        self.seconds_B = torch.zeros_like(dense_tokens_B)

    def add_block(self, block: int, tokens_B: Tensor, *, in_full: bool = False) -> None:
        """A block on so many tokens. in_full: the last one too, though the head reads few tokens of it."""
        cost = self.policy.cost
        self.macs_B = self.macs_B + (cost.block if in_full else cost.pruned_block)(block, tokens_B)
        if self.policy.latency is not None:
            self.seconds_B = self.seconds_B + self.policy.latency.block(block, tokens_B)

    def add_stage(self, tokens_B: Tensor, kept_B: Tensor) -> None:
        """A stage that finds so many tokens and keeps so many of them."""
        self.macs_B = self.macs_B + stage_macs(self.policy, tokens_B, kept_B)
        if self.policy.latency is not None:
            self.seconds_B = self.seconds_B + self.policy.latency.stage(tokens_B)


def stage_macs(policy: Policy, tokens_B: Tensor, kept_B: Tensor) -> Tensor:
    """MACs of deciding a stage for each image: attention row and similarities, (B,)."""
    cost, patches_B = policy.cost, tokens_B - policy.num_prefix_tokens
    macs_B = torch.zeros_like(tokens_B)
    if policy.scores_of is not None:
        macs_B = macs_B + cost.attention_row(tokens_B)
    if policy.is_redundancy:
        macs_B = macs_B + cost.density_peaks(patches_B, TILE)
    if policy.is_tome:
        macs_B = macs_B + cost.bipartite(patches_B)
    elif policy.spec.dropped == "merge":
        kept_patches_B = kept_B - policy.num_prefix_tokens
        macs_B = macs_B + cost.merge(patches_B - kept_patches_B, kept_patches_B)
    return macs_B
