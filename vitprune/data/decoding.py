"""Rows become pixel values and batches: decoding, colours, the checkpoint's image processor, broken images.

Tensor suffixes: B images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

from vitprune.data.source import Source

DECODER = Image()

Sample = tuple[Tensor, int | list[float] | None]
"""Pixel values (C, H, W) float32, and the class id, or a number for each of the checkpoint's outputs."""


class BrokenImageError(ValueError):
    """An image that can't be decoded or processed; names split and row."""

    def __init__(self, message: str) -> None:
        # A DataLoader's worker hands the error over as a printed traceback, which ends in the message proper.
        super().__init__(message.rpartition(f"{type(self).__qualname__}: ")[2].strip())


@dataclass(frozen=True)
class Reader:
    """Makes a sample of a row."""

    source: Source
    processor: BaseImageProcessor
    skip_broken: bool

    @cached_property
    def mode(self) -> str:
        """As Pillow calls it."""
        return mode_of(self.processor)

    def read(self, row: Mapping[str, Any], number: str) -> Sample | None:
        """None for a broken image where those are skipped, BrokenImageError raised where they aren't."""
        try:
            picture = in_colours(decode(row[self.source.image_column]), self.mode)
            pixels_CHW = self.processor(picture, return_tensors="pt")["pixel_values"][0].float()
        except Exception as error:  # files are broken in more ways than decoders have errors for
            if self.skip_broken:
                return None
            raise self._broken(row, number, error) from error
        return pixels_CHW, self._label(row, number)

    def picture(self, row: Mapping[str, Any], number: str) -> tuple[PIL.Image.Image, int | list[float] | None]:
        """The picture of a row as it is, and its label. Raises BrokenImageError."""
        try:
            picture = decode(row[self.source.image_column])
        except Exception as error:  # as above
            raise self._broken(row, number, error) from error
        return picture, self._label(row, number)

    def _broken(self, row: Mapping[str, Any], number: str, error: Exception) -> BrokenImageError:
        value = row[self.source.image_column]
        file = f" ({value['path']})" if value and value["path"] else ""
        return BrokenImageError(
            f"{self.source.place}, row {number}{file}: cannot be decoded: {error}; set `data.on_error: skip` to leave "
            "such rows out"
        )

    def _label(self, row: Mapping[str, Any], number: str) -> int | list[float] | None:
        labels = self.source.labels
        if labels is None:
            return None
        try:
            return labels.read(row[labels.column])
        except ValueError as error:
            raise ValueError(f"{self.source.place}, row {number}, column {labels.column!r}: {error}") from error


def decode(value: Mapping[str, Any] | None) -> PIL.Image.Image:
    """The picture of a row's undecoded image, turned upright.

    Raises ValueError where there is none, and for a broken one anything that a decoder raises.
    """
    if value is None:
        raise ValueError("the row has no image")
    path, encoded = value["path"], value["bytes"]
    if encoded is None and path is not None and Path(path).is_file():
        encoded = Path(path).read_bytes()  # the decoder would leave the file open where it turns out broken
    return DECODER.decode_example({"path": path, "bytes": encoded})


def blank_image(processor: BaseImageProcessor) -> Tensor:
    """Pixel values of an empty image, (1, C, H, W): the size that the processor gives every image."""
    return processor(PIL.Image.new(mode_of(processor), (256, 256)), return_tensors="pt")["pixel_values"]


def processor_at(processor: BaseImageProcessor, height: int, width: int) -> BaseImageProcessor:
    """The image processor, giving images of so many pixels: what it resizes to grows or shrinks with what it crops.

    Raises ValueError for one that can't be told a size.
    """
    settings: dict[str, Any] = processor.to_dict()
    if not (settings.get("do_resize", True) or settings.get("do_center_crop")):
        return processor  # which leaves sizes alone
    old_height, old_width = blank_image(processor).shape[-2:]
    if (old_height, old_width) == (height, width):
        return processor
    new = {"height": height, "width": width}
    scale = {"height": height / old_height, "width": width / old_width, "shortest_edge": height / old_height}
    changes = {"crop_size": new} if settings.get("do_center_crop") else {}
    if settings.get("do_resize") and isinstance(settings.get("size"), Mapping):
        sides: Mapping[str, int] = settings["size"]
        changes["size"] = {side: round(pixels * scale[side]) for side, pixels in sides.items() if side in scale}
    try:
        found: Any = type(processor).from_dict({**settings, **changes})
        if blank_image(found).shape[-2:] == (height, width):
            return found
    except (TypeError, ValueError):  # it knows sizes of another kind
        pass
    raise ValueError(
        f"the image processor gives images of {old_height}×{old_width} pixels and can't be told to give "
        f"{height}×{width}; set that in preprocessor_config.json"
    )


@dataclass(frozen=True)
class Collate:
    """Puts samples together to a batch; None where all are broken."""

    place: str

    def __call__(self, samples: list[Sample | None]) -> dict[str, Tensor] | None:
        whole = [sample for sample in samples if sample is not None]
        if not whole:
            return None
        shapes = {tuple(pixels_CHW.shape) for pixels_CHW, _ in whole}
        if len(shapes) > 1:
            raise ValueError(
                f"{self.place}: the image processor gives images of different sizes (C, H, W): {sorted(shapes)}; it "
                "has to resize or crop all to one size (preprocessor_config.json)"
            )
        batch = {"pixel_values": torch.stack([pixels_CHW for pixels_CHW, _ in whole])}
        labels = [label for _, label in whole if label is not None]
        return {**batch, "labels": torch.tensor(labels)} if labels else batch


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
    black of them. Numbers of 32 bits that go no further than 255 are taken for 8. Raises ValueError, naming
    the mode, for others.
    """
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _of_8_bits(picture)
    return picture.convert(mode)


def _of_8_bits(picture: PIL.Image.Image) -> PIL.Image.Image:
    values = np.asarray(picture)
    low, high = float(values.min()), float(values.max())
    is_whole = np.issubdtype(values.dtype, np.integer)
    largest = LARGEST[8 if picture.mode == "I" and high <= LARGEST[8] else 16] if is_whole else 1
    if not (low >= 0 and high <= largest):  # which is no number isn't either
        kind = "whole numbers of 16 bits" if is_whole else "fractions from 0 to 1"
        raise ValueError(
            f"its pixels (Pillow's mode {picture.mode}) go from {low:g} to {high:g}, and only {kind} are understood; "
            "save it with 8 bits"
        )
    scaled = values.astype(np.float64) * (LARGEST[8] / largest)
    return PIL.Image.fromarray(scaled.round().astype(np.uint8))
