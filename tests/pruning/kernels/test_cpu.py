"""Loops against the same in operators of torch, which have tests of their own against the papers' formulas."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numba
import pytest
import tiny
import torch
from tiny import Tolerance
from torch import Tensor, nn
from torch.testing import assert_close

import vitprune
from vitprune.pruning.attention import StatsRequest
from vitprune.pruning.kernels import cpu
from vitprune.pruning.layout import Layout
from vitprune.pruning.packed_attention import PackedAttention
from vitprune.pruning.reduction import reduce_tokens
from vitprune.pruning.scores import TILE, Row, TokenStats, density_peaks, importance_weights, key_metric, most_similar
from vitprune.pruning.selection import Decision, above_threshold
from vitprune.pruning.token_batch import Kernels, TokenBatch

EXACT = Tolerance(rtol=0.0, atol=0.0)
# sums of some dozen float32 numbers, in another order
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-6)
# a whole model
MODEL = Tolerance(rtol=1e-5, atol=1e-5)
# loops merge in float32 and round once, operators round at each step
BFLOAT16 = Tolerance(rtol=2**-6, atol=2**-7)

PREFIX, TOKENS, H, K, WIDTH = 2, 25, 3, 7, 20
SEVERAL = (9, 23, 4, 14)
every_batch = pytest.mark.parametrize("lengths", [SEVERAL, (13,)], ids=["images", "an image alone"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True, params=[1, 2], ids=["one thread", "two threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def dense(images: int, kernels: Kernels | None = cpu) -> TokenBatch:
    return TokenBatch.dense(images, TOKENS, PREFIX, torch.device("cpu"), kernels)


def merged(lengths: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[TokenBatch, Tensor]:
    """Images of which so many tokens are left; with sizes and fillers."""
    batch = dense(len(lengths))
    keep_BM = torch.arange(TOKENS) < torch.tensor(lengths)[:, None]
    dst_BM = torch.randint(PREFIX, min(lengths), keep_BM.shape)
    return reduce_tokens(batch, torch.randn(len(lengths) * TOKENS, WIDTH).to(dtype), Decision(keep_BM, dst_BM))


def valid(lengths: tuple[int, ...]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def index_of(layout: Layout) -> Tensor:
    return torch.from_numpy(layout.index_BM)


def metric_of(layout: Layout) -> Tensor:
    """Unit vectors (T, K); what is in fillers doesn't matter."""
    metric_TK = torch.nn.functional.normalize(torch.randn(layout.num_rows, K), dim=-1)
    metric_TK[torch.from_numpy(layout.fillers)] = torch.nan
    return metric_TK


def peaks_in_loops(metric_TK: Tensor, scores_BM: Tensor, exponent: float, layout: Layout) -> Tensor:
    return cpu.density_peaks(metric_TK, scores_BM, TOKENS, exponent, PREFIX, layout)


