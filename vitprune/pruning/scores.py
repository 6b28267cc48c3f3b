"""How much an image needs each of its patches, by what one block's attention computed anyway.

Above, the scores by name (`SCORES`); below, the pure functions that they are made of.

Shapes: B images, M tokens of an image (prefix first), N patches of an image, T rows of a packed batch, H heads, K head
width, A who answers (at ToMe's matching the anchors), C who asks (the candidates).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vitprune.pruning.costs import CostModel
from vitprune.pruning.layout import Layout
from vitprune.pruning.token_batch import Kernels
from vitprune.recipe.pruning_spec import PruningSpec, ScoreName

Row = Literal["class", "mean"]

# so many patches at a time are compared with others, so that memory grows with the patches and not with their square
TILE = 256
EPSILON = 1e-12  # length of a key below which it has no direction


@dataclass(frozen=True)
class TokenStats:
    """What a block's attention says about its tokens.

    attention_BM: AS-ViT's S(i) of each token, at least float32. metric_TK: keys of length one (ToMe), at least float32.
    """

    attention_BM: Tensor | None = None
    metric_TK: Tensor | None = None


class ScoredTokens(Protocol):
    """The tokens that a stage scores. index_BM: the row of each in `TokenStats.metric_TK`.

    num_patches: of the dense image, (B, 1) where images differ. layout: None where only the device knows lengths.
    """

    @property
    def num_prefix_tokens(self) -> int: ...
    @property
    def num_patches(self) -> int | Tensor: ...
    @property
    def valid_BM(self) -> Tensor: ...
    @property
    def index_BM(self) -> Tensor: ...
    @property
    def layout(self) -> Layout | None: ...
    @property
    def kernels(self) -> Kernels | None: ...


class Score(ABC):
    """One way to score patches. A new one: a subclass with `of`, an entry in `SCORES`, a name in `ScoreName`.

    row: whose attention row `TokenStats.attention_BM` is made of. compares_keys: asks for `TokenStats.metric_TK`.
    size_power: scores fall as n^−size_power when the same picture has n patches instead.
    certain: so many patches of each image have a score of +inf. No score is negative.
    """

    row: Row
    compares_keys = False
    size_power: float
    certain = 0

    def __init__(self, spec: PruningSpec, *, has_class_token: bool) -> None:
        self.spec = spec
        self.row = "class" if has_class_token else "mean"

    @abstractmethod
    def of(self, stats: TokenStats, tokens: ScoredTokens) -> Tensor:
        """Scores (B, M), at least float32; what they say of prefix tokens and of padding isn't read."""

    def macs(self, cost: CostModel, patches_B: Tensor) -> Tensor:
        """Multiply-accumulates of `of` for each image with so many patches, without the attention row, (B,)."""
        return torch.zeros_like(patches_B)


class ClassAttention(Score):
    """AS-ViT's score (arXiv 2209.13802): the class token's attention, weighted by head."""

    # the more patches share what a class token sees, the less each has of it: S falls as 1/n
    size_power = 1.0

    def of(self, stats: TokenStats, tokens: ScoredTokens) -> Tensor:
        assert stats.attention_BM is not None
        return stats.attention_BM


class MeanAttention(ClassAttention):
    """The same by the attention of the mean query, for models whose class token says little, or that have none."""

    def __init__(self, spec: PruningSpec, *, has_class_token: bool) -> None:
        super().__init__(spec, has_class_token=False)


class Redundancy(Score):
    """Density peaks: δ(i)·(n·S(i))^α, so a patch stays that matters and resembles none that matters more.

    Without gradient: of what an earlier threshold does to later scores the straight-through estimate, steep as 1/τ,
    tells the wrong sign (docs/results.md).
    """

    compares_keys = True
    # the nearer patches lie, the more alike they are. Were keys smooth, δ would fall as 1/n; measured at 64 to 1,024
    # patches with thresholds found at 256, MACs stay nearest to the budget at this power of n
    size_power = 0.55
    certain = 1

    @torch.no_grad()
    def of(self, stats: TokenStats, tokens: ScoredTokens) -> Tensor:
        attention_BM, metric_TK, exponent = stats.attention_BM, stats.metric_TK, self.spec.redundancy_exponent
        assert attention_BM is not None
        assert metric_TK is not None
        prefix, patches = tokens.num_prefix_tokens, tokens.num_patches
        if tokens.kernels is not None:
            assert tokens.layout is not None
            return tokens.kernels.density_peaks(metric_TK, attention_BM, patches, exponent, prefix, tokens.layout)
        importance_BN = attention_BN = attention_BM[:, prefix:]
        if tokens.layout is None:  # elsewhere what is padding has no attention, and lies behind the patches
            importance_BN = importance_BN.masked_fill(~tokens.valid_BM[:, prefix:], -torch.inf)
        scores_BN = density_peaks(metric_TK, tokens.index_BM[:, prefix:], importance_BN)
        if exponent:
            scores_BN = scores_BN * importance_weights(attention_BN, patches, exponent)
        return F.pad(scores_BN, (prefix, 0))

    def macs(self, cost: CostModel, patches_B: Tensor) -> Tensor:
        return cost.density_peaks(patches_B, TILE)


