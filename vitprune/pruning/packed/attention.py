"""Attention among packed tokens: every image's see their own alone. Several kernels behind one class.

- buckets: images of as many rows lie side by side, and one call of torch's fused attention takes a bucket. For CPUs,
  where a call costs little.
- door: that of the device's kernels, one launch for all, which knows sizes and pairs. For CUDA in inference.
- varlen: flash attention of packed sequences, one call for all, with gradients. For CUDA in half precision.
- padded: all images as long as the longest and a mask, one call for all. Where none of the others does: with gradients
  in float32, or through a relative position bias, which a mask for each pair of tokens has to carry.

Shapes: B images, N tokens of an image in the dense sequence, T rows of the batch laid end to end, G images of a
rectangle (a bucket, or all that are padded) and L rows of each, H heads, K head width.
"""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vitprune.pruning.attention import NO_STATS, Attention, PairBias, StatsRequest, compute_stats
from vitprune.pruning.kernels.flash import fits_flash, varlen_attention
from vitprune.pruning.layout import is_half
from vitprune.pruning.token_batch import TokenBatch

Kernel = Literal["buckets", "door", "varlen", "padded"]


class PackedAttention(Attention):
    """Attention of a block after tokens have left. kernel: None for the one that suits."""

    def __init__(self, batch: TokenBatch, request: StatsRequest = NO_STATS, kernel: Kernel | None = None) -> None:
        super().__init__(request)
        self.batch = batch
        self.kernel: Kernel | None = kernel

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias_1HNN: Tensor | None, scale: float, dropout: float) -> Tensor:
        inputs = self.packed_inputs(q, k, v, bias_1HNN, scale, dropout)
        contexts_THK = inputs.contexts()
        if self.request.asks:
            known = inputs.q_THK, inputs.k_THK, contexts_THK, scale, inputs.pairs
            self.stats = compute_stats(self.request, self.batch, *known)
        return contexts_THK[None]

    def packed_inputs(
        self, q: Tensor, k: Tensor, v: Tensor, bias_1HNN: Tensor | None, scale: float, dropout: float
    ) -> PackedInputs:
        require_no_dropout(dropout)
        return PackedInputs(*of_one_dtype(q, k, v), self.batch, scale, bias_1HNN, self.kernel)

    def drop_path(self, x: Tensor, keep_probability: float) -> Tensor | None:
        return x * self.draw(x, keep_probability).index_select(0, self.batch.layout.images(x.device))[:, None]

    def draw(self, x: Tensor, keep_probability: float) -> Tensor:
        """What each image's states are multiplied with, (B,)."""
        return x.new_empty(len(self.batch.lengths)).bernoulli_(keep_probability) / keep_probability


def of_one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys in the dtype of the values: rotary tables stay in float32 under autocast."""
    return (q, k, v) if q.dtype == v.dtype else (q.to(v.dtype), k.to(v.dtype), v)


def require_no_dropout(dropout: float) -> None:
    """Raise ValueError where packed tokens' attention would have to drop something."""
    if dropout:
        raise ValueError(
            f"attention dropout ({dropout:g}) isn't done while tokens are packed; train with "
            "finetune.execution: masked, or set the dropout in the checkpoint's config.json to 0"
        )


