"""Shows a benchmark: tables for the terminal, and in words what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from vitprune.reports.bench_results import Benchmark, Case, Failure, Setting, TrainingStep, Verdict
from vitprune.reports.pictures import MISSING, save_plots
from vitprune.reports.results import Timing
from vitprune.reports.text import Cells, rich_table

HEADLINE = 0.65  # of several targets the one that a sentence is said about
MIB = 2**20


def print_benchmark(benchmark: Benchmark, console: Console) -> None:
    """A table for each setting, where pruning pays, steps of fine-tuning, what failed, and what it all comes to."""
    console.print(f"Timed on {escape(benchmark.images)}; medians of {benchmark.repeats}, ± half of their spread.")
    for title, cells in _tables(benchmark):
        console.print(rich_table(title, cells))
    for failure in benchmark.failures:
        console.print(f"- Not measured: {escape(_failed(failure))}", highlight=False)
    for sentence in (*headlines(benchmark), *benchmark.notes):
        console.print(f"- {escape(sentence)}", highlight=False)


def print_files(benchmark: Benchmark, folder: Path, console: Console) -> None:
    """Draw the pictures and say where everything is, or why there are none."""
    try:
        pictures = [path.name for path in save_plots(benchmark, folder)]
    except ImportError:
        console.print(MISSING, markup=False, highlight=False)
        pictures = []
    console.print(f"In {folder}: {', '.join(['bench.json', *pictures])}", markup=False, highlight=False)


def headlines(benchmark: Benchmark) -> list[str]:
    """One sentence for each setting: about the target nearest to 65 % of the MACs."""
    groups: dict[Setting, list[Verdict]] = {}
    for verdict in benchmark.verdicts:
        groups.setdefault(verdict.setting, []).append(verdict)
    return [min(group, key=lambda v: abs(v.macs_ratio - HEADLINE)).sentence for group in groups.values()]


def _tables(benchmark: Benchmark) -> list[tuple[str, Cells]]:
    settings = dict.fromkeys(case.setting for case in benchmark.cases)
    tables = [
        (_named(setting), _case_cells([c for c in benchmark.cases if c.setting == setting])) for setting in settings
    ]
    if benchmark.cases:
        tables.append(("Pays from this batch size on", _break_even_cells(benchmark.verdicts)))
    return tables + _training_tables(benchmark.training)


def _case_cells(cases: Sequence[Case]) -> Cells:
    cells: Cells = [("batch", "MACs", "ms", "speed-up", "allowed", "efficiency", "MiB")]
    for batch_size in sorted({case.batch_size for case in cases}):
        rows = [case for case in cases if case.batch_size == batch_size]
        first = rows[0]
        cells.append((str(batch_size), "dense", _ms(first.dense), "", "", "", _mib(first.dense_peak_memory)))
        if first.attached is not None:
            speedup, memory = f"{first.attached_speedup:.2f}x", _mib(first.attached_peak_memory)
            cells.append(("", "attached", _ms(first.attached), speedup, "", "", memory))
        for row in rows:
            macs = _macs(row.macs_ratio, row.target)
            cells.append(("", macs, _ms(row.pruned), *_gains(row), _mib(row.pruned_peak_memory)))
    return cells


def _break_even_cells(verdicts: Sequence[Verdict]) -> Cells:
    targets = list(dict.fromkeys(verdict.target for verdict in verdicts))
    cells: Cells = [("", *("own thresholds" if target is None else f"{100 * target:g} %" for target in targets))]
    for setting in dict.fromkeys(verdict.setting for verdict in verdicts):
        found = {verdict.target: verdict.break_even for verdict in verdicts if verdict.setting == setting}
        shown = (("never" if found[t] is None else str(found[t])) if t in found else "" for t in targets)
        cells.append((_named(setting), *shown))
    return cells


def _training_tables(steps: Sequence[TrainingStep]) -> list[tuple[str, Cells]]:
    groups: dict[tuple[Setting, int], list[TrainingStep]] = {}
    for step in steps:
        groups.setdefault((step.setting, step.batch_size), []).append(step)
    return [
        (f"A step of fine-tuning, {setting.image_size} px, {setting.dtype}, batch size {size}", _training_cells(group))
        for (setting, size), group in groups.items()
    ]


def _training_cells(steps: Sequence[TrainingStep]) -> Cells:
    first = steps[0]
    cells: Cells = [("student", "MACs", "ms", "speed-up", "allowed", "efficiency", "MiB")]
    cells.append(("dense", "", _ms(first.dense), "", "", "", _mib(first.dense_peak_memory)))
    for step in steps:
        macs, memory = _macs(step.macs_ratio, step.target), _mib(step.pruned_peak_memory)
        cells.append((step.execution, macs, _ms(step.pruned), *_gains(step), memory))
    return cells


def _failed(failure: Failure) -> str:
    size = "" if failure.batch_size is None else f" at batch size {failure.batch_size}"
    return f"{_named(failure)}, {failure.what}{size}: {failure.reason}"


def _named(setting: Setting) -> str:
    return f"{setting.image_size} px, {setting.dtype}, {setting.mode}"


def _macs(ratio: float, target: float | None) -> str:
    return f"{100 * ratio:.1f} %{' own' if target is None else ''}"


def _ms(timing: Timing) -> str:
    """The median, and half of what lies between fastest and slowest."""
    return f"{1e3 * timing.median:.1f} ± {500 * (timing.slowest - timing.fastest):.1f}"


def _gains(row: Case | TrainingStep) -> tuple[str, str, str]:
    return f"{row.speedup:.2f}x", f"{row.ideal_speedup:.2f}x", f"{100 * row.efficiency:.0f} %"


def _mib(peak: int | None) -> str:
    return "" if peak is None else f"{peak / MIB:.1f}"
