"""`vitprune show`: files, rows and pictures, and that what is drawn is what the model did."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import samples
import tiny
import torch
from PIL import ExifTags, Image
from transformers import BitImageProcessorPil, PreTrainedModel, ViTImageProcessorPil

import vitprune
from vitprune.measure.outputs import ImageModel
from vitprune.measure.seen import LARGEST_SIDE, Named, look_at
from vitprune.reports.token_pictures import draw_panel
from vitprune.runs.show import SHEET, show_files

PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
GRID = tiny.SHAPE["image_size"] // tiny.SHAPE["patch_size"]


def pruned(family: str = "vit", policy: str = "redundancy-merge") -> PreTrainedModel:
    return vitprune.prune_(tiny.build(family), tiny.spec_for(family, tiny.POLICIES[policy])).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, folder = pruned(), tmp_path_factory.mktemp("pruned") / "checkpoint"
    model.config.id2label = dict(enumerate(samples.NAMES))
    return vitprune.save(model, folder, processor=PROCESSOR)


def photo(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("policy", ["redundancy-merge", "as-vit"])
def test_pictures_show_what_the_trace_says(policy: str) -> None:
    model, picture = pruned(policy=policy), photo()
    dense = ImageModel.of(tiny.build("vit"))
    (seen,) = look_at([Named("one", picture)], dense, ImageModel.of(model), PROCESSOR)
    with vitprune.trace(model) as trace, torch.no_grad():
        answers = model(PROCESSOR(picture, return_tensors="pt")["pixel_values"]).logits
    assert seen.macs == trace.macs.item()
    assert seen.pruned.startswith(f"LABEL_{int(answers.argmax())} ")
    original, drew_a_group = np.asarray(draw_panel(seen, None)).astype(int), False
    for stage, mask, owners in zip(seen.stages, trace.keep_masks, trace.merged_into, strict=True):
        assert ((stage.sizes > 0) == mask[0].numpy()).all()
        panel = np.asarray(draw_panel(seen, stage)).astype(int)
        wide, high = panel.shape[1] / GRID, panel.shape[0] / GRID
        for patch in range(GRID * GRID):
            row, column = divmod(patch, GRID)
            at = int((row + 0.15) * high), int((column + 0.15) * wide)
            if stage.sizes[patch] == 1:
                assert (panel[at] == original[at]).all(), "a token of its own shows the image"
            elif owners[0, patch] < 0:
                assert panel[at].min() > 190, "what was left is faded"
            else:
                owner_row, owner_column = divmod(int(owners[0, patch]), GRID)
                owner = int((owner_row + 0.15) * high), int((owner_column + 0.15) * wide)
                assert (panel[at] == panel[owner]).all(), "a group has one colour"
                drew_a_group = True
    assert drew_a_group == (policy == "redundancy-merge")


def test_one_image_or_a_sheet_of_several(checkpoint: Path) -> None:
    one = vitprune.show(checkpoint, photo())
    several = vitprune.show(checkpoint, [photo(), photo(20, 60), photo(1, 1)])
    assert one.mode == several.mode == "RGB"
    assert one.size != several.size
    own = vitprune.show(pruned(), photo(), processor=PROCESSOR, dense=tiny.build("vit"))
    assert own.size[0] == one.size[0]


@pytest.mark.parametrize("family", ["deit", "dinov2", "dinov3", "beit", "clip-zero-shot", "siglip-tower"])
def test_other_families(family: str) -> None:
    assert vitprune.show(pruned(family), photo(), processor=PROCESSOR).width > 300


def test_a_large_picture_is_kept_small() -> None:
    dense, processor = (
        ImageModel.of(tiny.build("vit")),
        BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
    )
    large, small = (photo(900, 600).resize(size) for size in ((3000, 2000), (450, 300)))
    kept, other = look_at([Named("large", large), Named("small", small)], dense, ImageModel.of(pruned()), processor)
    assert kept.picture.size == (LARGEST_SIDE, LARGEST_SIDE * 2 // 3)
    assert other.picture.size == (450, 300)
    expected = [edge * LARGEST_SIDE / 450 for edge in other.box]
    assert list(kept.box) == pytest.approx(expected, abs=0.02 * LARGEST_SIDE)


def test_a_picture_of_a_telephone_is_turned_upright() -> None:
    model, upright, exif = pruned(), photo(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "png", exif=exif)
    turned = vitprune.show(model, Image.open(file), processor=PROCESSOR)
    assert turned.tobytes() == vitprune.show(model, upright, processor=PROCESSOR).tobytes()


def test_files_folders_and_names(checkpoint: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        photo().save(tmp_path / folder / "same name.png")
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    photo().save(tmp_path / "single.jpg")
    images = [str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "single.jpg")]
    found = [*show_files(str(checkpoint), images, output=tmp_path / "out")]
    assert [path.name for _, path in found] == ["same-name.png", "same-name-2.png", "single.png"]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"same-name.png", "same-name-2.png", "single.png", SHEET}


def test_rows_of_a_data_set(checkpoint: Path, tmp_path: Path) -> None:
    data = samples.write_data(tmp_path / "data")
    found = [*show_files(str(checkpoint), [], data=str(data), rows="7,0-2", output=tmp_path / "out")]
    assert [seen.name for seen, _ in found] == ["row 7", "row 0", "row 1", "row 2"]
    assert [seen.label for seen, _ in found] == [samples.NAMES[row % 5] for row in (7, 0, 1, 2)]


def test_labels_of_other_classes_are_no_obstacle(tmp_path: Path) -> None:
    place = vitprune.save(pruned(), tmp_path / "checkpoint", processor=PROCESSOR)
    found = [
        *show_files(str(place), [], data=str(samples.write_data(tmp_path / "data")), rows="3", output=tmp_path / "o")
    ]
    assert [(seen.name, seen.label) for seen, _ in found] == [("row 3", "LABEL_3")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"images": []}, "name images, or a data set"),
        ({"images": ["x.png"], "data": "y"}, "one of the two"),
        ({"images": ["missing.png"]}, "missing.png can't be read"),
        ({"images": ["empty"]}, "no image in empty"),
        ({"images": ["broken.png"]}, "broken.png can't be read as an image"),
        ({"images": [], "data": "data", "rows": "99"}, "has rows 0 to 23, none of number 99"),
        ({"images": [], "data": "data", "rows": "a-b"}, "should be numbers and ranges such as 0-9,20"),
        ({"images": [], "data": "data", "rows": "9-0"}, "should be numbers and ranges such as 0-9,20"),
        ({"images": ["broken.png"], "rows": "3"}, "--split and --rows are of a data set"),
        ({"images": [], "data": "./nowhere"}, "nowhere"),
    ],
)
def test_what_is_refused(
    options: dict[str, str], said: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    samples.write_data(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=said):
        next(show_files(str(checkpoint), **options, output=tmp_path / "out"))  # pyright: ignore[reportArgumentType]


def test_what_python_gives_is_refused_in_words(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Tensor is no picture; pass files, folders or PIL images, not pixel values"):
        vitprune.show(checkpoint, torch.rand(2, 3, 32, 32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="from no checkpoint has no image processor; pass one: processor="):
        vitprune.show(pruned(), photo())
    samples.write_data(tmp_path / "data")
    with pytest.raises(ValueError, match=r"^\S+data, split 'validation': Unknown split"):
        next(show_files(str(checkpoint), [], data=str(tmp_path / "data"), split="validation", output=tmp_path / "out"))


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    dense = samples.write_checkpoint(tmp_path / "dense")
    with pytest.raises(ValueError, match="isn't pruned"):
        vitprune.show(dense, photo())
