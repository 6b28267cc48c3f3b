"""Dense, masked and packed attention behind the one function that transformers' layers call.

Knows how a block attends and what its attention says about the tokens; leaves what follows from that to `packed` and
`masked`.
`AttentionCall` travels to a layer's attention as the keyword `pruning`; without it the layer attends as under sdpa.

Shapes: B images, N tokens of an image, T tokens of the batch laid end to end, M tokens of the longest image, H heads,
K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        case MaskedTokens() as tokens:
            weights_BHNN = masked_attention_weights(query, key, scale, tokens)
            output = F.dropout(weights_BHNN, dropout).to(value.dtype) @ value
            if pruning.wants_scores:
                _record_scores(pruning, weights_BHNN[:, :, 0], output)
        case TokenBatch() as batch:
            query, key, value = (x[:, :, : x.shape[2] - batch.padding] for x in (query, key, value))
            output_1THK = packed_attention(query, key, value, batch, scale)
            if pruning.wants_scores:
                row_BHM = packed_class_attention(query, key, batch, scale)
                norms_BMH = batch.pad(_norms(output_1THK[0]))
                pruning.findings.class_attention_scores_BM = head_weighted_class_attention(
                    row_BHM, norms_BMH.transpose(1, 2)
                )
            if pruning.wants_metric:
                pruning.findings.metric_BMK = batch.pad(key_metric(key[0]))
            return F.pad(output_1THK, (0, 0, 0, 0, 0, batch.padding)) if batch.padding else output_1THK, None
    if pruning.wants_metric:
        pruning.findings.metric_BMK = key_metric(key)
    return output.transpose(1, 2).contiguous(), None


def _record_scores(pruning: AttentionCall, row_BHM: Tensor, output_BHNK: Tensor) -> None:
    pruning.findings.class_attention_scores_BM = head_weighted_class_attention(row_BHM, _norms(output_BHNK))


def _norms(context: Tensor) -> Tensor:
    """Lengths of context vectors, (…, K) to (…), float32."""
    return torch.linalg.vector_norm(context, dim=-1, dtype=torch.float32)


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


def packed_attention(q_1HTK: Tensor, k_1HTK: Tensor, v_1HTK: Tensor, batch: TokenBatch, scaling: float) -> Tensor:
    """Every image attends to its own tokens only, (1, T, H, K).

    On a CPU one fused call an image: the calls are small beside the GEMMs and nothing is padded. Elsewhere, where
    launches are dear, and where all images have equally many tokens, one fused call on the padded batch.
    """
    if q_1HTK.device.type == "cpu" and not batch.is_even:
        return _attend_one_by_one(q_1HTK, k_1HTK, v_1HTK, batch, scaling)
    return _attend_padded(q_1HTK, k_1HTK, v_1HTK, batch, scaling)


def _attend_one_by_one(q_1HTK: Tensor, k_1HTK: Tensor, v_1HTK: Tensor, batch: TokenBatch, scaling: float) -> Tensor:
    lengths = batch.lengths
    biases: Sequence[Tensor | None] = [None] * len(lengths)
    if batch.sizes_T is not None:
        log_sizes = batch.sizes_T.log().to(q_1HTK.dtype).split(lengths)
        biases = [bias.expand(1, 1, len(bias), -1) for bias in log_sizes]
    images = zip(q_1HTK.split(lengths, 2), k_1HTK.split(lengths, 2), v_1HTK.split(lengths, 2), biases, strict=True)
    # tokens before heads is how the kernel lays its output out
    return torch.cat(
        [
            F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling).transpose(1, 2)
            for q, k, v, bias in images
        ],
        dim=1,
    )


def _attend_padded(q_1HTK: Tensor, k_1HTK: Tensor, v_1HTK: Tensor, batch: TokenBatch, scaling: float) -> Tensor:
    q, k, v = (batch.pad(x_1HTK[0].transpose(0, 1)).transpose(1, 2) for x_1HTK in (q_1HTK, k_1HTK, v_1HTK))
    mask = None
    if batch.sizes_T is not None or not batch.is_even:
        mask = _key_bias(batch).to(q.dtype)[:, None, None].expand(-1, 1, q.shape[2], -1)
    output_BHMK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return batch.flatten(output_BHMK.transpose(1, 2))[None]


def _key_bias(batch: TokenBatch) -> Tensor:
    """What is added to a key's logits: the log of its size, −inf in the padding, (B, M) float32."""
    if batch.sizes_T is None:
        bias_BM = torch.zeros(batch.valid_BM.shape, device=batch.valid_BM.device)
    else:
        bias_BM = batch.pad(batch.sizes_T.log())
    return bias_BM.masked_fill(~batch.valid_BM, -torch.inf)


def packed_class_attention(q_1HTK: Tensor, k_1HTK: Tensor, batch: TokenBatch, scaling: float) -> Tensor:
    """Each image's class token's attention row, (B, H, M) float32, zero in the padding."""
    if q_1HTK.device.type == "cpu" and not batch.is_even:
        images = zip(q_1HTK.split(batch.lengths, 2), k_1HTK.split(batch.lengths, 2), strict=True)
        logits_1H1T = torch.cat([q[:, :, :1] @ k.transpose(2, 3) for q, k in images], dim=3)
        logits_BHM = batch.pad(logits_1H1T[0, :, 0].T).transpose(1, 2)
        return (logits_BHM.float() * scaling + _key_bias(batch)[:, None]).softmax(-1)
    q_BHK = q_1HTK[0, :, batch.starts_B].transpose(0, 1)
    k_BHMK = batch.pad(k_1HTK[0].transpose(0, 1)).transpose(1, 2)
    return class_attention(q_BHK, k_BHMK, scaling, _key_bias(batch))


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
