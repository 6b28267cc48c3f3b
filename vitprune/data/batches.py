"""Images as callers have them: ours, a data loader of any kind, tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from vitprune.data.images import Images

Batch = Tensor | Mapping[str, Tensor]
"""Pixel values (B, C, H, W), or by name all that a model takes; labels may be there as `labels` or `label`."""
Batches = Images | Tensor | Iterable[Any]
"""`Images`; one batch; or an iterable of batches: a list, a `DataLoader`, or one that gives pairs (images, labels)."""
LABELS = ("labels", "label")
AT_A_TIME = 32


def each(batches: Batches, batch_size: int = AT_A_TIME) -> Iterator[Batch]:
    """Give the batches one by one; `Images` so many at a time.

    Raises TypeError for what holds no images.
    """
    if isinstance(batches, Images):
        yield from batches.loader(batch_size)
        return
    if isinstance(batches, Tensor):
        yield batches
        return
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise TypeError(f"images are {type(batches).__name__}; pass {_EXPECTED}")
    for batch in batches:
        match batch:
            case Tensor() if batch.ndim > 1:
                yield batch
            case (Tensor() as x_BCHW, labels):
                yield {"pixel_values": x_BCHW, "labels": labels}
            case Mapping() if batch:
                yield batch
            case _:
                raise TypeError(f"batches hold {type(batch).__name__}; pass {_EXPECTED}")


_EXPECTED = (
    "vitprune.load_images(...), a tensor of pixel values (B, C, H, W), or a list or DataLoader of such tensors, of "
    "dicts with them as 'pixel_values', or of pairs (images, labels)"
)


def named(batch: Batch) -> dict[str, Tensor]:
    """A batch with its pixel values and labels by name."""
    if isinstance(batch, Tensor):
        return {"pixel_values": batch}
    return {"labels" if name in LABELS else name: values for name, values in batch.items()}


def without_labels(batch: Batch) -> Batch:
    """What the model takes of a batch."""
    if isinstance(batch, Tensor):
        return batch
    left = {name: values for name, values in batch.items() if name not in LABELS}
    return left["pixel_values"] if left.keys() == {"pixel_values"} else left
