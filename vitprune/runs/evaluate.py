"""Both models of a run, compared: what `apply` reports in the end, and `evaluate`, which does nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor

from vitprune.budget.latency import check_latency
from vitprune.data.images import Images
from vitprune.exporting.exported import folder_of
from vitprune.measure.compare import compare_closely
from vitprune.measure.seen import look_at, named_rows
from vitprune.measure.throughput import describe_environment, measure_throughput
from vitprune.models.module import Levels, pruning_of
from vitprune.models.points import points_of, set_budget
from vitprune.recipe.errors import first_line
from vitprune.recipe.for_readers import for_readers, without_paths
from vitprune.recipe.schema import Recipe
from vitprune.reports.page import ShownImages, report_page
from vitprune.reports.results import (
    REPORT_JSON,
    Breakdown,
    Comparison,
    Latency,
    PointResult,
    Report,
    ScheduleSearch,
    Throughput,
    Training,
)
from vitprune.reports.run_report import shortfall
from vitprune.reports.token_pictures import SeenImage
from vitprune.runs.inputs import RunInputs
from vitprune.runtime import distributed
from vitprune.runtime.files import require_writable, write_text_whole
from vitprune.runtime.hub_cache import Disconnected

# different batches of the largest size that throughput is measured on
TIMED_BATCHES = 3

Points = Sequence[tuple[float, Comparison]]
"""Budgets that a checkpoint has levels for, and what was found at each."""


def evaluate(checkpoint: str, recipe: Recipe, output: Path) -> Report:
    """Compare a pruned checkpoint with the recipe's dense one on the recipe's images.

    The budget is the checkpoint's own, where its report says one. Writes report.json and report.html to the folder
    `output`.
    """
    distributed.on_main(lambda: require_writable(output))
    run = Evaluation.load(recipe, pruned=checkpoint)
    found = run.compare_closely()
    report = run.report(*found, run.compare_points(found[0], lambda name, kind, compute: compute()))
    report = report.model_copy(update={"budget": _own_budget(checkpoint, report.budget)})
    if run.is_main:
        place = folder_of(checkpoint) or Path(checkpoint)  # of an exported model its folder, whichever file was named
        name = place.resolve().name if place.exists() else checkpoint
        page = report_page(report, name, run.show(report))
        output.mkdir(parents=True, exist_ok=True)
        report.save(output / REPORT_JSON)
        write_text_whole(output / "report.html", page)
    return report


def _own_budget(checkpoint: str, asked: float | None) -> float | None:
    """Of MACs, that a checkpoint was made for; `asked` where it doesn't say."""
    try:
        here = Path(checkpoint)
        place = here / REPORT_JSON if here.exists() else Path(hf_hub_download(checkpoint, REPORT_JSON))
        own = Report.load(place) if place.is_file() else None
    except (ValueError, OSError, Disconnected):  # of another version, or not there
        return asked
    return asked if own is None else own.budget


