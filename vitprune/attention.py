"""Dense, masked and packed attention behind the one function that transformers' layers call.

Knows how a block attends and what its attention says about the tokens; leaves to `execution` what follows from that.
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
from vitprune.tokens import TokenBatch

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
            output = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scale)
            if pruning.wants_scores:
                row_BHM = class_attention(query[:, :, 0], key, scale)
                _record_scores(pruning, row_BHM, output)
            metric = key
        case MaskedTokens() as tokens:
            weights_BHNN = masked_attention_weights(query, key, scale, tokens)
            output = F.dropout(weights_BHNN, dropout).to(value.dtype) @ value
            if pruning.wants_scores:
                _record_scores(pruning, weights_BHNN[:, :, 0], output)
            metric = key
        case TokenBatch() as batch:
            output = packed_attention(query[0], key[0], value[0], batch, scale)[None]
            if pruning.wants_scores:
                row_BHM = packed_class_attention(query[0], key[0], batch, scale)
                norms_BMH = batch.pad(output[0].float().norm(dim=-1).T)
                pruning.findings.class_attention_scores_BM = head_weighted_class_attention(
                    row_BHM, norms_BMH.transpose(1, 2)
                )
            metric = None
            if pruning.wants_metric:
                pruning.findings.metric_BMK = batch.pad(key_metric(key[0]))
    if pruning.wants_metric and metric is not None:
        pruning.findings.metric_BMK = key_metric(metric)
    return output.transpose(1, 2).contiguous(), None


def _record_scores(pruning: AttentionCall, row_BHM: Tensor, output_BHNK: Tensor) -> None:
    norms_BHM = output_BHNK.float().norm(dim=-1)
    pruning.findings.class_attention_scores_BM = head_weighted_class_attention(row_BHM, norms_BHM)


def masked_attention_weights(q_BHNK: Tensor, k_BHNK: Tensor, scaling: float, tokens: MaskedTokens) -> Tensor:
    """Attention in which masked tokens are seen by themselves only (AS-ViT, section 3.3), (B, H, N, N) float32.

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


def packed_attention(q_HTK: Tensor, k_HTK: Tensor, v_HTK: Tensor, batch: TokenBatch, scaling: float) -> Tensor:
    """Every image attends to its own tokens only, (H, T, K).

    On a CPU one fused call an image: the calls are small beside the GEMMs and nothing is padded. Elsewhere, where
    launches are dear, one fused call on the padded batch.
    """
    if q_HTK.device.type == "cpu":
        return _attend_one_by_one(q_HTK, k_HTK, v_HTK, batch, scaling)
    return _attend_padded(q_HTK, k_HTK, v_HTK, batch, scaling)


def _attend_one_by_one(q_HTK: Tensor, k_HTK: Tensor, v_HTK: Tensor, batch: TokenBatch, scaling: float) -> Tensor:
    lengths = list(batch.lengths)
    log_sizes = [None] * len(lengths)
    if batch.sizes_T is not None:
        log_sizes = batch.sizes_T.log().to(q_HTK.dtype).split(lengths)
    pieces = []
    for q, k, v, bias in zip(
        q_HTK.split(lengths, 1), k_HTK.split(lengths, 1), v_HTK.split(lengths, 1), log_sizes, strict=True
    ):
        mask = None if bias is None else bias.expand(1, 1, q.shape[1], -1)
        pieces.append(F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scaling)[0])
    return torch.cat(pieces, 1)


def _attend_padded(q_HTK: Tensor, k_HTK: Tensor, v_HTK: Tensor, batch: TokenBatch, scaling: float) -> Tensor:
    q, k, v = (batch.pad(x_HTK.transpose(0, 1)).transpose(1, 2) for x_HTK in (q_HTK, k_HTK, v_HTK))
    bias_BM = q.new_zeros(batch.valid_BM.shape)
    if batch.sizes_T is not None:
        bias_BM = batch.pad(batch.sizes_T.log().to(q.dtype))
    bias_BM = bias_BM.masked_fill(~batch.valid_BM, -torch.inf)
    mask = bias_BM[:, None, None].expand(-1, 1, q.shape[2], -1)
    output_BHMK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return batch.flatten(output_BHMK.transpose(1, 2)).transpose(0, 1)


def packed_class_attention(q_HTK: Tensor, k_HTK: Tensor, batch: TokenBatch, scaling: float) -> Tensor:
    """Each image's class token's attention row, (B, H, M) float32, zero in the padding."""
    q_BHK = q_HTK[:, batch.starts_B].transpose(0, 1)
    k_BHMK = batch.pad(k_HTK.transpose(0, 1)).transpose(1, 2)
    bias_BM = q_BHK.new_zeros(batch.valid_BM.shape, dtype=torch.float32)
    if batch.sizes_T is not None:
        bias_BM = batch.pad(batch.sizes_T.log())
    return class_attention(q_BHK, k_BHMK, scaling, bias_BM.masked_fill(~batch.valid_BM, -torch.inf))


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
