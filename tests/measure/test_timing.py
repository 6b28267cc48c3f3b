"""The stopwatch: whose turn it is and on which batch; how long something takes decides no test."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vitprune.measure.timing import PlacedBatches, Runner, placed, time_in_turn, whole_batches


class Calls:
    """Records who was called with what."""

    def __init__(self) -> None:
        self.made: list[tuple[str, int]] = []

    def runner(self, name: str, batches: int) -> Runner:
        def call(x: Tensor) -> None:
            self.made.append((name, int(x)))

        return Runner(call, [torch.tensor(index) for index in range(batches)])


def test_turns() -> None:
    calls = Calls()
    runners = {name: calls.runner(name, 2) for name in "abc"}
    timings, measured = time_in_turn(runners, 4, warm_up=1, shortest=0)
    assert calls.made[:3] == [("a", 0), ("b", 0), ("c", 0)]
    counted = calls.made[3:]
    # first and behind each of the others in turn; all have the same batch in one repeat, and the next one in the next
    assert [name for name, _ in counted] == list("abccbabcaacb")
    assert [batch for _, batch in counted] == [0] * 3 + [1] * 3 + [0] * 3 + [1] * 3
    assert list(timings) == list("abc")
    assert measured == 2
    for timing in timings.values():
        assert 0 < timing.fastest <= timing.median <= timing.slowest


def test_warm_up_goes_over_the_batches() -> None:
    calls = Calls()
    _, measured = time_in_turn({"a": calls.runner("a", 3)}, 1, warm_up=3, shortest=0)
    assert calls.made == [("a", 0), ("a", 1), ("a", 2), ("a", 0)]
    assert measured == 1


def test_short_calls_are_repeated_within_one_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    calls = Calls()
    timings, measured = time_in_turn({"a": calls.runner("a", 2)}, 2, warm_up=1, shortest=3)
    # one tick warm: three calls make a measurement
    assert calls.made[1:] == [("a", 0), ("a", 1), ("a", 0), ("a", 1), ("a", 0), ("a", 1)]
    assert timings["a"].median == pytest.approx(1 / 3)
    assert measured == 2


def test_median_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0, 1, 10, 15, 20, 21, 30, 33])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    timings, _ = time_in_turn({"a": Calls().runner("a", 1)}, 3, warm_up=1, shortest=0)
    assert (timings["a"].fastest, timings["a"].median, timings["a"].slowest) == (1, 3, 5)


def test_whole_batches() -> None:
    x = torch.arange(5)
    assert [batch.tolist() for batch in whole_batches(x, 2)] == [[0, 1], [2, 3]]
    assert [batch.tolist() for batch in whole_batches(x, 7)] == [[0, 1, 2, 3, 4, 0, 1]]


def test_placed() -> None:
    model = nn.Linear(2, 2).bfloat16()
    x = torch.ones(4, 2)
    assert placed(x, model).dtype == torch.bfloat16
    batches = PlacedBatches(whole_batches(x, 2), model)
    assert len(batches) == 2
    assert [batch.dtype for batch in batches] == [torch.bfloat16] * 2