SCORES: dict[ScoreName, type[Score]] = {
    "redundancy": Redundancy,
    "head-weighted-class-attention": ClassAttention,
    "head-weighted-mean-attention": MeanAttention,
}


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision is too coarse for scores; a float64 model's stay what they are."""
    return x.to(_at_least_float32(x.dtype))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def row_logits(q_BHK: Tensor, k_BMHK: Tensor, scale: float) -> Tensor:
    """One query's row of logits, (B, M, H), at least float32: the one extra row that a score costs."""
    with torch.autocast(q_BHK.device.type, enabled=False):
        # element by element: a matrix product of one row takes three times as long
        return torch.linalg.vecdot(at_least_float32(k_BMHK), at_least_float32(q_BHK)[:, None]) * scale


def row_weights(logits_BMH: Tensor, mask_BM: Tensor | None = None) -> Tensor:
    """The softmax over kept keys, (B, M, H). mask_BM: 0/1 with gradient."""
    row_BMH = logits_BMH.softmax(1)
    if mask_BM is None:
        return row_BMH
    row_BMH = row_BMH * mask_BM[..., None]
    return row_BMH / row_BMH.sum(1, keepdim=True)


def mean_query(q_BMHK: Tensor, sizes_BM: Tensor) -> Tensor:
    """The mean of an image's queries by size, (B, H, K): who asks where there is no class token.

    It stands nowhere, so a relative position bias adds nothing to what it asks.
    """
    weights_BM = sizes_BM / sizes_BM.sum(1, keepdim=True)
    return (q_BMHK * weights_BM[..., None, None]).sum(1).to(q_BMHK.dtype)


def context_norms(context: Tensor) -> Tensor:
    """Lengths of context vectors, (…, K) to (…), at least float32."""
    # converted afterwards: three times as fast on a CPU, and half precision sums in float32 anyway
    return at_least_float32(torch.linalg.vector_norm(context, dim=-1))


def head_weighted_attention(attention_BMH: Tensor, context_norms_BMH: Tensor) -> Tensor:
    """AS-ViT's score (arXiv 2209.13802, §3), (B, M).

    S(i) = Σ_h R_h(i)·A_h(cls, i): the class token's attention, each head weighted at each token by its share
    R_h(i) = ‖o_h(i)‖₂ / (Σ_h ‖o_h(i)‖₂ + 1e-8) of the norm of the token's own context vectors.
    """
    norms_BM = context_norms_BMH.sum(-1) + 1e-8
    return (attention_BMH * context_norms_BMH).sum(-1) / norms_BM


def key_metric(k_THK: Tensor) -> Tensor:
    """What similarity of tokens is measured on: keys averaged over heads, of length one (ToMe, arXiv 2210.09461).

    (…, T, H, K) to (…, T, K), at least float32.
    """
    mean_TK = k_THK.sum(-2, dtype=_at_least_float32(k_THK.dtype))
    return mean_TK / torch.linalg.vector_norm(mean_TK, dim=-1, keepdim=True).clamp(min=EPSILON)


@torch.no_grad()
def density_peaks(metric_TK: Tensor, rows_BN: Tensor, importance_BN: Tensor) -> Tensor:
    """How little each patch resembles those that are more important than itself, (B, N).

    δ(i) = 1 − max { cos(k_i, k_j) : S(j) > S(i) }, at least 0, and of equal patches the first is the more important one
    (clustering by density peaks, Rodriguez & Laio, Science 2014, with S as the density). δ of the most important patch
    is +inf. rows_BN: each patch's row of the metric. What is no patch has to come last and be no more important than
    any; its δ means nothing. Without gradient.
    """
    order_BN = importance_BN.sort(dim=1, descending=True, stable=True).indices
    delta_BN = more_important(_rows(metric_TK, rows_BN.gather(1, order_BN))).clamp(min=0.0)
    return delta_BN.scatter(1, order_BN, delta_BN)  # each place is written to


@torch.no_grad()
def more_important(sorted_BNK: Tensor) -> Tensor:
    """1 − cosine of each patch to the most similar one before it, +inf for the first, (B, N)."""
    patches, tiles = sorted_BNK.shape[1], []
    if not isinstance(patches, int):  # in a graph, and of a size that depends on the image
        places_N = torch.arange(patches, device=sorted_BNK.device)
        later_NN = torch.where(places_N[:, None] > places_N, 1.0, torch.inf).to(sorted_BNK.dtype)
        return (later_NN - sorted_BNK @ sorted_BNK.mT).amin(-1)
    with torch.autocast(sorted_BNK.device.type, enabled=False):
        for start in range(0, patches, TILE):
            tile_BCK, columns_BAK = sorted_BNK[:, start : start + TILE], sorted_BNK[:, : start + TILE]
            # what a graph is traced with mustn't be kept
            make = _make_later if torch.compiler.is_exporting() else _later
            later_CA = make(sorted_BNK.device).to(sorted_BNK.dtype)[: tile_BCK.shape[1], : tile_BCK.shape[1]]
            later_CA = F.pad(later_CA, (start, 0), value=1.0) if start else later_CA
            distances_BCA = torch.baddbmm(later_CA, tile_BCK, columns_BAK.mT, alpha=-1)
            tiles.append(distances_BCA.amin(-1))
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, 1)


