"""The budget for models that transformers' `Trainer` trains."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from vitprune.budget.calibration import scale_to_budget
from vitprune.data.batches import Batches
from vitprune.finetuning.thresholds import ThresholdTraining
from vitprune.models.module import Pruning, pruning_of
from vitprune.models.trace import Trace
from vitprune.recipe.schema import Execution, FinetuneSpec, ThresholdMode
from vitprune.recipe.values import read_budget
from vitprune.runtime import distributed

_DEFAULTS = FinetuneSpec()


_Forwards = list[tuple[ExitStack, Trace]]


@dataclass(frozen=True)
class _Hold:
    """What a training has put on a model, and how it was before. running: forwards that haven't ended."""

    training: ThresholdTraining
    handles: Sequence[Any]
    running: _Forwards
    execution: Execution
    requires_grad: bool

    def let_go(self, pruning: Pruning) -> None:
        """The model has its thresholds, and is as it was."""
        for handle in self.handles:
            handle.remove()
        self.training.settle(pruning)
        pruning.execution = self.execution
        pruning.requires_grad_(self.requires_grad)
        while self.running:  # what breaks a forward off may pass hooks by
            with suppress(ValueError):  # in another thread, or a notebook's next cell, nothing of it is left
                self.running.pop()[0].close()


# Trainer says nothing when a training breaks off, so what lies on a model is known by the model
_HELD: WeakKeyDictionary[Pruning, _Hold] = WeakKeyDictionary()


class TrainerCallback(transformers.TrainerCallback):
    """Hold a pruned model at its budget while transformers' `Trainer` trains it.

    `Trainer(model=pruned, callbacks=[vitprune.TrainerCallback(0.65, batches)], ...)`, also around PEFT. Tokens leave in
    training, too (`execution`), a common factor on the thresholds follows the ratio of MACs that is seen, and at the
    end they are scaled so that the budget is met on `batches`. What `Trainer` saves on the way has the thresholds of
    that step, and a run goes on from there; what it leaves in memory is at the budget.

    Args:
        budget: MACs of the pruned pass ÷ dense, in (0, 1]; seconds where the model has a latency table.
        batches: images to meet the budget on at the end, as for `calibrate`; none of the evaluation's.
        thresholds: `scaled` by the factor alone; `learned` by gradients, too, for which the model's own loss gets the
            price of its MACs (AS-ViT's budget loss, held by the factor); `calibrated`: as they are until the end.
        execution: `packed`, or `masked` as published.
        threshold_learning_rate: of thresholds that learn, in parts of a stage's patches.
        price: weight of the budget in the loss, where thresholds learn.

    Raises:
        ValueError: when training begins, for a model that isn't pruned or calibrated, or a budget out of range; in
            its first step, where thresholds learn and the model isn't given the labels.
    """

    def __init__(
        self,
        budget: float | str,
        batches: Batches,
        *,
        thresholds: ThresholdMode = "scaled",
        execution: Execution = "packed",
        threshold_learning_rate: float = _DEFAULTS.threshold_learning_rate,
        price: float = _DEFAULTS.losses.budget,
    ) -> None:
        self.budget, self.batches = read_budget(budget), batches
        self.mode: ThresholdMode = thresholds
        self.execution: Execution = execution
        self.threshold_learning_rate, self.weight = threshold_learning_rate, price
        self.ratios: list[float] = []
        self._training: ThresholdTraining | None = None
        self._since: list[Tensor] = []
        self._running: _Forwards = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take hold of the thresholds."""
        model: nn.Module = kwargs["model"]
        pruning = pruning_of(model)
        if (broken_off := _HELD.pop(pruning, None)) is not None:  # a training that nobody told it was over
            broken_off.let_go(pruning)
        self._since.clear()
        if not pruning.levels.isfinite().all():
            raise ValueError("thresholds have no start; call vitprune.calibrate on the model before it is trained")
        training = ThresholdTraining.of(pruning, self.mode, self.budget)
        # Trainer has one learning rate; Adam's steps are as long whatever a gradient's scale, so the unit makes it ours
        faster = self.threshold_learning_rate / max(args.learning_rate, 1e-12)
        self._training = replace(training, units=tuple(faster * unit for unit in training.units))
        handles = [
            model.register_forward_pre_hook(self._enter, prepend=True),
            model.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]
        if pruning.spec.select == "threshold":
            handles += self._training.translate(pruning)
        _HELD[pruning] = _Hold(self._training, handles, self._running, pruning.execution, pruning.levels.requires_grad)
        pruning.execution = self.execution
        pruning.requires_grad_(self.mode == "learned" and pruning.spec.select == "threshold")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Follow the ratio that all processes have seen in this step."""
        assert self._training is not None
        own = torch.cat(self._since).tolist() if self._since else []
        self._since.clear()
        seen = [ratio for ratios in distributed.all_gather(own) for ratio in ratios]
        if seen:
            self.ratios.append(sum(seen) / len(seen))
            self._training.follow(self.ratios[-1])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the model its thresholds, and meet the budget."""
        model: nn.Module = kwargs["model"]
        pruning = pruning_of(model)
        _HELD.pop(pruning).let_go(pruning)
        if pruning.spec.select == "threshold":
            scale_to_budget(model, self.batches, self.budget, progress=state.is_world_process_zero)

    def _enter(self, module: nn.Module, args: Any) -> None:
        assert self._training is not None
        stack = ExitStack()
        self._running.append((stack, stack.enter_context(self._training.watched(pruning_of(module)))))

    def _leave(self, module: nn.Module, args: Any, inputs: dict[str, Any], output: Any) -> Any:
        stack, seen = self._running.pop()
        stack.close()
        if output is None or not module.training:  # None: the forward failed
            return output
        ratios_B = seen.costs / seen.dense_costs
        self._since.append(ratios_B.detach())
        assert self._training is not None
        if not ratios_B.requires_grad:
            return output
        loss = output.get("loss") if hasattr(output, "get") else None
        if loss is None:
            raise ValueError(
                "thresholds='learned' adds the price of MACs to the model's own loss, and this forward of the training "
                "has none; leave out label_smoothing_factor, compute_loss_func or a compute_loss without labels, or "
                "pass thresholds='scaled'"
            )
        # the model's loss is then its images' part of the mean over all of the step's, which Trainer adds up
        images = inputs.get("num_items_in_batch")
        ratio = ratios_B.mean() if images is None else ratios_B.sum() / images
        priced = copy.copy(output)
        priced["loss"] = loss + self._training.price(self.weight) * ratio.to(loss.dtype)
        return priced
