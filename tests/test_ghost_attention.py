"""Attention with ghosts against the formula written out, forward and gradient."""

from __future__ import annotations

import pytest
import torch
from tiny import Tolerance
from torch import Tensor
from torch.testing import assert_close

from vitprune import ghost_attention as module
from vitprune.ghost_attention import GhostKeys, ghost_attention

# sums of float32 numbers in another order
FLOAT32 = Tolerance(rtol=1e-4, atol=1e-5)
BFLOAT16 = Tolerance(rtol=0.05, atol=0.05)
G, H, L, K, SCALING = 3, 2, 12, 8, 0.4
# of 12 rows 7 tokens, 3 ghosts, 2 fillers
TOKENS, GHOSTS = 7, 3
every_kernel = pytest.mark.parametrize("fused", [True, False])


def bucket(learns: float = 1.0) -> tuple[tuple[Tensor, Tensor, Tensor], GhostKeys]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(G, H, L, K).requires_grad_() for _ in range(3))
    row_L = torch.arange(L)
    bias_GL = torch.rand(G, L).masked_fill(row_L >= TOKENS + GHOSTS, -torch.inf).requires_grad_()
    mask_GL = (row_L < TOKENS).float().repeat(G, 1).requires_grad_()
    learns_GL = torch.rand(G, L) < learns
    return (q, k, v), GhostKeys(bias_GL, mask_GL, mask_GL.detach().bool(), learns_GL & (row_L < TOKENS + GHOSTS))


def written_out(q: Tensor, k: Tensor, v: Tensor, keys: GhostKeys) -> Tensor:
    logits = q @ k.transpose(-1, -2) * SCALING + keys.bias_GL[:, None, None]
    eye = torch.eye(L, dtype=torch.bool)
    weights = logits.exp() * torch.where(eye, 1.0, keys.mask_GL[:, None])[:, None]
    return weights / weights.sum(-1, keepdim=True) @ v


def tokens_alone(output: Tensor) -> Tensor:
    """Nobody hears from a ghost or a filler."""
    return output[:, :, :TOKENS]


@every_kernel
def test_ghosts_see_the_others_and_themselves(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_fused_kernel", lambda device: fused)
    (q, k, v), keys = bucket()
    ours = ghost_attention(q, k, v, keys, SCALING)
    there = slice(0, TOKENS + GHOSTS)
    assert_close(ours[:, :, there], written_out(q, k, v, keys)[:, :, there], **FLOAT32)


@every_kernel
def test_gradients_are_those_of_the_formula(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_fused_kernel", lambda device: fused)
    qkv, keys = bucket()
    wanted = (*qkv, keys.bias_GL, keys.mask_GL)
    weights = torch.randn(G, H, TOKENS, K)
    expected = torch.autograd.grad((tokens_alone(written_out(*qkv, keys)) * weights).sum(), wanted)
    ours = torch.autograd.grad((tokens_alone(ghost_attention(*qkv, keys, SCALING)) * weights).sum(), wanted)
    assert_close(ours[:3], expected[:3], **FLOAT32)
    there = slice(0, TOKENS + GHOSTS)
    assert_close(ours[3][:, there], expected[3][:, there], **FLOAT32)
    assert_close(ours[4][:, there], expected[4][:, there], **FLOAT32)
    assert expected[4][:, TOKENS : TOKENS + GHOSTS].abs().min() > 1e-3, "ghosts teach nothing: this test sees little"


def test_only_those_that_learn_have_a_gradient() -> None:
    qkv, keys = bucket(learns=0.4)
    everybody = GhostKeys(keys.bias_GL, keys.mask_GL, keys.seen_GL, torch.ones(G, L, dtype=torch.bool))
    gradients = [
        torch.autograd.grad(tokens_alone(ghost_attention(*qkv, some, SCALING)).sum(), (keys.bias_GL, keys.mask_GL))
        for some in (keys, everybody)
    ]
    for ours, all_of_them in zip(*gradients, strict=True):
        assert_close(ours, torch.where(keys.learns_GL, all_of_them, 0.0), **FLOAT32)


def test_nothing_to_learn_costs_no_columns() -> None:
    qkv, keys = bucket(learns=0.0)
    (gradient,) = torch.autograd.grad(
        tokens_alone(ghost_attention(*qkv, keys, SCALING)).sum(), keys.mask_GL, allow_unused=True
    )
    assert gradient is None or not gradient.any()


def test_a_bias_of_pairs_has_a_gradient_too() -> None:
    qkv, keys = bucket()
    pairs = torch.randn(G, H, L, L, requires_grad=True)
    ours = ghost_attention(*qkv, keys, SCALING, pairs)
    (gradient,) = torch.autograd.grad(tokens_alone(ours).square().sum(), pairs)
    none = ghost_attention(*qkv, keys, SCALING, torch.zeros_like(pairs))
    assert_close(tokens_alone(none), tokens_alone(ghost_attention(*qkv, keys, SCALING)), **FLOAT32)
    assert gradient[:, :, :TOKENS, :TOKENS].abs().max() > 1e-3
    # nobody sees a ghost, whatever is added to its logits
    assert not gradient[:, :, :TOKENS, TOKENS:].any()


@every_kernel
def test_bfloat16_under_autocast_too(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_fused_kernel", lambda device: fused)
    qkv, keys = bucket()
    expected = torch.autograd.grad(tokens_alone(ghost_attention(*qkv, keys, SCALING)).sum(), keys.mask_GL)
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in qkv)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = tokens_alone(ghost_attention(q, k, v, keys, SCALING))
    gradient, dq = torch.autograd.grad(ours.float().sum(), (keys.mask_GL, q))
    assert ours.dtype == dq.dtype == torch.bfloat16
    assert gradient.dtype == torch.float32
    assert_close(gradient, expected[0], **BFLOAT16)