class PackedInputs:
    """One block's queries, keys and values of packed tokens, (1, H, T, K) each, and what they are cut into."""

    def __init__(
        self,
        q_1HTK: Tensor,
        k_1HTK: Tensor,
        v_1HTK: Tensor,
        batch: TokenBatch,
        scale: float,
        bias_1HNN: Tensor | None = None,
        kernel: Kernel | None = None,
    ) -> None:
        self.batch, self.scale = batch, scale
        self.kernel = kernel or kernel_for(q_1HTK, k_1HTK, v_1HTK, batch, bias_1HNN)
        self._qkv_1HTK = q_1HTK, k_1HTK, v_1HTK
        self.rectangles = Rectangles(batch, padded=self.kernel != "buckets")
        self.pairs = None if bias_1HNN is None else PairBias(bias_1HNN)

    def contexts(self) -> Tensor:
        """Context vectors (T, H, K): every image attends to its own tokens only."""
        if self.kernel == "door":
            attend = self.batch.attention_kernel(self.q_THK)
            assert attend is not None
            known = self.q_THK, self.k_THK, self.v_THK, self.batch.sizes_T, self.batch.layout, self.scale
            return attend(*known, None if self.pairs is None else self.pairs.given(self.batch))
        if self.kernel == "varlen":
            bias_T = None if self.batch.sizes_T is None else self.batch.key_bias_T
            return varlen_attention(self.q_THK, self.k_THK, self.v_THK, bias_T, self.batch.layout, self.scale)
        if self.kernel == "buckets" and self.pairs is None:
            return self._in_buckets()
        return self.rectangles.join([self._fused(i).transpose(1, 2) for i in range(len(self.rectangles.images))])

    def _in_buckets(self) -> Tensor:
        """A fused call a bucket, on views and with masks that serve all blocks."""
        layout = self.batch.layout
        masks = [None] * len(layout.buckets) if self.batch.is_bare else self.batch.bucket_masks(self._qkv_1HTK[2].dtype)
        contexts = []
        for bucket, mask in zip(zip(*map(layout.split_heads, self._qkv_1HTK), strict=True), masks, strict=True):
            output = F.scaled_dot_product_attention(*bucket, attn_mask=mask, scale=self.scale)
            contexts.append(output.transpose(1, 2))
        return layout.join(contexts)

    def _fused(self, i: int) -> Tensor:
        """Context vectors of a rectangle, (G, H, L, K)."""
        q, k, v = self.rectangle(i)
        tight = self.batch.is_bare and self.batch.layout.is_even
        mask = None if tight and not self.pairs else self.mask(i, q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)

    def rectangle(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a rectangle, (G, H, L, K) each."""
        q, k, v = (parts[i].transpose(1, 2) for parts in (self._queries, self._keys, self._values))
        return q, k, v

    def mask(self, i: int, q_GHQK: Tensor, positions_GQ: Tensor | None = None) -> Tensor:
        """What is added to the logits of the keys of a rectangle, as fused kernels take it.

        positions_GQ: of the queries; None: they are the rectangle's own.
        """
        if not self.pairs:
            return self.key_biases[i][:, None, None].to(q_GHQK.dtype).expand(-1, -1, q_GHQK.shape[2], -1)
        own_GL = self.positions[i]
        pairs = self.pairs.between(own_GL if positions_GQ is None else positions_GQ, own_GL)
        bias = self.key_biases[i][:, None, None] + pairs
        return bias.to(q_GHQK.dtype).expand(-1, -1, q_GHQK.shape[2], -1)

    # in memory tokens before heads, as linear layers and the kernels have it
    @cached_property
    def q_THK(self) -> Tensor:
        return self._qkv_1HTK[0][0].transpose(0, 1)

    @cached_property
    def k_THK(self) -> Tensor:
        return self._qkv_1HTK[1][0].transpose(0, 1)

    @cached_property
    def v_THK(self) -> Tensor:
        return self._qkv_1HTK[2][0].transpose(0, 1)

    @cached_property
    def _queries(self) -> list[Tensor]:
        """(G, L, H, K) each."""
        return self.rectangles.split(self.q_THK)

    @cached_property
    def _keys(self) -> list[Tensor]:
        return self.rectangles.split(self.k_THK)

    @cached_property
    def _values(self) -> list[Tensor]:
        return self.rectangles.split(self.v_THK)

    @cached_property
    def key_biases(self) -> list[Tensor]:
        """(G, L) each."""
        return self.rectangles.split(self.batch.key_bias_T, -torch.inf)

    @cached_property
    def positions(self) -> list[Tensor]:
        """(G, L) each."""
        return self.rectangles.split(self.batch.positions_T)


def kernel_for(q: Tensor, k: Tensor, v: Tensor, batch: TokenBatch, bias_1HNN: Tensor | None) -> Kernel:
    """What suits the device and what is asked."""
    if batch.attention_kernel(q) is not None:
        return "door"
    if q.device.type == "cpu" and not batch.layout.in_order:
        return "buckets"
    half = is_half(q) and q.dtype == k.dtype == v.dtype
    # rows behind the last image would be uninitialised, and a filler would be a key
    tight = sum(batch.lengths) == batch.layout.num_rows
    if bias_1HNN is None and half and tight and fits_flash(q):
        return "varlen"
    return "padded"


class Rectangles:
    """Rows of a packed batch as rectangles of images: a view a bucket, or all images padded to the longest."""

    def __init__(self, batch: TokenBatch, *, padded: bool) -> None:
        self.batch, self.padded = batch, padded

    @cached_property
    def images(self) -> list[list[int]]:
        """Images of each rectangle."""
        layout = self.batch.layout
        if self.padded:
            return [list(range(len(layout.lengths)))]
        bounds = accumulate((count for count, _ in layout.buckets), initial=0)
        return [layout.order[start:stop] for start, stop in pairwise(bounds)]

    def split(self, values_T: Tensor, beyond: float | None = None) -> list[Tensor]:
        """(T, …) to (G, L, …) each. beyond: what lies beyond an image's rows; None: a copy of its last."""
        if not self.padded:
            return self.batch.layout.split(values_T)
        values_BM = values_T.index_select(0, self.batch.rows_BM.flatten()).unflatten(0, self.batch.rows_BM.shape)
        return [values_BM if beyond is None else values_BM.masked_fill(~self.batch.has_row_BM, beyond)]

    def join(self, values: list[Tensor]) -> Tensor:
        """What `split` took apart, (T, …)."""
        if not self.padded:
            return self.batch.layout.join(values)
        return values[0].flatten(0, 1).index_select(0, self.batch.places_T)
