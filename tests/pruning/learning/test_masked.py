"""The published masked attention: what it says, and that a mask has its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import Tolerance
from torch.testing import assert_close
from written_out import DENSE, SCALE, H, K, alone, bias_of, relative_positions, with_or_without_sizes

from vitprune.pruning.attention import StatsRequest
from vitprune.pruning.learning import masked
from vitprune.pruning.learning.masked import MaskedAttention, MaskedTokens, masked_attention_weights

# float32 sums in another order
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-6)


@with_or_without_sizes
def test_masked_tokens_are_seen_by_themselves_only(sized: bool) -> None:
    q, k = torch.randn(2, H, 5, K), torch.randn(2, H, 5, K)
    mask = torch.tensor([[1.0, 1, 0, 1, 0], [1.0, 0, 0, 0, 1]])
    sizes = torch.randint(1, 6, (2, 5)).float()
    ours = masked_attention_weights(q, k, SCALE, MaskedTokens(mask, sizes if sized else None))
    eps = 1e-6
    for b in range(2):
        for h in range(H):
            for i in range(5):
                logits = [SCALE * (q[b, h, i].double() @ k[b, h, j].double()).item() for j in range(5)]
                if sized:
                    logits = [a + math.log(sizes[b, j]) for j, a in enumerate(logits)]
                seen = [1.0 if i == j else mask[b, j].item() for j in range(5)]
                exps = [math.exp(a - max(logits)) * g for a, g in zip(logits, seen, strict=True)]
                expected = [(e + eps / 5) / (sum(exps) + eps) for e in exps]
                assert_close(ours[b, h, i], torch.tensor(expected), **FLOAT32)


def test_a_mask_has_a_gradient_where_it_is_zero() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)
    weights = masked_attention_weights(torch.randn(1, H, 3, K), torch.randn(1, H, 3, K), SCALE, MaskedTokens(mask))
    weights[:, :, 0, 2].sum().backward()
    assert mask.grad is not None
    # more of the dropped token would be seen if there were more of it
    assert mask.grad[0, 2] > 0


@with_or_without_sizes
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_among_kept_tokens_it_is_the_references(sized: bool, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked, "EPS", 0.0)
    bias = relative_positions() if biased else None
    q, k, v = (torch.randn(2, H, DENSE, K) for _ in range(3))
    mask = (torch.rand(2, DENSE) > 0.4).float()
    mask[:, 0] = mask[:, -1] = 1.0
    sizes = torch.randint(1, 6, (2, DENSE)).float() if sized else None
    for row in ("class", "mean"):
        attention = MaskedAttention(MaskedTokens(mask, sizes), StatsRequest(row))
        output = attention.attend(q, k, v, bias, SCALE, 0.0)
        assert attention.stats.attention_BM is not None
        for b in range(2):
            kept = mask[b].nonzero().flatten().tolist()
            own_bias = None if bias is None else bias_of(kept, bias)
            own_sizes = torch.ones(len(kept)) if sizes is None else sizes[b, kept]
            contexts, by_class, by_mean = alone(q[b][:, kept], k[b][:, kept], v[b][:, kept], own_sizes, own_bias)
            assert_close(output[b, kept], contexts.transpose(0, 1), **FLOAT32)
            found = attention.stats.attention_BM[b, kept]
            assert_close(found, by_class if row == "class" else by_mean, **FLOAT32)
