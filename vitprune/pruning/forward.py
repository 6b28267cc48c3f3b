"""One forward of a pruned model, block by block: tokens leave, and the rest travels packed, (1, T, D).

Shapes: B images, N tokens of an image in the dense sequence, T tokens of the batch laid end to end, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitprune.pruning import kernels
from vitprune.pruning.attention import NO_STATS, Attention, DenseAttention, LastBlockAttention, StatsRequest
from vitprune.pruning.costs import CostCounter
from vitprune.pruning.packed.attention import PackedAttention
from vitprune.pruning.packed.reduction import reduce_tokens
from vitprune.pruning.selection import Decision, Observer, Policy, decide
from vitprune.pruning.token_batch import Kernels, TokenBatch


class Forward(ABC):
    """The state of one forward of a pruned model. Belongs to that forward alone.

    merged_into: after each stage so far, int64 (B, patches): the patch whose token stands for each, see `TokenBatch`.
    counter: what it cost so far, counted where there are observers; None before the first block.
    num_tokens: of an image in the dense sequence. is_unpacked: whether what follows sees that again.
    """

    def __init__(self, policy: Policy, observers: tuple[Observer, ...] = ()) -> None:
        self.policy, self.observers = policy, observers
        self.merged_into: list[Tensor] = []
        self.counter: CostCounter | None = None
        self.num_tokens = 0
        self.is_unpacked = False
        self._made: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}

    def once(self, make: Callable[..., Any], *values: Any) -> Any:
        """What `make` makes of values, made once for all blocks that ask for it with the same objects."""
        key = (make, *map(id, values))
        if key not in self._made:
            self._made[key] = make(*values), values  # values stay, so that their identity is no other's
        return self._made[key][0]

    @abstractmethod
    def enter_block(
        self, block: int, hidden_states: Tensor, valid_BN: Tensor | None = None
    ) -> tuple[Tensor, Attention]:
        """What block `block` gets, and how it attends.

        valid_BN: False for patches that are padding: they leave before the first block.
        """

    @abstractmethod
    def leave_block(self, block: int, hidden_states: Tensor) -> Tensor:
        """Output of block `block` after the stage that follows it, if any."""

    @abstractmethod
    def unpack(self, hidden_states: Tensor) -> Tensor:
        """Hidden states behind the last block, and its norm, in the dense sequence, (B, N, D); zero for padding.

        Where only the head sees them, those that it reads.
        """

    def unpack_recorded(self, block: int, hidden_states: Tensor) -> Tensor:
        """What block `block` was given in the dense sequence, (B, N, D); one more than there are: the last's output."""
        return hidden_states

    def positions(self) -> Tensor | None:
        """Index in the dense sequence of each row of the hidden states; None while they are the dense sequence."""
        return None

    def absent_BN(self) -> Tensor | None:
        """True for tokens of the dense sequence that no token stands for; None where one stands for each."""
        return None

    def enter_norm(self, norm: Callable[[Tensor], Tensor]) -> None:
        """Called with the final norm before `unpack`."""
        return None

    def _count(self, hidden_states: Tensor, valid_BN: Tensor | None) -> Tensor:
        """Begin counting; return tokens of each image, (B,) float32, without padding."""
        images, self.num_tokens = hidden_states.shape[:2]
        if valid_BN is None:
            tokens_B = hidden_states.new_full((images,), self.num_tokens, dtype=torch.float32)
        else:
            tokens_B = valid_BN.sum(1).float()
        self.counter = CostCounter(self.policy.cost, self.policy.stage_macs, tokens_B)
        return tokens_B


