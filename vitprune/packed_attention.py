"""Attention among packed tokens: each image's see their own alone. Several kernels behind one function.

Knows which kernel suits a device and dtype. Leaves what else a block's attention is to do to `attention`, and ghosts
to `ghost_attention`.

- buckets: images of as many rows lie side by side, and one call of torch's fused attention takes a bucket. For CPUs,
  where a call costs little.
- varlen: flash attention of packed sequences, one call for all. For CUDA in half precision.
- padded: all images as long as the longest and a mask, one call for all. Where neither of the others does.

Shapes: B images, N tokens of an image in the dense sequence, T rows of the batch laid end to end, M rows of the longest
image, G images of a rectangle (a bucket, or all that are padded) and L rows of each, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate, repeat
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from vitprune.ghost_attention import GhostKeys, ghost_attention
from vitprune.scoring import at_least_float32, attention_row, head_weighted_attention, mean_query
from vitprune.tokens import TokenBatch, is_half, on_device

Query = Literal["class", "mean"]
Kernel = Literal["buckets", "varlen", "padded"]

# flash attention takes head widths that are a multiple of this, up to the most
FLASH_MULTIPLE, FLASH_MOST = 8, 256
# with sizes so many more numbers a head, of which two are used
_SIZE_WIDTH = FLASH_MULTIPLE


def packed_attention(
    q_1HTK: Tensor,
    k_1HTK: Tensor,
    v_1HTK: Tensor,
    batch: TokenBatch,
    scaling: float,
    bias_1HNN: Tensor | None = None,
    scores_of: Query | None = None,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Every image attends to its own tokens only.

    bias_1HNN: added to the logits of each pair of tokens of the dense sequence. kernel: None for the one that suits.
    Returns the context vectors (1, T, H, K) and, if asked for, AS-ViT's score of each token (T,).
    """
    kernel = kernel or kernel_for(q_1HTK, k_1HTK, v_1HTK, batch, bias_1HNN)
    # in memory tokens before heads, as linear layers and the kernels have it
    q, k, v = (x_1HTK[0].transpose(0, 1) for x_1HTK in (q_1HTK, k_1HTK, v_1HTK))
    rectangles = _Rectangles(batch, q, k, padded=kernel != "buckets")
    if kernel == "varlen":
        output_THK = _varlen(q, k, v, batch, scaling)
    else:
        output_THK = _rectangular(rectangles, v, scaling, bias_1HNN)
    if scores_of is None:
        return output_THK[None], None
    row_TH = _rows(rectangles, scaling, bias_1HNN, scores_of)
    return output_THK[None], head_weighted_attention(row_TH, context_norms(output_THK))


def kernel_for(q: Tensor, k: Tensor, v: Tensor, batch: TokenBatch, bias_1HNN: Tensor | None) -> Kernel:
    """What suits the device and what is asked."""
    if q.device.type == "cpu":
        return "buckets"
    half = is_half(q) and q.dtype == k.dtype == v.dtype
    # nobody's rows would be uninitialised, and a filler would be a key
    tight = sum(batch.lengths) == batch.layout.num_rows
    fits = q.shape[-1] % FLASH_MULTIPLE == 0 and q.shape[-1] + _SIZE_WIDTH <= FLASH_MOST
    if bias_1HNN is None and batch.learning is None and half and tight and fits and _has_flash(q.device):
        return "varlen"
    return "padded"


def _has_flash(device: torch.device) -> bool:
    """Flash attention is for NVIDIA's Ampere and later."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def context_norms(context: Tensor) -> Tensor:
    """Lengths of context vectors, (…, K) to (…), at least float32."""
    # converted afterwards: three times as fast on a CPU, and half precision sums in float32 anyway
    return at_least_float32(torch.linalg.vector_norm(context, dim=-1))


def _varlen(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, batch: TokenBatch, scaling: float) -> Tensor:
    width = q_THK.shape[-1]
    if batch.sizes_T is not None:
        q_THK, k_THK, v_THK = _with_sizes(q_THK, k_THK, v_THK, batch.key_bias_T, scaling)
    rows = batch.layout.rows
    bounds = list(accumulate((rows[image] for image in batch.layout.order), initial=0))
    bounds_X = on_device(bounds, q_THK.device, torch.int32)
    longest = max(rows)
    output = varlen_attn(q_THK, k_THK, v_THK, bounds_X, bounds_X, longest, longest, scale=scaling)
    assert isinstance(output, Tensor)
    return output[..., :width]


def _with_sizes(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, key_bias_T: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Wider queries, keys and values whose products have the log of each key's size in them, for kernels without bias.

    q' = [q, 1, 1], k' = [k, b, b'] with b + b' = log s / scaling: in two parts, since half precision rounds.
    """
    bias_T = key_bias_T / scaling
    coarse_T = bias_T.to(k_THK.dtype)
    fine_T = (bias_T - coarse_T.float()).to(k_THK.dtype)
    biases_TH2 = torch.stack([coarse_T, fine_T], -1)[:, None].expand(-1, k_THK.shape[1], -1)
    q_THK = F.pad(F.pad(q_THK, (0, 2), value=1.0), (0, _SIZE_WIDTH - 2))
    k_THK = F.pad(torch.cat([k_THK, biases_TH2], -1), (0, _SIZE_WIDTH - 2))
    return q_THK, k_THK, F.pad(v_THK, (0, _SIZE_WIDTH))