class Evaluation(RunInputs):
    """What is found out of the two models of a run."""

    def compare(self) -> Comparison:
        return self.compare_closely()[0]

    def compare_closely(self) -> tuple[Comparison, Breakdown]:
        return compare_closely(*self.answers, self.eval, self.recipe.evaluate, progress=self.is_main)

    def compare_points(
        self, found: Comparison, once: Callable[[str, Any, Callable[[], Comparison]], Comparison]
    ) -> Points:
        """Compare at each budget that there are levels for, if there are several; `found` is at the present levels."""
        compared = []
        for point, is_present in self._each_point(point.budget for point in points_of(self.pruned)):
            name = f"comparison-{100 * point:g}"
            compared.append((point, found if is_present else once(name, Comparison, self.compare)))
        return compared

    def _each_point(self, budgets: Iterable[float]) -> Iterator[tuple[float, bool]]:
        """Turn the model to one budget after the other, and back again in the end; with whether it was there before."""
        pruning = pruning_of(self.pruned)
        began = Levels.of(pruning)
        for budget in budgets:
            set_budget(self.pruned, budget)
            yield budget, torch.equal(pruning.levels.cpu(), began.levels)
        began.give(pruning)

    def show(self, report: Report) -> ShownImages:
        """Look at the images that a report names."""
        if not self.recipe.output.pictures:
            return ShownImages(missing="Left out, as output.pictures in the recipe is false.")
        if report.breakdown is None or self.eval.whole is None:
            return ShownImages(missing="Left out: images that are streamed can't be asked for a second time.")

        def look(rows: Sequence[int]) -> tuple[SeenImage, ...]:
            return tuple(look_at(named_rows(self.eval, rows), *self.answers, self.processor, self.class_names))

        found = report.breakdown
        try:
            return ShownImages(look(found.easiest), look(found.hardest), look(found.apart))
        except (ValueError, OSError) as error:  # no reason to lose what was found out
            return ShownImages(missing=without_paths(f"Left out: {first_line(error)}.", self.recipe))

    def report(
        self,
        comparison: Comparison,
        breakdown: Breakdown | None = None,
        points: Points = (),
        calibrated: Comparison | None = None,
        search: ScheduleSearch | None = None,
        training: Training | None = None,
    ) -> Report:
        """Measure throughput on images by chance and put everything together."""
        throughput = self._measure_throughput()
        by_budget, results = dict(points), []
        for budget, is_present in self._each_point(by_budget):
            timed = throughput if is_present else self._measure_throughput()
            results.append(PointResult(budget=budget, comparison=by_budget[budget], throughput=timed))
        latency = self._check_latency()
        missed = None if latency is None else shortfall(latency)
        notes = [*self.eval.notes] if missed is None else [*self.eval.notes, missed]
        if self._lacks_labels:
            place = f"{self.recipe.data.path}, split {self.recipe.data.eval.split}"
            notes.append(
                f"There are no labels in {place}, so no metric is given that needs them; `data.label_column` names a "
                "column that isn't found by itself, and `data.labels: ignore` does without."
            )
        found_at, shown = pruning_of(self.pruned).spec.patches, comparison.kept[0].patches
        if found_at is not None and found_at != shown:
            notes.append(
                f"The thresholds were found on images of {found_at} patches, these have {shown}: the ratio of MACs may "
                "be another; `vitprune apply` with images of this size finds thresholds for it."
            )
        return Report(
            created=datetime.now(UTC),
            environment=describe_environment(self.pruned),
            recipe=for_readers(self.recipe),
            budget=None if self.recipe.budget.macs is None else self.recipe.budget.part,
            comparison=comparison,
            breakdown=breakdown,
            calibrated=calibrated,
            training=training,
            schedule=search,
            throughput=throughput,
            points=tuple(results),
            latency=latency,
            notes=tuple(without_paths(note, self.recipe) for note in notes),
        )

    @property
    def _lacks_labels(self) -> bool:
        """Whether the images have no labels, though the model's answers could be judged by some."""
        wanted = self.recipe.data.labels != "ignore" and self.answers[0].kind.takes_labels
        return wanted and not self.eval.labelled

    def _measure_throughput(self) -> tuple[Throughput, ...]:
        spec = self.recipe.evaluate
        if not spec.batch_sizes:
            return ()
        images = self.timed_images(self.eval, max(spec.batch_sizes))
        return distributed.on_main(
            lambda: tuple(measure_throughput(*self.answers, images, spec.batch_sizes, spec.repeats))
        )

    def _check_latency(self) -> Latency | None:
        asked, size = self.recipe.budget.latency, self.recipe.budget.timed_batch
        if asked is None:
            return None
        images = self.timed_images(self.eval, size)
        repeats = self.recipe.evaluate.repeats
        return distributed.on_main(lambda: check_latency(*self.answers, images, asked, size, repeats))

    def timed_images(self, images: Images | None, batch_size: int) -> Tensor:
        """Images by chance, for several different batches of a size."""
        assert images is not None
        return images.sample(TIMED_BATCHES * batch_size, self.recipe.seed).pixels()
