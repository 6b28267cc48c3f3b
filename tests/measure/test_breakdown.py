"""What lies behind a comparison, against answers worked out one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from samples import NAMES, write_checkpoint, write_data
from torch import Tensor
from transformers import ViTImageProcessorPil

import vitprune
from vitprune.data.images import load_images
from vitprune.measure.answers import KINDS, Embedding
from vitprune.measure.breakdown import APART, BINS, SHOWN, Observed, break_down
from vitprune.measure.compare import compare_closely
from vitprune.measure.metrics import NO_CLASS
from vitprune.recipe.schema import DataSpec, SplitSpec


def observed(macs: list[float], dense: list[int], pruned: list[int], labels: list[int] | None) -> Observed:
    count = len(macs)
    different = torch.tensor([float(a != b) for a, b in zip(dense, pruned, strict=True)])
    return Observed(
        macs_B=torch.tensor(macs),
        dense_macs_B=torch.full((count,), 100.0),
        kept_BS=torch.ones(count, 1),
        patches=4,
        likeness_B=1 - different,
        difference_B=different * torch.linspace(0.1, 0.9, count),
        answers=(torch.tensor(dense)[:, None], torch.tensor(pruned)[:, None]),
        labels=None if labels is None else torch.tensor(labels),
        finite_B=(torch.ones(count, dtype=torch.bool), torch.ones(count, dtype=torch.bool)),
    )


ROWS = [10, 11, 12, 13, 14]
SEEN = observed([40, 60, 50, 80, 70], [0, 1, 1, 0, 2], [0, 0, 1, 1, 2], [0, 1, 1, 1, 0])


def test_rows_by_work_and_by_difference() -> None:
    found = break_down(KINDS["single-label"], SEEN, ROWS, {})
    assert found.easiest == (10, 12, 11, 14, 13)
    assert found.hardest == found.easiest[::-1]
    assert found.apart == (13, 11), "those that differ, the furthest first"
    assert break_down(KINDS["single-label"], SEEN, None, {}).apart == ()


def test_classes_by_label() -> None:
    found = break_down(KINDS["single-label"], SEEN, None, {0: "cat", 1: "dog"})
    assert found.by == "label"
    dog, cat = found.classes
    assert (dog.name, dog.images, dog.dense, dog.pruned) == ("dog", 3, pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert (dog.agreement, dog.ratio) == (pytest.approx(1 / 3), pytest.approx((0.6 + 0.5 + 0.8) / 3))
    assert (cat.name, cat.images, cat.dense, cat.pruned, cat.agreement) == ("cat", 2, 0.5, 0.5, 1.0)


def test_classes_by_the_dense_answer_where_there_are_no_labels() -> None:
    found = break_down(KINDS["single-label"], observed([40, 60], [2, 2], [2, 0], None), None, {})
    assert found.by == "dense answer"
    (only,) = found.classes
    assert (only.name, only.dense, only.pruned, only.agreement) == ("2", None, None, 0.5)


def test_the_histogram_has_every_image() -> None:
    found = break_down(KINDS["single-label"], SEEN, None, {}).macs
    assert sum(found.counts) == 5
    assert len(found.counts) == BINS == len(found.edges) - 1
    assert (found.edges[0], found.edges[-1]) == (pytest.approx(0.4), pytest.approx(0.8))


def test_where_all_images_take_the_same_none_is_the_easiest() -> None:
    found = break_down(Embedding(), observed([50, 50], [0, 1], [0, 0], None), [4, 5], {})
    assert (found.macs.counts, found.macs.edges) == ((2,), (0.5, 0.5))
    assert (found.easiest, found.hardest, found.apart) == ((), (), (5,))


def test_no_answer_is_no_agreement() -> None:
    seen = observed([50, 60], [NO_CLASS, 1], [NO_CLASS, 1], [0, 0])
    (only,) = break_down(KINDS["single-label"], seen, None, {}).classes
    assert only.agreement == 0.5


def test_an_answer_that_is_no_number_is_the_furthest_apart() -> None:
    seen = observed([50, 50, 50], [0, 1, 2], [0, 1, 0], None)
    seen.difference_B[1] = torch.nan
    seen.finite_B[1][1] = False
    assert break_down(KINDS["single-label"], seen, [0, 1, 2], {}).apart == (1, 2)


@pytest.mark.parametrize("skipped", [(), (3, 8)])
def test_rows_are_those_of_the_split(skipped: tuple[int, ...], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Also where some are broken: the pictures at these rows take these MACs."""
    folder = tmp_path_factory.mktemp("rows")
    dense = vitprune.load(write_checkpoint(folder / "checkpoint"))
    pruned = vitprune.prune_(vitprune.load(folder / "checkpoint"), tiny.POLICIES["redundancy-merge"])
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    spec = DataSpec(path=str(write_data(folder / "data")), on_error="skip")
    images = load_images(spec, SplitSpec(split="test"), processor, id2label=dict(enumerate(NAMES))).sample(16, seed=3)
    rows = list(images.whole or ())
    for place in skipped:
        images.rows.broken[rows[place]] = True  # as if it had turned out so
    table = images.rows
    read = table.reader.read

    def read_or_not(row: object, number: str) -> object:
        return None if int(number) in [rows[place] for place in skipped] else read(row, number)  # pyright: ignore

    object.__setattr__(table.reader, "read", read_or_not)
    comparison, found = compare_closely(dense, pruned, images, {"batch_size": 4}, progress=False)
    assert comparison.images == 16 - len(skipped)
    macs: dict[int, Tensor] = {}
    for row in images.whole or ():
        picture = images.picture(row)[1]
        with vitprune.trace(pruned) as trace, torch.no_grad():
            pruned(processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"])
        macs[row] = trace.macs[0]
    ordered = sorted(macs, key=lambda row: macs[row].item())
    assert [macs[row] for row in found.easiest] == [macs[row] for row in ordered[:SHOWN]]
    assert [macs[row] for row in found.hardest] == [macs[row] for row in ordered[::-1][:SHOWN]]
    assert len(found.apart) <= APART


def test_small_differences_of_numbers_are_seen() -> None:
    kind, dense = KINDS["regression"], torch.tensor([[1.0], [2.0], [3.0]])
    difference_B = kind.difference(dense, dense + torch.tensor([[1e-4], [0.0], [1e-3]]))
    torch.testing.assert_close(difference_B, torch.tensor([1e-8, 0.0, 1e-6]), rtol=1e-2, atol=0.0)
    seen = observed([40, 60, 50], [0, 0, 0], [0, 0, 0], None)
    seen = replace(seen, difference_B=difference_B, likeness_B=1 - difference_B)
    assert break_down(kind, seen, [7, 8, 9], {}).apart == (9, 7)
