"""One forward of a pruned model in which tokens leave and the rest travels packed, (1, T, D).

In inference, and in training while thresholds are frozen, those that leave are gone. A pass in which thresholds learn
keeps those near them as ghosts, so that the gradient of the straight-through mask is the masked pass's but for what
lies beyond `thresholds.BAND`, until the next stage.

Shapes: B images, N tokens of an image in the dense sequence, T tokens of the batch laid end to end, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from vitprune import cpu_stage
from vitprune.attention import AttentionCall
from vitprune.departure import Departure, Teaching, depart
from vitprune.ghosts import GhostRun, Ghosts, average_seen, linger
from vitprune.stage import Decision, Observer, Policy, Tally, count_tokens, decide
from vitprune.thresholds import near_threshold, straight_through
from vitprune.tokens import TokenBatch


class PackedPass:
    """The state of one forward. Belongs to that forward alone.

    trains: weights learn, and with `learns` thresholds, too.
    for_head: nobody but the model's head sees what the last block gives out.
    keep_masks: after each stage so far, bool (B, patches): the patches that are still tokens of their own.
    tally: what it cost so far, counted where somebody observes; None before the first block.
    """

    def __init__(
        self, policy: Policy, observers: tuple[Observer, ...], *, trains: bool = False, for_head: bool = False
    ) -> None:
        self.policy = policy
        self.observers = observers
        self.trains = trains
        self.learns = trains and policy.levels.requires_grad and torch.is_grad_enabled()
        self.read = policy.cost.read if for_head and not trains else None
        self.keep_masks: list[Tensor] = []
        self.tally: Tally | None = None
        self.num_tokens = 0
        # where nobody observes or learns, a stage at which nothing can leave is none
        watched = self.learns or bool(observers)
        self._stages = {
            block: stage
            for stage, (block, level) in enumerate(zip(policy.before_blocks, policy.levels.tolist(), strict=True))
            if watched or not policy.keeps_all(level)
        }
        self._loops = False
        self._tokens_B = torch.empty(0)  # that are seen; with gradient where the pass learns
        self._batch: TokenBatch | None = None
        self._present: TokenBatch | None = None  # the tokens that the next stage decides about
        self._valid_BN: Tensor | None = None
        self._last: Tensor | None = None
        self._call = AttentionCall()
        self._batches: list[TokenBatch | None] = []
        self._ghosts: Ghosts | None = None
        self._ghosts_XD: Tensor | None = None

    @property
    def is_dense(self) -> bool:
        """Whether all of it is as in the dense model, and nobody wants to know."""
        return not (self._stages or self.read is not None or self.observers)

    def enter_block(
        self, block: int, hidden_states: Tensor, valid_BN: Tensor | None = None
    ) -> tuple[Tensor, AttentionCall]:
        """What block `block` gets: hidden states, (B, N, D) before anything left and (1, T, D) after it.

        valid_BN: False for patches that are padding: they leave before the first block.
        """
        policy = self.policy
        if block == 0:
            hidden_states = self._begin(hidden_states, valid_BN)
        if self.observers:
            assert self.tally is not None
            self.tally.add_block(block, self._tokens_B, in_full=self.read is None and not self.trains)
        stage_follows = block + 1 in self._stages
        if stage_follows:
            self._present = self._batch or self._dense(hidden_states)
        self._call = AttentionCall(
            tokens=self._batch,
            scores_of=policy.scores_of if stage_follows else None,
            wants_metric=stage_follows and policy.needs_metric,
            learns=self.learns,
            loops=self._loops,
            read=self.read if block + 1 == len(policy.cost.linear) else None,
        )
        if self._ghosts is not None:
            assert self._ghosts_XD is not None
            is_last = block + 1 == len(policy.cost.linear)
            averages = policy.reads_patches and policy.spec.dropped == "leave"
            ends = stage_follows or (is_last and not averages)
            self._call.ghost_run = GhostRun(self._ghosts, self._ghosts_XD, ends=ends)
        self._batches.append(self._batch)
        return hidden_states, self._call

    def leave_block(self, block: int, hidden_states: Tensor) -> Tensor:
        """What block `block` gave out, without the tokens that leave before the next."""
        run = self._call.ghost_run
        if run is not None:
            self._ghosts, self._ghosts_XD = (None, None) if run.after_XD is None else (run.ghosts, run.after_XD)
        stage = self._stages.get(block + 1)
        return hidden_states if stage is None else self._prune(stage, hidden_states)

    def _begin(self, hidden_states: Tensor, valid_BN: Tensor | None) -> Tensor:
        self.num_tokens = hidden_states.shape[1]
        self._loops = cpu_stage.can_loop(hidden_states)
        self._tokens_B = count_tokens(hidden_states, valid_BN)
        self.tally = Tally(self.policy, self._tokens_B)
        if valid_BN is None:
            return hidden_states
        self._valid_BN = valid_BN
        batch, x_TD = depart(self._dense(hidden_states), hidden_states.flatten(0, 1), Departure(valid_BN))
        own_patches_B1 = valid_BN.sum(1, keepdim=True) - self.policy.num_prefix_tokens
        self._batch = replace(batch, num_patches=own_patches_B1)
        return x_TD[None]

    def positions(self) -> Tensor | None:
        """Index in the dense sequence of each row of the hidden states; None while they are the dense sequence."""
        return None if self._batch is None else self._batch.positions_T

    def absent_BN(self) -> Tensor | None:
        """True for tokens of the dense sequence that nobody stands for; None where somebody stands for each."""
        if self._batch is None:
            return None
        absent_BN = ~self._batch.present_BN
        return absent_BN if absent_BN.any() else None

    def norm_ghosts(self, norm: Callable[[Tensor], Tensor]) -> None:
        """What the final norm makes of ghosts, who don't go through it with the others."""
        if self._ghosts_XD is not None:
            with torch.no_grad():
                self._ghosts_XD = norm(self._ghosts_XD[None])[0]

    def unpack(self, hidden_states: Tensor) -> Tensor:
        """Hidden states behind the last block in the dense sequence, (B, N, D); zero for padding.

        Where nobody but the head sees them, those that it reads.
        """
        if self.read is not None:
            return hidden_states
        self._last = self._unpack(self._batch, hidden_states, with_gradients=True)
        return self._last

    def unpack_recorded(self, block: int, hidden_states: Tensor) -> Tensor:
        """What block `block` was given in the dense sequence, (B, N, D); one more than there are: the last's output."""
        if hidden_states is self._last:  # where no norm follows
            return hidden_states
        return self._unpack(self._batches[min(block, len(self._batches) - 1)], hidden_states)

    def _unpack(self, batch: TokenBatch | None, hidden_states: Tensor, *, with_gradients: bool = False) -> Tensor:
        """with_gradients: at the end, with what the dense sequence tells thresholds about tokens that left."""
        if batch is None:
            return hidden_states
        x_TD = hidden_states[0]
        if with_gradients and batch.learning is not None and batch.sizes_T is None:
            y_BND = average_seen(x_TD, self._ghosts, self._ghosts_XD, batch)
        else:
            y_BND = batch.unpack(x_TD)
        return y_BND if self._valid_BN is None else y_BND * self._valid_BN[..., None]

    def _dense(self, hidden_states: Tensor) -> TokenBatch:
        images, tokens = hidden_states.shape[:2]
        prefix, device = self.policy.num_prefix_tokens, hidden_states.device
        return TokenBatch.dense(images, tokens, prefix, device, loops=self._loops)

    def _prune(self, stage: int, hidden_states: Tensor) -> Tensor:
        policy, batch = self.policy, self._present
        assert batch is not None
        with nullcontext() if self.learns else torch.no_grad():
            decision = decide(policy, stage, self._call.findings, batch, self.observers, learns=self.learns)
        teaching = self._teaching(stage, decision) if self.learns else None
        departure = Departure(decision.keep_BM, decision.takers_BM, decision.metric_TK, teaching, decision.kept)
        before_TD = hidden_states.flatten(0, 1)
        after, x_TD = depart(batch, before_TD, departure)
        if teaching is not None:
            self._ghosts, self._ghosts_XD = linger(batch, before_TD, departure)
        if after is not batch:
            self._batch, hidden_states = after, x_TD[None]
        if self.trains:
            _ = after.key_bias_T  # now, since checkpointing repeats only what a block computes itself
        if self.observers:
            assert self.tally is not None
            counted_BM = decision.keep_BM if teaching is None else teaching.mask_BM
            kept_B = counted_BM.sum(1).double()
            self.tally.add_stage(self._tokens_B, kept_B)
            self._tokens_B = kept_B
            self.keep_masks.append(after.kept_patches())
        return hidden_states

    def _teaching(self, stage: int, decision: Decision) -> Teaching:
        level, temperature = decision.level, self.policy.temperatures[stage]
        mask_BM = straight_through(decision.scores_BM, level, temperature, decision.keep_BM)
        near_BM = near_threshold(decision.scores_BM.detach(), level.detach(), temperature)
        return Teaching(mask_BM, near_BM)
