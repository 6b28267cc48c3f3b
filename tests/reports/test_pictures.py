"""Pictures of made-up benchmarks: PNG files of the right size that show the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_up import benchmark, case
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vitprune.reports.bench_results import Case
from vitprune.reports.pictures import save_plots

CASES = (
    case(1, 0.9),
    case(1, 1.0, target=0.5, ratio=0.5),
    case(4, 1.2),
    case(4, 1.5, target=0.5, ratio=0.5),
)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """All panels that are drawn from now on."""
    panels: list[Axes] = []
    add = Figure.add_subplot

    def record(self: Figure, *args: Any, **kwargs: Any) -> Axes:
        panels.append(add(self, *args, **kwargs))
        return panels[-1]

    monkeypatch.setattr(Figure, "add_subplot", record)
    return panels


ROUNDED = 1  # pixel: versions of matplotlib cut or round a figure's size


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): list(zip(line.get_xdata(), line.get_ydata(), strict=True))  # pyright: ignore
        for line in axes.get_lines()
        if not str(line.get_label()).startswith("_")
    }


@pytest.mark.parametrize(("dtypes", "size"), [(1, (560, 420)), (2, (1120, 420)), (4, (1680, 840))])
def test_files(tmp_path: Path, dtypes: int, size: tuple[int, int]) -> None:
    cases = [case(4, 1.2, dtype=f"float{number}") for number in range(dtypes)]
    paths = save_plots(benchmark(*cases), tmp_path)
    assert [path.name for path in paths] == ["speedup.png", "efficiency.png"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    for path in paths:
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert picture.size == pytest.approx(size, abs=ROUNDED)
            colours = picture.convert("RGB").getcolors(2**20)
            assert colours is not None
            assert len(colours) > 10  # more than an empty frame


def test_speedup(tmp_path: Path, drawn: list[Axes]) -> None:
    save_plots(benchmark(*CASES), tmp_path)
    shown = lines(drawn[0])
    ideal = shown.pop("what the MACs allow")
    assert ideal[0] == pytest.approx((50, 2))
    assert ideal[-1] == pytest.approx((100, 1))
    assert all(allowed == pytest.approx(100 / part) for part, allowed in ideal)
    assert list(shown) == ["batch size 1", "batch size 4"]
    assert shown["batch size 4"] == [pytest.approx((50, 1.5)), pytest.approx((65, 1.2))]


def test_efficiency(tmp_path: Path, drawn: list[Axes]) -> None:
    own: Case = case(4, 1.0, target=None)
    save_plots(benchmark(*CASES, own), tmp_path)
    shown = lines(drawn[1])
    assert list(shown) == ["65 % of the MACs", "50 % of the MACs", "its own thresholds"]
    assert shown["50 % of the MACs"] == [pytest.approx((1, 0.5)), pytest.approx((4, 0.75))]


def test_nothing_to_draw(tmp_path: Path) -> None:
    save_plots(benchmark(*CASES), tmp_path)
    assert save_plots(benchmark(), tmp_path) == []
    assert not any(tmp_path.iterdir()), "those of an earlier benchmark"
