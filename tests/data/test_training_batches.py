"""Order, shares and positions of training batches; what is random in them and what isn't."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch
from made_up_images import ID2LABEL, PROCESSOR, TRAIN, rows
from torch import Tensor

from vitprune.data.augmentation import Augmentation
from vitprune.data.images import Images, load_images
from vitprune.data.splits import Stream
from vitprune.data.training_batches import Position, Share, TrainingBatches
from vitprune.recipe.schema import DataSpec

pytestmark = [
    # Python 3.12 warns of every fork of a process with threads, which torch has
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    # torch counts cores
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]
COUNT = 23


def write(folder: Path, files: int, broken: tuple[int, ...] = ()) -> Path:
    """COUNT rows, told by their grey, in so many parquet files of different lengths."""
    folder.mkdir()
    data = rows(COUNT, broken=broken)
    bounds = [0, *(COUNT * (file + 1) // files - file % 2 for file in range(files - 1)), COUNT]
    for file in range(files):
        data.select(range(bounds[file], bounds[file + 1])).to_parquet(str(folder / f"train-{file}.parquet"))
    return folder


def load(folder: Path, *, streaming: bool, workers: int = 0) -> Images:
    spec = DataSpec(path=str(folder), streaming=streaming, workers=workers, on_error="skip")
    return load_images(spec, TRAIN, PROCESSOR, id2label=ID2LABEL)


def batches(
    images: Images,
    share: Share,
    position: Position | None = None,
    augmentation: Augmentation = "none",
    batch_size: int = 4,
) -> TrainingBatches:
    return TrainingBatches(images, batch_size, 7, augmentation, share, position or Position())


def numbers(batch: dict[str, Tensor] | None) -> list[int]:
    if batch is None:
        return []
    return ((batch["pixel_values"][:, 0, 4, 4] + 1) * 127.5 / 10).round().int().tolist()


def epochs(images: Images, processes: int, count: int) -> list[list[list[int]]]:
    """What each step has, over all processes, of so many epochs of a stream."""
    everybody = [batches(images, Share(index, processes)) for index in range(processes)]
    seen: list[list[list[int]]] = []
    for _ in range(count):
        seen.append([])
        while any(parts := [next(one) for one in everybody]):
            seen[-1].append([number for part in parts for number in numbers(part)])
        for one in everybody:
            one.begin_epoch()
    return seen


def test_processes_share_shards_where_that_is_nearly_even(tmp_path: Path) -> None:
    own = {}
    for files in (11, 3):
        rows = load(write(tmp_path / f"{files}", files), streaming=True).share(1, 2).rows
        assert isinstance(rows, Stream)
        own[files] = rows.num_shards
    assert own == {11: 5, 3: 3}


@pytest.mark.parametrize("streaming", [False, True])
def test_loader_processes_pass_sigterm_by(tmp_path: Path, streaming: bool) -> None:
    images = load(write(tmp_path / "data", 2), streaming=streaming, workers=2)
    one, several = batches(images, Share(), batch_size=1), iter(images.loader(1))
    first = [*numbers(next(one)), *numbers(next(several))]
    for process in multiprocessing.active_children():
        process.terminate()
    assert len(first + [number for _ in range(COUNT - 1) for number in numbers(next(one))]) == COUNT + 1
    assert len(list(several)) == COUNT - 1


def test_a_stream_goes_on_behind_a_batch_of_broken_images(tmp_path: Path) -> None:
    one = batches(load(write(tmp_path / "data", 1, broken=tuple(range(COUNT))), streaming=True), Share())
    seen = [(next(one), one.ended) for _ in range(7)]
    assert seen == [(None, False)] * 6 + [(None, True)]


def flat(steps: Sequence[list[int]]) -> list[int]:
    return [number for step in steps for number in step]


def test_a_table_comes_once_an_epoch_in_full_batches_and_another_order_each_time(tmp_path: Path) -> None:
    images = load(write(tmp_path / "data", 1), streaming=False)
    drawn = [numbers(batch) for batch in islice(iter(batches(images, Share()).__next__, object()), 12)]
    assert all(len(batch) == 4 for batch in drawn)
    first, second = flat(drawn)[:COUNT], flat(drawn)[COUNT : 2 * COUNT]
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert first != second


@pytest.mark.parametrize("workers", [0, 2])
def test_shares_of_a_table_are_its_batches_and_a_position_goes_on(tmp_path: Path, workers: int) -> None:
    folder = write(tmp_path / "data", 1)
    whole = batches(load(folder, streaming=False), Share())
    expected = [numbers(next(whole)) for _ in range(8)]
    shares = [batches(load(folder, streaming=False, workers=workers), Share(index, 2)) for index in range(2)]
    assert [flat([numbers(next(share)) for share in shares]) for _ in range(5)] == expected[:5]
    again = [batches(load(folder, streaming=False), share.share, share.position) for share in shares]
    assert [flat([numbers(next(share)) for share in again]) for _ in range(3)] == expected[5:]


@pytest.mark.parametrize(
    ("processes", "workers", "files"), [(1, 0, 1), (2, 2, 4), (2, 2, 6), (2, 1, 3), (2, 2, 1), (2, 0, 11), (2, 2, 11)]
)
def test_a_stream_comes_once_an_epoch(tmp_path: Path, processes: int, workers: int, files: int) -> None:
    images = load(write(tmp_path / "data", files), streaming=True, workers=workers)
    first, second = epochs(images, processes, 2)
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(COUNT))
    assert flat(first) != flat(second)
    assert epochs(images, processes, 1)[0] == first


@pytest.mark.parametrize(("processes", "workers", "files"), [(1, 0, 1), (2, 2, 4), (2, 2, 6), (2, 1, 3)])
@pytest.mark.parametrize("stop", [1, 2, 5, 7])
def test_a_stream_goes_on_in_mid_epoch_without_repeating_or_skipping(
    tmp_path: Path, processes: int, workers: int, files: int, stop: int
) -> None:
    folder = write(tmp_path / "data", files, broken=(3, 11))
    shares = [Share(index, processes) for index in range(processes)]

    def drawn(share: Share, position: Position | None, count: int) -> tuple[list[list[int]], Position]:
        one = batches(load(folder, streaming=True, workers=workers), share, position, batch_size=2 * processes)
        return [numbers(next(one)) for _ in range(count)], one.position

    seen = []
    for share in shares:
        unbroken, _ = drawn(share, None, 16)
        before, position = drawn(share, None, stop)
        after, _ = drawn(share, position, 16 - stop)
        assert before + after == unbroken
        seen += flat(before + after)
    assert Counter(seen) == Counter(set(range(COUNT)) - {3, 11})


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_held_out_does_not_come(tmp_path: Path, streaming: bool) -> None:
    images = load(write(tmp_path / "data", 4), streaming=streaming, workers=2)
    rest, held_out = images.holdout(6, seed=3)
    chosen = [number for batch in held_out.loader(4) for number in numbers(batch)]
    share = batches(rest, Share())
    came = flat([numbers(next(share)) for _ in range(4)] if not streaming else flat_steps(share))
    assert len(chosen) == 6
    assert not set(came) & set(chosen)
    if streaming:
        assert sorted(came + chosen) == list(range(COUNT))


def flat_steps(share: TrainingBatches) -> list[list[int]]:
    return [numbers(batch) for batch in iter(share.__next__, None)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["light", "strong"])
def test_changes_depend_on_the_seed_alone(tmp_path: Path, streaming: bool, kind: Augmentation) -> None:
    folder = write(tmp_path / "data", 2)
    drawn = []
    for workers, noise in ((0, 1), (2, 2)):
        torch.manual_seed(noise)
        share = batches(load(folder, streaming=streaming, workers=workers), Share(), augmentation=kind, batch_size=2)
        before = torch.get_rng_state()
        pixels = [batch for batch in (next(share) for _ in range(4)) if batch is not None]
        assert torch.equal(torch.get_rng_state(), before)
        drawn.append(torch.cat([batch["pixel_values"] for batch in pixels]))
    order = [tensor.flatten(1).sum(1).sort().values for tensor in drawn]
    assert streaming or torch.equal(*drawn)
    assert streaming or torch.equal(*order)
    plain = batches(load(folder, streaming=streaming), Share(), batch_size=2)
    unchanged = torch.cat([batch["pixel_values"] for batch in (next(plain) for _ in range(4)) if batch is not None])
    assert not torch.equal(drawn[0], unchanged)


def test_processes_that_cannot_share_a_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"finetune\.batch_size: 4 can't be shared evenly by 3"):
        batches(load(write(tmp_path / "data", 1), streaming=False), Share(0, 3))
