"""The whole algorithm for one image on one page, unoptimised: the tests' oracle, and the place to read first.

Equations: AS-ViT, arXiv 2209.13802; ToMe, arXiv 2210.09461; density peaks, Rodriguez & Laio, Science 2014. Shapes: N
tokens that the image has left (prefix first), P of them prefix, n patches of the dense image, H heads, K head width, D
width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    q_HNK: Tensor, k_HNK: Tensor, v_HNK: Tensor, sizes_N: Tensor, bias_HNN: Tensor | float, scale: float
) -> tuple[Tensor, Tensor]:
    """Proportional attention, softmax(q kᵀ·scale + bias + log s) (ToMe §3.2): weights (H, N, N), contexts (H, N, K)."""
    weights_HNN = (q_HNK @ k_HNK.mT * scale + bias_HNN + sizes_N.log()).softmax(-1)
    return weights_HNN, weights_HNN @ v_HNK


def class_attention(row_HN: Tensor, contexts_HNK: Tensor) -> Tensor:
    """S(i) = Σ_h R_h(i)·A_h(cls, i), R_h(i) = ‖o_h(i)‖ / (Σ_h ‖o_h(i)‖ + 1e-8) (AS-ViT §3), (N,)."""
    norms_HN = contexts_HNK.norm(dim=-1)
    return (norms_HN / (norms_HN.sum(0) + 1e-8) * row_HN).sum(0)


def mean_row(q_HNK: Tensor, k_HNK: Tensor, sizes_N: Tensor, scale: float) -> Tensor:
    """The attention row of the mean query by size, which has no position: A(q̄, ·), (H, N)."""
    mean_H1K = (q_HNK * sizes_N[:, None]).sum(1, keepdim=True) / sizes_N.sum()
    return (mean_H1K @ k_HNK.mT * scale + sizes_N.log()).softmax(-1)[:, 0]


def metric(k_HNK: Tensor) -> Tensor:
    """What similarity is measured on: keys averaged over heads, of length one (ToMe §3.1), (N, K)."""
    return torch.nn.functional.normalize(k_HNK.mean(0), dim=-1)


def density_peaks(attention_N: Tensor, metric_NK: Tensor, prefix: int, patches: int, exponent: float) -> Tensor:
    """γ(i) = δ(i)·(n·S(i))^α, δ(i) = 1 − max {cos(k_i, k_j) : S(j) > S(i)}, of equal S the first patch first; (N,)."""
    scores_N = torch.full_like(attention_N, torch.inf)
    order = sorted(range(prefix, len(attention_N)), key=lambda i: -attention_N[i].item())  # stable
    for place, i in enumerate(order[1:], 1):
        delta = 1 - (metric_NK[order[:place]] @ metric_NK[i]).max()
        scores_N[i] = delta.clamp(min=0) * (patches * attention_N[i]) ** exponent
    return scores_N


def keep_above(scores_N: Tensor, threshold: float, prefix: int, least: int) -> list[int]:
    """Prefix tokens, patches with S > θ (AS-ViT §3), and in any case the `least` best patches; in order."""
    best = sorted(range(prefix, len(scores_N)), key=lambda i: -scores_N[i].item())[:least]
    return [i for i in range(len(scores_N)) if i < prefix or not scores_N[i] <= threshold or i in best]


def keep_best(scores_N: Tensor, count: int, prefix: int) -> list[int]:
    """Prefix tokens and the `count` best patches, in order (the baselines)."""
    best = sorted(range(prefix, len(scores_N)), key=lambda i: -scores_N[i].item())[:count]
    return [i for i in range(len(scores_N)) if i < prefix or i in best]


def matching(metric_NK: Tensor, prefix: int) -> tuple[Tensor, dict[int, int]]:
    """Bipartite soft matching (ToMe §3.1): patches 0, 2, 4, … are anchors, and each other one has a nearest anchor.

    Returns 1 − cosine to it (N,), +inf for what isn't a candidate, and the anchors.
    """
    anchors, scores_N, dst = range(prefix, len(metric_NK), 2), torch.full_like(metric_NK[:, 0], torch.inf), {}
    for i in range(prefix + 1, len(metric_NK), 2):
        cosines = metric_NK[list(anchors)] @ metric_NK[i]
        dst[i], scores_N[i] = anchors[int(cosines.argmax())], 1 - cosines.max()
    return scores_N, dst


def nearest_kept(metric_NK: Tensor, keep: list[int], prefix: int) -> dict[int, int]:
    """For each token that leaves the most similar patch that stays."""
    patches = [i for i in keep if i >= prefix]
    left = [i for i in range(len(metric_NK)) if i not in keep]
    return {i: patches[int((metric_NK[patches] @ metric_NK[i]).argmax())] for i in left}


def merge(x_ND: Tensor, sizes_N: Tensor, dst: dict[int, int]) -> tuple[Tensor, Tensor]:
    """Each destination becomes the mean by size of itself and what is merged into it (ToMe §3.2); rows keep places."""
    sums_ND, totals_N = x_ND * sizes_N[:, None], sizes_N.clone()
    for i, j in dst.items():
        sums_ND[j] += sizes_N[i] * x_ND[i]
        totals_N[j] += sizes_N[i]
    return sums_ND / totals_N[:, None], totals_N
