"""Token reduction: what a stage makes of a packed batch once it is decided which tokens stay.

Kept tokens move together; the others are dropped for good, or merged by size into a kept one (ToMe, arXiv 2210.09461
§3.2).

Shapes: B images, N tokens of one image in the dense sequence, T rows before and T' after the stage, M tokens of the
longest image before it, D width; X tokens that stay and Y that leave, image by image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vitprune.pruning.layout import Layout, on_device, ranges
from vitprune.pruning.scores import nearest
from vitprune.pruning.selection import Decision
from vitprune.pruning.token_batch import NO_TOKEN, Known, Origin, TokenBatch


def reduce_tokens(batch: TokenBatch, x_TD: Tensor, decision: Decision) -> tuple[TokenBatch, Tensor]:
    """Carry out what a stage decided; return the new batch and its hidden states (T', D).

    Where nothing leaves these are the batch and the states themselves.
    """
    kept_B, kept = decision.kept_B, decision.kept
    if kept is None:
        kept_B = decision.keep_BM.sum(1) if kept_B is None else kept_B
        kept = tuple(kept_B.tolist())  # here the host waits for the device
    if kept == batch.lengths:
        return batch, x_TD
    layout = Layout.fitting(kept, x_TD) if batch.kernels is None else batch.kernels.lay_out(kept, kept_B, x_TD)
    if batch.kernels is not None and decision.metric_TK is None:  # kernels want destinations that are known
        known = batch.positions_T, batch.sizes_T, batch.patch_token_BN, decision.keep_BM, decision.dst_BM
        y_TD, positions_T, sizes_T, patch_token_BN = batch.kernels.reduce(x_TD, *known, batch.layout, layout)
        origin, covers_all = Known(positions_T, patch_token_BN), batch.covers_all and not decision.drops
        return replace(batch, layout=layout, sizes_T=sizes_T, origin=origin, covers_all=covers_all), y_TD
    rows = RowMap(batch, decision.keep_BM, layout)
    y_TD = x_TD.index_select(0, rows.source_T)
    if decision.drops:
        return replace(batch, layout=layout, sizes_T=None, origin=rows.origin(None), covers_all=False), y_TD
    dst_Y = merge_destinations(decision, rows)
    sizes_T = _merge_(y_TD, batch, x_TD, rows, dst_Y)
    return replace(batch, layout=layout, sizes_T=sizes_T, origin=rows.origin(dst_Y)), y_TD


@dataclass(frozen=True)
class RowMap:
    """Which token becomes which row after the stage.

    The host knows how many of each image stay, and so where each token is once every image's tokens are in order, those
    that stay first.
    """

    batch: TokenBatch
    keep_BM: Tensor
    layout: Layout

    @cached_property
    def order_BM(self) -> Tensor:
        """Each image's tokens, those that stay first; then those that leave, and padding."""
        return self.keep_BM.sort(dim=1, descending=True, stable=True).indices

    @cached_property
    def _rows_BM(self) -> Tensor:
        """Row before the stage of each of them."""
        return self.batch.index_BM.gather(1, self.order_BM)

    def at(self, images: np.ndarray, places: np.ndarray) -> Tensor:
        """Rows before the stage of tokens at such places of an image's order, in the shape of `places`."""
        return self.pick(self._rows_BM, images, places).view(places.shape)

    def pick(self, values_BM: Tensor, images: np.ndarray, places: np.ndarray) -> Tensor:
        """Values at such places of an image's order, flat."""
        if len(self.keep_BM) == 1 and places.ndim == 1 and self._is_range(places):
            return values_BM[0, places[0] : places[-1] + 1]
        numbers = (images * self.keep_BM.shape[1] + places).flatten()
        return values_BM.flatten().index_select(0, on_device(numbers, values_BM.device))

    @staticmethod
    def _is_range(places: np.ndarray) -> bool:
        return len(places) > 0 and places[-1] - places[0] + 1 == len(places)

    @cached_property
    def kept_B(self) -> np.ndarray:
        return np.array(self.layout.lengths)

    @cached_property
    def left_B(self) -> np.ndarray:
        return np.array(self.batch.lengths) - self.kept_B

    @cached_property
    def left_Y(self) -> tuple[np.ndarray, np.ndarray]:
        """Image of each token that leaves, and its place in the image's order."""
        images_Y, slots_Y = ranges(self.left_B)
        return images_Y, slots_Y + self.kept_B[images_Y]

    @cached_property
    def before_X(self) -> Tensor:
        """Row before the stage of each token that stays."""
        return self.at(*ranges(self.kept_B))

    @cached_property
    def before_Y(self) -> Tensor:
        """Row before the stage of each token that leaves."""
        return self.at(*self.left_Y)

    @cached_property
    def after_X(self) -> Tensor:
        """Row after the stage of each token that stays."""
        images_X, slots_X = ranges(self.kept_B)
        return on_device(np.array(self.layout.starts)[images_X] + slots_X, self.keep_BM.device)

    @cached_property
    def source_T(self) -> Tensor:
        """Row before the stage that each row after it is a copy of; a filler's is its image's first."""
        return self.at(*self.layout.slot_of_row_T)

    def slots(self, dst_Y: Tensor | None) -> Tensor:
        """Which of its image's tokens each token is or becomes part of, (B, M); `NO_TOKEN` where it is gone."""
        images, tokens = self.keep_BM.shape
        slots_BM = np.tile(np.arange(tokens), (images, 1))
        if dst_Y is None:
            slots_BM[slots_BM >= self.kept_B[:, None]] = NO_TOKEN
        ordered_BM = on_device(slots_BM, self.keep_BM.device)
        if dst_Y is not None:
            images_Y, places_Y = self.left_Y
            places = on_device(images_Y * tokens + places_Y, self.keep_BM.device)
            ordered_BM = ordered_BM.flatten().index_copy(0, places, dst_Y).view_as(self.order_BM)
        return torch.empty_like(self.order_BM).scatter(1, self.order_BM, ordered_BM)

    def origin(self, dst_Y: Tensor | None) -> Origin:
        """Where the tokens after the stage come from. dst_Y: None where what left is gone for good."""
        return _Moved(self.batch.origin, self, dst_Y, self.batch.covers_all)

    def put(self, values_X: Tensor, default: float) -> Tensor:
        """Values at rows after the stage, and elsewhere `default`."""
        return values_X.new_full((self.layout.num_rows,), default).index_copy(0, self.after_X, values_X)


@dataclass(frozen=True)
class _Moved:
    """Where tokens come from after a stage. dst_Y: None where those that left are gone for good."""

    before: Origin
    move: RowMap
    dst_Y: Tensor | None
    covered_all: bool

    @property
    def positions_T(self) -> Tensor:
        return self._positions_T

    @property
    def patch_token_BN(self) -> Tensor:
        return self._patch_token_BN

    @cached_property
    def _positions_T(self) -> Tensor:
        positions_T = self.before.positions_T.index_select(0, self.move.source_T)
        return positions_T.index_fill_(0, on_device(self.move.layout.fillers, positions_T.device), NO_TOKEN)

    @cached_property
    def _patch_token_BN(self) -> Tensor:
        patch_token_BN, slots_BM = self.before.patch_token_BN, self.move.slots(self.dst_Y)
        if self.covered_all:
            return slots_BM.gather(1, patch_token_BN)
        return slots_BM.gather(1, patch_token_BN.clamp(min=0)).masked_fill_(patch_token_BN == NO_TOKEN, NO_TOKEN)


def merge_destinations(decision: Decision, rows: RowMap) -> Tensor:
    """Which of its image's tokens after the stage each leaving token is merged into, (Y,)."""
    prefix = rows.batch.num_prefix_tokens
    if decision.dst_BM is not None:
        dst_BM = rows.slots(None).gather(1, decision.dst_BM)
        return rows.pick(dst_BM.gather(1, rows.order_BM), *rows.left_Y)
    assert decision.metric_TK is not None
    columns_BA = prefix + np.arange((rows.kept_B - prefix).max())
    places_BC = rows.kept_B[:, None] + np.arange(rows.left_B.max())
    is_column_BA, is_left_BC = columns_BA < rows.kept_B[:, None], places_BC < np.array(rows.batch.lengths)[:, None]
    images_B1 = np.arange(len(rows.kept_B))[:, None]
    nearest_BC = nearest(
        decision.metric_TK,
        rows.at(images_B1, places_BC.clip(max=rows.keep_BM.shape[1] - 1)),
        rows.at(images_B1, np.broadcast_to(columns_BA, is_column_BA.shape)),
        None if is_column_BA.all() else on_device(~is_column_BA, rows.keep_BM.device),
    ).flatten()
    if not is_left_BC.all():
        nearest_BC = nearest_BC.index_select(0, on_device(np.flatnonzero(is_left_BC), nearest_BC.device))
    return nearest_BC + prefix


def _merge_(y_TD: Tensor, batch: TokenBatch, x_TD: Tensor, rows: RowMap, dst_Y: Tensor) -> Tensor:
    """Make each destination the mean by size of itself and what is merged into it; return sizes, (T',) float32.

    Written as a change of the destinations, so that only what leaves is touched.
    """
    starts_Y = np.array(rows.layout.starts)[rows.left_Y[0]]
    if starts_Y.any():
        dst_Y = dst_Y + on_device(starts_Y, y_TD.device)
    fillers = on_device(rows.layout.fillers, y_TD.device)
    if batch.sizes_T is None:
        sizes_T = y_TD.new_ones(len(y_TD), dtype=torch.float32).index_fill_(0, fillers, 0.0)
        shares_Y = sizes_T.index_add_(0, dst_Y, sizes_T.new_ones(len(dst_Y))).index_select(0, dst_Y)
        shares_Y = shares_Y.reciprocal_()
    else:
        given_Y = batch.sizes_T.index_select(0, rows.before_Y)
        sizes_T = batch.sizes_T.index_select(0, rows.source_T).index_fill_(0, fillers, 0.0)
        shares_Y = given_Y / sizes_T.index_add_(0, dst_Y, given_Y).index_select(0, dst_Y)
    add_changes_(y_TD, x_TD.index_select(0, rows.before_Y), dst_Y, shares_Y)
    return sizes_T


def add_changes_(y_TD: Tensor, left_YD: Tensor, dst_Y: Tensor, shares_Y: Tensor) -> None:
    changes_YD = (left_YD - y_TD.index_select(0, dst_Y)) * shares_Y[:, None].to(y_TD.dtype)
    y_TD.index_add_(0, dst_Y, changes_YD)
