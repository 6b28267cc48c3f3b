"""Pictures of all kinds in the 8 bits and the colours that an image processor takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
from transformers.image_processing_utils import BaseImageProcessor

LARGEST = {8: 255, 16: 65535}
_MODES = {1: "L", 3: "RGB"}


def mode_of(processor: BaseImageProcessor) -> str:
    """Pillow's mode of the pictures that a checkpoint sees: grey or colours, by the channels it is normalised with.

    Raises ValueError for another number of channels.
    """
    settings: dict[str, Any] = processor.to_dict()
    mean = settings.get("image_mean")
    channels = len(mean) if settings.get("do_normalize") and isinstance(mean, list | tuple) else 3
    if channels not in _MODES:
        raise ValueError(
            f"the checkpoint's images have {channels} channels (image_mean in preprocessor_config.json); pictures have "
            "1 or 3: use the Python API with batches of your own"
        )
    return _MODES[channels]


def in_colours(picture: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    """A picture in the mode "L" or "RGB". What is transparent shows the colour beneath.

    Numbers of 16 bits are scaled to 8, and fractions from 0 to 1 as well; Pillow's own `convert` would make white or
    black of them. Raises ValueError, naming the mode, for others.
    """
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _of_8_bits(picture)
    return picture.convert(mode)


def _of_8_bits(picture: PIL.Image.Image) -> PIL.Image.Image:
    values = np.asarray(picture)
    low, high = float(values.min()), float(values.max())
    is_whole = np.issubdtype(values.dtype, np.integer)
    largest = LARGEST[16] if is_whole else 1
    if not (low >= 0 and high <= largest):  # which is no number isn't either
        kind = "whole numbers of 16 bits" if is_whole else "fractions from 0 to 1"
        raise ValueError(
            f"its pixels (Pillow's mode {picture.mode}) go from {low:g} to {high:g}, and only {kind} are understood; "
            "save it with 8 bits"
        )
    scaled = values.astype(np.float64) * (LARGEST[8] / largest)
    return PIL.Image.fromarray(scaled.round().astype(np.uint8))
