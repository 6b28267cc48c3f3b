"""What pruning gains on this machine: `bench`, a sweep over image sizes, dtypes, modes, batch sizes and MACs.

A case that can't be measured is listed with its reason, and the rest goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from vitprune.bench.exported import bench_exported
from vitprune.bench.images import RANDOM_PIXELS, BenchImages, random_images, real_images, require_square
from vitprune.bench.inference import Lineup
from vitprune.bench.settings import TARGETS, BenchSettings
from vitprune.bench.subjects import BenchSubjects, Levels
from vitprune.bench.training import measure_training
from vitprune.exporting.exported import folder_of
from vitprune.measure.memory import is_out_of_memory
from vitprune.measure.throughput import describe_environment
from vitprune.measure.timing import PlacedBatches
from vitprune.models.structure import examine, require_images
from vitprune.recipe.errors import concerning, first_line
from vitprune.recipe.for_readers import for_readers
from vitprune.reports.bench_results import Benchmark, Case, Failure, Setting, TrainingStep
from vitprune.reports.results import Environment
from vitprune.reports.text import asked_for
from vitprune.runtime import distributed
from vitprune.runtime.files import require_writable
from vitprune.runtime.progress import Task, task

BENCH_JSON = "bench.json"
FEWEST_TIMED = 48  # images, so that small batches are different ones

_NOISE = (
    "The images are random pixels. How many tokens stay, and so how fast a pruned model is, depends on the images: "
    "name real ones with --data, or in a recipe, for figures that mean something."
)
_FIRST_SCHEDULE = (
    "With before_blocks: auto it was measured where the search of `vitprune apply` begins; for other stages name "
    "blocks, or a checkpoint that `apply` wrote."
)
_OTHER_SIZE = (
    "At {size} px the checkpoint's own thresholds are used, which were found on images of {patches} patches; its ratio "
    "of MACs there is in the table."
)
_NO_LOOPS = "Without numba stages take several times as long on a CPU: pip install 'vitprune[cpu]'."


def bench(settings: BenchSettings, *, output: Path | None = None, progress: bool = True) -> Benchmark:
    """Measure what the settings ask for; what can't be measured comes back as a `Failure`.

    output: a folder; `bench.json` in it is written anew after each case, so that a broken run keeps what it has.

    Raises ValueError for a checkpoint, data or image size that can't be had; names the place and the way out.
    """
    if output is not None:
        require_writable(output)
    folder = folder_of(settings.recipe.model.checkpoint)
    if folder is not None:
        found = bench_exported(folder, settings, FEWEST_TIMED, progress=progress)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            found.save(output / BENCH_JSON)
        return found
    sweep = _Sweep.start(settings, output)
    with task("measuring", total=sweep.steps, unit="step", steady=True, shown=progress) as sweep.task:
        for dtype in sweep.dtypes:
            sweep.run(dtype)
    return sweep.benchmark()


@dataclass
class _Sweep:
    """What is measured with, and what has been measured so far."""

    settings: BenchSettings
    dtypes: tuple[str, ...]
    device: torch.device
    images: BenchImages
    targets: tuple[float, ...]
    environment: Environment
    pruning: dict[str, object]
    output: Path | None
    steps: int
    task: Task | None = None
    cases: list[Case] = field(default_factory=list)
    training: list[TrainingStep] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    other_sizes: dict[int, int] = field(default_factory=dict)

    @classmethod
    def start(cls, settings: BenchSettings, output: Path | None) -> _Sweep:
        """Load model and images once, to know what there is to do."""
        recipe, device = settings.recipe, _device()
        dtypes = settings.dtypes or (recipe.model.dtype,)
        subjects = BenchSubjects.load(recipe, getattr(torch, dtypes[0]), device)
        with concerning("model", "checkpoint"):
            require_images(recipe.model.checkpoint, examine(subjects.dense))
        for size in settings.image_sizes:  # better now than after an hour
            subjects.at(size)
        timed = max(FEWEST_TIMED, *settings.batch_sizes)
        if settings.random_pixels:
            images = random_images(recipe, subjects.dense, settings.calibration_images, timed)
        else:
            images = real_images(recipe, settings.calibration_images, timed)
        if not settings.image_sizes:
            require_square(images)
        targets = settings.targets
        if targets is None:
            targets = TARGETS if subjects.own is None else ()
        if targets or settings.training:  # better now, too
            images.calibration(None)
        modes, sizes = len(settings.modes), max(1, len(settings.image_sizes))
        each = len(targets) + modes * len(settings.batch_sizes) + settings.training
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
        return cls(
            settings=settings,
            dtypes=dtypes,
            device=device,
            images=images,
            targets=targets,
            environment=describe_environment(subjects.dense).model_copy(update={"dtype": ", ".join(dtypes)}),
            pruning=subjects.spec.model_dump(mode="json"),
            output=output,
            steps=each * sizes * len(dtypes),
        )

    def benchmark(self) -> Benchmark:
        return Benchmark(
            created=datetime.now(UTC),
            environment=self.environment,
            checkpoint=for_readers(self.settings.recipe)["model"]["checkpoint"],
            pruning=self.pruning,
            images=self.images.described,
            repeats=self.settings.repeats,
            cases=tuple(self.cases),
            training=tuple(self.training),
            failures=tuple(self.failures),
            notes=tuple(self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        if self.images.described == RANDOM_PIXELS:
            yield _NOISE
        if self.pruning["before_blocks"] == "auto":
            yield _FIRST_SCHEDULE
        for size, patches in self.other_sizes.items():
            yield _OTHER_SIZE.format(size=size, patches=patches)
        if self.environment.device == "cpu" and self.environment.numba is None:
            yield _NO_LOOPS

    def run(self, dtype: str) -> None:
        """All image sizes of a dtype, one after the other."""
        subjects = BenchSubjects.load(self.settings.recipe, getattr(torch, dtype), self.device)
        for size in self.settings.image_sizes or (self.images.size,):
            setting, sized = Setting(image_size=size, dtype=dtype), subjects.at(size)
            levels = self._levels(sized, setting)
            if levels:
                self._infer(sized, setting, levels)
                if self.settings.training:
                    self._train(setting, levels)

    def _levels(self, subjects: BenchSubjects, setting: Setting) -> dict[float | None, Levels]:
        """The model's own, and calibrated ones for each target that can be reached."""
        levels: dict[float | None, Levels] = {} if subjects.own is None else {None: subjects.own}
        found_at = None if subjects.own is None else subjects.own.patches
        if found_at is not None and subjects.patches(setting.image_size) != found_at:
            self.other_sizes.setdefault(setting.image_size, found_at)
        if not self.targets:
            return levels
        images = self.images.calibration(setting.image_size)
        batches = list(PlacedBatches(images.split(self.settings.recipe.calibration.batch_size), subjects.dense))
        for target in self.targets:
            with self._step(setting, f"calibration to {asked_for(target)}", target=target, also=ValueError):
                levels[target] = subjects.calibrated(batches, target)
        return levels

    def _infer(self, subjects: BenchSubjects, setting: Setting, levels: Mapping[float | None, Levels]) -> None:
        eager = Lineup.of(subjects, levels, setting, self.images.timed(setting.image_size))
        lineups = {"eager": lambda: eager, "compiled": lambda: eager.compiled(subjects, levels)}
        for mode in self.settings.modes:
            found = setting.model_copy(update={"mode": mode})
            # what torch.compile can't do is a finding too
            also = None if mode == "eager" else Exception
            lineup: Lineup | None = None
            for batch_size in sorted(self.settings.batch_sizes):
                with self._step(found, "inference", batch_size=batch_size, also=also):
                    lineup = lineup or lineups[mode]()
                    self.cases += lineup.measure(batch_size, self.settings.repeats)
            if mode == "compiled":
                torch.compiler.reset()

    def _train(self, setting: Setting, levels: Mapping[float | None, Levels]) -> None:
        """Weights are trained in float32, whatever is computed in beside it."""
        settings = self.settings
        with self._step(setting, "a step of fine-tuning", batch_size=settings.training_batch_size, also=ValueError):
            subjects = BenchSubjects.load(settings.recipe, torch.float32, self.device).at(setting.image_size)
            images = self.images.calibration(setting.image_size)
            self.training += measure_training(
                subjects, levels, setting, images, settings.training_batch_size, settings.repeats
            )

    @contextmanager
    def _step(
        self,
        setting: Setting,
        what: str,
        *,
        batch_size: int | None = None,
        target: float | None = None,
        also: type[Exception] | None = None,
    ) -> Iterator[None]:
        """One step of the sweep; running out of memory, and errors that are `also` expected, become a `Failure`."""
        size = "" if batch_size is None else f", batch size {batch_size}"
        assert self.task is not None
        self.task.note(f"{setting.image_size} px, {setting.dtype}, {setting.mode}, {what}{size}")
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error) and (also is None or not isinstance(error, also)):
                raise
            failure = Failure(
                **setting.model_dump(), batch_size=batch_size, target=target, what=what, reason=first_line(error)
            )
            self.failures.append(failure)
        if self.device.type == "cuda":  # what a case that ran out of memory leaves behind would be the next one's lack
            torch.cuda.empty_cache()
        self.task.advance()
        if self.output is not None:
            self.benchmark().save(self.output / BENCH_JSON)


def _device() -> torch.device:
    """The same that `apply` runs on."""
    device = distributed.init().device
    assert device is not None
    return device