@every_batch
@every_dtype
@pytest.mark.parametrize("query", ["class", "mean", None])
@pytest.mark.parametrize("sized", [True, False])
def test_what_attention_says_is_the_same(
    query: Row | None, sized: bool, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    batch = merged(lengths)[0] if sized else dense(len(lengths))
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
def test_density_peaks_are_the_same(differ: bool, exponent: float, alignment: int, lengths: tuple[int, ...]) -> None:
    layout = Layout(lengths, alignment)
    metric_TK, scores_BM = metric_of(layout), torch.rand(len(lengths), max(lengths))
    scores_BM[0, PREFIX + 1 : PREFIX + 4] = torch.tensor([0.0, 0.5, 0.5])
    scores_BM[~valid(lengths)] = 0.0
    num_patches = torch.randint(50, 100, (len(lengths), 1)) if differ else 64
    ours = cpu.density_peaks(metric_TK, scores_BM, num_patches, exponent, PREFIX, layout)
    patches_BN = scores_BM[:, PREFIX:]
    expected = density_peaks(metric_TK, index_of(layout)[:, PREFIX:], patches_BN)
    expected = expected * importance_weights(patches_BN, num_patches, exponent)
    own_BN = valid(lengths)[:, PREFIX:]
    assert_close(ours[:, PREFIX:][own_BN], expected[own_BN], **FLOAT32)
    assert (ours[:, :PREFIX] == torch.inf).all()
    assert (ours[~valid(lengths)] == -torch.inf).all()


def test_density_peaks_of_several_tiles_are_the_same() -> None:
    lengths = (TILE + 50, 2 * TILE + 9)
    layout = Layout(lengths, 4)
    metric_TK, scores_BM = metric_of(layout), torch.rand(2, max(lengths)) * valid(lengths)
    ours = peaks_in_loops(metric_TK, scores_BM, 0.0, layout)[:, PREFIX:]
    expected = density_peaks(metric_TK, index_of(layout)[:, PREFIX:], scores_BM[:, PREFIX:])
    own_BN = valid(lengths)[:, PREFIX:]
    assert_close(ours[own_BN], expected[own_BN], **FLOAT32)


@every_batch
@pytest.mark.parametrize("alignment", [1, 4])
def test_the_most_similar_patch_is_the_same(alignment: int, lengths: tuple[int, ...]) -> None:
    layout, valid_BM = Layout(lengths, alignment), valid(lengths)
    metric_TK = metric_of(layout)
    patches_BM = valid_BM & (torch.arange(max(lengths)) >= PREFIX)
    scores_BM = torch.rand(valid_BM.shape)
    keep_BM, _, ours = cpu.select(scores_BM, 0.5, PREFIX + 1, metric_TK, PREFIX, layout)
    leave_BM = patches_BM & ~keep_BM
    expected = most_similar(metric_TK[index_of(layout)], leave_BM, patches_BM & keep_BM)
    assert leave_BM.any()
    assert ours is not None
    assert torch.equal(ours[leave_BM], expected[leave_BM])


@every_batch
@pytest.mark.parametrize("at_least", [PREFIX + 1, PREFIX + 6, TOKENS])
@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.9, 2.0])
def test_the_same_patches_stay(lengths: tuple[int, ...], threshold: float, at_least: int) -> None:
    valid_BM = valid(lengths)
    scores_BM = (torch.rand(valid_BM.shape) * 10).round() / 10  # many are equal
    keep_BM, kept, _ = cpu.select(scores_BM, threshold, at_least, None, PREFIX, Layout(lengths))
    scores_BM[:, :PREFIX] = torch.inf
    scores_BM = scores_BM.masked_fill(~valid_BM, -torch.inf)
    expected_BM = above_threshold(scores_BM, torch.tensor(threshold), at_least)
    assert torch.equal(keep_BM, expected_BM)
    assert list(kept) == expected_BM.sum(1).tolist()


@every_batch
def test_what_is_no_number_stays(lengths: tuple[int, ...]) -> None:
    scores_BM = torch.zeros(len(lengths), max(lengths))
    scores_BM[0, PREFIX + 1] = torch.nan
    keep_BM, kept, _ = cpu.select(scores_BM, 0.5, PREFIX, None, PREFIX, Layout(lengths))
    assert keep_BM[0].nonzero().flatten().tolist() == [*range(PREFIX), PREFIX + 1]
    assert kept == (PREFIX + 1, *[PREFIX] * (len(lengths) - 1))


