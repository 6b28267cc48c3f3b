"""A sweep over budgets, and several operating points of one checkpoint: as values (sweep.json), tables, sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime

from rich.console import Console
from rich.markup import escape

from vitprune.reports.results import Comparison, Document, Environment, PointResult, Report, Result
from vitprune.reports.text import Cells, asked_for, number, percent, rich_table


class SweepPoint(PointResult):
    """One method at one budget. folder: of its checkpoint and report, beside the sweep's files."""

    method: str
    folder: str

    @classmethod
    def of(cls, method: str, budget: float, folder: str, report: Report) -> SweepPoint:
        return cls(
            method=method, budget=budget, folder=folder, comparison=report.comparison, throughput=report.throughput
        )


class Missed(Result):
    """A point that couldn't be had, and why."""

    method: str
    budget: float
    reason: str


class Sweep(Document):
    """What a sweep found out. asked: tells its recipe from others, so that no other resumes it."""

    environment: Environment | None = None
    asked: str = ""
    points: tuple[SweepPoint, ...] = ()
    missed: tuple[Missed, ...] = ()

    def has(self, method: str, budget: float) -> bool:
        """Whether a point is done."""
        return any((one.method, one.budget) == (method, budget) for one in self.points)

    def with_(self, point: SweepPoint, *, environment: Environment, created: datetime) -> Sweep:
        """The sweep with another point."""
        news = {"points": (*self.points, point), "environment": environment, "created": created}
        return self.model_copy(update={**news, "missed": self._missed_but(point)})

    def without(self, missed: Missed) -> Sweep:
        """The sweep with a point that couldn't be had, this time."""
        return self.model_copy(update={"missed": (*self._missed_but(missed), missed)})

    def _missed_but(self, now: SweepPoint | Missed) -> tuple[Missed, ...]:
        return tuple(one for one in self.missed if (one.method, one.budget) != (now.method, now.budget))

    @property
    def methods(self) -> dict[str, list[SweepPoint]]:
        """The points of each method, by falling budget."""
        found: dict[str, list[SweepPoint]] = {}
        for point in sorted(self.points, key=lambda point: -point.budget):
            found.setdefault(point.method, []).append(point)
        return found


def print_sweep(sweep: Sweep, console: Console) -> None:
    """A table, then in words."""
    console.print(rich_table("Sweep, with speed-ups at batch sizes", sweep_cells(sweep)))
    for sentence in sweep_findings(sweep):
        console.print(f"- {escape(sentence)}")


def sweep_cells(sweep: Sweep) -> Cells:
    """A row a point."""
    points = [point for points in sweep.methods.values() for point in points]
    names = ["method", "dense", *(point.method for point in points)]
    return [(name, *row) for name, row in zip(names, point_cells(points), strict=True)] if points else [("method",)]


def point_cells(points: Sequence[PointResult]) -> Cells:
    """The dense model's row, and one for each of several points, at least one."""
    metrics = list(dict.fromkeys(name for point in points for name in point.comparison.metrics))
    sizes = sorted({row.batch_size for point in points for row in point.throughput})
    likeness = [name for name, value in LIKENESS.items() if any(value(p.comparison) is not None for p in points)]
    cells: Cells = [("budget", "MACs", *metrics, *likeness, *(f"at {size}" for size in sizes))]
    dense = (_metric(points[0].comparison, name, "dense") for name in metrics)
    cells.append(("", percent(1.0), *dense, *("" for _ in (*likeness, *sizes))))
    for point in points:
        speeds = {row.batch_size: f"{row.speedup:.2f}x" for row in point.throughput}
        row = [asked_for(point.budget), percent(point.ratio)]
        row += [_metric(point.comparison, name, "pruned") for name in metrics]
        row += [_likeness(name, LIKENESS[name](point.comparison)) for name in likeness]
        cells.append((*row, *(speeds.get(size, "") for size in sizes)))
    return cells


def _metric(comparison: Comparison, name: str, model: str) -> str:
    pair = comparison.metrics.get(name)
    if pair is None:
        return ""
    value = pair.dense if model == "dense" else pair.pruned
    return percent(value, 2) if pair.is_fraction else number(value)


AGREEMENTS = SAME_ANSWER, SAME_LABELS = "same answer", "same labels"
LIKENESS: dict[str, Callable[[Comparison], float | None]] = {
    SAME_ANSWER: lambda comparison: None if comparison.answers == "multi-label" else comparison.agreement,
    SAME_LABELS: lambda comparison: comparison.agreement if comparison.answers == "multi-label" else None,
    "cosine": lambda comparison: comparison.similarity,
    "correlation": lambda comparison: comparison.correlation,
}


def _likeness(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return percent(value) if name in AGREEMENTS else f"{value:.4f}"


def sweep_findings(sweep: Sweep) -> list[str]:
    """What the points come to, a sentence each."""
    sentences = [sentence for method, points in sweep.methods.items() for sentence in _of_method(method, points)]
    sentences += [f"{one.method} at {asked_for(one.budget)}: not there. {one.reason}" for one in sweep.missed]
    return sentences


def _of_method(method: str, points: Sequence[SweepPoint]) -> Iterator[str]:
    """How far down a method goes unseen, by accuracy where it was tested."""
    tested = [(point, pair) for point in points if (pair := point.comparison.metrics.get("accuracy")) is not None]
    tested = [(point, pair) for point, pair in tested if pair.p_value is not None]
    if not tested:
        return
    images = tested[0][0].comparison.images
    unseen = [point for point, pair in tested if not pair.differs or pair.difference >= 0]
    first = next((place for place, (point, _) in enumerate(tested) if point not in unseen), len(tested))
    if first:
        least = percent(tested[first - 1][0].ratio)
        yield f"{method}: down to {least} of the MACs no loss of accuracy is seen on {images} images."
    if first < len(tested):
        point, pair = tested[first]
        below = f"{-100 * pair.difference:.2f} points below the dense model's"
        yield f"{method}: at {percent(point.ratio)} accuracy is {below}."
