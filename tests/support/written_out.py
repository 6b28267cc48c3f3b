"""Packed batches, and what the reference makes of each of their images."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vitprune.pruning import reference
from vitprune.pruning.kernels import cpu
from vitprune.pruning.layout import Layout
from vitprune.pruning.token_batch import NO_TOKEN, Kernels, Known, TokenBatch

H, K, SCALE = 3, 8, 0.3
LENGTHS = (6, 2, 9)
QKV = tuple[Tensor, Tensor, Tensor]
# tokens of the dense sequence that packed ones are left of
DENSE = 12

# uneven batches and even ones go different ways
every_layout = pytest.mark.parametrize("lengths", [LENGTHS, (5, 5, 5)], ids=["uneven", "even"])
in_both_ways = pytest.mark.parametrize("kernels", [cpu, None], ids=["loops", "operators"])
with_or_without_sizes = pytest.mark.parametrize("sized", [False, True], ids=["plain", "sized"])


def alone(
    q_HNK: Tensor, k_HNK: Tensor, v_HNK: Tensor, sizes_N: Tensor, bias_HNN: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One image by the reference: contexts (H, N, K), scores by its first token's row and by its mean query's, (N,)."""
    bias = 0.0 if bias_HNN is None else bias_HNN
    weights_HNN, contexts_HNK = reference.attend(q_HNK, k_HNK, v_HNK, sizes_N, bias, SCALE)
    row_HN = reference.mean_row(q_HNK, k_HNK, sizes_N, SCALE)
    by_class, by_mean = (reference.class_attention(row, contexts_HNK) for row in (weights_HNN[:, 0], row_HN))
    return contexts_HNK, by_class, by_mean


def batch_of(
    layout: Layout,
    positions_T: Tensor,
    sizes_T: Tensor | None = None,
    *,
    tokens: int = DENSE,
    kernels: Kernels | None = None,
) -> TokenBatch:
    """A batch with one prefix token, of images that had so many tokens; what stands for those that left isn't known."""
    patch_token_BN = positions_T.new_full((len(layout.lengths), tokens), NO_TOKEN)
    origin = Known(positions_T, patch_token_BN)
    return TokenBatch(layout, 1, tokens - 1, sizes_T, origin, positions_T.device, kernels=kernels)


def packed(
    sized: bool,
    lengths: tuple[int, ...] = LENGTHS,
    alignment: int = 16,
    row_multiple: int = 1,
    *,
    kernels: Kernels | None = None,
) -> tuple[TokenBatch, QKV, list[Tensor]]:
    """A batch, its q, k and v, and the sizes of each image's tokens."""
    layout = Layout(lengths, alignment, row_multiple)
    total = layout.num_rows
    sizes_T, positions_T = torch.zeros(total), torch.full((total,), NO_TOKEN)
    for start, length in zip(layout.starts, lengths, strict=True):
        sizes_T[start : start + length] = torch.randint(1, 6, (length,)) if sized else 1
        positions_T[start : start + length] = torch.randperm(DENSE)[:length].sort().values
    batch = batch_of(layout, positions_T, sizes_T if sized else None, kernels=kernels)
    q, k, v = torch.randn(3, 1, H, total, K)
    return batch, (q, k, v), of_images(batch, sizes_T)


def of_images(batch: TokenBatch, values_T: Tensor, dim: int = 0) -> list[Tensor]:
    """Each image's own part of what has one row a token, without fillers."""
    images = zip(batch.layout.starts, batch.lengths, strict=True)
    return [values_T.narrow(dim, start, length) for start, length in images]


def images_of(batch: TokenBatch, qkv: QKV, sizes: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Each image's own q, k, v and sizes."""
    q, k, v = (of_images(batch, x[0], 1) for x in qkv)
    return zip(q, k, v, sizes, strict=True)


def bias_of(positions: list[int], bias_1HNN: Tensor) -> Tensor:
    """The bias of one image's pairs of tokens, (H, L, L); nothing for a token without a position."""
    own = torch.zeros(H, len(positions), len(positions))
    for i, p in enumerate(positions):
        for j, q in enumerate(positions):
            if NO_TOKEN not in (p, q):
                own[:, i, j] = bias_1HNN[0, :, p, q]
    return own


def relative_positions() -> Tensor:
    """A bias for each pair of tokens of the dense sequence."""
    return torch.randn(1, H, DENSE, DENSE)
