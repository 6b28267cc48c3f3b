"""Dense, masked and packed attention behind the one function that transformers' layers call.

Knows how a block attends and what its attention says about the tokens; leaves what follows from that to `packed` and
`masked`.
`AttentionCall` travels to a layer's attention as the keyword `pruning`; without it the layer attends as under sdpa.

Shapes: B images, N tokens of an image, T tokens of the batch laid end to end, M tokens of the longest image, H heads,
K head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vitprune.scoring import class_attention, head_weighted_class_attention, key_metric
from vitprune.tokens import KEY_ALIGNMENT, TokenBatch

NAME = "vitprune"
MASKED_SOFTMAX_EPS = 1e-6


@dataclass(frozen=True)
class MaskedTokens:
    """The tokens of a training pass: all are there, `mask_BN` says who is seen (0/1, with gradient)."""

    mask_BN: Tensor
    sizes_BN: Tensor | None = None


@dataclass
class Findings:
    """What a block's attention says about its tokens; padded to the longest image."""

    class_attention_scores_BM: Tensor | None = None
    metric_BMK: Tensor | None = None


@dataclass
class AttentionCall:
    """One block's attention within one forward: the tokens, what the next stage wants to know, and the answer.

    tokens: None while all tokens of all images are there.
    Gradient checkpointing runs a layer twice with the same call; the second run only writes the same findings again.
    """

    tokens: TokenBatch | MaskedTokens | None = None
    wants_scores: bool = False
    wants_metric: bool = False
    findings: Findings = field(default_factory=Findings)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    pruning: AttentionCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, H, N, K) or packed (1, H, T, K), output (B, N, H, K)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if pruning is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scale, **kwargs)
    match pruning.tokens:
        case None:
            output = _dense_attention(query, key, value, dropout, scale)
            if pruning.wants_scores:
                row_BHM = class_attention(query[:, :, 0], key, scale)
                _record_scores(pruning, row_BHM, output)
        case MaskedTokens() as tokens:
            weights_BHNN = masked_attention_weights(query, key, scale, tokens)
            output = F.dropout(weights_BHNN, dropout).to(value.dtype) @ value
            if pruning.wants_scores:
                _record_scores(pruning, weights_BHNN[:, :, 0], output)
        case TokenBatch() as batch:
            output_1THK, scores_T = packed_attention(query, key, value, batch, scale, wants_scores=pruning.wants_scores)
            if scores_T is not None:
                pruning.findings.class_attention_scores_BM = batch.pad(scores_T)
            if pruning.wants_metric:
                pruning.findings.metric_BMK = batch.pad(key_metric(key[0]))
            return output_1THK, None
    if pruning.wants_metric:
        pruning.findings.metric_BMK = key_metric(key)
    return output.transpose(1, 2).contiguous(), None


def _record_scores(pruning: AttentionCall, row_BHM: Tensor, output_BHNK: Tensor) -> None:
    pruning.findings.class_attention_scores_BM = head_weighted_class_attention(row_BHM, _norms(output_BHNK))


def _norms(context: Tensor) -> Tensor:
    """Lengths of context vectors, (…, K) to (…), float32."""
    # converted afterwards: three times as fast on a CPU, and half precision sums in float32 anyway
    return torch.linalg.vector_norm(context, dim=-1).float()


def masked_attention_weights(q_BHNK: Tensor, k_BHNK: Tensor, scaling: float, tokens: MaskedTokens) -> Tensor:
    """Attention in which masked tokens are seen by themselves only (AS-ViT), (B, H, N, N) float32.

    exp(a_ij)·G_ij / Σ_j, G_ij = M_j for j ≠ i and 1 for j = i; eps as published, spread as eps/N. With sizes s the
    logits are a_ij + log s_j (ToMe's proportional attention).
    """
    logits = (q_BHNK @ k_BHNK.transpose(-1, -2)).float() * scaling
    if tokens.sizes_BN is not None:
        logits = logits + tokens.sizes_BN.log()[:, None, None]
    num_tokens = logits.shape[-1]
    eye_NN = torch.eye(num_tokens, dtype=torch.bool, device=logits.device)
    seen_BNN = torch.where(eye_NN, 1.0, tokens.mask_BN[:, None].float())
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * seen_BNN[:, None]
    eps = MASKED_SOFTMAX_EPS
    return (weights + eps / num_tokens) / (weights.sum(-1, keepdim=True) + eps)


def _dense_attention(q_BHNK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor, dropout: float, scaling: float) -> Tensor:
    """sdpa; in half precision on a CPU with as many keys as its kernel likes, which more than pays for the copy."""
    missing = -k_BHNK.shape[2] % KEY_ALIGNMENT
    bias = None
    if missing and k_BHNK.device.type == "cpu" and k_BHNK.dtype != torch.float32 and not torch.is_grad_enabled():
        bias = F.pad(k_BHNK.new_zeros(k_BHNK.shape[2]), (0, missing), value=-torch.inf)
        bias = bias.expand(q_BHNK.shape[0], 1, q_BHNK.shape[2], -1)
        k_BHNK, v_BHNK = (F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, missing)).transpose(1, 2) for x in (k_BHNK, v_BHNK))
    return F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK, attn_mask=bias, dropout_p=dropout, scale=scaling)


def packed_attention(
    q_1HTK: Tensor, k_1HTK: Tensor, v_1HTK: Tensor, batch: TokenBatch, scaling: float, *, wants_scores: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Every image attends to its own tokens only: one fused call a bucket of images of as many rows.

    Returns the context vectors (1, T, H, K) and, if asked for, AS-ViT's score of each token (T,).
    """
    layout = batch.layout
    outputs, rows = [], []
    # tokens before heads is how linear layers and the kernel lay them out
    queries, keys, values = (layout.split(x_1HTK[0].transpose(0, 1)) for x_1HTK in (q_1HTK, k_1HTK, v_1HTK))
    for q, k, v, bias_GL in zip(queries, keys, values, layout.split(batch.key_bias_T), strict=True):
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mask = bias_GL.to(q.dtype)[:, None, None].expand(-1, 1, q.shape[2], -1)
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling).transpose(1, 2))
        if wants_scores:
            rows.append(class_attention(q[:, :, 0], k, scaling, bias_GL).transpose(1, 2))
    output_THK = layout.join(outputs)
    scores_T = head_weighted_class_attention(layout.join(rows), _norms(output_THK)) if wants_scores else None
    return output_THK[None], scores_T


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
