"""Dense, masked and packed attention against sums written out image by image, and against sdpa."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest
import torch
from tiny import Tolerance
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from written_out import (
    DENSE,
    SCALING,
    H,
    K,
    batch_of,
    bias_of,
    dense_attention,
    every_layout,
    images_of,
    in_both_ways,
    mean_score,
    of_images,
    packed,
    relative_positions,
    score,
    with_or_without_sizes,
)

from vitprune import attention
from vitprune.attention import AttentionCall, MaskedTokens, attention_forward, calling, masked_attention_weights
from vitprune.layout import Layout
from vitprune.packed_attention import PackedAttention, Query
from vitprune.tokens import NOBODY, TokenBatch

EXACT = Tolerance(rtol=0.0, atol=0.0)
# float32 sums in another order
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-6)
# the published masked softmax adds 1e-6
PUBLISHED_EPS = Tolerance(rtol=1e-5, atol=1e-5)


class Layer(nn.Module):
    """What transformers hands over as the module."""

    is_causal = False
    num_key_value_groups = 1


def attend(
    qkv: Sequence[Tensor], attention_mask: Tensor | None = None, *, call: AttentionCall | None = None, **options: Any
) -> Tensor:
    query, key, value = qkv
    with nullcontext() if call is None else calling(call):
        output, weights = attention_forward(Layer(), query, key, value, attention_mask, **options)
    assert weights is None
    return output


def fused(qkv: Sequence[Tensor], scale: float | None = None) -> Tensor:
    """torch's own attention, laid out as transformers' interface gives it out."""
    query, key, value = qkv
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)


@every_layout
@with_or_without_sizes
@in_both_ways
def test_a_packed_call_finds_scores_and_metric_of_each_image(
    loops: bool, sized: bool, lengths: tuple[int, ...]
) -> None:
    batch, qkv, sizes = packed(sized, lengths, loops=loops)
    call = AttentionCall(batch, scores_of="class", wants_metric=True)
    output = attend(qkv, scaling=SCALING, call=call)
    scores, metric = call.findings.attention_scores_BM, call.findings.metric_TK
    assert scores is not None
    assert metric is not None
    outputs, metrics = of_images(batch, output[0]), of_images(batch, metric)
    for image, (q, k, v, s) in enumerate(images_of(batch, qkv, sizes)):
        weights, context = dense_attention(q, k, v, s)
        length = len(s)
        assert_close(outputs[image], context.transpose(0, 1), **FLOAT32)
        assert_close(scores[image, :length], score(weights, context), **FLOAT32)
        mean_key = k.mean(0)
        assert_close(metrics[image], mean_key / mean_key.norm(dim=-1, keepdim=True), **FLOAT32)


@with_or_without_sizes
@in_both_ways
def test_rows_behind_the_last_token_change_nothing(loops: bool, sized: bool) -> None:
    batch, qkv, _ = packed(sized, alignment=4, loops=loops)
    expected = AttentionCall(batch, scores_of="class", wants_metric=True)
    output = attend(qkv, scaling=SCALING, call=expected)
    rows, padding = sum(batch.layout.rows), 8
    longer = batch_of(
        replace(batch.layout, row_multiple=rows + padding),
        F.pad(batch.positions_T, (0, padding), value=NOBODY),
        None if batch.sizes_T is None else F.pad(batch.sizes_T, (0, padding)),
        loops=loops,
    )
    ours = AttentionCall(longer, scores_of="class", wants_metric=True)
    filler = torch.full((1, H, padding, K), torch.nan)
    longer_output = attend([torch.cat([x, filler], 2) for x in qkv], scaling=SCALING, call=ours)
    assert_close(longer_output[:, :rows], output, **EXACT)
    assert longer_output[:, rows:].isfinite().all()
    assert_close(ours.findings.attention_scores_BM, expected.findings.attention_scores_BM, **EXACT)
    assert ours.findings.metric_TK is not None
    assert expected.findings.metric_TK is not None
    for found, wanted in zip(
        of_images(longer, ours.findings.metric_TK), of_images(batch, expected.findings.metric_TK), strict=True
    ):
        assert_close(found, wanted, **EXACT)


@with_or_without_sizes
def test_masked_tokens_are_seen_by_themselves_only(sized: bool) -> None:
    q, k = torch.randn(2, H, 5, K), torch.randn(2, H, 5, K)
    mask = torch.tensor([[1.0, 1, 0, 1, 0], [1.0, 0, 0, 0, 1]])
    sizes = torch.randint(1, 6, (2, 5)).float()
    ours = masked_attention_weights(q, k, SCALING, MaskedTokens(mask, sizes if sized else None))
    eps = 1e-6
    for b in range(2):
        for h in range(H):
            for i in range(5):
                logits = [SCALING * (q[b, h, i].double() @ k[b, h, j].double()).item() for j in range(5)]
                if sized:
                    logits = [a + math.log(sizes[b, j]) for j, a in enumerate(logits)]
                seen = [1.0 if i == j else mask[b, j].item() for j in range(5)]
                exps = [math.exp(a - max(logits)) * g for a, g in zip(logits, seen, strict=True)]
                expected = [(e + eps / 5) / (sum(exps) + eps) for e in exps]
                assert_close(ours[b, h, i], torch.tensor(expected), **FLOAT32)


def test_masked_attention_rows_sum_to_one() -> None:
    mask = (torch.rand(2, 7) > 0.5).float()
    weights = masked_attention_weights(torch.randn(2, H, 7, K), torch.randn(2, H, 7, K), SCALING, MaskedTokens(mask))
    assert_close(weights.sum(-1), torch.ones(2, H, 7), **FLOAT32)


def test_a_mask_has_a_gradient_where_it_is_zero() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)
    weights = masked_attention_weights(torch.randn(1, H, 3, K), torch.randn(1, H, 3, K), SCALING, MaskedTokens(mask))
    weights[:, :, 0, 2].sum().backward()
    assert mask.grad is not None
    # more of the dropped token would be seen if there were more of it
    assert mask.grad[0, 2] > 0


def test_a_token_of_size_two_counts_like_the_token_twice() -> None:
    q, k, v = (torch.randn(1, H, 6, K) for _ in range(3))
    twice = torch.tensor([0, 1, 2, 3, 3, 4, 5])
    doubled = batch_of(Layout((7,)), torch.arange(7), tokens=7)
    sizes = torch.tensor([1.0, 1, 1, 2, 1, 1])
    merged = batch_of(Layout((6,)), torch.arange(6), sizes, tokens=7)
    expected = PackedAttention(q[:, :, twice], k[:, :, twice], v[:, :, twice], doubled, SCALING).contexts_THK
    ours = PackedAttention(q, k, v, merged, SCALING).contexts_THK
    assert_close(ours, expected[torch.tensor([0, 1, 2, 3, 5, 6])], **FLOAT32)

    masked = masked_attention_weights(q, k, SCALING, MaskedTokens(torch.ones(1, 6), sizes[None]))
    assert_close((masked @ v).transpose(1, 2)[0], ours, **PUBLISHED_EPS)


@pytest.mark.parametrize("scaling", [None, SCALING])
def test_without_pruning_attention_is_sdpa(scaling: float | None) -> None:
    qkv = [torch.randn(2, H, 5, K) for _ in range(3)]
    mask = torch.rand(2, 1, 5, 5) > 0.3
    for attention_mask in (None, mask | torch.eye(5, dtype=torch.bool)):
        query, key, value = qkv
        expected, _ = sdpa_attention_forward(Layer(), query, key, value, attention_mask, scaling=scaling)
        assert_close(attend(qkv, attention_mask, scaling=scaling), expected, **EXACT)


@in_both_ways
def test_while_all_tokens_are_there_attention_is_dense_and_finds_what_is_asked(loops: bool) -> None:
    qkv = [torch.randn(2, H, 5, K) for _ in range(3)]
    call = AttentionCall(scores_of="class", wants_metric=True, loops=loops)
    output = attend(qkv, scaling=SCALING, call=call)
    scores, metric = call.findings.attention_scores_BM, call.findings.metric_TK
    assert scores is not None
    assert metric is not None
    for b in range(2):
        q, k, v = (x[b] for x in qkv)
        weights, context = dense_attention(q, k, v, torch.ones(5))
        assert_close(output[b], context.transpose(0, 1), **FLOAT32)
        assert_close(scores[b], score(weights, context), **FLOAT32)
        mean_key = k.mean(0)
        assert_close(metric[5 * b : 5 * b + 5], mean_key / mean_key.norm(dim=-1, keepdim=True), **FLOAT32)


def test_masked_attention_finds_the_metric_of_all_tokens() -> None:
    query, key, value = (torch.randn(2, H, 5, K) for _ in range(3))
    call = AttentionCall(MaskedTokens((torch.rand(2, 5) > 0.5).float()), wants_metric=True)
    attend((query, key, value), scaling=SCALING, call=call)
    assert_close(call.findings.metric_TK, F.normalize(key.mean(1), dim=-1).flatten(0, 1), **FLOAT32)


@pytest.mark.parametrize("tokens", [None, MaskedTokens(torch.ones(2, 5))], ids=["dense", "masked"])
def test_nothing_is_found_unasked(tokens: MaskedTokens | None) -> None:
    qkv = [torch.randn(2, H, 5, K) for _ in range(3)]
    call = AttentionCall(tokens)
    attend(qkv, scaling=SCALING, call=call)
    assert call.findings.attention_scores_BM is None
    assert call.findings.metric_TK is None


def test_the_default_scaling_is_one_over_the_root_of_the_head_width() -> None:
    qkv = [torch.randn(2, H, 5, K) for _ in range(3)]
    expected = attend(qkv, scaling=K**-0.5, call=AttentionCall())
    assert_close(attend(qkv, call=AttentionCall()), expected, **EXACT)


# --- a bias of pairs of positions ---


@with_or_without_sizes
def test_in_masked_attention_the_bias_goes_by_position(sized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MASKED_SOFTMAX_EPS", 0.0)
    bias = relative_positions()
    q, k, v = (torch.randn(2, H, DENSE, K) for _ in range(3))
    mask = (torch.rand(2, DENSE) > 0.4).float()
    mask[:, 0] = mask[:, -1] = 1.0
    sizes = torch.randint(1, 6, (2, DENSE)).float() if sized else None
    weights = masked_attention_weights(q, k, SCALING, MaskedTokens(mask, sizes), bias)
    for b in range(2):
        seen = mask[b].nonzero().flatten().tolist()
        own_bias = bias_of(seen, bias)
        own_sizes = torch.ones(len(seen)) if sizes is None else sizes[b, seen]
        expected, _ = dense_attention(q[b][:, seen], k[b][:, seen], v[b][:, seen], own_sizes, own_bias)
        assert_close(weights[b][:, seen][:, :, seen], expected, **FLOAT32)


def test_in_dense_attention_the_bias_is_added_as_it_is() -> None:
    qkv, bias = [torch.randn(2, H, DENSE, K) for _ in range(3)], relative_positions()
    call = AttentionCall(scores_of="class")
    output = attend(qkv, bias, call=call, scaling=SCALING)
    scores = call.findings.attention_scores_BM
    assert scores is not None
    for b in range(2):
        q, k, v = (x[b] for x in qkv)
        weights, context = dense_attention(q, k, v, torch.ones(DENSE), bias[0])
        assert_close(output[b], context.transpose(0, 1), **FLOAT32)
        assert_close(scores[b], score(weights, context), **FLOAT32)


# --- scores of the mean query ---


@with_or_without_sizes
def test_masked_attention_scores_by_the_mean_query_of_those_seen(sized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MASKED_SOFTMAX_EPS", 0.0)
    qkv, mask = [torch.randn(2, H, 7, K) for _ in range(3)], (torch.rand(2, 7) > 0.4).float()
    mask[:, 0] = 1.0
    sizes = torch.randint(1, 6, (2, 7)).float() if sized else None
    call = AttentionCall(MaskedTokens(mask, sizes), scores_of="mean")
    attend(qkv, call=call, scaling=SCALING)
    scores = call.findings.attention_scores_BM
    assert scores is not None
    for b in range(2):
        seen = mask[b].nonzero().flatten().tolist()
        own_sizes = torch.ones(len(seen)) if sizes is None else sizes[b, seen]
        q, k, v = (x[b][:, seen] for x in qkv)
        assert_close(scores[b, seen], mean_score(q, k, v, own_sizes), **FLOAT32)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("query", ["class", "mean"])
@in_both_ways
def test_dense_masked_and_packed_scores_agree_while_all_tokens_are_there(
    loops: bool, query: Query, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MASKED_SOFTMAX_EPS", 0.0)
    qkv, bias = [torch.randn(2, H, DENSE, K) for _ in range(3)], relative_positions() if biased else None
    batch = TokenBatch.dense(2, DENSE, 1, torch.device("cpu"), loops=loops)
    packed_qkv = [x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for x in qkv]
    kinds = None, MaskedTokens(torch.ones(2, DENSE)), batch
    calls = [AttentionCall(kind, scores_of=query, loops=loops) for kind in kinds]
    dense, masked = (attend(qkv, bias, call=call, scaling=SCALING) for call in calls[:2])
    packed = attend(packed_qkv, bias, call=calls[2], scaling=SCALING).view_as(dense)
    assert_close((masked, packed), (dense, dense), **FLOAT32)
    first, *others = (call.findings.attention_scores_BM for call in calls)
    assert_close(others, [first, first], **FLOAT32)
    if query == "mean":
        assert first is not None
        q, k, v = (x[0] for x in qkv)
        expected = mean_score(q, k, v, torch.ones(DENSE), None if bias is None else bias[0])
        assert_close(first[0], expected, **FLOAT32)


# --- who is called ---


def test_a_call_may_take_torchs_own_fused_attention() -> None:
    batch, qkv, _ = packed(sized=True)
    call = AttentionCall(batch, scores_of="class")
    expected = attend(qkv, call=call, scaling=SCALING)
    wanted, call = call.findings, AttentionCall(batch, scores_of="class")
    with calling(call, intercept=True):
        ours = fused(qkv, SCALING)
    assert_close(ours, expected, **EXACT)
    assert_close(vars(call.findings), vars(wanted), **EXACT)


def test_intercepting_leaves_other_functions_and_what_follows_alone() -> None:
    batch, qkv, _ = packed(sized=True)
    q, k, v = qkv
    expected = F.softmax(q, -1), F.linear(v, k[0, 0]), F.scaled_dot_product_attention(q, k, v)
    call = AttentionCall(batch, scores_of="class")
    with calling(call, intercept=True):
        ours = F.softmax(q, -1), F.linear(v, k[0, 0])
    assert_close((*ours, F.scaled_dot_product_attention(q, k, v)), expected, **EXACT)
    assert call.findings.attention_scores_BM is None
    with calling(call):
        assert_close(F.scaled_dot_product_attention(q, k, v), expected[-1], **EXACT)


@pytest.mark.parametrize("fails", [False, True])
def test_behind_a_call_attention_is_sdpa_again(fails: bool) -> None:
    batch, qkv, _ = packed(sized=True)
    expected = attend(qkv)
    with pytest.raises(KeyError) if fails else nullcontext(), calling(AttentionCall(batch), intercept=True):
        if fails:
            raise KeyError
    assert_close(attend(qkv), expected, **EXACT)
    assert_close(fused(qkv), expected, **EXACT)


def test_calls_nest() -> None:
    qkv = [torch.randn(2, H, 5, K) for _ in range(3)]
    outer, inner = AttentionCall(wants_metric=True), AttentionCall(scores_of="mean")
    with calling(outer):
        with calling(inner):
            attend(qkv)
        assert (inner.findings.attention_scores_BM is not None, outer.findings.metric_TK) == (True, None)
        attend(qkv)
    assert (outer.findings.metric_TK is not None, inner.findings.metric_TK) == (True, None)


@pytest.mark.parametrize("intercept", [False, True])
def test_calls_in_two_threads_do_not_mix(intercept: bool) -> None:
    both_are_in = Barrier(2, timeout=10)
    images = [[torch.randn(1, H, count, K) for _ in range(3)] for count in (5, 7)]

    def find(qkv: Sequence[Tensor]) -> Tensor | None:
        call = AttentionCall(wants_metric=True)
        with calling(call, intercept=intercept):
            both_are_in.wait()
            fused(qkv) if intercept else attend(qkv)
            both_are_in.wait()
        return call.findings.metric_TK

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(find, images))
    for (_, key, _), metric in zip(images, found, strict=True):
        assert_close(metric, F.normalize(key.mean(1), dim=-1)[0], **FLOAT32)
