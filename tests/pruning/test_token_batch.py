"""Padded views of a packed batch."""

from __future__ import annotations

import pytest
import torch
from tiny import Tolerance
from torch.testing import assert_close
from written_out import batch_of, every_layout, in_both_ways, of_images, packed, with_or_without_sizes

from vitprune.pruning.layout import Layout
from vitprune.pruning.token_batch import NO_TOKEN, Kernels, TokenBatch

EXACT = Tolerance(rtol=0.0, atol=0.0)
WIDTH = 3
# no fillers, few, and more than tokens
every_alignment = pytest.mark.parametrize("alignment", [1, 4, 16])


@every_alignment
@pytest.mark.parametrize("lengths", [(4, 4, 4), (5, 2, 7), (3,)])
def test_a_padded_view_holds_each_images_own_tokens(lengths: tuple[int, ...], alignment: int) -> None:
    layout, longest = Layout(lengths, alignment), max(lengths)
    batch = batch_of(layout, torch.zeros(layout.num_rows, dtype=torch.long))
    values_TD, images_T = torch.randn(layout.num_rows, WIDTH), layout.images(torch.device("cpu"))
    padded_view = batch.pad(values_TD)
    assert padded_view.shape == (len(lengths), longest, WIDTH)
    assert torch.equal(batch.pad(images_T), torch.arange(len(lengths))[:, None].expand(-1, longest))
    for image, (start, length) in enumerate(zip(layout.starts, lengths, strict=True)):
        assert batch.valid_BM[image].tolist() == [i < length for i in range(longest)]
        assert_close(padded_view[image, :length], values_TD[start : start + length], **EXACT)


@every_alignment
@pytest.mark.parametrize("lengths", [(4, 4, 4), (5, 2, 7), (3,)])
def test_places_of_the_padded_view_have_rows(lengths: tuple[int, ...], alignment: int) -> None:
    layout = Layout(lengths, alignment)
    batch = batch_of(layout, torch.zeros(layout.num_rows, dtype=torch.long))
    places_X = batch.valid_BM.flatten().nonzero().squeeze(1)
    expected = [start + i for start, length in zip(layout.starts, lengths, strict=True) for i in range(length)]
    assert batch.rows_at(places_X).tolist() == expected
    assert batch.index_BM[batch.valid_BM].tolist() == expected


@every_alignment
@every_layout
@with_or_without_sizes
def test_a_key_counts_by_its_size_and_what_is_no_token_not_at_all(
    sized: bool, lengths: tuple[int, ...], alignment: int
) -> None:
    batch, _, sizes = packed(sized, lengths, alignment, row_multiple=32)
    for ours, size in zip(of_images(batch, batch.key_bias_T), sizes, strict=True):
        assert_close(ours, size.log(), **EXACT)
    assert (batch.key_bias_T > -torch.inf).sum() == sum(lengths)
    for ours, size in zip(batch.key_bias_BM, sizes, strict=True):
        assert_close(ours[: len(size)], size.log(), **EXACT)
        assert (ours[len(size) :] == -torch.inf).all()


@every_alignment
@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buckets_have_a_mask_for_all_blocks(lengths: tuple[int, ...], alignment: int, dtype: torch.dtype) -> None:
    batch, _, _ = packed(True, lengths, alignment)
    masks = batch.bucket_masks(dtype)
    for mask, bias_GL in zip(masks, batch.layout.split(batch.key_bias_T), strict=True):
        images, rows = bias_GL.shape
        assert mask.shape == (images, 1, rows, rows)
        assert_close(mask, bias_GL.to(dtype)[:, None, None].expand_as(mask), **EXACT)
    assert batch.bucket_masks(dtype) is masks
    assert batch.bucket_masks(torch.float64)[0].dtype == torch.float64


def test_without_sizes_and_fillers_a_batch_is_bare() -> None:
    assert TokenBatch.dense(2, 5, 1, torch.device("cpu")).is_bare
    for sized, alignment, expected in [(False, 1, True), (False, 4, False), (True, 1, False)]:
        batch, _, _ = packed(sized, alignment=alignment)
        assert batch.is_bare == expected
        assert batch.is_bare == (not batch.key_bias_T.any())


@every_alignment
@every_layout
def test_what_is_beyond_an_image_is_hidden(lengths: tuple[int, ...], alignment: int) -> None:
    batch, _, _ = packed(False, lengths, alignment)
    logits = torch.randn(len(lengths), max(lengths), WIDTH)
    ours = batch.hide(logits)
    for b, length in enumerate(lengths):
        assert_close(ours[b, :length], logits[b, :length], **EXACT)
        assert (ours[b, length:] == -torch.inf).all()


@in_both_ways
def test_before_anything_left_all_tokens_stand_for_themselves(kernels: Kernels | None) -> None:
    batch = TokenBatch.dense(2, 5, 2, torch.device("cpu"), kernels)
    assert (batch.kernels, batch.covers_all, batch.num_patches) == (kernels, True, 3)
    assert batch.positions_T.tolist() == [*range(5), *range(5)]
    assert batch.patch_token_BN.tolist() == [[*range(5)]] * 2
    assert batch.merged_into().tolist() == [[0, 1, 2]] * 2
    assert (batch.positions_T != NO_TOKEN).all()
    x_TD = torch.randn(10, WIDTH)
    assert_close(batch.unpack(x_TD), x_TD.view(2, 5, WIDTH), **EXACT)
