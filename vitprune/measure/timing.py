"""The stopwatch: calls timed in turn on the same batches, warmed up, medians with their spread.

Tensor suffixes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitprune.reports.results import Timing

WARM_UP = 2  # calls of each before any that counts
SHORTEST = 0.1  # seconds: what takes less is repeated within one measurement


class Runner(NamedTuple):
    """What is timed: a call and the batches it gets, which lie where it computes (`PlacedBatches`)."""

    call: Callable[[Tensor], object]
    batches: Sequence[Tensor]


def time_in_turn(
    runners: Mapping[str, Runner], repeats: int, *, warm_up: int = WARM_UP, shortest: float | None = None
) -> tuple[dict[str, Timing], int]:
    """Time calls in turn: seconds of one call for each name, and on how many of the batches, from the first on.

    The calls take turns, and so does who goes first and whom one comes behind, so that a machine that slows down or
    speeds up, and what a call leaves behind in memory and caches, treats all alike. Each repeat goes on to the next
    batch; what takes less than `shortest` seconds (`SHORTEST`) is repeated within one, on one batch after the other.
    All have as many batches, of the same images. warm_up: calls of each before any that counts, on one batch after the
    other.
    """
    names = list(runners)
    warm = min(_seconds(runners[name], turn, 1) for name in names for turn in range(max(1, warm_up)))
    times = max(1, math.ceil((SHORTEST if shortest is None else shortest) / warm))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        first = repeat // 2 % len(names)
        order = [*names[first:], *names[:first]]
        for name in reversed(order) if repeat % 2 else order:
            seconds[name].append(_seconds(runners[name], repeat * times, times))
    measured = min(len(runners[names[0]].batches), repeats * times)
    return {name: _timing(values) for name, values in seconds.items()}, measured


def _seconds(runner: Runner, first: int, times: int) -> float:
    """Wall-clock seconds of one call, averaged over so many on one batch after the other."""
    call, batches = runner
    chosen = [batches[(first + index) % len(batches)] for index in range(min(times, len(batches)))]
    wait_for(chosen[0].device)
    start = time.perf_counter()
    for index in range(times):
        call(chosen[index % len(chosen)])
    wait_for(chosen[0].device)
    return (time.perf_counter() - start) / times


def _timing(seconds: Sequence[float]) -> Timing:
    return Timing(median=statistics.median(seconds), fastest=min(seconds), slowest=max(seconds))


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def placed(x_BCHW: Tensor, model: nn.Module) -> Tensor:
    """The pixels where and as the model computes; whole numbers stay whole."""
    first = next(model.parameters())
    return x_BCHW.to(device=first.device, dtype=first.dtype if x_BCHW.is_floating_point() else None)


def whole_batches(x_BCHW: Tensor, size: int) -> list[Tensor]:
    """All whole batches of a size; one with repeated images where there are too few."""
    whole = len(x_BCHW) // size
    return list(x_BCHW[: whole * size].split(size)) if whole else [x_BCHW[torch.arange(size) % len(x_BCHW)]]


class PlacedBatches(Sequence[Tensor]):
    """Batches that are brought to where a model computes when they are asked for: all at once may not fit there."""

    def __init__(self, batches: Sequence[Tensor], model: nn.Module) -> None:
        self._batches, self._model = batches, model

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] — no slices
        return placed(self._batches[index], self._model)
