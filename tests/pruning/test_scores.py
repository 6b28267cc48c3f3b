"""Scores and similarities against loops over images, heads and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import Tolerance
from torch import Tensor
from torch.testing import assert_close

from vitprune.pruning.scores import (
    TILE,
    bipartite,
    density_peaks,
    head_weighted_attention,
    importance_weights,
    key_metric,
    mean_query,
    more_important,
    most_similar,
    nearest,
    row_logits,
    row_weights,
    true_indices,
)

EXACT = Tolerance(rtol=0.0, atol=0.0)
# float32 against Python's double precision
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-6)

B, H, M, K = 3, 2, 9, 4
# images of different lengths: the rest of a row is padding
LENGTHS = (9, 4, 6)
# patches of an image that take several tiles, the last one in part
SEVERAL_TILES = 2 * TILE + 37


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
    ours = row_weights(row_logits(q, k, 0.5) + (sizes.log() if sized else 0.0))
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


# --- density peaks ---


def mixed_rows(metric_BNK: Tensor) -> tuple[Tensor, Tensor]:
    """The metric as rows laid end to end in some other order, and which row is whose."""
    flat_TK = metric_BNK.detach().flatten(0, 1)
    order_T = torch.randperm(len(flat_TK))
    return flat_TK[order_T], order_T.argsort().view(metric_BNK.shape[:2])


def is_more_important(importance: list[float], j: int, i: int) -> bool:
    return importance[j] > importance[i] or (importance[j] == importance[i] and j < i)


def delta(metric_NK: Tensor, importance_N: Tensor) -> Tensor:
    """1 − the largest cosine to a patch that is more important, of one image, (N,); with gradient, if that has one."""
    importance, result = importance_N.tolist(), []
    for i in range(len(importance)):
        others = [j for j in range(len(importance)) if is_more_important(importance, j, i)]
        if others:
            result.append((1 - (metric_NK[others] * metric_NK[i]).sum(-1).max()).clamp(min=0))
        else:
            result.append(metric_NK.new_tensor(math.inf))
    return torch.stack(result)


@pytest.mark.parametrize("ties", [False, True])
def test_density_peaks_are_unlike_all_that_are_more_important(ties: bool) -> None:
    metric, importance = unit(B, M, K), torch.rand(B, M)
    if ties:
        importance = (importance * 3).round() / 3
    # padding comes last and is no more important than any
    importance[~valid()] = 0.0 if ties else -math.inf
    ours = density_peaks(*mixed_rows(metric), importance)
    for b, length in enumerate(LENGTHS):
        assert_close(ours[b, :length], delta(metric[b, :length], importance[b, :length]), **FLOAT32)
        first = importance[b, :length].tolist().index(max(importance[b, :length].tolist()))
        assert ours[b, :length].isinf().nonzero().flatten().tolist() == [first]


@pytest.mark.parametrize("patches", [1, TILE - 1, TILE, TILE + 1, SEVERAL_TILES])
def test_density_peaks_of_images_that_take_several_tiles(patches: int) -> None:
    metric, importance = unit(2, patches, K), (torch.rand(2, patches) * patches).round()
    rows, index = mixed_rows(metric)
    ours = density_peaks(rows.requires_grad_(), index, importance)
    assert not ours.requires_grad
    for b in range(2):
        assert_close(ours[b], delta(metric[b], importance[b]), **FLOAT32)


def test_the_first_of_equal_patches_is_more_important_and_the_others_are_redundant() -> None:
    metric = unit(1, 1, K).expand(1, 7, K)
    ours = density_peaks(*mixed_rows(metric), torch.ones(1, 7))
    assert ours[0, 0] == math.inf
    assert_close(ours[0, 1:], torch.zeros(6), **FLOAT32)
    assert (ours >= 0).all()


def test_an_image_that_is_no_number_spoils_no_other() -> None:
    metric, importance = unit(B, M, K), torch.rand(B, M)
    expected = density_peaks(*mixed_rows(metric), importance)
    metric[1], importance[1] = math.nan, math.nan
    ours = density_peaks(*mixed_rows(metric), importance)
    assert_close(ours[[0, 2]], expected[[0, 2]], **EXACT)
    assert ours[1].isnan().all()


def test_density_peaks_of_a_float64_model_stay_what_they_are() -> None:
    metric, importance = unit(B, M, K).double(), torch.rand(B, M).double()
    ours = density_peaks(*mixed_rows(metric), importance)
    assert ours.dtype == torch.float64
    for b in range(B):
        assert_close(ours[b], delta(metric[b], importance[b]), **FLOAT32)


def test_half_precision_elsewhere_leaves_density_peaks_alone() -> None:
    rows, index = mixed_rows(unit(B, M, K))
    importance = torch.rand(B, M)
    expected = density_peaks(rows, index, importance)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(density_peaks(rows, index, importance), expected, **EXACT)


def test_how_unlike_the_patches_before_one_are() -> None:
    metric = unit(B, M, K)
    distances = more_important(metric)
    for b in range(B):
        assert distances[b, 0] == math.inf
        for i in range(1, M):
            cosines = [dot(metric[b, i], metric[b, j]) for j in range(i)]
            assert_close(distances[b, i].item(), 1 - max(cosines), **FLOAT32)


@pytest.mark.parametrize("patches", [64, torch.tensor([[64], [16], [49]])], ids=["of one size", "of many sizes"])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_importance_is_weighed_by_what_an_even_share_would_be(exponent: float, patches: int | Tensor) -> None:
    score = torch.rand(B, M)
    score[0, 2] = 0.0
    ours = importance_weights(score, patches, exponent)
    for b in range(B):
        n = patches if isinstance(patches, int) else int(patches[b])
        for i in range(M):
            assert_close(ours[b, i].item(), (n * score[b, i].item()) ** exponent, **FLOAT32)
    # a score spread over more patches means the same
    assert_close(importance_weights(score / 4, patches * 4, exponent), ours, **FLOAT32)


# --- ToMe's matching ---


@pytest.mark.parametrize("lengths", [LENGTHS, (M,), (2, 1, 3)], ids=["images", "an image alone", "few patches"])
@pytest.mark.parametrize("prefix", [1, 2])
def test_tome_measures_the_distance_to_the_most_similar_anchor(prefix: int, lengths: tuple[int, ...]) -> None:
    lengths = tuple(max(length, prefix + 1) for length in lengths)
    longest = max(lengths)
    metric = unit(len(lengths), longest, K)
    r, anchors = bipartite(metric, torch.arange(longest) < torch.tensor(lengths)[:, None], prefix)
    for b, length in enumerate(lengths):
        patches = list(range(prefix, length))
        anchor_patches, candidates = patches[::2], patches[1::2]
        for i in range(longest):
            if i >= length:
                assert r[b, i] == -math.inf
            elif i not in candidates:
                assert r[b, i] == math.inf
            else:
                cosines = {a: dot(metric[b, i], metric[b, a]) for a in anchor_patches}
                nearest_anchor = max(cosines, key=lambda a: cosines[a])
                assert anchors[b, i] == nearest_anchor
                assert_close(r[b, i].item(), 1 - cosines[nearest_anchor], **FLOAT32)


def test_identical_patches_are_at_no_distance_below_nothing() -> None:
    metric = unit(1, 1, K).expand(2, 7, K)
    r, _ = bipartite(metric, torch.ones(2, 7, dtype=torch.bool), 1)
    assert (r >= 0).all()
    assert_close(r[:, 2::2], torch.zeros(2, 3), **FLOAT32)


# --- who is most similar ---


@pytest.mark.parametrize("asking", [5, SEVERAL_TILES])
@pytest.mark.parametrize("some_are_absent", [False, True])
def test_the_nearest_column_is_the_most_similar_one_that_is_there(some_are_absent: bool, asking: int) -> None:
    metric_TK = unit(asking + 20, K)
    rows, columns = torch.randint(len(metric_TK), (B, asking)), torch.randint(len(metric_TK), (B, 7))
    absent = torch.rand(B, 7) > 0.5
    absent[:, 3] = False
    ours = nearest(metric_TK, rows, columns, absent if some_are_absent else None)
    assert ours.shape == (B, asking)
    for b in range(B):
        there = [a for a in range(7) if not (some_are_absent and absent[b, a])]
        for c in range(asking):
            cosines = [float(metric_TK[rows[b, c]] @ metric_TK[columns[b, a]]) for a in there]
            # equal but for rounding where a column is there twice
            assert int(ours[b, c]) in there
            found = float(metric_TK[rows[b, c]] @ metric_TK[columns[b, ours[b, c]]])
            assert_close(found, max(cosines), **FLOAT32)


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


def test_most_similar_where_many_ask() -> None:
    metric = unit(2, SEVERAL_TILES + 5, K)
    answers = torch.arange(SEVERAL_TILES + 5).expand(2, -1) < 5
    ours = most_similar(metric, ~answers, answers)
    assert_close(ours[:, 5:], (metric[:, 5:] @ metric[:, :5].mT).argmax(-1), **EXACT)


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
    logits_BMH = row_logits(torch.randn(B, H, K).bfloat16(), torch.randn(B, M, H, K).bfloat16(), 0.5)
    assert row_weights(logits_BMH).dtype == torch.float32
    assert_close(true_indices(torch.zeros(2, 3, dtype=torch.bool)), torch.zeros(2, 0, dtype=torch.long), **EXACT)
