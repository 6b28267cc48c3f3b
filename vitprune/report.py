"""Shows results: tables for the terminal, the model card, what a run would do.

Knows how to say what numbers mean. Leaves the numbers to `results` and where they come from to `evaluation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vitprune.results import Comparison, Latency, Plan, Report, Throughput

PAYS = 1.05  # a speed-up worth having: less is lost in the noise
BUDGET_TOLERANCE = 0.01

Cells = list[tuple[str, ...]]
"""A table's header and rows."""


def print_report(report: Report, console: Console) -> None:
    """Tables of pruned beside dense, then in words what they come to."""
    for title, cells in _tables(report):
        console.print(_rich_table(title, cells))
    for sentence in findings(report):
        console.print(f"- {escape(sentence)}")


def findings(report: Report) -> list[str]:
    """What the numbers come to, a sentence each."""
    result, sentences = report.comparison, []
    ratio = result.macs.ratio
    if report.budget is None:
        sentences.append(f"Pruned takes {_percent(ratio)} of the dense model's multiply-accumulates (MACs).")
    else:
        met = "met" if abs(ratio - report.budget) <= BUDGET_TOLERANCE else "not met"
        sentences.append(
            f"Pruned takes {_percent(ratio)} of the dense model's multiply-accumulates (MACs): the budget of "
            f"{_percent(report.budget)} is {met}."
        )
    if report.latency is not None:
        sentences.append(_latency(report.latency))
    sentences += [_quality(name, pair.dense, pair.pruned) for name, pair in result.metrics.items()]
    if result.agreement is not None:
        sentences.append(
            f"It gives the dense model's answer for {_percent(result.agreement)} of {result.images} images."
        )
    if result.similarity is not None:
        cosine = f"{result.similarity:.4f}"
        sentences.append(
            f"Its embeddings of {result.images} images have a cosine of {cosine} with the dense ones on average."
        )
    sentences += _where_it_pays(report.throughput)
    if result.skipped:
        sentences.append(f"{result.skipped} broken images were left out.")
    return [*sentences, *report.notes]


def _latency(latency: Latency) -> str:
    met = "met" if latency.met else "not met"
    expected = "" if latency.predicted is None else f" (the measured table expects {_percent(latency.predicted)})"
    return (
        f"At batch size {latency.batch_size} pruned takes {_percent(latency.measured)} of the dense model's "
        f"time{expected}: the latency budget of {_percent(latency.asked)} is {met}."
    )


def _quality(name: str, dense: float, pruned: float) -> str:
    points = 100 * (pruned - dense)
    values = f"{_percent(pruned, 2)} against {_percent(dense, 2)}"
    if abs(points) < 0.005:
        return f"Its {name} is that of the dense model: {values}."
    return f"Its {name} is {abs(points):.2f} points {'above' if points > 0 else 'below'} the dense model's: {values}."


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
        f"At batch size {most.batch_size} it has {_percent(most.efficiency)} of the speed-up that its MACs would allow "
        f"({most.ideal_speedup:.2f}x).",
    ]


def _at(row: Throughput) -> str:
    return f"{row.speedup:.2f}x{' (slower)' if row.speedup < 1 else ''} at batch size {row.batch_size}"


def _tables(report: Report) -> list[tuple[str, Cells]]:
    machine = report.environment
    where = f"{machine.cpu if machine.device == 'cpu' else machine.device}, {machine.threads} threads, {machine.dtype}"
    tables = [(f"Quality and work, {report.comparison.images} images", _quality_cells(report))]
    tables.append(("Patches kept", _kept_cells(report.comparison)))
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
        values = (_percent(comparison.metrics[metric].pruned, 2) for _, comparison in shown)
        cells.append((metric, _percent(pair.dense, 2), *values, f"{100 * pair.difference:+.2f} points"))
    if result.agreement is not None:
        cells.append(("same answer as dense", "", *(_percent(c.agreement or 0.0) for _, c in shown), ""))
    if result.similarity is not None:
        cells.append(("cosine to dense", "", *(f"{c.similarity or 0.0:.4f}" for _, c in shown), ""))
    macs = (f"{_count(comparison.macs.pruned.mean)} ({_percent(comparison.macs.ratio)})" for _, comparison in shown)
    cells.append(("MACs an image", _count(result.macs.dense), *macs, f"{100 * (result.macs.ratio - 1):+.1f} %"))
    spread = (f"{_count(c.macs.pruned.q05)} to {_count(c.macs.pruned.q95)}" for _, c in shown)
    cells.append(("MACs of 90 % of the images", "", *spread, ""))
    return cells


