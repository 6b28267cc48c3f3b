"""Images whose grey says which row they are, and a cache of their own."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import PIL.Image
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
)
from transformers import ViTImageProcessorPil

from vitprune.recipe.schema import SplitSpec

NAMES = ["bird", "cat", "dog"]
ID2LABEL = dict(enumerate(NAMES))
TRAIN = SplitSpec(split="train")
PROCESSOR = ViTImageProcessorPil(size={"height": 8, "width": 8})


def png(value: int, mode: str = "L") -> bytes:
    """A 10 x 12 image of one grey."""
    file = io.BytesIO()
    PIL.Image.fromarray(np.full((10, 12), value, dtype=np.uint8)).convert(mode).save(file, "PNG")
    return file.getvalue()


def rows(count: int, label: Any = None, broken: tuple[int, ...] = ()) -> Dataset:
    """Row i is an image of grey 10 i with label i % 3; `label` is the feature of that column."""
    images = [{"bytes": b"no image" if i in broken else png(10 * i), "path": None} for i in range(count)]
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=NAMES) if label is None else label})
    data = Dataset.from_dict({"image": images, "label": [i % 3 for i in range(count)]}, features=features)
    return data.cast_column("image", Image())
