"""One update of the weights: losses, gradients and the optimizer's step over one global batch.

Knows that a global batch is cut in parts, by processes and by accumulation, and that the result mustn't depend on how:
every loss is one of all its images. Leaves which images, how often and what is kept of it to `finetuning`.

Shapes: B images, C channels, H height, W width, S stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from vitprune import processes
from vitprune.answers import Answers, require_same_width
from vitprune.losses import LOSSES, answer_losses, budget_loss
from vitprune.recipe import FinetuneSpec
from vitprune.tracing import trace

SNAPSHOT_STEPS = 100
_WAY_OUT = "lower finetune.learning_rate, or set finetune.mixed_precision to bf16 or no"


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became infinite or NaN; the model has the last weights that were known to be good."""


class Student(nn.Module):
    """A pruned model as a function that also gives out what it cost: who distributes a model wants to see all outputs.

    Returns answers, costs_B, dense_costs_B, and kept_BS, the part of its patches that an image has after each stage.
    """

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with trace(self.answers) as watched:
            answers = self.answers(pixel_values)
        kept_BS = torch.stack([mask.float().mean(1) for mask in watched.keep_masks], dim=1)
        return answers, watched.costs, watched.dense_costs, kept_BS


@dataclass
class Update:
    """Runs an update and says what it saw. stand_in: a batch for a process that has no image at its turn.

    good_weights: those of a step whose loss and gradient were finite, up to `SNAPSHOT_STEPS` steps ago.
    """

    accelerator: Accelerator
    student: nn.Module
    teacher: Answers
    optimizer: Optimizer
    spec: FinetuneSpec
    budget: float
    before_blocks: tuple[int, ...]
    stand_in: Mapping[str, Tensor]
    good_weights: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, parts: Sequence[Mapping[str, Tensor] | None], step: int) -> dict[str, float] | None:
        """One step on this process's parts of a global batch; None, and nothing done, where nobody has an image.

        Returns means over all images of the global batch: loss and its parts, ratio of costs, kept part of the patches
        at the end and after each stage.

        Raises NonFiniteLoss, in all processes.
        """
        images = self._sum(torch.tensor(float(sum(map(_count, parts)))))
        if not images:
            return None
        batches = [(self._placed(part or self.stand_in), _count(part)) for part in parts]
        overall = None
        if self.spec.losses.budget and len(batches) > 1:
            overall = self._overall_ratio(batches, images)
        sums: dict[str, Tensor] = {}
        for batch, count in batches:
            with self.accelerator.accumulate(self.student):
                with self.accelerator.autocast():
                    answers, costs_B, dense_costs_B, kept_BS = self.student(batch["pixel_values"])
                    ratio = (costs_B.detach() / dense_costs_B).mean()
                    if overall is None:
                        overall = self._sum(ratio * count) / images
                    losses = self._losses(batch, answers, budget_loss(costs_B, dense_costs_B, self.budget, overall))
                # the gradients are averaged over parts and processes, so each part brings its share of the images
                share = count * len(batches) * self.accelerator.num_processes / images
                self.accelerator.backward(share * torch.stack(list(losses.values())).sum())
            seen = {**losses, "ratio": ratio, **self._kept(kept_BS)}
            sums = {name: sums.get(name, 0.0) + count * value.detach().double() for name, value in seen.items()}
        record = self._record(sums, images)
        self._step(record, step)
        return record

    def _losses(self, batch: Mapping[str, Tensor], answers: Tensor, budget: Tensor) -> dict[str, Tensor]:
        weights, taught = self.spec.losses, None
        if weights.distillation:
            with torch.no_grad():
                taught = self.teacher(batch["pixel_values"])
            require_same_width(answers, taught)
        others = answer_losses(answers, taught, batch.get("labels"), weights, are_logits=self.teacher.are_logits)
        return {"budget": weights.budget * budget.float(), **others}

    @torch.no_grad()
    def _overall_ratio(self, batches: Sequence[tuple[Mapping[str, Tensor], int]], images: Tensor) -> Tensor:
        """The ratio of the whole global batch, before the first gradient: its side of the budget decides their sign."""
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        with _same_chance_again(self.accelerator.device), self.accelerator.autocast():
            for batch, count in batches:
                _, costs_B, dense_costs_B, _ = self.student(batch["pixel_values"])
                total += (costs_B / dense_costs_B).mean() * count
        return self._sum(total) / images

    def _kept(self, kept_BS: Tensor) -> dict[str, Tensor]:
        kept_S = kept_BS.mean(0)
        stages = {f"kept/before_block_{block}": kept for block, kept in zip(self.before_blocks, kept_S, strict=True)}
        return {"kept": kept_S[-1], **stages}

    def _record(self, sums: Mapping[str, Tensor], images: Tensor) -> dict[str, float]:
        means = (self._sum(torch.stack(list(sums.values()))) / images).tolist()
        record = dict(zip(sums, means, strict=True))
        loss = sum(record[name] for name in LOSSES if name in record)
        return {"loss": loss, **record}

    def _step(self, record: Mapping[str, float], step: int) -> None:
        if not torch.tensor(record["loss"]).isfinite():
            parts = ", ".join(f"{name} {record[name]:.4g}" for name in LOSSES if name in record)
            raise NonFiniteLoss(f"fine-tuning: the loss isn't finite at step {step + 1} ({parts}); {_WAY_OUT}")
        clipped: Any = self.accelerator.clip_grad_norm_(self.student.parameters(), self.spec.max_grad_norm)
        norm = processes.whole(torch.as_tensor(clipped))
        # under fp16 the scaler skips such a step by itself and goes on with a smaller scale
        if self.accelerator.scaler is None and not norm.isfinite():
            raise NonFiniteLoss(f"fine-tuning: the gradient isn't finite at step {step + 1}; {_WAY_OUT}")
        if step % SNAPSHOT_STEPS == 0 or not self.good_weights:
            weights = self.accelerator.unwrap_model(self.student).state_dict()
            self.good_weights = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _placed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.to(self.accelerator.device, non_blocking=True) for name, x in batch.items()}

    def _sum(self, value: Tensor) -> Tensor:
        """Over all processes."""
        total: Any = self.accelerator.reduce(value.detach().to(self.accelerator.device, torch.float64), "sum")
        return total


def _count(part: Mapping[str, Tensor] | None) -> int:
    return 0 if part is None else len(part["pixel_values"])


@contextmanager
def _same_chance_again(device: torch.device) -> Iterator[None]:
    """What is random inside, such as stochastic depth, comes out the same the next time."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
