"""Opens image data sets: where rows come from, which column is the image, what the labels mean.

Knows `datasets` and the checkpoint's label names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, LargeList, List, Value
from datasets.exceptions import DataFilesNotFoundError, DatasetsError

from vitprune.data.labels import Classes, Labels, match, some
from vitprune.recipe.errors import RecipeError, first_line
from vitprune.recipe.schema import DataSpec, Task
from vitprune.runtime.hub_cache import PREFETCH, Cache, Disconnected, causes, is_hub_id

FILE_KINDS: Mapping[str, str] = {".parquet": "parquet", ".arrow": "arrow"}
LABEL_NAMES = ("label", "labels")
_EXPECTED: Mapping[Task, str] = {
    "single-label": "class ids or names",
    "multi-label": "lists of class ids or names, or a 0 or 1 for each class",
    "regression": "a number, or a list of one for each output",
}
_SPLITS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}
_MAY_BE_LABELS = (*LABEL_NAMES, "class", "classes", "target", "targets", "category", "class_id", "label_id", "y")
_UNKNOWN_SPLIT = "Unknown split"  # as `datasets` says it
_CANT_BE_OPENED = (OSError, ValueError, RuntimeError, DatasetsError, Disconnected)


@dataclass(frozen=True)
class Source:
    """The rows of one split, with two columns at most: images, undecoded as `{"bytes", "path"}`, and labels.

    notes: how labels were understood. doubts: where there may be labels that weren't taken.
    """

    rows: Dataset | IterableDataset
    place: str
    image_column: str
    labels: Labels | None
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


def open_source(
    data: DataSpec,
    split: str,
    id2label: Mapping[int, str] | None,
    *,
    labelled: bool = True,
    task: Task = "single-label",
) -> Source:
    """Open a split and find its columns; labels are checked against `id2label` as far as can be told up front.

    Raises ValueError, which names the place and the way out.
    """
    place = f"{data.path}, split {split!r}"
    local = Path(data.path).expanduser()
    if data.name is not None and (local.is_file() or _was_saved(local)):
        raise RecipeError.at(("data", "name"), f"{data.path} has no configurations to choose from; leave it out")
    try:
        rows = _open(data, split)
    except _CANT_BE_OPENED as error:
        text = f"{place}: {_reason(data, error)}"
        if _UNKNOWN_SPLIT in str(error):
            raise RecipeError.at(_key_of(data, split), text) from error
        raise ValueError(text) from error
    if rows.features is None:
        raise ValueError(f"{place}: what the columns hold can't be told while streaming; set `data.streaming: false`")
    image = _image_column(rows.features, data.image_column, place)
    labelled = labelled and data.labels != "ignore"
    column = _label_column(rows.features, data.label_column, place, task) if labelled else None
    if data.label_column is None and column is not None and _are_splits(rows.features[column]):
        column = None
    values = [] if column is None else _label_values(rows, column)
    hidden = ({None},) if task == "regression" else ({-1}, {None})
    if set(values) in hidden:  # as test splits hide them, and folders that are splits have none
        column = None
    labels = None if column is None else _labels(rows.features, column, data, id2label, place, task)
    if labels is not None:
        _require_readable(labels, values, place)
    doubts = ()
    if labels is None and labelled and not values:
        doubts = (*_unnoticed(rows.features, image, place, task), *_folders(data, rows, image, place))
    rows = rows.select_columns([image] if labels is None else [image, labels.column])
    notes = () if labels is None else labels.notes
    return Source(rows.cast_column(image, Image(decode=False)), place, image, labels, notes, doubts)


def _are_splits(feature: Any) -> bool:
    """Whether the classes are the folders of splits, which `datasets` takes for labels where there are no others."""
    return isinstance(feature, ClassLabel) and {name.casefold() for name in feature.names} <= _SPLITS


def _unnoticed(features: Features, image: str, place: str, task: Task) -> tuple[str, ...]:
    """A note on columns that may be labels and weren't taken for them."""
    others = [
        name
        for name in features
        if name != image and name.casefold() in _MAY_BE_LABELS and not _are_splits(features[name])
    ]
    if not others:
        return ()
    shown = ", ".join(f"{name!r} ({_kind(features[name])})" for name in others)
    several = any(_element(features[name]) is not None for name in others)
    hint = " A model that gives several labels an image needs model.task: multi-label." if several else ""
    return (
        f"{place}: no labels were found for a model whose task is {task}, so there is no accuracy and no task loss. If "
        f"they are in {shown}, name the column in data.label_column ({_EXPECTED[task]}); data.labels: ignore says that "
        f"there are none.{hint if task == 'single-label' else ''}",
    )


