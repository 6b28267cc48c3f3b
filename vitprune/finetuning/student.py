"""The model that is trained: what its forward gives out, in which state it ends.

Shapes: B images, S stages, N tokens of an image in the dense sequence, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn import functional as F
from transformers import PreTrainedModel

from vitprune.finetuning.losses import NonFiniteLoss
from vitprune.finetuning.optimization import learning
from vitprune.finetuning.thresholds import ThresholdTraining
from vitprune.measure.outputs import ImageModel
from vitprune.models import context
from vitprune.models.module import pruning_of
from vitprune.models.structure import examine
from vitprune.recipe.schema import FinetuneSpec

Weights = dict[str, Tensor]


@dataclass
class State:
    """Weights on the CPU, whole, and the log of the factor on the thresholds."""

    weights: Weights
    log_factor: float


def copied(weights: Weights) -> Weights:
    return {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}


class Seen(NamedTuple):
    """What a forward of the student gives out: DDP and FSDP must see every output that needs a gradient.

    kept_BS: the part of its patches that an image has after each stage. final_BND, there_BN: tokens behind the last
    block in the dense sequence, and which of them are left; None where no loss asks for them.
    """

    answers: Tensor
    costs_B: Tensor
    dense_costs_B: Tensor
    kept_BS: Tensor
    final_BND: Tensor | None
    there_BN: Tensor | None


class Student(nn.Module):
    """A pruned model as it is trained, with thresholds as `ThresholdTraining` has them."""

    def __init__(self, answers: ImageModel, thresholds: ThresholdTraining, *, wants_tokens: bool) -> None:
        super().__init__()
        self.answers = answers
        self.thresholds = thresholds
        self.final = FinalTokens(answers) if wants_tokens else None
        # what FSDP shards one by one
        self._no_split_modules = sorted({type(block).__name__ for block in examine(answers.model).blocks})

    def forward(self, pixel_values: Tensor) -> Seen:
        pruning = pruning_of(self.answers)
        with self.thresholds.watched(pruning) as seen, taken(self.final) as tokens:
            answers = self.answers(pixel_values)
        masks = seen.keep_masks
        kept_BS = torch.stack([mask.float().mean(1) for mask in masks], dim=1)
        there_BN = None
        if tokens:
            there_BN = F.pad(masks[-1], (pruning.num_prefix_tokens, 0), value=True)
        return Seen(answers, seen.costs, seen.dense_costs, kept_BS, tokens[0] if tokens else None, there_BN)


class FinalTokens:
    """The tokens of a model behind its last block and norm."""

    def __init__(self, answers: ImageModel) -> None:
        self._source = examine(answers.model).final_norm

    @contextmanager
    def taken(self) -> Iterator[list[Tensor]]:
        """Give a list that holds them, (B, N, D), after a forward."""
        found: list[Tensor] = []

        def take(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        handle = self._source.register_forward_hook(take)
        try:
            with context.within(whole_sequence=True):
                yield found
        finally:
            handle.remove()


def taken(final: FinalTokens | None) -> AbstractContextManager[list[Tensor]]:
    return nullcontext([]) if final is None else final.taken()


@dataclass
class Trained:
    """A student while it is trained, and `answers`, which get what it learns.

    FSDP makes other modules of a model, in place and for good, so it trains a copy. first: weights from before, where
    the student is no copy and may go back to them. state: what to end with, if not with what was learned last; or
    `is_at_start`.
    """

    answers: ImageModel
    student: Student
    thresholds: ThresholdTraining
    is_sharded: bool
    first: dict[str, Tensor] | None = None
    state: State | None = None
    is_at_start: bool = False

    def whole_weights(self) -> dict[str, Tensor]:
        """In all processes, also where they are sharded."""
        if self.is_sharded:
            whole: Any = get_model_state_dict(self.student.answers, options=StateDictOptions(full_state_dict=True))
            return whole
        return self.student.answers.state_dict()

    def go_back(self, state: State | None) -> None:
        """To another state than that of the last step; None: to the first."""
        self.state, self.is_at_start = state, state is None

    def end(self) -> None:
        """`answers` gets what was learned."""
        if self.is_at_start:
            if self.first is not None:
                self.answers.load_state_dict(self.first)
            return
        if self.state is not None:
            self.thresholds.log_factor = self.state.log_factor
            self.answers.load_state_dict(self.state.weights)
        elif self.is_sharded:
            self.answers.load_state_dict(self.whole_weights())
        self.thresholds.settle(pruning_of(self.answers.model))


@contextmanager
def trained(
    answers: ImageModel,
    teacher: ImageModel,
    spec: FinetuneSpec,
    accelerator: Accelerator,
    thresholds: ThresholdTraining,
    *,
    may_go_back: bool,
) -> Iterator[Trained]:
    """The student to be trained; afterwards `answers` has what it learned and is ready to be used.

    The student executes and recomputes again as before, and of the teacher the same weights ask for gradients.

    may_go_back: whether it may end with the weights from before, of which a copy is kept then.

    Sharded weights are brought together where all processes come to it: at the end, or where a loss became infinite,
    but not where one of them failed.
    """
    sharded = accelerator.distributed_type == DistributedType.FSDP
    taught = copy.deepcopy(answers) if sharded else answers
    model = taught.model
    recomputes = spec.gradient_checkpointing and not _is_recomputed(model)
    with _given_back(model, teacher, recomputes=recomputes):
        teacher.to(accelerator.device).eval().requires_grad_(False)
        taught.to(accelerator.device).train()
        pruning_of(model).execution = spec.execution
        if recomputes:
            model.activation_checkpointing_enable()
        student = Student(taught, thresholds, wants_tokens=spec.losses.tokens > 0)
        first = copied(answers.state_dict()) if may_go_back and not sharded else None
        found = Trained(answers, student, thresholds, sharded, first)
        together = True
        try:
            with learning(model, spec):
                yield found
        except BaseException as error:
            together = isinstance(error, NonFiniteLoss)
            raise
        finally:
            if together or not sharded:
                found.end()
            answers.eval()


@contextmanager
def _given_back(model: PreTrainedModel, teacher: ImageModel, *, recomputes: bool) -> Iterator[None]:
    """What training sets of both models, beside weights and mode, is as it was afterwards."""
    learned = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    execution = pruning_of(model).execution
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
        pruning_of(model).execution = execution
        if recomputes:
            model.activation_checkpointing_disable()


def _is_recomputed(model: PreTrainedModel) -> bool:
    """Whether a model's gradient checkpointing is on; timm's has a name of its own."""
    inner: Any = examine(model).inner
    return model.is_activation_checkpointing or (inner is not None and bool(inner.grad_checkpointing))
