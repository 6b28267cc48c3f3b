"""Batches of images for a model: decoding, the checkpoint's image processor, seeded samples, broken images.

Knows how a row becomes pixel values. Leaves opening data sets and their labels to `sources`, random changes to
`augmentation`, devices and processes to Accelerate.

Tensor suffixes: B images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, IterableDataset, Value
from torch import Tensor
from torch.utils import data as torch_data
from transformers.image_processing_utils import BaseImageProcessor

from vitprune.augmentation import Augmentation, augment
from vitprune.recipe import DataSpec, SplitSpec
from vitprune.sources import Source, open_source

LOADED = 32  # images decoded at a time where all are wanted
SHUFFLE_BUFFER = 1000  # rows of a stream to choose from, undecoded
ROW = "row number"
DECODER = Image()

Sample = tuple[Tensor, int | None]
"""Pixel values (C, H, W) float32, and the class id."""


class BrokenImageError(ValueError):
    """An image that can't be decoded or processed; names split and row."""

    def __init__(self, message: str) -> None:
        # A DataLoader's worker hands the error over as a printed traceback, which ends in the message proper.
        super().__init__(message.rpartition(f"{type(self).__qualname__}: ")[2].strip())


def load_images(
    data: DataSpec,
    split: SplitSpec,
    processor: BaseImageProcessor,
    *,
    id2label: Mapping[int, str] | None,
    labelled: bool = True,
    seed: int = 0,
) -> Images:
    """Opens one split of a data set: a Hub id, an image folder, parquet or arrow files, or what `save_to_disk` wrote.

    `split.limit` takes that many images by chance, by `seed`: data sets are often sorted. Images are decoded and
    processed when a loader asks for them.

    Raises ValueError, naming place and way out, for a data set, split or column that isn't there, and for labels that
    aren't the model's (`id2label`; None skips that check). `labelled`: False leaves labels out.
    """
    source = open_source(data, split.split, id2label, labelled=labelled)
    reader = Reader(source, processor, skip_broken=data.on_error == "skip")
    rows = source.rows
    table = Stream.of(rows, reader) if isinstance(rows, IterableDataset) else Table.of(rows, reader)
    images = Images(table, workers=data.workers)
    return images if split.limit is None else images.sample(split.limit, seed)


@dataclass(frozen=True)
class Reader:
    """Makes a sample of a row."""

    source: Source
    processor: BaseImageProcessor
    skip_broken: bool

    def read(self, row: Mapping[str, Any], number: int) -> Sample | None:
        """None for a broken image where those are skipped, BrokenImageError raised where they aren't."""
        place = f"{self.source.place}, row {number}"
        value = row[self.source.image_column]
        try:
            pixels_CHW = self._pixels(value)
        except Exception as error:  # files are broken in more ways than decoders have errors for
            if self.skip_broken:
                return None
            file = f" ({value['path']})" if value and value["path"] else ""
            raise BrokenImageError(
                f"{place}{file}: cannot be decoded: {error}; set `data.on_error: skip` to leave such rows out"
            ) from error
        labels = self.source.labels
        if labels is None:
            return pixels_CHW, None
        try:
            return pixels_CHW, labels.id_of(row[labels.column])
        except ValueError as error:
            raise ValueError(f"{place}, column {labels.column!r}: {error}") from error

    def _pixels(self, value: Mapping[str, Any] | None) -> Tensor:
        if value is None:
            raise ValueError("the row has no image")
        path, encoded = value["path"], value["bytes"]
        if encoded is None and path is not None and Path(path).is_file():
            encoded = Path(path).read_bytes()  # the decoder would leave the file open where it turns out broken
        image = DECODER.decode_example({"path": path, "bytes": encoded}).convert("RGB")
        return self.processor(image, return_tensors="pt")["pixel_values"][0].float()


class Table(torch_data.Dataset[Sample | None]):
    """Rows that can be asked for by number. Positions count the chosen rows, numbers the rows of the split."""

    def __init__(self, rows: Dataset, reader: Reader, numbers: Tensor, broken: Tensor) -> None:
        self.rows, self.reader, self.numbers = rows, reader, numbers
        self.broken = broken  # one bool a row of the split, shared by all choices from it and with loader processes

    @classmethod
    def of(cls, rows: Dataset, reader: Reader) -> Table:
        return cls(rows, reader, torch.arange(len(rows)), torch.zeros(len(rows), dtype=torch.bool).share_memory_())

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> Sample | None:
        number = int(self.numbers[position])
        sample = self.reader.read(self.rows[number], number)
        if sample is None:
            self.broken[number] = True
        return sample

    @property
    def skipped(self) -> int:
        return int(self.broken[self.numbers].sum())

    def split(self, count: int, seed: int) -> tuple[Table, Table]:
        """The rest, and `count` rows by chance (all, where there are fewer)."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        rest, chosen = self.numbers[order[count:]], self.numbers[order[:count]]
        return Table(self.rows, self.reader, rest, self.broken), Table(self.rows, self.reader, chosen, self.broken)

    def shuffled(self, seed: int) -> Table:
        return self  # the loader's sampler shuffles


class Stream(torch_data.IterableDataset[Sample]):
    """Rows that come one after the other, shuffled through a buffer where chance is asked for."""

    def __init__(self, rows: IterableDataset, reader: Reader, count: Tensor, shuffle_seed: int | None = None) -> None:
        self.rows, self.reader, self.count = rows, reader, count
        self.shuffle_seed, self.epoch = shuffle_seed, 0

    @classmethod
    def of(cls, rows: IterableDataset, reader: Reader) -> Stream:
        assert rows.features is not None
        features = rows.features.copy()
        features[ROW] = Value("int64")
        numbered = rows.map(_number, with_indices=True, features=features)
        return cls(numbered, reader, torch.zeros(1, dtype=torch.int64).share_memory_())

    def __iter__(self) -> Iterator[Sample]:
        rows = self.rows
        if self.shuffle_seed is not None:
            # Not `rows.set_epoch`: that would also redraw what `split` held out.
            rows = rows.shuffle(seed=self.shuffle_seed + self.epoch, buffer_size=SHUFFLE_BUFFER)
        for row in rows:
            sample = self.reader.read(row, row[ROW])
            if sample is None:
                self.count += 1
            else:
                yield sample

    @property
    def skipped(self) -> int:
        return int(self.count)

    def set_epoch(self, epoch: int) -> None:
        """Another order for each pass; Accelerate's loaders call this."""
        self.epoch = epoch

    def split(self, count: int, seed: int) -> tuple[Stream, Stream]:
        """The rest, and the first `count` rows of a shuffled stream."""
        rows = self.rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        return Stream(rows.skip(count), self.reader, self.count), Stream(rows.take(count), self.reader, self.count)

    def shuffled(self, seed: int) -> Stream:
        return Stream(self.rows, self.reader, self.count, seed)


