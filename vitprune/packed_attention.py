"""Attention among packed tokens: each image's see their own alone. Several kernels behind one class.

Knows which kernel suits a device and dtype, and what attention says about the tokens. Leaves what else a block's
attention is to do to `attention`, and the gradients of masks to `ghost_attention`.

- buckets: images of as many rows lie side by side, and one call of torch's fused attention takes a bucket. For CPUs,
  where a call costs little.
- varlen: flash attention of packed sequences, one call for all. For CUDA in half precision.
- padded: all images as long as the longest and a mask, one call for all. Where neither of the others does.

Shapes: B images, N tokens of an image in the dense sequence, T rows of the batch laid end to end, M tokens of the
longest image, G images of a rectangle (a bucket, or all that are padded) and L rows of each, X ghosts, C of an image, H
heads, K head width.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vitprune import cpu_stage
from vitprune.ghost_attention import GhostKeys, SeenKeys, ghosts_among_others, learning_attention
from vitprune.ghosts import GhostRun
from vitprune.layout import is_half, on_device
from vitprune.rectangles import PairBias, Rectangles
from vitprune.scoring import (
    context_norms,
    head_weighted_attention,
    key_metric,
    mean_query,
    row_logits,
    row_weights,
)
from vitprune.tokens import TokenBatch
from vitprune.varlen import fits_flash, varlen_attention

Query = Literal["class", "mean"]
Kernel = Literal["buckets", "varlen", "padded"]


class PackedAttention:
    """One block's attention among packed tokens.

    q_1HTK, k_1HTK, v_1HTK: of all rows. bias_1HNN: added to the logits of each pair of tokens of the dense sequence.
    kernel: None for the one that suits. ghost_run: of ghosts that go through the block afterwards.
    """

    def __init__(
        self,
        q_1HTK: Tensor,
        k_1HTK: Tensor,
        v_1HTK: Tensor,
        batch: TokenBatch,
        scaling: float,
        bias_1HNN: Tensor | None = None,
        kernel: Kernel | None = None,
        ghost_run: GhostRun | None = None,
    ) -> None:
        self.batch, self.scaling, self.ghost_run = batch, scaling, ghost_run
        self.kernel = kernel or kernel_for(q_1HTK, k_1HTK, v_1HTK, batch, bias_1HNN)
        self._q_1HTK, self._k_1HTK, self._v_1HTK = q_1HTK, k_1HTK, v_1HTK
        self._rectangles = Rectangles(batch, padded=self.kernel != "buckets")
        self._pairs = None if bias_1HNN is None else PairBias(bias_1HNN)

    @cached_property
    def contexts_THK(self) -> Tensor:
        """Context vectors: every image attends to its own tokens only."""
        if self.kernel == "varlen":
            return varlen_attention(self._q_THK, self._k_THK, self._v_THK, self.batch, self.scaling)
        if self.kernel == "buckets" and self._pairs is None and self.batch.learning is None:
            return self._in_buckets()
        attend = self._fused if self.batch.learning is None else self._learning
        return self._rectangles.join([attend(i).transpose(1, 2) for i in range(len(self._rectangles.images))])

    def _in_buckets(self) -> Tensor:
        """A fused call a bucket, on views and with masks that serve all blocks."""
        layout, qkv = self.batch.layout, (self._q_1HTK, self._k_1HTK, self._v_1HTK)
        masks = [None] * len(layout.buckets) if self.batch.is_bare else self.batch.bucket_masks(qkv[0].dtype)
        contexts = []
        for bucket, mask in zip(zip(*map(layout.split_heads, qkv), strict=True), masks, strict=True):
            output = F.scaled_dot_product_attention(*bucket, attn_mask=mask, scale=self.scaling)
            contexts.append(output.transpose(1, 2))
        return layout.join(contexts)

    def ghost_contexts(self, q_1HXK: Tensor, k_1HXK: Tensor, v_1HXK: Tensor) -> Tensor:
        """Context vectors of ghosts, (1, X, H, K): each sees itself and its image's tokens."""
        assert self.ghost_run is not None
        ghosts = self.ghost_run.ghosts
        own = [x_1HXK[0].transpose(0, 1) for x_1HXK in (q_1HXK, k_1HXK, v_1HXK)]
        contexts_XHK = torch.zeros_like(own[0])
        for i, images in enumerate(self._rectangles.images):
            places = ghosts.everybody.of_images(images)
            if places.index_GC.shape[1] == 0:
                continue
            positions_GC = places.take(ghosts.positions_X)
            own_bias = places.take(ghosts.bias_X)[:, None]
            if self._pairs:
                own_bias = own_bias + self._pairs.between(positions_GC, positions_GC).diagonal(dim1=2, dim2=3)
            q, k, v = (places.take(x_XHK).transpose(1, 2) for x_XHK in own)
            mask = self._mask(i, q, positions_GC)
            _, seen_k, seen_v = self._qkv(i)
            contexts = ghosts_among_others(q, k, v, seen_k, seen_v, own_bias, mask, self.scaling)
            places.put_(contexts_XHK, contexts.transpose(1, 2))
        return contexts_XHK[None]

    def find(self, query: Query | None, *, wants_metric: bool) -> tuple[Tensor | None, Tensor | None]:
        """Scores by what that query pays to each token, (B, M), and keys of length one, (T, K); None if unwanted."""
        batch = self.batch
        if batch.loops and not (query == "class" and self._pairs):  # the mean query stands nowhere
            bias_T = None if batch.sizes_T is None else batch.key_bias_T
            known = None if query is None else self._asking(query), self._k_THK, self.contexts_THK, bias_T
            return cpu_stage.find(*known, self.scaling, batch.layout, wants_metric=wants_metric)
        return None if query is None else self.scores(query), key_metric(self._k_THK) if wants_metric else None

    def scores(self, query: Query) -> Tensor:
        """AS-ViT's score of each token, (B, M): by what the class token, or the mean query, of its image pays to it."""
        batch = self.batch
        asking_BHK = self._asking(query)
        images_T = on_device(batch.layout.slot_of_row_T[0], asking_BHK.device)
        logits_TH = row_logits(asking_BHK.index_select(0, images_T), self._k_THK[:, None], self.scaling)[:, 0]
        if batch.sizes_T is not None:
            logits_TH = logits_TH + batch.key_bias_T[:, None]
        logits_BMH = batch.hide(batch.pad(logits_TH))
        if query == "class" and self._pairs:  # the mean query stands nowhere
            logits_BMH = logits_BMH + self._pairs.between(self._first_B1, batch.positions_BM)[:, :, 0].mT
        norms_BMH = batch.pad(context_norms(self.contexts_THK))
        if batch.learning is None:
            return head_weighted_attention(row_weights(logits_BMH), norms_BMH)
        mask_BM = batch.pad(batch.learning.mask_T)
        if self.ghost_run is not None:
            ghosts_BCH, mask_BC = self._ghosts_in_row(asking_BHK, query)
            logits_BMH, mask_BM = torch.cat([logits_BMH, ghosts_BCH], 1), torch.cat([mask_BM, mask_BC], 1)
        return head_weighted_attention(row_weights(logits_BMH, mask_BM)[:, : norms_BMH.shape[1]], norms_BMH)

    def _fused(self, i: int) -> Tensor:
        """Context vectors of a rectangle, (G, H, L, K)."""
        q, k, v = self._qkv(i)
        tight = self.batch.is_bare and self.batch.layout.is_even
        mask = None if tight and not self._pairs else self._mask(i, q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scaling)

    def _learning(self, i: int) -> Tensor:
        """The same with the gradients of masks."""
        seen = SeenKeys(self._key_biases[i], self._masks[i], self._learns[i])
        pairs = self._pairs and self._pairs.between(self._positions[i], self._positions[i])
        return learning_attention(*self._qkv(i), seen, self._ghost_keys(i), self.scaling, pairs)

    def _ghost_keys(self, i: int) -> GhostKeys | None:
        if self.ghost_run is None:
            return None
        ghosts, found, all_pairs = self.ghost_run.ghosts, self.ghost_run.found, self._pairs
        places, positions = ghosts.everybody.of_images(self._rectangles.images[i]), self._positions[i]

        def in_backward() -> tuple[Tensor, Tensor, Tensor | None]:
            pairs = None if all_pairs is None else all_pairs.between(positions, places.take(ghosts.positions_X))
            keys, values = (places.take(x_XHK, 0.0).transpose(1, 2) for x_XHK in (found.keys_XHK, found.values_XHK))
            return keys, values, pairs

        return GhostKeys(in_backward, places.take(ghosts.bias_X, -torch.inf), places.take(ghosts.mask_X, 0.0))

    def _asking(self, query: Query) -> Tensor:
        """Of each image the query whose row scores the tokens, (B, H, K)."""
        batch, q_THK = self.batch, self._q_THK
        if query == "class":
            return q_THK[:1] if len(batch.lengths) == 1 else q_THK.index_select(0, batch.starts_B)
        weights_BM, q_BMHK = batch.key_bias_BM.exp(), batch.pad(q_THK)
        if batch.learning is not None:
            weights_BM = weights_BM * batch.pad(batch.learning.mask_T)
        if self.ghost_run is not None:
            ghosts, places = self.ghost_run.ghosts, self.ghost_run.ghosts.everybody
            ghost_weights = places.take(ghosts.bias_X, -torch.inf).exp() * places.take(ghosts.mask_X, 0.0)
            weights_BM = torch.cat([weights_BM, ghost_weights], 1)
            q_BMHK = torch.cat([q_BMHK, places.take(self.ghost_run.found.queries_XHK, 0.0)], 1)
        return mean_query(q_BMHK, weights_BM)

    @property
    def _first_B1(self) -> Tensor:
        """Position of each image's first token."""
        return self.batch.positions_T.index_select(0, self.batch.starts_B)[:, None]

    def _ghosts_in_row(self, asking_BHK: Tensor, query: Query) -> tuple[Tensor, Tensor]:
        """Logits (B, C, H) and masks (B, C) of ghosts, which score nothing but would lower the others' scores."""
        assert self.ghost_run is not None
        ghosts, places = self.ghost_run.ghosts, self.ghost_run.ghosts.everybody
        logits_BCH = row_logits(asking_BHK, places.take(self.ghost_run.found.keys_XHK, 0.0), self.scaling)
        if query == "class" and self._pairs:
            logits_BCH = logits_BCH + self._pairs.between(self._first_B1, places.take(ghosts.positions_X))[:, :, 0].mT
        bias_BC = places.take(ghosts.bias_X, -torch.inf)
        return logits_BCH + bias_BC[..., None], places.take(ghosts.mask_X, 0.0)

    def _qkv(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of a rectangle, (G, H, L, K) each."""
        q, k, v = (parts[i].transpose(1, 2) for parts in (self._queries, self._keys, self._values))
        return q, k, v

    def _mask(self, i: int, q_GHQK: Tensor, positions_GQ: Tensor | None = None) -> Tensor:
        """What is added to the logits of the keys of a rectangle, as fused kernels take it.

        positions_GQ: of the queries; None: they are the rectangle's own.
        """
        if not self._pairs:
            return self._key_biases[i][:, None, None].to(q_GHQK.dtype).expand(-1, -1, q_GHQK.shape[2], -1)
        own_GL = self._positions[i]
        pairs = self._pairs.between(own_GL if positions_GQ is None else positions_GQ, own_GL)
        bias = self._key_biases[i][:, None, None] + pairs
        return bias.to(q_GHQK.dtype).expand(-1, -1, q_GHQK.shape[2], -1)

    # in memory tokens before heads, as linear layers and the kernels have it
    @cached_property
    def _q_THK(self) -> Tensor:
        return self._q_1HTK[0].transpose(0, 1)

    @cached_property
    def _k_THK(self) -> Tensor:
        return self._k_1HTK[0].transpose(0, 1)

    @cached_property
    def _v_THK(self) -> Tensor:
        return self._v_1HTK[0].transpose(0, 1)

    @cached_property
    def _queries(self) -> list[Tensor]:
        """(G, L, H, K) each."""
        return self._rectangles.split(self._q_THK)

    @cached_property
    def _keys(self) -> list[Tensor]:
        return self._rectangles.split(self._k_THK)

    @cached_property
    def _values(self) -> list[Tensor]:
        return self._rectangles.split(self._v_THK)

    @cached_property
    def _key_biases(self) -> list[Tensor]:
        """(G, L) each."""
        return self._rectangles.split(self.batch.key_bias_T, -torch.inf)

    @cached_property
    def _positions(self) -> list[Tensor]:
        return self._rectangles.split(self.batch.positions_T)

    @cached_property
    def _masks(self) -> list[Tensor]:
        assert self.batch.learning is not None
        return self._rectangles.split(self.batch.learning.mask_T)

    @cached_property
    def _learns(self) -> list[Tensor]:
        assert self.batch.learning is not None
        return self._rectangles.split(self.batch.learning.learns_T, 0)


def kernel_for(q: Tensor, k: Tensor, v: Tensor, batch: TokenBatch, bias_1HNN: Tensor | None) -> Kernel:
    """What suits the device and what is asked."""
    if q.device.type == "cpu":
        return "buckets"
    half = is_half(q) and q.dtype == k.dtype == v.dtype
    # nobody's rows would be uninitialised, and a filler would be a key
    tight = sum(batch.lengths) == batch.layout.num_rows
    if bias_1HNN is None and batch.learning is None and half and tight and fits_flash(q):
        return "varlen"
    return "padded"
