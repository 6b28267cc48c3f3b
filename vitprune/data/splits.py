"""The rows of a split that were chosen: a table, whose rows are asked for by number, or a stream, which passes once."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import PIL.Image
import torch
from datasets import Dataset, IterableDataset, Value
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils import data as torch_data

from vitprune.data.decoding import Reader, Sample

SHUFFLE_BUFFER = 1000  # rows of a stream to choose from, undecoded
# processes share a stream's shards where none has so much more than its part; otherwise each reads all, and takes some
UNEVEN = 1.1
ROW = "row number"


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
        row = self.rows[number]
        sample = self.reader.read(row, str(row.get(ROW, number)))
        if sample is None:
            self.broken[number] = True
        return sample

    def picture(self, number: int) -> tuple[str, PIL.Image.Image, int | list[float] | None]:
        """The picture of a row, by its number in the split, with that number in words, and its label.

        Raises ValueError where there is no such row, BrokenImageError where it can't be decoded.
        """
        if not 0 <= number < len(self.rows):
            raise ValueError(f"{self.reader.source.place} has rows 0 to {len(self.rows) - 1}, none of number {number}")
        row = self.rows[number]
        name = str(row.get(ROW, number))
        return name, *self.reader.picture(row, name)

    @property
    def skipped(self) -> int:
        return int(self.broken[self.numbers].sum())

    @property
    def whole(self) -> tuple[int, ...]:
        """Numbers of the chosen rows, in order, without those that turned out broken."""
        return tuple(self.numbers[~self.broken[self.numbers]].tolist())

    @property
    def length(self) -> int:
        return len(self)

    @property
    def fingerprint(self) -> str:
        """Tell these rows from others: what `datasets` says of the split, and which of it were chosen."""
        chosen = hashlib.blake2b(self.numbers.numpy().tobytes(), digest_size=8).hexdigest()
        return f"{self.rows._fingerprint} {chosen}"

    def split(self, count: int, seed: int) -> tuple[Table, Table]:
        """The rest, and `count` rows by chance (all, where there are fewer)."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        rest, chosen = self.numbers[order[count:]], self.numbers[order[:count]]
        return Table(self.rows, self.reader, rest, self.broken), Table(self.rows, self.reader, chosen, self.broken)

    def share(self, index: int, count: int) -> Table:
        """Every `count`-th row, from row `index` on."""
        return Table(self.rows, self.reader, self.numbers[index::count], self.broken)


@dataclass(frozen=True)
class Order:
    """In which order an epoch of a stream comes: by chance, out of a buffer of rows."""

    seed: int
    epoch: int


@dataclass(frozen=True, eq=False)
class Stream(torch_data.IterableDataset[Sample | None]):
    """Rows that come one after the other; None for a broken one that is skipped.

    length: rows in all, where the data set says. held_out: digests of rows that don't come. order: the source's own if
    None. part: index and number of the process whose rows these are; its loader's processes share them further.
    """

    rows: IterableDataset
    reader: Reader
    broken: Tensor
    length: int | None
    held_out: frozenset[int] = frozenset()
    order: Order | None = None
    part: tuple[int, int] = (0, 1)

    @classmethod
    def of(cls, rows: IterableDataset, reader: Reader) -> Stream:
        assert rows.features is not None
        features = rows.features.copy()
        features[ROW] = Value("int64")
        numbered = rows.map(_number, with_indices=True, features=features)
        splits = rows.info.splits
        length = splits[str(rows.split)].num_examples if splits and str(rows.split) in splits else None
        return cls(numbered, reader, torch.zeros(1, dtype=torch.int64).share_memory_(), length or None)

    def __iter__(self) -> Iterator[Sample | None]:
        for row in self.own_rows():
            yield self.read(row)

    def own_rows(self) -> Iterator[dict[str, Any]]:
        """This process's rows, undecoded; inside a loader's process those of its own."""
        yield from self._without_held_out(self._shared())

    def read(self, row: Mapping[str, Any]) -> Sample | None:
        sample = self.reader.read(row, f"{row[ROW]}{self._whose()}")
        if sample is None:
            self.broken.add_(1)
        return sample

    @property
    def skipped(self) -> int:
        return int(self.broken)

    @property
    def fingerprint(self) -> str:
        """Tell these rows from others as far as a stream can: by what is held out."""
        return " ".join(f"{digest:016x}" for digest in sorted(self.held_out)[:3]) or "stream"

    @property
    def num_shards(self) -> int:
        """How many loader processes can share these rows."""
        return self._shared().num_shards

    def split(self, count: int, seed: int) -> tuple[Stream, Table]:
        """The rest, and the first `count` rows out of a shuffle buffer; those are read now, and kept undecoded.

        None of them is held out already.
        """
        shuffled = self.rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        rows = list(islice(self._without_held_out(shuffled), count))
        digests = {digest(row[self.reader.source.image_column]) for row in rows}
        length = None if self.length is None else max(0, self.length - len(rows))
        rest = replace(self, held_out=self.held_out | digests, length=length)
        return rest, Table.of(Dataset.from_list(rows, features=self.rows.features), self.reader)

    def share(self, index: int, count: int) -> Stream:
        return replace(self, part=(index, count))

    def _without_held_out(self, rows: IterableDataset) -> Iterator[dict[str, Any]]:
        for row in rows:
            if not self.held_out or digest(row[self.reader.source.image_column]) not in self.held_out:
                yield row

    def _shared(self) -> IterableDataset:
        rows = self.rows
        if self.order is not None:
            # several shards at a time are read by threads, which a loader's process, a fork, can wait for in vain
            rows = rows.shuffle(seed=_seed(self.order), buffer_size=SHUFFLE_BUFFER, max_buffer_input_shards=1)
        index, count = self.part
        if count == 1:
            return rows
        most = math.ceil(rows.num_shards / count)  # of the shards, which the process has that has most
        by_shards = most * count <= UNEVEN * rows.num_shards
        return split_dataset_by_node(rows, index, count, "shards" if by_shards else "examples")

    def _whose(self) -> str:
        """Rows are counted by what reads them."""
        info = torch_data.get_worker_info()
        own = (f" of process {self.part[0]}",) if self.part[1] > 1 else ()
        loaded = (f" of loader process {info.id}",) if info is not None and info.num_workers > 1 else ()
        return "".join((*own, *loaded))


def digest(image: Mapping[str, Any] | None) -> int:
    """Tell an undecoded image from others, by its bytes or where it has none by its path."""
    image = image or {}
    content = image.get("bytes") or str(image.get("path")).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _seed(order: Order) -> int:
    return (order.seed * 1_000_003 + order.epoch) % 2**32


def _number(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {**row, ROW: number}
