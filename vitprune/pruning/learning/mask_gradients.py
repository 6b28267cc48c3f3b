"""Packed attention whose masks have a gradient: forward and backward of one call.

It says what AS-ViT's masked attention says of tokens that are there, without keeping a matrix of all pairs for the
backward pass: the fused kernel runs forward and backward over the keys of kept tokens, and the gradient of a mask needs
its own column only. A borderline token isn't attended to, so its column is a matter of the backward pass alone.

Shapes: G images of as many rows, H heads, L rows of an image, C of them whose mask or size learns or C borderline
tokens, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vitprune.pruning.scores import at_least_float32, true_indices


@dataclass(frozen=True)
class KeptKeys:
    """The keys of a rectangle of images.

    bias_GL: added to a key's logits: log of its size, −inf for fillers; may have a gradient.
    mask_GL: 1, may have a gradient. learns_GL: bool, whose gradients are wanted.
    """

    bias_GL: Tensor
    mask_GL: Tensor
    learns_GL: Tensor


@dataclass(frozen=True)
class BorderlineKeys:
    """Keys that aren't attended to, and whose masks learn what attending to them would be worth.

    in_backward: gives keys and values, (G, H, C, K) each, and what is added to the logits of pairs, (G, H, L, C); asked
        in the backward pass, when the borderline tokens have been through the block.
    bias_GC: log of their sizes, −inf where there is none. mask_GC: 0, with a gradient.
    """

    in_backward: Callable[[], tuple[Tensor, Tensor, Tensor | None]]
    bias_GC: Tensor
    mask_GC: Tensor


def mask_gradient_attention(
    q_GHLK: Tensor,
    k_GHLK: Tensor,
    v_GHLK: Tensor,
    kept: KeptKeys,
    borderline: BorderlineKeys | None,
    scale: float,
    pairs_GHLL: Tensor | None = None,
) -> Tensor:
    """Σ_j exp(a_ij + bias_j)·G_ij·v_j / Σ_j, G_ij = M_j for j ≠ i and 1 for j = i (AS-ViT), (G, H, L, K).

    pairs_GHLL: added to the logits of pairs; may have a gradient. It is the only matrix of all pairs that is kept.
    """
    mask_GC = None if borderline is None else borderline.mask_GC
    return _MaskGradientAttention.apply(
        q_GHLK, k_GHLK, v_GHLK, kept.bias_GL, kept.mask_GL, mask_GC, pairs_GHLL, kept.learns_GL, borderline, scale
    )


class _MaskGradientAttention(torch.autograd.Function):
    """Masks are arguments for the sake of their gradients alone: which tokens are kept is known already."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias_GL: Tensor,
        mask_GL: Tensor,
        mask_GC: Tensor | None,
        pairs_GHLL: Tensor | None,
        learns_GL: Tensor,
        borderline: BorderlineKeys | None,
        scale: float,
    ) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            output, lse_GHL = _fused(q, k, v, _added(bias_GL, pairs_GHLL, q), scale)
        ctx.save_for_backward(q, k, v, output, lse_GHL, bias_GL, pairs_GHLL, learns_GL)
        ctx.borderline, ctx.scale = borderline, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse_GHL, bias_GL, pairs_GHLL, learns_GL = ctx.saved_tensors
        needs_bias, needs_mask, needs_borderline, needs_pairs = ctx.needs_input_grad[3:7]
        dbias_GL = dmask_GL = dmask_GC = None
        with torch.autocast(q.device.type, enabled=False):
            back = _Backward(gradients[0].to(q.dtype), q, k, v, output, lse_GHL, ctx.scale)
            dq, dk, dv, dpairs = back.of_inputs(_added(bias_GL, pairs_GHLL, q), explicit=needs_pairs)
            if needs_bias or needs_mask:
                columns_GC = true_indices(learns_GL)
                all_GC, own_GC = back.of_columns(columns_GC, bias_GL, pairs_GHLL)
                zeros_GL = all_GC.new_zeros(bias_GL.shape)
                learns_GC = learns_GL.gather(1, columns_GC)
                # a token sees itself whatever its mask
                dmask_GL = zeros_GL.scatter_add(1, columns_GC, (all_GC - own_GC) * learns_GC)
                dbias_GL = zeros_GL.scatter_add(1, columns_GC, all_GC * learns_GC)
            if needs_borderline:
                borderline: BorderlineKeys = ctx.borderline
                their_k, their_v, their_pairs = borderline.in_backward()
                dmask_GC = back.of_logits(their_k, their_v, borderline.bias_GC, their_pairs).sum(1)
        return dq, dk, dv, dbias_GL, dmask_GL, dmask_GC, dpairs, None, None, None


