"""Fine-tuning on Accelerate: a pruned model learns at its budget, from a table or a stream of images.

Knows how long training lasts and what is kept of it on the way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from vitprune.budget.calibration import require_budget
from vitprune.data.images import Images
from vitprune.data.training_batches import Position, Share, TrainingBatches
from vitprune.finetuning.held_out import HeldOut
from vitprune.finetuning.losses import NonFiniteLoss as NonFiniteLoss
from vitprune.finetuning.optimization import build_optimizer
from vitprune.finetuning.state import Progress, States
from vitprune.finetuning.step import TrainStep
from vitprune.finetuning.student import State, copied, trained
from vitprune.finetuning.thresholds import ThresholdTraining
from vitprune.finetuning.tracking import TrackerContext, Tracking, require_installed
from vitprune.measure.memory import is_out_of_memory
from vitprune.models.detection import find_backbone
from vitprune.models.module import pruning_of
from vitprune.models.outputs import ImageModel, require_same_kind
from vitprune.pruning.packed_attention import require_no_dropout
from vitprune.recipe.schema import FinetuneSpec, require_thresholds
from vitprune.reports.results import Check, Training
from vitprune.runtime import distributed
from vitprune.runtime.signals import Terminated, deferred

# as models of transformers have it in their configuration
_ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout")


@dataclass
class History:
    """Steps in all, and one entry for each that was done here: `step.TrainStep` says what is in it; and `lr`.

    training: what held-out images said; None where there were none.
    """

    steps: int = 0
    records: list[dict[str, float]] = field(default_factory=list)
    training: Training | None = None


@contextmanager
def _settings_given_back() -> Iterator[None]:
    """Accelerate's settings are the process's: where there were none before, the next training may have its own."""
    had_none = not AcceleratorState._shared_state
    try:
        yield
    finally:
        if had_none:
            AcceleratorState._reset_state()


@_settings_given_back()
def finetune(
    model: PreTrainedModel | ImageModel,
    teacher: PreTrainedModel | ImageModel,
    images: Images,
    spec: FinetuneSpec,
    budget: float,
    *,
    holdout: Images | None = None,
    seed: int = 0,
    progress: bool = True,
    states: States | None = None,
    tracker_context: TrackerContext | None = None,
) -> History:
    """Fine-tunes a pruned model at a compute budget, in place.

    While weights learn, a common factor on the thresholds holds the budget; they learn, too, where `spec.thresholds`
    says so.

    Under a launcher each process takes its share of every batch; all end with the same weights, those of one process
    but for rounding.

    teacher: the dense model; frozen, for the distillation loss: of logits, or of embeddings (cosine) where the model
        has no classes. images: labelled or not (then the task loss is left out). budget: MACs of the pruned pass ÷
        dense, in (0, 1]; seconds where the model has a latency table (`latency.budget_latency`). holdout: images by
        which the best state is chosen, the one before training included; without them it is the last. states: where the
        full state is kept every so often, and taken up again if there is one.
        tracker_context: what `spec.trackers` are given.

    Raises:
        ValueError: no images for a single batch, no loss that could teach the task, thresholds without a start, a
            batch that the processes can't share evenly, a budget out of range, or a teacher that the model isn't made
            of, as their answers tell.
        OSError: a state can't be written; those before it are there.
        Terminated: inside `signals.watch`, after SIGTERM; the state was kept.
        NonFiniteLoss: names the step; the model has its weights from up to `step.SNAPSHOT_STEPS` steps before.
    """
    answers, taught_by = ImageModel.of(model), ImageModel.of(teacher)
    model = answers.model
    require_budget(budget)
    if taught_by.model is model:
        raise ValueError("the teacher is the model itself; pass the dense model, or a copy of it from before prune_")
    require_same_kind(answers, taught_by)
    require_thresholds(pruning_of(model).spec, spec)
    require_trainable(images, spec, model, has_classes=answers.is_classifier)
    if not pruning_of(model).levels.isfinite().all():
        raise ValueError("thresholds have no start to learn from; call calibrate first, or give them in the spec")
    state = distributed.init()
    accelerator = _accelerator(spec, tracker_context)
    torch.manual_seed(seed + state.process_index)
    share = Share(state.process_index, state.num_processes)
    batches = TrainingBatches(images, spec.batch_size, seed, spec.augmentation, share)
    steps = count_steps(spec, images)
    thresholds = ThresholdTraining.of(pruning_of(model), spec.thresholds, budget)
    with trained(answers, taught_by, spec, accelerator, thresholds) as ours:
        student = ours.student
        optimizer = build_optimizer(student.answers.model, spec)
        if (plugin := accelerator.state.deepspeed_plugin) is not None:
            # which DeepSpeed would otherwise read off a loader of its own
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = spec.batch_size // state.num_processes
        prepared, optimizer = accelerator.prepare(student, optimizer)
        scheduler = get_cosine_schedule_with_warmup(optimizer.optimizer, math.ceil(spec.warmup * steps), steps)
        accelerator.register_for_checkpointing(scheduler)
        stages = pruning_of(model).before_blocks
        update = TrainStep(accelerator, prepared, taught_by, optimizer, spec, thresholds, stages, images.stand_in())
        at_a_time = spec.batch_size // state.num_processes
        held_out = None if holdout is None else HeldOut(holdout, at_a_time, stages, budget)
        tracking = _tracking(accelerator, prepared, thresholds, spec, tracker_context)
        loop = _Loop(accelerator, update, scheduler, batches, states, tracking, held_out, ours.whole_weights)
        loop.resume()
        try:
            loop.run(steps, progress=progress and state.is_main_process)
        except NonFiniteLoss:
            if update.good_weights:  # none yet: nothing has changed either
                accelerator.unwrap_model(prepared).load_state_dict(update.good_weights)
                thresholds.log_factor = update.good_factor
            raise
        if held_out is not None and held_out.checks and held_out.kept_step != loop.step:
            ours.go_back(held_out.best)
    return History(loop.step, loop.records, loop.training)


@dataclass
class _Loop:
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
            if best is not None:
                assert progress.best_factor is not None
                self.held_out.best = State(best, progress.best_factor)

    def run(self, steps: int, *, progress: bool) -> None:
        """Raises Terminated after keeping the state, where SIGTERM came."""
        with (
            tqdm(total=steps, initial=self.step, desc="fine-tuning", unit="step", disable=not progress) as bar,
            deferred() as notice,
            self._tracked() as tracking,
        ):
            if self.step == 0:
                self._check(bar)
            while self.step < steps:
                record = self._next_record()
                bar.update()
                check = self._check(bar) if self._is_check(steps) else None
                bar.set_postfix_str(_summary(record))
                if tracking is not None:
                    tracking.log_step(record, self._rates(), self.step, check)
                    if self.step % self._epoch(steps) == 0 or self.step == steps:
                        tracking.log_images(self.step)
                due, told = self._agreed(self.states is not None and self.states.is_due(self.step), notice.received)
                if self.states is not None and (due or told or self.step == steps):
                    self.states.save(self.accelerator, self._progress(), best=self._best_weights())
                if told:
                    raise Terminated

    def _rates(self) -> dict[str, float]:
        groups = self.scheduler.optimizer.param_groups
        return {group["name"]: float(group["lr"]) for group in groups}

    def _is_check(self, steps: int) -> bool:
        """Whether a check is due: `checks` of them, the last behind the last step."""
        checks = self.update.spec.checks
        return self.step * checks // steps > (self.step - 1) * checks // steps

    def _check(self, bar: tqdm) -> Check | None:
        """Looks at the held-out images, and keeps the state if it is the best."""
        held = self.held_out
        if held is None:
            return None
        bar.set_postfix_str("looking at held-out images")
        began = time.perf_counter()
        with self._clear_of_memory():
            is_best = held.look(self.update, self.step)
        if is_best and self.step:
            held.best = State(copied(self.whole_weights()), self.update.thresholds.log_factor)
        if self.tracking is not None:
            self.tracking.leave_out(time.perf_counter() - began)
        return held.checks[-1] if held.checks else None

    def _progress(self) -> Progress:
        held = self.held_out
        checks = () if held is None else tuple(check.model_dump(mode="json") for check in held.checks)
        factor = None if held is None or held.best is None else held.best.log_factor
        images, first = (0, ()) if held is None else (held.count, held.first)
        return Progress(
            self.step,
            self.batches.position,
            self.update.thresholds.log_factor,
            held_out=images,
            first=first,
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
        record = None
        while record is None:
            parts = [next(self.batches) for _ in range(self.update.spec.gradient_accumulation_steps)]
            with self._clear_of_memory():
                record = self.update(parts, self.step)
            if record is None:
                _require_some(self.batches.position, self.update.spec.images_per_step)
                self.batches.begin_epoch()
        record["lr"] = float(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        self.step += 1
        self.records.append(record)
        return record

    @contextmanager
    def _clear_of_memory(self) -> Iterator[None]:
        """Says what takes less memory where it runs out."""
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


def _tracking(
    accelerator: Accelerator,
    student: nn.Module,
    thresholds: ThresholdTraining,
    spec: FinetuneSpec,
    tracker_context: TrackerContext | None,
) -> Tracking | None:
    if not spec.trackers:
        return None
    if tracker_context is None:
        raise ValueError(f"finetune.trackers are {list(spec.trackers)}; pass finetune() a tracker_context for them")
    return Tracking(accelerator, student, thresholds, tracker_context, spec.images_per_step)


def _accelerator(spec: FinetuneSpec, tracker_context: TrackerContext | None) -> Accelerator:
    return Accelerator(
        log_with=list(spec.trackers) or None,
        project_dir=None if tracker_context is None else str(tracker_context.folder),
        mixed_precision=spec.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=spec.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        # some checkpoints have weights that classification doesn't use, such as mask tokens
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def require_trainable(images: Images, spec: FinetuneSpec, model: PreTrainedModel, *, has_classes: bool) -> None:
    """Raises ValueError where images, losses and model don't go together; to be asked before anything is run."""
    if spec.execution == "packed":
        require_no_dropout(max(getattr(find_backbone(model).config, name, 0.0) or 0.0 for name in _ATTENTION_DROPOUTS))
    count_steps(spec, images)
    require_installed(spec.trackers)
    if not spec.losses.distillation and not (images.labelled and has_classes):
        lacking = "images without labels need" if has_classes else "a model without classes needs"
        raise ValueError(f"finetune.losses: {lacking} losses.distillation > 0")


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


def _require_some(position: Position, images_per_step: int) -> None:
    if position.images <= images_per_step:
        raise ValueError("data.train: the stream has no images to fine-tune with")


def count_steps(spec: FinetuneSpec, images: Images) -> int:
    """Optimizer steps in all. Raises ValueError where that can't be told."""
    if spec.steps is not None:
        return spec.steps
    if images.length is None:
        raise ValueError("finetune.steps: needed with data.streaming, as this stream doesn't tell how long an epoch is")
    steps = math.ceil(spec.epochs * images.length / spec.images_per_step)
    if steps < 1:
        raise ValueError("data.train: there are no images left to fine-tune with")
    return steps


def _summary(record: dict[str, float]) -> str:
    return f"loss {record['loss']:.3f}, ratio {record['ratio']:.1%}, kept {record['kept']:.1%}, lr {record['lr']:.1e}"