def _folders(data: DataSpec, rows: Dataset | IterableDataset, image: str, place: str) -> tuple[str, ...]:
    """A note on pictures that lie in folders which may be classes and weren't taken for them."""
    root = Path(data.path).expanduser()
    if not root.is_dir() or not isinstance(rows, Dataset) or not isinstance(rows.features[image], Image):
        return ()
    chunks = rows.data.column(image).chunks
    written = [path for chunk in chunks for path in chunk.field("path").to_pylist()]  # without the pictures' bytes
    paths = [Path(path) for path in written if path and Path(path).is_relative_to(root.absolute())]
    for depth in range(1, 4):
        names = sorted({path.parents[depth - 1].name for path in paths if len(path.parents) > depth})
        if len(names) > 1:
            return (
                f"{place}: no labels were found, so there is no accuracy and no task loss. The pictures lie in folders "
                f"({some(names)}): if those are classes, put the pictures right into them, without a folder between "
                "and without a metadata file, which takes their place; or name its column in data.label_column. "
                "data.labels: ignore says that there are none.",
            )
    return ()


def require_found(data: DataSpec) -> None:
    """Raise ValueError, as `open_source` does, for a data set that is neither here nor on the Hub. Fetches no rows."""
    if is_hub_id(data.path):
        try:
            _find(data)
        except _CANT_BE_OPENED as error:
            raise RecipeError.at(("data", "path"), f"{data.path}: {_reason(data, error)}") from error


def require_splits(data: DataSpec, splits: Sequence[str]) -> None:
    """Raise ValueError for a split that a Hub data set hasn't, as far as the Hub or the cache can be asked now."""
    try:
        known = datasets.get_dataset_split_names(data.path, data.name)
    except _CANT_BE_OPENED:
        return
    for split in splits:
        names = [re.split(r"\[", part)[0].strip() for part in split.split("+")]
        if unknown := [name for name in names if name not in {*known, "all"}]:
            has = ", ".join(map(str, known))
            raise RecipeError.at(_key_of(data, split), f"{data.path} has no split {unknown[0]!r}; it has {has}")


def _find(data: DataSpec) -> None:
    datasets.load_dataset_builder(data.path, name=data.name)


def _open(data: DataSpec, split: str) -> Dataset | IterableDataset:
    path = Path(data.path).expanduser()
    if not path.exists():
        return _load(data.path, name=data.name, split=split, streaming=data.streaming)
    with _quiet():
        if path.is_file():
            if path.suffix not in FILE_KINDS:
                raise ValueError(f"a file must be one of {', '.join(FILE_KINDS)}; for images give their folder")
            return _load(FILE_KINDS[path.suffix], data_files=str(path), split=split, streaming=data.streaming)
        if _was_saved(path):
            saved = _open_saved(path, split)
            return saved.to_iterable_dataset() if data.streaming else saved
        return _load(str(path), name=data.name, split=split, streaming=data.streaming)


def _load(path: str, **options: Any) -> Dataset | IterableDataset:
    rows = datasets.load_dataset(path, **options)
    assert isinstance(rows, Dataset | IterableDataset)
    return rows


def _was_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return any((path / mark).is_file() for mark in ("dataset_dict.json", "state.json"))


