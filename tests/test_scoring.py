"""Scores and similarities against loops over images, heads and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import Tolerance
from torch import Tensor
from torch.testing import assert_close

from vitprune.scoring import (
    attention_row,
    head_weighted_attention,
    key_metric,
    mean_query,
    most_similar,
    redundancy,
    redundancy_weights,
    true_indices,
)

EXACT = Tolerance(rtol=0.0, atol=0.0)
# float32 against Python's double precision
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-6)

B, H, M, K = 3, 2, 9, 4
# images of different lengths: the rest of a row is padding
LENGTHS = (9, 4, 6)


def valid() -> Tensor:
    return torch.arange(M) < torch.tensor(LENGTHS)[:, None]


def unit(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def dot(first: Tensor, second: Tensor) -> float:
    return sum(a * b for a, b in zip(first.tolist(), second.tolist(), strict=True))


@pytest.mark.parametrize("heads", [1, H], ids=["a bias for all heads", "one a head"])
@pytest.mark.parametrize("sized", [False, True])
def test_class_attention_is_a_softmax_over_the_class_tokens_row(sized: bool, heads: int) -> None:
    q, k, sizes = torch.randn(B, H, K), torch.randn(B, M, H, K), torch.randint(1, 5, (B, M, heads)).float()
    ours = attention_row(q, k, 0.5, sizes.log() if sized else None)
    for b in range(B):
        for h in range(H):
            # a token of size s counts like s tokens: s·exp(a)
            sizes_M = sizes[b, :, h % heads].tolist() if sized else [1.0] * M
            weights = [sizes_M[i] * math.exp(0.5 * dot(q[b, h], k[b, i, h])) for i in range(M)]
            assert_close(ours[b, :, h], torch.tensor([w / sum(weights) for w in weights]), **FLOAT32)


def test_the_mean_query_is_a_mean_by_size_of_what_is_there() -> None:
    q, sizes = torch.randn(B, M, H, K), torch.randint(1, 5, (B, M)).float() * valid()
    ours = mean_query(q, sizes)
    for b, length in enumerate(LENGTHS):
        for h in range(H):
            total = sum(sizes[b, :length].tolist())
            for c in range(K):
                expected = sum(sizes[b, i].item() * q[b, i, h, c].item() for i in range(length)) / total
                assert_close(ours[b, h, c].item(), expected, **FLOAT32)
    assert mean_query(q.bfloat16(), sizes).dtype == torch.bfloat16


def test_the_score_weighs_each_head_by_its_share_of_the_tokens_norm() -> None:
    attention, norms = torch.rand(B, M, H), torch.rand(B, M, H)
    norms[0, 2] = 0.0  # no head says anything there
    ours = head_weighted_attention(attention, norms)
    for b in range(B):
        for i in range(M):
            total = sum(norms[b, i, h].item() for h in range(H)) + 1e-8
            expected = sum(norms[b, i, h].item() / total * attention[b, i, h].item() for h in range(H))
            assert_close(ours[b, i].item(), expected, **FLOAT32)
    assert ours[0, 2] == 0.0


def test_the_metric_is_the_mean_key_of_length_one() -> None:
    keys_THK = torch.randn(M, H, K)
    ours = key_metric(keys_THK.bfloat16())
    assert ours.dtype == torch.float32
    ours = key_metric(keys_THK)
    for t in range(M):
        mean = [sum(keys_THK[t, h, c].item() for h in range(H)) / H for c in range(K)]
        length = math.sqrt(sum(c * c for c in mean))
        assert_close(ours[t], torch.tensor([c / length for c in mean]), **FLOAT32)


@pytest.mark.parametrize("prefix", [1, 2])
def test_redundancy_is_the_distance_to_the_most_similar_anchor(prefix: int) -> None:
    metric = unit(B, M, K)
    r, anchors = redundancy(metric, valid(), prefix)
    for b, length in enumerate(LENGTHS):
        patches = list(range(prefix, length))
        anchor_patches, candidates = patches[::2], patches[1::2]
        for i in range(M):
            if i >= length:
                assert r[b, i] == -math.inf
            elif i not in candidates:
                assert r[b, i] == math.inf
            else:
                cosines = {a: dot(metric[b, i], metric[b, a]) for a in anchor_patches}
                nearest = max(cosines, key=lambda a: cosines[a])
                assert anchors[b, i] == nearest
                assert_close(r[b, i].item(), 1 - cosines[nearest], **FLOAT32)


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_weighed_redundancy_is_a_product_that_leaves_marks_alone(exponent: float, prefix: int) -> None:
    metric, score = unit(B, M, K), torch.rand(B, M)
    r, anchors = redundancy(metric, valid(), prefix)
    ours, same_anchors = redundancy(metric, valid(), prefix, redundancy_weights(score, exponent))
    assert torch.equal(same_anchors, anchors)
    assert set(r[r.isinf()].tolist()) == {math.inf, -math.inf}
    for b in range(B):
        for i in range(M):
            r_i = r[b, i].item()
            expected = r_i if math.isinf(r_i) else r_i * score[b, i].item() ** exponent
            assert_close(ours[b, i].item(), expected, **FLOAT32)


def test_weighed_redundancy_has_finite_gradients_beside_infinite_marks_and_zero_scores() -> None:
    metric, score = unit(B, M, K), torch.rand(B, M)
    metric[0, 2], score[0, 4] = metric[0, 1], 0.0
    metric.requires_grad_()
    score.requires_grad_()
    weighed, _ = redundancy(metric, valid(), 1, redundancy_weights(score, 0.5))
    assert weighed[0, 2] < 1e-6
    weighed[weighed.isfinite()].sum().backward()
    for leaf in (metric, score):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()


def test_identical_patches_never_score_below_nothing() -> None:
    metric = unit(1, 1, K).expand(1, 7, K)
    r, _ = redundancy(metric, torch.ones(1, 7, dtype=torch.bool), 1, torch.ones(1, 7))
    assert (r >= 0).all()


@pytest.mark.parametrize("everybody_asks", [False, True])
def test_most_similar_is_never_oneself_and_always_one_who_answers(everybody_asks: bool) -> None:
    metric = unit(B, M, K)
    answers = valid() & (torch.arange(M) % 3 != 0)
    asks = valid() if everybody_asks else valid() & ~answers
    ours = most_similar(metric, asks, answers)
    for b in range(B):
        for i in asks[b].nonzero().flatten().tolist():
            cosines = {j: dot(metric[b, i], metric[b, j]) for j in answers[b].nonzero().flatten().tolist() if j != i}
            assert ours[b, i] == max(cosines, key=lambda j: cosines[j])


def test_most_similar_where_an_image_asks_nothing() -> None:
    metric = unit(2, M, K)
    answers = torch.ones(2, M, dtype=torch.bool)
    answers[1, 4:] = False
    ours = most_similar(metric, ~answers, answers)
    assert ours.shape == (2, M)
    assert (ours[1, 4:] < 4).all()


def test_true_indices_lists_the_true_entries_first_and_in_order() -> None:
    mask = torch.rand(6, 11) > 0.5
    mask[2] = False
    ours = true_indices(mask)
    assert ours.shape == (6, max(sum(row) for row in mask.tolist()))
    for row, indices in zip(mask.tolist(), ours.tolist(), strict=True):
        expected = [i for i, is_true in enumerate(row) if is_true]
        assert indices[: len(expected)] == expected
        assert not any(row[i] for i in indices[len(expected) :])
        assert len(set(indices)) == len(indices)


def test_scores_are_float32_in_bfloat16_models() -> None:
    assert attention_row(torch.randn(B, H, K).bfloat16(), torch.randn(B, M, H, K).bfloat16(), 0.5).dtype == (
        torch.float32
    )
    assert_close(true_indices(torch.zeros(2, 3, dtype=torch.bool)), torch.zeros(2, 0, dtype=torch.long), **EXACT)
