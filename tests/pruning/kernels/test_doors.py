"""Each door's kernels against the same in operators of torch, which have tests of their own against the papers.

The CUDA door's run on the CPU here, in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import tiny
import torch
from tiny import Tolerance
from torch import Tensor
from torch.testing import assert_close

from vitprune.pruning.attention import StatsRequest
from vitprune.pruning.kernels import cpu, cuda
from vitprune.pruning.layout import Layout
from vitprune.pruning.packed.attention import PackedAttention
from vitprune.pruning.packed.reduction import reduce_tokens
from vitprune.pruning.scores import TILE, Row, TokenStats, density_peaks, importance_weights, most_similar
from vitprune.pruning.selection import Decision, above_threshold
from vitprune.pruning.token_batch import Kernels, TokenBatch

EXACT = Tolerance(rtol=0.0, atol=0.0)
# sums of some dozen float32 numbers, in another order
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-6)
# loops merge in float32 and round once, operators round at each step
BFLOAT16 = Tolerance(rtol=2**-6, atol=2**-7)
PREFIX, TOKENS, H, K, WIDTH = 2, 25, 3, 7, 20
SEVERAL = (9, 23, 4, 14)
every_batch = pytest.mark.parametrize("lengths", [SEVERAL, (13,)], ids=["images", "an image alone"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


DOORS: dict[str, Kernels] = {"loops": cpu, "loops in two threads": cpu, "Triton": cuda}


@pytest.fixture(autouse=True, params=DOORS)
def door(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    before = torch.get_num_threads()
    torch.set_num_threads(2 if request.param == "loops in two threads" else 1)
    with torch.device("cuda" if request.param == "Triton" and tiny.on_gpu() else "cpu"):
        yield DOORS[request.param]
    torch.set_num_threads(before)


def dense(images: int, kernels: Kernels | None) -> TokenBatch:
    return TokenBatch.dense(images, TOKENS, PREFIX, torch.get_default_device(), kernels)


def merged(door: Kernels, lengths: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[TokenBatch, Tensor]:
    """Images of which so many tokens are left; with sizes and, as the CPU likes it, fillers."""
    batch = dense(len(lengths), door)
    keep_BM = torch.arange(TOKENS) < torch.tensor(lengths)[:, None]
    dst_BM = torch.randint(PREFIX, min(lengths), keep_BM.shape)
    return reduce_tokens(batch, torch.randn(len(lengths) * TOKENS, WIDTH).to(dtype), Decision(keep_BM, dst_BM))


def valid(lengths: tuple[int, ...]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def index_of(layout: Layout) -> Tensor:
    return torch.as_tensor(layout.index_BM, device=torch.get_default_device())


def metric_of(layout: Layout) -> Tensor:
    """Unit vectors (T, K); what is in fillers doesn't matter."""
    metric_TK = torch.nn.functional.normalize(torch.randn(layout.num_rows, K), dim=-1)
    metric_TK[torch.as_tensor(layout.fillers, device=metric_TK.device)] = torch.nan
    return metric_TK


