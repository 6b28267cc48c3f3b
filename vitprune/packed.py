"""One inference forward of a pruned model: tokens leave, the rest travels packed, (1, T, D).

Shapes: B images, N tokens of an image in the dense sequence, T tokens of the batch laid end to end, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitprune.attention import AttentionCall
from vitprune.stage import Observer, Policy, decide, fuse_weights, stage_macs
from vitprune.tokens import Departure, TokenBatch, depart


class PackedPass:
    """The state of one forward. Belongs to that forward alone.

    keep_masks: after each stage so far, bool (B, patches): the patches that are still tokens of their own.
    macs_B: multiply-accumulates of the blocks and stages so far, float64.
    """

    def __init__(self, policy: Policy, observers: tuple[Observer, ...]) -> None:
        self.policy = policy
        self.observers = observers
        self.keep_masks: list[Tensor] = []
        self.macs_B: Tensor | None = None
        self.num_tokens = 0
        self._batch: TokenBatch | None = None
        self._call = AttentionCall()
        self._batches: list[TokenBatch | None] = []

    def enter_block(self, block: int, hidden_states: Tensor) -> tuple[Tensor, AttentionCall]:
        """What block `block` gets: hidden states, (B, N, D) before the first stage and (1, T, D) after it."""
        policy = self.policy
        if block == 0:
            self.num_tokens = hidden_states.shape[1]
            self.macs_B = torch.zeros(hidden_states.shape[0], dtype=torch.float64, device=hidden_states.device)
        if block in policy.before_blocks:
            hidden_states = self._prune(policy.before_blocks.index(block), hidden_states)
        if self.observers:
            assert self.macs_B is not None
            self.macs_B = self.macs_B + policy.cost.block(block, self._lengths_B())
        stage_follows = block + 1 in policy.before_blocks
        self._call = AttentionCall(
            tokens=self._batch,
            wants_scores=stage_follows and policy.needs_class_attention,
            wants_metric=stage_follows and policy.needs_metric,
        )
        self._batches.append(self._batch)
        return hidden_states, self._call

    def unpack(self, hidden_states: Tensor) -> Tensor:
        """Hidden states behind the last block in the dense sequence, (B, N, D)."""
        return hidden_states if self._batch is None else self._batch.unpack(hidden_states[0])

    def unpack_block_output(self, block: int, hidden_states: Tensor) -> Tensor:
        """What block `block` gave out, in the dense sequence, (B, N, D)."""
        batch = self._batches[block]
        return hidden_states if batch is None else batch.unpack(hidden_states[0])

    def _lengths_B(self) -> Tensor:
        assert self.macs_B is not None
        if self._batch is None:
            return torch.full_like(self.macs_B, self.num_tokens)
        return self._batch.lengths_B.double()

    def _prune(self, stage: int, hidden_states: Tensor) -> Tensor:
        policy, batch = self.policy, self._batch
        if batch is None:
            images, tokens = hidden_states.shape[:2]
            batch = TokenBatch.dense(images, tokens, policy.num_prefix_tokens, hidden_states.device)
        findings = self._call.findings
        positions_BM = batch.pad(batch.positions_T)
        decision = decide(policy, stage, findings, batch.valid_BM, positions_BM, self.observers)
        weights_BM = fuse_weights(policy, decision) if policy.spec.dropped == "fuse" else None
        departure = Departure(decision.keep_BM, decision.takers_BM, weights_BM)
        self._batch, x_TD = depart(batch, hidden_states.flatten(0, 1), departure)
        if self.observers:
            assert self.macs_B is not None
            kept_B = decision.keep_BM.sum(1).double()
            self.macs_B = self.macs_B + stage_macs(policy, batch.lengths_B.double(), kept_B)
            self.keep_masks.append(self._batch.kept_patches())
        return x_TD[None]
