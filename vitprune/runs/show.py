"""Shows what a pruned model does with images: `show`, as pictures in files and as one picture in a notebook."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import PIL.ImageOps
from torch import nn
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from vitprune.data.decoding import decode
from vitprune.data.images import Images, load_images
from vitprune.measure.outputs import ImageModel, class_names, has_head, require_same_kind
from vitprune.measure.seen import Named, look_at, named_rows
from vitprune.models.checkpoint import load, load_processor
from vitprune.models.module import is_pruned
from vitprune.models.points import set_budget
from vitprune.models.prune import restore_
from vitprune.models.structure import examine, require_images
from vitprune.recipe.errors import unkeyed
from vitprune.reports.token_pictures import SeenImage, draw_image, draw_sheet
from vitprune.runtime.files import require_writable, write_whole
from vitprune.runtime.progress import track

OnePicture = str | Path | PIL.Image.Image
FIRST = "0-9"  # rows of a data set
MOST_ON_SHEET = 40
SHEET = "contact-sheet.png"


def show(
    model: PreTrainedModel | str | Path,
    images: OnePicture | Sequence[OnePicture],
    *,
    processor: BaseImageProcessor | None = None,
    dense: PreTrainedModel | str | Path | None = None,
    budget: float | str | None = None,
) -> PIL.Image.Image:
    """Draw which patches of images a pruned model keeps after each stage, with tokens, MACs and the answers.

    model: pruned, or the folder or Hub id of a checkpoint. images: pictures, files, or folders of files. processor:
    the checkpoint's if None. dense: whose answers are shown beside; the pruned model's own weights without pruning if
    None. budget: of a checkpoint with several operating points, as for `load`.

    Returns one image with all its stages, or a contact sheet of several. A notebook shows it as it is.

    Raises:
        ValueError: the model isn't pruned or takes no images, or there is no image.
    """
    viewer = Viewer.of(model, processor, dense, budget)
    several = [images] if isinstance(images, str | Path | PIL.Image.Image) else [*images]
    others = [type(one).__name__ for one in several if not isinstance(one, str | Path | PIL.Image.Image)]
    if others:
        raise TypeError(f"{others[0]} is no picture; pass files, folders or PIL images, not pixel values")
    seen = [*viewer.look(_opened(several))]
    if not seen:
        raise ValueError(f"there is no image in {', '.join(map(str, several)) or 'an empty list'}")
    return draw_image(seen[0]) if len(seen) == 1 else draw_sheet(seen)


def show_files(
    checkpoint: str,
    images: Sequence[str],
    *,
    data: str | None = None,
    split: str | None = None,
    rows: str | None = None,
    dense: str | None = None,
    budget: str | None = None,
    output: Path,
) -> Iterator[tuple[SeenImage, Path]]:
    """Write a PNG for each image, and a contact sheet of several; give each image with its file.

    images: files or folders. data: as `data.path` of a recipe. split: of it; `test` if None. rows: of that, such as
    "0-9,20"; the first ten if None.

    Raises:
        ValueError: as `show`; names the row or file that isn't there.
    """
    if bool(images) == (data is not None):
        raise ValueError("name images, or a data set by --data with --rows; one of the two")
    if data is None and (split or rows):
        raise ValueError("--split and --rows are of a data set; name one by --data, or leave them out")
    require_writable(output)
    viewer = Viewer.of(checkpoint, None, dense, budget)
    if data is None:
        files = [*_files(images)]
        if not files:
            raise ValueError(f"there is no image in {', '.join(images)}")
        named, total = _opened(files), len(files)
    else:
        numbers = _numbers(rows or FIRST)
        named, total = named_rows(viewer.open(data, split or "test"), numbers), len(numbers)
    output.mkdir(parents=True, exist_ok=True)
    first: list[SeenImage] = []
    taken: set[str] = set()
    for seen in track(viewer.look(named), "looking", total=total, unit="image"):
        path = output / _file_name(seen.name, taken)
        _save(draw_image(seen), path)
        first += [seen] if len(first) < MOST_ON_SHEET else []
        yield seen, path
    if len(first) > 1:
        _save(draw_sheet(first), output / SHEET)


@dataclass(frozen=True)
class Viewer:
    """A pruned model, the dense one beside it, and the processor of their pictures."""

    dense: ImageModel
    pruned: ImageModel
    processor: BaseImageProcessor

    @classmethod
    def of(
        cls,
        model: PreTrainedModel | str | Path,
        processor: BaseImageProcessor | None,
        dense: PreTrainedModel | str | Path | None,
        budget: float | str | None,
    ) -> Viewer:
        pruned = model if isinstance(model, PreTrainedModel) else load(model)
        if budget is not None:
            pruned = copy.deepcopy(pruned) if pruned is model else pruned  # theirs stays at its budget
            set_budget(pruned, budget)
        name = str(pruned.name_or_path if isinstance(model, PreTrainedModel) else model)
        if not is_pruned(pruned):
            raise ValueError(f"{name or type(pruned).__name__} isn't pruned; take one that `vitprune apply` wrote")
        require_images(name, examine(pruned))
        if dense is None:
            dense = restore_(copy.deepcopy(pruned))
        elif not isinstance(dense, PreTrainedModel):
            dense = load(dense)
            nn.Module.to(dense, pruned.device)
        beside = ImageModel.of(dense)
        answers = ImageModel.of(pruned)
        require_same_kind(answers, beside)
        if processor is None and not name:
            raise ValueError("a model that comes from no checkpoint has no image processor; pass one: processor=")
        return cls(beside, answers, processor or load_processor(name))

    def look(self, pictures: Iterable[Named]) -> Iterator[SeenImage]:
        return look_at(pictures, self.dense, self.pruned, self.processor)

    def open(self, data: str, split: str) -> Images:
        """A split of a data set; with labels where they are this model's."""
        kind, model = self.dense.kind, self.dense.model
        id2label = class_names(model) if has_head(model) else None
        task = "single-label" if kind.name == "embedding" else kind.name
        place = {"path": data}
        try:
            return load_images(place, split, self.processor, id2label=id2label, labelled=kind.takes_labels, task=task)
        except ValueError:  # labels of other classes are no reason not to look
            with unkeyed():
                return load_images(place, split, self.processor, labelled=False)