def _kept_cells(result: Comparison) -> Cells:
    cells: Cells = [("before block", "dense", "pruned (mean)", "5 %", "median", "95 %")]
    for stage in result.kept:
        kept = (f"{value:.0f}" for value in (stage.kept.q05, stage.kept.q50, stage.kept.q95))
        cells.append((str(stage.before_block), str(stage.patches), f"{stage.kept.mean:.1f}", *kept))
    return cells


def _speed_cells(throughput: Sequence[Throughput]) -> Cells:
    cells: Cells = [("batch size", "dense images/s", "pruned images/s", "speed-up", "MACs allow", "efficiency")]
    for row in throughput:
        speeds = (f"{speed:.1f}" for speed in (row.dense_images_per_second, row.pruned_images_per_second))
        ratios = (f"{row.speedup:.2f}x", f"{row.ideal_speedup:.2f}x", _percent(row.efficiency))
        cells.append((str(row.batch_size), *speeds, *ratios))
    return cells


def _latency_cells(latency: Latency) -> Cells:
    predicted = "" if latency.predicted is None else _percent(latency.predicted)
    seconds = (f"{timing.median:.3g} s" for timing in (latency.dense, latency.pruned))
    return [
        ("batch size", "dense", "pruned", "asked", "expected", "measured"),
        (str(latency.batch_size), *seconds, _percent(latency.asked), predicted, _percent(latency.measured)),
    ]


CARD = """
# {name}

{introduction}

## How to use it

{usage}

## Results

{results}

## Limits

- Without `import vitprune` transformers warns and loads the weights as a dense model: nothing is dropped or faster.
- How fast it is depends on machine, batch size and images; measure it with `vitprune evaluate`.
- How many tokens stay depends on the image: the budget holds on average over images like those it was calibrated on.
- Evaluated on {images} images of {data} only.

`report.json` has all figures, `recipe.yaml` what was asked for. Made with vitprune {environment.vitprune}, torch
{environment.torch}, transformers {environment.transformers}.
"""


CLASSIFIER = """\
```python
import vitprune  # teaches transformers to load it pruned
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("{name}")
processor = AutoImageProcessor.from_pretrained("{name}")
```

`pipeline("image-classification", "{name}")` works too, after `import vitprune`."""

OTHER = """\
```python
import vitprune
from transformers import AutoImageProcessor

model = vitprune.load("{name}")
processor = AutoImageProcessor.from_pretrained("{name}")
```

The `from_pretrained` of the model's own class works too, after `import vitprune`."""


def model_card(report: Report, name: str) -> str:
    """A Markdown model card with YAML front matter. `name`: how the model is to be loaded, a Hub id or a folder."""
    base, data = _asked(report.recipe, "model", "checkpoint"), _asked(report.recipe, "data", "path")
    body = CARD.format(
        name=name,
        introduction=_introduction(report, base),
        usage=(CLASSIFIER if _task(report) == "image-classification" else OTHER).format(name=name),
        results=_results(report),
        images=report.comparison.images,
        data=_shown_name(data) or "one data set",
        environment=report.environment,
    )
    return f"---\n{_front_matter(report, name, base, data).to_yaml()}\n---\n{body}"


def _introduction(report: Report, base: str | None) -> str:
    origin = f"`{_shown_name(base)}`" if base else "A Vision Transformer"
    return (
        f"{origin} with token pruning by vitprune: on its way through the blocks each image drops the patches that it "
        f"needs least, so that on average it takes {_percent(report.comparison.macs.ratio)} of the dense model's "
        "multiply-accumulates (MACs)."
    )


