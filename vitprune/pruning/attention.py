"""How one block of a forward attends, and what its attention says about the tokens.

transformers' layers run unmodified: in place of their attention function they call the `Attention` of the block that
runs. Here are those of a dense block and of the last one.

Shapes: B images, N tokens of an image, T rows of the batch laid end to end, M tokens of the longest image, H heads, K
head width, G images side by side, Q and J tokens that make pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.decorators import skip
from torch.nn import functional as F

from vitprune.pruning.layout import TILE_KEY_ALIGNMENT, needs_tiles, on_device
from vitprune.pruning.scores import (
    Row,
    TokenStats,
    context_norms,
    head_weighted_attention,
    key_metric,
    mean_query,
    row_logits,
    row_weights,
)
from vitprune.pruning.token_batch import Pairs, TokenBatch


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile away from a function, not from what it calls; torch.export may have it all.

    As `torch.compiler.disable(recursive=False)`, which refuses to be exported, and without a frame of its own.
    """
    return skip(function)


@dataclass(frozen=True)
class StatsRequest:
    """What the stage behind a block wants to know of its attention.

    row: the tokens' scores, by the attention row of the class token or of the mean query; None: none.
    metric: the keys that similarity is measured on. gradient: with one, since thresholds learn from it.
    """

    row: Row | None = None
    metric: bool = False
    gradient: bool = False

    @property
    def asks(self) -> bool:
        """Whether anything is wanted."""
        return self.row is not None or self.metric


NO_STATS = StatsRequest()


class Attention(ABC):
    """One block's attention within one forward. `stats` is what was requested, once the block has run.

    Gradient checkpointing runs a block twice with the same object; the second run only writes the same again.
    """

    def __init__(self, request: StatsRequest = NO_STATS) -> None:
        self.request = request
        self.stats = TokenStats()

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias_1HNN: Tensor | None, scale: float, dropout: float) -> Tensor:
        """Context vectors (B, N, H, K) of queries, keys and values (B, H, N, K), packed with B = 1 and T for N.

        bias_1HNN: added to the logits of each pair of tokens of the dense sequence.
        """

    def run(self, block: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block's output; a layer is run as often as this attention needs."""
        return block(hidden_states, *args, **kwargs)

    def position_arguments(self, make: Callable[[Tensor], dict[str, Any]], positions_T: Tensor) -> dict[str, Any]:
        """What the block is told of its tokens' positions; `make` makes it of indices in the dense sequence."""
        return make(positions_T)

    def drop_path(self, x: Tensor, keep_probability: float) -> Tensor | None:
        """Stochastic depth, which drops whole images; None where the layer sees them by itself."""
        return None


class PairBias:
    """What is added to the logits of each pair of tokens, by their positions in the dense sequence.

    bias_1HNN: (1, H, N, N). Nothing is added for a token without a position.
    """

    def __init__(self, bias_1HNN: Tensor) -> None:
        self.table_1HNN = bias_1HNN

    def given(self, batch: TokenBatch) -> Pairs:
        """As kernels take it, of the tokens of a batch."""
        return Pairs(self.table_1HNN, batch.positions_T)

    @cached_property
    def _bias_HPP(self) -> Tensor:
        """With a row and a column of zeros at the end, for −1, no position."""
        return F.pad(self.table_1HNN[0], (0, 1, 0, 1))

    def between(self, positions_GQ: Tensor, positions_GJ: Tensor) -> Tensor:
        """For queries and keys at these positions, (G, H, Q, J)."""
        places = self._bias_HPP.shape[-1]
        pairs_GQJ = (positions_GQ % places)[:, :, None] * places + (positions_GJ % places)[:, None]
        # one flat index is twice as fast as two
        bias_HX = self._bias_HPP.flatten(1).index_select(1, pairs_GQJ.flatten())
        return bias_HX.unflatten(1, pairs_GQJ.shape).transpose(0, 1)


def compute_stats(
    request: StatsRequest,
    batch: TokenBatch,
    q_THK: Tensor,
    k_THK: Tensor,
    contexts_THK: Tensor,
    scale: float,
    pairs: PairBias | None = None,
) -> TokenStats:
    """What a block's attention says about the tokens of a batch, as far as it is requested.

    Here, as in `scores`, `selection` and `packed.reduction`, a device's kernels take over where the batch has some.
    """
    if request.row == "mean":
        pairs = None  # the mean query stands nowhere
    with torch.set_grad_enabled(request.gradient and torch.is_grad_enabled()):
        query_BHK = None if request.row is None else row_query(request.row, batch, q_THK)
        if batch.kernels is not None and (pairs is None or batch.kernels.knows_pairs):
            known = query_BHK, k_THK, contexts_THK, batch.sizes_T, scale, batch.layout
            given = None if pairs is None else pairs.given(batch)
            return TokenStats(*batch.kernels.compute_stats(*known, given, wants_metric=request.metric))
        metric_TK = key_metric(k_THK) if request.metric else None
        if query_BHK is None:
            return TokenStats(None, metric_TK)
        weights_BMH = row_weights(stats_logits(query_BHK, batch, k_THK, scale, pairs))
        return TokenStats(head_weighted_attention(weights_BMH, batch.pad(context_norms(contexts_THK))), metric_TK)


def row_query(row: Row, batch: TokenBatch, q_THK: Tensor) -> Tensor:
    """Of each image the query whose attention row scores the tokens, (B, H, K)."""
    if row == "mean":
        if batch.kernels is not None and batch.kernels.mean_query is not None:
            return batch.kernels.mean_query(q_THK, batch.sizes_T, batch.layout)
        return mean_query(batch.pad(q_THK), batch.key_bias_BM.exp())
    return q_THK[:1] if len(batch.lengths) == 1 else q_THK.index_select(0, batch.starts_B)


def stats_logits(query_BHK: Tensor, batch: TokenBatch, k_THK: Tensor, scale: float, pairs: PairBias | None) -> Tensor:
    """Logits of that row, (B, M, H); −inf beyond an image's tokens."""
    if len(batch.layout.buckets) == 1:
        logits_BMH = row_logits(query_BHK, batch.pad(k_THK), scale)
    else:
        images_T = on_device(batch.layout.slot_of_row_T[0], query_BHK.device)
        logits_BMH = batch.pad(row_logits(query_BHK.index_select(0, images_T), k_THK[:, None], scale)[:, 0])
    if batch.sizes_T is not None:
        logits_BMH = logits_BMH + batch.pad(batch.key_bias_T)[..., None]
    logits_BMH = batch.hide(logits_BMH)
    if pairs is not None:
        logits_BMH = logits_BMH + pairs.between(first_positions(batch), batch.positions_BM)[:, :, 0].mT
    return logits_BMH


def first_positions(batch: TokenBatch) -> Tensor:
    """Position of each image's first token, (B, 1)."""
    return batch.positions_T.index_select(0, batch.starts_B)[:, None]


class DenseAttention(Attention):
    """Attention of a block in which all tokens of all images are there. batch: those tokens, if stats are requested."""

    def __init__(self, batch: TokenBatch | None = None, request: StatsRequest = NO_STATS) -> None:
        super().__init__(request)
        self.batch = batch

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias_1HNN: Tensor | None, scale: float, dropout: float) -> Tensor:
        contexts_BNHK = _fused_attention(q, k, v, bias_1HNN, dropout, scale).transpose(1, 2).contiguous()
        if self.request.asks:
            assert self.batch is not None
            q_THK, k_THK = q.transpose(1, 2).flatten(0, 1), k.transpose(1, 2).flatten(0, 1)
            pairs = None if bias_1HNN is None else PairBias(bias_1HNN)
            contexts_THK = contexts_BNHK.flatten(0, 1)
            self.stats = compute_stats(self.request, self.batch, q_THK, k_THK, contexts_THK, scale, pairs)
        return contexts_BNHK


