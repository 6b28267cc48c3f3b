"""Tokens that leave near their threshold go on beside the others."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from tiny import Tolerance
from torch import Tensor
from torch.testing import assert_close

from vitprune.pruning.learning.attention import BorderlinePass
from vitprune.pruning.learning.borderline import BorderlineTokens, Places, split_borderline
from vitprune.pruning.learning.packed import reduce_softly
from vitprune.pruning.learning.soft_mask import SoftMask
from vitprune.pruning.selection import Decision
from vitprune.pruning.token_batch import TokenBatch

EXACT = Tolerance(rtol=0.0, atol=0.0)
IMAGES, TOKENS, PREFIX, WIDTH = 3, 11, 2, 4
# of each image's patches those at the 2nd, 5th, … place leave near the threshold, as far as it goes
NEAR = [[3, 6, 9], [3], []]


def dense() -> tuple[TokenBatch, Tensor]:
    return TokenBatch.dense(IMAGES, TOKENS, PREFIX, torch.device("cpu")), torch.randn(IMAGES * TOKENS, WIDTH)


def stage(batch: TokenBatch, near: list[list[int]]) -> tuple[Tensor, SoftMask]:
    """Some of each image's tokens leave near the threshold, and its last one far from it."""
    near_BM = torch.zeros_like(batch.valid_BM)
    for image, tokens in enumerate(near):
        near_BM[image, tokens] = True
    keep_BM = batch.valid_BM & ~near_BM
    keep_BM[torch.arange(IMAGES), batch.lengths_B - 1] = False
    return keep_BM, SoftMask(keep_BM.float().requires_grad_(), near_BM)


def first_stage() -> tuple[BorderlineTokens, Tensor, SoftMask, Tensor]:
    batch, x_TD = dense()
    keep_BM, soft = stage(batch, NEAR)
    tokens, states_XD = split_borderline(batch, x_TD, keep_BM, soft)
    assert tokens is not None
    assert states_XD is not None
    return tokens, states_XD, soft, x_TD


def test_they_are_the_tokens_that_left_near_the_threshold() -> None:
    tokens, states_XD, soft, x_TD = first_stage()
    assert tokens.images_X.tolist() == [0, 0, 0, 1]
    assert tokens.positions_X.tolist() == [3, 6, 9, 3]
    assert tokens.bias_X.tolist() == [0.0] * 4
    assert_close(states_XD, x_TD[torch.tensor([3, 6, 9, TOKENS + 3])], **EXACT)
    assert not states_XD.requires_grad
    assert not tokens.mask_X.any()
    (gradient,) = torch.autograd.grad(tokens.mask_X.sum(), soft.mask_BM)
    assert_close(gradient, soft.near_BM.float(), **EXACT)


def test_each_stages_are_found_by_image() -> None:
    batch, x_TD = dense()
    keep_BM, soft = stage(batch, NEAR)
    after, y_TD = reduce_softly(batch, x_TD, Decision(keep_BM), soft)
    keep_BM, again = stage(after, [[2], [], [5, 6]])
    tokens, _ = split_borderline(after, y_TD, keep_BM, again)
    assert tokens is not None
    assert tokens.images_X.tolist() == [0, 2, 2]
    (gradient,) = torch.autograd.grad(tokens.mask_X.sum(), again.mask_BM)
    assert gradient.sum() == 3
    assert tokens.places.take(tokens.positions_X, -1.0).tolist() == [[2, -1], [-1, -1], [5, 6]]
    assert tokens.places.is_there_GC.sum(1).tolist() == [1, 0, 2]


def test_there_are_none_where_none_left_near_the_threshold() -> None:
    batch, x_TD = dense()
    assert split_borderline(batch, x_TD, *stage(batch, [[], [], []])) == (None, None)


def test_in_half_precision_copies_of_the_first_fill_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitprune.pruning.layout.HALF_PRECISION_PADDING", 64)
    batch, x_TD = dense()
    tokens, states_XD = split_borderline(batch, x_TD.bfloat16(), *stage(batch, NEAR))
    assert tokens is not None
    assert states_XD is not None
    assert tokens.count == 4
    assert len(states_XD) == len(tokens.images_X) == 64
    assert_close(states_XD[4:], states_XD[:1].expand(60, -1), **EXACT)
    assert tokens.places.is_there_GC.sum() == 4


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
    tokens, states_XD, _, _ = first_stage()
    run = BorderlinePass(tokens, states_XD, ends=False)
    run.draws.append(torch.ones(IMAGES))
    with suppress(KeyError), run.running():
        assert run.is_on
        assert not torch.is_grad_enabled()
        raise KeyError
    assert not run.is_on
    assert not run.draws
    assert torch.is_grad_enabled()
