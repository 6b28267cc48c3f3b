"""Dense, masked and packed attention behind the one function that transformers' layers call.

Knows how a block attends and what its attention says about the tokens; leaves kernels for packed tokens to
`packed_attention`, and what follows from what was found to `packed` and `masked`. Inside `calling(call)` a layer
attends as its `AttentionCall` says; elsewhere as under sdpa.

Shapes: B images, N tokens of an image, T rows of the batch laid end to end, M tokens of the longest image, H heads,
K head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vitprune import cpu_stage
from vitprune.ghosts import GhostRun
from vitprune.layout import TILE_KEY_ALIGNMENT, Layout, needs_tiles
from vitprune.packed_attention import PackedAttention, Query
from vitprune.scoring import attention_row, context_norms, head_weighted_attention, key_metric, mean_query
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
    """What a block's attention says about its tokens: scores, padded to the longest image, and keys of length one."""

    attention_scores_BM: Tensor | None = None
    metric_TK: Tensor | None = None


@dataclass
class AttentionCall:
    """One block's attention within one forward: the tokens, what the next stage wants to know, and the answer.

    tokens: None while all tokens of all images are there.
    loops: as in `TokenBatch`. learns: what is found has the gradient that a threshold learns from.
    scores_of: whose attention the next stage scores tokens by: the class token's, or that of the mean of all queries.
    read: of how many tokens of an image, the first, the block's output is wanted; None: of all. Such a block runs
        twice: for `keys_and_values` of all tokens as far as its attention, which ends it by `KeysAndValuesFound`; then
        to its end on those few.
    ghost_run: of ghosts, who go through the block after the tokens; not before they have can be found what the next
        stage wants to know, by `conclude`. Until then `packed` is there, the tokens' attention.
    Gradient checkpointing runs a layer twice with the same call; the second run only writes the same findings again.
    """

    tokens: TokenBatch | MaskedTokens | None = None
    scores_of: Query | None = None
    wants_metric: bool = False
    loops: bool = False
    learns: bool = False
    read: int | None = None
    ghost_run: GhostRun | None = None
    findings: Findings = field(default_factory=Findings)
    keys_and_values: tuple[Tensor, Tensor] | None = None
    packed: PackedAttention | None = None

    @property
    def asks(self) -> bool:
        """Whether a stage follows that wants to know something."""
        return self.scores_of is not None or self.wants_metric

    def conclude(self) -> None:
        """What packed tokens' attention says about them."""
        assert self.packed is not None
        if self.asks:
            with self.finding():
                self.take(*self.packed.find(self.scores_of, wants_metric=self.wants_metric))
        self.packed = None

    def finding(self) -> AbstractContextManager[None]:
        """Around what is found out for the next stage."""
        return nullcontext() if self.learns else torch.no_grad()

    def take(self, attention_scores_BM: Tensor | None, metric_TK: Tensor | None) -> None:
        """What was found, for the next stage."""
        self.findings = Findings(attention_scores_BM, metric_TK)


class KeysAndValuesFound(Exception):
    """A run of a block for the sake of its attention's keys and values has come as far as it needs to."""


# what the attention that runs now is to do
block_call: ContextVar[AttentionCall | None] = ContextVar("vitprune_block_call", default=None)


@contextmanager
def calling(call: AttentionCall, *, intercept: bool = False) -> Iterator[None]:
    """One block's forward: its attention is `call`'s.

    intercept: the block knows nothing of transformers' attention interface; take its calls of torch's fused attention.
    """
    token = block_call.set(call)
    try:
        with _Intercept() if intercept else nullcontext():
            yield
    finally:
        block_call.reset(token)


