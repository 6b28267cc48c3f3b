"""One fine-tuning loop on Accelerate: task, budget and distillation loss, with thresholds that learn.

Knows how a pruned model is trained; leaves its levels' start to `calibration`, and files to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from vitprune.answers import Answers
from vitprune.data import Images
from vitprune.losses import answer_losses, budget_loss
from vitprune.recipe import FinetuneSpec
from vitprune.tracing import Trace, pruning_of, trace

SNAPSHOT_STEPS = 100


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became infinite or NaN; the model has the last weights that were known to be good."""


@dataclass
class History:
    """One entry a step: total loss, its parts, ratio of what the budget counts, part of the patches kept at the end."""

    steps: int = 0
    records: list[dict[str, float]] = field(default_factory=list)


def finetune(
    model: PreTrainedModel | Answers,
    teacher: PreTrainedModel | Answers,
    images: Images,
    spec: FinetuneSpec,
    budget: float,
    *,
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Fine-tunes a pruned model and its thresholds to a compute budget, in place.

    teacher: the dense model; frozen, for the distillation loss: of logits, or of embeddings (cosine) where the model
        has no classes. images: labelled or not (then the task loss is left out). budget: MACs of the pruned pass ÷
        dense, in (0, 1]; seconds where the model has a latency table (`latency.budget_latency`).

    Raises:
        ValueError: no images for a single batch, no loss that could teach the task, or thresholds without a start.
        NonFiniteLoss: names the step; the model has its weights from up to `SNAPSHOT_STEPS` steps before.
    """
    answers, taught_by = Answers.of(model), Answers.of(teacher)
    model = answers.model
    require_trainable(images, spec, has_classes=answers.are_logits)
    if not pruning_of(model).levels.isfinite().all():
        raise ValueError("thresholds have no start to learn from; call calibrate first, or give them in the spec")
    accelerator = Accelerator(
        mixed_precision=spec.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=spec.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        # some checkpoints have weights that classification doesn't use, such as mask tokens
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    torch.manual_seed(seed + accelerator.process_index)
    taught_by.to(accelerator.device).eval().requires_grad_(False)
    answers.to(accelerator.device).train()
    pruning_of(model).execution = spec.execution
    if spec.gradient_checkpointing:
        model.activation_checkpointing_enable()
    loader = images.loader(spec.batch_size, shuffle=True, seed=seed, augmentation=spec.augmentation)
    optimizer = build_optimizer(model, spec)
    prepared, optimizer, loader = accelerator.prepare(answers, optimizer, loader)
    steps = _steps(spec, images, accelerator)
    scheduler = get_cosine_schedule_with_warmup(optimizer.optimizer, math.ceil(spec.warmup * steps), steps)
    history = History()
    loop = _Loop(accelerator, prepared, taught_by, answers.are_logits, optimizer, spec, budget)
    shown = progress and accelerator.is_main_process
    try:
        with tqdm(total=steps, desc="fine-tuning", unit="step", disable=not shown) as bar:
            for batch in _endless(loader):
                record = loop.micro_step(batch, history.steps)
                if not accelerator.sync_gradients:
                    continue
                record["lr"] = float(scheduler.get_last_lr()[0])
                scheduler.step()
                history.steps += 1
                history.records.append(record)
                bar.update()
                bar.set_postfix_str(_summary(record))
                if history.steps == steps:
                    break
    except NonFiniteLoss:
        if loop.good_weights:  # none yet: nothing has changed either
            answers.load_state_dict(loop.good_weights)
        raise
    finally:
        # prepare() puts an autocast around forward, as an attribute of the instance; back to the class's own
        accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        vars(answers).pop("forward", None)
        if spec.gradient_checkpointing:
            model.activation_checkpointing_disable()
        model.eval()
    return history


def require_trainable(images: Images, spec: FinetuneSpec, *, has_classes: bool) -> None:
    """Raises ValueError where images and losses don't go together; to be asked before anything is run."""
    if images.streamed:
        raise ValueError("data.streaming: fine-tuning needs to know how long an epoch is; set data.streaming: false")
    if not spec.losses.distillation and not (images.labelled and has_classes):
        lacking = "images without labels need" if has_classes else "a model without classes needs"
        raise ValueError(f"finetune.losses: {lacking} losses.distillation > 0")


def build_optimizer(model: PreTrainedModel, spec: FinetuneSpec) -> AdamW:
    """AdamW with weight decay on matrices only, and a learning rate of its own for thresholds.

    Thresholds live near 1/N, so theirs is relative: AdamW's step, whatever the gradient's size, is
    `threshold_learning_rate` × the mean threshold, the same part at 49 tokens as at 1,369.
    """
    own = {id(parameter) for parameter in pruning_of(model).parameters()}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    groups: list[dict[str, object]] = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    thresholds = list(pruning_of(model).parameters())
    if thresholds:
        levels = pruning_of(model).levels.detach()
        scale = levels[levels.isfinite()].abs().mean().item() if levels.isfinite().any() else 0.0
        groups.append({"params": thresholds, "lr": spec.threshold_learning_rate * scale, "weight_decay": 0.0})
    return AdamW(groups, lr=spec.learning_rate)


@dataclass
class _Loop:
    """What a step needs; `micro_step` runs forward and backward, and the optimizer where gradients are complete."""

    accelerator: Accelerator
    model: nn.Module
    teacher: Answers
    are_logits: bool
    optimizer: Optimizer
    spec: FinetuneSpec
    budget: float
    good_weights: dict[str, Tensor] = field(default_factory=dict)

    def micro_step(self, batch: dict[str, Tensor], step: int) -> dict[str, float]:
        with self.accelerator.accumulate(self.model):
            with trace(self.model) as watched, self.accelerator.autocast():
                answers = self.model(batch["pixel_values"])
                losses = self._losses(batch, answers, watched)
            loss = torch.stack(list(losses.values())).sum()
            if not loss.isfinite():
                parts = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
                raise NonFiniteLoss(f"fine-tuning: the loss isn't finite at step {step + 1} ({parts}); {_WAY_OUT}")
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.spec.max_grad_norm)
                # under fp16 the scaler skips such a step by itself and goes on with a smaller scale
                if self.accelerator.scaler is None and norm is not None and not torch.as_tensor(norm).isfinite():
                    raise NonFiniteLoss(f"fine-tuning: the gradient isn't finite at step {step + 1}; {_WAY_OUT}")
                if step % SNAPSHOT_STEPS == 0:
                    # these weights have just given a finite loss and gradient
                    weights = self.accelerator.unwrap_model(self.model).state_dict()
                    self.good_weights = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
            self.optimizer.step()
            self.optimizer.zero_grad()
        ratio = (watched.costs.detach() / watched.dense_costs).mean().item()
        kept = watched.keep_masks[-1].float().mean().item()
        parts = {name: value.item() for name, value in losses.items()}
        return {"loss": loss.item(), **parts, "ratio": ratio, "kept": kept}

    def _losses(self, batch: dict[str, Tensor], answers: Tensor, watched: Trace) -> dict[str, Tensor]:
        weights = self.spec.losses
        budget = weights.budget * budget_loss(watched.costs, watched.dense_costs, self.budget).float()
        taught = None
        if weights.distillation:
            with torch.no_grad():
                taught = self.teacher(batch["pixel_values"])
        others = answer_losses(answers, taught, batch.get("labels"), weights, are_logits=self.are_logits)
        return {"budget": budget, **others}


_WAY_OUT = "lower finetune.learning_rate, or set finetune.mixed_precision to bf16 or no"


def _steps(spec: FinetuneSpec, images: Images, accelerator: Accelerator) -> int:
    """Optimizer steps in all."""
    batches = len(images) / (spec.batch_size * accelerator.num_processes)
    steps = math.ceil(spec.epochs * batches / spec.gradient_accumulation_steps)
    if steps < 1:
        raise ValueError("data.train: there are no images left to fine-tune with")
    return steps


def _endless(loader: DataLoader[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    while True:
        yield from loader


def _summary(record: dict[str, float]) -> str:
    return f"loss {record['loss']:.3f}, budget {record['ratio']:.1%}, kept {record['kept']:.1%}, lr {record['lr']:.1e}"
