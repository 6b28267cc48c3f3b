"""Attention of a packed training pass: ghosts see the others, nobody sees them, and still every mask has its gradient.

What masked attention (AS-ViT) says of tokens that are there, without a matrix of all pairs kept for the backward pass:
the fused kernel runs forward and backward over the keys that are seen, and the gradient of a mask needs its own column
only. Leaves who is a ghost to `departure`.

A ghost's output reaches nobody but itself, and it is gone at the next stage; so no gradient comes back through it, and
none is computed.

Shapes: G images of as many rows, H heads, L rows of an image, C of them whose mask or size learns, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitprune.scoring import true_indices


@dataclass(frozen=True)
class GhostKeys:
    """The keys of a bucket of images.

    bias_GL: added to a key's logits: log of its size, −inf for fillers; may have a gradient.
    mask_GL: 0/1, may have a gradient. seen_GL: the same as bool. learns_GL: bool, whose gradients are wanted.
    """

    bias_GL: Tensor
    mask_GL: Tensor
    seen_GL: Tensor
    learns_GL: Tensor


def ghost_attention(
    q_GHLK: Tensor, k_GHLK: Tensor, v_GHLK: Tensor, keys: GhostKeys, scaling: float, pairs_GHLL: Tensor | None = None
) -> Tensor:
    """Σ_j exp(a_ij + bias_j)·G_ij·v_j / Σ_j, G_ij = M_j for j ≠ i and 1 for j = i (AS-ViT), (G, H, L, K).

    pairs_GHLL: added to the logits of pairs; may have a gradient, and then the matrix is kept.
    """
    if pairs_GHLL is not None:
        return _explicit(q_GHLK, k_GHLK, v_GHLK, keys, scaling, pairs_GHLL)
    columns_GC = true_indices(keys.learns_GL)
    return _GhostAttention.apply(
        q_GHLK, k_GHLK, v_GHLK, keys.bias_GL, keys.mask_GL, keys.seen_GL, keys.learns_GL, columns_GC, scaling
    )


def _explicit(
    q_GHLK: Tensor, k_GHLK: Tensor, v_GHLK: Tensor, keys: GhostKeys, scaling: float, pairs_GHLL: Tensor
) -> Tensor:
    logits_GHLL = (q_GHLK @ k_GHLK.transpose(-1, -2)).float() * scaling + pairs_GHLL + keys.bias_GL[:, None, None]
    alone_LL = torch.eye(logits_GHLL.shape[-1], dtype=torch.bool, device=logits_GHLL.device)
    seen_GLL = torch.where(alone_LL, 1.0, keys.mask_GL[:, None])
    weights = (logits_GHLL - logits_GHLL.detach().amax(-1, keepdim=True)).exp() * seen_GLL[:, None]
    return (weights / weights.sum(-1, keepdim=True)).to(v_GHLK.dtype) @ v_GHLK


class _GhostAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias_GL: Tensor,
        mask_GL: Tensor,
        seen_GL: Tensor,
        learns_GL: Tensor,
        columns_GC: Tensor,
        scaling: float,
    ) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            seen_bias_GL = bias_GL.masked_fill(~seen_GL, -torch.inf)
            output, lse_GHL = _fused(q, k, v, _expanded(seen_bias_GL, q), scaling)
            ghosts = (~seen_GL & (bias_GL != -torch.inf)).nonzero(as_tuple=True)
            output, lse_GHL = _with_themselves(q, k, v, bias_GL, ghosts, output, lse_GHL, scaling)
        ctx.save_for_backward(q, k, v, output, lse_GHL, bias_GL, seen_GL, learns_GL, columns_GC)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse_GHL, bias_GL, seen_GL, learns_GL, columns_GC = ctx.saved_tensors
        gradient = gradients[0].to(q.dtype)
        with torch.autocast(q.device.type, enabled=False):
            seen_bias = _expanded(bias_GL.masked_fill(~seen_GL, -torch.inf), q)
            dq, dk, dv = _fused_backward(gradient, q, k, v, output, lse_GHL, seen_bias, ctx.scaling)
            if not (ctx.needs_input_grad[3] or ctx.needs_input_grad[4]) or columns_GC.shape[1] == 0:
                return dq, dk, dv, None, None, None, None, None, None
            dlogits_GLC = _columns(gradient, q, k, v, output, lse_GHL, bias_GL, columns_GC, ctx.scaling)
            learns_GC = learns_GL.gather(1, columns_GC)
            # a token sees itself whatever its mask; a ghost's size concerns itself alone, which nobody hears of
            own_GC = dlogits_GLC.gather(1, columns_GC[:, None])[:, 0]
            all_GC = dlogits_GLC.sum(1)
            zeros_GL = dlogits_GLC.new_zeros(bias_GL.shape)
            dmask_GL = zeros_GL.scatter_add(1, columns_GC, (all_GC - own_GC) * learns_GC)
            dbias_GL = zeros_GL.scatter_add(1, columns_GC, all_GC * (learns_GC & seen_GL.gather(1, columns_GC)))
        return dq, dk, dv, dbias_GL, dmask_GL, None, None, None, None


def _expanded(bias_GL: Tensor, q_GHLK: Tensor) -> Tensor:
    """One bias for all queries, as the kernel wants it."""
    return bias_GL.detach().to(q_GHLK.dtype)[:, None, None].expand(-1, -1, q_GHLK.shape[2], -1)


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Context vectors and, float32, the logarithm of the softmax's denominator, (G, H, L)."""
    if not has_fused_kernel(q.device):
        logits = (q @ k.transpose(-1, -2)).float() * scaling + bias
        lse = logits.logsumexp(-1)
        return (logits - lse[..., None]).exp().to(v.dtype) @ v, lse
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=bias, scale=scaling
    )


