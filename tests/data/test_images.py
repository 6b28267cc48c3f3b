"""What comes out of image folders, parquet and arrow files, saved data sets and streams."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    List,
    NamedSplit,
    Value,
)
from made_up_images import ID2LABEL, NAMES, PROCESSOR, TRAIN, png, rows
from transformers import ViTImageProcessorPil

from vitprune.data.decoding import BrokenImageError
from vitprune.data.images import Images, load_images
from vitprune.recipe.schema import DataSpec, SplitSpec


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as the only parquet file of a folder."""

    def write(data: Dataset, name: str = "train.parquet") -> Path:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        data.to_parquet(str(folder / name))
        return folder

    return write


def parquet_of(data: Dataset, folder: Path) -> Path:
    (folder / "parquet").mkdir()
    data.to_parquet(str(folder / "parquet" / "train.parquet"))
    return folder / "parquet"


def load(
    path: Path | str,
    split: SplitSpec = TRAIN,
    seed: int = 0,
    id2label: Any = ID2LABEL,
    task: Any = "single-label",
    **options: Any,
) -> Images:
    data = DataSpec(path=str(path), **options)
    return load_images(data, split, PROCESSOR, id2label=id2label, task=task, seed=seed)


def greys(images: Images) -> list[int]:
    """The number of each row that comes out of a loader, told by its grey."""
    pixels = torch.cat([batch["pixel_values"] for batch in images.loader(4)])
    return ((pixels[:, 0, 4, 4] + 1) * 127.5 / 10).round().int().tolist()


def test_batches(parquet: Callable[..., Path]) -> None:
    images = load(parquet(rows(6)))
    assert len(images) == 6
    assert images.labelled
    assert images.skipped == 0
    assert not images.streamed
    first, second = images.loader(4)
    assert first["pixel_values"].shape == (4, 3, 8, 8)
    assert first["pixel_values"].dtype == torch.float32
    assert first["labels"].tolist() == [0, 1, 2, 0]
    assert first["labels"].dtype == torch.int64
    assert second["pixel_values"].shape[0] == 2


def image_folder(folder: Path) -> Path:
    for i, name in enumerate(NAMES):
        (folder / "train" / name).mkdir(parents=True)
        (folder / "train" / name / "a.png").write_bytes(png(10 * i))
    return folder


def saved(folder: Path) -> Path:
    DatasetDict({"train": rows(3), "test": rows(2)}).save_to_disk(str(folder))
    return folder


def saved_alone(folder: Path, count: int = 3, broken: tuple[int, ...] = ()) -> Path:
    rows(count, broken=broken).save_to_disk(str(folder))
    return folder


def parquet_file(folder: Path) -> Path:
    folder.mkdir()
    rows(3).to_parquet(str(folder / "some.parquet"))
    return folder / "some.parquet"


def parquet_shards(folder: Path) -> Path:
    folder.mkdir()
    for i in range(2):
        rows(3).select([[0, 1], [2]][i]).to_parquet(str(folder / f"train-0000{i}-of-00002.parquet"))
    rows(2).to_parquet(str(folder / "test.parquet"))
    return folder


def arrow_file(folder: Path) -> Path:
    saved_alone(folder)
    return next(folder.glob("*.arrow"))


