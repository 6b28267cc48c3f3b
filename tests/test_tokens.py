"""Padded views of a packed batch."""

from __future__ import annotations

import pytest
import torch
from tiny import Tolerance
from torch.testing import assert_close

from vitprune.layout import Layout
from vitprune.tokens import TokenBatch

EXACT = Tolerance(rtol=0.0, atol=0.0)
WIDTH = 3
# no fillers, few, and more than tokens
every_alignment = pytest.mark.parametrize("alignment", [1, 4, 16])


@every_alignment
@pytest.mark.parametrize("lengths", [(4, 4, 4), (5, 2, 7), (3,)])
def test_a_padded_view_holds_each_images_own_tokens(lengths: tuple[int, ...], alignment: int) -> None:
    layout, longest = Layout(lengths, alignment), max(lengths)
    total = sum(layout.rows)
    batch = TokenBatch(layout, 1, torch.zeros(total), None, torch.zeros(len(lengths), 1))
    values_TD, images_T = torch.randn(total, WIDTH), layout.images(torch.device("cpu"))
    padded_view = batch.pad(values_TD)
    assert padded_view.shape == (len(lengths), longest, WIDTH)
    assert torch.equal(batch.pad(images_T), torch.arange(len(lengths))[:, None].expand(-1, longest))
    for image, (start, length) in enumerate(zip(layout.starts, lengths, strict=True)):
        assert batch.valid_BM[image].tolist() == [i < length for i in range(longest)]
        assert_close(padded_view[image, :length], values_TD[start : start + length], **EXACT)
