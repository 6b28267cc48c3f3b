"""Images of a data set's split, ready for a model: opening, seeded samples, batches.

Tensor suffixes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import PIL.Image
import torch
from datasets import IterableDataset
from torch import Tensor
from torch.utils import data as torch_data
from transformers.image_processing_utils import BaseImageProcessor

from vitprune.data.decoding import Collate, Reader, blank_image
from vitprune.data.source import open_source
from vitprune.data.splits import Stream, Table
from vitprune.recipe.schema import DataSpec, SplitSpec, Task
from vitprune.recipe.values import as_spec
from vitprune.runtime.signals import leave_to_main

LOADED = 32  # images decoded at a time where all are wanted


class _NonEmpty(torch_data.DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return (batch for batch in super().__iter__() if batch is not None)


def load_images(
    data: DataSpec | Mapping[str, Any],
    split: SplitSpec | Mapping[str, Any] | str,
    processor: BaseImageProcessor,
    *,
    id2label: Mapping[int, str] | None = None,
    labelled: bool = True,
    task: Task = "single-label",
    seed: int = 0,
) -> Images:
    """Open one split of a data set: a Hub id, an image folder, parquet or arrow files, or what `save_to_disk` wrote.

    data, split: as a recipe's sections `data` and `data.train`, also dicts of their keys; a split's name is enough.
    `split.limit` takes that many images by chance, by `seed`: data sets are often sorted. Images are decoded and
    processed when a loader asks for them.

    Raises ValueError, naming place and way out, for a data set, split or column that isn't there, and for labels that
    aren't the model's (`id2label`; None skips that check). `labelled`: False leaves labels out. `task`: what labels
    are: a class id, several (`"multi-label"`), or numbers (`"regression"`). Warns of columns that may hold labels and
    weren't taken for them.
    """
    data = as_spec(DataSpec, data)
    split = SplitSpec(split=split) if isinstance(split, str) else as_spec(SplitSpec, split)
    source = open_source(data, split.split, id2label, labelled=labelled, task=task)
    for note in source.doubts:
        warnings.warn(note, stacklevel=2)
    reader = Reader(source, processor, skip_broken=data.on_error == "skip")
    rows = source.rows
    table = Stream.of(rows, reader) if isinstance(rows, IterableDataset) else Table.of(rows, reader)
    images = Images(table, workers=data.workers)
    return images if split.limit is None else images.sample(split.limit, seed)


class Images:
    """Images of one split, ready for a model. Choosing from them is cheap; nothing is decoded before a loader runs."""

    def __init__(self, rows: Table | Stream, *, workers: int = 0) -> None:
        self.rows, self.workers = rows, workers

    def __len__(self) -> int:
        """How many images, broken ones that turn up later included. Raises TypeError where `streamed`."""
        if isinstance(self.rows, Stream):
            raise TypeError("a streamed split doesn't know its length")
        return len(self.rows)

    @property
    def length(self) -> int | None:
        """How many images; None where a stream doesn't tell."""
        return self.rows.length

    @property
    def streamed(self) -> bool:
        return isinstance(self.rows, Stream)

    @property
    def fingerprint(self) -> str:
        """Tell these images from others, also in another process."""
        return self.rows.fingerprint

    @property
    def processor(self) -> BaseImageProcessor:
        """What makes pixel values of pictures."""
        return self.rows.reader.processor

    @property
    def labelled(self) -> bool:
        return self.rows.reader.source.labels is not None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes by id, where the data has them."""
        labels = self.rows.reader.source.labels
        return None if labels is None else labels.names

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the labels."""
        source = self.rows.reader.source
        return (*source.notes, *source.doubts)

    @property
    def skipped(self) -> int:
        """Broken images left out so far. Of a stream: each time that one was met, whichever part of it."""
        return self.rows.skipped

    def sample(self, count: int, seed: int) -> Images:
        """`count` images by chance, without repetition and in random order; all of them where there are fewer.

        Of a stream: the first `count` that come out of a shuffle buffer.
        """
        return Images(self.rows.split(count, seed)[1], workers=self.workers)

    def holdout(self, count: int, seed: int) -> tuple[Images, Images]:
        """The rest, and `count` images by chance that are not in it.

        Raises ValueError where that would leave none. (Of a stream that can't be told.)
        """
        if not self.streamed and count >= len(self):
            raise ValueError(
                f"{self.rows.reader.source.place}: {count} images can't be held out of {len(self)}; give more, or "
                "hold out fewer"
            )
        rest, held_out = self.rows.split(count, seed)
        return Images(rest, workers=self.workers), Images(held_out, workers=self.workers)

    def share(self, index: int, count: int) -> Images:
        """The part of one of `count` processes; the parts of all together are the whole, without repetition."""
        return Images(self.rows.share(index, count), workers=self.workers)

    def pixels(self) -> Tensor:
        """Pixel values of all images, (B, C, H, W) float32; B is 0 where there is none."""
        batches = [batch["pixel_values"] for batch in self.loader(LOADED)]
        return torch.cat(batches) if batches else torch.empty(0, 3, 0, 0)

    def picture(self, number: int) -> tuple[str, PIL.Image.Image, int | list[float] | None]:
        """One picture of the split as it is, by its row's number: that number in words, the picture, its label.

        Raises ValueError for a row that isn't there, BrokenImageError for one that can't be decoded. Not of a stream.
        """
        assert isinstance(self.rows, Table)
        return self.rows.picture(number)

    @property
    def whole(self) -> tuple[int, ...] | None:
        """Numbers of the rows in order, without those that turned out broken so far; None of a stream."""
        return None if isinstance(self.rows, Stream) else self.rows.whole

    def stand_in(self) -> dict[str, Tensor]:
        """A batch of one empty image, as `loader` gives them."""
        batch = {"pixel_values": blank_image(self.rows.reader.processor).float()}
        labels = self.rows.reader.source.labels
        return batch if labels is None else {**batch, "labels": labels.blank}

    def loader(self, batch_size: int) -> torch_data.DataLoader[Any]:
        """Batches `{"pixel_values": (B, C, H, W) float32, "labels": (B,) int64}`, without labels where not `labelled`.

        Of several labels an image, or of numbers, labels are (B, outputs of the model) float32.

        A batch is smaller by the broken images skipped in it, and doesn't come where no other is in it.

        Raises BrokenImageError while running.
        """
        rows, processes = self.rows, self.workers
        if isinstance(rows, Stream):
            processes = min(processes, rows.num_shards)
        return _NonEmpty(
            rows,
            batch_size=batch_size,
            num_workers=processes,
            worker_init_fn=leave_to_main,
            collate_fn=Collate(rows.reader.source.place),
            generator=torch.Generator().manual_seed(0),
        )
