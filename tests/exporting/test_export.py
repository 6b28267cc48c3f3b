"""What is refused before anything is traced, and that the lines in `run.py` prepare pictures as the processor does."""

from __future__ import annotations

import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import ExifTags, Image, ImageOps
from tiny import Tolerance
from torch.testing import assert_close
from transformers import BitImageProcessorPil, ConvNextImageProcessorPil, ViTImageProcessorPil

import vitprune
from vitprune.data.decoding import decode, in_colours
from vitprune.exporting.card import _prepare, _script
from vitprune.exporting.exported import INFO, ExportedModel, folder_of
from vitprune.exporting.formats import FORMATS, Pt2
from vitprune.recipe.pruning_spec import PruningSpec

ROUNDING = Tolerance(rtol=1e-5, atol=1e-5)


def pruned(family: str, policy: str) -> Any:
    return vitprune.prune_(tiny.build(family), tiny.spec_for(family, tiny.POLICIES[policy]))


@pytest.mark.parametrize(
    ("family", "policy", "options", "message"),
    [
        ("videomae", "as-vit", {}, "takes videos; what is exported are models of images"),
        ("siglip2", "as-vit", {}, "takes images of several shapes"),
        ("clip-zero-shot", "as-vit", {}, "reads texts, too; export its CLIPVisionModel"),
        ("vit", "random-leave", {}, "select: random is a baseline"),
        ("vit", "tome", {"tokens": "fixed", "kept": [50, 40]}, "tome keeps fixed numbers of tokens by itself; export"),
        ("vit", "as-vit", {"tokens": "fixed"}, "goes with tokens: fixed, and fixed needs it"),
        ("vit", "as-vit", {"kept": [9, 5]}, "goes with tokens: fixed"),
        ("vit", "as-vit", {"tokens": "fixed", "kept": [9]}, "1 numbers for 2 stages"),
        ("vit", "as-vit", {"tokens": "fixed", "kept": [5, 9]}, "should fall from the 64 patches"),
        ("dinov2", "as-vit", {"to": "pt2", "any_size": True}, "model.pt2 is for images of one size"),
        ("vit", "as-vit", {"any_size": True}, "can't be traced: Input image size"),
        (
            "dinov2",
            "tome",
            {"any_size": True},
            "leave out any_size, or prune with select: threshold",
        ),
        (
            "dinov2",
            "as-vit",
            {"any_size": True, "tokens": "fixed", "kept": [9, 5]},
            "leave out any_size or tokens: fixed",
        ),
        ("vit", "as-vit", {"to": "pt2", "dtype": "int8"}, "dtype int8 isn't there for model.pt2; choose of float32"),
        ("vit", "as-vit", {"dtype": "bfloat16"}, "dtype bfloat16 isn't there for model.onnx; choose of float32"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    tmp_path: Path, family: str, policy: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        vitprune.export(pruned(family, policy), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_thresholds_that_were_never_found_are_refused(tmp_path: Path) -> None:
    model = vitprune.prune_(tiny.build("vit"), PruningSpec())
    with pytest.raises(ValueError, match=r"would prune nothing; call vitprune\.calibrate"):
        vitprune.export(model, tmp_path / "out")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitprune.exporting.formats.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ValueError, match=r"model.onnx needs onnxscript; pip install 'vitprune\[onnx\]'"):
        vitprune.export(pruned("vit", "as-vit"), tmp_path / "out")


def test_only_an_exported_folder_is_opened(tmp_path: Path) -> None:
    assert folder_of(tmp_path) is None
    assert folder_of("user/name") is None
    with pytest.raises(ValueError, match=r"is no exported model: there is no export\.json; make one by"):
        ExportedModel.load(tmp_path)
    (tmp_path / INFO).write_text("{}")
    assert folder_of(tmp_path) == tmp_path
    with pytest.raises(ValueError, match=r"export.json can't be read"):
        ExportedModel.load(tmp_path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2, 3))

        def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": pixel_values * self.weight}

    program = torch.export.export(Module(), (), {"pixel_values": torch.ones(2, 3)})
    torch.export.save(program, tmp_path / "model.pt2")
    x = torch.randn(2, 3)
    assert torch.equal(Pt2.open(tmp_path / "model.pt2")(x)["logits"], x)
    with zipfile.ZipFile(tmp_path / "model.pt2") as good, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, good.read(name).replace(b'"use_pickle": false', b'"use_pickle": true'))
    with pytest.raises(ValueError, match="holds a pickled object"):
        Pt2.open(tmp_path / "bad.pt2")


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(size={"height": 32, "width": 40}),
        ViTImageProcessorPil(size={"height": 32, "width": 32}, do_normalize=False, do_rescale=False, resample=3),
        BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
    ],
)
@pytest.mark.parametrize("size", [(61, 47), (47, 61), (50, 50)])
@pytest.mark.parametrize("kind", ["plain", "turned", "16 bits", "32 bits"])
def test_the_script_prepares_as_the_processor_does(
    tmp_path: Path, processor: Any, size: tuple[int, int], kind: str
) -> None:
    pixels, exif = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8), Image.Exif()
    greys = {"16 bits": pixels[..., 0].astype(np.uint16) * 257, "32 bits": pixels[..., 0].astype(np.int32)}
    picture, path = Image.fromarray(greys.get(kind, pixels)), tmp_path / f"image.{'tiff' if '32' in kind else 'png'}"
    exif[ExifTags.Base.Orientation] = 6 if kind == "turned" else 1
    picture.save(path, exif=exif)
    encoded = {"path": None, "bytes": path.read_bytes()}
    seen = in_colours(decode(encoded), "RGB")
    assert (seen.size == size[::-1]) or kind != "turned"
    info: Any = SimpleNamespace(image=(3, 32, 32))
    lines = _prepare(processor, info)
    assert lines is not None
    values: dict[str, Any] = {"np": np, "Image": Image, "ImageOps": ImageOps, "path": path}
    exec("\n".join(line.removeprefix("    ") for line in lines), values)
    expected = processor(seen, return_tensors="pt")["pixel_values"]
    assert_close(torch.from_numpy(values["pixels"]), expected.float(), **ROUNDING)


