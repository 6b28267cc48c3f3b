"""Rows of packed batches as rectangles, and what is added to the logits of pairs."""

from __future__ import annotations

import pytest
import torch
from tiny import Tolerance
from torch.testing import assert_close
from written_out import DENSE, H, bias_of, every_layout, packed, relative_positions

from vitprune.rectangles import PairBias, Rectangles
from vitprune.tokens import NOBODY

EXACT = Tolerance(rtol=0.0, atol=0.0)


@every_layout
@pytest.mark.parametrize("padded", [True, False])
def test_rectangles_know_whose_rows_they_are(lengths: tuple[int, ...], padded: bool) -> None:
    batch, _, _ = packed(sized=False, lengths=lengths, alignment=4)
    rectangles = Rectangles(batch, padded=padded)
    images_T = batch.layout.images(torch.device("cpu"))
    for images, images_GL in zip(rectangles.images, rectangles.split(images_T), strict=True):
        assert images_GL[:, 0].tolist() == images
        assert (images_GL == images_GL[:, :1]).all()
    assert_close(rectangles.join(rectangles.split(images_T)), images_T, **EXACT)


def test_pairs_go_by_position_and_not_at_all_without_one() -> None:
    bias = relative_positions()
    queries, keys = [3, NOBODY, 0], [5, 3, NOBODY, DENSE - 1]
    ours = PairBias(bias).between(torch.tensor([queries]), torch.tensor([keys]))
    assert ours.shape == (1, H, 3, 4)
    both = bias_of([*queries, *keys], bias)
    assert_close(ours[0], both[:, :3, 3:], **EXACT)
