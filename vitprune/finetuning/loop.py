"""Step after step of a fine-tuning: its order, what is kept on the way, and what ends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from vitprune.data.training_batches import TrainingBatches
from vitprune.finetuning.held_out import HeldOut
from vitprune.finetuning.losses import NonFiniteLoss as NonFiniteLoss
from vitprune.finetuning.state import Progress, States
from vitprune.finetuning.step import TrainStep
from vitprune.finetuning.student import State, copied
from vitprune.finetuning.tracking import Tracking
from vitprune.measure.memory import is_out_of_memory
from vitprune.recipe.errors import RecipeError
from vitprune.recipe.schema import FinetuneSpec
from vitprune.reports.results import Check, Training
from vitprune.runtime import distributed
from vitprune.runtime.progress import Task, task
from vitprune.runtime.signals import Terminated, deferred


@dataclass
class Loop:
    """Step after step, keeping states on the way."""

    accelerator: Accelerator
    update: TrainStep
    scheduler: LRScheduler
    batches: TrainingBatches
    states: States | None
    tracking: Tracking | None
    held_out: HeldOut | None
    whole_weights: Callable[[], dict[str, Tensor]]
    step: int = 0
    records: list[dict[str, float]] = field(default_factory=list)

    @property
    def training(self) -> Training | None:
        held = self.held_out
        if held is None or not held.checks:
            return None
        return Training(steps=self.step, images=held.count, kept_step=held.kept_step, checks=tuple(held.checks))

    def resume(self) -> None:
        found = None if self.states is None else self.states.load(self.accelerator)
        if found is None:
            return
        progress, best = found
        self.step, self.batches.position = progress.steps, progress.position
        self.update.thresholds.log_factor = progress.log_factor
        if self.held_out is not None:
            self.held_out.checks = [Check.model_validate(check) for check in progress.checks]
            self.held_out.count, self.held_out.first = progress.held_out, progress.first
            self.held_out.log_factor = progress.held_out_factor
            self.held_out.sensitivity = progress.held_out_sensitivity or self.held_out.sensitivity
            if best is not None:
                assert progress.best_factor is not None
                self.held_out.best = State(best, progress.best_factor)

    def run(self, steps: int, *, progress: bool) -> None:
        """Raise Terminated after keeping the state, where SIGTERM came."""
        with (
            task("fine-tuning", total=steps, done=self.step, unit="step", shown=progress) as bar,
            deferred() as notice,
            self._tracked() as tracking,
        ):
            if self.step == 0:
                check = self._check(bar)
                if tracking is not None and check is not None:
                    tracking.log_check(check)
            while self.step < steps:
                rates = self._rates()
                record = self._next_record()
                bar.advance()
                check = self._check(bar) if self._is_check(steps) else None
                bar.note(_summary(record))
                if tracking is not None:
                    tracking.log_step(record, rates, self.step, check)
                    if self.step % self._epoch(steps) == 0 or self.step == steps:
                        tracking.log_images(self.step)
                due, told = self._agreed(self.states is not None and self.states.is_due(self.step), notice.received)
                if self.states is not None and (due or told or self.step == steps):
                    self.states.save(self.accelerator, self._progress(), best=self._best_weights())
                if told:
                    raise Terminated
            if self._agreed(False, notice.received)[1]:  # while the last state was written
                raise Terminated

    def _rates(self) -> dict[str, float]:
        groups = self.scheduler.optimizer.param_groups
        return {group["name"]: float(group["lr"]) for group in groups}

    def _is_check(self, steps: int) -> bool:
        """Whether a check is due: `checks` of them, the last behind the last step."""
        checks = self.update.spec.checks
        return self.step * checks // steps > (self.step - 1) * checks // steps

    def _check(self, bar: Task) -> Check | None:
        """Look at the held-out images, and keep the state if it is the best."""
        held = self.held_out
        if held is None:
            return None
        bar.note("looking at held-out images")
        began = time.perf_counter()
        with self._clear_of_memory():
            is_best = held.look(self.update, self.step)
        if is_best and self.step:
            thresholds = self.update.thresholds
            # thresholds that stay as they are were only compared with another factor
            factor = thresholds.log_factor + held.log_factor if thresholds.holds else 0.0
            held.best = State(copied(self.whole_weights()), factor)
        if self.tracking is not None:
            self.tracking.leave_out(time.perf_counter() - began)
        return held.checks[-1] if held.checks else None

    def _progress(self) -> Progress:
        held = self.held_out
        checks = () if held is None else tuple(check.model_dump(mode="json") for check in held.checks)
        factor = None if held is None or held.best is None else held.best.log_factor
        images, first = (0, ()) if held is None else (held.count, held.first)
        own, sensitivity = (0.0, 0.0) if held is None else (held.log_factor, held.sensitivity)
        return Progress(
            self.step,
            self.batches.position,
            self.update.thresholds.log_factor,
            held_out=images,
            first=first,
            held_out_factor=own,
            held_out_sensitivity=sensitivity,
            checks=checks,
            best_factor=factor,
        )

    def _best_weights(self) -> dict[str, Tensor] | None:
        return None if self.held_out is None or self.held_out.best is None else self.held_out.best.weights

    @contextmanager
    def _tracked(self) -> Iterator[Tracking | None]:
        if self.tracking is None:
            yield None
            return
        self.tracking.begin()
        try:
            yield self.tracking
        finally:
            self.tracking.end()

    def _epoch(self, steps: int) -> int:
        """Steps of an epoch; a tenth of all where that isn't known."""
        length = self.batches.images.length
        return max(1, steps // 10 if length is None else length // self.update.spec.images_per_step)

    def _next_record(self) -> dict[str, float]:
        record, passed = None, 0
        while record is None:
            parts = [next(self.batches) for _ in range(self.update.spec.gradient_accumulation_steps)]
            with self._clear_of_memory():
                record = self.update(parts, self.step)
            if record is None:  # none of the images can be read, or the epoch of a stream is over
                passed += self.update.spec.images_per_step
                self._go_on_behind(passed)
        record["lr"] = float(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        self.step += 1
        self.records.append(record)
        return record

    def _go_on_behind(self, passed: int) -> None:
        """A table's next images, or a stream's next epoch. passed: images since the last that could be read."""
        length, images_per_step = self.batches.images.length, self.update.spec.images_per_step
        if not self.batches.images.streamed:
            assert length is not None
            if passed >= length + images_per_step:
                raise RecipeError.at(("data", "train"), "none of the images left to fine-tune with can be read")
            return
        if not all(distributed.all_gather(self.batches.ended)):
            return
        if passed >= self.batches.position.images:
            raise RecipeError.at(("data", "train"), "the stream has no images to fine-tune with that can be read")
        self.batches.begin_epoch()

    @contextmanager
    def _clear_of_memory(self) -> Iterator[None]:
        """Say what takes less memory where it runs out."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise RuntimeError(_out_of_memory(self.update.spec, self.step, self.accelerator)) from error
            raise

    def _agreed(self, due: bool, told: bool) -> tuple[bool, bool]:
        """Whether a state is due, by the main process's clock, and whether any process got SIGTERM."""
        if self.accelerator.num_processes == 1:
            return due, told
        flags = torch.tensor([due and self.accelerator.is_main_process, told], dtype=torch.float32)
        summed: Any = self.accelerator.reduce(flags.to(self.accelerator.device), "sum")
        due, told = (summed > 0).tolist()
        return due, told


def _out_of_memory(spec: FinetuneSpec, step: int, accelerator: Accelerator) -> str:
    size, accumulation = spec.batch_size, spec.gradient_accumulation_steps
    halved = size // 2
    if size % 2 == 0 and halved % accelerator.num_processes == 0:
        less = f"finetune.batch_size={halved} with finetune.gradient_accumulation_steps={2 * accumulation}, or with "
    else:
        less = ""
    return (
        f"fine-tuning: memory ran out on {accelerator.device} at step {step + 1}, in batches of {size} over "
        f"{accelerator.num_processes} processes; the same training takes less with {less}"
        "finetune.gradient_checkpointing=true, and resumes from what was kept"
    )


def _summary(record: dict[str, float]) -> str:
    return f"loss {record['loss']:.3f}, ratio {record['ratio']:.1%}, kept {record['kept']:.1%}"