class PackedForward(Forward):
    """A forward in which tokens that leave are gone.

    for_head: only the model's head sees what the last block gives out.
    trains: the last block is computed for all tokens, but counted as inference computes it.
    """

    def __init__(
        self,
        policy: Policy,
        observers: tuple[Observer, ...] = (),
        *,
        for_head: bool = False,
        trains: bool = False,
    ) -> None:
        super().__init__(policy, observers)
        self.trains = trains
        self.read = policy.cost.read if for_head and not trains else None
        self.stages = self._stages()
        self.batch: TokenBatch | None = None  # None while all tokens of all images are there
        self._kernels: Kernels | None = None
        self._tokens_B = torch.empty(0)
        self._valid_BN: Tensor | None = None
        self._last: Tensor | None = None
        self._attention: Attention = DenseAttention()
        self._batches: list[TokenBatch | None] = []

    def _stages(self) -> dict[int, int]:
        """Stage by block that it comes before; without observers, a stage at which nothing can leave is none."""
        return self.policy.stages(every=len(self.observers) > 0)

    @property
    def is_dense(self) -> bool:
        """Whether all of it is as in the dense model, and there are no observers."""
        return not (self.stages or self.read is not None or self.observers)

    def enter_block(
        self, block: int, hidden_states: Tensor, valid_BN: Tensor | None = None
    ) -> tuple[Tensor, Attention]:
        self._batches.append(self.batch)  # what the block is given, before padding leaves
        if block == 0:
            hidden_states = self._begin(hidden_states, valid_BN)
        if self.observers:
            assert self.counter is not None
            self.counter.add_block(block, self._tokens_B, in_full=self.read is None and not self.trains)
        self._attention = self._attention_of(block, hidden_states)
        return hidden_states, self._attention

    def _begin(self, hidden_states: Tensor, valid_BN: Tensor | None) -> Tensor:
        self._kernels = kernels.choose(hidden_states)
        self._tokens_B = self._count(hidden_states, valid_BN)
        if valid_BN is None:
            return hidden_states
        self._valid_BN = valid_BN
        batch, x_TD = reduce_tokens(self._dense(hidden_states), hidden_states.flatten(0, 1), Decision(valid_BN))
        own_patches_B1 = valid_BN.sum(1, keepdim=True) - self.policy.num_prefix_tokens
        self.batch = replace(batch, num_patches=own_patches_B1)
        return x_TD[None]

    def _dense(self, hidden_states: Tensor) -> TokenBatch:
        images, tokens = hidden_states.shape[:2]
        prefix, device = self.policy.num_prefix_tokens, hidden_states.device
        return TokenBatch.dense(images, tokens, prefix, device, self._kernels)

    def _request(self, block: int) -> StatsRequest:
        """What the stage behind a block, if there is one, wants to know of its attention."""
        return StatsRequest(self.policy.row, self.policy.compares_keys) if block + 1 in self.stages else NO_STATS

    def _attention_of(self, block: int, hidden_states: Tensor) -> Attention:
        request = self._request(block)
        if self.read is not None and block + 1 == len(self.policy.cost.linear):
            return LastBlockAttention(self.batch, self.read)
        if self.batch is not None:
            return PackedAttention(self.batch, request)
        return DenseAttention(self._dense(hidden_states) if block + 1 in self.stages else None, request)

    def leave_block(self, block: int, hidden_states: Tensor) -> Tensor:
        stage = self.stages.get(block + 1)
        return hidden_states if stage is None else self._reduce(stage, hidden_states)

    @property
    def _present(self) -> TokenBatch:
        """The tokens that a stage decides about: those of the attention of the block before."""
        assert isinstance(self._attention, PackedAttention | DenseAttention)
        assert self._attention.batch is not None
        return self._attention.batch

    def _reduce(self, stage: int, hidden_states: Tensor) -> Tensor:
        """Hidden states behind a stage."""
        before = self._present
        with torch.no_grad():
            decision = decide(self.policy, stage, self._attention.stats, before, self.observers)
        after, x_TD = reduce_tokens(before, hidden_states.flatten(0, 1), decision)
        self._end_stage(after, decision.keep_BM)
        if after is before:
            return hidden_states
        self.batch = after
        return x_TD[None]

    def _end_stage(self, after: TokenBatch, kept_BM: Tensor) -> None:
        """Make what the blocks behind a stage share; count the stage, if there are observers. kept_BM: 0/1."""
        if torch.is_grad_enabled():
            _ = after.key_bias_T  # now, since checkpointing repeats only what a block computes itself
        if not self.observers:
            return
        assert self.counter is not None
        kept_B = kept_BM.sum(1).float()
        self.counter.add_stage(self._tokens_B, kept_B)
        self._tokens_B = kept_B
        self.merged_into.append(after.merged_into())

    def positions(self) -> Tensor | None:
        return None if self.batch is None else self.batch.positions_T

    def absent_BN(self) -> Tensor | None:
        if self.batch is None:
            return None
        return None if self.batch.covers_all else ~self.batch.present_BN

    def unpack(self, hidden_states: Tensor) -> Tensor:
        if self.read is not None:
            return hidden_states
        self._last = self._masked(self._unpack_last(hidden_states))
        return self._last

    def _unpack_last(self, hidden_states: Tensor) -> Tensor:
        return self._in_place(self.batch, hidden_states)

    def unpack_recorded(self, block: int, hidden_states: Tensor) -> Tensor:
        if hidden_states is self._last:  # where no norm follows
            return hidden_states
        batch = self._batches[min(block, len(self._batches) - 1)]
        return self._masked(self._in_place(batch, hidden_states))

    @staticmethod
    def _in_place(batch: TokenBatch | None, hidden_states: Tensor) -> Tensor:
        return hidden_states if batch is None else batch.unpack(hidden_states[0])

    def _masked(self, hidden_states: Tensor) -> Tensor:
        return hidden_states if self._valid_BN is None else hidden_states * self._valid_BN[..., None]
