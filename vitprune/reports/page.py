"""A report, or a sweep, as one HTML page: everything in it, pictures too, so that it can be sent and opened anywhere.

Knows what is on the page; `templates/` has how it looks.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jinja2

from vitprune.recipe.yaml_source import dump
from vitprune.reports.charts import Axis, Line, Plot
from vitprune.reports.model_card import usage_of
from vitprune.reports.results import Breakdown, Comparison, Environment, PointResult, Report
from vitprune.reports.run_report import findings, tables_of
from vitprune.reports.sweep_report import AGREEMENTS, LIKENESS, Sweep, sweep_cells, sweep_findings
from vitprune.reports.text import asked_for, count, number, percent
from vitprune.reports.token_pictures import SeenImage, draw_stages

PANEL_SIDE = 140  # pixels of a picture's longer side on the page
PANELS = 4  # of an image: as it came, and after so many stages less one
QUALITY = 80  # of WebP


@dataclass(frozen=True)
class ShownImages:
    """The images of a page. missing: why there are none, for the reader."""

    easiest: tuple[SeenImage, ...] = ()
    hardest: tuple[SeenImage, ...] = ()
    apart: tuple[SeenImage, ...] = ()
    missing: str | None = None


class Tile(NamedTuple):
    """One figure that is seen first."""

    what: str
    big: str
    more: str
    warns: bool = False


def report_page(report: Report, name: str, images: ShownImages) -> str:
    """Write a report as HTML. name: of the checkpoint, for the reader."""
    comparison = report.comparison
    made = "" if report.created is None else f" · {report.created:%Y-%m-%d %H:%M} UTC"
    origin = f"Compared with the dense model on {comparison.images:,} images · vitprune {report.environment.vitprune}"
    return render(
        "report.html",
        name=name,
        origin=f"{origin}{made}",
        tiles=_tiles(report),
        sentences=findings(report),
        patches=comparison.kept[0].patches,
        stages=_stages(comparison),
        histogram=_histogram(report.breakdown, comparison.macs.ratio),
        galleries=_galleries(images),
        tables=[(title, cells) for title, cells in tables_of(report) if not title.startswith("Patches kept")],
        training=_training(report),
        curves=[*_curves({"pruned": report.points})],
        **_classes(report.breakdown),
        usage=usage_of(report, name),
        environment=_known(report.environment),
        recipe=dump(report.recipe),
    )


@cache
def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("vitprune.reports")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)


def render(template: str, **values: Any) -> str:
    """Fill in a template; what is filled in is text, never HTML."""
    text = _environment().get_template(template).render(values)
    return text.replace(" %", "&nbsp;%")  # a number and its unit stay on one line


def _known(environment: Environment | None) -> list[tuple[str, Any]]:
    values = {} if environment is None else environment.model_dump()
    return [(key, value) for key, value in values.items() if value is not None]


def _tiles(report: Report) -> list[Tile]:
    return [*_quality_tiles(report.comparison), _work_tile(report), *_speed_tiles(report)]


def _quality_tiles(result: Comparison) -> list[Tile]:
    tiles = []
    for name, pair in [*result.metrics.items()][:1]:
        shown = percent if pair.is_fraction else number
        change = f"{100 * pair.difference:+.2f} points" if pair.is_fraction else f"{pair.difference:+.3g}"
        sure = ""
        if pair.interval is not None:
            sure = f", 95 % interval {100 * pair.interval[0]:+.1f} to {100 * pair.interval[1]:+.1f}"
        tiles.append(Tile(name, shown(pair.pruned), f"dense {shown(pair.dense)}: {change}{sure}"))
    if result.agreement is not None:
        between = result.agreement_interval
        sure = "" if between is None else f"; 95 % interval {percent(between[0])} to {percent(between[1])}"
        what = "labels as dense" if result.answers == "multi-label" else "same answer as dense"
        tiles.append(Tile(what, percent(result.agreement), f"of {result.images:,} images{sure}"))
    if result.similarity is not None:
        tiles.append(Tile("cosine to dense", f"{result.similarity:.4f}", f"on average of {result.images:,} images"))
    if result.correlation is not None:
        tiles.append(Tile("correlation with dense", f"{result.correlation:.4f}", f"of {result.images:,} images"))
    return tiles


def _work_tile(report: Report) -> Tile:
    macs = report.comparison.macs
    asked = "" if report.budget is None else f"; asked for {percent(report.budget)}"
    figures = f"{count(macs.pruned.mean)} of {count(macs.dense)} MACs{asked}"
    return Tile("work", percent(macs.ratio), figures)


def _speed_tiles(report: Report) -> list[Tile]:
    rows = sorted(report.throughput, key=lambda row: row.speedup)
    if not rows:
        return []
    worst, best = rows[0], rows[-1]
    others = f"; {worst.speedup:.2f}x at {worst.batch_size}" if worst is not best else ""
    return [Tile("speed", f"{best.speedup:.2f}x", f"at batch size {best.batch_size}{others}", best.speedup < 1)]


def _stages(comparison: Comparison) -> list[dict[str, Any]]:
    found = []
    for stage in comparison.kept:
        low, mean, high = (100 * n / stage.patches for n in (stage.kept.q05, stage.kept.mean, stage.kept.q95))
        words = f"{stage.kept.mean:.0f} ({mean:.0f} %)"
        described = f"{words} of {stage.patches} patches on average, 90 % of the images {low:.0f} to {high:.0f} %"
        place = {"low": f"{low:.1f}", "wide": f"{high - low:.1f}", "mean": f"{mean:.1f}"}
        found.append({"block": stage.before_block, "words": words, "described": described, **place})
    return found


def _histogram(breakdown: Breakdown | None, mean: float) -> dict[str, Any] | None:
    """Nothing where all images take the same."""
    if breakdown is None or len(breakdown.macs.counts) < 2:
        return None
    edges, counts = breakdown.macs.edges, breakdown.macs.counts
    bars = [
        {"height": f"{100 * n / max(counts):.1f}", "title": f"{n} images, {percent(low)} to {percent(high)}"}
        for n, low, high in zip(counts, edges, edges[1:], strict=False)
    ]
    described = f"from {percent(edges[0])} to {percent(edges[-1])} of the MACs, {percent(mean)} on average"
    ends = {"low": percent(edges[0]), "high": percent(edges[-1]), "mean": f"mean {percent(mean)}"}
    return {"bars": bars, "described": described, **ends}


def _galleries(images: ShownImages) -> list[tuple[str, str, list[dict[str, Any]]]]:
    if images.missing is not None:
        return [("Images", images.missing, [])]
    parts = [
        ("Easiest images", "They took the fewest MACs. Patches that share a colour are one token.", images.easiest),
        ("Hardest images", "They took the most.", images.hardest),
        ("Where the answers differ", "The furthest apart first.", images.apart),
    ]
    return [(heading, note, [_shown(image) for image in shown]) for heading, note, shown in parts if shown]


def _shown(image: SeenImage) -> dict[str, Any]:
    picture = draw_stages(image, PANELS, PANEL_SIDE)
    encoded = io.BytesIO()
    picture.save(encoded, "webp", quality=QUALITY)
    left = image.stages[-1].tokens
    return {
        "source": f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}",
        "width": picture.width,
        "height": picture.height,
        "described": f"{image.name} and what is left of it after stages; {left} of {image.patches} patches at the end",
        "name": image.name,
        "work": f"{left} of {image.patches} patches left · {percent(image.ratio)} of the MACs",
        "pruned": image.pruned,
        "dense": image.dense,
        "label": image.label,
    }


def _training(report: Report) -> Plot | None:
    if report.training is None:
        return None
    losses = [(check.step, check.loss) for check in report.training.checks if check.loss is not None]
    if not losses:
        return None
    lines = [Line("loss", losses)]
    return Plot.of(
        lines, "step", Axis(lambda step: f"{step:.0f}", least=1, lowest=0), Axis(lambda loss: f"{loss:.4f}", least=1e-4)
    )


def _classes(breakdown: Breakdown | None) -> dict[str, Any]:
    """The table by class: of each cell what it is sorted by, and its text."""
    if breakdown is None or not breakdown.classes:
        return {"classes": None, "classes_note": ""}
    labelled = breakdown.by == "label"
    accuracies = ("dense", "pruned") if labelled else ()
    rows: list[Sequence[Any]] = [("class", "images", *accuracies, "same answer", "MACs")]
    for one in breakdown.classes:
        parts = [*((one.dense, one.pruned) if labelled else ()), one.agreement, one.ratio]
        rows.append([(one.name, one.name), (one.images, one.images), *((p or 0.0, percent(p or 0.0)) for p in parts)])
    what = "By the images' labels; dense and pruned: accuracy." if labelled else "By the dense model's answers."
    return {"classes": rows, "classes_note": what}


def sweep_page(sweep: Sweep, name: str) -> str:
    """Write a sweep as HTML, in one file."""
    made = "" if sweep.created is None else f" · {sweep.created:%Y-%m-%d %H:%M} UTC"
    images = f"{sweep.points[0].comparison.images:,} images" if sweep.points else "no images"
    return render(
        "sweep.html",
        name=name,
        origin=f"Compared with the dense model on {images}{made}",
        sentences=sweep_findings(sweep),
        charts=[*_curves(sweep.methods)],
        cells=sweep_cells(sweep),
        pages=[(f"{point.method}, {asked_for(point.budget)}", f"{point.folder}/report.html") for point in sweep.points],
        environment=_known(sweep.environment),
    )


def _curves(methods: Mapping[str, Sequence[PointResult]]) -> Iterator[tuple[str, str, Plot]]:
    """Title, note and lines over MACs: quality, likeness, speed."""
    points = [point for several in methods.values() for point in several]
    if not points:
        return
    first = points[0].comparison
    for metric, pair in [*first.metrics.items()][:1]:
        lines = _lines(methods, lambda point, metric=metric: _value(point, metric))
        ends = [min(point.ratio for point in points), 1.0]
        level = Line("dense", [(end, pair.dense) for end in ends], dashed=True)
        axis = _PART if pair.is_fraction else _four_figures(pair.dense)
        yield metric, "The dashed line is the dense model.", Plot.of([*lines, level], "MACs, of dense", _MACS, axis)
    for name, value in LIKENESS.items():
        if value(first) is not None:
            lines = _lines(methods, lambda point, value=value: value(point.comparison) or 0.0)
            axis = _PART if name in AGREEMENTS else Axis("{:.4f}".format, least=1e-4, most=1.0)
            yield name, "How like the dense model's answers are.", Plot.of(lines, "MACs, of dense", _MACS, axis)
    sizes = sorted({row.batch_size for point in points for row in point.throughput})
    for size in sizes[-1:]:
        lines = _lines(methods, lambda point, size=size: _speed(point, size))
        least = min(point.ratio for point in points)
        steps = [least + (1 - least) * step / 40 for step in range(41)]
        limit = Line("what the MACs allow", [(ratio, 1 / ratio) for ratio in steps], dashed=True)
        plot = Plot.of([*lines, limit], "MACs, of dense", _MACS, Axis(lambda speed: f"{speed:.2f}x", least=0.01))
        yield f"speed-up at batch size {size}", "Measured; the dashed line is what the MACs would allow.", plot


def _lines(methods: Mapping[str, Sequence[PointResult]], value: Callable[[PointResult], float]) -> list[Line]:
    return [Line(method, [(p.ratio, value(p)) for p in points]) for method, points in methods.items()]


def _value(point: PointResult, metric: str) -> float:
    pair = point.comparison.metrics.get(metric)
    return float("nan") if pair is None else pair.pruned


def _speed(point: PointResult, batch_size: int) -> float:
    return next((row.speedup for row in point.throughput if row.batch_size == batch_size), float("nan"))


_MACS = Axis(lambda part: percent(part, 0), least=0.01, lowest=0.0)
_PART = Axis(percent, least=0.001, lowest=0.0, most=1.0)


def _four_figures(value: float) -> Axis:
    """For numbers about so large."""
    return Axis(number, least=10.0 ** (math.floor(math.log10(abs(value))) - 3) if value else 0.0)