def borderline_attention(
    q_GHCK: Tensor,
    k_GHCK: Tensor,
    v_GHCK: Tensor,
    k_GHLK: Tensor,
    v_GHLK: Tensor,
    own_bias_GHC: Tensor,
    bias_GHCL: Tensor,
    scale: float,
) -> Tensor:
    """Each borderline token attends to itself and to kept ones, (G, H, C, K); without gradient.

    own_bias_GHC: added to its logit for itself. bias_GHCL: and to those for kept tokens.
    """
    with torch.autocast(q_GHCK.device.type, enabled=False):
        output, lse_GHC = _fused(q_GHCK, k_GHLK, v_GHLK, bias_GHCL, scale)
        own_GHC = (at_least_float32(q_GHCK) * at_least_float32(k_GHCK)).sum(-1) * scale + own_bias_GHC
        # one more term of the softmax, beside the kernel's own denominator
        share_GHC1 = (own_GHC - torch.logaddexp(lse_GHC, own_GHC)).exp()[..., None]
        others_GHCK = at_least_float32(output)
        return (others_GHCK + share_GHC1 * (v_GHCK - others_GHCK)).to(output.dtype)


def _added(bias_GL: Tensor, pairs_GHLL: Tensor | None, q_GHLK: Tensor) -> Tensor:
    """What is added to the logits, as the kernel wants it."""
    bias = bias_GL.detach()[:, None, None]
    bias = bias if pairs_GHLL is None else bias + pairs_GHLL.detach()
    return bias.to(q_GHLK.dtype).expand(-1, -1, q_GHLK.shape[2], -1)


def has_fused_kernel(device: torch.device) -> bool:
    """Whether there is a fused kernel that takes a bias and tells the softmax's denominator; else plain products."""
    return device.type == "cpu"


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Context vectors and, float32, the logarithm of the softmax's denominator, (G, H, L)."""
    if not has_fused_kernel(q.device):
        logits = at_least_float32(q @ k.transpose(-1, -2)) * scale + bias
        lse = logits.logsumexp(-1)
        return (logits - lse[..., None]).exp().to(v.dtype) @ v, lse
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias, scale=scale)


@dataclass(frozen=True)
class _Backward:
    """gradient: of the output, (G, H, L, K); q, k, v, output alike. lse_GHL: logarithm of the denominator."""

    gradient: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor
    lse_GHL: Tensor
    scale: float

    def of_inputs(self, bias: Tensor, *, explicit: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of queries, keys, values and, if explicit, of what is added to the logits of pairs."""
        if explicit or not has_fused_kernel(self.q.device):
            weights, dlogits = self._weights(self.k, self.v, bias)
            dproducts = (dlogits * self.scale).to(self.q.dtype)
            dv = weights.to(self.v.dtype).transpose(-1, -2) @ self.gradient
            return dproducts @ self.k, dproducts.transpose(-1, -2) @ self.q, dv, dlogits if explicit else None
        dqkv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            self.gradient,
            self.q,
            self.k,
            self.v,
            self.output,
            self.lse_GHL,
            0.0,
            False,
            attn_mask=bias,
            scale=self.scale,
        )
        return *dqkv, None

    def of_columns(self, columns_GC: Tensor, bias_GL: Tensor, pairs_GHLL: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of the logits of some of the keys, summed over those that see them, and those of each to itself; (G, C)."""
        index = columns_GC[:, None, :, None].expand(-1, self.q.shape[1], -1, self.q.shape[3])
        pairs = None
        if pairs_GHLL is not None:
            heads, rows = pairs_GHLL.shape[1:3]
            pairs = pairs_GHLL.gather(3, columns_GC[:, None, None].expand(-1, heads, rows, -1))
        bias_GC = bias_GL.gather(1, columns_GC)
        dlogits_GLC = self.of_logits(self.k.gather(2, index), self.v.gather(2, index), bias_GC, pairs)
        return dlogits_GLC.sum(1), dlogits_GLC.gather(1, columns_GC[:, None])[:, 0]

    def of_logits(self, k: Tensor, v: Tensor, bias_GC: Tensor, pairs_GHLC: Tensor | None) -> Tensor:
        """Of the logits of keys (G, H, C, K) if they were seen, summed over heads, (G, L, C) float32."""
        bias = bias_GC[:, None, None]
        return self._weights(k, v, bias if pairs_GHLC is None else bias + pairs_GHLC)[1].sum(1)

    def _weights(self, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """exp(a_ij + bias_j − lse_i) and the gradients of these logits, (G, H, L, C) float32."""
        # in place: these are the largest tensors of the backward pass
        logits = at_least_float32(self.q @ k.transpose(-1, -2)).mul_(self.scale).add_(bias)
        weights = logits.sub_(self.lse_GHL[..., None]).exp_()
        dlogits = at_least_float32(self.gradient @ v.transpose(-1, -2)).sub_(self._own_GHL1).mul_(weights)
        return weights, dlogits

    @cached_property
    def _own_GHL1(self) -> Tensor:
        return (at_least_float32(self.gradient) * self.output).sum(-1, keepdim=True)
