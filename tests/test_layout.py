"""How images lie in a packed batch."""

from __future__ import annotations

import torch
from tiny import Tolerance
from torch.testing import assert_close

from vitprune.layout import HALF_PRECISION_ROWS, KEY_ALIGNMENT, Layout

EXACT = Tolerance(rtol=0.0, atol=0.0)
WIDTH = 3


def test_buckets_are_views_of_images_of_as_many_rows() -> None:
    layout = Layout((5, 2, 7, 9, 4), alignment=4, row_multiple=16)
    assert layout.buckets == [(2, 4), (2, 8), (1, 12)]
    assert layout.order == [1, 4, 0, 2, 3]
    assert layout.starts == [8, 0, 16, 24, 4]
    assert layout.padding == 12
    values_TD = torch.randn(48, WIDTH)
    buckets = layout.split(values_TD)
    assert [bucket.shape for bucket in buckets] == [(*bucket, WIDTH) for bucket in layout.buckets]
    assert all(bucket.untyped_storage().data_ptr() == values_TD.untyped_storage().data_ptr() for bucket in buckets)
    joined = layout.join(buckets)
    assert_close(joined[:36], values_TD[:36], **EXACT)
    assert_close(joined[36:], torch.zeros(12, WIDTH), **EXACT)


def test_fillers_are_weighed_against_calls() -> None:
    """Narrow models take fewer calls, wide ones fewer fillers; never less than the kernel likes."""
    lengths, alignments = range(100, 164), []
    for width in (8, 96, 384, 1024):
        layout = Layout.fitting(lengths, torch.zeros(1, width))
        assert all(
            rows % layout.alignment == 0 and rows >= length for rows, length in zip(layout.rows, lengths, strict=True)
        )
        alignments.append(layout.alignment)
    assert alignments == sorted(alignments, reverse=True)
    assert alignments[0] > alignments[-1] == KEY_ALIGNMENT


def test_training_takes_fewer_calls() -> None:
    x_TD = torch.zeros(1, 384)
    inference, training = (Layout.fitting(range(100, 164), x_TD, learns=learns) for learns in (False, True))
    assert len(training.buckets) < len(inference.buckets)


def test_in_half_precision_shapes_are_few_and_little_is_padded() -> None:
    shapes = set[int]()
    for length in range(32, 5000):
        layout = Layout.fitting((length,), torch.zeros(1, 384, dtype=torch.bfloat16))
        rows = sum(layout.rows) + layout.padding
        assert rows - sum(layout.rows) <= length / 32
        assert rows % HALF_PRECISION_ROWS == 0 or length < 32 * HALF_PRECISION_ROWS
        shapes.add(rows)
    # for each doubling 16 to 32, and every 64th above
    assert len(shapes) < 5 * 32 + 5000 // HALF_PRECISION_ROWS
