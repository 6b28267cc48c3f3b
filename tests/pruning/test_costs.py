"""MACs against the papers' formulas and against loops that count."""

from __future__ import annotations

import pytest
import torch
from tiny import Tolerance
from torch.testing import assert_close

from vitprune.pruning.costs import CostModel

EXACT = Tolerance(rtol=0.0, atol=0.0)

# DeiT-S: width 384, 6 heads, 12 blocks, patches of 16 px, 1000 classes
D, BLOCKS, PATCHES = 384, 12, 196
DEIT_SMALL = CostModel(linear=(12 * D * D,) * BLOCKS, width=D, head_width=64, patch=3 * 16 * 16 * D, head=1000 * D)


@pytest.mark.parametrize("n", [1, 50, 197])
def test_a_plain_block_costs_what_the_paper_says(n: int) -> None:
    assert DEIT_SMALL.block(3, n) == 12 * n * D**2 + 2 * n**2 * D


def test_deit_small_costs_its_published_4_6_gmacs() -> None:
    assert DEIT_SMALL.dense(PATCHES, 1) == BLOCKS * (12 * 197 * D**2 + 2 * 197**2 * D) + 768 * D * PATCHES + 1000 * D
    assert round(DEIT_SMALL.dense(PATCHES, 1) / 1e9, 1) == 4.6


def test_blocks_may_differ() -> None:
    cost = CostModel(linear=(10, 20), width=4, head_width=2, patch=3, head=5)
    assert [cost.block(b, 3) for b in range(2)] == [30 + 72, 60 + 72]
    assert cost.dense(2, 1) == 102 + 132 + 2 * 3 + 5
    assert cost.outside(2) == 11


@pytest.mark.parametrize("tile", [4, 256])
@pytest.mark.parametrize("patches", [1, 2, 4, 7, 8, 9, 64, 700])
def test_density_peaks_compare_a_tile_of_patches_with_all_up_to_its_end(patches: int, tile: int) -> None:
    comparisons = 0
    for start in range(0, patches, tile):
        stop = min(start + tile, patches)
        comparisons += (stop - start) * stop
    assert DEIT_SMALL.density_peaks(patches, tile) == 64 * comparisons
    assert DEIT_SMALL.density_peaks(torch.tensor(patches).double(), tile) == 64 * comparisons


@pytest.mark.parametrize("patches", [3.0, 64.0, 256.0, 300.0])
def test_more_patches_take_more_comparisons(patches: float) -> None:
    count = torch.tensor(patches).double().requires_grad_()
    DEIT_SMALL.density_peaks(count, 256).backward()
    assert count.grad is not None
    assert count.grad > 0
    assert count.grad.isfinite()


@pytest.mark.parametrize("patches", [1, 2, 7, 64])
def test_tome_compares_every_second_patch_with_the_others(patches: int) -> None:
    comparisons = sum(1 for candidate in range(1, patches, 2) for anchor in range(0, patches, 2))
    assert DEIT_SMALL.bipartite(patches) == 64 * comparisons
    assert DEIT_SMALL.bipartite(torch.tensor(patches).double()) == 64 * comparisons


def test_a_merge_compares_those_that_leave_with_those_that_stay() -> None:
    assert DEIT_SMALL.merge(30, 20) == 64 * 30 * 20


def test_the_class_row_costs_one_product_of_the_width_a_token() -> None:
    assert DEIT_SMALL.attention_row(197) == D * 197


def test_costs_of_several_images_are_differentiable() -> None:
    tokens = torch.tensor([197.0, 50.0], dtype=torch.float64, requires_grad=True)
    (DEIT_SMALL.block(0, tokens) + DEIT_SMALL.attention_row(tokens)).sum().backward()
    assert tokens.grad is not None
    assert_close(tokens.grad, 12 * D**2 + 4 * tokens.detach() * D + D, **EXACT)
