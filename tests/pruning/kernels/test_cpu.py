"""Loops against the same in operators of torch, which have tests of their own against the papers' formulas."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numba
import pytest
import tiny
import torch
from tiny import Tolerance
from torch import Tensor, nn
from torch.testing import assert_close

import vitprune
from vitprune.pruning.kernels import cpu
from vitprune.pruning.layout import Layout
from vitprune.pruning.packed.reduction import reduce_tokens
from vitprune.pruning.scores import key_metric
from vitprune.pruning.selection import Decision
from vitprune.pruning.token_batch import TokenBatch

EXACT = Tolerance(rtol=0.0, atol=0.0)
# sums of some dozen float32 numbers, in another order
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-6)
# a whole model
MODEL = Tolerance(rtol=1e-5, atol=1e-5)
# loops merge in float32 and round once, operators round at each step
BFLOAT16 = Tolerance(rtol=2**-6, atol=2**-7)

PREFIX, TOKENS, H, K, WIDTH = 2, 25, 3, 7, 20
SEVERAL = (9, 23, 4, 14)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True, params=[1, 2], ids=["one thread", "two threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def test_gradients_flow_through_operators() -> None:
    x_TD = torch.randn(TOKENS, WIDTH, requires_grad=True)
    batch = TokenBatch.dense(1, TOKENS, PREFIX, torch.device("cpu"))
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


def test_a_numba_that_does_not_work_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers(torch.float32)
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.3 or less. Got NumPy 2.4.')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "numba")
    cpu._loops.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match=r"numba is installed and can't be used \(ImportError: Numba needs"
        ) as said:
            ours = answers(torch.float32)
        assert not cpu.has_loops()
    finally:
        cpu._loops.cache_clear()
    assert len(said) == 1
    assert_close(ours, expected, **MODEL)


def test_a_numba_that_compiles_nothing_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    cpu._loops.cache_clear()
    try:
        assert not cpu.has_loops()
        assert answers(torch.float32).isfinite().all()
    finally:
        cpu._loops.cache_clear()


def test_other_users_of_numba_keep_their_threads() -> None:
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        answers(torch.float32)
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