def _files(places: Sequence[str | Path]) -> Iterator[Path]:
    """Files as they are named, and those of folders that have a picture's ending, in order."""
    endings = PIL.Image.registered_extensions()
    for place in map(Path, places):
        if place.is_dir():
            yield from sorted(path for path in place.rglob("*") if path.suffix.lower() in endings)
        else:
            yield place


def _opened(images: Sequence[OnePicture]) -> Iterator[Named]:
    for number, image in enumerate(images):
        if isinstance(image, PIL.Image.Image):
            yield Named(f"image {number}", PIL.ImageOps.exif_transpose(image))
            continue
        for path in _files([image]):
            try:
                picture = decode({"path": str(path), "bytes": path.read_bytes()})
            except Exception as error:  # files are broken in more ways than decoders have errors for
                raise ValueError(f"{path} can't be read as an image: {error}") from error
            yield Named(path.name, picture)


def _numbers(text: str) -> list[int]:
    """Row numbers as people write them, 0-9,20. Raises ValueError."""
    found: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        rows = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not rows:
            raise ValueError(f"--rows is {text!r}, should be numbers and ranges such as 0-9,20")
        found += rows
    return [*dict.fromkeys(found)]


def _file_name(name: str, taken: set[str]) -> str:
    """A file of its own for each image: pictures of several folders may share a name."""
    stem = re.sub(r"[^\w.-]+", "-", name.removesuffix(Path(name).suffix)) or "image"
    found, copies = stem, 1
    while found in taken or f"{found}.png" == SHEET:
        copies += 1
        found = f"{stem}-{copies}"
    taken.add(found)
    return f"{found}.png"


def _save(picture: PIL.Image.Image, path: Path) -> None:
    write_whole(path, lambda unfinished: picture.save(unfinished, format="png"))
