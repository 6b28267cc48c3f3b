"""Training images in an order that depends on the seed; of a table on that alone, however many processes load it.

Knows batches, epochs and positions to go on from.

Tensor suffixes: B images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count as count_from
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import data as torch_data

from vitprune.data.augmentation import Augment, Augmentation, augment
from vitprune.data.decoding import Collate, Sample
from vitprune.data.images import Images
from vitprune.data.splits import Order, Stream, Table, digest
from vitprune.recipe.errors import RecipeError
from vitprune.runtime.signals import leave_to_main


@dataclass(frozen=True)
class Share:
    """Which part of every batch is a process's own."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class Position:
    """Images consumed so far by all processes (streams: in this epoch; tables: in total)."""

    epoch: int = 0
    images: int = 0


WHOLE, START = Share(), Position()
_END: Any = object()


@dataclass
class TrainingBatches:
    """This process's share of one batch after the other, without an end.

    Each is a batch as `Images.loader` gives them, or None where the share is empty: all its images are broken, or the
    epoch of a stream has `ended` for this process. When it has for all of them, call `begin_epoch`.

    Of a table, batch k has the images k·`batch_size` to (k + 1)·`batch_size` of an endless row of epochs, each in an
    order of its own: batches are always full, also where one epoch ends and the next begins.
    """

    images: Images
    batch_size: int
    seed: int
    augmentation: Augmentation
    share: Share = WHOLE
    position: Position = START
    ended: bool = field(default=False, init=False)
    _loader: Iterator[Any] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        require_even(self.batch_size, self.share.count)

    def __next__(self) -> dict[str, Tensor] | None:
        if self._loader is None:
            self._loader = self._load()
        batch = next(self._loader, _END)
        self.ended = batch is _END
        self.position = Position(self.position.epoch, self.position.images + self.batch_size)
        return None if self.ended else batch

    def begin_epoch(self) -> None:
        """The next epoch of a stream."""
        self.position, self._loader, self.ended = Position(self.position.epoch + 1), None, False

    def _load(self) -> Iterator[Any]:
        """From the position on."""
        rows, workers, passed = self.images.rows, self.images.workers, self.position.images // self.batch_size
        own = self.batch_size // self.share.count
        changes = augment(self.augmentation, rows.reader.processor)
        if isinstance(rows, Table):
            numbers = _Numbers(self.batch_size, self.share, self.position.images)
            return iter(self._loader_of(_Endless(rows, self.seed, changes), workers, batch_sampler=numbers))
        stream = replace(rows, order=Order(self.seed, self.position.epoch), part=(self.share.index, self.share.count))
        workers = min(workers, stream.num_shards)
        # batches come from loader processes in turn, so each has given at least so many
        epoch = _Epoch(stream, self.seed, changes, passed=passed // max(1, workers) * own)
        batches = iter(self._loader_of(epoch, workers, batch_size=own))
        for _ in range(passed):
            next(batches, None)
        return batches

    def _loader_of(self, rows: torch_data.Dataset[Any], workers: int, **batching: Any) -> torch_data.DataLoader[Any]:
        return torch_data.DataLoader(
            rows,
            num_workers=workers,
            collate_fn=Collate(self.images.rows.reader.source.place),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_to_main,
            # loader processes are seeded by it; without, the global random numbers would go on with each loader
            generator=torch.Generator().manual_seed(self.seed),
            **batching,
        )


def require_even(batch_size: int, processes: int) -> None:
    """Raise ValueError for a batch that so many processes can't share evenly."""
    if batch_size % processes:
        text = f"{batch_size} can't be shared evenly by {processes} processes; make it a multiple of {processes}"
        raise RecipeError.at(("finetune", "batch_size"), text)


@dataclass(frozen=True)
class _Numbers(torch_data.Sampler[list[int]]):
    """The numbers, in the endless row of epochs, of a process's images of each batch."""

    batch_size: int
    share: Share
    start: int

    def __iter__(self) -> Iterator[list[int]]:
        own = self.batch_size // self.share.count
        for batch in count_from(self.start, self.batch_size):
            first = batch + self.share.index * own
            yield list(range(first, first + own))


@dataclass(eq=False)
class _Endless(torch_data.Dataset[Sample | None]):
    """Epoch after epoch of a table, each shuffled anew."""

    table: Table
    seed: int
    changes: Augment | None

    def __getitem__(self, number: int) -> Sample | None:
        epoch, place = divmod(number, len(self.table))
        sample = self.table[int(_order(len(self.table), self.seed, epoch)[place])]
        return varied(sample, self.changes, (self.seed, number))


@dataclass(eq=False)
class _Epoch(torch_data.IterableDataset[Sample | None]):
    """One epoch of a stream. passed: so many samples each of its loader's processes gives without reading them."""

    stream: Stream
    seed: int
    changes: Augment | None
    passed: int

    def __iter__(self) -> Iterator[Sample | None]:
        stream = self.stream
        assert stream.order is not None
        for number, row in enumerate(stream.own_rows()):
            if number < self.passed:
                yield None
                continue
            seed = (self.seed, stream.order.epoch, digest(row[stream.reader.source.image_column]))
            yield varied(stream.read(row), self.changes, seed)


@lru_cache(maxsize=2)
def _order(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(_mixed(seed, epoch)))


def varied(sample: Sample | None, changes: Augment | None, seed: Sequence[int]) -> Sample | None:
    """A sample changed by chance, by `seed` alone: neither by the batch that it is in nor by who loads it."""
    if sample is None or changes is None:
        return sample
    pixels_CHW, label = sample
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_mixed(*seed))
        return changes(pixels_CHW[None])[0], label


def _mixed(*numbers: int) -> int:
    """One seed of several."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
