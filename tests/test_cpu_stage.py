"""Loops against the same in operators of torch, which have tests of their own against the papers' formulas."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numba
import pytest
import tiny
import torch
from tiny import Tolerance
from torch import Tensor
from torch.testing import assert_close

from vitprune import cpu_stage
from vitprune.departure import Departure, depart
from vitprune.layout import Layout
from vitprune.packed_attention import PackedAttention, Query
from vitprune.scoring import key_metric, most_similar, redundancy, redundancy_weights
from vitprune.thresholds import above_threshold
from vitprune.tokens import TokenBatch

EXACT = Tolerance(rtol=0.0, atol=0.0)
# sums of some dozen float32 numbers, in another order
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-6)
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


def merged(lengths: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[TokenBatch, Tensor]:
    """Images of which so many tokens are left; with sizes and fillers."""
    batch = TokenBatch.dense(len(lengths), TOKENS, PREFIX, torch.device("cpu"))
    keep_BM = torch.arange(TOKENS) < torch.tensor(lengths)[:, None]
    takers_BM = torch.randint(PREFIX, min(lengths), keep_BM.shape)
    return depart(batch, torch.randn(len(lengths) * TOKENS, WIDTH).to(dtype), Departure(keep_BM, takers_BM))


def valid(lengths: tuple[int, ...]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def metric_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(len(lengths), max(lengths), K), dim=-1)


@every_batch
@every_dtype
@pytest.mark.parametrize("query", ["class", "mean", None])
@pytest.mark.parametrize("sized", [True, False])
def test_what_attention_says_is_the_same(
    query: Query | None, sized: bool, lengths: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = merged(lengths)[0] if sized else TokenBatch.dense(len(lengths), TOKENS, PREFIX, torch.device("cpu"))
    q, k, v = (torch.randn(1, batch.layout.num_rows, H, K).to(dtype).transpose(1, 2) for _ in range(3))

    def find() -> tuple[Tensor | None, Tensor | None]:
        return PackedAttention(q, k, v, batch, 0.3).find(query, wants_metric=True)

    scores_BM, metric_BMK = find()
    tiny.in_operators(monkeypatch)
    expected_BM, expected_BMK = find()
    assert metric_BMK is not None
    assert expected_BMK is not None
    assert_close(metric_BMK[batch.valid_BM], expected_BMK[batch.valid_BM], **FLOAT32)
    if query is None:
        assert scores_BM is None
    else:
        assert scores_BM is not None
        assert expected_BM is not None
        # operators have the lengths of context vectors rounded to half precision
        tolerance = FLOAT32 if dtype == torch.float32 else BFLOAT16
        assert_close(scores_BM[batch.valid_BM], expected_BM[batch.valid_BM], **tolerance)


@every_batch
@pytest.mark.parametrize("exponent", [0.0, 0.5])
def test_redundancy_is_the_same(lengths: tuple[int, ...], exponent: float) -> None:
    metric_BMK, scores_BM = metric_of(lengths), torch.rand(len(lengths), max(lengths))
    scores_BM[0, PREFIX + 1] = 0.0
    weights_BM = redundancy_weights(scores_BM, exponent) if exponent else None
    known = metric_BMK, scores_BM if exponent else None, exponent, PREFIX
    ours = cpu_stage.redundancy(*known, Layout(lengths))
    expected = redundancy(metric_BMK, valid(lengths), PREFIX, weights_BM)
    assert_close(ours[0], expected[0], **FLOAT32)
    candidates = ours[0].isfinite()
    assert candidates.any()
    assert torch.equal(ours[1][candidates], expected[1][candidates])


@every_batch
def test_the_most_similar_patch_is_the_same(lengths: tuple[int, ...]) -> None:
    metric_BMK, valid_BM = metric_of(lengths), valid(lengths)
    patches_BM = valid_BM & (torch.arange(max(lengths)) >= PREFIX)
    scores_BM = torch.rand(valid_BM.shape)
    keep_BM, _, ours = cpu_stage.select(scores_BM, 0.5, PREFIX + 1, metric_BMK, PREFIX, Layout(lengths))
    leave_BM = patches_BM & ~keep_BM
    expected = most_similar(metric_BMK, leave_BM, patches_BM & keep_BM)
    assert leave_BM.any()
    assert ours is not None
    assert torch.equal(ours[leave_BM], expected[leave_BM])


@every_batch
@pytest.mark.parametrize("at_least", [PREFIX + 1, PREFIX + 6, TOKENS])
@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.9, 2.0])
def test_the_same_patches_stay(lengths: tuple[int, ...], threshold: float, at_least: int) -> None:
    valid_BM = valid(lengths)
    scores_BM = (torch.rand(valid_BM.shape) * 10).round() / 10  # many are equal
    keep_BM, kept, _ = cpu_stage.select(scores_BM, threshold, at_least, None, PREFIX, Layout(lengths))
    scores_BM[:, :PREFIX] = torch.inf
    scores_BM = scores_BM.masked_fill(~valid_BM, -torch.inf)
    expected_BM = above_threshold(scores_BM, torch.tensor(threshold), at_least)
    assert torch.equal(keep_BM, expected_BM)
    assert list(kept) == expected_BM.sum(1).tolist()


@every_batch
def test_what_is_no_number_stays(lengths: tuple[int, ...]) -> None:
    scores_BM = torch.zeros(len(lengths), max(lengths))
    scores_BM[0, PREFIX + 1] = torch.nan
    keep_BM, kept, _ = cpu_stage.select(scores_BM, 0.5, PREFIX, None, PREFIX, Layout(lengths))
    assert keep_BM[0].nonzero().flatten().tolist() == [*range(PREFIX), PREFIX + 1]
    assert kept == (PREFIX + 1, *[PREFIX] * (len(lengths) - 1))


@every_batch
@every_dtype
# where tokens have sizes, those that leave are merged
@pytest.mark.parametrize(("merges", "sized"), [(True, True), (True, False), (False, False)])
def test_departing_is_the_same(
    merges: bool, sized: bool, lengths: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sized:
        batch, x_TD = merged(lengths, dtype)
    else:
        batch = TokenBatch.dense(len(lengths), TOKENS, PREFIX, torch.device("cpu"))
        x_TD = torch.randn(len(lengths) * TOKENS, WIDTH).to(dtype)
    keep_BM = batch.valid_BM & (torch.rand(batch.valid_BM.shape) > 0.5)
    keep_BM[:, : PREFIX + 1], keep_BM[0, PREFIX + 1] = True, False
    takers_BM = torch.where(torch.rand(keep_BM.shape) > 0.5, PREFIX, keep_BM.long().argmax(1, keepdim=True))
    departure = Departure(keep_BM, takers_BM if merges else None)
    ours, y_TD = depart(batch, x_TD, departure)
    tiny.in_operators(monkeypatch)
    expected, expected_TD = depart(batch, x_TD, departure)
    assert ours.layout == expected.layout
    assert ours.has_carriers == expected.has_carriers
    assert torch.equal(ours.positions_T, expected.positions_T)
    assert torch.equal(ours.carriers_BN, expected.carriers_BN)
    assert (ours.sizes_T is None) == (expected.sizes_T is None)
    if ours.sizes_T is not None and expected.sizes_T is not None:
        assert_close(ours.sizes_T, expected.sizes_T, **EXACT)
    assert_close(y_TD, expected_TD, **(FLOAT32 if dtype == torch.float32 else BFLOAT16))


def test_a_merged_token_is_rounded_once_to_the_nearest_even() -> None:
    x_TD = torch.randn(3, 4096).bfloat16()
    batch = TokenBatch.dense(1, 3, 1, torch.device("cpu"))
    departure = Departure(torch.tensor([[True, True, False]]), torch.tensor([[0, 0, 1]]))
    _, y_TD = depart(batch, x_TD, departure)
    assert torch.equal(y_TD[1], ((x_TD[1].float() + x_TD[2].float()) / 2).bfloat16())


def test_an_image_that_is_no_number_stays_alone_and_loses_nothing_to_redundancy() -> None:
    lengths = SEVERAL
    metric_BMK, scores_BM = metric_of(lengths), torch.rand(len(lengths), max(lengths))
    layout = Layout(lengths)
    expected, _ = cpu_stage.redundancy(metric_BMK, scores_BM, 0.5, PREFIX, layout)
    metric_BMK[1], scores_BM[1] = torch.nan, torch.nan
    ours, anchors_BM = cpu_stage.redundancy(metric_BMK, scores_BM, 0.5, PREFIX, layout)
    others = [0, 2, 3]
    assert torch.equal(ours[others], expected[others])
    # against any threshold
    assert not (ours[1, : lengths[1]] <= 1e30).any()
    assert (anchors_BM[1] < lengths[1]).all()
    batch, x_TD = merged(lengths, torch.bfloat16)
    rows = slice(batch.layout.starts[1], batch.layout.starts[1] + lengths[1])
    x_TD[rows] = torch.nan
    keep_BM = batch.valid_BM.clone()
    keep_BM[:, -1:], keep_BM[:, PREFIX + 1] = False, False
    after, y_TD = depart(batch, x_TD, Departure(keep_BM, torch.full(keep_BM.shape, PREFIX)))
    images_T = after.layout.images(x_TD.device)
    assert y_TD[images_T == 1].isnan().all()
    assert y_TD[images_T != 1].isfinite().all()


def test_gradients_flow_through_operators() -> None:
    x_TD = torch.randn(TOKENS, WIDTH, requires_grad=True)
    batch = TokenBatch.dense(1, TOKENS, PREFIX, x_TD.device)
    keep_BM = torch.arange(TOKENS)[None] < 9
    departure = Departure(keep_BM, torch.full(keep_BM.shape, PREFIX))
    assert not cpu_stage.can_loop(x_TD)
    depart(batch, x_TD, departure)[1].sum().backward()
    assert x_TD.grad is not None
    assert (x_TD.grad[9:] != 0).all()
    with torch.no_grad():
        assert cpu_stage.can_loop(x_TD)
        depart(batch, x_TD, departure)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_loops_do_not_know_is_done_in_operators(dtype: torch.dtype) -> None:
    assert not cpu_stage.can_loop(torch.randn(3).to(dtype))
    _, y_TD = merged(SEVERAL, dtype)
    assert y_TD.dtype == dtype


def test_without_numba_everything_is_done_in_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else find_spec(name))
    cpu_stage._loops.cache_clear()
    try:
        assert not cpu_stage.can_loop(torch.randn(3))
        _, y_TD = merged(SEVERAL)
    finally:
        cpu_stage._loops.cache_clear()
    assert y_TD.isfinite().all()


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
from vitprune import cpu_stage
from vitprune.layout import Layout
for threads in (2, 1):
    torch.set_num_threads(threads)
    for images in (1, 3):
        x_THK = torch.randn(3 * 8, 2, 4)
        layout = Layout((8,) * images)
        cpu_stage.find(None, x_THK, x_THK, None, 1.0, layout, wants_metric=True)
        assert torch.get_num_threads() == threads, (torch.get_num_threads(), threads)
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "NUMBA_NUM_THREADS": "4"})


def test_several_threads_of_python_may_loop_at_once() -> None:
    layout = Layout(SEVERAL)
    inputs = [torch.randn(layout.num_rows, H, K) for _ in range(16)]

    def metric(k_THK: Tensor) -> Tensor:
        _, metric_BMK = cpu_stage.find(None, k_THK, k_THK, None, 1.0, layout, wants_metric=True)
        assert metric_BMK is not None
        return metric_BMK

    with ThreadPoolExecutor(4) as pool:
        ours = list(pool.map(metric, inputs))
    for k_THK, metric_BMK in zip(inputs, ours, strict=True):
        for image, (start, length) in enumerate(zip(layout.starts, SEVERAL, strict=True)):
            assert_close(metric_BMK[image, :length], key_metric(k_THK[start : start + length]), **FLOAT32)