@every_batch
@every_dtype
@pytest.mark.parametrize("query", ["class", "mean", None])
@pytest.mark.parametrize("sized", [True, False])
def test_what_attention_says_is_the_same(
    door: Kernels, query: Row | None, sized: bool, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    batch = merged(door, lengths)[0] if sized else dense(len(lengths), door)
    q, k, v = (torch.randn(1, batch.layout.num_rows, H, K).to(dtype).transpose(1, 2) for _ in range(3))

    def find(batch: TokenBatch) -> TokenStats:
        attention = PackedAttention(batch, StatsRequest(query, metric=True))
        attention.attend(q, k, v, None, 0.3, 0.0)
        return attention.stats

    ours, expected = find(batch), find(replace(batch, kernels=None))
    scores_BM, metric_TK = ours.attention_BM, ours.metric_TK
    expected_BM, expected_TK = expected.attention_BM, expected.metric_TK
    assert metric_TK is not None
    assert expected_TK is not None
    rows_X = batch.index_BM[batch.valid_BM]
    assert_close(metric_TK[rows_X], expected_TK[rows_X], **FLOAT32)
    if query is None:
        assert scores_BM is None
    else:
        assert scores_BM is not None
        assert expected_BM is not None
        # operators have the lengths of context vectors rounded to half precision
        tolerance = FLOAT32 if dtype == torch.float32 else BFLOAT16
        assert_close(scores_BM[batch.valid_BM], expected_BM[batch.valid_BM], **tolerance)


@every_batch
@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize("exponent", [0.0, 0.5])
@pytest.mark.parametrize("differ", [False, True], ids=["of one size", "of many sizes"])
def test_density_peaks_are_the_same(
    door: Kernels, differ: bool, exponent: float, alignment: int, lengths: tuple[int, ...]
) -> None:
    layout = Layout(lengths, alignment)
    metric_TK, scores_BM = metric_of(layout), torch.rand(len(lengths), max(lengths))
    scores_BM[0, PREFIX + 1 : PREFIX + 4] = torch.tensor([0.0, 0.5, 0.5])
    scores_BM[~valid(lengths)] = 0.0
    num_patches = torch.randint(50, 100, (len(lengths), 1)) if differ else 64
    ours = door.density_peaks(metric_TK, scores_BM, num_patches, exponent, PREFIX, layout)
    patches_BN = scores_BM[:, PREFIX:]
    expected = density_peaks(metric_TK, index_of(layout)[:, PREFIX:], patches_BN)
    expected = expected * importance_weights(patches_BN, num_patches, exponent)
    own_BN = valid(lengths)[:, PREFIX:]
    assert_close(ours[:, PREFIX:][own_BN], expected[own_BN], **FLOAT32)
    assert (ours[:, :PREFIX] == torch.inf).all()
    assert (ours[~valid(lengths)] == -torch.inf).all()


def test_density_peaks_of_several_tiles_are_the_same(door: Kernels) -> None:
    lengths = (TILE + 50, 2 * TILE + 9)
    layout = Layout(lengths, 4)
    metric_TK, scores_BM = metric_of(layout), torch.rand(2, max(lengths)) * valid(lengths)
    ours = door.density_peaks(metric_TK, scores_BM, TOKENS, 0.0, PREFIX, layout)[:, PREFIX:]
    expected = density_peaks(metric_TK, index_of(layout)[:, PREFIX:], scores_BM[:, PREFIX:])
    own_BN = valid(lengths)[:, PREFIX:]
    assert_close(ours[own_BN], expected[own_BN], **FLOAT32)


@every_batch
@pytest.mark.parametrize("alignment", [1, 4])
def test_the_most_similar_patch_is_the_same(door: Kernels, alignment: int, lengths: tuple[int, ...]) -> None:
    layout, valid_BM = Layout(lengths, alignment), valid(lengths)
    metric_TK = metric_of(layout)
    patches_BM = valid_BM & (torch.arange(max(lengths)) >= PREFIX)
    scores_BM = torch.rand(valid_BM.shape)
    keep_BM, _, ours = door.select(scores_BM, torch.tensor(0.5), PREFIX + 1, metric_TK, PREFIX, layout)
    leave_BM = patches_BM & ~keep_BM
    expected = most_similar(metric_TK[index_of(layout)], leave_BM, patches_BM & keep_BM)
    assert leave_BM.any()
    assert ours is not None
    assert torch.equal(ours[leave_BM], expected[leave_BM])


@every_batch
@pytest.mark.parametrize("at_least", [PREFIX + 1, PREFIX + 6, TOKENS])
@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.9, 2.0])
def test_the_same_patches_stay(door: Kernels, lengths: tuple[int, ...], threshold: float, at_least: int) -> None:
    valid_BM = valid(lengths)
    scores_BM = (torch.rand(valid_BM.shape) * 10).round() / 10  # many are equal
    keep_BM, kept_B, _ = door.select(scores_BM, torch.tensor(threshold), at_least, None, PREFIX, Layout(lengths))
    scores_BM[:, :PREFIX] = torch.inf
    scores_BM = scores_BM.masked_fill(~valid_BM, -torch.inf)
    expected_BM = above_threshold(scores_BM, torch.tensor(threshold), at_least)
    assert torch.equal(keep_BM, expected_BM)
    assert torch.equal(kept_B, expected_BM.sum(1))


@every_batch
def test_what_is_no_number_stays(door: Kernels, lengths: tuple[int, ...]) -> None:
    scores_BM = torch.zeros(len(lengths), max(lengths))
    scores_BM[0, PREFIX + 1] = torch.nan
    keep_BM, kept_B, _ = door.select(scores_BM, torch.tensor(0.5), PREFIX, None, PREFIX, Layout(lengths))
    assert keep_BM[0].nonzero().flatten().tolist() == [*range(PREFIX), PREFIX + 1]
    assert kept_B.tolist() == [PREFIX + 1, *[PREFIX] * (len(lengths) - 1)]