class _Rectangles:
    """Rows of images as rectangles: a view a bucket, or all images padded to the longest."""

    def __init__(self, batch: TokenBatch, q_THK: Tensor, k_THK: Tensor, *, padded: bool) -> None:
        self.batch, self.padded = batch, padded
        self.layout = batch.layout
        self._q_THK, self._k_THK = q_THK, k_THK

    @cached_property
    def queries(self) -> list[Tensor]:
        """(G, L, H, K) each."""
        return self.split(self._q_THK)

    @cached_property
    def keys(self) -> list[Tensor]:
        """(G, L, H, K) each."""
        return self.split(self._k_THK)

    def split(self, values_T: Tensor, beyond: float | None = None) -> list[Tensor]:
        """(T, …) to (G, L, …) each. beyond: what lies beyond an image's rows; None: a copy of its last."""
        if not self.padded:
            return self.layout.split(values_T)
        values_BM = values_T.index_select(0, self.batch.rows_BM.flatten()).unflatten(0, self.batch.rows_BM.shape)
        return [values_BM if beyond is None else values_BM.masked_fill(~self.batch.has_row_BM, beyond)]

    def join(self, values: list[Tensor]) -> Tensor:
        """What `split` took apart, (T, …)."""
        if not self.padded:
            return self.layout.join(values)
        return values[0].flatten(0, 1).index_select(0, self.batch.places_T)

    @cached_property
    def key_biases(self) -> list[Tensor]:
        """(G, L) each."""
        return self.split(self.batch.key_bias_T, -torch.inf)

    @cached_property
    def ghost_keys(self) -> list[GhostKeys | None]:
        learning = self.batch.learning
        if learning is None:
            return [None] * len(self.key_biases)
        parts = (self.split(x_T, 0) for x_T in (learning.mask_T, learning.seen_T, learning.learns_T))
        return [GhostKeys(*rectangle) for rectangle in zip(self.key_biases, *parts, strict=True)]

    def pairs(self, bias_1HNN: Tensor | None, queries: int | None = None) -> Iterator[Tensor | None]:
        """The bias of the pairs of tokens of each rectangle's images, (G, H, L, L); one at a time.

        queries: only of the first so many tokens of an image with all of them, (G, H, queries, L).
        """
        if bias_1HNN is None:
            yield from repeat(None)
            return
        # nothing is added for a token without a position: −1 is the row and column of zeros at the end
        bias_HPP = F.pad(bias_1HNN[0], (0, 1, 0, 1))
        places = bias_HPP.shape[-1]
        for positions_GL in self.split(self.batch.positions_T):
            rows_GL = positions_GL % places
            pairs_GQL = rows_GL[:, :queries, None] * places + rows_GL[:, None]
            # one flat index is twice as fast as two
            bias_HX = bias_HPP.flatten(1).index_select(1, pairs_GQL.flatten())
            yield bias_HX.unflatten(1, pairs_GQL.shape).transpose(0, 1)


def _rectangular(rectangles: _Rectangles, v_THK: Tensor, scaling: float, bias_1HNN: Tensor | None) -> Tensor:
    """Context vectors (T, H, K): one fused call a rectangle."""
    outputs = []
    qkv = zip(rectangles.queries, rectangles.keys, rectangles.split(v_THK), strict=True)
    known = zip(rectangles.key_biases, rectangles.ghost_keys, rectangles.pairs(bias_1HNN), strict=False)
    for x, (key_bias_GL, ghost_keys, pairs) in zip(qkv, known, strict=True):
        q, k, v = (x_GLHK.transpose(1, 2) for x_GLHK in x)
        if ghost_keys is not None:
            output = ghost_attention(q, k, v, ghost_keys, scaling, pairs)
        else:
            bias = key_bias_GL[:, None, None]
            mask = (bias if pairs is None else bias + pairs).to(q.dtype).expand(-1, -1, q.shape[2], -1)
            output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        outputs.append(output.transpose(1, 2))
    return rectangles.join(outputs)


def _rows(rectangles: _Rectangles, scaling: float, bias_1HNN: Tensor | None, query: Query) -> Tensor:
    """What the class token, or the mean query, of each image pays to its rows, (T, H)."""
    rows = []
    qk = zip(rectangles.queries, rectangles.keys, strict=True)
    # the mean query stands nowhere
    pairs = rectangles.pairs(None if query == "mean" else bias_1HNN, queries=1)
    known = zip(rectangles.key_biases, rectangles.ghost_keys, pairs, strict=False)
    for (q, k), (key_bias_GL, ghost_keys, pairs_GH1L) in zip(qk, known, strict=True):
        bias_GLH = key_bias_GL[..., None] if pairs_GH1L is None else key_bias_GL[..., None] + pairs_GH1L[:, :, 0].mT
        seen_GL = None if ghost_keys is None else ghost_keys.mask_GL
        if query == "mean":
            weights_GL = key_bias_GL.exp() if seen_GL is None else key_bias_GL.exp() * seen_GL
            asking_GHK = mean_query(q, weights_GL)
        else:
            asking_GHK = q[:, 0]
        rows.append(attention_row(asking_GHK, k, scaling, bias_GLH, seen_GL))
    return rectangles.join(rows)
