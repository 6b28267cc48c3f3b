"""Bytes of working memory: exact for what is known to be allocated."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from vitprune.measure import memory
from vitprune.measure.memory import free_memory, is_out_of_memory, peak_memory

CPU = torch.device("cpu")


def test_peak_of_a_known_allocation() -> None:
    def call() -> None:
        a = torch.empty(1000, 1000)
        b = torch.empty(500, 1000)
        del a
        c = torch.empty(250, 1000)
        del b, c

    assert [peak_memory(call, CPU) for _ in range(3)] == [6_000_000] * 3


def test_what_is_there_already_does_not_count() -> None:
    weights = torch.ones(1000)
    gc.collect()
    assert peak_memory(lambda: weights.abs_(), CPU) == 0
    assert peak_memory(lambda: weights.abs(), CPU) == 4000


def test_backward_counts() -> None:
    weights = torch.ones(1000, requires_grad=True)

    def step() -> None:
        weights.square().sum().backward()
        weights.grad = None

    assert peak_memory(step, CPU) >= 4000
    assert peak_memory(step, CPU) == peak_memory(step, CPU)


def test_nothing_is_said_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    peak_memory(lambda: torch.empty(10), CPU)
    assert capfd.readouterr().err == ""


def test_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_memory(CPU) > 0
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    without = free_memory(CPU)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert free_memory(CPU) == 3000
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 1000\nactive_file 300\nslab_reclaimable 40\n")
    assert free_memory(CPU) == 4040
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) == pytest.approx(without, rel=0.5)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (MemoryError(), True),
        (RuntimeError("shapes don't fit"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_is_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_real_allocation_that_fails_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
