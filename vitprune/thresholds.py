"""Which tokens stay: scores against a learned threshold, or the rivals' fixed counts.

A score of +inf marks a token that always stays (prefix, anchors), −inf one that isn't there (padding, gone before).

Shapes: B images, M tokens of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

# of a threshold's gradient on evenly spread scores the part 2/(1 + e^BAND) is left out: 0.02 %
BAND = 9.0


def above_threshold(scores_BM: Tensor, threshold: Tensor, at_least: int, *, certain: int = 0) -> Tensor:
    """bool (B, M): tokens with S(i) > θ, and in any case the `at_least` best of each image (prefix included).

    certain: as many tokens of each image are known to stay.
    """
    above_BM = ~(scores_BM <= threshold)  # so what is no number stays
    if certain >= at_least:
        return above_BM
    # a CPU answers at once, and then the best are among them; other devices would have to be waited for
    if above_BM.device.type == "cpu" and int(above_BM.sum(1).min()) >= at_least:
        return above_BM
    least_B1 = scores_BM.topk(min(at_least, scores_BM.shape[1]), dim=1).values[:, -1:]
    better_BM, equal_BM = scores_BM > least_B1, scores_BM == least_B1
    # of equal scores the first tokens: topk's own choice depends on the padding, and so on the batch
    room_B1 = at_least - better_BM.sum(1, keepdim=True)
    best_BM = better_BM | (equal_BM & (equal_BM.cumsum(1) <= room_B1))
    return above_BM | (best_BM & (scores_BM != -torch.inf))


def top_counts(scores_BM: Tensor, counts_B: Tensor) -> Tensor:
    """bool (B, M): the `counts` best tokens of each image; equal scores in the order of the tokens."""
    if scores_BM.numel() == 0:
        return torch.zeros_like(scores_BM, dtype=torch.bool)
    most = min(int(counts_B.max()), scores_BM.shape[1])
    order_BC = scores_BM.sort(dim=1, descending=True, stable=True).indices[:, :most]
    chosen = torch.arange(most, device=scores_BM.device) < counts_B[:, None]
    keep_BM = torch.zeros_like(scores_BM, dtype=torch.bool).scatter(1, order_BC, chosen)
    return keep_BM & (scores_BM != -torch.inf)


def straight_through(scores_BM: Tensor, threshold: Tensor, temperature: Tensor, keep_BM: Tensor) -> Tensor:
    """The 0/1 mask `keep` with the gradient of m = sigmoid((S − θ)/τ) (AS-ViT), float32 (B, M)."""
    gone_BM = scores_BM == -torch.inf  # against a threshold of −inf the difference would be NaN
    soft_BM = torch.sigmoid((scores_BM - threshold).masked_fill(gone_BM, -torch.inf) / temperature).float()
    return keep_BM.float() - soft_BM.detach() + soft_BM


def near_threshold(scores_BM: Tensor, threshold: Tensor, temperature: Tensor) -> Tensor:
    """bool (B, M): tokens whose mask has a gradient that matters, |S − θ| < `BAND`·τ.

    Beyond it the gradient m(1 − m)/τ of each token is less than e^−BAND/τ, a part 4·e^−BAND of what it is at θ.
    """
    return (scores_BM - threshold).abs() < BAND * temperature


def random_scores(positions_BM: Tensor, stage: int) -> Tensor:
    """A rival's score: a fixed pseudo-random number per stage and position, so the batch doesn't matter; (B, M)."""
    generator = torch.Generator().manual_seed(stage)
    table = torch.rand(int(positions_BM.max()) + 1, generator=generator).to(positions_BM.device)
    return table[positions_BM.clamp(min=0)]  # where there is no token it doesn't matter
