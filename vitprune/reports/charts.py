"""Lines over numbers, worked out in parts of a frame; templates draw them, and any screen stretches them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

TICKS = 5
LEVEL = 2  # points of a line whose ends say it all


class Point(NamedTuple):
    """In percent of the frame, from its lower left."""

    x: float
    y: float
    title: str


class Tick(NamedTuple):
    """A place on an axis, in percent of it."""

    at: float
    label: str


class Axis(NamedTuple):
    """How numbers along it are written. least: what two of them differ by, at least, to be told apart in writing.

    lowest, most: no number beyond them makes sense.
    """

    text: Callable[[float], str]
    least: float = 0.0
    lowest: float = -math.inf
    most: float = math.inf

    def ticks(self, low: float, high: float) -> list[float]:
        bottom, top = min(low, self.lowest), max(high, self.most)
        return [tick for tick in nice(low, high, self.least) if bottom <= tick <= top]


@dataclass(frozen=True)
class Line:
    """A named line through points (x, y). dashed: what it is compared with, without dots."""

    name: str
    values: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Drawn:
    """A line in its frame."""

    name: str
    points: tuple[Point, ...]
    dashed: bool


@dataclass(frozen=True)
class Plot:
    """Lines in one frame, with what is written beside it. described: for those who don't see it."""

    lines: tuple[Drawn, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_label: str
    described: str

    @classmethod
    def of(cls, lines: Sequence[Line], x_label: str, x_axis: Axis, y_axis: Axis) -> Plot:
        """Fit a frame around all lines, at least one of which has a point. Points that are no numbers are left out."""
        whole = [[(x, y) for x, y in line.values if math.isfinite(x) and math.isfinite(y)] for line in lines]
        xs, ys = ([value[axis] for values in whole for value in values] for axis in (0, 1))
        x_ticks, y_ticks = x_axis.ticks(min(xs), max(xs)), y_axis.ticks(min(ys), max(ys))
        left, right = min(*xs, x_ticks[0]), max(*xs, x_ticks[-1])
        low, high = min(*ys, y_ticks[0]), max(*ys, y_ticks[-1])

        def x_at(x: float) -> float:
            return round(100 * (x - left) / (right - left), 2)

        def y_at(y: float) -> float:
            return round(100 * (y - low) / (high - low), 2)

        drawn = tuple(
            Drawn(
                line.name,
                tuple(Point(x_at(x), y_at(y), f"{x_axis.text(x)}: {y_axis.text(y)}") for x, y in sorted(values)),
                line.dashed,
            )
            for line, values in zip(lines, whole, strict=True)
        )
        described = "; ".join(
            f"{line.name}: {', '.join(point.title for point in line.points)}"
            for line in drawn
            if not line.dashed or len(line.points) <= LEVEL
        )
        return cls(
            drawn,
            tuple(Tick(x_at(x), x_axis.text(x)) for x in x_ticks),
            tuple(Tick(y_at(y), y_axis.text(y)) for y in y_ticks),
            x_label,
            described,
        )


ONE_NUMBER = 1e-9  # relative difference up to which two values are drawn as one


def nice(low: float, high: float, least: float = 0.0) -> list[float]:
    """Round numbers around a range, a few, at even distances; around one number where the range is hardly more.

    least: distance, a round number.
    """
    if high - low <= ONE_NUMBER * max(abs(low), abs(high)):
        spread = abs(low) / 10 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / (TICKS - 1)
    size = 10.0 ** math.floor(math.log10(rough))
    step = max(least, next(part * size for part in (1, 2, 2.5, 5, 10) if part * size >= rough * 0.999))
    if least and step / least % 1:  # 2.5
        step *= 2
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    digits = 3 - math.floor(math.log10(step))  # steps have two of them
    return [round(number * step, digits) for number in range(first, last + 1)]
