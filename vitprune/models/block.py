"""One block of a pruned model: what it is given, which `Attention` it attends by, and what leaves behind it.

transformers' layers call an attention function by name; those that know nothing of it (timm's) call torch's fused
attention, which is intercepted. Both end in the `Attention` of the block that runs. Elsewhere it is sdpa.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from vitprune.models import context
from vitprune.pruning.attention import Attention, uncompiled
from vitprune.pruning.forward import Forward

NAME = "vitprune"


@torch.compiler.disable()
def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, H, N, K) or packed (1, H, T, K), output (B, N, H, K)."""
    attention = context.attention()
    if attention is None:
        contexts, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        if torch.compiler.is_exporting():  # the strides of a fused kernel aren't those of what stands for it in a graph
            contexts = contexts.clone(memory_format=torch.contiguous_format)
        return contexts, None
    if unknown := [name for name in ("position_bias", "softcap") if kwargs.get(name) is not None]:
        raise ValueError(f"{type(module).__name__} attends with {', '.join(unknown)}, which packed tokens don't know")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention.attend(query, key, value, attention_mask, scale, dropout), None


def attention_mask(
    *sizes: Any, attention_mask: Tensor | None = None, allow_is_bidirectional_skip: bool = False, **kwargs: Any
) -> Tensor | None:
    """transformers' interface of masks: none where nothing is padding, which sdpa's doesn't see in a graph."""
    if attention_mask is None and allow_is_bidirectional_skip and torch.compiler.is_exporting():
        return None
    given = {"attention_mask": attention_mask, "allow_is_bidirectional_skip": allow_is_bidirectional_skip, **kwargs}
    return sdpa_mask(*sizes, **given)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)


class _Intercept(TorchFunctionMode):
    """Puts the block's `Attention` in the place of torch's own fused attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        attention = context.attention()
        assert attention is not None
        assert not is_causal
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        return attention.attend(query, key, value, attn_mask, factor, dropout_p).transpose(1, 2)


@cache
def _own_forward(layer: type[nn.Module]) -> Callable[..., Any]:
    """A layer's own forward, without transformers' checkpointing around it."""
    return inspect.unwrap(layer.forward)


class BlockForward:
    """Stands in for a block's `forward`: what goes in, how it attends and what comes out are the running forward's.

    In place of hooks around it, whose machinery takes longer than all of this. Works with every layer, as the layer
    sees nothing of it. Checkpointing is done here, since what is run again must attend as it did the first time.
    """

    def __init__(
        self, block: nn.Module, index: int = 0, *, intercept: bool, rope: bool = False, pads: bool = False
    ) -> None:
        self.block, self.index = block, index
        self.intercept, self.rope, self.pads = intercept, rope, pads
        self.is_removed = False
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
        self.is_removed = True  # where others have wrapped it since, it stays, and is the block's own forward
        if vars(self.block)["forward"] is not self:
            return
        del vars(self.block)["forward"]
        if self.previous is not None:
            vars(self.block)["forward"] = self.previous

    def _set_fused(self, fused: bool) -> None:
        for module in self.unfused:
            vars(module)["fused_attn"] = fused

    @uncompiled  # the layer's own forward inside is compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = context.current()
        forward = None if self.is_removed else running.forward
        if forward is None:
            dense = self.previous or partial(type(self.block).forward, self.block)
            output = dense(*args, **kwargs)
        else:
            args, kwargs, attention = self._enter(forward, args, kwargs)
            output = self.run(attention, *args, **kwargs)
        if running.behind_block is not None:
            running.behind_block()
        return output if forward is None else self._leave(forward, output)

    @torch.compiler.disable()
    def _enter(
        self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], Attention]:
        """What the layer is called with, and how it attends."""
        rest, valid_BN = args[1:], None
        if self.pads:  # the layers hand it over right behind the hidden states, (B, 1, N, N)
            mask, *others = rest
            valid_BN = None if mask is None else mask[:, 0, 0]
            rest = (None, *others)
        if "interpolate_pos_encoding" in kwargs:
            # what a backbone makes of it is done; BEiT's layers would stretch their table to the rows that are there
            kwargs = {**kwargs, "interpolate_pos_encoding": False}
        hidden_states, attention = forward.enter_block(self.index, args[0], valid_BN)
        positions = forward.positions() if self.rope else None
        if positions is not None:
            tables, prefix = kwargs["position_embeddings"], forward.policy.num_prefix_tokens

            def turned(positions: Tensor) -> dict[str, Any]:
                whole = forward.once(rope_of_all, tables, prefix)
                return {"position_embeddings": forward.once(pack_rope, whole, positions)}

            kwargs = {**kwargs, **attention.position_arguments(turned, positions)}
        return (hidden_states, *rest), kwargs, attention

    @torch.compiler.disable()
    def _leave(self, forward: Forward, output: Any) -> Any:
        """The block's output after the stage that follows it: the caller keeps only what is left."""
        if isinstance(output, tuple):
            return forward.leave_block(self.index, output[0]), *output[1:]
        return forward.leave_block(self.index, output)

    @uncompiled
    def run(self, attention: Attention, *args: Any, **kwargs: Any) -> Any:
        """The layer's output with such an attention."""
        block: Any = self.block
        if block.training and isinstance(block, GradientCheckpointingLayer) and block.gradient_checkpointing:
            repeat: Any = block._gradient_checkpointing_func
            if getattr(repeat, "keywords", {}).get("use_reentrant"):
                raise ValueError(
                    "blocks of a pruned model can't be computed again with use_reentrant=True; enable it with "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            return repeat(partial(self._attend, attention, **kwargs), *args)
        if context.current().checkpoints:
            return checkpoint(partial(self._attend, attention, **kwargs), *args, use_reentrant=False)
        return self._attend(attention, *args, **kwargs)

    @uncompiled
    def _attend(self, attention: Attention, *args: Any, **kwargs: Any) -> Any:
        layer: Callable[..., Any] = self.previous or partial(_own_forward(type(self.block)), self.block)
        with context.Attending(attention):
            if not self.intercept:
                return attention.run(layer, *args, **kwargs)
            with _Intercept():
                return attention.run(layer, *args, **kwargs)


def rope_of_all(tables: tuple[Tensor, Tensor], num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """Rotary tables (cos, sin), (patches, K) each, of the whole dense sequence, and last of what has no position (−1).

    Prefix tokens and the last aren't turned: cos 1, sin 0.
    """
    cos, sin = tables
    unturned = cos.new_ones(num_prefix_tokens + 1, cos.shape[-1]), sin.new_zeros(num_prefix_tokens + 1, sin.shape[-1])
    cos, sin = (torch.cat([first[1:], table, first[:1]]) for first, table in zip(unturned, tables, strict=True))
    return cos, sin


def pack_rope(tables: tuple[Tensor, Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
    """Those of `rope_of_all` for tokens at `positions` of the dense sequence, (T, K) each."""
    cos, sin = tables
    return cos[positions], sin[positions]