def _fused_attention(
    q_BHNK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor, bias: Tensor | None, dropout: float, scale: float
) -> Tensor:
    """sdpa; in tiles of AMX with as many keys as they hold, which more than pays for the copy."""
    missing = -k_BHNK.shape[2] % TILE_KEY_ALIGNMENT
    if missing and needs_tiles(k_BHNK) and bias is None and not torch.is_grad_enabled():
        bias = F.pad(k_BHNK.new_zeros(k_BHNK.shape[2]), (0, missing), value=-torch.inf)
        bias = bias.expand(q_BHNK.shape[0], 1, q_BHNK.shape[2], -1)
        k_BHNK, v_BHNK = (F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, missing)).transpose(1, 2) for x in (k_BHNK, v_BHNK))
    return F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK, attn_mask=bias, dropout_p=dropout, scale=scale)


class KeysAndValuesKnown(Exception):
    """Ends a block's run that was for its attention's keys and values alone.

    A layer knows no other way to stop in the middle, and what comes after is most of its work.
    """


class LastBlockAttention(Attention):
    """Attention of a last block of which the head reads each image's first `read` tokens alone.

    The layer runs twice: on all tokens as far as queries, keys and values, then to its end on the tokens that are read.
    """

    def __init__(self, batch: TokenBatch | None, read: int) -> None:
        super().__init__()
        self.batch, self.read = batch, read
        self._keys_and_values: tuple[Tensor, Tensor] | None = None

    @uncompiled
    def run(self, block: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._keys_and_values = None
        with suppress(KeysAndValuesKnown):
            block(hidden_states, *args, **kwargs)
        return block(self.read_tokens(hidden_states), *args, **kwargs)

    @torch.compiler.disable()  # reads lists of lengths, and would be compiled for each
    def read_tokens(self, hidden_states: Tensor) -> Tensor:
        """Hidden states of the tokens that are read, (B, read, D)."""
        if self.batch is None:
            return hidden_states[:, : self.read]
        if self.read == 1:
            return hidden_states[0].index_select(0, self.batch.starts_B)[:, None]
        slots_BR = torch.arange(self.read, device=hidden_states.device).expand(len(self.batch.lengths), -1)
        return hidden_states[0, self.batch.layout.rows_of(slots_BR)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias_1HNN: Tensor | None, scale: float, dropout: float) -> Tensor:
        if self._keys_and_values is None:
            self._keys_and_values = k, v
            raise KeysAndValuesKnown
        k, v = self._keys_and_values
        bias, attend = None, None if self.batch is None else self.batch.attention_kernel(q)
        if self.batch is not None and attend is not None:
            q_THK, k_THK, v_THK = q.transpose(1, 2).flatten(0, 1), *(x_1HTK[0].transpose(0, 1) for x_1HTK in (k, v))
            contexts_THK = attend(q_THK, k_THK, v_THK, self.batch.sizes_T, self.batch.layout, scale, read=self.read)
            return contexts_THK.unflatten(0, (len(q), self.read))
        if self.batch is not None:
            k, v = (self.batch.pad(x_1HTK[0].transpose(0, 1)).transpose(1, 2) for x_1HTK in (k, v))
            bias_BM = self.batch.key_bias_BM.to(q.dtype)
            bias = bias_BM[:, None, None].expand(-1, -1, q.shape[2], -1)
        contexts_BHRK = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        return contexts_BHRK.transpose(1, 2).contiguous()
