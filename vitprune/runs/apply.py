"""A recipe becomes a compressed checkpoint: `apply`, read from top to bottom. Also `evaluate`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitprune.budget.calibration import calibrate, scale_to_budget
from vitprune.budget.latency import budget_latency, check_latency, meet_latency
from vitprune.budget.latency_measurement import measure_latency
from vitprune.budget.latency_table import CostTable
from vitprune.budget.points import find_points
from vitprune.data.augmentation import pixel_scale
from vitprune.data.images import Images
from vitprune.finetuning.finetune import NonFiniteLoss, finetune
from vitprune.finetuning.state import States
from vitprune.finetuning.tracking import TrackerContext
from vitprune.measure.compare import compare_closely
from vitprune.measure.seen import look_at, named_rows
from vitprune.measure.throughput import describe_environment, measure_throughput
from vitprune.models.checkpoint import require_room, save
from vitprune.models.module import Levels, pruning_of
from vitprune.models.points import points_of, set_budget
from vitprune.recipe.errors import Problem, RecipeError, first_line
from vitprune.recipe.schema import Recipe
from vitprune.reports.model_card import PICTURES, model_card
from vitprune.reports.page import ShownImages, report_page
from vitprune.reports.results import (
    Breakdown,
    Comparison,
    Latency,
    PointResult,
    Report,
    ScheduleSearch,
    Throughput,
    Training,
    TriedSchedule,
)
from vitprune.reports.run_report import shortfall
from vitprune.reports.token_pictures import SeenImage, as_png, draw_sheet
from vitprune.runs.inputs import RunInputs, flat, for_readers, moved, without_paths
from vitprune.runs.push import push
from vitprune.runs.resume import RunFolder, require_output, was_saved
from vitprune.runtime import distributed, signals
from vitprune.runtime.files import sibling, write_text_whole
from vitprune.runtime.hub_upload import require_rights

# different batches of the largest size that throughput is measured on
TIMED_BATCHES = 3
# images whose kept tokens trackers are shown
SHOWN = 8


Points = Sequence[tuple[float, Comparison]]
"""Budgets that a checkpoint has levels for, and what was found at each."""


def apply(recipe: Recipe, *, restart: bool = False) -> Report:
    """Prune, calibrate, fine-tune, compare and save, as the recipe says; return what was measured.

    An interrupted run is resumed, unless `restart`; what is finished isn't done again.

    Raises:
        ValueError: something in the recipe, its data or its checkpoint doesn't fit, or differs from what the run began
            with; names the place and the way out.
        NonFiniteLoss: fine-tuning broke off; the model from before is saved beside the output path.
        Terminated: by SIGTERM; the same call resumes.
    """
    output = Path(recipe.output.path).resolve()
    with signals.watch():
        _require_free(recipe, output)
        _require_rights(recipe)
        run = _Run.load(recipe)
        recipe = run.recipe
        require_room(output, run.pruned)
        with RunFolder.open(output, run.fingerprint, restart=restart) as folder:
            calibrated = training = None
            search = run.find_schedule(folder) if recipe.pruning.is_searched else None
            if recipe.budget.latency is not None and run.train is not None:
                run.measure_latency(folder)
            if recipe.pruning.is_calibrated:
                run.calibrate(folder)
            elif recipe.finetune is not None and recipe.pruning.select == "threshold":
                run.begin_at_budget(folder)
            if recipe.finetune is not None:
                calibrated = folder.once("calibrated", Comparison, run.compare)
                training = run.finetune(output, folder)
            if len(recipe.budget.points) > 1:
                run.find_points(folder)
            found = folder.once("comparison", tuple[Comparison, Breakdown], run.compare_closely)
            points = run.compare_points(found[0], folder.once)
            report = folder.once("report", Report, lambda: run.report(*found, points, calibrated, search, training))
            if run.is_main:
                run.save(report, output)
            folder.remove()
    if run.is_main and (repo := recipe.output.push_to_hub) is not None:
        _push(output, repo, private=recipe.output.private)
    return report


def _require_free(recipe: Recipe, output: Path) -> None:
    """Before anything is loaded. What the main process has written may be no obstacle to others that are late."""
    distributed.on_main(lambda: require_output(output, overwrite=recipe.output.overwrite))


def _require_rights(recipe: Recipe) -> None:
    """Better now than after hours."""
    repo = recipe.output.push_to_hub
    if repo is None:
        return
    try:
        distributed.on_main(lambda: require_rights(repo))
    except ValueError as error:
        raise RecipeError([Problem(("output", "push_to_hub"), str(error))]) from error


def _push(output: Path, repo: str, *, private: bool) -> None:
    try:
        push(output, repo, private=private)
    except (ValueError, OSError) as error:
        way_out = f"the checkpoint is in {output}; `vitprune push {output} {repo}` tries again"
        raise OSError(f"output.push_to_hub: {error}; {way_out}") from error


def evaluate(checkpoint: str, recipe: Recipe, output: Path) -> Report:
    """Compare a pruned checkpoint with the recipe's dense one on the recipe's images.

    The budget is the checkpoint's own, where its report says one. Writes report.json and report.html to the folder
    `output`.
    """
    run = _Run.load(recipe, pruned=checkpoint)
    found = run.compare_closely()
    report = run.report(*found, run.compare_points(found[0], lambda name, kind, compute: compute()))
    report = report.model_copy(update={"budget": _own_budget(checkpoint, report.budget)})
    if run.is_main:
        name = Path(checkpoint).name if Path(checkpoint).exists() else checkpoint
        page = report_page(report, name, run.show(report))
        output.mkdir(parents=True, exist_ok=True)
        report.save(output / "report.json")
        write_text_whole(output / "report.html", page)
    return report


def _own_budget(checkpoint: str, asked: float | None) -> float | None:
    """Of MACs, that a checkpoint was made for; `asked` where it doesn't say."""
    place = Path(checkpoint) / "report.json"
    try:
        own = Report.load(place) if place.is_file() else None
    except ValueError:  # of another version
        return asked
    return asked if own is None else own.budget


