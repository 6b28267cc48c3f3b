"""Pictures as they are, before an image processor makes pixel values of them, and which part of one a model sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from transformers.image_processing_utils import BaseImageProcessor

from vitprune.data.decoding import mode_of

LARGEST = 255


def seen_box(processor: BaseImageProcessor, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Find the part of a picture of so many pixels (width, height) that a processor keeps: left, top, right, bottom.

    Pictures whose brightness is a position are processed, so whatever is resized, cropped or padded, what comes out
    says where it came from. The box reaches beyond the picture where that is padded.
    """
    width, height = size
    mode = mode_of(processor)
    black, white = (x_CHW[0] for x_CHW in black_and_white(processor, width, height))

    def edges(ramp: NDArray[np.float64], length: int, axis: int) -> tuple[float, float]:
        if length == 1:
            return 0.0, 1.0
        picture = PIL.Image.fromarray((LARGEST * ramp).round().astype(np.uint8)).convert(mode)
        # where the processor puts black and white depends on how it normalises
        found = (_processed(processor, picture)[0] - black) / np.where(white == black, np.inf, white - black)
        line = found.mean(axis)
        # padding is black, and what repeats the last pixels black or white
        inner = np.flatnonzero((line > 1 / LARGEST) & (line < 1 - 1 / LARGEST))
        if len(inner) < 2:
            return 0.0, float(length)
        slope, offset = np.polyfit(inner + 0.5, line[inner] * (length - 1) + 0.5, 1)
        return float(offset), float(offset + slope * len(line))

    across = np.broadcast_to(np.linspace(0, 1, width), (height, width))
    down = np.broadcast_to(np.linspace(0, 1, height)[:, None], (height, width))
    left, right = edges(across, width, 0)
    top, bottom = edges(down, height, 1)
    return left, top, right, bottom


def black_and_white(
    processor: BaseImageProcessor, width: int, height: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Process a black and a white picture of so many pixels: what a processor makes of them, (C, H, W) each."""
    mode = mode_of(processor)
    colours: Any = (0, LARGEST) if mode == "L" else ((0, 0, 0), (LARGEST, LARGEST, LARGEST))
    black, white = (_processed(processor, PIL.Image.new(mode, (width, height), colour)) for colour in colours)
    return black, white


def _processed(processor: BaseImageProcessor, picture: PIL.Image.Image) -> NDArray[np.float64]:
    """(C, H, W)."""
    values: Any = processor(picture, return_tensors="pt")["pixel_values"]
    return values[0].double().numpy()