SOURCES = [image_folder, saved, saved_alone, parquet_file, parquet_shards, arrow_file]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", SOURCES)
def test_sources(write: Callable[[Path], Path], streaming: bool, tmp_path: Path) -> None:
    images = load(write(tmp_path / "data"), streaming=streaming)
    assert images.streamed == streaming
    assert images.labelled
    assert greys(images) == [0, 1, 2]
    (batch,) = images.loader(3)
    assert batch["labels"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("write", SOURCES)
def test_a_configuration_that_is_not_there(write: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.name: .* has no configurations|BuilderConfig 'large' not found"):
        load(write(tmp_path / "data"), name="large")


def test_split_of_one_file_in_parts(parquet: Callable[..., Path]) -> None:
    folder = parquet(rows(10))
    assert greys(load(folder, SplitSpec(split="train[80%:]"))) == [8, 9]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", [saved, saved_alone])
def test_parts_of_saved_splits(write: Callable[[Path], Path], streaming: bool, tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    assert greys(load(folder, SplitSpec(split="train[:2]"), streaming=streaming)) == [0, 1]
    assert greys(load(folder, SplitSpec(split="train[67%:]+train[:1]"), streaming=streaming)) == [2, 0]
    assert len(greys(load(folder, SplitSpec(split="all"), streaming=streaming))) == (5 if write is saved else 3)


def test_saved_without_splits_has_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown split \"test\"\. Should be one of \['train'\]\. Name one"):
        load(saved_alone(tmp_path / "data"), SplitSpec(split="test"))


def test_saved_part_is_the_split_it_was_taken_from(tmp_path: Path) -> None:
    part = Dataset.from_list(rows(5).to_list(), features=rows(5).features, split=NamedSplit("test[:5]"))
    part.save_to_disk(str(tmp_path / "data"))
    assert greys(load(tmp_path / "data", SplitSpec(split="test[3:]"))) == [3, 4]


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_format_of_a_saved_set_is_none_of_ours(kind: str, tmp_path: Path) -> None:
    rows(3).with_format(kind).save_to_disk(str(tmp_path / "data"))
    images = load(tmp_path / "data")
    assert greys(images) == [0, 1, 2]
    assert next(iter(images.loader(3)))["labels"].tolist() == [0, 1, 2]


def test_limit_is_a_seeded_random_sample(parquet: Callable[..., Path]) -> None:
    folder = parquet(rows(20))
    chosen = greys(load(folder, SplitSpec(split="train", limit=8)))
    assert len(set(chosen)) == 8
    assert chosen != list(range(8))
    assert greys(load(folder, SplitSpec(split="train", limit=8))) == chosen
    assert greys(load(folder, SplitSpec(split="train", limit=8), seed=1)) != chosen
    assert len(load(folder, SplitSpec(split="train", limit=800))) == 20


# Streams below come from `save_to_disk`: `datasets` sleeps 5 s after a shuffled or broken pass over parquet.
@pytest.mark.parametrize("streaming", [False, True])
def test_holdout_and_sample(tmp_path: Path, streaming: bool) -> None:
    images = load(saved_alone(tmp_path / "data", 20), streaming=streaming)
    rest, held_out = images.holdout(6, seed=3)
    assert len(greys(held_out)) == 6
    assert sorted(greys(rest) + greys(held_out)) == list(range(20))
    assert greys(images.holdout(6, seed=3)[1]) == greys(held_out)
    assert greys(images.sample(6, seed=3)) == greys(images.sample(6, seed=3)) != greys(images.sample(6, seed=4))
    assert sorted(greys(images.sample(50, seed=0))) == list(range(20))


def test_holdout_leaves_some(parquet: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="20 images can't be held out of 20; give more"):
        load(parquet(rows(20))).holdout(20, seed=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_shares_are_the_whole(tmp_path: Path, streaming: bool) -> None:
    images = load(saved_alone(tmp_path / "data", 20), streaming=streaming)
    shares = [greys(images.share(index, 3)) for index in range(3)]
    assert sorted(number for share in shares for number in share) == list(range(20))
    assert all(len(share) in (6, 7) for share in shares)


def test_a_stream_has_no_length(parquet: Callable[..., Path]) -> None:
    with pytest.raises(TypeError, match="doesn't know its length"):
        len(load(parquet(rows(3)), streaming=True))


def test_without_labels(parquet: Callable[..., Path]) -> None:
    images = load(parquet(rows(3).remove_columns("label")))
    assert not images.labelled
    assert set(next(iter(images.loader(2)))) == {"pixel_values"}


def test_hidden_labels_are_no_labels(parquet: Callable[..., Path]) -> None:
    data = rows(3).map(lambda _: {"label": -1}, features=rows(3).features)
    assert not load(parquet(data)).labelled


def test_folders_that_are_splits_are_no_labels(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "a.png").write_bytes(png(10))
    assert not load(tmp_path / "data").labelled


def test_the_folder_of_a_split_is_no_class(tmp_path: Path) -> None:
    """One more level: then the library gives each image the name of its split for a label."""
    for split in ("train", "test"):
        (tmp_path / "data" / split / split).mkdir(parents=True)
        (tmp_path / "data" / split / split / "a.png").write_bytes(png(10))
    assert not load(tmp_path / "data", id2label={0: "LABEL_0", 1: "LABEL_1"}).labelled
    named = parquet_of(rows(2, ClassLabel(names=["test", "train"])), tmp_path)
    assert not load(named, id2label={0: "LABEL_0", 1: "LABEL_1"}).labelled
    assert load(named, id2label={0: "LABEL_0", 1: "LABEL_1"}, label_column="label").labelled


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L", "1", "CMYK"])
def test_all_images_become_rgb(mode: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    suffix = "tiff" if mode == "CMYK" else "png"
    PIL.Image.new(mode, (9, 9)).save(tmp_path / "data" / f"a.{suffix}")
    assert next(iter(load(tmp_path / "data").loader(1)))["pixel_values"].shape == (1, 3, 8, 8)


def test_columns_that_are_named(parquet: Callable[..., Path]) -> None:
    plain = Dataset.from_dict({"file": [png(0), png(10)], "truth": ["dog", "bird"]})
    folder = parquet(plain)
    images = load(folder, image_column="file", label_column="truth")
    assert next(iter(images.loader(2)))["labels"].tolist() == [2, 0]
    assert greys(images) == [0, 1]
    assert not load(folder, image_column="file").labelled


def test_plain_integers_named_label_are_labels(parquet: Callable[..., Path]) -> None:
    assert load(parquet(rows(3, Value("int64")))).labelled


def test_sections_may_be_dicts(parquet: Callable[..., Path]) -> None:
    found = load_images({"path": str(parquet(rows(3)))}, {"split": "train", "limit": 2}, PROCESSOR)
    assert len(found) == 2
    assert len(load_images({"path": str(parquet(rows(3)))}, "train", PROCESSOR)) == 3
    with pytest.raises(ValueError, match=r"(?m)^pfad: unknown key"):
        load_images({"pfad": "data"}, "train", PROCESSOR)


def label_error(folder: Path, id2label: dict[int, str], **options: Any) -> str:
    with pytest.raises(ValueError, match=r", split ") as error:
        list(load(folder, id2label=id2label, **options).loader(4))
    return str(error.value)


def labels_of(folder: Path, id2label: dict[int, str], **options: Any) -> list[int]:
    """Of rows 0, 1, 2, which the data calls bird, cat, dog."""
    return next(iter(load(folder, id2label=id2label, **options).loader(3)))["labels"].tolist()


def test_labels_are_matched_by_name(parquet: Callable[..., Path], tmp_path: Path) -> None:
    folder = parquet(rows(3))
    assert labels_of(folder, {0: "bird", 1: "cat", 2: "dog"}) == [0, 1, 2]
    assert labels_of(folder, {0: "cat", 1: "fish", 2: "bird", 3: "dog"}) == [2, 0, 3]
    assert load(folder, id2label={0: "cat", 1: "fish", 2: "bird", 3: "dog"}).notes == (
        "The data has 3 of the checkpoint's 4 classes.",
    )
    message = label_error(folder, {0: "bird", 1: "kitten", 2: "dog"})
    assert "split 'train': 1 of the data's 3 classes are not among the checkpoint's 3" in message
    assert "data: cat\n" in message
    assert "data.label_names" in message
    given = {0: "bird", 1: "kitten", 2: "dog"}
    assert labels_of(folder, given, label_names={"cat": "kitten"}) == [0, 1, 2]
    assert labels_of(folder, given, label_names={"cat": 1}) == [0, 1, 2]
    (tmp_path / "names.yaml").write_text("cat: kitten\n")
    assert labels_of(folder, given, label_names=str(tmp_path / "names.yaml")) == [0, 1, 2]
    (tmp_path / "names.yaml").write_text("- cat\n")
    with pytest.raises(ValueError, match=r"data\.label_names: .*names\.yaml holds no mapping"):
        load(folder, id2label=given, label_names=str(tmp_path / "names.yaml"))
    assert not load(folder, id2label=given, labels="ignore").labelled


def test_names_in_a_column_of_text_are_matched_alike(parquet: Callable[..., Path]) -> None:
    data = Dataset.from_dict({"image": [png(i) for i in range(3)], "label": ["Dog", "bird", "a_cat"]})
    folder = parquet(data.cast_column("image", Image()))
    assert labels_of(folder, {0: "bird", 1: "a cat, Felis", 2: "dog"}) == [2, 0, 1]
    twice = {0: "bird", 1: "dog", 2: "a cat", 3: "dog"}
    assert "'Dog' is the name of several of the checkpoint's classes (ids 1, 3)" in label_error(folder, twice)


@pytest.mark.parametrize(("column", "values"), [("target", [0, 1]), ("class", ["a", "b"]), ("label", [True, False])])
def test_labels_that_were_not_taken_are_said(parquet: Callable[..., Path], column: str, values: list[Any]) -> None:
    data = Dataset.from_dict({"image": [png(0), png(1)], column: values}).cast_column("image", Image())
    with pytest.warns(UserWarning, match="no labels were found"):
        images = load(parquet(data))
    assert not images.labelled
    (note,) = images.notes
    assert "no labels were found for a model whose task is single-label, so there is no accuracy" in note
    assert f"If they are in {column!r}" in note
    assert load(parquet(data), labels="ignore").notes == ()


@pytest.mark.parametrize("layout", ["a folder between", "a metadata file"])
def test_folders_that_were_not_taken_for_classes_are_said(tmp_path: Path, layout: str) -> None:
    for name in "ab":
        folder = tmp_path / "data" / "train" / name / ("images" if layout == "a folder between" else "")
        folder.mkdir(parents=True)
        (folder / f"{name}.png").write_bytes(png(10))
    if layout == "a metadata file":
        (tmp_path / "data" / "train" / "metadata.csv").write_text("file_name,text\na/a.png,x\nb/b.png,y\n")
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        images = load(tmp_path / "data")
        gc.collect()  # the library leaves the metadata file open; who cleans up next would be blamed for it
    assert any("The pictures lie in folders (a, b): if those are classes" in str(one.message) for one in given)
    assert not images.labelled
    assert len(images) == 2


def listed(values: list[Any], feature: Any) -> Dataset:
    pictures = [png(index) for index in range(len(values))]
    return Dataset.from_dict(
        {"image": pictures, "labels": values}, features=Features({"image": Image(), "labels": feature})
    )


OF_THREE = {0: "bird", 1: "cat", 2: "dog"}


@pytest.mark.parametrize(
    ("values", "feature"),
    [
        ([[1, 0, 1], [0, 0, 0]], List(Value("int64"))),
        ([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]], List(Value("float32"))),
        ([[True, False, True], [False, False, False]], List(Value("bool"))),
        ([[2, 0], []], List(Value("int64"))),
        ([["Dog", "bird"], []], List(Value("string"))),
        ([[0, 1], []], List(ClassLabel(names=["dog", "bird"]))),
    ],
    ids=lambda value: str(value)[:30],
)
def test_several_labels_an_image(parquet: Callable[..., Path], values: list[Any], feature: Any) -> None:
    images = load(parquet(listed(values, feature)), id2label=OF_THREE, task="multi-label")
    (batch,) = images.loader(2)
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [[1, 0, 1], [0, 0, 0]]
    assert images.stand_in()["labels"].shape == (1, 3)


def test_one_label_an_image_will_do_where_there_may_be_several(parquet: Callable[..., Path]) -> None:
    images = load(
        parquet(listed([1, 2], ClassLabel(names=["cat", "bird", "dog"]))), id2label=OF_THREE, task="multi-label"
    )
    assert next(iter(images.loader(2)))["labels"].tolist() == [[1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("values", "feature", "outputs", "expected"),
    [
        ([0.5, -2.0], Value("float32"), 1, [[0.5], [-2.0]]),
        ([3, 4], Value("int64"), 1, [[3], [4]]),
        ([[1.0, 2.0], [3.0, 4.0]], List(Value("float64")), 2, [[1, 2], [3, 4]]),
    ],
)
def test_numbers(parquet: Callable[..., Path], values: Any, feature: Any, outputs: int, expected: list[Any]) -> None:
    names = {index: f"LABEL_{index}" for index in range(outputs)}
    (batch,) = load(parquet(listed(values, feature)), id2label=names, task="regression").loader(2)
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == expected


def test_numbers_are_not_looked_for_among_classes(parquet: Callable[..., Path]) -> None:
    images = load(parquet(rows(3)), id2label={0: "LABEL_0"}, task="regression", labels="ignore")
    assert not images.labelled
    with pytest.warns(UserWarning, match=r"whose task is regression.*'label' \(ClassLabel\)"):
        assert not load(parquet(rows(3)), id2label={0: "LABEL_0"}, task="regression").labelled


@pytest.mark.parametrize(
    ("values", "feature", "task", "text"),
    [
        ([[0, 1], [2]], List(Value("int64")), "single-label", "several labels an image needs model.task: multi-label"),
        ([[0, 7], [2]], List(Value("int64")), "multi-label", "row 0, column 'labels': 7 is not a class id"),
        ([[0.5, 1.0], [0.0, 1.0]], List(Value("float32")), "multi-label", "2 numbers for 3 labels of the checkpoint"),
        ([["cow"], []], List(Value("string")), "multi-label", "'cow' is not among the checkpoint's labels"),
        ([None, [1]], List(Value("int64")), "multi-label", "write an empty list"),
        ([[0, 1], [1]], List(ClassLabel(names=["cat", "cow"])), "multi-label", "1 of the data's 2 classes are not"),
        ([0.5, None], Value("float32"), "regression", "1 numbers for 3 outputs"),
        ([[0.5, 1.0, float("nan")]] * 2, List(Value("float32")), "regression", "nan is no number"),
        (["a", "b"], Value("string"), "regression", "holds no labels but string"),
    ],
)
def test_labels_that_do_not_fit_the_task(
    parquet: Callable[..., Path], values: list[Any], feature: Any, task: Any, text: str
) -> None:
    folder = parquet(listed(values, feature))
    assert text in label_error(folder, OF_THREE, task=task, label_column="labels")


def test_default_label_names_only_count(parquet: Callable[..., Path]) -> None:
    folder = parquet(rows(3))
    assert load(folder, id2label={i: f"LABEL_{i}" for i in range(3)}).labelled
    assert load(folder, id2label=None).labelled
    message = label_error(folder, {i: f"LABEL_{i}" for i in range(4)})
    assert "3 classes in the data, 4 in the checkpoint, which has no names for them" in message


def test_many_differing_labels_are_cut_short(parquet: Callable[..., Path]) -> None:
    names = [f"a{i}" for i in range(100)]
    message = label_error(parquet(rows(3, ClassLabel(names=names))), {i: f"b{i}" for i in range(100)})
    assert "a19, ... (100 in all)" in message


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_out_of_range(tmp_path: Path, streaming: bool) -> None:
    rows(3, Value("int64")).save_to_disk(str(tmp_path / "data"))
    message = label_error(tmp_path / "data", {0: "bird", 1: "cat"}, streaming=streaming)
    assert "2 is not a class id, the checkpoint has labels 0 to 1" in message
    assert "'label'" in message


def test_unknown_label_name(parquet: Callable[..., Path]) -> None:
    data = Dataset.from_dict({"image": [png(0)], "label": ["fish"]}).cast_column("image", Image())
    assert "'fish' is not among the checkpoint's labels: bird, cat, dog" in label_error(parquet(data), ID2LABEL)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_image_is_named(tmp_path: Path, streaming: bool) -> None:
    folder = saved_alone(tmp_path / "data", 6, broken=(4,))
    with pytest.raises(BrokenImageError, match=r"split 'train', row 4: cannot be decoded: .*on_error: skip"):
        list(load(folder, streaming=streaming).loader(2))


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_images_are_skipped_and_counted(parquet: Callable[..., Path], streaming: bool) -> None:
    images = load(parquet(rows(8, broken=(1, 6))), on_error="skip", streaming=streaming)
    assert greys(images) == [0, 2, 3, 4, 5, 7]
    assert images.skipped == 2


def test_a_broken_row_counts_once(parquet: Callable[..., Path]) -> None:
    images = load(parquet(rows(8, broken=(1, 6))), on_error="skip")
    for _ in range(2):
        greys(images)
    assert images.skipped == 2


def test_truncated_file_is_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data")
    file = folder / "train" / "cat" / "a.png"
    file.write_bytes(file.read_bytes()[:45])
    with pytest.raises(BrokenImageError, match=r"row 1 \(.*a.png\): cannot be decoded"):
        list(load(folder).loader(2))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_batch_of_broken_images_does_not_come(parquet: Callable[..., Path], streaming: bool) -> None:
    images = load(parquet(rows(5, broken=(2, 3))), on_error="skip", streaming=streaming)
    assert [len(batch["labels"]) for batch in images.loader(2)] == [2, 1]
    assert images.skipped == 2
    assert len(load(parquet(rows(2, broken=(0, 1))), on_error="skip", streaming=streaming).pixels()) == 0


# Python 3.12 warns of every fork of a process with threads, which torch has.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("streaming", [False, True])
def test_loader_processes(tmp_path: Path, streaming: bool) -> None:
    folder = saved_alone(tmp_path / "data", 6, broken=(4,))
    images = load(folder, on_error="skip", streaming=streaming, workers=1)
    assert greys(images) == [0, 1, 2, 3, 5]
    assert images.skipped == 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_broken_image_is_named_by_loader_processes(parquet: Callable[..., Path]) -> None:
    batches = iter(load(parquet(rows(8, broken=(0,))), workers=1).loader(2))
    with pytest.raises(BrokenImageError, match=r", split .*row 0: cannot be decoded"):
        next(batches)
    list(batches)  # lets the process come to its end


def test_images_of_different_sizes(parquet: Callable[..., Path]) -> None:
    data = Dataset.from_dict({"image": [PIL.Image.new("L", (8, 8)), PIL.Image.new("L", (9, 9))]}).cast_column(
        "image", Image()
    )
    spec = DataSpec(path=str(parquet(data)))
    images = load_images(spec, TRAIN, ViTImageProcessorPil(do_resize=False), id2label=None)
    with pytest.raises(ValueError, match="images of different sizes"):
        list(images.loader(2))


def test_what_is_not_there(parquet: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    folder = parquet(rows(3))
    (tmp_path / "readme.txt").write_text("no images")

    def error(path: Path | str, split: str = "train", **options: Any) -> str:
        with pytest.raises(ValueError, match=r", split ") as raised:
            load(path, SplitSpec(split=split), **options)
        return str(raised.value)

    assert "no/where, split" in error("no/where")
    assert f"not in the cache {tmp_path / 'cache'}" in error("no/where")
    assert error("no/where").endswith("check the spelling, or run `vitprune prefetch RECIPE` where there is a network")
    assert "set `data.streaming: false` and run `vitprune prefetch RECIPE`" in error("no/where", streaming=True)
    assert "vitprune prefetch" not in error(tmp_path / "nowhere")
    assert error(folder, "test").startswith("data.eval.split: ")
    assert "some into train/CLASS, others into test/CLASS" in error(folder, "test")
    assert "Should be one of ['train', 'test']" in error(saved(tmp_path / "saved"), "validation")
    assert ".parquet, .arrow" in error(tmp_path / "readme.txt")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").touch()
    assert "this folder holds neither pictures nor parquet or arrow files" in error(tmp_path / "notes")
    assert "data.image_column: " in error(folder, image_column="photo")
    assert "there is no column 'photo'; the columns are" in error(folder, image_column="photo")
    assert "holds no images but ClassLabel" in error(folder, image_column="label")
    assert "holds no labels but Image" in error(folder, label_column="image")


def test_which_column(parquet: Callable[..., Path]) -> None:
    two = Dataset.from_dict({"a": [png(0)], "b": [png(0)]}).cast_column("a", Image()).cast_column("b", Image())
    with pytest.raises(ValueError, match=r"several columns hold images \(a, b\)"):
        load(parquet(two))
    with pytest.raises(ValueError, match=r"no column is declared as images.*Columns: a \(binary\)"):
        load(parquet(Dataset.from_dict({"a": [png(0)]})))


def test_a_sample_of_a_stream_is_none_of_what_is_held_out(tmp_path: Path) -> None:
    images = load(saved_alone(tmp_path / "data", 20), streaming=True)
    rest, held_out = images.holdout(8, 0)
    sample = rest.sample(8, 0)
    assert len(set(greys(held_out))) == len(set(greys(sample))) == 8
    assert not set(greys(held_out)) & set(greys(sample))
