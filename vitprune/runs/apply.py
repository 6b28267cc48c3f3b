"""A recipe becomes a compressed checkpoint: `apply`, read from top to bottom."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitprune.budget.calibration import calibrate, scale_to_budget
from vitprune.budget.latency import budget_latency, meet_latency
from vitprune.budget.latency_measurement import measure_latency
from vitprune.budget.latency_table import CostTable
from vitprune.budget.points import find_points
from vitprune.data.augmentation import pixel_scale
from vitprune.data.images import Images
from vitprune.finetuning.finetune import NonFiniteLoss, finetune
from vitprune.finetuning.state import States
from vitprune.finetuning.tracking import TrackerContext
from vitprune.models.checkpoint import require_room, save
from vitprune.models.module import Levels, pruning_of
from vitprune.recipe.errors import concerning
from vitprune.recipe.schema import Recipe, as_recipe
from vitprune.reports.model_card import PICTURES, model_card
from vitprune.reports.page import report_page
from vitprune.reports.results import (
    REPORT_JSON,
    Breakdown,
    Comparison,
    Report,
    ScheduleSearch,
    Training,
    TriedSchedule,
)
from vitprune.reports.token_pictures import as_png, draw_sheet
from vitprune.runs.evaluate import Evaluation
from vitprune.runs.inputs import flat, moved
from vitprune.runs.push import push
from vitprune.runs.resume import RunFolder, require_output, was_saved
from vitprune.runtime import distributed, signals
from vitprune.runtime.files import sibling
from vitprune.runtime.hub_upload import require_rights

# images whose kept tokens trackers are shown
SHOWN = 8


def apply(recipe: Recipe | str | Path, *, restart: bool = False) -> Report:
    """Prune, calibrate, fine-tune, compare and save, as the recipe says; return what was measured.

    recipe: a file, or what `load_recipe` makes of it. An interrupted run is resumed, unless `restart`; what is finished
    isn't done again.

    Raises:
        ValueError: something in the recipe, its data or its checkpoint doesn't fit, or differs from what the run began
            with; names the place and the way out.
        NonFiniteLoss: fine-tuning broke off; the model from before is saved beside the output path.
        Terminated: by SIGTERM; the same call resumes.
    """
    recipe = as_recipe(recipe)
    output = Path(recipe.output.path).resolve()
    with signals.watch():
        _require_free(recipe, output)
        _require_rights(recipe)
        run = _Run.load(recipe)
        recipe = run.recipe
        with concerning("output", "path"):
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
                calibrated = run.compare_calibrated(folder)
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
    with concerning("output", "path"):
        distributed.on_main(lambda: require_output(output, overwrite=recipe.output.overwrite))


def _require_rights(recipe: Recipe) -> None:
    """Better now than after hours."""
    repo = recipe.output.push_to_hub
    if repo is None:
        return
    with concerning("output", "push_to_hub"):
        distributed.on_main(lambda: require_rights(repo))


def _push(output: Path, repo: str, *, private: bool) -> None:
    try:
        push(output, repo, private=private)
    except (ValueError, OSError) as error:
        way_out = f"the checkpoint is in {output}; `vitprune push {output} {repo}` tries again"
        raise OSError(f"output.push_to_hub: {error}; {way_out}") from error


class _Run(Evaluation):
    """What is done with the inputs of one run."""

    def measure_latency(self, folder: RunFolder) -> None:
        """From here on the budget is one of time. Measured in the dtype that the model will have, on copies."""
        dtype = self.dtype
        answers = self.answers if self.pruned.dtype == dtype else copy.deepcopy(self.answers)
        for model in answers:
            moved(model.model, dtype)
        size = self.recipe.budget.timed_batch
        timed = self.timed_images(self.holdout or self.train, size)
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

        def meet() -> None:
            settle = partial(adjust, self.pruned, self._calibration_batches, self._part, progress=self.is_main)
            # where training only starts from needn't be met in time
            settle() if recipe.finetune is not None else self._meet(settle)

        self._settle(folder, "calibration", meet)

    def begin_at_budget(self, folder: RunFolder) -> None:
        """Scale given thresholds, so that what training makes of them can be compared with what it began with."""
        must_meet = self.recipe.budget.latency is None  # before hours of training at another budget

        def scale() -> None:
            batches = self._calibration_batches
            scale_to_budget(self.pruned, batches, self._part, progress=self.is_main, must_meet=must_meet)

        self._settle(folder, "start", scale)

    def compare_calibrated(self, folder: RunFolder) -> Comparison:
        """Compare what training starts from, at the budget that the checkpoint will come with."""
        recipe, pruning = self.recipe, pruning_of(self.pruned)
        if recipe.budget.part == self._part:
            return folder.once("calibrated", Comparison, self.compare)
        strictest = Levels.of(pruning)

        def settle() -> None:
            self._adjust(self.pruned, self._calibration_batches, recipe.budget.part, progress=self.is_main)

        self._settle(folder, "calibrated-levels", settle)
        found = folder.once("calibrated", Comparison, self.compare)
        strictest.give(pruning)
        return found

    @property
    def _adjust(self) -> Callable[..., object]:
        """What takes levels that were found to another budget."""
        return scale_to_budget if self.recipe.pruning.select == "threshold" else calibrate

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
        # what was calibrated meets a budget of MACs already, in float32; one of time was not measured yet
        is_back = training is not None and not training.kept_step
        is_met = is_back and recipe.budget.latency is None and self.dtype == torch.float32
        by_thresholds = recipe.pruning.select == "threshold"
        by_counts = recipe.pruning.is_calibrated and recipe.budget.latency is not None
        if (by_thresholds or by_counts) and not is_met:
            holdout = self.holdout

            def meet() -> None:
                batches = self._batches(holdout, recipe.calibration.batch_size)
                self._meet(partial(self._adjust, self.pruned, batches, budget, progress=self.is_main))

            self._settle(folder, "thresholds", meet)
        return training

    def _tracker_context(self, output: Path) -> TrackerContext:
        assert self.holdout is not None
        settings = flat(self.recipe.model_dump(mode="json"))
        samples = self.holdout.sample(SHOWN, self.recipe.seed).pixels()
        return TrackerContext(sibling(output, "logs"), output.name, settings, samples, *pixel_scale(self.processor))

    def _meet(self, settle: Callable[[], object]) -> None:
        """Settle on levels for the budget; where it is one of time, until that is what is measured."""
        asked = self.recipe.budget.latency
        if asked is None:
            settle()
            return
        size, repeats = self.recipe.budget.timed_batch, self.recipe.evaluate.repeats
        images = self.timed_images(self.holdout or self.train, size)
        meet_latency(*self.answers, images, asked, size, settle, repeats=repeats)

    def _settle(self, folder: RunFolder, stage: str, settle: Callable[[], object]) -> None:
        """The main process settles on levels, and all have those."""
        pruning = pruning_of(self.pruned)

        def found() -> dict[str, Any]:
            settle()
            table = pruning.latency  # which measuring corrects
            factor = table.factor if isinstance(table, CostTable) else None
            return {**Levels.of(pruning).to_lists(), "latency_factor": factor}

        lists = folder.once(stage, dict[str, Any], lambda: distributed.on_main(found))
        Levels.from_lists(lists).give(pruning)
        if isinstance(pruning.latency, CostTable) and (factor := lists.get("latency_factor")) is not None:
            budget_latency(self.pruned, replace(pruning.latency, factor=factor))

    def save(self, report: Report, output: Path) -> None:
        images = self.show(report)
        shown = ((*images.easiest, *images.hardest), images.apart)
        sheets = dict(zip(PICTURES.items(), shown, strict=True))
        drawn = {file: as_png(draw_sheet(some)) for (_, file), some in sheets.items() if some}
        captions = {caption: file for caption, file in PICTURES.items() if file in drawn}
        name = self.recipe.output.push_to_hub or output.name
        files = {
            "recipe.yaml": _with_versions(self.recipe, report),
            REPORT_JSON: report.model_dump_json(indent=2, by_alias=True) + "\n",
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

    def find_points(self, folder: RunFolder) -> None:
        """Find levels for each budget, on images that nothing was trained on where something was."""
        holdout, batch_size = self.holdout, self.recipe.calibration.batch_size

        def find() -> None:
            batches = self._calibration_batches if holdout is None else self._batches(holdout, batch_size)
            find_points(self.pruned, batches, self.recipe.budget.points, progress=self.is_main)

        self._settle(folder, "points", find)

    def _batches(self, images: Images, batch_size: int) -> list[Tensor]:
        device, dtype = self.pruned.device, self.pruned.dtype
        return [batch["pixel_values"].to(device, dtype) for batch in images.loader(batch_size)]


def _with_versions(recipe: Recipe, report: Report) -> str:
    made_with: Mapping[str, str] = report.environment.model_dump()
    versions = ", ".join(f"{name} {made_with[name]}" for name in ("vitprune", "torch", "transformers", "python"))
    return f"# made with {versions}\n{recipe.to_yaml()}"