def _make_later(device: torch.device) -> Tensor:
    """1 where, of a tile's patches by importance, one comes before another, else +inf; (`TILE`, `TILE`)."""
    with torch.inference_mode(False):
        before_CA = torch.ones(TILE, TILE, dtype=torch.bool, device=device).tril(-1)
        return torch.where(before_CA, 1.0, torch.inf)


_later = cache(_make_later)


def importance_weights(attention_score_BN: Tensor, num_patches: int | Tensor, exponent: float) -> Tensor:
    """(n·S(i))^α, (B, N), n the patches of the dense image: so an S spread over more patches means the same."""
    return (attention_score_BN * num_patches) ** exponent


def bipartite(metric_BMK: Tensor, valid_BM: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """ToMe's matching (arXiv 2210.09461 §3): how little each candidate resembles its most similar anchor, and which.

    Patches 0, 2, 4, … of an image are anchors, the others candidates. Returns 1 − max cosine (B, M) and the anchors'
    indices (B, M); what is no candidate has +inf (it stays) or, where not valid, −inf.
    """
    first = num_prefix_tokens
    cosines_BCA = _cosines(metric_BMK[:, first + 1 :: 2], metric_BMK[:, first::2])
    images = valid_BM.shape[0]  # of a graph any number
    if images > 1:  # one image alone has no padding
        # added, not filled: half the time
        cosines_BCA = cosines_BCA.add_(torch.where(valid_BM, 0.0, -torch.inf)[:, None, first::2])
    best = cosines_BCA.max(-1)
    distance_BM = metric_BMK.new_full(valid_BM.shape, torch.inf)
    distance_BM[:, first + 1 :: 2] = (1.0 - best.values).clamp(min=0.0)
    anchors_BM = torch.zeros_like(valid_BM, dtype=torch.long)
    anchors_BM[:, first + 1 :: 2] = best.indices * 2 + first
    return distance_BM if images == 1 else distance_BM.masked_fill(~valid_BM, -torch.inf), anchors_BM


def most_similar(metric_BMK: Tensor, asks_BM: Tensor, answers_BM: Tensor) -> Tensor:
    """For each token of `asks` the index of the most similar *other* token among `answers`, (B, M) long.

    Elsewhere the result means nothing. Only asking rows and answering columns are compared.
    """
    rows_BC, columns_BA = true_indices(asks_BM), true_indices(answers_BM)
    columns_BAK, absent_BA = _take(metric_BMK, columns_BA), ~answers_BM.gather(1, columns_BA)
    tiles = []
    for part_BC in rows_BC.split(TILE, 1):
        impossible = absent_BA[:, None] | (part_BC[..., None] == columns_BA[:, None])
        cosines_BCA = _cosines(_take(metric_BMK, part_BC), columns_BAK)
        tiles.append(cosines_BCA.masked_fill(impossible, -torch.inf).argmax(-1))
    nearest_BC = torch.cat(tiles, 1)
    return torch.zeros_like(asks_BM, dtype=torch.long).scatter(1, rows_BC, columns_BA.gather(1, nearest_BC))


def nearest(metric_TK: Tensor, rows_BC: Tensor, columns_BA: Tensor, absent_BA: Tensor | None) -> Tensor:
    """For each row of the metric the number of the most similar column, (B, C); absent_BA: columns that are none."""
    columns_BAK, tiles = _rows(metric_TK, columns_BA), []
    for part_BC in rows_BC.split(TILE, 1):
        cosines_BCA = _cosines(_rows(metric_TK, part_BC), columns_BAK)
        if absent_BA is not None:
            cosines_BCA = cosines_BCA.masked_fill_(absent_BA[:, None], -torch.inf)
        tiles.append(cosines_BCA.argmax(-1))
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, 1)


def true_indices(mask_BM: Tensor) -> Tensor:
    """Indices of each row's True entries in order, (B, most of a row); rows with fewer go on with False entries."""
    most = int(mask_BM.sum(1).max())
    return (~mask_BM).to(torch.uint8).sort(dim=1, stable=True).indices[:, :most]


def _cosines(rows_BCK: Tensor, columns_BAK: Tensor) -> Tensor:
    """(B, C, A) of vectors of length one; float32 also under autocast, as 1 − cosine near one needs it."""
    with torch.autocast(rows_BCK.device.type, enabled=False):
        return torch.bmm(rows_BCK, columns_BAK.mT)


def _take(x_BMK: Tensor, index_BC: Tensor) -> Tensor:
    return x_BMK.gather(1, index_BC[..., None].expand(-1, -1, x_BMK.shape[-1]))


def _rows(x_TK: Tensor, rows_BN: Tensor) -> Tensor:
    return x_TK.index_select(0, rows_BN.flatten()).view(*rows_BN.shape, x_TK.shape[-1])