@every_batch
@every_dtype
# where tokens have sizes, those that leave are merged
@pytest.mark.parametrize(("merges", "sized"), [(True, True), (True, False), (False, False)])
def test_reducing_is_the_same(merges: bool, sized: bool, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    if sized:
        batch, x_TD = merged(lengths, dtype)
    else:
        batch = dense(len(lengths))
        x_TD = torch.randn(len(lengths) * TOKENS, WIDTH).to(dtype)
    keep_BM = batch.valid_BM & (torch.rand(batch.valid_BM.shape) > 0.5)
    keep_BM[:, : PREFIX + 1], keep_BM[0, PREFIX + 1] = True, False
    dst_BM = torch.where(torch.rand(keep_BM.shape) > 0.5, PREFIX, keep_BM.long().argmax(1, keepdim=True))
    decision = Decision(keep_BM, dst_BM if merges else None)
    ours, y_TD = reduce_tokens(batch, x_TD, decision)
    expected, expected_TD = reduce_tokens(replace(batch, kernels=None), x_TD, decision)
    assert ours.layout == expected.layout
    assert ours.covers_all == expected.covers_all
    assert torch.equal(ours.positions_T, expected.positions_T)
    assert torch.equal(ours.patch_token_BN, expected.patch_token_BN)
    assert (ours.sizes_T is None) == (expected.sizes_T is None)
    if ours.sizes_T is not None and expected.sizes_T is not None:
        assert_close(ours.sizes_T, expected.sizes_T, **EXACT)
    assert_close(y_TD, expected_TD, **(FLOAT32 if dtype == torch.float32 else BFLOAT16))


def test_a_merged_token_is_rounded_once_to_the_nearest_even() -> None:
    x_TD = torch.randn(3, 4096).bfloat16()
    batch = TokenBatch.dense(1, 3, 1, torch.device("cpu"), cpu)
    decision = Decision(torch.tensor([[True, True, False]]), torch.tensor([[0, 0, 1]]))
    _, y_TD = reduce_tokens(batch, x_TD, decision)
    assert torch.equal(y_TD[1], ((x_TD[1].float() + x_TD[2].float()) / 2).bfloat16())


@pytest.mark.parametrize("spoiled", ["scores", "metric", "both"])
def test_an_image_that_is_no_number_loses_nothing_to_redundancy(spoiled: str) -> None:
    lengths, layout = SEVERAL, Layout(SEVERAL)
    metric_TK, scores_BM = metric_of(layout), torch.rand(len(lengths), max(lengths))
    expected = peaks_in_loops(metric_TK, scores_BM, 0.5, layout)
    if spoiled != "scores":
        metric_TK[index_of(layout)[1]] = torch.nan
    if spoiled != "metric":
        scores_BM[1] = torch.nan
    ours = peaks_in_loops(metric_TK, scores_BM, 0.5, layout)
    others = [0, 2, 3]
    assert torch.equal(ours[others], expected[others])
    # against any threshold
    assert not (ours[1, : lengths[1]] <= 1e30).any()
    keep_BM, _, _ = cpu.select(ours, 1e30, PREFIX, metric_TK, PREFIX, layout)
    assert torch.equal(keep_BM[1], valid(lengths)[1])


def test_what_is_no_number_is_merged_into_is_a_token_of_its_image() -> None:
    layout, scores_BM = Layout(SEVERAL), torch.rand(valid(SEVERAL).shape)
    known = scores_BM, 0.5, PREFIX + 1, metric_of(layout) * torch.nan, PREFIX, layout
    keep_BM, _, dst_BM = cpu.select(*known)
    leave_BM = valid(SEVERAL) & ~keep_BM
    assert leave_BM.any()
    assert dst_BM is not None
    assert keep_BM.gather(1, dst_BM)[leave_BM].all()


def test_states_that_are_no_numbers_stay_in_their_image() -> None:
    lengths = SEVERAL
    batch, x_TD = merged(lengths, torch.bfloat16)
    rows = slice(batch.layout.starts[1], batch.layout.starts[1] + lengths[1])
    x_TD[rows] = torch.nan
    keep_BM = batch.valid_BM.clone()
    keep_BM[:, -1:], keep_BM[:, PREFIX + 1] = False, False
    after, y_TD = reduce_tokens(batch, x_TD, Decision(keep_BM, torch.full(keep_BM.shape, PREFIX)))
    images_T = after.layout.images(x_TD.device)
    assert y_TD[images_T == 1].isnan().all()
    assert y_TD[images_T != 1].isfinite().all()


def test_gradients_flow_through_operators() -> None:
    x_TD = torch.randn(TOKENS, WIDTH, requires_grad=True)
    batch = dense(1, None)
    keep_BM = torch.arange(TOKENS)[None] < 9
    decision = Decision(keep_BM, torch.full(keep_BM.shape, PREFIX))
    assert not cpu.fits(x_TD)
    reduce_tokens(batch, x_TD, decision)[1].sum().backward()
    assert x_TD.grad is not None
    assert (x_TD.grad[9:] != 0).all()
    with torch.no_grad():
        assert cpu.fits(x_TD)
        in_loops, in_operators = (reduce_tokens(b, x_TD, decision)[1] for b in (replace(batch, kernels=cpu), batch))
        assert_close(in_loops, in_operators, **FLOAT32)


def answers(dtype: torch.dtype) -> Tensor:
    """Of a model whose stages find scores, metric and takers."""
    model = vitprune.prune_(tiny.build("vit"), tiny.POLICIES["redundancy-merge"])
    nn.Module.to(model, dtype=dtype)
    with torch.no_grad(), vitprune.trace(model) as trace:
        logits = tiny.answer(tiny.forward(model, {"pixel_values": tiny.images(3).to(dtype)}))
    assert not trace.keep_masks[-1].all(), "the policy drops nothing: this test would see nothing"
    return logits


class LoopsWereAsked(Exception):
    pass


@pytest.fixture
def no_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops fail."""

    def fail(*_: object, **__: object) -> None:
        raise LoopsWereAsked

    for name in ("compute_stats", "density_peaks", "select", "reduce"):
        monkeypatch.setattr(cpu, name, fail)


@pytest.mark.usefixtures("no_loops")
@every_dtype
def test_a_forward_loops_where_it_can(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoopsWereAsked):
        answers(dtype)
    tiny.in_operators(monkeypatch)
    assert answers(dtype).isfinite().all()


@pytest.mark.usefixtures("no_loops")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_loops_do_not_know_is_done_in_operators(dtype: torch.dtype) -> None:
    assert not cpu.fits(torch.randn(3).to(dtype))
    logits = answers(dtype)
    assert logits.dtype == dtype
    assert logits.isfinite().all()


@pytest.mark.usefixtures("no_loops")
def test_under_autocast_stages_are_done_in_operators() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu.fits(torch.randn(3))
        assert answers(torch.float32).isfinite().all()


def test_without_numba_everything_is_done_in_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, find_spec = answers(torch.float32), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else find_spec(name))
    cpu._loops.cache_clear()
    try:
        assert not cpu.fits(torch.randn(3))
        ours = answers(torch.float32)
    finally:
        cpu._loops.cache_clear()
    assert_close(ours, expected, **MODEL)


def test_other_users_of_numba_keep_their_threads() -> None:
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        merged(SEVERAL)
        assert numba.get_num_threads() == 1
    finally:
        numba.set_num_threads(before)


def test_torch_keeps_its_threads() -> None:
    """In a process of its own, as numba starts its threads once; with more of them than torch has."""
    program = """
import torch
from vitprune.pruning.kernels import cpu
from vitprune.pruning.layout import Layout
for threads in (2, 1):
    torch.set_num_threads(threads)
    for images in (1, 3):
        x_THK = torch.randn(3 * 8, 2, 4)
        layout = Layout((8,) * images)
        cpu.compute_stats(None, x_THK, x_THK, None, 1.0, layout, wants_metric=True)
        assert torch.get_num_threads() == threads, (torch.get_num_threads(), threads)
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "NUMBA_NUM_THREADS": "4"})


def test_several_threads_of_python_may_loop_at_once() -> None:
    layout = Layout(SEVERAL)
    inputs = [torch.randn(layout.num_rows, H, K) for _ in range(16)]

    def metric(k_THK: Tensor) -> Tensor:
        _, metric_TK = cpu.compute_stats(None, k_THK, k_THK, None, 1.0, layout, wants_metric=True)
        assert metric_TK is not None
        return metric_TK

    with ThreadPoolExecutor(4) as pool:
        ours = list(pool.map(metric, inputs))
    for k_THK, metric_TK in zip(inputs, ours, strict=True):
        assert_close(metric_TK, key_metric(k_THK), **FLOAT32)
