"""Plots: round numbers, and everything inside the frame."""

from __future__ import annotations

import math

import pytest

from vitprune.reports.charts import Axis, Line, Plot, nice

TEXT = Axis(str)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 25, 50, 75, 100]),
        (0.31, 0.84, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (5, 5, [4.5, 4.75, 5.0, 5.25, 5.5]),
        (0, 0, [-1, -0.5, 0, 0.5, 1]),
        (-3e-5, 1e-5, [-3e-5, -2e-5, -1e-5, 0, 1e-5]),
        (0.8999999999999999, 0.9, [0.8, 0.85, 0.9, 0.95, 1.0]),
        (1e-14, 2e-14, [1e-14, 1.25e-14, 1.5e-14, 1.75e-14, 2e-14]),
    ],
)
def test_ticks_are_round_and_reach_around(low: float, high: float, expected: list[float]) -> None:
    assert nice(low, high) == pytest.approx(expected, abs=0.0)


@pytest.mark.parametrize(
    ("low", "high", "axis", "labels"),
    [
        (0, 1, Axis("{:.0f}".format, least=1), ["0", "1"]),
        (0, 2, Axis("{:.0f}".format, least=1), ["0", "1", "2"]),
        (0, 10, Axis("{:.0f}".format, least=1), ["0", "5", "10"]),
        (0.12311, 0.12312, Axis("{:.4f}".format, least=1e-4), ["0.1231", "0.1232"]),
        (0.98, 0.98, Axis("{:.1%}".format, least=0.001, most=1.0), ["85.0%", "90.0%", "95.0%", "100.0%"]),
        (0, 0, Axis("{:.0%}".format, least=0.001, lowest=0.0, most=1.0), ["0%", "50%", "100%"]),
        (0, 0, Axis("{:.0f}".format, least=1, lowest=0), ["0", "1"]),
    ],
)
def test_ticks_can_be_told_apart(low: float, high: float, axis: Axis, labels: list[str]) -> None:
    assert [axis.text(tick) for tick in axis.ticks(low, high)] == labels


def test_points_lie_where_they_should() -> None:
    lines = [Line("ours", [(50, 0.9), (100, 1.0), (75, math.nan)]), Line("limit", [(50, 0.8), (100, 0.8)], dashed=True)]
    plot = Plot.of(lines, "MACs", TEXT, TEXT)
    ours, limit = plot.lines
    assert [(point.x, point.y) for point in ours.points] == [(16.67, 50.0), (100.0, 100.0)]
    assert [(point.x, point.y) for point in limit.points] == [(16.67, 0.0), (100.0, 0.0)]
    assert [tick.at for tick in plot.y_ticks] == pytest.approx([0, 25, 50, 75, 100])
    assert plot.described == "ours: 50: 0.9, 100: 1.0; limit: 50: 0.8, 100: 0.8"


def test_a_single_point_has_a_frame() -> None:
    (line,) = Plot.of([Line("one", [(3, 7)])], "x", TEXT, TEXT).lines
    assert 0 < line.points[0].x < 100
    assert 0 < line.points[0].y < 100


@pytest.mark.parametrize("values", [(0.9, 0.8999999999999999), (1e-14, 2e-14)])
def test_values_that_hardly_differ_have_a_frame(values: tuple[float, float]) -> None:
    (line,) = Plot.of([Line("two", [(1, values[0]), (2, values[1])])], "x", TEXT, TEXT).lines
    assert all(0 <= point.y <= 100 for point in line.points)