def _results(report: Report) -> str:
    parts = [f"**{title}**\n\n{_markdown_table(cells)}" for title, cells in _tables(report)]
    return "\n\n".join([*parts, "\n".join(f"- {sentence}" for sentence in findings(report))])


def _front_matter(report: Report, name: str, base: str | None, data: str | None) -> ModelCardData:
    shown = _shown_name(data) or "unknown"
    results = [
        EvalResult(
            task_type=_task(report),
            dataset_type=shown,
            dataset_name=shown,
            metric_type=metric,
            metric_value=round(pair.pruned, 4),
        )
        for metric, pair in report.comparison.metrics.items()
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=_task(report),
        tags=["vitprune", "token-pruning"],
        base_model=base if base and not _is_local(base) else None,
        datasets=[data] if data and not _is_local(data) else None,
        model_name=Path(name).name,
        eval_results=results or None,
    )


def _task(report: Report) -> str:
    """The Hub's name for what the model is for."""
    if report.comparison.similarity is not None:
        return "image-feature-extraction"
    return "zero-shot-image-classification" if _asked(report.recipe, "model", "prompt") else "image-classification"


def _asked(recipe: dict[str, Any], section: str, key: str) -> str | None:
    return recipe.get(section, {}).get(key)


def _is_local(path: str) -> bool:
    return Path(path).is_absolute() or Path(path).exists()


def _shown_name(path: str | None) -> str | None:
    """A Hub id as it is, of a local path the last part: a card is for others, who don't care where it lay."""
    return Path(path).name if path and _is_local(path) else path


def print_plan(plan: Plan, console: Console) -> None:
    """What `apply` would do, as tokens and MACs of each block, and step by step."""
    prefix = f"{plan.num_prefix_tokens} prefix token{'' if plan.num_prefix_tokens == 1 else 's'}"
    model = f"{plan.checkpoint}: {plan.model_class} ({plan.family}), {plan.num_blocks} blocks, {prefix}"
    console.print(escape(model), highlight=False)
    stages = ", ".join(map(str, plan.stages))
    budget = f"Budget {_percent(plan.budget)} of the {plan.counts}"
    console.print(f"{budget}, stages before blocks {stages}", highlight=False)
    console.print(_rich_table("Blocks, one image", _plan_cells(plan)))
    for number, step in enumerate(plan.steps, start=1):
        console.print(f"{number}. {escape(step)}", highlight=False)


def _plan_cells(plan: Plan) -> Cells:
    """With tokens and MACs at the budget where they are known."""
    cells: Cells = [("block", "", "tokens dense", "at the budget", "MACs dense", "at the budget")]
    dense = budget = 0.0
    for row in plan.rows:
        stage = "stage" if row.block in plan.stages else ""
        dense, budget = dense + row.macs_dense, budget + (row.macs_budget or 0.0)
        tokens = "" if row.tokens_budget is None else f"{row.tokens_budget:.1f}"
        macs = "" if row.macs_budget is None else _count(row.macs_budget)
        cells.append((str(row.block), stage, str(row.tokens_dense), tokens, _count(row.macs_dense), macs))
    cells.append(("all", "", "", "", _count(dense), f"{_count(budget)} ({_percent(budget / dense)})" if budget else ""))
    if budget:
        return cells
    return [(*row[:3], row[4]) for row in cells]


def _rich_table(title: str, cells: Cells) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for index, heading in enumerate(cells[0]):
        table.add_column(heading, justify="left" if index == 0 else "right")
    for row in cells[1:]:
        table.add_row(*map(escape, row))
    return table


def _markdown_table(cells: Cells) -> str:
    rule = ("---", *("---:" for _ in cells[0][1:]))
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:]))


def _percent(part: float, digits: int = 1) -> str:
    return f"{100 * part:.{digits}f} %"


def _count(macs: float) -> str:
    """Multiply-accumulates, to three figures."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if macs >= size:
            return f"{macs / size:.3g} {unit}"
    return f"{macs:.0f}"
