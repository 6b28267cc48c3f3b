"""How tokens leave a packed batch: those that stay move together, the others are left or merged.

Knows what becomes of hidden states, sizes and carriers; leaves to `stage` who leaves and to whom, and to `ghosts` those
that leave near their threshold in a training pass. What is given away there has the gradient of 1 − m.

Shapes: B images, N tokens of one image in the dense sequence, T rows before and T' after the stage, M tokens of the
longest image before it, D width, X tokens that a mask names, in the order of their images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vitprune import cpu_stage
from vitprune.layout import Layout, on_device, ranges
from vitprune.scoring import nearest
from vitprune.tokens import NOBODY, Known, Learning, Origin, TokenBatch


@dataclass(frozen=True)
class Teaching:
    """What a threshold learns from at a stage.

    mask_BM: 0/1 with the gradient of the straight-through mask.
    near_BM: bool, tokens near enough to the threshold for that gradient to matter.
    """

    mask_BM: Tensor
    near_BM: Tensor


@dataclass(frozen=True)
class Departure:
    """Who leaves at a stage and who takes over. Tokens are numbered within their image.

    keep_BM: bool, tokens that stay; False where there is none.
    takers_BM: for a token that leaves, the token that stays and takes it in (`merge`).
    metric_TK: `merge` where the takers are still to be found: the most similar patch that stays. None: `leave`.
    teaching: in training, with takers also for those that stay; None in inference.
    kept: tokens that each image keeps, where the host knows already.
    """

    keep_BM: Tensor
    takers_BM: Tensor | None = None
    metric_TK: Tensor | None = None
    teaching: Teaching | None = None
    kept: tuple[int, ...] | None = None

    @property
    def leaves(self) -> bool:
        """Whether what leaves is gone for good."""
        return self.takers_BM is None and self.metric_TK is None

    @property
    def linger_BM(self) -> Tensor:
        """bool, tokens that leave near their threshold; asked for in training alone."""
        assert self.teaching is not None
        return self.teaching.near_BM & ~self.keep_BM


def depart(batch: TokenBatch, x_TD: Tensor, departure: Departure) -> tuple[TokenBatch, Tensor]:
    """Removes tokens from a packed batch; returns the new batch and its hidden states (T', D).

    Where nothing leaves, the batch and the states themselves; but in training, where thresholds may learn from it.
    """
    teaching, leaves = departure.teaching, departure.leaves
    kept = departure.kept or tuple(departure.keep_BM.sum(1).tolist())
    if kept == batch.lengths and teaching is None:
        return batch, x_TD
    if batch.loops and departure.metric_TK is None:
        return _depart_in_loops(batch, x_TD, departure, Layout.fitting(kept, x_TD))
    move = _Move(batch, departure.keep_BM, Layout.fitting(kept, x_TD, learns=teaching is not None))
    y_TD = x_TD.index_select(0, move.source_T)
    sizes_T = learning = learns_T = None
    takers_Y = None if leaves else _takers(departure, move)
    if takers_Y is not None:
        if teaching is None:
            sizes_T = _merge_(y_TD, batch, x_TD, move, takers_Y)
        else:
            y_TD, sizes_T, learns_T = _give(batch, x_TD, y_TD, departure, teaching, move)
    if teaching is not None:
        learning = _learning(departure, teaching, move, learns_T)
    after = replace(
        batch,
        layout=move.layout,
        sizes_T=sizes_T,
        origin=_Moved(batch.origin, move, takers_Y, batch.has_carriers),
        learning=learning,
        has_carriers=batch.has_carriers and not leaves,
    )
    return after, y_TD


def _depart_in_loops(
    batch: TokenBatch, x_TD: Tensor, departure: Departure, layout: Layout
) -> tuple[TokenBatch, Tensor]:
    known = batch.positions_T, batch.sizes_T, batch.carriers_BN, departure.keep_BM, departure.takers_BM
    y_TD, positions_T, sizes_T, carriers_BN = cpu_stage.depart(x_TD, *known, batch.layout, layout)
    origin, has_carriers = Known(positions_T, carriers_BN), batch.has_carriers and not departure.leaves
    return replace(batch, layout=layout, sizes_T=sizes_T, origin=origin, has_carriers=has_carriers), y_TD


@dataclass(frozen=True)
class _Move:
    """Which token becomes which row after the stage.

    Lists X of tokens that stay and Y of those that leave go image by image. Which numbers they have, once each image's
    tokens are in order, those that stay first, the host knows.
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

    def rows(self, images: np.ndarray, places: np.ndarray) -> Tensor:
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
        return self.rows(*ranges(self.kept_B))

    @cached_property
    def before_Y(self) -> Tensor:
        """Row before the stage of each token that leaves."""
        return self.rows(*self.left_Y)

    @cached_property
    def after_X(self) -> Tensor:
        """Row after the stage of each token that stays."""
        images_X, slots_X = ranges(self.kept_B)
        return on_device(np.array(self.layout.starts)[images_X] + slots_X, self.keep_BM.device)

    @cached_property
    def source_T(self) -> Tensor:
        """Row before the stage that each row after it is a copy of; a filler's is its image's first."""
        return self.rows(*self.layout.slot_of_row_T)

    def slots(self, takers_Y: Tensor | None) -> Tensor:
        """Which of its image's tokens each token is or becomes part of, (B, M); `NOBODY` where it is gone for good."""
        images, tokens = self.keep_BM.shape
        slots_BM = np.tile(np.arange(tokens), (images, 1))
        if takers_Y is None:
            slots_BM[slots_BM >= self.kept_B[:, None]] = NOBODY
        ordered_BM = on_device(slots_BM, self.keep_BM.device)
        if takers_Y is not None:
            images_Y, places_Y = self.left_Y
            places = on_device(images_Y * tokens + places_Y, self.keep_BM.device)
            ordered_BM = ordered_BM.flatten().index_copy(0, places, takers_Y).view_as(self.order_BM)
        return torch.empty_like(self.order_BM).scatter(1, self.order_BM, ordered_BM)

    def put(self, values_X: Tensor, default: float) -> Tensor:
        """Values at rows after the stage, and elsewhere `default`."""
        return values_X.new_full((self.layout.num_rows,), default).index_copy(0, self.after_X, values_X)


@dataclass(frozen=True)
class _Moved:
    """Where tokens come from after a stage. takers_Y: None where those that left are gone for good."""

    before: Origin
    move: _Move
    takers_Y: Tensor | None
    had_carriers: bool

    @property
    def positions_T(self) -> Tensor:
        return self._positions_T

    @property
    def carriers_BN(self) -> Tensor:
        return self._carriers_BN

    @cached_property
    def _positions_T(self) -> Tensor:
        positions_T = self.before.positions_T.index_select(0, self.move.source_T)
        return positions_T.index_fill_(0, on_device(self.move.layout.fillers, positions_T.device), NOBODY)

    @cached_property
    def _carriers_BN(self) -> Tensor:
        carriers_BN, slots_BM = self.before.carriers_BN, self.move.slots(self.takers_Y)
        if self.had_carriers:
            return slots_BM.gather(1, carriers_BN)
        return slots_BM.gather(1, carriers_BN.clamp(min=0)).masked_fill_(carriers_BN == NOBODY, NOBODY)


def _takers(departure: Departure, move: _Move) -> Tensor:
    """Which of its image's tokens after the stage takes each leaving token in, (Y,)."""
    prefix = move.batch.num_prefix_tokens
    if departure.takers_BM is not None:
        takers_BM = move.slots(None).gather(1, departure.takers_BM)
        return move.pick(takers_BM.gather(1, move.order_BM), *move.left_Y)
    assert departure.metric_TK is not None
    columns_BA = prefix + np.arange((move.kept_B - prefix).max())
    places_BC = move.kept_B[:, None] + np.arange(move.left_B.max())
    is_column_BA, is_left_BC = columns_BA < move.kept_B[:, None], places_BC < np.array(move.batch.lengths)[:, None]
    images_B1 = np.arange(len(move.kept_B))[:, None]
    nearest_BC = nearest(
        departure.metric_TK,
        move.rows(images_B1, places_BC.clip(max=move.keep_BM.shape[1] - 1)),
        move.rows(images_B1, np.broadcast_to(columns_BA, is_column_BA.shape)),
        None if is_column_BA.all() else on_device(~is_column_BA, move.keep_BM.device),
    ).flatten()
    if not is_left_BC.all():
        nearest_BC = nearest_BC.index_select(0, on_device(np.flatnonzero(is_left_BC), nearest_BC.device))
    return nearest_BC + prefix


def _merge_(y_TD: Tensor, batch: TokenBatch, x_TD: Tensor, move: _Move, takers_Y: Tensor) -> Tensor:
    """Makes takers the mean by size of themselves and whom they take in; returns sizes, (T',) float32.

    Written as a change of the takers, so that only what leaves is touched.
    """
    starts_Y = np.array(move.layout.starts)[move.left_Y[0]]
    if starts_Y.any():
        takers_Y = takers_Y + on_device(starts_Y, y_TD.device)
    fillers = on_device(move.layout.fillers, y_TD.device)
    if batch.sizes_T is None:
        sizes_T = y_TD.new_ones(len(y_TD), dtype=torch.float32).index_fill_(0, fillers, 0.0)
        shares_Y = sizes_T.index_add_(0, takers_Y, sizes_T.new_ones(len(takers_Y))).index_select(0, takers_Y)
        shares_Y = shares_Y.reciprocal_()
    else:
        given_Y = batch.sizes_T.index_select(0, move.before_Y)
        sizes_T = batch.sizes_T.index_select(0, move.source_T).index_fill_(0, fillers, 0.0)
        shares_Y = given_Y / sizes_T.index_add_(0, takers_Y, given_Y).index_select(0, takers_Y)
    _add_changes_(y_TD, x_TD.index_select(0, move.before_Y), takers_Y, shares_Y)
    return sizes_T


def _add_changes_(y_TD: Tensor, left_YD: Tensor, takers_Y: Tensor, shares_Y: Tensor) -> None:
    changes_YD = (left_YD - y_TD.index_select(0, takers_Y)) * shares_Y[:, None].to(y_TD.dtype)
    y_TD.index_add_(0, takers_Y, changes_YD)


def _give(
    batch: TokenBatch, x_TD: Tensor, y_TD: Tensor, departure: Departure, teaching: Teaching, move: _Move
) -> tuple[Tensor, Tensor, Tensor]:
    """`_merge_` in training: those that stay give nothing, but with a gradient. Also returns whose sizes learn."""
    assert departure.takers_BM is not None
    gives_BM = (batch.valid_BM ^ departure.keep_BM) | teaching.near_BM
    places_Y = gives_BM.flatten().nonzero().squeeze(1)
    takers_BM = move.layout.rows_of(move.slots(None)).gather(1, departure.takers_BM)
    left, takers = batch.rows_at(places_Y), takers_BM.flatten().index_select(0, places_Y)
    old_sizes_T = batch.sizes_T if batch.sizes_T is not None else x_TD.new_ones(len(x_TD), dtype=torch.float32)
    given = old_sizes_T.index_select(0, left) * (1 - teaching.mask_BM[gives_BM])
    sizes_T = move.put(old_sizes_T.index_select(0, move.before_X), 0.0).index_add_(0, takers, given)
    _add_changes_(y_TD, x_TD.index_select(0, left), takers, given / sizes_T.index_select(0, takers))
    learns_T = torch.zeros(len(y_TD), dtype=torch.bool, device=y_TD.device)
    learns_T[takers[teaching.near_BM[gives_BM]]] = True
    if batch.learning is not None:  # whose size learned goes on to, and so does who takes it in
        learns_T[move.after_X[batch.learning.learns_T.index_select(0, move.before_X)]] = True
        learns_T[takers[batch.learning.learns_T.index_select(0, left)]] = True
    return y_TD, sizes_T, learns_T


def _learning(departure: Departure, teaching: Teaching, move: _Move, learns_T: Tensor | None) -> Learning:
    near_X = teaching.near_BM[departure.keep_BM]
    if learns_T is not None:
        near_X = near_X | learns_T.index_select(0, move.after_X)
    return Learning(
        move.put(teaching.mask_BM[departure.keep_BM], 1.0),
        (near_X.new_zeros(move.layout.num_rows) if learns_T is None else learns_T).index_copy(0, move.after_X, near_X),
    )
