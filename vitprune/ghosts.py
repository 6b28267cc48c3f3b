"""Ghosts: tokens that left near their threshold in a training pass, and go on beside those that are seen.

They see the others and nobody sees them; so no gradient comes back through them, and they go through the same layers in
a run of their own without one. What they tell a threshold is what the others would have seen of them. Leaves
attention to `ghost_attention` and `packed_attention`.

Shapes: B images, M tokens of an image at a stage, X ghosts of all images and copies of the first that fill up, D width,
H heads, K head width, G images of a rectangle (all, or a bucket), C ghosts of the image that has most of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vitprune.departure import Departure
from vitprune.layout import row_multiple_for
from vitprune.tokens import TokenBatch


@dataclass(frozen=True)
class Places:
    """Where the ghosts of each image are among all. index_GC: 0 where there is none; is_there_GC: whether there is."""

    index_GC: Tensor
    is_there_GC: Tensor

    @classmethod
    def of(cls, images_X: Tensor, num_images: int) -> Places:
        """images_X: image of each ghost."""
        counts_G = images_X.bincount(minlength=num_images)
        order_X = images_X.argsort(stable=True)
        slots_C = torch.arange(int(counts_G.max()), device=images_X.device)
        is_there_GC = slots_C < counts_G[:, None]
        starts_G = counts_G.cumsum(0) - counts_G
        in_order_GC = (starts_G[:, None] + slots_C).clamp(max=len(order_X) - 1)
        return cls(order_X[in_order_GC].masked_fill(~is_there_GC, 0), is_there_GC)

    def of_images(self, images: Sequence[int]) -> Places:
        """Those of some of the images, as many as the one of them needs that has most."""
        if list(images) == list(range(len(self.index_GC))):
            return self
        is_there_GC = self.is_there_GC[images]
        most = int(is_there_GC.sum(1).max())
        return Places(self.index_GC[images, :most], is_there_GC[:, :most])

    def take(self, values_X: Tensor, beyond: float | None = None) -> Tensor:
        """(X, …) to (G, C, …). beyond: what lies where no ghost is; None: the first ghost's."""
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
class Ghosts:
    """The ghosts of a batch, in the order of their images.

    images_X, positions_X: image of each, and its index in the dense sequence. bias_X: log of its size, float32.
    mask_X: 0, with the gradient of the straight-through mask. count: of them; the rows behind fill up.
    """

    images_X: Tensor
    positions_X: Tensor
    bias_X: Tensor
    mask_X: Tensor
    count: int
    num_images: int

    @cached_property
    def everybody(self) -> Places:
        return Places.of(self.images_X[: self.count], self.num_images)


def linger(batch: TokenBatch, x_TD: Tensor, departure: Departure) -> tuple[Ghosts, Tensor] | tuple[None, None]:
    """The ghosts behind a stage, and their states (X, D): tokens that leave it near the threshold."""
    teaching = departure.teaching
    assert teaching is not None
    linger_X = departure.linger_BM.flatten().nonzero().squeeze(1)
    rows_X = batch.rows_at(linger_X)
    parts = [
        torch.div(linger_X, departure.keep_BM.shape[1], rounding_mode="floor"),
        batch.positions_T.index_select(0, rows_X),
        batch.key_bias_T.detach().index_select(0, rows_X),
        teaching.mask_BM.flatten().index_select(0, linger_X),
        x_TD.detach().index_select(0, rows_X),
    ]
    count = len(parts[0])
    if count == 0:
        return None, None
    filling = -count % row_multiple_for(count, x_TD)
    images_X, positions_X, bias_X, mask_X, states_XD = (
        torch.cat([x_X, x_X[:1].expand(filling, *x_X.shape[1:])]) for x_X in parts
    )
    ghosts = Ghosts(images_X, positions_X, bias_X, mask_X, count, len(departure.keep_BM))
    return ghosts, states_XD


def average_seen(x_TD: Tensor, ghosts: Ghosts | None, ghosts_XD: Tensor | None, batch: TokenBatch) -> Tensor:
    """The dense sequence (B, N, D) where patches left for good, as `TokenBatch.unpack` gives it, with masks' gradients.

    ghosts_XD: those of the last stage at the end.
    """
    assert batch.learning is not None
    rows_Y, prefix = batch.carrier_rows_BN.flatten(), batch.num_prefix_tokens
    y_YD = x_TD.index_select(0, rows_Y)
    mask_Y = batch.learning.mask_T.index_select(0, rows_Y).masked_fill(~batch.present_BN.flatten(), 0.0)
    if ghosts is not None:
        assert ghosts_XD is not None
        places_X = (ghosts.images_X * batch.carriers_BN.shape[1] + ghosts.positions_X)[: ghosts.count]
        y_YD = y_YD.index_copy(0, places_X, ghosts_XD[: ghosts.count].to(y_YD.dtype))
        mask_Y = mask_Y.index_copy(0, places_X, ghosts.mask_X[: ghosts.count])
    y_BND, mask_BN1 = y_YD.unflatten(0, batch.carriers_BN.shape), mask_Y.view_as(batch.carriers_BN)[..., None]
    patches_BN1 = mask_BN1[:, prefix:]
    means_B1D = (y_BND[:, prefix:] * patches_BN1).sum(1, keepdim=True) / patches_BN1.sum(1, keepdim=True)
    return y_BND + ((1 - mask_BN1) * (means_B1D - y_BND)).to(x_TD.dtype)


@dataclass
class Found:
    """Queries, keys and values of ghosts in a block, (1, H, X, K) each, once they have been there."""

    qkv: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def queries_XHK(self) -> Tensor:
        return self._tokens_first(0)

    @property
    def keys_XHK(self) -> Tensor:
        return self._tokens_first(1)

    @property
    def values_XHK(self) -> Tensor:
        return self._tokens_first(2)

    def _tokens_first(self, which: int) -> Tensor:
        assert self.qkv is not None
        return self.qkv[which][0].transpose(0, 1)


@dataclass
class GhostRun:
    """The way of ghosts through one block, behind the run of those that are seen.

    states_XD: theirs before the block; after_XD: behind it.
    ends: they are gone behind this block, so of it queries, keys and values are wanted alone.
    arguments: what the block is given for them in place of what it is given for the others.
    draws: what stochastic depth drew for the images, and will for their ghosts, in the order in which it comes up.
    Gradient checkpointing repeats the run and finds the same again.
    """

    ghosts: Ghosts
    states_XD: Tensor
    ends: bool
    arguments: dict[str, Any] = field(default_factory=dict)
    found: Found = field(default_factory=Found)
    after_XD: Tensor | None = None
    is_on: bool = False
    draws: deque[Tensor] = field(default_factory=deque)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The ghosts' turn."""
        self.is_on = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.is_on = False
            self.draws.clear()