class _Intercept(TorchFunctionMode):
    """Puts `attend` in the place of torch's own fused attention."""

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
        call = block_call.get()
        assert call is not None
        assert not is_causal
        return attend(query, key, value, attn_mask, scale, dropout_p, call).transpose(1, 2)


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
    call = block_call.get()
    if call is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return attend(query, key, value, attention_mask, scaling, dropout, call), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_1HNN: Tensor | None,
    scaling: float | None,
    dropout: float,
    call: AttentionCall,
) -> Tensor:
    """Attention as `call` says, (B, N, H, K); `bias_1HNN` is added to the logits of the dense sequence's pairs."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if call.read is not None:
        return _read(query, key, value, scale, call)
    match call.tokens:
        case None:
            output = _dense_attention(query, key, value, bias_1HNN, dropout, scale).transpose(1, 2)
            if call.asks:
                with call.finding():
                    call.take(*_find(query, key, output, bias_1HNN, scale, call))
        case MaskedTokens() as tokens:
            weights_BHNN = masked_attention_weights(query, key, scale, tokens, bias_1HNN)
            output = (F.dropout(weights_BHNN, dropout).to(value.dtype) @ value).transpose(1, 2)
            if call.scores_of is not None:
                of_class = call.scores_of == "class"
                row_BHN = weights_BHNN[:, :, 0] if of_class else _masked_mean_row(query, key, scale, tokens)
                call.findings.attention_scores_BM = head_weighted_attention(
                    row_BHN.transpose(1, 2), context_norms(output)
                )
            if call.wants_metric:
                call.findings.metric_TK = key_metric(key.transpose(1, 2)).flatten(0, 1)
        case TokenBatch() as batch:
            require_no_dropout(dropout)
            if query.dtype != value.dtype:  # rotary tables stay in float32 under autocast
                query, key = query.to(value.dtype), key.to(value.dtype)
            if call.ghost_run is not None and call.ghost_run.is_on:
                return _ghosts(query, key, value, call, call.ghost_run)
            call.packed = PackedAttention(query, key, value, batch, scale, bias_1HNN, ghost_run=call.ghost_run)
            output = call.packed.contexts_THK[None]
            if call.ghost_run is None:
                call.conclude()
            return output
    return output.contiguous()


def require_no_dropout(dropout: float) -> None:
    """Raises ValueError where packed tokens' attention would have to drop something."""
    if dropout:
        raise ValueError(
            f"attention dropout ({dropout:g}) isn't done while tokens are packed; train with "
            "finetune.execution: masked, or set the dropout in the checkpoint's config.json to 0"
        )


def _find(
    q_BHNK: Tensor, k_BHNK: Tensor, contexts_BNHK: Tensor, bias: Tensor | None, scaling: float, call: AttentionCall
) -> tuple[Tensor | None, Tensor | None]:
    """Scores and metric where all tokens of all images are there; None for what isn't wanted."""
    k_BNHK, asking_BHK = k_BHNK.transpose(1, 2), None
    if call.scores_of == "mean":
        q_BNHK, bias = q_BHNK.transpose(1, 2), None  # it stands nowhere
        asking_BHK = mean_query(q_BNHK, torch.ones_like(q_BNHK[..., 0, 0]))
    elif call.scores_of == "class":
        asking_BHK = q_BHNK[:, :, 0]
    if bias is None and call.loops:
        layout, rows = Layout((k_BNHK.shape[1],) * len(k_BNHK)), (k_BNHK.flatten(0, 1), contexts_BNHK.flatten(0, 1))
        return cpu_stage.find(asking_BHK, *rows, None, scaling, layout, wants_metric=call.wants_metric)
    metric_TK = key_metric(k_BNHK).flatten(0, 1) if call.wants_metric else None
    if asking_BHK is None:
        return None, metric_TK
    row_BNH = attention_row(asking_BHK, k_BNHK, scaling, None if bias is None else bias[:, :, 0].mT)
    return head_weighted_attention(row_BNH, context_norms(contexts_BNHK)), metric_TK


def _ghosts(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, run: GhostRun) -> Tensor:
    """Attention of ghosts to the tokens of the run before, and to themselves, (1, X, H, K)."""
    run.found.qkv = query, key, value
    if run.ends:
        raise KeysAndValuesFound
    assert call.packed is not None
    return call.packed.ghost_contexts(query, key, value)


