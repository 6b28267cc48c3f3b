"""One block of a pruned model: how its attention learns what to do.

Leaves what a block is given, and what its attention does, to `packed`, `masked` and `attention`.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from vitprune.attention import AttentionCall, KeysAndValuesFound, calling
from vitprune.ghosts import GhostRun
from vitprune.masked import MaskedPass
from vitprune.packed import PackedPass
from vitprune.tokens import TokenBatch


class Removable(Protocol):
    def remove(self) -> None: ...


@dataclass
class RunningForward:
    """The forward that runs now in this thread. checkpoints: blocks are run again in the backward pass."""

    state: PackedPass | MaskedPass
    checkpoints: bool = False


running_forward: ContextVar[RunningForward | None] = ContextVar("vitprune_running_forward", default=None)


class BlockForward:
    """Stands in for a block's `forward` and takes the keyword `pruning`.

    Works with every layer, whatever it makes of keywords that it doesn't know. Checkpointing is done here, since what
    is run again must attend as it did the first time.
    """

    def __init__(self, block: nn.Module, *, intercept: bool) -> None:
        self.block = block
        self.intercept = intercept
        # set by others on the instance, such as Accelerate's hooks
        self.previous = vars(block).get("forward")
        # timm's flag for whether a module calls torch's fused attention
        self.unfused = [module for module in block.modules() if vars(module).get("fused_attn") is False]

    def attach(self) -> BlockForward:
        vars(self.block)["forward"] = self
        self._set_fused(True)
        return self

    def remove(self) -> None:
        self._set_fused(False)
        if vars(self.block)["forward"] is not self:
            return  # wrapped by others since; without `pruning` this is the block's own forward
        del vars(self.block)["forward"]
        if self.previous is not None:
            vars(self.block)["forward"] = self.previous

    def _set_fused(self, fused: bool) -> None:
        for module in self.unfused:
            vars(module)["fused_attn"] = fused

    @torch.compiler.disable(recursive=False)  # the layer's own forward inside is compiled
    def __call__(self, *args: Any, pruning: AttentionCall | None = None, **kwargs: Any) -> Any:
        if pruning is None:
            return self._dense()(*args, **kwargs)
        block: Any = self.block
        running = running_forward.get()
        if isinstance(block, GradientCheckpointingLayer) and block.gradient_checkpointing and block.training:
            repeat: Any = block._gradient_checkpointing_func
            if getattr(repeat, "keywords", {}).get("use_reentrant"):
                raise ValueError(
                    "gradient checkpointing with use_reentrant=True can't train thresholds; enable it with "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            return repeat(partial(self._attend, pruning, **kwargs), *args)
        if running is not None and running.checkpoints:
            return checkpoint(partial(self._attend, pruning, **kwargs), *args, use_reentrant=False)
        return self._attend(pruning, *args, **kwargs)

    def _dense(self) -> Any:
        return self.previous or partial(type(self.block).forward, self.block)

    @torch.compiler.disable(recursive=False)
    def _attend(self, call: AttentionCall, *args: Any, **kwargs: Any) -> Any:
        # the layer's own forward, without transformers' checkpointing around it
        forward = self.previous or partial(inspect.unwrap(type(self.block).forward), self.block)
        with calling(call, intercept=self.intercept):
            if call.read is not None:
                with suppress(KeysAndValuesFound):
                    forward(*args, **kwargs)
                return forward(first_tokens(args[0], call), *args[1:], **kwargs)
            if call.ghost_run is None:
                return forward(*args, **kwargs)
            return self._attend_with_ghosts(forward, call, call.ghost_run, *args, **kwargs)

    @torch.compiler.disable(recursive=False)
    def _attend_with_ghosts(self, forward: Any, call: AttentionCall, run: GhostRun, *args: Any, **kwargs: Any) -> Any:
        run.draws.clear()
        try:
            output = forward(*args, **kwargs)
            with run.running(), suppress(KeysAndValuesFound):
                after = forward(run.states_XD[None], *args[1:], **{**kwargs, **run.arguments})
                run.after_XD = (after[0] if isinstance(after, tuple) else after)[0]
            call.conclude()
        finally:  # also where checkpointing breaks off, since it has all that it needs
            call.packed = None
        return output


def first_tokens(hidden_states: Tensor, call: AttentionCall) -> Tensor:
    """Of the hidden states those of the tokens that are wanted behind a block, (B, read, D)."""
    assert call.read is not None
    if not isinstance(call.tokens, TokenBatch):
        return hidden_states[:, : call.read]
    slots_BR = torch.arange(call.read, device=hidden_states.device).expand(len(call.tokens.lengths), -1)
    return hidden_states[0, call.tokens.layout.rows_of(slots_BR)]


def pack_rope(tables: tuple[Tensor, Tensor], positions: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """Rotary tables (cos, sin), (patches, K) each, for tokens at `positions` of the dense sequence, (T, K) each.

    Prefix tokens and those without a position aren't turned: cos 1, sin 0.
    """
    rows = (positions - num_prefix_tokens + 1).clamp(min=0)
    cos, sin = tables
    return (
        torch.cat([torch.ones_like(cos[:1]), cos]).index_select(0, rows),
        torch.cat([torch.zeros_like(sin[:1]), sin]).index_select(0, rows),
    )