def _open_saved(path: Path, split: str) -> Dataset:
    """A split, or parts of splits, of what `save_to_disk` wrote, its values as they were written.

    A data set that was saved without splits is the one it was taken from, `train` where it remembers none.
    """
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, DatasetDict):
        splits = {str(name): rows for name, rows in saved.items()}
    else:
        splits = {re.split(r"[\[+]", str(saved.split or "train"))[0]: saved}
    splits = {name: rows.with_format(None) for name, rows in splits.items()}
    if split in splits:
        return splits[split]
    if split == "all":
        return datasets.concatenate_datasets([*splits.values()])
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    return datasets.concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of `datasets`: what is read from disk is there in no time."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _reason(data: DataSpec, error: Exception) -> str:
    cache = Cache.of_data()
    if full := cache.full(error):
        return full
    if trouble := cache.trouble(error):
        return trouble
    if is_hub_id(data.path):
        fetch = f"set `data.streaming: false` and {PREFETCH}" if data.streaming else PREFETCH
        absent = cache.lack("it is", fetch)
        if absent is not None and not _is_found(data):
            if isinstance(error, OSError):
                return f"there is no such file or folder, {absent}"
            return f"{error}\nName one of them in `data.name`, or {fetch} where there is a network"
    if _UNKNOWN_SPLIT in str(error):
        way_out = f"{error} Name one, or a part of one as in 'train[:80%]'"
        if "['train']" not in str(error) or not Path(data.path).expanduser().is_dir():
            return way_out
        return f"{way_out}; or, of pictures in folders by class, put some into train/CLASS, others into test/CLASS"
    if isinstance(error, DataFilesNotFoundError) and Path(data.path).expanduser().is_dir():
        return "this folder holds neither pictures nor parquet or arrow files; name the one that does"
    if Path(data.path).expanduser().exists() or isinstance(error, ValueError):
        return " ".join(dict.fromkeys(str(cause) for cause in causes(error) if str(cause)))
    return (
        f"there is no such file or folder, and the Hub doesn't give it: {error}; check the "
        "spelling, the network, and for a gated data set that `hf auth login` was done"
    )


def _is_found(data: DataSpec) -> bool:
    """Whether a data set is on the Hub, or in the cache, as far as its splits; then those are the trouble."""
    try:
        _find(data)
    except _CANT_BE_OPENED:
        return False
    return True


def _image_column(features: Features, named: str | None, place: str) -> str:
    found = [name for name, feature in features.items() if isinstance(feature, Image)]
    if named is not None:
        _require(features, named, "image_column", place)
        if named not in found and not _could_be_image(features[named]):
            text = f"{place}: column {named!r} holds no images but {_kind(features[named])}"
            raise RecipeError.at(("data", "image_column"), text)
        return named
    if len(found) != 1:
        trouble = f"several columns hold images ({', '.join(found)})" if found else "no column is declared as images"
        raise RecipeError.at(("data", "image_column"), f"{place}: {trouble}; name one. Columns: {_columns(features)}")
    return found[0]


def _could_be_image(feature: Any) -> bool:
    """Whether the values can be read as images: encoded bytes, file paths, or both."""
    if isinstance(feature, dict):
        return {"bytes", "path"} >= feature.keys()
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "binary", "large_binary")


def _label_column(features: Features, named: str | None, place: str, task: Task) -> str | None:
    if named is not None:
        _require(features, named, "label_column", place)
        return named
    found: list[str] = []
    if task == "multi-label":
        found = [name for name, feature in features.items() if isinstance(_element(feature), ClassLabel)]
    if not found and task != "regression":
        found = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    found = found or [name for name in LABEL_NAMES if name in features and _may_hold(features[name], task)]
    if len(found) > 1:
        text = f"{place}: several columns hold labels; name one. Columns: {_columns(features)}"
        raise RecipeError.at(("data", "label_column"), text)
    return found[0] if found else None


