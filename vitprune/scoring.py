"""How much an image needs each of its patches: pure functions of what one block's attention computed anyway.

Shapes: B images, M tokens of an image (prefix first), H heads, K head width, A anchors, C candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision is too coarse for scores; a float64 model's stay what they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attention_row(q_BHK: Tensor, k_BMHK: Tensor, scaling: float, bias_BMH: Tensor | None = None) -> Tensor:
    """One query's row of the attention matrix, (B, M, H), at least float32: the one extra row that a score costs."""
    logits_BMH = row_logits(q_BHK, k_BMHK, scaling)
    return row_weights(logits_BMH if bias_BMH is None else logits_BMH + bias_BMH)


def row_logits(q_BHK: Tensor, k_BMHK: Tensor, scaling: float) -> Tensor:
    """What one query has to do with each key before the softmax, (B, M, H), at least float32."""
    with torch.autocast(q_BHK.device.type, enabled=False):
        # element by element: a matrix product of one row takes three times as long
        return torch.linalg.vecdot(at_least_float32(k_BMHK), at_least_float32(q_BHK)[:, None] * scaling)


def row_weights(logits_BMH: Tensor, mask_BM: Tensor | None = None) -> Tensor:
    """The softmax over keys that are seen, (B, M, H). mask_BM: 0/1 with gradient."""
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
    """AS-ViT's score (arXiv 2209.13802), (B, M).

    S(i) = Σ_h R_h(i)·A_h(cls, i): the class token's attention, each head weighted at each token by its share
    R_h(i) = ‖o_h(i)‖₂ / (Σ_h ‖o_h(i)‖₂ + 1e-8) of the norm of the token's own context vectors.
    """
    norms_BM = context_norms_BMH.sum(-1) + 1e-8
    return (attention_BMH * context_norms_BMH).sum(-1) / norms_BM


def key_metric(k_THK: Tensor) -> Tensor:
    """What similarity of tokens is measured on: keys averaged over heads, of length one (ToMe, arXiv 2210.09461).

    (…, T, H, K) to (…, T, K), at least float32.
    """
    return F.normalize(k_THK.sum(-2, dtype=torch.promote_types(k_THK.dtype, torch.float32)), dim=-1)


def redundancy(
    metric_BMK: Tensor, valid_BM: Tensor, num_prefix_tokens: int, weights_BM: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How little each candidate resembles its most similar anchor: r(i) = 1 − max cosine, and that anchor.

    Patches 0, 2, 4, … of an image are anchors, the others candidates. Returns r (B, M), with weights r(i)·w(i), and
    the anchors' indices (B, M); what is no candidate has r = +inf (it stays) or, where not valid, −inf.
    """
    first = num_prefix_tokens
    anchors_BAK, candidates_BCK = metric_BMK[:, first::2], metric_BMK[:, first + 1 :: 2]
    cosines_BCA = _cosines(candidates_BCK, anchors_BAK)
    if len(valid_BM) > 1:  # one image alone has no padding
        # added, not filled: half the time
        cosines_BCA = cosines_BCA.add_(torch.where(valid_BM, 0.0, -torch.inf)[:, None, first::2])
    best = cosines_BCA.max(-1)
    r_BC = (1.0 - best.values).clamp(min=0.0)
    if weights_BM is not None:  # infinities stay out of it: their product would have a NaN for a gradient
        r_BC = r_BC * weights_BM[:, first + 1 :: 2]
    r_BM = metric_BMK.new_full(valid_BM.shape, torch.inf)
    r_BM[:, first + 1 :: 2] = r_BC
    anchors_BM = torch.zeros_like(valid_BM, dtype=torch.long)
    anchors_BM[:, first + 1 :: 2] = best.indices * 2 + first
    return r_BM if len(valid_BM) == 1 else r_BM.masked_fill(~valid_BM, -torch.inf), anchors_BM


def redundancy_weights(attention_score_BM: Tensor, exponent: float) -> Tensor:
    """S(i)^α, (B, M): of two equally redundant patches the one that matters less goes first."""
    return attention_score_BM.clamp(min=1e-12) ** exponent  # also at 0 with a finite gradient


def most_similar(metric_BMK: Tensor, asks_BM: Tensor, answers_BM: Tensor) -> Tensor:
    """For each token of `asks` the index of the most similar *other* token among `answers`, (B, M) long.

    Elsewhere the result means nothing. Only asking rows and answering columns are compared.
    """
    rows_BC, columns_BA = true_indices(asks_BM), true_indices(answers_BM)
    rows = _take(metric_BMK, rows_BC)
    columns = _take(metric_BMK, columns_BA)
    cosines_BCA = _cosines(rows, columns)
    impossible = ~answers_BM.gather(1, columns_BA)[:, None] | (rows_BC[..., None] == columns_BA[:, None])
    nearest_BC = cosines_BCA.masked_fill(impossible, -torch.inf).argmax(-1)
    return torch.zeros_like(asks_BM, dtype=torch.long).scatter(1, rows_BC, columns_BA.gather(1, nearest_BC))


def true_indices(mask_BM: Tensor) -> Tensor:
    """Indices of each row's True entries in order, (B, most of a row); rows with fewer go on with False entries."""
    most = int(mask_BM.sum(1).max())
    return (~mask_BM).to(torch.uint8).sort(dim=1, stable=True).indices[:, :most]


def _cosines(rows_BCK: Tensor, columns_BAK: Tensor) -> Tensor:
    """(B, C, A) of vectors of length one; float32 also under autocast, as 1 − cosine near one needs it."""
    with torch.autocast(rows_BCK.device.type, enabled=False):
        return rows_BCK @ columns_BAK.transpose(1, 2)


def _take(x_BMK: Tensor, index_BC: Tensor) -> Tensor:
    return x_BMK.gather(1, index_BC[..., None].expand(-1, -1, x_BMK.shape[-1]))
