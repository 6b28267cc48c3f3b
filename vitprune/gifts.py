"""What the dense sequence behind the last block tells thresholds about tokens that were given away.

A patch that was merged or fused holds in the end the state of its taker (`TokenBatch.unpack`). With amount a of what is
given away it holds own + a·(taker − own), which in value is one or the other, and has a gradient for a. A head that
averages patches learns by it what a token of its own would have been worth. Leaves giving to `departure`.

Shapes: B images, N tokens of one image in the dense sequence, M tokens of an image at a stage, X tokens of the dense
sequence whose carrier is near the threshold, T rows at the end, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitprune.departure import Departure
from vitprune.tokens import NOBODY, TokenBatch


@dataclass(frozen=True)
class Gift:
    """What one stage gave away, or nearly did: for each member X of a token near the threshold.

    images_X, members_X: image and index in the dense sequence. amounts_X: 0 in value, with the gradient of the amount.
    takers_X: index in the dense sequence of somebody whom its token's taker stands for.
    leaves_X: bool, whether its token left. ghosts_X: if it did, which of the ghosts of its image at this stage it is.
    counts_B: the stage's ghosts of each image.
    """

    images_X: Tensor
    members_X: Tensor
    amounts_X: Tensor
    takers_X: Tensor
    leaves_X: Tensor
    ghosts_X: Tensor
    counts_B: Tensor


def record(batch: TokenBatch, departure: Departure) -> Gift:
    """The gift of a stage, from the batch before it."""
    assert departure.teaching is not None
    mask_BM, near_BM = departure.teaching.mask_BM, departure.teaching.near_BM
    positions_BM = batch.pad(batch.positions_T)
    leave_BM = batch.valid_BM & ~departure.keep_BM
    if departure.takers_BM is not None:
        takers_BM = positions_BM.gather(1, departure.takers_BM)
    else:  # `fuse`: the first that was fused and has a place in the dense sequence
        first_B1 = (leave_BM & (positions_BM != NOBODY)).int().argmax(1, keepdim=True)
        takers_BM = positions_BM.gather(1, first_B1).expand_as(positions_BM)
        near_BM = near_BM & leave_BM.gather(1, first_B1)
    near_BN = near_BM.gather(1, batch.carriers_BN.clamp(min=0)) & batch.present_BN
    images_X, members_X = near_BN.nonzero(as_tuple=True)
    place = images_X, batch.carriers_BN[images_X, members_X]
    assert departure.linger_BM is not None
    ghosts_BM = departure.linger_BM.cumsum(1)
    return Gift(
        images_X,
        members_X,
        mask_BM.detach()[place] - mask_BM[place],
        takers_BM[place].clamp(min=0),
        leave_BM[place],
        ghosts_BM[place] - 1,
        ghosts_BM[:, -1],
    )


def give_gradients(y_BND: Tensor, x_TD: Tensor, batch: TokenBatch, gifts: Sequence[Gift]) -> Tensor:
    """The dense sequence (B, N, D) unchanged, with the gradients of what was given away.

    batch: at the end, where the ghosts of all stages are still there, those of the last stage first.
    """
    rows_BN = batch.carrier_rows_BN
    first_ghosts_B = batch.starts_B + batch.lengths_B
    flat, amounts, own_rows, taker_rows = [], [], [], []
    for gift in reversed(gifts):
        here = rows_BN[gift.images_X, gift.members_X]
        ghosts = first_ghosts_B.index_select(0, gift.images_X) + gift.ghosts_X
        first_ghosts_B = first_ghosts_B + gift.counts_B
        flat.append(gift.images_X * y_BND.shape[1] + gift.members_X)
        amounts.append(gift.amounts_X)
        own_rows.append(torch.where(gift.leaves_X, ghosts, here))
        taker_rows.append(torch.where(gift.leaves_X, here, rows_BN[gift.images_X, gift.takers_X]))
    states_TD = x_TD.detach()
    change_XD = states_TD.index_select(0, torch.cat(taker_rows)) - states_TD.index_select(0, torch.cat(own_rows))
    given_XD = (torch.cat(amounts)[:, None] * change_XD).to(y_BND.dtype)
    return y_BND.flatten(0, 1).index_add(0, torch.cat(flat), given_XD).view_as(y_BND)
