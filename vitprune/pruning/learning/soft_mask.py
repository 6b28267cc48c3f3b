"""The straight-through mask of a stage: 0 or 1, with the gradient of a sigmoid (AS-ViT, arXiv 2209.13802 §3).

Shapes: B images, M tokens that an image has at the stage, T rows of a packed batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitprune.pruning.scores import most_similar
from vitprune.pruning.selection import Decision, StageTokens

# of a threshold's gradient on evenly spread scores the part 2/(1 + e^BAND) is left out: 0.02 %
BAND = 9.0


@dataclass(frozen=True)
class SoftMask:
    """What a threshold learns from at a stage.

    mask_BM: 0/1 with the gradient of the straight-through mask.
    near_BM: bool, tokens near enough to the threshold for that gradient to matter.
    """

    mask_BM: Tensor
    near_BM: Tensor

    @classmethod
    def of(cls, decision: Decision, temperature: Tensor) -> SoftMask:
        scores_BM, level = decision.scores_BM, decision.level
        assert scores_BM is not None
        assert level is not None
        mask_BM = straight_through(scores_BM, level, temperature, decision.keep_BM)
        return cls(mask_BM, near_threshold(scores_BM.detach(), level.detach(), temperature))

    def borderline_BM(self, keep_BM: Tensor) -> Tensor:
        """bool, tokens that leave near their threshold."""
        return self.near_BM & ~keep_BM


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


def with_all_destinations(decision: Decision, tokens: StageTokens) -> Decision:
    """Add a destination for each token, kept ones too: a mask's gradient asks what would be if they left."""
    if decision.metric_TK is None:
        return decision
    patches_BM = tokens.valid_BM.clone()
    patches_BM[:, : tokens.num_prefix_tokens] = False
    metric_BMK = decision.metric_TK[tokens.index_BM]
    dst_BM = most_similar(metric_BMK, patches_BM, patches_BM & decision.keep_BM)
    return replace(decision, dst_BM=dst_BM, metric_TK=None)
