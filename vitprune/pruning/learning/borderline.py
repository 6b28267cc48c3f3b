"""Borderline tokens: those that leave near their threshold while thresholds learn, and go on beside the kept ones.

They attend to kept tokens and to themselves, but are attended to by none, so no gradient comes back through them. A
threshold's gradient from them is what the kept tokens would have read from them.

    near θ and kept          in the batch, with a mask that has a gradient (`LearningBatch`)
    near θ and not kept      borderline: beside the batch until the next stage
    elsewhere and not kept   dropped or merged, as in inference

Shapes: B images, N tokens of an image in the dense sequence, M of them at a stage, T rows of the batch, X borderline
tokens of all images and copies of the first that fill up, D width, G images of a rectangle (all, or a bucket), C
borderline tokens of the image that has most of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from vitprune.pruning.layout import row_multiple_for
from vitprune.pruning.learning.soft_mask import SoftMask
from vitprune.pruning.token_batch import TokenBatch


@dataclass(frozen=True, kw_only=True)
class LearningBatch(TokenBatch):
    """A packed batch behind a stage whose threshold learns.

    mask_T: 1, with the gradient of the straight-through mask where a token is near its threshold.
    learns_T: bool, rows whose mask or size has a gradient worth computing.
    """

    mask_T: Tensor
    learns_T: Tensor

    @classmethod
    def of(cls, batch: TokenBatch, mask_T: Tensor, learns_T: Tensor) -> LearningBatch:
        known = {field.name: getattr(batch, field.name) for field in fields(TokenBatch)}
        return cls(**known, mask_T=mask_T, learns_T=learns_T)


@dataclass(frozen=True)
class Places:
    """Where the borderline tokens of each image are among all.

    index_GC: 0 where there is none; is_there_GC: whether there is.
    """

    index_GC: Tensor
    is_there_GC: Tensor

    @classmethod
    def of(cls, images_X: Tensor, num_images: int) -> Places:
        """images_X: image of each."""
        counts_G = images_X.bincount(minlength=num_images)
        order_X = images_X.argsort(stable=True)
        slots_C = torch.arange(int(counts_G.max()), device=images_X.device)
        is_there_GC = slots_C < counts_G[:, None]
        starts_G = counts_G.cumsum(0) - counts_G
        in_order_GC = (starts_G[:, None] + slots_C).clamp(max=len(order_X) - 1)
        return cls(order_X[in_order_GC].masked_fill(~is_there_GC, 0), is_there_GC)

    def of_images(self, images: Sequence[int]) -> Places:
        """Those of some of the images, padded to the one of them that has most."""
        if list(images) == list(range(len(self.index_GC))):
            return self
        is_there_GC = self.is_there_GC[images]
        most = int(is_there_GC.sum(1).max())
        return Places(self.index_GC[images, :most], is_there_GC[:, :most])

    def take(self, values_X: Tensor, beyond: float | None = None) -> Tensor:
        """(X, …) to (G, C, …). beyond: what lies where there is none; None: the first one's."""
        values_GC = values_X.index_select(0, self.index_GC.flatten()).unflatten(0, self.index_GC.shape)
        if beyond is None:
            return values_GC
        is_there = self.is_there_GC.view(*self.is_there_GC.shape, *(1 for _ in values_X.shape[1:]))
        return values_GC.masked_fill(~is_there, beyond)

    def put_(self, values_X: Tensor, values_GC: Tensor) -> None:
        """What `take` took, back where it was."""
        values_X.index_copy_(0, self.index_GC.flatten()[self._there], values_GC.flatten(0, 1)[self._there])

    @cached_property
    def _there(self) -> Tensor:
        return self.is_there_GC.flatten().nonzero().squeeze(1)


@dataclass(frozen=True)
class BorderlineTokens:
    """The borderline tokens of a batch, in the order of their images.

    images_X, positions_X: image of each, and its index in the dense sequence. bias_X: log of its size, float32.
    mask_X: 0, with the gradient of the straight-through mask. count: of them; the rows behind are copies.
    """

    images_X: Tensor
    positions_X: Tensor
    bias_X: Tensor
    mask_X: Tensor
    count: int
    num_images: int

    @cached_property
    def places(self) -> Places:
        return Places.of(self.images_X[: self.count], self.num_images)


def split_borderline(
    batch: TokenBatch, x_TD: Tensor, keep_BM: Tensor, soft: SoftMask
) -> tuple[BorderlineTokens, Tensor] | tuple[None, None]:
    """The borderline tokens behind a stage, and their states (X, D)."""
    places_X = soft.borderline_BM(keep_BM).flatten().nonzero().squeeze(1)
    rows_X = batch.rows_at(places_X)
    parts = [
        torch.div(places_X, keep_BM.shape[1], rounding_mode="floor"),
        batch.positions_T.index_select(0, rows_X),
        batch.key_bias_T.detach().index_select(0, rows_X),
        soft.mask_BM.flatten().index_select(0, places_X),
        x_TD.detach().index_select(0, rows_X),
    ]
    count = len(parts[0])
    if count == 0:
        return None, None
    filling = -count % row_multiple_for(count, x_TD)
    images_X, positions_X, bias_X, mask_X, states_XD = (
        torch.cat([x_X, x_X[:1].expand(filling, *x_X.shape[1:])]) for x_X in parts
    )
    tokens = BorderlineTokens(images_X, positions_X, bias_X, mask_X, count, len(keep_BM))
    return tokens, states_XD


def unpack_means(
    batch: LearningBatch, x_TD: Tensor, borderline: BorderlineTokens | None, states_XD: Tensor | None
) -> Tensor:
    """The dense sequence (B, N, D) where patches are dropped, as `TokenBatch.unpack` gives it, with masks' gradients.

    states_XD: those of the last stage's borderline tokens behind the last block.
    """
    rows_Y, prefix = batch.patch_rows_BN.flatten(), batch.num_prefix_tokens
    y_YD = x_TD.index_select(0, rows_Y)
    mask_Y = batch.mask_T.index_select(0, rows_Y).masked_fill(~batch.present_BN.flatten(), 0.0)
    if borderline is not None:
        assert states_XD is not None
        places_X = (borderline.images_X * batch.patch_token_BN.shape[1] + borderline.positions_X)[: borderline.count]
        y_YD = y_YD.index_copy(0, places_X, states_XD[: borderline.count].to(y_YD.dtype))
        mask_Y = mask_Y.index_copy(0, places_X, borderline.mask_X[: borderline.count])
    y_BND, mask_BN1 = y_YD.unflatten(0, batch.patch_token_BN.shape), mask_Y.view_as(batch.patch_token_BN)[..., None]
    patches_BN1 = mask_BN1[:, prefix:]
    means_B1D = (y_BND[:, prefix:] * patches_BN1).sum(1, keepdim=True) / patches_BN1.sum(1, keepdim=True)
    return y_BND + ((1 - mask_BN1) * (means_B1D - y_BND)).to(x_TD.dtype)
