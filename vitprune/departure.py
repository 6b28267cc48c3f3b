"""How tokens leave a packed batch: those that stay move together, the others are left or merged.

Knows what becomes of hidden states, sizes and carriers; leaves to `stage` who leaves and to whom, and to `ghosts` those
that leave near their threshold in a training pass. What is given away there has the gradient of 1 − m.

Shapes: B images, N tokens of one image in the dense sequence, T rows before and T' after the stage, M tokens of the
longest image before it, D width, X tokens that a mask names, in the order of their images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vitprune import cpu_stage
from vitprune.layout import Layout
from vitprune.tokens import NOBODY, Learning, TokenBatch


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
    takers_BM: for a token that leaves, the token that stays and takes it in (`merge`); None for `leave`.
    teaching: in training; None in inference.
    kept: how many tokens of each image stay, where the host knows already.
    """

    keep_BM: Tensor
    takers_BM: Tensor | None = None
    teaching: Teaching | None = None
    kept: tuple[int, ...] | None = None

    @property
    def leaves(self) -> bool:
        """Whether what leaves is gone for good."""
        return self.takers_BM is None

    @property
    def linger_BM(self) -> Tensor:
        """bool, tokens that leave near their threshold; asked for in training alone."""
        assert self.teaching is not None
        return self.teaching.near_BM & ~self.keep_BM


@dataclass(frozen=True)
class _Move:
    """Which row before becomes which row after.

    slots_BM: which of its image's tokens each token is or becomes part of; `NOBODY` where it is gone for good.
    rows_BM: row after the stage of that token.
    before_X, after_X: rows of those that stay.
    """

    layout: Layout
    slots_BM: Tensor
    rows_BM: Tensor
    before_X: Tensor
    after_X: Tensor

    def take_along(self, values_T: Tensor, default: float) -> Tensor:
        """What each row after the stage has of what was known of it before, (T',); rows that are new have `default`."""
        return self.put(values_T.index_select(0, self.before_X), default)

    def put(self, values_X: Tensor, default: Tensor | float) -> Tensor:
        """Values at rows after the stage, and elsewhere `default`."""
        rows = self.layout.num_rows
        if isinstance(default, Tensor):
            return default.index_copy(0, self.after_X, values_X)
        if len(self.layout.lengths) == 1:  # then they are the first rows
            return F.pad(values_X, (0, rows - len(values_X)), value=default) if rows > len(values_X) else values_X
        return values_X.new_full((rows,), default).index_copy_(0, self.after_X, values_X)


def depart(batch: TokenBatch, x_TD: Tensor, departure: Departure) -> tuple[TokenBatch, Tensor]:
    """Removes tokens from a packed batch; returns the new batch and its hidden states (T', D).

    Where nothing leaves, the batch and the states themselves; but in training, where thresholds may learn from it.
    """
    if departure.teaching is None and cpu_stage.can_loop(x_TD):
        return _depart_in_loops(batch, x_TD, departure)
    move = _plan(batch, x_TD, departure)
    if move is None:
        return batch, x_TD
    positions_T = move.take_along(batch.positions_T, NOBODY)
    y_TD = x_TD.index_select(0, _sources(batch, move))
    sizes_T = learns_T = None
    if not departure.leaves:
        y_TD, sizes_T, learns_T = _give(batch, x_TD, y_TD, departure, move)
    carriers_BN = _redirect(batch, move.slots_BM, departure)
    learning = None if departure.teaching is None else _learning(departure, departure.teaching, move, learns_T)
    has_carriers = batch.has_carriers and not departure.leaves
    after = TokenBatch(move.layout, batch.num_prefix_tokens, positions_T, sizes_T, carriers_BN, learning, has_carriers)
    return after, y_TD


def _depart_in_loops(batch: TokenBatch, x_TD: Tensor, departure: Departure) -> tuple[TokenBatch, Tensor]:
    kept = departure.kept or tuple(departure.keep_BM.sum(1).tolist())
    if kept == batch.lengths:
        return batch, x_TD
    layout = Layout.fitting(kept, x_TD)
    known = batch.positions_T, batch.sizes_T, batch.carriers_BN, departure.keep_BM, departure.takers_BM
    y_TD, positions_T, sizes_T, carriers_BN = cpu_stage.depart(x_TD, *known, batch.layout, layout)
    has_carriers = batch.has_carriers and not departure.leaves
    return TokenBatch(layout, batch.num_prefix_tokens, positions_T, sizes_T, carriers_BN, None, has_carriers), y_TD


