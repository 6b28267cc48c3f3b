"""What a pruned model does with single images, for people to look at: patches left after each stage, both answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

from vitprune.data.decoding import in_colours, mode_of
from vitprune.data.images import Images
from vitprune.data.pictures import seen_box
from vitprune.measure.outputs import ImageModel, class_names, require_same_width
from vitprune.measure.timing import placed
from vitprune.models.trace import Trace, eval_mode, trace
from vitprune.reports.token_pictures import SIDE, Box, SeenImage, Stage

LARGEST_SIDE = 2 * SIDE


@dataclass(frozen=True)
class Named:
    """A picture with what it is called. label: the right answer as data has it, if it is known."""

    name: str
    picture: PIL.Image.Image
    label: int | list[float] | None = None


def named_rows(images: Images, numbers: Iterable[int]) -> Iterator[Named]:
    """Pictures of a split by the numbers of their rows; as `Images.picture`."""
    for number in numbers:
        name, picture, label = images.picture(number)
        yield Named(f"row {name}", picture, label)


@torch.no_grad()
def look_at(
    pictures: Iterable[Named],
    dense: ImageModel,
    pruned: ImageModel,
    processor: BaseImageProcessor,
    names: Mapping[int, str] | None = None,
) -> Iterator[SeenImage]:
    """Run both models on one picture after the other. names: of classes by id; if None those of the dense model.

    Raises ValueError, naming the picture, where its patches are no grid.
    """
    kind, mode = dense.kind, mode_of(processor)
    names = class_names(dense.model) if names is None else names
    with eval_mode(dense, pruned):
        for one in pictures:
            picture = in_colours(one.picture, mode)
            x_1CHW = processor(picture, return_tensors="pt")["pixel_values"].float()
            before = dense(placed(x_1CHW, dense))
            with trace(pruned) as watched:
                after = pruned(placed(x_1CHW, pruned))
            require_same_width(after, before)
            likeness = kind.likeness(before, after).item()
            box, shown = _smaller(seen_box(processor, picture.size), picture.convert("RGB"))
            yield SeenImage(
                name=one.name,
                picture=shown,
                box=box,
                stages=tuple(_stages(one.name, watched, x_1CHW, pruned.model.config)),
                dense_macs=watched.dense_macs.item(),
                macs=watched.macs.item(),
                dense=kind.describe(before[0], names),
                pruned=kind.describe(after[0], names) or f"cosine {likeness:.4f} to dense",
                label=None if one.label is None else kind.describe_label(one.label, names),
                likeness=likeness,
            )


def _smaller(box: Box, picture: PIL.Image.Image) -> tuple[Box, PIL.Image.Image]:
    """A picture no larger than it is ever drawn, with the box in its pixels: many at once would fill the memory."""
    scale = LARGEST_SIDE / max(picture.size)
    if scale >= 1:
        return box, picture
    width, height = (max(1, round(side * scale)) for side in picture.size)
    left, top, right, bottom = box
    across, down = width / picture.width, height / picture.height
    drawn = picture.resize((width, height), PIL.Image.Resampling.LANCZOS)
    return (left * across, top * down, right * across, bottom * down), drawn


def _stages(name: str, watched: Trace, x_1CHW: Tensor, config: Any) -> Iterator[Stage]:
    height, width = x_1CHW.shape[-2:]
    size = getattr(getattr(config, "vision_config", config), "patch_size", None)
    for block, owners_1P in zip(watched.before_blocks, watched.merged_into, strict=True):
        patches = owners_1P.shape[1]
        rows = height // size[0] if isinstance(size, list | tuple) else round(math.sqrt(patches * height / width))
        if patches % rows:
            raise ValueError(f"{name}: its {patches} patches are no grid over {width} x {height} pixels")
        numbers: Any = owners_1P[0].cpu().numpy()
        yield Stage(block, np.asarray(numbers, dtype=np.int64).reshape(rows, patches // rows))
