"""Attention whose masks learn against the formula written out, forward and gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from tiny import Tolerance
from torch import Tensor
from torch.testing import assert_close

from vitprune.pruning.learning import mask_gradients as module
from vitprune.pruning.learning.mask_gradients import (
    BorderlineKeys,
    KeptKeys,
    borderline_attention,
    mask_gradient_attention,
)

# sums of float32 numbers in another order
FLOAT32 = Tolerance(rtol=1e-4, atol=1e-5)
BFLOAT16 = Tolerance(rtol=0.05, atol=0.05)
G, H, K, SCALE = 3, 2, 8, 0.4
# 9 rows of which 2 are fillers, and 4 borderline, of which the first image has 2
ROWS, TOKENS, BORDERLINE, FEWER = 9, 7, 4, 2
both_kernels = pytest.mark.parametrize("fused", [True, False])
with_pairs = pytest.mark.parametrize("paired", [False, True], ids=["plain", "pairs"])


@dataclass
class Case:
    """Tokens and borderline of a rectangle; rows L, borderline C, all of them N."""

    qkv: tuple[Tensor, Tensor, Tensor]
    their_qkv: tuple[Tensor, Tensor, Tensor]
    seen: KeptKeys
    borderline: BorderlineKeys
    pairs_GHNN: Tensor | None

    @property
    def pairs_GHLL(self) -> Tensor | None:
        return None if self.pairs_GHNN is None else self.pairs_GHNN[:, :, :ROWS, :ROWS]

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        pairs = () if self.pairs_GHNN is None else (self.pairs_GHNN,)
        return (*self.qkv, self.seen.bias_GL, self.seen.mask_GL, self.borderline.mask_GC, *pairs)

    def ours(self) -> Tensor:
        return mask_gradient_attention(*self.qkv, self.seen, self.borderline, SCALE, self.pairs_GHLL)[:, :, :TOKENS]

    def written_out(self) -> Tensor:
        """All tokens and borderline, (G, H, N, K)."""
        q, k, v = (torch.cat(both, 2) for both in zip(self.qkv, self.their_qkv, strict=True))
        logits = (
            q @ k.transpose(-1, -2) * SCALE + torch.cat([self.seen.bias_GL, self.borderline.bias_GC], 1)[:, None, None]
        )
        logits = logits if self.pairs_GHNN is None else logits + self.pairs_GHNN
        mask_GN = torch.cat([self.seen.mask_GL, self.borderline.mask_GC], 1)
        weights = (
            logits.exp() * torch.where(torch.eye(ROWS + BORDERLINE, dtype=torch.bool), 1.0, mask_GN[:, None])[:, None]
        )
        return weights / weights.sum(-1, keepdim=True) @ v


def case(learns: float = 1.0, *, paired: bool = False) -> Case:
    torch.manual_seed(0)
    q, k, v = (torch.randn(G, H, ROWS, K).requires_grad_() for _ in range(3))
    their_qkv = (torch.randn(G, H, BORDERLINE, K), torch.randn(G, H, BORDERLINE, K), torch.randn(G, H, BORDERLINE, K))
    is_token_L = torch.arange(ROWS) < TOKENS
    bias_GL = torch.rand(G, ROWS).masked_fill(~is_token_L, -torch.inf).requires_grad_()
    bias_GC = torch.rand(G, BORDERLINE)
    bias_GC[0, FEWER:] = -torch.inf
    pairs = torch.randn(G, H, ROWS + BORDERLINE, ROWS + BORDERLINE, requires_grad=True) if paired else None
    return Case(
        (q, k, v),
        their_qkv,
        KeptKeys(bias_GL, torch.ones(G, ROWS, requires_grad=True), (torch.rand(G, ROWS) < learns) & is_token_L),
        BorderlineKeys(
            lambda: (*their_qkv[1:], None if pairs is None else pairs[:, :, :ROWS, ROWS:].detach()),
            bias_GC,
            torch.zeros(G, BORDERLINE, requires_grad=True),
        ),
        pairs,
    )


@both_kernels
@with_pairs
def test_tokens_see_those_that_are_seen(fused: bool, paired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_fused_kernel", lambda device: fused)
    rectangle = case(paired=paired)
    assert_close(rectangle.ours(), rectangle.written_out()[:, :, :TOKENS], **FLOAT32)


@both_kernels
@with_pairs
def test_borderline_see_the_others_and_themselves(fused: bool, paired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_fused_kernel", lambda device: fused)
    rectangle = case(paired=paired)
    own_bias, mask = rectangle.borderline.bias_GC[:, None], rectangle.seen.bias_GL.detach()[:, None, None]
    if rectangle.pairs_GHNN is not None:
        pairs = rectangle.pairs_GHNN.detach()
        own_bias = own_bias + pairs[:, :, ROWS:, ROWS:].diagonal(dim1=2, dim2=3)
        mask = mask + pairs[:, :, ROWS:, :ROWS]
    _, k, v = rectangle.qkv
    with torch.no_grad():
        ours = borderline_attention(*rectangle.their_qkv, k, v, own_bias, mask.expand(-1, -1, BORDERLINE, -1), SCALE)
    expected = rectangle.written_out()[:, :, ROWS:]
    assert_close(ours[1:], expected[1:], **FLOAT32)
    assert_close(ours[0, :, :FEWER], expected[0, :, :FEWER], **FLOAT32)


@both_kernels
@with_pairs
def test_gradients_are_those_of_the_formula(fused: bool, paired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_fused_kernel", lambda device: fused)
    rectangle = case(paired=paired)
    weights = torch.randn(G, H, TOKENS, K)
    loss = (rectangle.written_out()[:, :, :TOKENS] * weights).sum()
    expected = torch.autograd.grad(loss, rectangle.wanted)
    ours = torch.autograd.grad((rectangle.ours() * weights).sum(), rectangle.wanted)
    assert_close(ours[:3], expected[:3], **FLOAT32)
    for gradient, formula in zip(ours[3:5], expected[3:5], strict=True):  # of fillers nobody asks
        assert_close(gradient[:, :TOKENS], formula[:, :TOKENS], **FLOAT32)
    assert_close(ours[5], expected[5], **FLOAT32)
    assert expected[5][1:].abs().min() > 1e-3, "borderline teach nothing: this test sees little"
    assert_close(ours[6:], expected[6:], **FLOAT32)


def test_only_those_that_learn_have_a_gradient() -> None:
    rectangle = case(learns=0.4)
    everybody = replace(rectangle, seen=replace(rectangle.seen, learns_GL=torch.ones(G, ROWS, dtype=torch.bool)))
    gradients = [torch.autograd.grad(some.ours().sum(), some.wanted[3:5]) for some in (rectangle, everybody)]
    for ours, all_of_them in zip(*gradients, strict=True):
        assert_close(ours, torch.where(rectangle.seen.learns_GL, all_of_them, 0.0), **FLOAT32)


def test_where_nothing_learns_nothing_has_a_gradient() -> None:
    rectangle = replace(case(learns=0.0))
    output = mask_gradient_attention(*rectangle.qkv, rectangle.seen, None, SCALE)
    gradients = torch.autograd.grad(output[:, :, :TOKENS].sum(), rectangle.wanted[3:5])
    assert not any(gradient.any() for gradient in gradients)


def test_borderline_are_asked_in_the_backward_pass_alone() -> None:
    rectangle = case()
    asked = []

    def in_backward() -> tuple[Tensor, Tensor, None]:
        asked.append(True)
        return rectangle.their_qkv[1], rectangle.their_qkv[2], None

    rectangle.borderline = replace(rectangle.borderline, in_backward=in_backward)
    output = rectangle.ours()
    assert not asked
    output.sum().backward()
    assert asked == [True]


@both_kernels
def test_bfloat16_under_autocast_too(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_fused_kernel", lambda device: fused)
    rectangle = case()
    expected = torch.autograd.grad(rectangle.ours().sum(), rectangle.wanted[4:])
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in rectangle.qkv)
    _, borderline_k, borderline_v = (x.bfloat16() for x in rectangle.their_qkv)
    borderline = replace(rectangle.borderline, in_backward=lambda: (borderline_k, borderline_v, None))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = mask_gradient_attention(q, k, v, rectangle.seen, borderline, SCALE)[:, :, :TOKENS]
    *gradients, dq = torch.autograd.grad(ours.float().sum(), (*rectangle.wanted[4:], q))
    assert ours.dtype == dq.dtype == torch.bfloat16
    for gradient, formula in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert_close(gradient[:, :TOKENS], formula[:, :TOKENS], **BFLOAT16)