def _read(query: Tensor, key: Tensor, value: Tensor, scaling: float, call: AttentionCall) -> Tensor:
    """Attention of each image's first tokens to all of its tokens, (B, read, H, K)."""
    if call.keys_and_values is None:
        call.keys_and_values = key, value
        raise KeysAndValuesFound
    key, value = call.keys_and_values
    bias = None
    if isinstance(call.tokens, TokenBatch):
        batch = call.tokens
        key, value = (batch.pad(x_1HTK[0].transpose(0, 1)).transpose(1, 2) for x_1HTK in (key, value))
        bias_BM = batch.key_bias_BM.to(query.dtype)
        bias = bias_BM[:, None, None].expand(-1, -1, query.shape[2], -1)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)
    return output.transpose(1, 2).contiguous()


def masked_attention_weights(
    q_BHNK: Tensor, k_BHNK: Tensor, scaling: float, tokens: MaskedTokens, bias_1HNN: Tensor | None = None
) -> Tensor:
    """Attention in which masked tokens are seen by themselves only (AS-ViT), (B, H, N, N) float32.

    exp(a_ij)·G_ij / Σ_j, G_ij = M_j for j ≠ i and 1 for j = i; eps as published, spread as eps/N. With sizes s the
    logits are a_ij + log s_j (ToMe's proportional attention).
    """
    logits = (q_BHNK @ k_BHNK.transpose(-1, -2)).float() * scaling
    if bias_1HNN is not None:
        logits = logits + bias_1HNN
    eye_NN = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    seen_BNN = torch.where(eye_NN, 1.0, tokens.mask_BN[:, None].float())
    return _masked_softmax(logits, seen_BNN[:, None], tokens)


def _masked_softmax(logits_BHQN: Tensor, seen_BHQN: Tensor, tokens: MaskedTokens) -> Tensor:
    if tokens.sizes_BN is not None:
        logits_BHQN = logits_BHQN + tokens.sizes_BN.log()[:, None, None]
    weights = (logits_BHQN - logits_BHQN.amax(-1, keepdim=True)).exp() * seen_BHQN
    eps = MASKED_SOFTMAX_EPS
    return (weights + eps / logits_BHQN.shape[-1]) / (weights.sum(-1, keepdim=True) + eps)


def _masked_mean_row(q_BHNK: Tensor, k_BHNK: Tensor, scaling: float, tokens: MaskedTokens) -> Tensor:
    """What the mean query of the tokens that are seen pays to each token, (B, H, N)."""
    weights_BN = tokens.mask_BN.float() if tokens.sizes_BN is None else tokens.mask_BN * tokens.sizes_BN
    q_BHK = mean_query(q_BHNK.transpose(1, 2), weights_BN)
    logits_BH1N = (q_BHK[:, :, None] @ k_BHNK.transpose(-1, -2)).float() * scaling
    return _masked_softmax(logits_BH1N, tokens.mask_BN[:, None, None].float(), tokens)[:, :, 0]


def _dense_attention(
    q_BHNK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor, bias: Tensor | None, dropout: float, scaling: float
) -> Tensor:
    """sdpa; in tiles of AMX with as many keys as they hold, which more than pays for the copy."""
    missing = -k_BHNK.shape[2] % TILE_KEY_ALIGNMENT
    if missing and needs_tiles(k_BHNK) and bias is None and not torch.is_grad_enabled():
        bias = F.pad(k_BHNK.new_zeros(k_BHNK.shape[2]), (0, missing), value=-torch.inf)
        bias = bias.expand(q_BHNK.shape[0], 1, q_BHNK.shape[2], -1)
        k_BHNK, v_BHNK = (F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, missing)).transpose(1, 2) for x in (k_BHNK, v_BHNK))
    return F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK, attn_mask=bias, dropout_p=dropout, scale=scaling)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
