"""Seconds of a pruned and of a dense pass by the number of tokens, from a table that was measured.

Knows how to read a table. Between its token counts a straight line counts, and beyond them the nearest one goes on, so
that a latency budget has a gradient to the thresholds as one of MACs has.

Shapes: B images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class CostTable:
    """Seconds an image in batches of `batch_size`, prefix tokens counted as tokens.

    tokens: the counts of the table, rising; a curve has a number of seconds for each.
    curves: of the kinds of block that differ. kinds: for each block the index of its curve.
    stages: the curve of what a stage takes to decide and to carry out, by the tokens that it finds.
    outside_blocks: embedding, head and unpacking.
    dense_tokens, dense_seconds: of the dense model, all of it.
    factor: what the pruned model takes by what the curves say; found by measuring it.
    """

    batch_size: int
    tokens: tuple[float, ...]
    curves: tuple[tuple[float, ...], ...]
    kinds: tuple[int, ...]
    stages: tuple[float, ...]
    outside_blocks: float
    dense_tokens: int
    dense_seconds: float
    factor: float = 1.0

    def block(self, block: int, tokens_B: Tensor) -> Tensor:
        return interpolate(tokens_B, self.tokens, self.curves[self.kinds[block]])

    def stage(self, tokens_B: Tensor) -> Tensor:
        return interpolate(tokens_B, self.tokens, self.stages)

    def pruned(self, inside_B: Tensor) -> Tensor:
        return self.factor * (inside_B + self.outside_blocks)

    def dense(self, tokens_B: Tensor) -> Tensor:
        """Raise ValueError for images of another size than those that were measured."""
        if bool((tokens_B != self.dense_tokens).any()):
            raise ValueError(
                f"the latency table was measured on images of {self.dense_tokens} tokens, these have "
                f"{int(tokens_B.max())}; measure it on such images"
            )
        return torch.full_like(tokens_B, self.dense_seconds)

    def corrected(self, factor: float) -> CostTable:
        """The table for a pruned model that takes `factor` × what this one says."""
        return replace(self, factor=self.factor * factor)


def interpolate(tokens_B: Tensor, tokens: tuple[float, ...], seconds: tuple[float, ...]) -> Tensor:
    """The curve at so many tokens, (B,), with a gradient."""
    y = tokens_B.new_tensor(seconds)
    right_B, part_B = between(tokens_B, tokens_B.new_tensor(tokens))
    return y[right_B - 1] + part_B * (y[right_B] - y[right_B - 1])


def between(tokens_B: Tensor, points_S: Tensor) -> tuple[Tensor, Tensor]:
    """The point right of so many tokens, and which part of the way there they are, beyond 0 and 1 at the ends, (B,)."""
    right_B = torch.searchsorted(points_S, tokens_B.detach()).clamp(1, len(points_S) - 1)
    left_B = right_B - 1
    return right_B, (tokens_B - points_S[left_B]) / (points_S[right_B] - points_S[left_B])
