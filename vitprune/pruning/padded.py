"""One forward of a pruned model in padded tensors, (B, M, D), as graphs are traced from it: `torch.export`, ONNX.

What `forward.PackedForward` does with lengths that the host knows is done here in whole tensors: each image's kept
tokens come first, in order, and a stage's one number that depends on the data is how many tokens the longest image of
the batch keeps; none where every image keeps as many. What lies beyond an image's tokens no token sees. One image alone
is not padded: its work is the packed forward's.

Shapes: B images, N tokens of an image in the dense sequence, M tokens of the longest image, U of them behind a stage,
H heads, K head width, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitprune.pruning.attention import NO_STATS, Attention, PairBias, StatsRequest
from vitprune.pruning.forward import Forward
from vitprune.pruning.layout import Layout
from vitprune.pruning.scores import (
    TokenStats,
    at_least_float32,
    context_norms,
    head_weighted_attention,
    key_metric,
    mean_query,
)
from vitprune.pruning.selection import Decision, Policy, decide
from vitprune.pruning.token_batch import NO_TOKEN


@dataclass(frozen=True)
class PaddedTokens:
    """The tokens of a batch, padded to its longest image; its hidden states (B, M, D) travel beside it.

    valid_BM: where there is a token. sizes_BM: float32, for how many patches it stands, 0 in padding; None when every
    token stands for itself. positions_BM: of each in the dense sequence; `NO_TOKEN` for padding.
    token_BN: which of its image's tokens stands for a token of the dense sequence now, or `NO_TOKEN`.
    num_patches: of the dense image; (B, 1) where images differ.
    length: tokens of each image, where all have as many. covers_all: as in `TokenBatch`.
    """

    valid_BM: Tensor
    positions_BM: Tensor
    token_BN: Tensor
    num_prefix_tokens: int
    num_patches: int | Tensor
    sizes_BM: Tensor | None = None
    length: int | None = None
    covers_all: bool = True
    kernels: None = None

    @classmethod
    def dense(cls, hidden_states: Tensor, num_prefix_tokens: int, valid_BN: Tensor | None) -> PaddedTokens:
        """The tokens before anything left."""
        images, tokens = hidden_states.shape[:2]
        every_BN = torch.arange(tokens, device=hidden_states.device).expand(images, -1)
        if valid_BN is None:
            length = tokens if isinstance(tokens, int) else None
            valid_BN = torch.ones_like(every_BN, dtype=torch.bool)
            return cls(valid_BN, every_BN, every_BN, num_prefix_tokens, tokens - num_prefix_tokens, length=length)
        own_patches_B1 = valid_BN.sum(1, keepdim=True) - num_prefix_tokens
        own_BN = every_BN.where(valid_BN, NO_TOKEN)
        return cls(valid_BN, own_BN, own_BN, num_prefix_tokens, own_patches_B1, covers_all=False)

    @property
    def layout(self) -> Layout | None:
        """That of any image, where all have as many tokens."""
        return None if self.length is None else Layout((self.length,))

    @property
    def index_BM(self) -> Tensor:
        """Row of each token, images laid end to end."""
        return rows_of(torch.arange(self.valid_BM.shape[1], device=self.valid_BM.device), self.valid_BM)

    @cached_property
    def key_bias_BM(self) -> Tensor | None:
        """What is added to a key's logits, float32: the log of its size, −inf for padding."""
        if self.sizes_BM is not None:
            return self.sizes_BM.log()
        if self.length is not None:
            return None
        return torch.zeros_like(self.valid_BM, dtype=torch.float32).masked_fill(~self.valid_BM, -torch.inf)

    @property
    def merged_into(self) -> Tensor:
        """As `TokenBatch.merged_into`, (B, N − P)."""
        prefix, token_BN = self.num_prefix_tokens, self.token_BN[:, self.num_prefix_tokens :]
        owners_BN = self.positions_BM.gather(1, token_BN.clamp(min=0)) - prefix
        return owners_BN.where(token_BN != NO_TOKEN, NO_TOKEN)

    @cached_property
    def weights_BM(self) -> Tensor:
        """How much a token counts in a mean over its image, (B, M) float32."""
        return self.valid_BM.float() if self.sizes_BM is None else self.sizes_BM


