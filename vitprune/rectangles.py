"""Rows of a packed batch as rectangles of images, which is what attention kernels take.

Knows how rows become rectangles and back, and what is added to the logits of pairs of tokens that moved. Leaves
attention itself to `packed_attention`.

Shapes: T rows of the batch laid end to end, M rows of the image that has most, G images of a rectangle (a bucket, or
all that are padded) and L rows of each, Q and J tokens that make pairs, H heads, N tokens of the dense sequence.
"""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate, pairwise

from torch import Tensor
from torch.nn import functional as F

from vitprune.tokens import TokenBatch


class Rectangles:
    """A view a bucket, or all images padded to the longest."""

    def __init__(self, batch: TokenBatch, *, padded: bool) -> None:
        self.batch, self.padded = batch, padded

    @cached_property
    def images(self) -> list[list[int]]:
        """Images of each rectangle."""
        layout = self.batch.layout
        if self.padded:
            return [list(range(len(layout.lengths)))]
        bounds = accumulate((count for count, _ in layout.buckets), initial=0)
        return [layout.order[start:stop] for start, stop in pairwise(bounds)]

    def split(self, values_T: Tensor, beyond: float | None = None) -> list[Tensor]:
        """(T, …) to (G, L, …) each. beyond: what lies beyond an image's rows; None: a copy of its last."""
        if not self.padded:
            return self.batch.layout.split(values_T)
        values_BM = values_T.index_select(0, self.batch.rows_BM.flatten()).unflatten(0, self.batch.rows_BM.shape)
        return [values_BM if beyond is None else values_BM.masked_fill(~self.batch.has_row_BM, beyond)]

    def join(self, values: list[Tensor]) -> Tensor:
        """What `split` took apart, (T, …)."""
        if not self.padded:
            return self.batch.layout.join(values)
        return values[0].flatten(0, 1).index_select(0, self.batch.places_T)


class PairBias:
    """What is added to the logits of each pair of tokens, by their positions in the dense sequence.

    bias_1HNN: (1, H, N, N). Nothing is added for a token without a position.
    """

    def __init__(self, bias_1HNN: Tensor) -> None:
        # −1, no position, is the row and column of zeros at the end
        self._bias_HPP = F.pad(bias_1HNN[0], (0, 1, 0, 1))

    def between(self, positions_GQ: Tensor, positions_GJ: Tensor) -> Tensor:
        """For queries and keys at these positions, (G, H, Q, J)."""
        places = self._bias_HPP.shape[-1]
        pairs_GQJ = (positions_GQ % places)[:, :, None] * places + (positions_GJ % places)[:, None]
        # one flat index is twice as fast as two
        bias_HX = self._bias_HPP.flatten(1).index_select(1, pairs_GQJ.flatten())
        return bias_HX.unflatten(1, pairs_GQJ.shape).transpose(0, 1)