class _Run(RunInputs):
    """What is done with the inputs of one run."""

    def measure_latency(self, folder: RunFolder) -> None:
        """From here on the budget is one of time. Measured in the dtype that the model will have, on copies."""
        dtype = self.dtype
        answers = self.answers if self.pruned.dtype == dtype else copy.deepcopy(self.answers)
        for model in answers:
            moved(model.model, dtype)
        size = self.recipe.budget.timed_batch
        timed = self._timed(self.holdout or self.train, size)
        measure = partial(distributed.on_main, lambda: measure_latency(*answers, timed, size))
        budget_latency(self.pruned, folder.once("latency-table", CostTable, measure))

    def find_schedule(self, folder: RunFolder) -> ScheduleSearch:
        """Find stages, and levels for the budget, which is one of MACs here even where it will be one of time."""
        pruning = pruning_of(self.pruned)

        def found() -> dict[str, Any]:
            result = calibrate(self.pruned, self._calibration_batches, self._part, progress=self.is_main)
            tried = tuple(
                TriedSchedule(**asdict(one.schedule), ratio=one.ratio, distance=one.distance) for one in result.tried
            )
            search = ScheduleSearch(images=result.images, measure=result.measure, tried=tried)
            return {"levels": Levels.of(pruning).to_lists(), "search": search.model_dump(mode="json")}

        # one step: an interrupted run has both or neither
        kept = folder.once("schedule", dict[str, Any], lambda: distributed.on_main(found))
        Levels.from_lists(kept["levels"]).give(pruning)
        return ScheduleSearch.model_validate(kept["search"])

    def calibrate(self, folder: RunFolder) -> None:
        """Find levels for the budget; those that are there already are scaled, which keeps how stages share."""
        recipe, levels = self.recipe, pruning_of(self.pruned).levels
        is_scaled = recipe.pruning.select == "threshold" and bool(levels.isfinite().all())
        if recipe.pruning.is_searched and recipe.budget.latency is None:
            return
        adjust = partial(scale_to_budget, must_meet=recipe.budget.latency is None) if is_scaled else calibrate
        settle = partial(adjust, self.pruned, self._calibration_batches, self._part, progress=self.is_main)
        # where training only starts from needn't be met in time
        met = settle if recipe.finetune is not None else self._until_met(settle)
        self._settle(folder, "calibration", met)

    def begin_at_budget(self, folder: RunFolder) -> None:
        """Scale given thresholds, so that what training makes of them can be compared with what it began with."""
        scale = partial(scale_to_budget, self.pruned, self._calibration_batches, self._part, progress=self.is_main)
        # before hours of training at another budget
        self._settle(folder, "start", partial(scale, must_meet=self.recipe.budget.latency is None))

    @property
    def _part(self) -> float:
        return self.recipe.budget.strictest

    @property
    def _calibration_batches(self) -> list[Tensor]:
        spec = self.recipe.calibration
        assert self.train is not None
        return self._batches(self.train.sample(spec.images, self.recipe.seed), spec.batch_size)

    def finetune(self, output: Path, folder: RunFolder) -> Training | None:
        """Fine-tune and scales the thresholds to the budget on images held out; where nothing was gained they stay."""
        recipe = self.recipe
        assert recipe.finetune is not None
        assert self.train is not None
        assert self.holdout is not None
        budget = self._part
        try:
            dense, pruned = self.answers
            states = States.of(recipe.finetune, folder.path)
            tracker_context = self._tracker_context(output) if recipe.finetune.trackers else None
            history = finetune(
                pruned,
                dense,
                self.train,
                recipe.finetune,
                budget,
                holdout=self.holdout,
                seed=recipe.seed,
                progress=self.is_main,
                states=states,
                tracker_context=tracker_context,
            )
        except NonFiniteLoss as error:
            rescued = sibling(output, "last-good")
            if self.is_main:
                save(self.pruned, rescued, processor=self.processor, tokenizer=self.tokenizer, overwrite=True)
            raise NonFiniteLoss(f"{error}; the last good model is in {rescued}") from error
        moved(self.pruned, self.dtype)
        moved(self.dense, self.dtype)
        training = history.training
        # what was calibrated meets a budget of MACs already; one of time was not measured yet
        is_met = training is not None and not training.kept_step and recipe.budget.latency is None
        if recipe.pruning.select == "threshold" and not is_met:
            batches = self._batches(self.holdout, recipe.calibration.batch_size)
            scale = partial(scale_to_budget, self.pruned, batches, budget, progress=self.is_main)
            self._settle(folder, "thresholds", self._until_met(scale))
        return training

    def _tracker_context(self, output: Path) -> TrackerContext:
        assert self.holdout is not None
        settings = flat(self.recipe.model_dump(mode="json"))
        samples = self.holdout.sample(SHOWN, self.recipe.seed).pixels()
        return TrackerContext(sibling(output, "logs"), output.name, settings, samples, *pixel_scale(self.processor))

    def _until_met(self, settle: Callable[[], object]) -> Callable[[], object]:
        """Settles on levels for the budget; where it is one of time, until that is what is measured."""
        asked = self.recipe.budget.latency
        if asked is None:
            return settle
        size, repeats = self.recipe.budget.timed_batch, self.recipe.evaluate.repeats
        images = self._timed(self.holdout or self.train, size)
        return partial(meet_latency, *self.answers, images, asked, size, settle, repeats=repeats)

    def _settle(self, folder: RunFolder, stage: str, settle: Callable[[], object]) -> None:
        """The main process settles on levels, and all have those."""
        pruning = pruning_of(self.pruned)

        def found() -> dict[str, Any]:
            settle()
            return Levels.of(pruning).to_lists()

        lists = folder.once(stage, dict[str, Any], lambda: distributed.on_main(found))
        Levels.from_lists(lists).give(pruning)

    def _timed(self, images: Images | None, batch_size: int) -> Tensor:
        """Images by chance, for several different batches of a size."""
        assert images is not None
        return images.sample(TIMED_BATCHES * batch_size, self.recipe.seed).pixels()

    def save(self, report: Report, output: Path) -> None:
        images = self.show(report)
        shown = ((*images.easiest, *images.hardest), images.apart)
        sheets = dict(zip(PICTURES.items(), shown, strict=True))
        drawn = {file: as_png(draw_sheet(some)) for (_, file), some in sheets.items() if some}
        captions = {caption: file for caption, file in PICTURES.items() if file in drawn}
        name = self.recipe.output.push_to_hub or output.name
        files = {
            "recipe.yaml": _with_versions(self.recipe, report),
            "report.json": report.model_dump_json(indent=2, by_alias=True) + "\n",
            "report.html": report_page(report, name, images),
            "README.md": model_card(report, name, captions),
            **drawn,
        }
        overwrite = self.recipe.output.overwrite or was_saved(output)
        save(
            self.pruned,
            output,
            processor=self.processor,
            tokenizer=self.tokenizer,
            files=files,
            overwrite=overwrite,
        )

    def compare(self) -> Comparison:
        return self.compare_closely()[0]

    def compare_closely(self) -> tuple[Comparison, Breakdown]:
        return compare_closely(*self.answers, self.eval, self.recipe.evaluate, progress=self.is_main)

    def find_points(self, folder: RunFolder) -> None:
        """Find levels for each budget, on images that nothing was trained on where something was."""
        batch_size = self.recipe.calibration.batch_size
        batches = self._calibration_batches if self.holdout is None else self._batches(self.holdout, batch_size)
        find = partial(find_points, self.pruned, batches, self.recipe.budget.points, progress=self.is_main)
        self._settle(folder, "points", find)

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
            created=datetime.now(timezone.utc),
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
        images = self._timed(self.eval, max(spec.batch_sizes))
        return distributed.on_main(
            lambda: tuple(measure_throughput(*self.answers, images, spec.batch_sizes, spec.repeats))
        )

    def _check_latency(self) -> Latency | None:
        asked, size = self.recipe.budget.latency, self.recipe.budget.timed_batch
        if asked is None:
            return None
        images = self._timed(self.eval, size)
        repeats = self.recipe.evaluate.repeats
        return distributed.on_main(lambda: check_latency(*self.answers, images, asked, size, repeats))

    def _batches(self, images: Images, batch_size: int) -> list[Tensor]:
        device, dtype = self.pruned.device, self.pruned.dtype
        return [batch["pixel_values"].to(device, dtype) for batch in images.loader(batch_size)]


def _with_versions(recipe: Recipe, report: Report) -> str:
    made_with: Mapping[str, str] = report.environment.model_dump()
    versions = ", ".join(f"{name} {made_with[name]}" for name in ("vitprune", "torch", "transformers", "python"))
    return f"# made with {versions}\n{recipe.to_yaml()}"
