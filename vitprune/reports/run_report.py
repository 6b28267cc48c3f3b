"""Shows results, tables and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from vitprune.reports.results import (
    LATENCY_TOLERANCE,
    PAYS,
    Check,
    Comparison,
    Latency,
    MetricPair,
    Report,
    ScheduleSearch,
    Throughput,
    Training,
)
from vitprune.reports.sweep_report import point_cells
from vitprune.reports.text import Cells, asked_for, count, number, percent, rich_table

BUDGET_TOLERANCE = 0.01
SHOWN_SCHEDULES = 5


def print_report(report: Report, console: Console) -> None:
    """Tables of pruned beside dense, then in words what they come to."""
    for title, cells in tables_of(report):
        console.print(rich_table(title, cells))
    for sentence in findings(report):
        console.print(f"- {escape(sentence)}")


def findings(report: Report) -> list[str]:
    """What the numbers come to, a sentence each."""
    result, sentences = report.comparison, []
    ratio = result.macs.ratio
    if report.budget is None:
        sentences.append(f"Pruned takes {percent(ratio)} of the dense model's multiply-accumulates (MACs).")
    else:
        met = "met" if ratio <= report.budget + BUDGET_TOLERANCE else "not met"
        sentences.append(
            f"Pruned takes {percent(ratio)} of the dense model's multiply-accumulates (MACs): the budget of "
            f"{percent(report.budget)} is {met}."
        )
    if report.points:
        budgets = ", ".join(asked_for(point.budget) for point in report.points)
        sentences.append(
            f"It has levels for budgets of {budgets}; `vitprune.set_budget(model, budget)` turns it to one of them, or "
            "to one between. All else that is said here is of the one that it is loaded with."
        )
    if report.latency is not None:
        sentences.append(_latency(report.latency))
    if report.schedule is not None:
        sentences.append(_schedule(report.schedule, "the lowest budget" if report.points else "the budget"))
    if report.training is not None:
        sentences.append(_training(report.training))
    sentences += [_quality(name, pair, result.images) for name, pair in result.metrics.items()]
    sentences += _likeness(result)
    sentences += _where_it_pays(report.throughput)
    if result.skipped:
        sentences.append(f"{result.skipped} broken images were left out.")
    return [*sentences, *report.notes]


def _latency(latency: Latency) -> str:
    met = "met" if latency.met else "not met"
    expected = "" if latency.predicted is None else f" (the measured table expects {percent(latency.predicted)})"
    return (
        f"At batch size {latency.batch_size} pruned takes {percent(latency.measured)} of the dense model's "
        f"time{expected}: the latency budget of {percent(latency.asked)} is {met}."
    )


def _schedule(search: ScheduleSearch, at: str) -> str:
    taken, *others = search.tried
    blocks = ", ".join(map(str, taken.before_blocks))
    sentence = (
        f"Pruning before blocks {blocks} was chosen among {len(search.tried)} schedules at {at}, for answers to "
        f"{search.images} calibration images near the dense model's, and few stages ({search.measure} "
        f"{taken.distance:.2g}"
    )
    if not others:
        return f"{sentence})."
    return f"{sentence}; others {others[0].distance:.2g} to {others[-1].distance:.2g})."


def _training(training: Training) -> str:
    first, last = training.checks[0], training.checks[-1]
    kept = next(check for check in training.checks if check.step == training.kept_step)
    images = f"{training.images} training images that were held out"
    if not training.kept_step:
        return (
            f"Fine-tuning gained nothing: on {images} the loss was {_loss(first)} before it and {_loss(last)} at "
            "its end, and no state was better at the same cost by more than chance, or so much that it shows in "
            "answers; the calibrated model was kept."
        )
    return (
        f"Fine-tuning brought the loss on {images} from {_loss(first)} to {_loss(kept)}: the state after step "
        f"{kept.step} of {training.steps} was kept."
    )


def _loss(check: Check) -> str:
    return "not finite" if check.loss is None else f"{check.loss:.4f}"


def _likeness(result: Comparison) -> list[str]:
    """How like the dense model's answers are."""
    sentences, images, bad = [], f"{result.images} images", result.not_finite
    if result.agreement is not None and result.answers == "multi-label":
        sentences.append(
            f"It gives and withholds labels as the dense model does for {percent(result.agreement)} of the labels of "
            f"{images}, at a probability of 0.5."
        )
    elif result.agreement is not None:
        between = "" if result.agreement_interval is None else f" (95 % interval {_between(result.agreement_interval)})"
        sentences.append(f"It gives the dense model's answer for {percent(result.agreement)} of {images}{between}.")
    if result.similarity is not None:
        cosine = f"{result.similarity:.4f}"
        sentences.append(f"Its embeddings of {images} have a cosine of {cosine} with the dense ones on average.")
    if result.correlation is not None and result.deviation is not None:
        sentences.append(
            f"Its numbers for {images} have a correlation of {result.correlation:.4f} with the dense ones and differ "
            f"from them by {number(result.deviation)} (root mean square)."
        )
    if bad.dense or bad.pruned:
        treated = "are left out" if result.answers == "regression" else "count as wrong and as different"
        sentences.append(
            f"Of {images} {bad.dense} have no finite answer from the dense model and {bad.pruned} none from the pruned "
            f"one; they {treated}. In float16 numbers may overflow: try model.dtype: bfloat16 or float32."
        )
    return sentences


