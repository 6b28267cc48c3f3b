"""One update of the weights: losses, gradients and the optimizer's step over one global batch.

Knows that a global batch is cut in parts, by processes and by accumulation, and that the result mustn't depend on how:
every loss is one of all its images.

Shapes: B images, C channels, H height, W width, S stages, N tokens of an image in the dense sequence, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from vitprune.finetuning.losses import LOSSES, NonFiniteLoss, answer_losses, token_loss
from vitprune.finetuning.student import FinalTokens, Seen, copied, taken
from vitprune.finetuning.thresholds import ThresholdTraining
from vitprune.measure.outputs import ImageModel, require_same_width
from vitprune.pruning.costs import widened
from vitprune.recipe.schema import FinetuneSpec
from vitprune.runtime import distributed

SNAPSHOT_STEPS = 100
_WAY_OUT = "lower finetune.learning_rate, or set finetune.mixed_precision to bf16 or no"


@dataclass
class TrainStep:
    """Runs an update and says what it saw. stand_in: a batch for a process that has no image at its turn.

    good_weights: those of a step whose loss and gradient were finite, up to `SNAPSHOT_STEPS` steps ago, and the factor
    on the thresholds at that time.
    """

    accelerator: Accelerator
    student: nn.Module
    teacher: ImageModel
    optimizer: Optimizer
    spec: FinetuneSpec
    thresholds: ThresholdTraining
    before_blocks: tuple[int, ...]
    stand_in: Mapping[str, Tensor]
    good_weights: dict[str, Tensor] = field(default_factory=dict)
    good_factor: float = 0.0
    _taught: FinalTokens | None = field(init=False)

    def __post_init__(self) -> None:
        self._taught = FinalTokens(self.teacher) if self.spec.losses.tokens else None

    def __call__(self, parts: Sequence[Mapping[str, Tensor] | None], step: int) -> dict[str, float] | None:
        """One step on this process's parts of a global batch; None, and nothing done, where no process has an image.

        Returns means over all images of the global batch: loss and its parts, ratio of costs, kept part of the patches
        at the end and after each stage; and the factor on the thresholds.

        Raises NonFiniteLoss, in all processes.
        """
        images = self._sum(torch.tensor(float(sum(map(_count, parts))))).item()
        if not images:
            return None
        batches = [(self._placed(part or self.stand_in), _count(part)) for part in parts]
        sums: dict[str, Tensor] = {}
        for batch, count in batches:
            with self.accelerator.accumulate(self.student):
                losses, seen = self._look(batch)
                ratio = (seen.costs_B / seen.dense_costs_B).mean()
                # the gradients are averaged over parts and processes, so each part brings its share of the images
                share = count * len(batches) * self.accelerator.num_processes / images
                loss = torch.stack(list(losses.values())).sum()
                if ratio.requires_grad:
                    loss = loss + self.thresholds.price(self.spec.losses.budget) * ratio.float()
                self.accelerator.backward(share * loss)
            found = self._figures(losses, seen).items()
            sums = {name: sums.get(name, 0.0) + count * widened(value.detach()) for name, value in found}
        record = self._record(sums, images)
        self._step(record, step)
        self.thresholds.follow(record["ratio"])
        return record

    @torch.no_grad()
    def look(self, batch: Mapping[str, Tensor], taught: Tensor | None = None) -> dict[str, float]:
        """Losses and ratio on a batch that all processes have, with nothing learned; the student is in eval mode.

        taught: the teacher's answers to it, where they are known.
        """
        losses, seen = self._look(self._placed(batch), taught)
        return {name: value.item() for name, value in self._figures(losses, seen).items()}

    @torch.no_grad()
    def teach(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """What the teacher answers to a batch; None where not that alone, or nothing, is wanted of it."""
        if self.spec.losses.tokens or not self.spec.losses.distillation:
            return None
        with self.accelerator.autocast():
            return self._teach(self._placed(batch)["pixel_values"])

    def _teach(self, x_BCHW: Tensor) -> Tensor:
        """The teacher may be in half precision."""
        return self.teacher(x_BCHW.to(self.teacher.model.dtype))

    def _look(self, batch: Mapping[str, Tensor], taught: Tensor | None = None) -> tuple[dict[str, Tensor], Seen]:
        weights, x_BCHW = self.spec.losses, batch["pixel_values"]
        tokens = list[Tensor]()
        with self.accelerator.autocast():
            seen = self.student(x_BCHW)
            if taught is None and (weights.distillation or weights.tokens):
                with torch.no_grad(), taken(self._taught) as tokens:
                    taught = self._teach(x_BCHW)
            if taught is not None:
                require_same_width(seen.answers, taught)
            losses = answer_losses(seen.answers, taught, batch.get("labels"), weights, self.teacher.kind)
            if tokens:
                assert seen.final_BND is not None
                assert seen.there_BN is not None
                losses["tokens"] = weights.tokens * token_loss(seen.final_BND, tokens[0], seen.there_BN)
        return losses, seen

    def _figures(self, losses: Mapping[str, Tensor], seen: Seen) -> dict[str, Tensor]:
        """What is said of a batch: losses, ratio of costs, kept parts of the patches."""
        kept_S = seen.kept_BS.mean(0)
        stages = {f"kept/before_block_{block}": kept for block, kept in zip(self.before_blocks, kept_S, strict=True)}
        return {**losses, "ratio": (seen.costs_B / seen.dense_costs_B).mean(), "kept": kept_S[-1], **stages}

    def _record(self, sums: Mapping[str, Tensor], images: float) -> dict[str, float]:
        means = (self._sum(torch.stack(list(sums.values()))) / images).tolist()
        record = dict(zip(sums, means, strict=True))
        loss = sum(record[name] for name in LOSSES if name in record)
        return {"loss": loss, **record, "factor": math.exp(self.thresholds.log_factor)}

    def _step(self, record: Mapping[str, float], step: int) -> None:
        if not torch.tensor(record["loss"]).isfinite():
            parts = ", ".join(f"{name} {record[name]:.4g}" for name in LOSSES if name in record)
            raise NonFiniteLoss(f"fine-tuning: the loss isn't finite at step {step + 1} ({parts}); {_WAY_OUT}")
        clipped: Any = self.accelerator.clip_grad_norm_(self.student.parameters(), self.spec.max_grad_norm)
        norm = distributed.full_tensor(torch.as_tensor(clipped))
        # under fp16 the scaler skips such a step by itself and goes on with a smaller scale
        if self.accelerator.scaler is None and not norm.isfinite():
            raise NonFiniteLoss(f"fine-tuning: the gradient isn't finite at step {step + 1}; {_WAY_OUT}")
        if step % SNAPSHOT_STEPS == 0 or not self.good_weights:
            weights = self.accelerator.unwrap_model(self.student).state_dict()
            self.good_weights = copied(weights)
            self.good_factor = self.thresholds.log_factor
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _placed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        device = self.accelerator.device
        return {name: x.to(device, non_blocking=device.type == "cuda") for name, x in batch.items()}

    def _sum(self, value: Tensor) -> Tensor:
        """Over all processes."""
        if self.accelerator.num_processes == 1:
            return widened(value.detach())
        total: Any = self.accelerator.reduce(value.detach().to(self.accelerator.device, torch.float64), "sum")
        return total


def _count(part: Mapping[str, Tensor] | None) -> int:
    return 0 if part is None else len(part["pixel_values"])