def _element(feature: Any) -> Any | None:
    """What a list holds; None for what is no list."""
    if isinstance(feature, list | tuple):
        return feature[0] if len(feature) == 1 else None
    return feature.feature if isinstance(feature, List | LargeList) else None


def _may_hold(feature: Any, task: Task) -> bool:
    """Whether a column's values can be labels for a model of this task."""
    element = _element(feature)
    if task == "regression":
        return _is_number(feature if element is None else element)
    if task == "multi-label" and element is not None:
        return isinstance(element, ClassLabel) or _is_label_value(element) or _is_number(element)
    return isinstance(feature, ClassLabel) or _is_label_value(feature)


def _label_values(rows: Dataset | IterableDataset, column: str) -> list[Any]:
    """The different values of a column that may hold labels; none of lists, nor of a stream, which would be read."""
    feature = None if rows.features is None else rows.features[column]
    is_single = isinstance(feature, ClassLabel | Value)
    return rows.unique(column) if is_single and isinstance(rows, Dataset) else []


def _labels(
    features: Features, column: str, data: DataSpec, id2label: Mapping[int, str] | None, place: str, task: Task
) -> Labels:
    feature, count = features[column], None if id2label is None else len(id2label)
    if not _may_hold(feature, task):
        several = _element(feature) is not None and task == "single-label"
        hint = "; a model that gives several labels an image needs model.task: multi-label" if several else ""
        wanted = f"a model whose task is {task} learns from {_EXPECTED[task]}{hint}"
        text = f"{place}: column {column!r} holds no labels but {_kind(feature)}; {wanted}"
        raise RecipeError.at(("data", "label_column"), text)
    if task == "regression":
        return Labels(column, count, task=task)
    classes = None if id2label is None else Classes(id2label, _given(data.label_names))
    element = _element(feature) or feature
    if isinstance(element, ClassLabel):
        if classes is not None:
            return replace(match(element.names, classes, column, place), task=task)
        return Labels(column, len(element.names), names=tuple(element.names), task=task)
    if "string" not in element.dtype:
        return Labels(column, count, task=task)
    if classes is None:
        raise ValueError(f"{place}: column {column!r} holds names, and the model has no `id2label` to look them up in")
    return Labels(column, count, classes=classes, task=task)


def _given(label_names: Mapping[str, str | int] | str | None) -> Mapping[str, str | int]:
    """What a recipe says of names, or the file that it names: YAML or JSON."""
    if not isinstance(label_names, str):
        return label_names or {}
    try:
        found: Any = yaml.safe_load(Path(label_names).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError.at(("data", "label_names"), f"{label_names} can't be read: {first_line(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(meant, str | int) for meant in found.values()):
        raise RecipeError.at(("data", "label_names"), f"{label_names} holds no mapping of the data's names to classes")
    return {str(name): meant for name, meant in found.items()}


def _is_label_value(feature: Any) -> bool:
    return isinstance(feature, Value) and ("int" in feature.dtype or "string" in feature.dtype)


def _is_number(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "float", "bool"))


def _require_readable(labels: Labels, values: Sequence[Any], place: str) -> None:
    """Every value seen to be a label."""
    for value in values:
        try:
            labels.read(value)
        except RecipeError:
            raise
        except ValueError as error:
            raise ValueError(f"{place}, column {labels.column!r}: {error}") from error


def _require(features: Features, column: str, key: str, place: str) -> None:
    if column not in features:
        raise RecipeError.at(
            ("data", key), f"{place}: there is no column {column!r}; the columns are {_columns(features)}"
        )


def _columns(features: Features) -> str:
    return ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())


def _kind(feature: Any) -> str:
    if (element := _element(feature)) is not None:
        return f"lists of {_kind(element)}"
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def _key_of(data: DataSpec, split: str) -> tuple[str, str, str]:
    """Where a recipe names a split."""
    return ("data", "train" if data.train.split == split else "eval", "split")
