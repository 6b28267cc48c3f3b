"""Attention written out image by image, and packed batches to try it on."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vitprune.layout import Layout
from vitprune.tokens import NOBODY, Known, TokenBatch

H, K, SCALING = 3, 8, 0.3
LENGTHS = (6, 2, 9)
QKV = tuple[Tensor, Tensor, Tensor]
# tokens of the dense sequence that packed ones are left of
DENSE = 12

# uneven batches and even ones go different ways
every_layout = pytest.mark.parametrize("lengths", [LENGTHS, (5, 5, 5)], ids=["uneven", "even"])
in_both_ways = pytest.mark.parametrize("loops", [True, False], ids=["loops", "operators"])
with_or_without_sizes = pytest.mark.parametrize("sized", [False, True], ids=["plain", "sized"])


def dense_attention(
    q_HNK: Tensor, k_HNK: Tensor, v_HNK: Tensor, sizes_N: Tensor, bias_HNN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One image alone: weights s_j·exp(a_ij + b_ij) / Σ_j (H, N, N) and context (H, N, K)."""
    logits = SCALING * q_HNK.double() @ k_HNK.double().transpose(1, 2)
    exps = sizes_N.double() * (logits + (0.0 if bias_HNN is None else bias_HNN.double())).exp()
    weights = exps / exps.sum(-1, keepdim=True)
    return weights.float(), (weights @ v_HNK.double()).float()


def score(weights_HNN: Tensor, context_HNK: Tensor) -> Tensor:
    """S(i) = Σ_h ‖o_h(i)‖ / Σ_h ‖o_h(i)‖ · A_h(cls, i) of one image, (N,)."""
    result = []
    for i in range(weights_HNN.shape[1]):
        norms = [context_HNK[h, i].square().sum().sqrt().item() for h in range(H)]
        result.append(sum(norms[h] / sum(norms) * weights_HNN[h, 0, i].item() for h in range(H)))
    return torch.tensor(result)


def mean_score(q_HNK: Tensor, k_HNK: Tensor, v_HNK: Tensor, sizes_N: Tensor, bias_HNN: Tensor | None = None) -> Tensor:
    """The score of one image by its mean query q̄ = Σ s_j·q_j / Σ s_j, which has no position, (N,)."""
    _, context = dense_attention(q_HNK, k_HNK, v_HNK, sizes_N, bias_HNN)
    rows = []
    for h in range(H):
        mean = sum((s * q for s, q in zip(sizes_N, q_HNK[h], strict=True)), torch.zeros(K)) / sizes_N.sum()
        exps = [s.item() * math.exp(SCALING * float(mean @ k)) for s, k in zip(sizes_N, k_HNK[h], strict=True)]
        rows.append(torch.tensor([e / sum(exps) for e in exps]))
    return score(torch.stack(rows)[:, None].expand(-1, len(sizes_N), -1), context)


def batch_of(
    layout: Layout, positions_T: Tensor, sizes_T: Tensor | None = None, *, tokens: int = DENSE, loops: bool = False
) -> TokenBatch:
    """A batch with one prefix token, of images that had so many tokens; nobody knows who stands for those that left."""
    carriers_BN = positions_T.new_full((len(layout.lengths), tokens), NOBODY)
    origin = Known(positions_T, carriers_BN)
    return TokenBatch(layout, 1, tokens - 1, sizes_T, origin, positions_T.device, loops=loops)


def packed(
    sized: bool,
    lengths: tuple[int, ...] = LENGTHS,
    alignment: int = 16,
    row_multiple: int = 1,
    *,
    loops: bool = False,
) -> tuple[TokenBatch, QKV, list[Tensor]]:
    """A batch, its q, k and v, and the sizes of each image's tokens."""
    layout = Layout(lengths, alignment, row_multiple)
    total = layout.num_rows
    sizes_T, positions_T = torch.zeros(total), torch.full((total,), NOBODY)
    for start, length in zip(layout.starts, lengths, strict=True):
        sizes_T[start : start + length] = torch.randint(1, 6, (length,)) if sized else 1
        positions_T[start : start + length] = torch.randperm(DENSE)[:length].sort().values
    batch = batch_of(layout, positions_T, sizes_T if sized else None, loops=loops)
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
            if NOBODY not in (p, q):
                own[:, i, j] = bias_1HNN[0, :, p, q]
    return own


def relative_positions() -> Tensor:
    """A bias for each pair of tokens of the dense sequence."""
    return torch.randn(1, H, DENSE, DENSE)
