"""What the dense sequence behind the last block tells thresholds about tokens that were given away.

A patch that was merged holds in the end the state of its taker (`TokenBatch.unpack`). With amount a of what is
given away it holds own + a·(taker − own), which in value is one or the other, and has a gradient for a. A head that
averages patches learns by it what a token of its own would have been worth. A patch that left for good holds the mean
of those that are seen, and learns what its own state would do to that mean. Leaves giving to `departure`.

Shapes: B images, N tokens of one image in the dense sequence, M tokens of an image at a stage, X tokens of the dense
sequence whose carrier is near the threshold, T rows at the end, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitprune.departure import Departure
from vitprune.ghosts import Ghosts
from vitprune.tokens import TokenBatch


@dataclass(frozen=True)
class Gift:
    """What one stage gave away, or nearly did: for each member X of a token near the threshold.

    images_X, members_X: image and index in the dense sequence. amounts_X: 0 in value, with the gradient of the amount.
    takers_X: index in the dense sequence of somebody whom its token's taker stands for.
    leaves_X: bool, whether its token left. ghosts_X: if it did, which of the stage's ghosts it is.
    num_earlier: ghosts of earlier stages, before those of this one.
    """

    images_X: Tensor
    members_X: Tensor
    amounts_X: Tensor
    takers_X: Tensor
    leaves_X: Tensor
    ghosts_X: Tensor
    num_earlier: int


def record(batch: TokenBatch, departure: Departure, num_earlier: int) -> Gift:
    """The gift of a stage, from the batch before it, when there were so many ghosts already."""
    assert departure.teaching is not None
    mask_BM, near_BM = departure.teaching.mask_BM, departure.teaching.near_BM
    positions_BM = batch.positions_BM
    leave_BM = batch.valid_BM & ~departure.keep_BM
    assert departure.takers_BM is not None
    takers_BM = positions_BM.gather(1, departure.takers_BM)
    near_BN = near_BM.gather(1, batch.carriers_BN.clamp(min=0)) & batch.present_BN
    images_X, members_X = near_BN.nonzero(as_tuple=True)
    place = images_X, batch.carriers_BN[images_X, members_X]
    ghosts_BM = departure.linger_BM.flatten().cumsum(0).view_as(near_BM)
    return Gift(
        images_X,
        members_X,
        mask_BM.detach()[place] - mask_BM[place],
        takers_BM[place].clamp(min=0),
        leave_BM[place],
        ghosts_BM[place] - 1,
        num_earlier,
    )


def give_gradients(
    y_BND: Tensor, x_TD: Tensor, ghosts_XD: Tensor | None, batch: TokenBatch, gifts: Sequence[Gift]
) -> Tensor:
    """The dense sequence (B, N, D) unchanged, with the gradients of what was given away.

    ghosts_XD: the ghosts of all stages at the end.
    """
    rows_BN = batch.carrier_rows_BN
    flat, amounts, own_rows, taker_rows = [], [], [], []
    for gift in gifts:
        here = rows_BN[gift.images_X, gift.members_X]
        ghosts = len(x_TD) + gift.num_earlier + gift.ghosts_X
        flat.append(gift.images_X * y_BND.shape[1] + gift.members_X)
        amounts.append(gift.amounts_X)
        own_rows.append(torch.where(gift.leaves_X, ghosts, here))
        taker_rows.append(torch.where(gift.leaves_X, here, rows_BN[gift.images_X, gift.takers_X]))
    states_TD = x_TD.detach() if ghosts_XD is None else torch.cat([x_TD.detach(), ghosts_XD])
    change_XD = states_TD.index_select(0, torch.cat(taker_rows)) - states_TD.index_select(0, torch.cat(own_rows))
    given_XD = (torch.cat(amounts)[:, None] * change_XD).to(y_BND.dtype)
    return y_BND.flatten(0, 1).index_add(0, torch.cat(flat), given_XD).view_as(y_BND)


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
