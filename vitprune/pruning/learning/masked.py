"""The published training forward (AS-ViT, arXiv 2209.13802 §3): nothing is removed, a 0/1 mask with gradient says which
tokens the others attend to.

Dropped tokens go on, attending to kept ones but attended to by none, so that gradients can bring them back. What the
packed forward merges is merged here in the same numbers, (1 − m)·size.

Shapes: B images, N tokens of an image, M kept tokens of an image, D width, H heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vitprune.pruning.attention import NO_STATS, Attention, DenseAttention, StatsRequest
from vitprune.pruning.forward import Forward
from vitprune.pruning.learning.soft_mask import SoftMask, with_all_destinations
from vitprune.pruning.scores import (
    TokenStats,
    context_norms,
    head_weighted_attention,
    key_metric,
    mean_query,
    true_indices,
)
from vitprune.pruning.selection import Decision, Observer, Policy, decide
from vitprune.pruning.token_batch import NO_TOKEN, TokenBatch

EPS = 1e-6  # of the masked softmax, as published


@dataclass(frozen=True)
class MaskedTokens:
    """The tokens of a masked forward: all are there, `mask_BN` says which are attended to (0/1, with gradient)."""

    mask_BN: Tensor
    sizes_BN: Tensor | None = None


class MaskedAttention(Attention):
    """Attention in which masked tokens are seen by themselves only."""

    def __init__(self, tokens: MaskedTokens, request: StatsRequest = NO_STATS) -> None:
        super().__init__(request)
        self.tokens = tokens

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias_1HNN: Tensor | None, scale: float, dropout: float) -> Tensor:
        weights_BHNN = masked_attention_weights(q, k, scale, self.tokens, bias_1HNN)
        contexts_BNHK = (F.dropout(weights_BHNN, dropout).to(v.dtype) @ v).transpose(1, 2)
        attention_BN = None
        if self.request.row is not None:
            by_class = self.request.row == "class"
            row_BHN = weights_BHNN[:, :, 0] if by_class else _masked_mean_row(q, k, scale, self.tokens)
            attention_BN = head_weighted_attention(row_BHN.transpose(1, 2), context_norms(contexts_BNHK))
        metric_TK = key_metric(k.transpose(1, 2)).flatten(0, 1) if self.request.metric else None
        self.stats = TokenStats(attention_BN, metric_TK)
        return contexts_BNHK.contiguous()


def masked_attention_weights(
    q_BHNK: Tensor, k_BHNK: Tensor, scale: float, tokens: MaskedTokens, bias_1HNN: Tensor | None = None
) -> Tensor:
    """Attention in which masked tokens are seen by themselves only (AS-ViT §3), (B, H, N, N) float32.

    exp(a_ij)·G_ij / Σ_j, G_ij = M_j for j ≠ i and 1 for j = i; eps as published, spread as eps/N. With sizes s the
    logits are a_ij + log s_j (ToMe's proportional attention).
    """
    logits = (q_BHNK @ k_BHNK.transpose(-1, -2)).float() * scale
    if bias_1HNN is not None:
        logits = logits + bias_1HNN
    eye_NN = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    seen_BNN = torch.where(eye_NN, 1.0, tokens.mask_BN[:, None].float())
    return _masked_softmax(logits, seen_BNN[:, None], tokens)


def _masked_softmax(logits_BHQN: Tensor, seen_BHQN: Tensor, tokens: MaskedTokens) -> Tensor:
    if tokens.sizes_BN is not None:
        logits_BHQN = logits_BHQN + tokens.sizes_BN.log()[:, None, None]
    weights = (logits_BHQN - logits_BHQN.amax(-1, keepdim=True)).exp() * seen_BHQN
    eps = EPS
    return (weights + eps / logits_BHQN.shape[-1]) / (weights.sum(-1, keepdim=True) + eps)


def _masked_mean_row(q_BHNK: Tensor, k_BHNK: Tensor, scale: float, tokens: MaskedTokens) -> Tensor:
    """What the mean query of the tokens that are seen pays to each token, (B, H, N)."""
    weights_BN = tokens.mask_BN.float() if tokens.sizes_BN is None else tokens.mask_BN * tokens.sizes_BN
    q_BHK = mean_query(q_BHNK.transpose(1, 2), weights_BN)
    logits_BH1N = (q_BHK[:, :, None] @ k_BHNK.transpose(-1, -2)).float() * scale
    return _masked_softmax(logits_BH1N, tokens.mask_BN[:, None, None].float(), tokens)[:, :, 0]


@dataclass(frozen=True)
class _Merge:
    """What a stage merged: the amount of each token (B, N), 0/1, and its destination (B, N)."""

    amounts_BN: Tensor
    dst_BN: Tensor


@dataclass(frozen=True)
class KeptTokens:
    """The kept tokens of a masked forward at a stage; how many only the device knows.

    index_BM: row of each in what a block found. num_patches: of the dense image, (B, 1) where images differ.
    """

    valid_BM: Tensor
    positions_BM: Tensor
    index_BM: Tensor
    num_patches: int | Tensor
    num_prefix_tokens: int
    layout: None = None
    kernels: None = None


class MaskedForward(Forward):
    """The published forward. Belongs to one forward of a model."""

    def __init__(self, policy: Policy, observers: tuple[Observer, ...] = ()) -> None:
        super().__init__(policy, observers)
        self._mask_BN: Tensor | None = None  # with gradient
        self._kept_BN: Tensor | None = None  # the same as bool, well-defined also where a score is NaN
        self._sizes_BN: Tensor | None = None
        self._valid_BN: Tensor | None = None
        self._merges: list[_Merge] = []
        self._owners_BN: Tensor | None = None  # of each token the one that stands for it
        self._attention: Attention = DenseAttention()

    def enter_block(
        self, block: int, hidden_states: Tensor, valid_BN: Tensor | None = None
    ) -> tuple[Tensor, Attention]:
        """As the base class; valid_BN: padding is never attended to."""
        policy = self.policy
        if block == 0:
            self._count(hidden_states, valid_BN)
            if valid_BN is not None:
                self._valid_BN = self._kept_BN = valid_BN
                self._mask_BN = valid_BN.float()
        if self.observers:
            assert self.counter is not None
            self.counter.add_block(block, self._kept_B())
        stage_follows = block + 1 in policy.before_blocks
        learns = policy.levels.requires_grad
        request = StatsRequest(policy.row, policy.compares_keys, learns) if stage_follows else NO_STATS
        if self._mask_BN is not None:
            self._attention = MaskedAttention(MaskedTokens(self._mask_BN, self._sizes_BN), request)
        else:
            images, tokens = hidden_states.shape[:2]
            batch = TokenBatch.dense(images, tokens, policy.num_prefix_tokens, hidden_states.device)
            self._attention = DenseAttention(batch, request)
        return hidden_states, self._attention

    def leave_block(self, block: int, hidden_states: Tensor) -> Tensor:
        if block + 1 not in self.policy.before_blocks:
            return hidden_states
        return self._prune(self.policy.before_blocks.index(block + 1), hidden_states)

    def absent_BN(self) -> Tensor | None:
        """As in a packed forward, but without a gradient to thresholds."""
        if self._kept_BN is None or self._merges:
            return None
        return ~self._kept_BN

    def unpack(self, hidden_states: Tensor) -> Tensor:
        if self._mask_BN is None:
            return hidden_states
        y_BND = self._represent(hidden_states)
        return y_BND if self._valid_BN is None else y_BND * self._valid_BN[..., None]

    def _represent(self, hidden_states: Tensor) -> Tensor:
        assert self._mask_BN is not None
        if self.policy.spec.dropped == "leave":
            mask_BN1 = self._mask_BN[..., None].to(hidden_states.dtype)
            patches = slice(self.policy.num_prefix_tokens, None)
            kept_BND = (hidden_states * mask_BN1)[:, patches]
            sums = torch.promote_types(hidden_states.dtype, torch.float32)  # half precision doesn't count beyond 256
            kept_B1D, count_B11 = (x.sum(1, keepdim=True, dtype=sums) for x in (kept_BND, mask_BN1[:, patches]))
            mean_B1D = (kept_B1D / count_B11).to(hidden_states.dtype)
            return hidden_states + (1 - mask_BN1) * (mean_B1D - hidden_states)
        for merge in reversed(self._merges):
            index_BND = merge.dst_BN[..., None].expand(-1, -1, hidden_states.shape[-1])
            amounts_BN1 = merge.amounts_BN[..., None].to(hidden_states.dtype)
            hidden_states = hidden_states + amounts_BN1 * (hidden_states.gather(1, index_BND) - hidden_states)
        return hidden_states

    def _kept_B(self) -> Tensor:
        assert self.counter is not None
        if self._mask_BN is None:
            return self.counter.dense_tokens_B
        return self._mask_BN.sum(1)

    def _num_patches(self) -> int | Tensor:
        """Patches of the dense image, (B, 1) where images are padded."""
        tokens = self.num_tokens if self._valid_BN is None else self._valid_BN.sum(1, keepdim=True)
        return tokens - self.policy.num_prefix_tokens

    def _prune(self, stage: int, x_BND: Tensor) -> Tensor:
        policy, before_B = self.policy, self._kept_B()
        if self._mask_BN is None:
            self._mask_BN = x_BND.new_ones(x_BND.shape[:2], dtype=torch.float32)
            self._kept_BN = torch.ones_like(self._mask_BN, dtype=torch.bool)
        # decide among kept tokens, in the order in which the packed forward has them
        assert self._kept_BN is not None
        kept_BN = self._kept_BN
        index_BM = true_indices(kept_BN)
        valid_BM = kept_BN.gather(1, index_BM)
        rows_BM = index_BM + torch.arange(0, kept_BN.numel(), kept_BN.shape[1], device=kept_BN.device)[:, None]
        tokens = KeptTokens(valid_BM, index_BM, rows_BM, self._num_patches(), policy.num_prefix_tokens)
        found = self._attention.stats
        attention_BM = None if found.attention_BM is None else found.attention_BM.gather(1, index_BM)
        decision = decide(policy, stage, TokenStats(attention_BM, found.metric_TK), tokens, self.observers)
        decision = with_all_destinations(decision, tokens)
        m_BM = decision.keep_BM.float()
        if policy.levels.requires_grad:
            m_BM = SoftMask.of(decision, policy.temperatures[stage]).mask_BM
        m_BN = torch.zeros_like(self._mask_BN).scatter(1, index_BM, m_BM * valid_BM)
        # as published, not multiplied with the mask before: gradients reach earlier thresholds through the scores
        self._mask_BN = m_BN
        self._kept_BN = torch.zeros_like(kept_BN).scatter(1, index_BM, decision.keep_BM & valid_BM)
        kept_B = self._kept_B()
        # what was dropped before gives nothing, not even a gradient: it has no destination
        amounts_BN = torch.where(kept_BN, 1 - m_BN, 0.0)
        if policy.spec.dropped == "merge":
            x_BND = self._merge_tokens(decision, amounts_BN, index_BM, x_BND)
        if self.observers:
            assert self.counter is not None
            self.counter.add_stage(before_B, kept_B)
            self.merged_into.append(self._merged_into(kept_BN, self._kept_BN))
        return x_BND

    def _merged_into(self, before_BN: Tensor, kept_BN: Tensor) -> Tensor:
        """The patch whose token stands for each patch after a stage, as `TokenBatch.merged_into`, (B, N − P)."""
        own_BN = torch.arange(kept_BN.shape[1], device=kept_BN.device).expand(kept_BN.shape)
        owners_BN = own_BN.where(before_BN, NO_TOKEN) if self._owners_BN is None else self._owners_BN
        dst_BN = self._merges[-1].dst_BN if self._merges else torch.full_like(own_BN, NO_TOKEN)
        now_BN = own_BN.where(kept_BN, dst_BN)
        self._owners_BN = now_BN.gather(1, owners_BN.clamp(min=0)).where(owners_BN != NO_TOKEN, NO_TOKEN)
        prefix = self.policy.num_prefix_tokens
        patches_BN = self._owners_BN[:, prefix:]
        return (patches_BN - prefix).where(patches_BN != NO_TOKEN, NO_TOKEN)

    def _merge_tokens(self, decision: Decision, amounts_BN: Tensor, index_BM: Tensor, x_BND: Tensor) -> Tensor:
        assert decision.dst_BM is not None
        dst_BM = index_BM.gather(1, decision.dst_BM)
        dst_BN = torch.zeros_like(amounts_BN, dtype=torch.long).scatter(1, index_BM, dst_BM)
        sizes_BN = torch.ones_like(amounts_BN) if self._sizes_BN is None else self._sizes_BN
        given_BN = amounts_BN * sizes_BN
        self._sizes_BN = sizes_BN.scatter_add(1, dst_BN, given_BN)
        # the mean by size as a change of the destination: x_j + Σ_i given_i·(x_i − x_j) / s'_j
        index_BND = dst_BN[..., None].expand_as(x_BND)
        shares_BN1 = (given_BN / self._sizes_BN.gather(1, dst_BN))[..., None].to(x_BND.dtype)
        self._merges.append(_Merge(amounts_BN.detach(), dst_BN))
        return x_BND.scatter_add(1, index_BND, (x_BND - x_BND.gather(1, index_BND)) * shares_BN1)
