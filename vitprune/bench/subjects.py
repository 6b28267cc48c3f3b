"""The models of a benchmark: dense, attached, pruned; for images of any size."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitprune.budget.calibration import calibrate
from vitprune.measure.memory import is_out_of_memory
from vitprune.models.checkpoint import load
from vitprune.models.module import Levels, is_pruned, pruning_of
from vitprune.models.prune import prune_, restore_
from vitprune.models.structure import channels, count_patches, examine
from vitprune.recipe.errors import RecipeError, concerning, first_line
from vitprune.recipe.schema import PruningSpec, Recipe

NOTHING_IS_BELOW = -1.0  # no score is negative


@dataclass(frozen=True)
class BenchSubjects:
    """A dense model and how it is pruned. own: levels that the checkpoint or its recipe gives; None: none yet."""

    dense: PreTrainedModel
    spec: PruningSpec
    own: Levels | None

    @classmethod
    def load(cls, recipe: Recipe, dtype: torch.dtype, device: torch.device) -> BenchSubjects:
        """The recipe's model. One that is pruned already becomes dense again and keeps its levels as its own.

        Raises ValueError for no such checkpoint, one that isn't a plain ViT, or a stage that it doesn't have.
        """
        with concerning("model", "checkpoint"):
            model = load(recipe.model.checkpoint, dtype=dtype, revision=recipe.model.revision)
        nn.Module.to(model, device)
        if is_pruned(model):
            pruning = pruning_of(model)
            if "pruning" in recipe.model_fields_set:
                text = f"{recipe.model.checkpoint} is pruned already; leave this section out, or name the dense model"
                raise RecipeError.at(("pruning",), text)
            spec, own = pruning.spec, Levels.of(pruning)
            return cls(restore_(model), spec, own)
        pruning = pruning_of(prune_(twin(model), recipe.pruning))
        given = recipe.pruning.thresholds if recipe.pruning.select == "threshold" else recipe.pruning.keep_ratios
        return cls(model, recipe.pruning, None if given == "calibrated" else Levels.of(pruning))

    def at(self, size: int) -> BenchSubjects:
        """The same for images of `size` × `size` pixels. Raises ValueError where the model takes no such images."""
        return BenchSubjects(_fit(twin(self.dense), size), self.spec, self.own)

    def patches(self, size: int) -> int:
        """Of an image of `size` × `size` pixels."""
        return count_patches(self.dense, (channels(self.dense), size, size))

    def again(self) -> BenchSubjects:
        """The same with a dense model of its own, on the same weights."""
        return BenchSubjects(twin(self.dense), self.spec, self.own)

    def attached(self) -> PreTrainedModel:
        """Pruned, but nothing ever leaves."""
        model = prune_(twin(self.dense), self.spec)
        pruning = pruning_of(model)
        with torch.no_grad():
            pruning.levels.fill_(NOTHING_IS_BELOW if self.spec.select == "threshold" else 1.0)
        return model

    def pruned(self, levels: Levels) -> PreTrainedModel:
        model = prune_(twin(self.dense), self.spec)
        levels.give(pruning_of(model))
        return model

    def calibrated(self, batches: Sequence[Tensor], target: float) -> Levels:
        """Levels for a part of the dense MACs, at the first schedule where stages are to be searched: it is as fast.

        Raises ValueError where pruning can't reach it.
        """
        model = self.attached()
        pruning_of(model).settle(before_blocks=pruning_of(model).before_blocks)
        calibrate(model, batches, target, progress=False)
        return Levels.of(pruning_of(model))


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares weights and buffers: as many models as a benchmark has take the memory of one."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, dict[int, Any](shared))


def compile_(model: PreTrainedModel) -> PreTrainedModel:
    """Have torch compile each block, for any number of tokens, in place; what is around the blocks stays eager."""
    for block in examine(model).blocks:
        block.compile(dynamic=True)
    return model


def _fit(model: PreTrainedModel, size: int) -> PreTrainedModel:
    """The model, ready for images of another size: its position embeddings are interpolated where it has a switch."""
    backbone = examine(model).backbone
    own = getattr(backbone.config, "image_size", None)
    if own != size and "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters:
        backbone.register_forward_pre_hook(_interpolate, with_kwargs=True)
    first = next(model.parameters())
    x_BCHW = torch.zeros(1, channels(model), size, size, dtype=first.dtype, device=first.device)
    try:
        with torch.no_grad():
            backbone(x_BCHW)
    except (ValueError, RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{type(model).__name__} takes no images of {size} px ({first_line(error)}); leave --image-size out, or "
            "name a size that it takes"
        ) from error
    return model


def _interpolate(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "interpolate_pos_encoding": True}
