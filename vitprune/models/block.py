"""One block of a pruned model: how its attention function learns which `Attention` it is to be.

transformers' layers call an attention function by name; those that know nothing of it (timm's) call torch's fused
attention, which is intercepted. Both end in the `Attention` of the block that runs. Elsewhere it is sdpa.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
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
    attention = context.current().attention
    if attention is None:
        contexts, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        if torch.compiler.is_exporting():  # the strides of a fused kernel aren't those of what stands for it in a graph
            contexts = contexts.clone(memory_format=torch.contiguous_format)
        return contexts, None
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
        attention = context.current().attention
        assert attention is not None
        assert not is_causal
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        return attention.attend(query, key, value, attn_mask, factor, dropout_p).transpose(1, 2)


class BlockForward:
    """Stands in for a block's `forward` and takes the keyword `pruning`, which the hook before the block adds.

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

    @uncompiled  # the layer's own forward inside is compiled
    def __call__(self, *args: Any, pruning: Attention | None = None, **kwargs: Any) -> Any:
        if pruning is None:
            return self._dense()(*args, **kwargs)
        block: Any = self.block
        if isinstance(block, GradientCheckpointingLayer) and block.gradient_checkpointing and block.training:
            repeat: Any = block._gradient_checkpointing_func
            if getattr(repeat, "keywords", {}).get("use_reentrant"):
                raise ValueError(
                    "gradient checkpointing with use_reentrant=True can't train thresholds; enable it with "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            return repeat(partial(self._attend, pruning, **kwargs), *args)
        if context.current().checkpoints:
            return checkpoint(partial(self._attend, pruning, **kwargs), *args, use_reentrant=False)
        return self._attend(pruning, *args, **kwargs)

    def _dense(self) -> Any:
        return self.previous or partial(type(self.block).forward, self.block)

    @uncompiled
    def _attend(self, attention: Attention, *args: Any, **kwargs: Any) -> Any:
        # the layer's own forward, without transformers' checkpointing around it
        forward: Callable[..., Any] = self.previous or partial(inspect.unwrap(type(self.block).forward), self.block)
        with context.within(attention=attention), _Intercept() if self.intercept else nullcontext():
            return attention.run(forward, *args, **kwargs)


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