def _between(interval: tuple[float, float]) -> str:
    return " to ".join(percent(end) for end in interval)


def _quality(name: str, pair: MetricPair, images: int) -> str:
    dense, pruned = pair.dense, pair.pruned
    if not pair.is_fraction:
        return f"Its {name} is {number(pruned)} against {number(dense)} of the dense model."
    points = 100 * (pruned - dense)
    values = f"{percent(pruned, 2)} against {percent(dense, 2)}"
    where = f"{abs(points):.2f} points {'above' if points > 0 else 'below'} the dense model's"
    sentence = f"Its {name} is {'that of the dense model' if abs(points) < 0.005 else where}: {values}"
    if pair.interval is None or pair.p_value is None:
        return f"{sentence}."
    low, high = (f"{100 * end:+.1f}" for end in pair.interval)
    sentence += f", 95 % interval of the difference {low} to {high} points"
    if not pair.differs:
        return f"{sentence}: no difference seen on {images} images (McNemar's p {pair.p_value:.2g})."
    return f"{sentence} (McNemar's p {pair.p_value:.2g}, {images} images)."


def _where_it_pays(throughput: Sequence[Throughput]) -> list[str]:
    rows = sorted(throughput, key=lambda row: row.batch_size)
    if not rows:
        return []
    pays = [row.speedup >= PAYS for row in rows]
    gains = ", ".join(_at(row) for row, gain in zip(rows, pays, strict=True) if gain)
    losses = ", ".join(_at(row) for row, gain in zip(rows, pays, strict=True) if not gain)
    if all(pays):
        sentence = f"It pays at every batch size measured: {gains}."
    elif not any(pays):
        sentence = f"It doesn't pay here at any batch size measured: {losses}; the work saved isn't time saved."
    elif pays == sorted(pays):
        first = rows[pays.index(True)].batch_size
        sentence = f"It doesn't pay at small batches: {losses}; it pays from batch size {first} on: {gains}."
    else:
        sentence = f"It pays at some batch sizes: {gains}; not at others: {losses}."
    most = rows[-1]
    return [
        sentence,
        f"At batch size {most.batch_size} it has {percent(most.efficiency)} of the speed-up that its MACs would allow "
        f"({most.ideal_speedup:.2f}x).",
    ]


def _at(row: Throughput) -> str:
    return f"{row.speedup:.2f}x{' (slower)' if row.speedup < 1 else ''} at batch size {row.batch_size}"


def tables_of(report: Report) -> list[tuple[str, Cells]]:
    """Pruned beside dense: each table's title and cells."""
    machine = report.environment
    runtime = machine.dtype if machine.runtime is None else machine.runtime
    where = f"{machine.cpu if machine.device == 'cpu' else machine.device}, {machine.threads} threads, {runtime}"
    tables = [(f"Quality and work, {report.comparison.images} images", _quality_cells(report))]
    tables.append(("Patches kept", _kept_cells(report.comparison)))
    if report.points:
        tables.append(("Operating points, with speed-ups at batch sizes", point_cells(report.points)))
    if report.schedule is not None:
        title = f"Schedules tried, {report.schedule.measure} to dense on {report.schedule.images} calibration images"
        tables.append((title, _schedule_cells(report.schedule)))
    if report.training is not None:
        tables.append((f"Fine-tuning, {report.training.images} held-out images", _training_cells(report)))
    if report.throughput:
        tables.append((f"Speed on {where}", _speed_cells(report.throughput)))
    if report.latency is not None:
        tables.append((f"Latency budget on {where}", _latency_cells(report.latency)))
    return tables


