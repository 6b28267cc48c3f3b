"""Fine-tuning on Accelerate: a pruned model learns at its budget, from a table or a stream of images.

Knows how long training lasts and what is kept of it on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from vitprune.data.augmentation import require_fitting
from vitprune.data.images import Images
from vitprune.data.training_batches import Share, TrainingBatches, require_even
from vitprune.finetuning.held_out import HeldOut
from vitprune.finetuning.loop import Loop
from vitprune.finetuning.losses import NonFiniteLoss as NonFiniteLoss
from vitprune.finetuning.optimization import build_optimizer
from vitprune.finetuning.state import States
from vitprune.finetuning.step import TrainStep
from vitprune.finetuning.student import trained
from vitprune.finetuning.thresholds import ThresholdTraining
from vitprune.finetuning.tracking import TrackerContext, Tracking, require_installed
from vitprune.measure.outputs import ImageModel, require_same_kind
from vitprune.models.detection import find_backbone
from vitprune.models.module import pruning_of
from vitprune.pruning.packed.attention import require_no_dropout
from vitprune.recipe.errors import RecipeError, concerning
from vitprune.recipe.schema import FinetuneSpec, require_thresholds
from vitprune.recipe.values import as_spec, read_budget
from vitprune.reports.results import Training
from vitprune.runtime import distributed

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
    plugin = None if had_none else AcceleratorState._shared_state.get("fsdp_plugin")
    policy = getattr(plugin, "mixed_precision_policy", None)
    try:
        yield
    finally:
        if plugin is not None:
            plugin.mixed_precision_policy = policy
        if had_none:
            AcceleratorState._reset_state()


@_settings_given_back()
def finetune(
    model: PreTrainedModel | ImageModel,
    teacher: PreTrainedModel | ImageModel,
    images: Images,
    spec: FinetuneSpec | Mapping[str, Any],
    budget: float | str,
    *,
    holdout: Images | None = None,
    seed: int = 0,
    progress: bool = True,
    states: States | None = None,
    tracker_context: TrackerContext | None = None,
) -> History:
    """Fine-tune a pruned model at a compute budget, in place.

    While weights learn, a common factor on the thresholds holds the budget; they learn, too, where `spec.thresholds`
    says so.

    Under a launcher each process takes its share of every batch; all end with the same weights, those of one process
    but for rounding.

    teacher: the dense model; frozen, for the distillation loss, `answers.AnswerKind.distance`.
    images: labelled where `spec.losses.task` is above 0.
    spec: as a recipe's section `finetune`, also a dict of its keys.
    budget: MACs of the pruned pass ÷ dense, in (0, 1] or such as "65%"; seconds where the model has a latency table
        (`latency.budget_latency`).
    holdout: images by which the best state is chosen, the one before training included; without them it is the last.
    states: where the full state is kept every so often, and taken up again if there is one.
    tracker_context: what `spec.trackers` are given.

    Raises:
        ValueError: no images for a single batch, a loss of labels without labels, thresholds without a start, a
            batch that the processes can't share evenly, a budget out of range, a teacher that the model isn't made of,
            as their answers tell, nothing that could learn, or weights in half precision, in which small steps are
            lost.
        OSError: a state can't be written; those before it are there.
        Terminated: inside `signals.watch`, after SIGTERM; the state was kept.
        NonFiniteLoss: names the step; the model has its weights from up to `step.SNAPSHOT_STEPS` steps before.
    """
    answers, taught_by = ImageModel.of(model), ImageModel.of(teacher)
    model = answers.model
    budget, spec = read_budget(budget), as_spec(FinetuneSpec, spec)
    if not isinstance(images, Images):
        raise TypeError(
            f"images are {type(images).__name__}; pass vitprune.load_images(...), which knows where an interrupted "
            "training goes on. For loaders of your own there is transformers' Trainer with vitprune.TrainerCallback"
        )
    if taught_by.model is model:
        raise ValueError("the teacher is the model itself; pass the dense model, or a copy of it from before prune_")
    require_same_kind(answers, taught_by)
    require_thresholds(pruning_of(model).spec, spec)
    require_trainable(images, spec, model, takes_labels=answers.kind.takes_labels)
    if not pruning_of(model).levels.isfinite().all():
        raise ValueError("thresholds have no start to learn from; call calibrate first, or give them in the spec")
    state = distributed.init()
    accelerator = _accelerator(spec, tracker_context)
    require_precision(spec, accelerator.device)
    torch.manual_seed(seed + state.process_index)
    share = Share(state.process_index, state.num_processes)
    batches = TrainingBatches(images, spec.batch_size, seed, spec.augmentation, share)
    steps = count_steps(spec, images)
    thresholds = ThresholdTraining.of(pruning_of(model), spec.thresholds, budget)
    with trained(answers, taught_by, spec, accelerator, thresholds, may_go_back=holdout is not None) as ours:
        student = ours.student
        optimizer = build_optimizer(student.answers.model, spec)
        prepared, optimizer = accelerator.prepare(student, optimizer)
        scheduler = _schedule(optimizer.optimizer, math.ceil(spec.warmup * steps), steps)
        accelerator.register_for_checkpointing(scheduler)
        stages = pruning_of(model).before_blocks
        update = TrainStep(accelerator, prepared, taught_by, optimizer, spec, thresholds, stages, images.stand_in())
        negligible = spec.losses.distillation * answers.kind.negligible
        held_out = None if holdout is None else HeldOut(holdout, stages, budget, negligible)
        tracking = _tracking(accelerator, prepared, thresholds, spec, tracker_context)
        loop = Loop(accelerator, update, scheduler, batches, states, tracking, held_out, ours.whole_weights)
        loop.resume()
        points = pruning_of(model).spec.points
        pruning_of(model).keep_points(None)  # levels that were found for other weights
        try:
            loop.run(steps, progress=progress and state.is_main_process)
        except NonFiniteLoss:
            if update.good_weights:  # none yet: nothing has changed either
                accelerator.unwrap_model(prepared).load_state_dict(update.good_weights)
                thresholds.log_factor = update.good_factor
            raise
        if held_out is not None and held_out.checks:
            ours.go_back(held_out.best)
            if held_out.best is None:
                pruning_of(model).keep_points(points)
    return History(loop.step, loop.records, loop.training)


def _schedule(optimizer: Optimizer, warm_up: int, steps: int) -> LRScheduler:
    """Rising, then half a cosine; neither the first step nor the last is one of rate 0, as it would be there."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return get_cosine_schedule_with_warmup(optimizer, warm_up + 1, steps + 1, last_epoch=0)


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
        raise RecipeError.at(
            ("finetune", "trackers"), f"there are {list(spec.trackers)}; pass finetune() a tracker_context for them"
        )
    return Tracking(accelerator, student, thresholds, tracker_context, spec.images_per_step)


