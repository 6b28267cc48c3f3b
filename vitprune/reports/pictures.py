"""Two pictures of a benchmark: speed-up over MACs, and efficiency over batch size; a panel for each setting.

Knows matplotlib, which is an optional part of the installation and imported only here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vitprune.reports.bench_results import Benchmark, Case, Setting
from vitprune.runtime.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL = (5.6, 4.2)  # inches
DPI = 100
COLUMNS = 3  # panels side by side
MISSING = "no pictures: matplotlib isn't installed; pip install 'vitprune[plots]' brings it"


def save_plots(benchmark: Benchmark, folder: Path) -> list[Path]:
    """Write speedup.png and efficiency.png; none where nothing was measured. ImportError without matplotlib.

    Those of an earlier benchmark go.
    """
    drawn = (("speedup.png", _draw_speedup), ("efficiency.png", _draw_efficiency))
    for name, _ in drawn:
        (folder / name).unlink(missing_ok=True)
    if not benchmark.cases:
        return []
    panels: dict[Setting, list[Case]] = {}
    for case in benchmark.cases:
        panels.setdefault(case.setting, []).append(case)
    return [_save(panels, draw, folder / name) for name, draw in drawn]


def _save(panels: dict[Setting, list[Case]], draw: Callable[[Axes, list[Case]], None], path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for number, (setting, cases) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.set_title(f"{setting.image_size} px, {setting.dtype}, {setting.mode}")
        draw(axes, sorted(cases, key=lambda case: (case.batch_size, case.macs_ratio)))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    write_whole(path, lambda unfinished: figure.savefig(unfinished, format="png"))
    return path


def _draw_speedup(axes: Axes, cases: list[Case]) -> None:
    """A line for each batch size, and what the MACs allow."""
    lowest = min(case.macs_ratio for case in cases)
    ratios = [lowest + (1 - lowest) * step / 50 for step in range(51)]
    axes.plot([100 * ratio for ratio in ratios], [1 / ratio for ratio in ratios], "k--", label="what the MACs allow")
    axes.axhline(1, color="grey", linewidth=0.8)
    for batch_size in sorted({case.batch_size for case in cases}):
        line = [case for case in cases if case.batch_size == batch_size]
        x, y = [100 * case.macs_ratio for case in line], [case.speedup for case in line]
        axes.plot(x, y, "o-", label=f"batch size {batch_size}")
    axes.set_xlabel("MACs, % of dense")
    axes.set_ylabel("speed-up over dense")


def _draw_efficiency(axes: Axes, cases: list[Case]) -> None:
    """A line for each target."""
    axes.axhline(1, color="k", linestyle="--", linewidth=0.8)
    for target in sorted({case.target for case in cases}, key=lambda part: -(part or 0)):
        line = [case for case in cases if case.target == target]
        label = "its own thresholds" if target is None else f"{100 * target:g} % of the MACs"
        axes.plot([case.batch_size for case in line], [case.efficiency for case in line], "o-", label=label)
    sizes = sorted({case.batch_size for case in cases})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch size")
    axes.set_ylabel("efficiency: speed-up ÷ what the MACs allow")
