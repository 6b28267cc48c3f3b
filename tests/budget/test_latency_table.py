"""Reading a made-up table: between its points, beyond them, and with a gradient."""

from __future__ import annotations

import pytest
import torch
from tiny import Tolerance
from torch.testing import assert_close

from vitprune.budget.latency_table import CostTable, interpolate

FLOAT64 = Tolerance(rtol=1e-12, atol=1e-12)
TABLE = CostTable(
    batch_size=4,
    tokens=(1.0, 3.0, 7.0),
    curves=((1.0, 5.0, 6.0), (2.0, 2.0, 4.0)),
    kinds=(0, 1, 1),
    stages=(0.5, 0.5, 1.5),
    outside_blocks=0.25,
    dense_tokens=7,
    dense_seconds=16.0,
)


def counts(*tokens: float) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.float64, requires_grad=True)


def test_straight_lines_between_the_points_and_beyond_them() -> None:
    found = interpolate(counts(0.0, 1.0, 2.0, 3.0, 5.0, 7.0, 9.0), TABLE.tokens, TABLE.curves[0])
    expected = torch.tensor([-1.0, 1.0, 3.0, 5.0, 5.5, 6.0, 6.5], dtype=torch.float64)
    assert_close(found.detach(), expected, **FLOAT64)


def test_the_gradient_is_the_slope() -> None:
    tokens = counts(2.0, 5.0, 9.0)
    interpolate(tokens, TABLE.tokens, TABLE.curves[0]).sum().backward()
    assert tokens.grad is not None
    assert_close(tokens.grad, torch.tensor([2.0, 0.25, 0.25], dtype=torch.float64), **FLOAT64)


def test_blocks_have_the_curve_of_their_kind() -> None:
    five = counts(5.0)
    assert [TABLE.block(block, five).item() for block in range(3)] == [5.5, 3.0, 3.0]
    assert TABLE.stage(five).item() == 1.0


def test_a_correction_is_of_the_pruned_model_alone() -> None:
    inside = torch.tensor([10.0, 4.0], dtype=torch.float64)
    assert_close(TABLE.pruned(inside), inside + 0.25, **FLOAT64)
    twice = TABLE.corrected(1.5).corrected(2.0)
    assert_close(twice.pruned(inside), 3 * (inside + 0.25), **FLOAT64)
    dense = torch.full((2,), 7.0, dtype=torch.float64)
    assert_close(twice.dense(dense), torch.full_like(dense, 16.0), **FLOAT64)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="measured on images of 7 tokens, these have 9"):
        TABLE.dense(torch.tensor([7.0, 9.0], dtype=torch.float64))