@pytest.mark.parametrize(
    "processor",
    [
        BitImageProcessorPil(size={"shortest_edge": 36, "longest_edge": 40}, do_center_crop=False),
        ConvNextImageProcessorPil(size={"shortest_edge": 32}),
        SimpleNamespace(do_resize=True),
    ],
    ids=["two edges", "a crop of its own", "of timm"],
)
def test_no_script_is_better_than_one_that_prepares_otherwise(processor: Any) -> None:
    info: Any = SimpleNamespace(image=(3, 32, 32))
    assert _prepare(processor, info) is None


@pytest.mark.parametrize(
    ("problem_type", "said"),
    [
        ("single_label_classification", "LABEL_2"),
        ("multi_label_classification", "['LABEL_0', 'LABEL_2']"),
        ("regression", "[ 0.5 -1.   2. ]"),
    ],
)
def test_the_script_says_what_the_model_is_for(tmp_path: Path, problem_type: Any, said: str) -> None:
    model = tiny.build("vit")
    model.config.problem_type, model.config.id2label = problem_type, {i: f"LABEL_{i}" for i in range(3)}
    info: Any = SimpleNamespace(format="onnx", outputs=("logits",), precision="float32")
    shown = _script(info, model, []).splitlines()[-1].strip()
    values: dict[str, Any] = {"path": "a.png", "logits": np.array([[0.5, -1.0, 2.0]]), "np": np}
    printed: list[str] = []
    exec(shown, {**values, "classes": {str(i): f"LABEL_{i}" for i in range(3)}, "print": lambda *x: printed.extend(x)})
    assert " ".join(map(str, printed)) == f"a.png {said}"


@pytest.mark.parametrize(("to", "precision"), [(to, one) for to, kind in FORMATS.items() for one in kind.precisions])
def test_a_script_for_every_format_and_precision(to: Any, precision: Any) -> None:
    info: Any = SimpleNamespace(format=to, outputs=("logits",), precision=precision)
    script = _script(info, tiny.build("vit"), [])
    compile(script, "run.py", "exec")
    assert ('"INFERENCE_PRECISION_HINT": "f' in script) == (to == "openvino")
    assert "<hint>" not in script