def _sources(batch: TokenBatch, move: _Move) -> Tensor:
    """Row before the stage that each row after it is a copy of, (T',).

    A filler is a copy of its image's first.
    """
    if len(batch.lengths) == 1:
        return move.put(move.before_X, 0)
    return move.put(move.before_X, move.layout.spread(batch.layout.starts, move.before_X.device))


def _plan(batch: TokenBatch, x_TD: Tensor, departure: Departure) -> _Move | None:
    """None where nothing leaves and nothing is learned."""
    counts_BM = departure.keep_BM.cumsum(1)
    kept = counts_BM[:, -1].tolist()
    if tuple(kept) == batch.lengths and departure.teaching is None:
        return None
    layout = Layout.fitting(kept, x_TD, learns=departure.teaching is not None)
    slots_BM = _destinations(departure, counts_BM - 1)
    rows_BM = layout.rows_of(slots_BM)
    return _Move(layout, slots_BM, rows_BM, *_select(batch, rows_BM, departure.keep_BM, sum(kept)))


def _destinations(departure: Departure, slots_BM: Tensor) -> Tensor:
    """Which of its image's tokens each token is or becomes part of, (B, M); slots_BM: of those that stay."""
    keep_BM, takers_BM = departure.keep_BM, departure.takers_BM
    if takers_BM is not None:
        return torch.where(keep_BM, slots_BM, slots_BM.gather(1, takers_BM))
    return torch.where(keep_BM, slots_BM, NOBODY)


def _give(
    batch: TokenBatch, x_TD: Tensor, y_TD: Tensor, departure: Departure, move: _Move
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hands tokens that leave to their takers; returns hidden states, sizes and, in training, whose sizes learn."""
    gives_BM, takers_BM, teaching = batch.valid_BM ^ departure.keep_BM, move.rows_BM, departure.teaching
    if teaching is not None:  # those that stay give nothing, but with a gradient
        assert departure.takers_BM is not None
        gives_BM, takers_BM = gives_BM | teaching.near_BM, move.rows_BM.gather(1, departure.takers_BM)
    leave = sum(batch.lengths) - len(move.before_X) if teaching is None else None
    left, takers = _select(batch, takers_BM, gives_BM, leave)
    old_sizes_T = batch.sizes_T if batch.sizes_T is not None else x_TD.new_ones(len(x_TD), dtype=torch.float32)
    given = old_sizes_T.index_select(0, left)
    amounts = None if teaching is None else 1 - teaching.mask_BM[gives_BM]
    if amounts is not None:
        given = given * amounts
    sizes_T = move.take_along(old_sizes_T, 0.0).index_add_(0, takers, given)
    states = x_TD.index_select(0, left)
    _merge_(y_TD, states, takers, given / sizes_T.index_select(0, takers))
    if teaching is None:
        return y_TD, sizes_T, None
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


def _select(batch: TokenBatch, rows_BM: Tensor, mask_BM: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """Of the tokens in a mask the rows before a stage, and those of them that `rows_BM` names.

    count: how many they are, if the host knows; else it asks the device.
    """
    mask_X = mask_BM.flatten()
    places_X = (mask_X.nonzero() if count is None else mask_X.nonzero_static(size=count)).squeeze(1)
    return batch.rows_at(places_X), rows_BM.flatten().index_select(0, places_X)


def _merge_(y_TD: Tensor, left: Tensor, takers: Tensor, shares: Tensor) -> None:
    """Makes takers the mean by size; written as a change of theirs, so that only what leaves is touched."""
    y_TD.index_add_(0, takers, (left - y_TD.index_select(0, takers)) * shares[:, None].to(y_TD.dtype))


def _redirect(batch: TokenBatch, slots_BM: Tensor, departure: Departure) -> Tensor:
    carriers_BN = batch.carriers_BN
    if batch.has_carriers and not departure.leaves:
        return slots_BM.gather(1, carriers_BN)
    return slots_BM.gather(1, carriers_BN.clamp(min=0)).masked_fill_(carriers_BN == NOBODY, NOBODY)
