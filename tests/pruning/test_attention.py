"""Attention of dense and last blocks, and what is found out of it, against the reference."""

from __future__ import annotations

import pytest
import torch
from tiny import Tolerance
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from written_out import DENSE, SCALE, H, K, alone, in_both_ways, packed, relative_positions

from vitprune.pruning import reference
from vitprune.pruning.attention import DenseAttention, LastBlockAttention, PairBias, StatsRequest
from vitprune.pruning.learning import masked
from vitprune.pruning.learning.masked import MaskedAttention, MaskedTokens
from vitprune.pruning.packed.attention import PackedAttention
from vitprune.pruning.scores import Row
from vitprune.pruning.token_batch import NO_TOKEN, Kernels, TokenBatch

EXACT = Tolerance(rtol=0.0, atol=0.0)
# float32 sums in another order
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-6)

IMAGES = 2


def dense_qkv(count: int = DENSE) -> list[Tensor]:
    return [torch.randn(IMAGES, H, count, K) for _ in range(3)]


def dense_batch(kernels: Kernels | None = None, count: int = DENSE) -> TokenBatch:
    return TokenBatch.dense(IMAGES, count, 1, torch.device("cpu"), kernels)


def test_a_dense_blocks_attention_is_sdpa() -> None:
    q, k, v = dense_qkv(5)
    ours = DenseAttention().attend(q, k, v, None, SCALE, 0.0)
    assert_close(ours, F.scaled_dot_product_attention(q, k, v, scale=SCALE).transpose(1, 2), **EXACT)


@in_both_ways
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("row", ["class", "mean"])
def test_dense_masked_and_packed_attention_say_what_the_reference_says(
    row: Row, biased: bool, kernels: Kernels | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masked, "EPS", 0.0)
    (q, k, v), bias = dense_qkv(), relative_positions() if biased else None
    request, batch = StatsRequest(row, metric=True), dense_batch(kernels)
    dense, packed = DenseAttention(batch, request), PackedAttention(batch, request)
    all_seen = MaskedAttention(MaskedTokens(torch.ones(IMAGES, DENSE)), request)
    rows = [x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for x in (q, k, v)]
    outputs = [attention.attend(q, k, v, bias, SCALE, 0.0) for attention in (dense, all_seen)]
    outputs.append(packed.attend(rows[0], rows[1], rows[2], bias, SCALE, 0.0).view_as(outputs[0]))
    for output, attention in zip(outputs, (dense, all_seen, packed), strict=True):
        found, metric_TK = attention.stats.attention_BM, attention.stats.metric_TK
        assert found is not None
        assert metric_TK is not None
        for b in range(IMAGES):
            own_bias = None if bias is None else bias[0]
            contexts, by_class, by_mean = alone(q[b], k[b], v[b], torch.ones(DENSE), own_bias)
            assert_close(output[b], contexts.transpose(0, 1), **FLOAT32)
            assert_close(found[b], by_class if row == "class" else by_mean, **FLOAT32)
            assert_close(metric_TK[DENSE * b : DENSE * (b + 1)], reference.metric(k[b]), **FLOAT32)


@in_both_ways
def test_nothing_is_found_unasked(kernels: Kernels | None) -> None:
    attention = DenseAttention(dense_batch(kernels), StatsRequest())
    q, k, v = dense_qkv()
    attention.attend(q, k, v, None, SCALE, 0.0)
    assert (attention.stats.attention_BM, attention.stats.metric_TK) == (None, None)


@pytest.mark.parametrize("gradient", [False, True])
def test_stats_have_a_gradient_where_thresholds_learn(gradient: bool) -> None:
    q, k, v = (x.requires_grad_() for x in dense_qkv())
    attention = DenseAttention(dense_batch(), StatsRequest("class", gradient=gradient))
    attention.attend(q, k, v, None, SCALE, 0.0)
    assert attention.stats.attention_BM is not None
    assert attention.stats.attention_BM.requires_grad == gradient


@pytest.mark.parametrize("sized", [False, True], ids=["plain", "sized"])
def test_a_last_block_attends_for_the_tokens_that_are_read(sized: bool) -> None:
    batch, (q, k, v), _ = packed(sized)
    hidden_states, read, lengths = torch.randn(1, q.shape[2], 4), 2, []

    def block(x: Tensor) -> Tensor:
        """q of the rows that it is given; k and v are made of all rows in the first run."""
        lengths.append(x.shape[:2])
        rows = slice(None) if len(lengths) == 1 else None
        queries = q if rows else torch.stack([q[0, :, s : s + read] for s in batch.layout.starts])
        return last.attend(queries, k, v, None, SCALE, 0.0)

    last = LastBlockAttention(batch, read)
    ours = last.run(block, hidden_states)
    assert lengths == [(1, q.shape[2]), (len(batch.lengths), read)]
    expected = PackedAttention(batch).attend(q, k, v, None, SCALE, 0.0)[0]
    for image, start in enumerate(batch.layout.starts):
        assert_close(ours[image], expected[start : start + read], **FLOAT32)


def test_a_bias_goes_by_position_and_is_none_without_one() -> None:
    bias = relative_positions()
    positions_GQ, positions_GJ = torch.tensor([[0, 3], [5, NO_TOKEN]]), torch.tensor([[1, NO_TOKEN], [2, 4]])
    ours = PairBias(bias).between(positions_GQ, positions_GJ)
    for g, i, j in torch.cartesian_prod(*(torch.arange(2),) * 3).tolist():
        pair = positions_GQ[g, i], positions_GJ[g, j]
        expected = torch.zeros(H) if NO_TOKEN in pair else bias[0, :, pair[0], pair[1]]
        assert_close(ours[g, :, i, j], expected, **EXACT)