def _accelerator(spec: FinetuneSpec, tracker_context: TrackerContext | None) -> Accelerator:
    accelerator = Accelerator(
        log_with=list(spec.trackers) or None,
        project_dir=None if tracker_context is None else str(tracker_context.folder),
        mixed_precision=spec.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=spec.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        # some checkpoints have weights that classification doesn't use, such as mask tokens
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if plugin is not None and plugin.fsdp_version == 2:
        # autocast does it, as without FSDP; theirs would round thresholds and costs, too
        plugin.mixed_precision_policy = None
    return accelerator


def require_precision(spec: FinetuneSpec, device: torch.device) -> None:
    """Raise ValueError for a precision that a device doesn't train in."""
    if spec.mixed_precision == "fp16" and device.type == "cpu":
        text = "is fp16, which CPUs don't train in (it would be float32 without a word); write bf16 or no"
        raise RecipeError.at(("finetune", "mixed_precision"), text)


def require_trainable(images: Images, spec: FinetuneSpec, model: PreTrainedModel, *, takes_labels: bool) -> None:
    """Raise ValueError where images, losses and model don't go together; to be asked before anything is run."""
    if spec.execution == "packed":
        require_no_dropout(max(getattr(find_backbone(model).config, name, 0.0) or 0.0 for name in _ATTENTION_DROPOUTS))
    count_steps(spec, images)
    state = distributed.init()
    if state.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "fine-tuning doesn't run under DeepSpeed; use FSDP2 (integrations/accelerate/fsdp2.yaml), which shards "
            "weights, gradients and optimizer, too"
        )
    require_even(spec.batch_size, state.num_processes)
    with concerning("finetune", "augmentation"):
        require_fitting(spec.augmentation, images.processor)
    if spec.gradient_checkpointing and not model.supports_gradient_checkpointing:
        text = f"{type(model).__name__} can't compute its blocks again; leave it out"
        raise RecipeError.at(("finetune", "gradient_checkpointing"), text)
    require_installed(spec.trackers)
    if spec.losses.task and not (images.labelled and takes_labels):
        lacking = "the training images have no labels" if takes_labels else "the model has no classes"
        text = f"is {spec.losses.task:g}, but {lacking}; leave it out: the dense model's answers teach without"
        raise RecipeError.at(("finetune", "losses", "task"), text)


def count_steps(spec: FinetuneSpec, images: Images) -> int:
    """Optimizer steps in all. Raises ValueError where that can't be told."""
    if spec.steps is not None:
        return spec.steps
    if images.length is None:
        raise RecipeError.at(
            ("finetune", "steps"), "needed with data.streaming, as this stream doesn't tell how long an epoch is"
        )
    steps = math.ceil(spec.epochs * images.length / spec.images_per_step)
    if steps < 1:
        raise RecipeError.at(("data", "train"), "there are no images left to fine-tune with")
    return steps
