"""Multiply-accumulates (MACs) of a pruned and of a dense pass, exact for what is executed.

Counted: every matrix product and convolution, the score's attention row and the similarities of a merge included. Not
counted, as everywhere: norms, activations, softmax, sums. Nor padding: of similarity matrices to a batch's largest
image, of keys to what the attention kernel likes.

All token counts may be numbers or tensors, so that the same formulas serve reports and training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Count = TypeVar("Count", float, Tensor)
_FLOAT64 = ("cpu", "cuda")


@dataclass(frozen=True)
class CostModel:
    """The MACs of one model's parts.

    linear: for each block, MACs of its linear layers for one token (12·D² in a plain ViT).
    width: H·K, the width of queries and keys.
    head_width: K.
    patch: MACs of embedding one patch; of a convolutional stem, its part.
    head: MACs of everything applied once an image (classifier, pooler).
    read: of how many tokens of an image the head reads the last block's output; None: of all.
    projections: of the last block, MACs of queries, keys and values for one token; 0 without `read`.
    """

    linear: tuple[int, ...]
    width: int
    head_width: int
    patch: float
    head: int
    read: int | None = None
    projections: int = 0

    def block(self, block: int, tokens: Count) -> Count:
        """Block `block` on `tokens` tokens: linear layers, QKᵀ and the weighted sum of the values."""
        return self.linear[block] * tokens + 2 * self.width * tokens * tokens

    def pruned_block(self, block: int, tokens: Count) -> Count:
        """Block `block` in a pruned model: the last one projects all tokens, and does the rest for few."""
        if self.read is None or block + 1 < len(self.linear):
            return self.block(block, tokens)
        return (self.projections + 2 * self.width * self.read) * tokens + self.linear[block] * self.read

    def dense(self, patches: Count, prefix: int) -> Count:
        """The whole dense model for one image."""
        total = self.outside(patches)
        for block in range(len(self.linear)):
            total = total + self.block(block, patches + prefix)
        return total

    def outside(self, patches: Count) -> Count:
        """Patch embedding and head: what pruning never changes."""
        return self.patch * patches + self.head

    def attention_row(self, tokens: Count) -> Count:
        """The class token's attention row, all heads."""
        return self.width * tokens

    def density_peaks(self, patches: Count, tile: int) -> Count:
        """Each patch against those that are more important: `tile` patches at a time, against all up to the tile's end.

        Between whole numbers of patches a straight line goes on, so that a budget has a gradient.
        """
        tiles = patches.detach().round() // tile if isinstance(patches, Tensor) else patches // tile
        return self.head_width * (tile * tile * tiles * (tiles + 1) / 2 + (patches - tiles * tile) * patches)

    def bipartite(self, patches: Count) -> Count:
        """ToMe's candidates against anchors: every second patch against the others."""
        odd = patches.detach().round() % 2 if isinstance(patches, Tensor) else patches % 2
        return self.head_width * (patches * patches - odd) / 4

    def merge(self, left: Count, kept: Count) -> Count:
        """Patches that leave against patches that stay."""
        return self.head_width * left * kept


class Costs(Protocol):
    """What a pass costs beside its MACs, for one image each."""

    def block(self, block: int, tokens_B: Tensor) -> Tensor:
        """Block `block` on so many tokens, (B,)."""
        ...

    def stage(self, tokens_B: Tensor) -> Tensor:
        """A stage that finds so many tokens, (B,)."""
        ...

    def pruned(self, inside_B: Tensor) -> Tensor:
        """The whole pruned pass, given what its blocks and stages cost, (B,)."""
        ...

    def dense(self, tokens_B: Tensor) -> Tensor:
        """The whole dense pass on so many tokens, (B,)."""
        ...


class CostCounter:
    """What one forward has worked on so far, for each image; what that costs is worked out when it is asked for.

    stage_macs: of a stage that finds so many tokens and keeps so many. dense_tokens_B: tokens that the dense model has,
    padding not counted, float32, as all counts are on the device.
    """

    def __init__(
        self,
        cost: CostModel,
        stage_macs: Callable[[Tensor, Tensor], Tensor],
        dense_tokens_B: Tensor,
    ) -> None:
        self.cost, self.stage_macs = cost, stage_macs
        self.dense_tokens_B = dense_tokens_B
        self._blocks: list[tuple[int, Tensor, bool]] = []
        self._stages: list[tuple[Tensor, Tensor]] = []

    def add_block(self, block: int, tokens_B: Tensor, *, in_full: bool = False) -> None:
        """A block on so many tokens. in_full: the last one, too, though the head reads few tokens of it."""
        self._blocks.append((block, tokens_B, in_full))

    def add_stage(self, tokens_B: Tensor, kept_B: Tensor) -> None:
        """A stage that finds so many tokens and keeps so many."""
        self._stages.append((tokens_B, kept_B))

    @property
    def kept_BS(self) -> Tensor:
        """Tokens that each image had left behind each stage, (B, S)."""
        return torch.stack([kept_B for _, kept_B in self._stages], 1)

    def macs_B(self) -> Tensor:
        """Count the multiply-accumulates of blocks and stages, (B,) float64."""
        macs_B = torch.zeros_like(widened(self.dense_tokens_B))
        for block, tokens_B, in_full in self._blocks:
            count = self.cost.block if in_full else self.cost.pruned_block
            macs_B = macs_B + count(block, widened(tokens_B))
        for tokens_B, kept_B in self._stages:
            macs_B = macs_B + self.stage_macs(widened(tokens_B), widened(kept_B))
        return macs_B

    def seconds_B(self, latency: Costs) -> Tensor:
        """Add up what blocks and stages take by a table, (B,) float64."""
        seconds_B = torch.zeros_like(widened(self.dense_tokens_B))
        for block, tokens_B, _ in self._blocks:
            seconds_B = seconds_B + latency.block(block, widened(tokens_B))
        for tokens_B, _ in self._stages:
            seconds_B = seconds_B + latency.stage(widened(tokens_B))
        return seconds_B


def widened(numbers: Tensor) -> Tensor:
    """The numbers as float64, on the CPU where their device has none of that, as MPS."""
    return (numbers if numbers.device.type in _FLOAT64 else numbers.cpu()).double()