def _fused_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, bias: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, as far as those keys go; `output` and `lse` may know of more."""
    if not has_fused_kernel(q.device):
        weights = ((q @ k.transpose(-1, -2)).float() * scaling + bias - lse[..., None]).exp()
        own = (gradient.float() * output.float()).sum(-1, keepdim=True)
        dlogits = (weights * ((gradient @ v.transpose(-1, -2)).float() - own) * scaling).to(q.dtype)
        return dlogits @ k, dlogits.transpose(-1, -2) @ q, weights.to(v.dtype).transpose(-1, -2) @ gradient
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, q, k, v, output, lse, 0.0, False, attn_mask=bias, scale=scaling
    )


def has_fused_kernel(device: torch.device) -> bool:
    """Whether there is a fused kernel that takes a bias and tells the softmax's denominator; else plain products."""
    return device.type == "cpu"


def _with_themselves(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_GL: Tensor,
    ghosts: tuple[Tensor, ...],
    output: Tensor,
    lse_GHL: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Lets ghosts see themselves beside those that are seen."""
    images, rows = ghosts
    if not len(images):
        return output, lse_GHL
    own_q, own_k, own_v = (x[images, :, rows].float() for x in (q, k, v))
    own_XH = (own_q * own_k).sum(-1) * scaling + bias_GL[images, rows][:, None]
    lse_XH = lse_GHL[images, :, rows]
    both_XH = torch.logaddexp(lse_XH, own_XH)
    others_XHK = output[images, :, rows].float() * (lse_XH - both_XH).exp()[..., None]
    output, lse_GHL = output.clone(), lse_GHL.clone()
    output[images, :, rows] = (others_XHK + own_v * (own_XH - both_XH).exp()[..., None]).to(output.dtype)
    lse_GHL[images, :, rows] = both_XH
    return output, lse_GHL


def _columns(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse_GHL: Tensor,
    bias_GL: Tensor,
    columns_GC: Tensor,
    scaling: float,
) -> Tensor:
    """Gradient of the logits of some keys if they were seen, summed over heads, (G, L, C) float32."""
    index = columns_GC[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    k_GHCK, v_GHCK = k.gather(2, index), v.gather(2, index)
    bias_GC = bias_GL.gather(1, columns_GC)
    logits_GHLC = (q @ k_GHCK.transpose(-1, -2)).float() * scaling + bias_GC[:, None, None]
    weights_GHLC = (logits_GHLC - lse_GHL[..., None]).exp()
    own_GHL1 = (gradient.float() * output.float()).sum(-1, keepdim=True)
    return (weights_GHLC * ((gradient @ v_GHCK.transpose(-1, -2)).float() - own_GHL1)).sum(1)
