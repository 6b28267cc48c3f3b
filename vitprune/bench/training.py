"""How long a step of fine-tuning takes, dense and pruned, and how much memory.

Such a step is teacher, student, losses, backward and optimizer; packed with thresholds that don't learn, masked, as
published, with such as do. The learning rate is 0, so that weights and thresholds stay and every step does the same
work.

Tensor suffixes: B images, C channels or classes, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from vitprune.bench.subjects import BenchSubjects, Levels, twin
from vitprune.finetuning.losses import answer_losses, budget_loss
from vitprune.measure.memory import peak_memory, require_memory
from vitprune.measure.timing import PlacedBatches, Runner, time_in_turn, whole_batches
from vitprune.models.module import is_pruned, pruning_of
from vitprune.models.outputs import ImageModel
from vitprune.models.trace import trace
from vitprune.recipe.schema import Execution, FinetuneSpec
from vitprune.reports.bench_results import Setting, TrainingStep

EXECUTIONS: tuple[Execution, ...] = ("packed", "masked")
"""How a pruned student can be trained."""
DENSE = "dense"
TASK = FinetuneSpec()


@dataclass
class Step:
    """One step on a batch: forward of teacher and student, backward, optimizer. ratios: MACs, one entry a step."""

    student: ImageModel
    teacher: ImageModel
    optimizer: Optimizer
    autocast: torch.dtype
    target: float | None = None
    ratios: list[Tensor] = field(default_factory=list)

    def __call__(self, x_BCHW: Tensor) -> None:
        loss = self._loss(x_BCHW)
        loss.backward()
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        nn.utils.clip_grad_norm_(weights, TASK.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self, x_BCHW: Tensor) -> Tensor:
        weights = TASK.losses
        with self._autocast(x_BCHW), self._traced() as budget:
            answers = self.student(x_BCHW)
        # a context of its own: weights that are cast once for both would come without their gradient
        with self._autocast(x_BCHW), torch.no_grad():
            taught = self.teacher(x_BCHW)
        # labels are the teacher's answers
        is_classifier = self.student.is_classifier
        losses = answer_losses(answers, taught, taught.argmax(dim=-1), weights, is_classifier=is_classifier)
        return torch.stack([*losses.values(), *(weights.budget * part for part in budget)]).sum()

    def _autocast(self, x_BCHW: Tensor) -> torch.autocast:
        return torch.autocast(x_BCHW.device.type, self.autocast, enabled=self.autocast != torch.float32)

    @contextmanager
    def _traced(self) -> Iterator[list[Tensor]]:
        """Gives a list that holds the budget loss afterwards; of a dense student it stays empty."""
        budget: list[Tensor] = []
        if not is_pruned(self.student):
            yield budget
            return
        with trace(self.student) as seen:
            yield budget
        budget.append(budget_loss(seen.macs, seen.dense_macs, self.target or 0.0).float())
        self.ratios.append((seen.macs.detach() / seen.dense_macs).mean())


def make_steps(
    subjects: BenchSubjects, levels: Mapping[float | None, Levels], autocast: torch.dtype
) -> dict[str, Step]:
    """The dense student's step, and one for each execution and target. All share weights, in float32, and gradients."""
    teacher = ImageModel(twin(subjects.dense)).eval()
    students: dict[str, tuple[ImageModel, float | None]] = {DENSE: (ImageModel(twin(subjects.dense)), None)}
    for execution in EXECUTIONS:
        for target, level in levels.items():
            students[_name(execution, target)] = (_student(subjects, level, execution), target)
    # one optimizer for all: it passes over what has no gradient, which is the other students' thresholds
    unique = {id(weight): weight for student, _ in students.values() for weight in student.parameters()}
    optimizer = AdamW(list(unique.values()), lr=0.0, weight_decay=TASK.weight_decay)
    return {
        name: Step(student.train(), teacher, optimizer, autocast, target)
        for name, (student, target) in students.items()
    }


def _student(subjects: BenchSubjects, levels: Levels, execution: Execution) -> ImageModel:
    """Packed as by default, with thresholds that don't learn; masked as published, with such as do."""
    student = subjects.pruned(levels)
    pruning_of(student).execution = execution
    pruning_of(student).requires_grad_(execution == "masked")
    return ImageModel(student)


def _name(execution: str, target: float | None) -> str:
    return f"{execution} {target}"


def measure_training(
    subjects: BenchSubjects,
    levels: Mapping[float | None, Levels],
    setting: Setting,
    x_BCHW: Tensor,
    batch_size: int,
    repeats: int,
) -> list[TrainingStep]:
    """A step of fine-tuning with a dense student and with pruned ones, in turn on the same batches.

    subjects: float32; `setting.dtype` is what forward and backward compute in beside it (autocast).

    Raises ValueError for float16, and MemoryError for a batch that would take more memory than there is.
    """
    if setting.dtype == "float16":
        raise ValueError("in float16 the loss has to be scaled, which isn't timed; use float32 or bfloat16")
    steps = make_steps(subjects, levels, getattr(torch, setting.dtype))
    batches = PlacedBatches(whole_batches(x_BCHW, batch_size), subjects.dense)
    for step in steps.values():
        step(batches[0][:1])  # the optimizer's state comes with the first step
    largest = max(levels, key=lambda target: 1.0 if target is None else target)
    for name in (DENSE, *(_name(execution, largest) for execution in EXECUTIONS)):
        require_memory(steps[name], batches[0], batch_size)
    timings, _ = time_in_turn({name: Runner(step, batches) for name, step in steps.items()}, repeats)
    first = batches[0]
    peaks = {name: peak_memory(lambda step=step: step(first), first.device) for name, step in steps.items()}
    return [
        TrainingStep(
            **setting.model_dump(),
            batch_size=batch_size,
            execution=execution,
            target=target,
            dense=timings[DENSE],
            pruned=timings[name],
            macs_ratio=float(torch.stack(steps[name].ratios).mean()),
            dense_peak_memory=peaks[DENSE],
            pruned_peak_memory=peaks[name],
        )
        for execution in EXECUTIONS
        for target in levels
        for name in (_name(execution, target),)
    ]