def _quality_cells(report: Report) -> Cells:
    columns = [("calibrated only", report.calibrated), ("pruned", report.comparison)]
    shown = [(name, comparison) for name, comparison in columns if comparison is not None]
    result = report.comparison
    cells: Cells = [("", "dense", *(name for name, _ in shown), "difference")]
    for metric, pair in result.metrics.items():
        values = [found.metrics[metric].pruned if metric in found.metrics else math.nan for _, found in shown]
        if pair.is_fraction:
            percents = (percent(value, 2) for value in values)
            cells.append((metric, percent(pair.dense, 2), *percents, f"{100 * pair.difference:+.2f} points"))
        else:
            cells.append((metric, number(pair.dense), *map(number, values), f"{pair.difference:+.3g}"))
    if result.agreement is not None:
        what = "labels as dense" if result.answers == "multi-label" else "same answer as dense"
        cells.append((what, "", *(percent(c.agreement or 0.0) for _, c in shown), ""))
    if result.similarity is not None:
        cells.append(("cosine to dense", "", *(f"{c.similarity or 0.0:.4f}" for _, c in shown), ""))
    if result.correlation is not None:
        cells.append(("correlation with dense", "", *(f"{c.correlation or 0.0:.4f}" for _, c in shown), ""))
        cells.append(("difference from dense", "", *(number(c.deviation or 0.0) for _, c in shown), ""))
    macs = (f"{count(comparison.macs.pruned.mean)} ({percent(comparison.macs.ratio)})" for _, comparison in shown)
    cells.append(("MACs an image", count(result.macs.dense), *macs, f"{100 * (result.macs.ratio - 1):+.1f} %"))
    spread = (f"{count(c.macs.pruned.q05)} to {count(c.macs.pruned.q95)}" for _, c in shown)
    cells.append(("MACs of 90 % of the images", "", *spread, ""))
    return cells


def _kept_cells(result: Comparison) -> Cells:
    cells: Cells = [("before block", "dense", "pruned (mean)", "5 %", "median", "95 %")]
    for stage in result.kept:
        kept = (f"{value:.0f}" for value in (stage.kept.q05, stage.kept.q50, stage.kept.q95))
        cells.append((str(stage.before_block), str(stage.patches), f"{stage.kept.mean:.1f}", *kept))
    return cells


def _schedule_cells(search: ScheduleSearch) -> Cells:
    """The one that was taken and the nearest of the others."""
    cells: Cells = [("before blocks", "shares of the work", "MACs", search.measure)]
    for tried in search.tried[:SHOWN_SCHEDULES]:
        blocks, shares = (" ".join(map(str, values)) for values in (tried.before_blocks, _rounded(tried.shares)))
        cells.append((blocks, shares, percent(tried.ratio), f"{tried.distance:.3g}"))
    return cells


def _training_cells(report: Report) -> Cells:
    """What the checks saw; kept: parts of the patches after each stage."""
    assert report.training is not None
    cells: Cells = [("after step", "loss", "ratio", *(f"kept before {s.before_block}" for s in report.comparison.kept))]
    for check in report.training.checks:
        mark = " (kept)" if check.step == report.training.kept_step else ""
        kept = (percent(part) for part in check.kept)
        cells.append((f"{check.step}{mark}", _loss(check), percent(check.ratio), *kept))
    return cells


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in values]


def _speed_cells(throughput: Sequence[Throughput]) -> Cells:
    cells: Cells = [("batch size", "dense images/s", "pruned images/s", "speed-up", "MACs allow", "efficiency")]
    for row in throughput:
        speeds = (f"{speed:.1f}" for speed in (row.dense_images_per_second, row.pruned_images_per_second))
        ratios = (f"{row.speedup:.2f}x", f"{row.ideal_speedup:.2f}x", percent(row.efficiency))
        cells.append((str(row.batch_size), *speeds, *ratios))
    return cells


def _latency_cells(latency: Latency) -> Cells:
    predicted = "" if latency.predicted is None else percent(latency.predicted)
    seconds = (f"{timing.median:.3g} s" for timing in (latency.dense, latency.pruned))
    return [
        ("batch size", "dense", "pruned", "asked", "expected", "measured"),
        (str(latency.batch_size), *seconds, percent(latency.asked), predicted, percent(latency.measured)),
    ]


def shortfall(found: Latency) -> str | None:
    """A sentence for the reader where what was measured is far from what was asked; None where it isn't."""
    if abs(found.measured / found.asked - 1) <= LATENCY_TOLERANCE + 1e-9:
        return None
    missed = f"isn't used up: only {found.measured:.1%}" if found.met else f"is missed: {found.measured:.1%}"
    return (
        f"The latency budget of {found.asked:.1%} {missed} was measured, further off than {LATENCY_TOLERANCE:.0%} of "
        "what was asked. Other work on the machine, or images unlike the calibration's, do that."
    )
