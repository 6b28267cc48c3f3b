"""How images lie in a packed batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import Tolerance
from torch.testing import assert_close

from vitprune.pruning.layout import HALF_PRECISION_ROWS, KEY_ALIGNMENT, TILE_KEY_ALIGNMENT, Layout, on_device, ranges

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
    assert alignments[0] == 8 * KEY_ALIGNMENT
    assert alignments[-1] == KEY_ALIGNMENT


def test_training_takes_fewer_calls() -> None:
    x_TD = torch.zeros(1, 384)
    inference, training = (Layout.fitting(range(100, 164), x_TD, learns=learns) for learns in (False, True))
    assert len(training.buckets) < len(inference.buckets)


def test_in_half_precision_shapes_are_few_and_little_is_padded() -> None:
    shapes = set[int]()
    for length in range(32, 5000):
        layout = Layout.fitting((length,), torch.zeros(1, 384, dtype=torch.bfloat16))
        rows = layout.num_rows
        # an image alone has all rows as its own
        assert (layout.rows, layout.padding) == ([rows], 0)
        assert rows - length < max(TILE_KEY_ALIGNMENT, length / 32 + 1)
        assert rows % HALF_PRECISION_ROWS == 0 or length < 32 * HALF_PRECISION_ROWS
        shapes.add(rows)
    # for each doubling 16 to 32, and every 64th above
    assert len(shapes) < 5 * 32 + 5000 // HALF_PRECISION_ROWS


def test_in_half_precision_little_is_padded_behind_several_images() -> None:
    for length in range(32, 5000, 7):
        layout = Layout.fitting((length, length // 2), torch.zeros(1, 384, dtype=torch.bfloat16))
        assert layout.padding <= sum(layout.lengths) / 32
        assert layout.num_rows % HALF_PRECISION_ROWS == 0 or length < 32 * HALF_PRECISION_ROWS


# --- index maps ---

every_map = pytest.mark.parametrize(
    ("lengths", "alignment", "row_multiple"),
    [((5, 2, 7, 9, 4), 4, 16), ((5, 2, 7, 9, 4), 1, 1), ((3, 3), 1, 1), ((3, 3), 4, 16), ((2, 4), 1, 1), ((6,), 4, 1)],
    ids=str,
)


def tokens_in_rows(layout: Layout) -> list[tuple[int, int] | None]:
    """Image and number of each row's token; None for a filler. Written out from the layout's description."""
    rows: list[tuple[int, int] | None] = []
    heights = [length + -length % layout.alignment for length in layout.lengths]
    for image in sorted(range(len(heights)), key=lambda i: heights[i]):
        own = [(image, slot) for slot in range(layout.lengths[image])]
        rows += [*own, *[None] * (heights[image] - len(own))]
    return rows + [None] * (-len(rows) % layout.row_multiple)


@every_map
def test_maps_say_where_tokens_are(lengths: tuple[int, ...], alignment: int, row_multiple: int) -> None:
    layout, longest = Layout(lengths, alignment, row_multiple), max(lengths)
    rows = tokens_in_rows(layout)
    assert layout.num_rows == len(rows)
    assert layout.fillers.tolist() == [row for row, token in enumerate(rows) if token is None]
    images_T, slots_T = layout.slot_of_row_T
    image = -1
    for row, token in enumerate(rows):
        image = image if token is None else token[0]
        assert (images_T[row], slots_T[row]) == (token or (image, 0))
    for image, length in enumerate(lengths):
        assert layout.valid_BM[image].tolist() == [slot < length for slot in range(longest)]
        own = [rows.index((image, slot)) for slot in range(length)]
        assert layout.index_BM[image].tolist() == own + own[-1:] * (longest - length)


@every_map
def test_even_layouts_are_known(lengths: tuple[int, ...], alignment: int, row_multiple: int) -> None:
    layout = Layout(lengths, alignment, row_multiple)
    assert layout.is_even == (min(lengths) == max(lengths))


@every_map
def test_heads_are_split_as_rows_are(lengths: tuple[int, ...], alignment: int, row_multiple: int) -> None:
    layout = Layout(lengths, alignment, row_multiple)
    values_1HTK = torch.randn(1, 2, layout.num_rows, WIDTH)
    for ours, expected in zip(
        layout.split_heads(values_1HTK), layout.split(values_1HTK[0].transpose(0, 1)), strict=True
    ):
        assert_close(ours.transpose(1, 2), expected, **EXACT)
        assert ours.untyped_storage().data_ptr() == values_1HTK.untyped_storage().data_ptr()


def test_ranges_count_each_images_own() -> None:
    images, places = ranges(np.array([2, 0, 3]))
    assert images.tolist() == [0, 0, 2, 2, 2]
    assert places.tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("values", [[3, 1, 2], np.array([3, 1, 2])], ids=["list", "array"])
def test_numbers_of_the_host_come_to_the_device(values: list[int] | np.ndarray) -> None:
    ours = on_device(values, torch.device("cpu"))
    assert ours.dtype == torch.int64
    assert ours.tolist() == [3, 1, 2]
    assert on_device(values, torch.device("meta")).is_meta