class PaddedAttention(Attention):
    """Attention of a block over padded images."""

    def __init__(self, tokens: PaddedTokens, request: StatsRequest = NO_STATS) -> None:
        super().__init__(request)
        self.tokens = tokens

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias_1HNN: Tensor | None, scale: float, dropout: float) -> Tensor:
        bias, pairs = self._bias(bias_1HNN)
        row_BHM = None
        if self.request.row == "class" and at_least_float32(q) is q:  # which has the row in it
            logits = q @ k.mT * scale
            weights_BHMM = (logits if bias is None else logits + bias).softmax(-1)
            contexts_BMHK, row_BHM = (weights_BHMM @ v).transpose(1, 2), weights_BHMM[:, :, 0]
        else:
            mask = None if bias is None else bias.to(q.dtype)
            contexts_BMHK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
            if self.request.row is not None:
                row_BHM = self._row(q, k, pairs, scale)
        metric_TK = key_metric(k.transpose(1, 2)).flatten(0, 1) if self.request.metric else None
        score_BM = None if row_BHM is None else head_weighted_attention(row_BHM.mT, context_norms(contexts_BMHK))
        self.stats = TokenStats(score_BM, metric_TK)
        # copied in any case: torch's fused kernels have strides that those they are decomposed into haven't
        return contexts_BMHK.clone(memory_format=torch.contiguous_format)

    def _bias(self, bias_1HNN: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What is added to the logits, and of it what depends on the pair; both broadcast to (B, H, M, M)."""
        positions_BM, keys_BM = self.tokens.positions_BM, self.tokens.key_bias_BM
        pairs = None if bias_1HNN is None else PairBias(bias_1HNN).between(positions_BM, positions_BM)
        if keys_BM is None:
            return pairs, pairs
        keys_B11M = keys_BM[:, None, None]
        return keys_B11M if pairs is None else pairs + keys_B11M, pairs

    def _row(self, q_BHMK: Tensor, k_BHMK: Tensor, pairs: Tensor | None, scale: float) -> Tensor:
        """The attention row that scores the tokens, (B, H, M), at least float32."""
        if self.request.row == "mean":
            query_BH1K = mean_query(q_BHMK.transpose(1, 2), self.tokens.weights_BM)[:, :, None]
            pairs = None  # it stands nowhere
        else:
            query_BH1K = q_BHMK[:, :, :1]
        logits_BH1M = at_least_float32(query_BH1K) @ at_least_float32(k_BHMK).mT * scale
        if self.tokens.key_bias_BM is not None:
            logits_BH1M = logits_BH1M + self.tokens.key_bias_BM[:, None, None]
        if pairs is not None:
            logits_BH1M = logits_BH1M + pairs[:, :, :1]
        return logits_BH1M.softmax(-1)[:, :, 0]


class PaddedForward(Forward):
    """A forward in padded tensors, without observers.

    for_head: as in `PackedForward`. kept_B: tokens of each image behind each stage so far, prefix included, int64 (B,).
    """

    def __init__(self, policy: Policy, *, for_head: bool = False) -> None:
        super().__init__(policy)
        self.read = policy.cost.read if for_head else None
        self.tokens: PaddedTokens | None = None
        self._stages = policy.stages()
        self._attention: Attention | None = None
        self.kept_B: list[Tensor] = []

    def enter_block(
        self, block: int, hidden_states: Tensor, valid_BN: Tensor | None = None
    ) -> tuple[Tensor, Attention]:
        """As the base class; valid_BN: padding stays, and is never attended to."""
        if block == 0:
            self.tokens = PaddedTokens.dense(hidden_states, self.policy.num_prefix_tokens, valid_BN)
        assert self.tokens is not None
        if self.read is not None and block + 1 == len(self.policy.cost.linear):
            self._attention = PaddedLastBlockAttention(self.tokens, self.read)
        else:
            stage_follows = block + 1 in self._stages
            request = StatsRequest(self.policy.row, self.policy.compares_keys) if stage_follows else NO_STATS
            self._attention = PaddedAttention(self.tokens, request)
        return hidden_states, self._attention

    def leave_block(self, block: int, hidden_states: Tensor) -> Tensor:
        if block + 1 not in self.policy.before_blocks:
            return hidden_states
        assert self.tokens is not None
        stage = self._stages.get(block + 1)
        if stage is not None:
            assert self._attention is not None
            decision = decide(self.policy, stage, self._attention.stats, self.tokens)
            self.tokens, hidden_states = reduce_padded(self.tokens, hidden_states, decision, self.policy)
        self.merged_into.append(self.tokens.merged_into)
        self.kept_B.append(self.tokens.valid_BM.sum(1))
        return hidden_states

    def positions(self) -> Tensor | None:
        """(B, 1, M): alike for all heads."""
        assert self.tokens is not None
        return self.tokens.positions_BM[:, None]

    def absent_BN(self) -> Tensor | None:
        assert self.tokens is not None
        return None if self.tokens.covers_all else self.tokens.token_BN == NO_TOKEN

    def unpack(self, hidden_states: Tensor) -> Tensor:
        if self.read is not None:
            return hidden_states
        assert self.tokens is not None
        y_BND = unpack_padded(self.tokens, hidden_states)
        if isinstance(self.tokens.num_patches, Tensor):  # of images that are padded
            places = torch.arange(y_BND.shape[1], device=y_BND.device)
            y_BND = y_BND * (places < self.tokens.num_patches + self.policy.num_prefix_tokens)[..., None]
        return y_BND

    def unpack_recorded(self, block: int, hidden_states: Tensor) -> Tensor:
        raise ValueError(
            "an exported model that is pruned gives out no hidden states of its blocks; export the dense one, "
            "vitprune.restore_(model)"
        )


class PaddedLastBlockAttention(Attention):
    """As `LastBlockAttention`; in a graph, what comes behind keys and values in the first run is cut off as unused."""

    def __init__(self, tokens: PaddedTokens, read: int) -> None:
        super().__init__()
        self.tokens, self.read = tokens, read
        self._keys_and_values: tuple[Tensor, Tensor] | None = None

    def run(self, block: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._keys_and_values = None
        block(hidden_states, *args, **kwargs)
        return block(hidden_states[:, : self.read], *args, **kwargs)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias_1HNN: Tensor | None, scale: float, dropout: float) -> Tensor:
        if self._keys_and_values is None:
            self._keys_and_values = k, v
            return v.transpose(1, 2).contiguous()
        (k, v), bias_BM = self._keys_and_values, self.tokens.key_bias_BM
        bias = None if bias_BM is None else bias_BM.to(q.dtype)[:, None, None]
        contexts_BRHK = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2)
        return contexts_BRHK.clone(memory_format=torch.contiguous_format)


def reduce_padded(
    tokens: PaddedTokens, x_BMD: Tensor, decision: Decision, policy: Policy
) -> tuple[PaddedTokens, Tensor]:
    """Carry out what a stage decided; return the new tokens and their hidden states (B, U, D)."""
    keep_BM, prefix = decision.keep_BM & tokens.valid_BM, tokens.num_prefix_tokens
    length = None if decision.kept is None else decision.kept[0]
    counts_B1 = keep_BM.sum(1, keepdim=True)
    most = longest(counts_B1, prefix, policy.spec.min_tokens, x_BMD.shape[1]) if length is None else length
    places_U = torch.arange(most, device=x_BMD.device)
    valid_BU = places_U < counts_B1
    # those that stay first, in order, then those that leave
    ranks_BM = keep_BM.long().cumsum(1) - 1
    every_M = torch.arange(x_BMD.shape[1], device=x_BMD.device)
    places_BM = ranks_BM.where(keep_BM, counts_B1 + every_M - ranks_BM - 1)
    order_BM = torch.zeros_like(places_BM).scatter(1, places_BM, every_M.expand_as(places_BM))
    order_BU = order_BM[:, :most]
    rows_BU = rows_of(order_BU, tokens.valid_BM)
    slots_BM = ranks_BM.where(keep_BM, _destinations(tokens, decision, ranks_BM, rows_BU, valid_BU))
    moved = replace(
        tokens,
        valid_BM=valid_BU,
        positions_BM=_take(tokens.positions_BM, rows_BU).where(valid_BU, NO_TOKEN),
        token_BN=_tokens_after(tokens, slots_BM),
        length=length,
    )
    if decision.drops:
        return replace(moved, covers_all=False), _take(x_BMD, rows_BU)
    # one matrix product moves and merges: of each token what part it is of the token that it becomes
    parts_BUM = (slots_BM[:, None] == places_U[:, None]).float() * tokens.weights_BM[:, None]
    sizes_BU = parts_BUM.sum(-1)
    shares_BUM = parts_BUM / sizes_BU.clamp(min=1.0)[..., None]
    return replace(moved, sizes_BM=sizes_BU), shares_BUM.to(x_BMD.dtype) @ x_BMD


def _tokens_after(tokens: PaddedTokens, slots_BM: Tensor) -> Tensor:
    if tokens.covers_all:
        return slots_BM.gather(1, tokens.token_BN)
    return slots_BM.gather(1, tokens.token_BN.clamp(min=0)).where(tokens.token_BN != NO_TOKEN, NO_TOKEN)


def _destinations(
    tokens: PaddedTokens, decision: Decision, ranks_BM: Tensor, rows_BU: Tensor, valid_BU: Tensor
) -> Tensor:
    """Which token behind the stage each leaving one is merged into, (B, M); `NO_TOKEN` where it is gone."""
    if decision.dst_BM is not None:
        return ranks_BM.gather(1, decision.dst_BM)
    if decision.metric_TK is None:
        return torch.full_like(ranks_BM, NO_TOKEN)
    prefix, metric_BMK = tokens.num_prefix_tokens, decision.metric_TK.unflatten(0, tokens.valid_BM.shape)
    cosines_BMA = metric_BMK @ _take(metric_BMK, rows_BU[:, prefix:]).mT
    absent_BA = torch.zeros_like(valid_BU[:, prefix:], dtype=cosines_BMA.dtype)
    absent_BA = absent_BA.masked_fill(~valid_BU[:, prefix:], -torch.inf)
    return (cosines_BMA + absent_BA[:, None]).argmax(-1) + prefix


def unpack_padded(tokens: PaddedTokens, x_BMD: Tensor) -> Tensor:
    """Hidden states back in the dense sequence, (B, M, D) to (B, N, D), as `TokenBatch.unpack`."""
    token_BN = tokens.token_BN if tokens.covers_all else tokens.token_BN.clamp(min=0)
    y_BND = _take(x_BMD, rows_of(token_BN, tokens.valid_BM))
    if tokens.sizes_BM is not None:
        return y_BND
    prefix = tokens.num_prefix_tokens
    patches_BA1 = tokens.valid_BM[:, prefix:, None].to(torch.promote_types(x_BMD.dtype, torch.float32))
    mean_B1D = (x_BMD[:, prefix:] * patches_BA1).sum(1, keepdim=True) / patches_BA1.sum(1, keepdim=True)
    return y_BND.where((tokens.token_BN != NO_TOKEN)[..., None], mean_B1D.to(x_BMD.dtype))


def longest(counts_B1: Tensor, prefix: int, patches: int, most: int) -> int:
    """The largest count, the one number of a stage that a graph has to wait for. patches: so many stay in any case."""
    least = prefix + max(patches, 2)  # 1 would be a case of its own
    found = counts_B1.max().clamp(min=least).item()
    torch._check(found >= least)
    torch._check(found <= most)
    assert not isinstance(found, bool | float)
    return found


def rows_of(places_BU: Tensor, of_BM: Tensor) -> Tensor:
    """Rows of images of M tokens, laid end to end, at places of each image; (B, U) or (U,)."""
    images, tokens = of_BM.shape
    return torch.arange(images, device=of_BM.device)[:, None] * tokens + places_BU


def _take(x_BMX: Tensor, rows_BU: Tensor) -> Tensor:
    """Whole rows are copied, not element by element."""
    return x_BMX.flatten(0, 1).index_select(0, rows_BU.flatten()).unflatten(0, rows_BU.shape)
