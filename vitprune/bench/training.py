"""How long a step of fine-tuning takes, dense and pruned, and how much memory.

It is the step that fine-tuning does, with teacher, losses, backward and optimizer: packed with thresholds that don't
learn, masked, as published, with such as do. The learning rate is 0, so that weights and thresholds stay and every step
does the same work.

Tensor suffixes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import AdamW

from vitprune.bench.subjects import BenchSubjects, Levels, twin
from vitprune.finetuning.step import TrainStep
from vitprune.finetuning.student import Seen, Student
from vitprune.finetuning.thresholds import ThresholdTraining
from vitprune.measure.memory import peak_memory, require_memory
from vitprune.measure.outputs import ImageModel
from vitprune.measure.timing import PlacedBatches, Runner, time_in_turn, whole_batches
from vitprune.models.module import pruning_of
from vitprune.recipe.schema import Execution, FinetuneSpec
from vitprune.reports.bench_results import Setting, TrainingStep

EXECUTIONS: tuple[Execution, ...] = ("packed", "masked")
"""How a pruned student can be trained."""
DENSE = "dense"
TASK = FinetuneSpec()
# not 0, at which the weights are copied aside: once in a hundred steps
STEP = 1


class DenseStudent(nn.Module):
    """A dense model as a step of training sees it: all patches stay, at the dense model's cost."""

    def __init__(self, answers: ImageModel) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, pixel_values: Tensor) -> Seen:
        answers = self.answers(pixel_values)
        ones_B = torch.ones(len(answers), device=answers.device)
        return Seen(answers, ones_B, ones_B, ones_B[:, None], None, None)


@dataclass
class Step:
    """One step on a batch. ratios: of MACs, one entry a step."""

    train_step: TrainStep
    ratios: list[float] = field(default_factory=list)

    def __call__(self, x_BCHW: Tensor) -> None:
        record = self.train_step([{"pixel_values": x_BCHW}], STEP)
        assert record is not None
        self.ratios.append(record["ratio"])


def make_steps(
    subjects: BenchSubjects, levels: Mapping[float | None, Levels], autocast: torch.dtype
) -> dict[str, Step]:
    """The dense student's step, and one for each execution and target. All share weights, in float32, and gradients."""
    on_cpu = next(subjects.dense.parameters()).device.type == "cpu"
    AcceleratorState._reset_state(reset_partial_state=True)  # of another precision, before
    accelerator = Accelerator(mixed_precision="no" if autocast == torch.float32 else "bf16", cpu=on_cpu)
    teacher = ImageModel(twin(subjects.dense)).eval()
    nothing = ThresholdTraining("calibrated", scales=False, budget=1.0, starts=(), units=())
    students: dict[str, tuple[nn.Module, ThresholdTraining]] = {
        DENSE: (DenseStudent(ImageModel(twin(subjects.dense))), nothing)
    }
    for execution in EXECUTIONS:
        for target, level in levels.items():
            students[_name(execution, target)] = _student(subjects, level, execution, target)
    # one optimizer for all: it passes over what has no gradient, which is the other students' thresholds
    unique = {id(weight): weight for student, _ in students.values() for weight in student.parameters()}
    optimizer = AdamW(list(unique.values()), lr=0.0, weight_decay=TASK.weight_decay)
    return {
        name: Step(
            TrainStep(
                accelerator,
                student.train(),
                teacher,
                optimizer,
                TASK,
                thresholds,
                before_blocks=pruning_of(student).before_blocks if isinstance(student, Student) else (0,),
                stand_in={},
                good_weights={"": torch.empty(0)},
            )
        )
        for name, (student, thresholds) in students.items()
    }


def _student(
    subjects: BenchSubjects, levels: Levels, execution: Execution, target: float | None
) -> tuple[Student, ThresholdTraining]:
    """Packed as by default, with thresholds that don't learn; masked as published, with such as do."""
    model = subjects.pruned(levels)
    pruning = pruning_of(model)
    pruning.execution = execution
    pruning.requires_grad_(execution == "masked")
    thresholds = ThresholdTraining.of(pruning, "calibrated", 1.0 if target is None else target)
    return Student(ImageModel(model), thresholds, wants_tokens=False), thresholds


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
    for step in steps.values():
        step.ratios.clear()  # of the images that are timed alone
    timings, _ = time_in_turn({name: Runner(step, batches) for name, step in steps.items()}, repeats)
    ratios = {name: statistics.fmean(step.ratios) for name, step in steps.items()}
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
            macs_ratio=ratios[name],
            dense_peak_memory=peaks[DENSE],
            pruned_peak_memory=peaks[name],
        )
        for execution in EXECUTIONS
        for target in levels
        for name in (_name(execution, target),)
    ]
