"""Rows of packed batches as rectangles."""

from __future__ import annotations

import pytest
import torch
from tiny import Tolerance
from torch.testing import assert_close
from written_out import every_layout, packed

from vitprune.pruning.packed.attention import Rectangles

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