@every_batch
@every_dtype
# where tokens have sizes, those that leave are merged
@pytest.mark.parametrize(("merges", "sized"), [(True, True), (True, False), (False, False)])
def test_reducing_is_the_same(
    door: Kernels, merges: bool, sized: bool, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    if sized:
        batch, x_TD = merged(door, lengths, dtype)
    else:
        batch = dense(len(lengths), door)
        x_TD = torch.randn(len(lengths) * TOKENS, WIDTH).to(dtype)
    keep_BM = batch.valid_BM & (torch.rand(batch.valid_BM.shape) > 0.5)
    keep_BM[:, : PREFIX + 1], keep_BM[0, PREFIX + 1] = True, False
    dst_BM = torch.where(torch.rand(keep_BM.shape) > 0.5, PREFIX, keep_BM.long().argmax(1, keepdim=True))
    decision = Decision(keep_BM, dst_BM if merges else None)
    ours, y_TD = reduce_tokens(batch, x_TD, decision)
    expected, expected_TD = reduce_tokens(replace(batch, kernels=None), x_TD, decision)
    assert ours.lengths == expected.lengths
    assert ours.covers_all == expected.covers_all
    assert torch.equal(ours.patch_token_BN, expected.patch_token_BN)
    # rows may lie in another order, with other fillers
    own_X, expected_X = ours.index_BM[ours.valid_BM], expected.index_BM[expected.valid_BM]
    assert torch.equal(ours.positions_T[own_X], expected.positions_T[expected_X])
    assert (ours.sizes_T is None) == (expected.sizes_T is None)
    if ours.sizes_T is not None and expected.sizes_T is not None:
        assert_close(ours.sizes_T[own_X], expected.sizes_T[expected_X], **EXACT)
    assert_close(y_TD[own_X], expected_TD[expected_X], **(FLOAT32 if dtype == torch.float32 else BFLOAT16))


def test_a_merged_token_is_rounded_once_to_the_nearest_even(door: Kernels) -> None:
    x_TD = torch.randn(3, 4096).bfloat16()
    batch = TokenBatch.dense(1, 3, 1, torch.get_default_device(), door)
    decision = Decision(torch.tensor([[True, True, False]]), torch.tensor([[0, 0, 1]]))
    _, y_TD = reduce_tokens(batch, x_TD, decision)
    assert torch.equal(y_TD[1], ((x_TD[1].float() + x_TD[2].float()) / 2).bfloat16())


@pytest.mark.parametrize("spoiled", ["scores", "metric", "both"])
def test_an_image_that_is_no_number_loses_nothing_to_redundancy(door: Kernels, spoiled: str) -> None:
    lengths, layout = SEVERAL, Layout(SEVERAL)
    metric_TK, scores_BM = metric_of(layout), torch.rand(len(lengths), max(lengths))
    expected = door.density_peaks(metric_TK, scores_BM, TOKENS, 0.5, PREFIX, layout)
    if spoiled != "scores":
        metric_TK[index_of(layout)[1]] = torch.nan
    if spoiled != "metric":
        scores_BM[1] = torch.nan
    ours = door.density_peaks(metric_TK, scores_BM, TOKENS, 0.5, PREFIX, layout)
    others = [0, 2, 3]
    assert torch.equal(ours[others], expected[others])
    # against any threshold
    assert not (ours[1, : lengths[1]] <= 1e30).any()
    keep_BM, _, _ = door.select(ours, torch.tensor(1e30), PREFIX, metric_TK, PREFIX, layout)
    assert torch.equal(keep_BM[1], valid(lengths)[1])


def test_what_is_no_number_is_merged_into_is_a_token_of_its_image(door: Kernels) -> None:
    layout, scores_BM = Layout(SEVERAL), torch.rand(valid(SEVERAL).shape)
    known = scores_BM, torch.tensor(0.5), PREFIX + 1, metric_of(layout) * torch.nan, PREFIX, layout
    keep_BM, _, dst_BM = door.select(*known)
    leave_BM = valid(SEVERAL) & ~keep_BM
    assert leave_BM.any()
    assert dst_BM is not None
    assert keep_BM.gather(1, dst_BM.where(leave_BM, 0))[leave_BM].all()


def test_states_that_are_no_numbers_stay_in_their_image(door: Kernels) -> None:
    lengths = SEVERAL
    batch, x_TD = merged(door, lengths, torch.bfloat16)
    rows = slice(batch.layout.starts[1], batch.layout.starts[1] + lengths[1])
    x_TD[rows] = torch.nan
    keep_BM = batch.valid_BM.clone()
    keep_BM[:, -1:], keep_BM[:, PREFIX + 1] = False, False
    after, y_TD = reduce_tokens(batch, x_TD, Decision(keep_BM, torch.full(keep_BM.shape, PREFIX)))
    images_T = after.layout.images(x_TD.device)
    assert y_TD[images_T == 1].isnan().all()
    assert y_TD[images_T != 1].isfinite().all()


def test_an_image_may_keep_everything_while_others_keep_one_patch(door: Kernels) -> None:
    batch, x_TD = dense(3, door), torch.randn(3 * TOKENS, WIDTH)
    scores_BM = torch.zeros(3, TOKENS)
    scores_BM[1] = 1.0
    metric_TK = metric_of(batch.layout)
    keep_BM, kept_B, dst_BM = door.select(scores_BM, torch.tensor(0.5), PREFIX + 1, metric_TK, PREFIX, batch.layout)
    assert kept_B.tolist() == [PREFIX + 1, TOKENS, PREFIX + 1]
    after, y_TD = reduce_tokens(batch, x_TD, Decision(keep_BM, dst_BM, kept_B=kept_B))
    assert after.sizes_T is not None
    rows = after.layout.starts
    assert torch.equal(y_TD[rows[1] : rows[1] + TOKENS], x_TD[TOKENS : 2 * TOKENS])
    assert after.sizes_T[rows[0] + PREFIX] == TOKENS - PREFIX
    assert_close(y_TD[rows[0] + PREFIX], x_TD[PREFIX:TOKENS].mean(0), **FLOAT32)
