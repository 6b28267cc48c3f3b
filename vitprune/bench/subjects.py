"""The models and images of a benchmark: dense, attached, pruned; real images or random pixels, of any size.

Calibrates on training images and times on evaluation images. Real ones of another size are interpolated from the pixel
values that the image processor gives (bicubic, antialiased), so nothing is sharper than it was; random pixels are drawn
at each size.

Tensor suffixes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from vitprune.budget.calibration import calibrate
from vitprune.data.decoding import blank_image
from vitprune.data.images import load_images
from vitprune.measure.memory import is_out_of_memory
from vitprune.models.checkpoint import load, load_processor
from vitprune.models.module import KEEPS_ALL, Levels, is_pruned, pruning_of
from vitprune.models.prune import prune_, restore_
from vitprune.models.structure import count_tokens, examine
from vitprune.recipe.errors import first_line
from vitprune.recipe.schema import PruningSpec, Recipe, SplitSpec

RANDOM_PIXELS = "random pixels"


@dataclass(frozen=True)
class BenchImages:
    """Calibration and timed images: functions of the size, (B, C, H, W) float32. described: what they are, in words."""

    described: str
    size: int
    calibration: Callable[[int], Tensor]
    timed: Callable[[int], Tensor]


def random_images(recipe: Recipe, model: PreTrainedModel, calibration: int, timed: int) -> BenchImages:
    """Seeded noise, as an image processor would normalise it; so many of each. size: what the checkpoint processes."""
    depth = channels(model)

    def noise(count: int, offset: int) -> Callable[[int], Tensor]:
        def at(size: int) -> Tensor:
            generator = torch.Generator().manual_seed(recipe.seed + offset)
            return torch.randn(count, depth, size, size, generator=generator)

        return at

    return BenchImages(RANDOM_PIXELS, _own_size(recipe, model), noise(calibration, 0), noise(timed, 1))


def real_images(recipe: Recipe, calibration: int, timed: int) -> BenchImages:
    """Random samples of the recipe's training and evaluation images, at most so many of each.

    Raises ValueError for data that isn't there or has no image.
    """
    train_BCHW = _load(recipe, recipe.data.train, calibration)
    eval_BCHW = _load(recipe, recipe.data.eval, timed)
    described = f"{len(eval_BCHW)} images of {recipe.data.path}, split {recipe.data.eval.split}"
    return BenchImages(described, eval_BCHW.shape[-1], _resized(train_BCHW), _resized(eval_BCHW))


def channels(model: PreTrainedModel) -> int:
    """Of the images that a model takes."""
    return getattr(examine(model).backbone.config, "num_channels", 3)


def _load(recipe: Recipe, split: SplitSpec, count: int) -> Tensor:
    processor = load_processor(recipe.model.checkpoint, recipe.model.revision)
    images = load_images(recipe.data, split, processor, id2label=None, labelled=False, seed=recipe.seed)
    x_BCHW = images.sample(count, recipe.seed).pixels()
    if not len(x_BCHW):
        raise ValueError(f"data: split '{split.split}' of {recipe.data.path} has no image")
    return x_BCHW


def _resized(x_BCHW: Tensor) -> Callable[[int], Tensor]:
    def at(size: int) -> Tensor:
        if tuple(x_BCHW.shape[-2:]) == (size, size):
            return x_BCHW
        return F.interpolate(x_BCHW, (size, size), mode="bicubic", antialias=True)

    return at


def _own_size(recipe: Recipe, model: PreTrainedModel) -> int:
    """What the image processor gives; without one, what the config says."""
    try:
        processor = load_processor(recipe.model.checkpoint, recipe.model.revision)
    except ValueError:
        size = getattr(examine(model).backbone.config, "image_size", None)
        if isinstance(size, int):
            return size
        raise
    return blank_image(processor).shape[-1]


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
        model = load(recipe.model.checkpoint, dtype=dtype, revision=recipe.model.revision)
        nn.Module.to(model, device)
        if is_pruned(model):
            pruning = pruning_of(model)
            if "pruning" in recipe.model_fields_set:
                raise ValueError(
                    f"model.checkpoint {recipe.model.checkpoint} is pruned already; leave the section `pruning` out, "
                    "or name the dense model"
                )
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
        structure, first = examine(self.dense), next(self.dense.parameters())
        image = torch.zeros(1, channels(self.dense), size, size, dtype=first.dtype, device=first.device)
        with torch.no_grad():
            return count_tokens(structure, image) - structure.num_prefix_tokens

    def again(self) -> BenchSubjects:
        """The same with a dense model of its own, on the same weights."""
        return BenchSubjects(twin(self.dense), self.spec, self.own)

    def attached(self) -> PreTrainedModel:
        """Pruned, but nothing ever leaves."""
        model = prune_(twin(self.dense), self.spec)
        pruning = pruning_of(model)
        with torch.no_grad():
            pruning.levels.fill_(KEEPS_ALL if self.spec.select == "threshold" else 1.0)
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
