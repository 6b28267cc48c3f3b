"""Random changes to a batch of training images, made with kornia.

Knows what fine-tuning of image classifiers usually does to its images, and how the checkpoint's image processor scaled
them.

Tensor suffixes: B images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, assert_never

import torch
from torch import Tensor, nn
from transformers.image_processing_utils import BaseImageProcessor

from vitprune.data.pictures import black_and_white
from vitprune.recipe.errors import RecipeError

Augmentation = Literal["none", "light", "strong"]
SIDE = 64  # pixels of a picture of one colour
Augment = Callable[[Tensor], Tensor]
"""Pixel values (B, C, H, W), scaled as an image processor scales them, to the same, changed by chance."""


def augment(kind: Augmentation, processor: BaseImageProcessor) -> Augment | None:
    """What to do to training images, None for `"none"`.

    `light` flips images and crops them to 70..100 % of their area, scaled back to their size. `strong` also changes
    brightness, contrast and saturation, rotates, shifts and shears a little, and blanks a rectangle. Every image of a
    batch is changed in its own way.

    The callable maps pixel values (B, C, H, W), scaled as `processor` scales them, to the same shape and scale. It
    draws from torch's global random numbers: the same seed gives the same changes.

    Raises ValueError for `strong` where `processor` does not make RGB images.
    """
    match kind:
        case "none":
            return None
        case "light":
            return _Light()
        case "strong":
            require_fitting(kind, processor)
            return _Strong(*pixel_scale(processor))
        case _:
            assert_never(kind)


def require_fitting(kind: Augmentation, processor: BaseImageProcessor) -> None:
    """Raise ValueError for changes that the images of a processor can't bear; asked without kornia."""
    if kind == "strong" and (channels := len(pixel_scale(processor)[0])) != 3:
        text = f"'strong' changes colours, so it needs images of 3 channels, not {channels}; use 'light'"
        raise RecipeError.at(("finetune", "augmentation"), text)


class _Light(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # kornia takes its time to import, and only training with augmentation needs it.
        from kornia.augmentation import RandomHorizontalFlip

        self.flip = RandomHorizontalFlip(p=0.5)
        # The output size belongs to the operation, so it is set when the first batch shows it.
        self.crop: nn.Module = nn.Identity()
        self.size: tuple[int, int] | None = None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        from kornia.augmentation import RandomResizedCrop

        size = (x_BCHW.shape[-2], x_BCHW.shape[-1])
        if size != self.size:
            self.crop, self.size = RandomResizedCrop(size, scale=(0.7, 1.0)), size
        return self.crop(self.flip(x_BCHW))


class _Strong(nn.Module):
    def __init__(self, scale_C: Tensor, shift_C: Tensor) -> None:
        super().__init__()
        from kornia.augmentation import RandomAffine, RandomBrightness, RandomContrast, RandomErasing, RandomSaturation

        self.register_buffer("scale", scale_C[:, None, None])
        self.register_buffer("shift", shift_C[:, None, None])
        self.light = _Light()
        self.colour = nn.Sequential(
            RandomBrightness((0.8, 1.2), p=0.5),
            RandomContrast((0.6, 1.4), p=0.5),
            RandomSaturation((0.6, 1.4), p=0.5),
        )
        self.geometry = RandomAffine(degrees=15.0, translate=(0.1, 0.1), shear=10.0, p=0.5)
        self.erase = RandomErasing(p=0.25)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        scale, shift = self.get_buffer("scale"), self.get_buffer("shift")
        # Colour operations want [0, 1]. What moves or blanks pixels fills with 0, the mean colour of scaled pixels.
        unit_BCHW = ((self.light(x_BCHW) - shift) / scale).clamp(0.0, 1.0)
        return self.erase(self.geometry(self.colour(unit_BCHW) * scale + shift))


def pixel_scale(processor: BaseImageProcessor) -> tuple[Tensor, Tensor]:
    """scale (C,) and shift (C,) such that the processor's pixel values are unit * scale + shift, unit in [0, 1]."""
    black_CHW, white_CHW = map(torch.from_numpy, black_and_white(processor, SIDE, SIDE))
    # in the middle, since a processor may pad
    black_C, white_C = (x_CHW[:, x_CHW.shape[1] // 2, x_CHW.shape[2] // 2].float() for x_CHW in (black_CHW, white_CHW))
    return white_C - black_C, black_C
