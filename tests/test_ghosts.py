"""Tokens that leave near their threshold go on beside the others."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from tiny import Tolerance
from torch import Tensor
from torch.testing import assert_close

from vitprune.departure import Departure, Teaching, depart
from vitprune.ghosts import GhostRun, Ghosts, Places, linger
from vitprune.tokens import TokenBatch

EXACT = Tolerance(rtol=0.0, atol=0.0)
IMAGES, TOKENS, PREFIX, WIDTH = 3, 11, 2, 4
# of each image's patches those at the 2nd, 5th, … place leave near the threshold, as far as it goes
NEAR = [[3, 6, 9], [3], []]


def dense() -> tuple[TokenBatch, Tensor]:
    return TokenBatch.dense(IMAGES, TOKENS, PREFIX, torch.device("cpu")), torch.randn(IMAGES * TOKENS, WIDTH)


def departure(batch: TokenBatch, near: list[list[int]]) -> Departure:
    """Some of each image's tokens leave near the threshold, and its last one far from it."""
    near_BM = torch.zeros_like(batch.valid_BM)
    for image, tokens in enumerate(near):
        near_BM[image, tokens] = True
    keep_BM = batch.valid_BM & ~near_BM
    keep_BM[torch.arange(IMAGES), batch.lengths_B - 1] = False
    return Departure(keep_BM, teaching=Teaching(keep_BM.float().requires_grad_(), near_BM))


def first_stage() -> tuple[Ghosts, Tensor, Departure, Tensor]:
    batch, x_TD = dense()
    leaving = departure(batch, NEAR)
    ghosts, states_XD = linger(batch, x_TD, leaving)
    assert ghosts is not None
    assert states_XD is not None
    return ghosts, states_XD, leaving, x_TD


def test_they_are_the_tokens_that_left_near_the_threshold() -> None:
    ghosts, states_XD, leaving, x_TD = first_stage()
    assert ghosts.images_X.tolist() == [0, 0, 0, 1]
    assert ghosts.positions_X.tolist() == [3, 6, 9, 3]
    assert ghosts.bias_X.tolist() == [0.0] * 4
    assert_close(states_XD, x_TD[torch.tensor([3, 6, 9, TOKENS + 3])], **EXACT)
    assert not states_XD.requires_grad
    assert not ghosts.mask_X.any()
    assert leaving.teaching is not None
    (gradient,) = torch.autograd.grad(ghosts.mask_X.sum(), leaving.teaching.mask_BM)
    assert_close(gradient, leaving.teaching.near_BM.float(), **EXACT)


def test_each_stages_are_found_by_image() -> None:
    batch, x_TD = dense()
    leaving = departure(batch, NEAR)
    after, y_TD = depart(batch, x_TD, leaving)
    again = departure(after, [[2], [], [5, 6]])
    ghosts, _ = linger(after, y_TD, again)
    assert ghosts is not None
    assert ghosts.images_X.tolist() == [0, 2, 2]
    assert again.teaching is not None
    (gradient,) = torch.autograd.grad(ghosts.mask_X.sum(), again.teaching.mask_BM)
    assert gradient.sum() == 3
    assert ghosts.everybody.take(ghosts.positions_X, -1.0).tolist() == [[2, -1], [-1, -1], [5, 6]]
    assert ghosts.everybody.is_there_GC.sum(1).tolist() == [1, 0, 2]


def test_nobody_is_a_ghost_where_nobody_left_near_the_threshold() -> None:
    batch, x_TD = dense()
    assert linger(batch, x_TD, departure(batch, [[], [], []])) == (None, None)


def test_in_half_precision_copies_of_the_first_fill_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitprune.layout.HALF_PRECISION_PADDING", 64)
    batch, x_TD = dense()
    ghosts, states_XD = linger(batch, x_TD.bfloat16(), departure(batch, NEAR))
    assert ghosts is not None
    assert states_XD is not None
    assert ghosts.count == 4
    assert len(states_XD) == len(ghosts.images_X) == 64
    assert_close(states_XD[4:], states_XD[:1].expand(60, -1), **EXACT)
    assert ghosts.everybody.is_there_GC.sum() == 4


def test_places_of_some_images_take_and_put_back() -> None:
    images_X = torch.tensor([2, 0, 2, 0, 0, 2, 1])
    values_X = torch.arange(7.0)
    places = Places.of(images_X, 4)
    assert places.take(values_X, -1.0).tolist() == [[1, 3, 4], [6, -1, -1], [0, 2, 5], [-1, -1, -1]]
    pairs_X2 = torch.stack([values_X, -values_X], 1)
    assert places.take(pairs_X2, 0.5)[1].tolist() == [[6, -6], [0.5, 0.5], [0.5, 0.5]]
    some = places.of_images([3, 1])
    assert some.take(values_X, -1.0).tolist() == [[-1], [6]]
    assert places.of_images([3]).index_GC.shape == (1, 0)
    back_X = torch.full((7,), -1.0)
    places.of_images([2, 0]).put_(back_X, places.of_images([2, 0]).take(10 * values_X))
    assert back_X.tolist() == [0, 10, 20, 30, 40, 50, -1]


def test_their_turn_is_without_gradient_and_ends() -> None:
    ghosts, states_XD, _, _ = first_stage()
    run = GhostRun(ghosts, states_XD, ends=False)
    run.draws.append(torch.ones(IMAGES))
    with suppress(KeyError), run.running():
        assert run.is_on
        assert not torch.is_grad_enabled()
        raise KeyError
    assert not run.is_on
    assert not run.draws
    assert torch.is_grad_enabled()
