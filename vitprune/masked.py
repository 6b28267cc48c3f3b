"""One training forward of a pruned model: nothing is removed, a 0/1 mask with gradient says who is seen.

Dropped tokens go on as ghosts that see the others but that nobody else sees (AS-ViT), so that gradients
can bring them back. What the packed pass does with tokens that leave is done here in the same numbers, with 1 − m for
what is given away.

Shapes: B images, N tokens of an image, M tokens of an image that are seen, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitprune.attention import AttentionCall, Findings, MaskedTokens
from vitprune.scoring import true_indices
from vitprune.stage import Decision, Observer, Policy, SeenTokens, Tally, count_tokens, decide
from vitprune.thresholds import straight_through


@dataclass(frozen=True)
class _Gift:
    """What a stage gave away: amount (B, N), 0/1, and the token that took it in (B, N)."""

    amounts_BN: Tensor
    takers_BN: Tensor


class MaskedPass:
    """The state of one forward. Belongs to that forward alone. Attributes as in `packed.PackedPass`."""

    def __init__(self, policy: Policy, observers: tuple[Observer, ...]) -> None:
        self.policy = policy
        self.observers = observers
        self.keep_masks: list[Tensor] = []
        self.tally: Tally | None = None
        self.num_tokens = 0
        self._mask_BN: Tensor | None = None  # with gradient
        self._seen_BN: Tensor | None = None  # the same as bool, well-defined also where a score is NaN
        self._sizes_BN: Tensor | None = None
        self._valid_BN: Tensor | None = None
        self._gifts: list[_Gift] = []
        self._call = AttentionCall()

    def enter_block(
        self, block: int, hidden_states: Tensor, valid_BN: Tensor | None = None
    ) -> tuple[Tensor, AttentionCall]:
        """What block `block` gets: all hidden states, (B, N, D), and the mask for its attention.

        valid_BN: False for patches that are padding: nobody ever sees them.
        """
        policy = self.policy
        if block == 0:
            self._begin(hidden_states, valid_BN)
        if self.observers:
            assert self.tally is not None
            self.tally.add_block(block, self._seen_B())
        stage_follows = block + 1 in policy.before_blocks
        self._call = AttentionCall(
            tokens=None if self._mask_BN is None else MaskedTokens(self._mask_BN, self._sizes_BN),
            scores_of=policy.scores_of if stage_follows else None,
            wants_metric=stage_follows and policy.needs_metric,
            learns=policy.levels.requires_grad,
        )
        return hidden_states, self._call

    def leave_block(self, block: int, hidden_states: Tensor) -> Tensor:
        """What block `block` gave out, with what the stage before the next makes of it."""
        if block + 1 not in self.policy.before_blocks:
            return hidden_states
        return self._prune(self.policy.before_blocks.index(block + 1), hidden_states)

    def _begin(self, hidden_states: Tensor, valid_BN: Tensor | None) -> None:
        self.num_tokens = hidden_states.shape[1]
        self.tally = Tally(self.policy, count_tokens(hidden_states, valid_BN))
        if valid_BN is not None:
            self._valid_BN = valid_BN
            self._seen_BN = valid_BN
            self._mask_BN = valid_BN.float()

    def positions(self) -> Tensor | None:
        """As `PackedPass.positions`; here rows are the dense sequence always."""
        return None

    def absent_BN(self) -> Tensor | None:
        """As `PackedPass.absent_BN`. Attention pooling gives thresholds no gradient."""
        if self._seen_BN is None or self._gifts:
            return None
        return ~self._seen_BN

    def unpack(self, hidden_states: Tensor) -> Tensor:
        """Hidden states behind the last block as the packed pass gives them out, (B, N, D) of the dense sequence."""
        if self._mask_BN is None:
            return hidden_states
        y_BND = self._stand_in(hidden_states)
        return y_BND if self._valid_BN is None else y_BND * self._valid_BN[..., None]

    def _stand_in(self, hidden_states: Tensor) -> Tensor:
        assert self._mask_BN is not None
        if self.policy.spec.dropped == "leave":
            mask_BN1 = self._mask_BN[..., None].to(hidden_states.dtype)
            patches = slice(self.policy.num_prefix_tokens, None)
            kept_BND = (hidden_states * mask_BN1)[:, patches]
            mean_B1D = kept_BND.sum(1, keepdim=True) / mask_BN1[:, patches].sum(1, keepdim=True)
            return hidden_states + (1 - mask_BN1) * (mean_B1D - hidden_states)
        for gift in reversed(self._gifts):
            index_BND = gift.takers_BN[..., None].expand(-1, -1, hidden_states.shape[-1])
            amounts_BN1 = gift.amounts_BN[..., None].to(hidden_states.dtype)
            hidden_states = hidden_states + amounts_BN1 * (hidden_states.gather(1, index_BND) - hidden_states)
        return hidden_states

    def unpack_recorded(self, block: int, hidden_states: Tensor) -> Tensor:
        """As `PackedPass.unpack_recorded`, ghosts included."""
        return hidden_states

    def _seen_B(self) -> Tensor:
        assert self.tally is not None
        if self._mask_BN is None:
            return self.tally.dense_tokens_B
        return self._mask_BN.sum(1).double()

    def _num_patches(self) -> int | Tensor:
        """Patches of the dense image, (B, 1) where images are padded."""
        tokens = self.num_tokens if self._valid_BN is None else self._valid_BN.sum(1, keepdim=True)
        return tokens - self.policy.num_prefix_tokens

    def _prune(self, stage: int, x_BND: Tensor) -> Tensor:
        policy, before_B = self.policy, self._seen_B()
        if self._mask_BN is None:
            self._mask_BN = x_BND.new_ones(x_BND.shape[:2], dtype=torch.float32)
            self._seen_BN = torch.ones_like(self._mask_BN, dtype=torch.bool)
        # decide among the tokens that are seen, in the order in which the packed pass has them
        assert self._seen_BN is not None
        seen_BN = self._seen_BN
        index_BM = true_indices(seen_BN)
        valid_BM = seen_BN.gather(1, index_BM)
        rows_BM = index_BM + torch.arange(0, seen_BN.numel(), seen_BN.shape[1], device=seen_BN.device)[:, None]
        seen = SeenTokens(valid_BM, index_BM, rows_BM, self._num_patches())
        decision = decide(policy, stage, _at(self._call.findings, index_BM), seen, self.observers, learns=True)
        m_BM = decision.keep_BM.float()
        if policy.levels.requires_grad:
            m_BM = straight_through(decision.scores_BM, decision.level, policy.temperatures[stage], decision.keep_BM)
        m_BN = torch.zeros_like(self._mask_BN).scatter(1, index_BM, m_BM * valid_BM)
        # as published, not multiplied with the mask before: gradients reach earlier thresholds through the scores
        self._mask_BN = m_BN
        self._seen_BN = torch.zeros_like(seen_BN).scatter(1, index_BM, decision.keep_BM & valid_BM)
        kept_B = self._seen_B()
        # ghosts have nothing to give, not even a gradient: nobody knows who would take them in
        amounts_BN = torch.where(seen_BN, 1 - m_BN, 0.0)
        if policy.spec.dropped == "merge":
            x_BND = self._merge(decision, amounts_BN, index_BM, x_BND)
        if self.observers:
            assert self.tally is not None
            self.tally.add_stage(before_B, kept_B)
            self.keep_masks.append(self._seen_BN[:, policy.num_prefix_tokens :])
        return x_BND

    def _merge(self, decision: Decision, amounts_BN: Tensor, index_BM: Tensor, x_BND: Tensor) -> Tensor:
        assert decision.takers_BM is not None
        takers_BM = index_BM.gather(1, decision.takers_BM)
        takers_BN = torch.zeros_like(amounts_BN, dtype=torch.long).scatter(1, index_BM, takers_BM)
        sizes_BN = torch.ones_like(amounts_BN) if self._sizes_BN is None else self._sizes_BN
        given_BN = amounts_BN * sizes_BN
        self._sizes_BN = sizes_BN.scatter_add(1, takers_BN, given_BN)
        # the mean by size as a change of the taker: x_j + Σ_i given_i·(x_i − x_j) / s'_j
        index_BND = takers_BN[..., None].expand_as(x_BND)
        shares_BN1 = (given_BN / self._sizes_BN.gather(1, takers_BN))[..., None].to(x_BND.dtype)
        self._gifts.append(_Gift(amounts_BN.detach(), takers_BN))
        return x_BND.scatter_add(1, index_BND, (x_BND - x_BND.gather(1, index_BND)) * shares_BN1)


def _at(findings: Findings, index_BM: Tensor) -> Findings:
    scores = findings.attention_scores_BM
    return replace(findings, attention_scores_BM=None if scores is None else scores.gather(1, index_BM))