def _number(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {**row, ROW: number}


class Images:
    """Images of one split, ready for a model. Choosing from them is cheap; nothing is decoded before a loader runs."""

    def __init__(self, rows: Table | Stream, *, workers: int = 0) -> None:
        self._rows, self._workers = rows, workers

    def __len__(self) -> int:
        """How many images, broken ones that turn up later included. Raises TypeError where `streamed`."""
        if isinstance(self._rows, Stream):
            raise TypeError("a streamed split doesn't know its length")
        return len(self._rows)

    @property
    def streamed(self) -> bool:
        return isinstance(self._rows, Stream)

    @property
    def labelled(self) -> bool:
        return self._rows.reader.source.labels is not None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes by id, where the data has them."""
        labels = self._rows.reader.source.labels
        return None if labels is None else labels.names

    @property
    def skipped(self) -> int:
        """Broken images left out so far. Of a stream: each time that one was met, whichever part of it."""
        return self._rows.skipped

    def sample(self, count: int, seed: int) -> Images:
        """`count` images by chance, without repetition and in random order; all of them where there are fewer.

        Of a stream: the first `count` that come out of a shuffle buffer.
        """
        return Images(self._rows.split(count, seed)[1], workers=self._workers)

    def holdout(self, count: int, seed: int) -> tuple[Images, Images]:
        """The rest, and `count` images by chance that are not in it.

        Raises ValueError where that would leave none. (Of a stream that can't be told.)
        """
        if not self.streamed and count >= len(self):
            raise ValueError(
                f"{self._rows.reader.source.place}: {count} images can't be held out of {len(self)}; give more, or "
                "lower `finetune.holdout`"
            )
        rest, held_out = self._rows.split(count, seed)
        return Images(rest, workers=self._workers), Images(held_out, workers=self._workers)

    def pixels(self) -> Tensor:
        """Pixel values of all images, (B, C, H, W) float32; B is 0 where there is none."""
        batches = [batch["pixel_values"] for batch in self.loader(LOADED)]
        return torch.cat(batches) if batches else torch.empty(0, 3, 0, 0)

    def loader(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        augmentation: Augmentation = "none",
        workers: int | None = None,
        drop_last: bool = False,
    ) -> torch_data.DataLoader[Any]:
        """Batches `{"pixel_values": (B, C, H, W) float32, "labels": (B,) int64}`, without labels where not `labelled`.

        `shuffle` gives every pass another order, by `seed`; a stream needs its epoch set for that, as Accelerate does.
        `workers`: loader processes, by default the recipe's. A batch is smaller by the broken images skipped in it.

        Raises BrokenImageError while running, and ValueError for a batch of only broken images.
        """
        rows, streamed = self._rows.shuffled(seed) if shuffle else self._rows, self.streamed
        processes = self._workers if workers is None else workers
        if isinstance(rows, Stream):
            processes = min(processes, rows.rows.num_shards)
        reader = rows.reader
        return torch_data.DataLoader(
            rows,
            batch_size=batch_size,
            shuffle=shuffle and not streamed,
            num_workers=processes,
            collate_fn=Collate(reader.source.place, augment(augmentation, reader.processor)),
            drop_last=drop_last,
            generator=torch.Generator().manual_seed(seed),
        )


@dataclass(frozen=True)
class Collate:
    """Puts samples together to a batch."""

    place: str
    augment: Callable[[Tensor], Tensor] | None

    def __call__(self, samples: list[Sample | None]) -> dict[str, Tensor]:
        whole = [sample for sample in samples if sample is not None]
        if not whole:
            raise ValueError(f"{self.place}: a whole batch of {len(samples)} images is broken; see what the data holds")
        shapes = {tuple(pixels_CHW.shape) for pixels_CHW, _ in whole}
        if len(shapes) > 1:
            raise ValueError(
                f"{self.place}: the image processor gives images of different sizes (C, H, W): {sorted(shapes)}; it "
                "has to resize or crop all to one size (preprocessor_config.json)"
            )
        pixels_BCHW = torch.stack([pixels_CHW for pixels_CHW, _ in whole])
        batch = {"pixel_values": pixels_BCHW if self.augment is None else self.augment(pixels_BCHW)}
        labels = [label for _, label in whole if label is not None]
        return {**batch, "labels": torch.tensor(labels)} if labels else batch
