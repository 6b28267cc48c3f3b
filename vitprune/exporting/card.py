"""How an exported folder is run without vitprune or torch: its `README.md` and `run.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import PIL.Image
from transformers import PreTrainedModel
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor

from vitprune.data.decoding import mode_of
from vitprune.exporting.formats import FORMATS
from vitprune.exporting.graph import KEPT_TOKENS, MERGED_INTO
from vitprune.measure.answers import task_of
from vitprune.measure.outputs import class_names, has_head
from vitprune.recipe.schema import Task

if TYPE_CHECKING:
    from vitprune.exporting.exported import ExportInfo

CARD = """\
# {name}, exported to {format}

`{file}` takes `pixel_values` {shape} and gives {outputs}. {tokens}

## How to run it

{how}
```python
{script}```

`export.json` says what it was made with, `config.json` has the classes, `preprocessor_config.json` how images are
prepared. `vitprune evaluate {file} RECIPE` and `vitprune bench {file}` compare it with the dense model in the same
runtime.
"""

TOKENS = {
    "dense": "It is a dense model: nothing is pruned.",
    "adaptive": "Each image keeps its own number of tokens; a batch is padded to the longest of its images at each "
    "stage, one image alone is not padded.",
    "fixed": "Every image keeps as many tokens.",
}

HINTS = {"float32": "f32", "float16": "f16"}
"""What OpenVINO computes in: left alone it takes less than float32 on many devices, and other tokens may be dropped."""

SHOW: dict[Task, str] = {
    "single-label": "    print(path, classes[str(logits[0].argmax())])",
    "multi-label": "    print(path, [classes[str(i)] for i in np.flatnonzero(logits[0] > 0)])",
    "regression": "    print(path, logits[0])",
}

STEPS = ("resize", "center_crop", "rescale", "normalize", "convert_to_rgb", "process_image")
"""What an image processor's class may do in a way of its own."""

OPEN = {
    "onnx": (
        ("import onnxruntime",),
        'session = onnxruntime.InferenceSession(here / "model.onnx")',
        '{answer} = session.run(["{name}"], {{"pixel_values": pixels}})[0]',
        "numpy, pillow and onnxruntime",
    ),
    "openvino": (
        ("import openvino",),
        'session = openvino.Core().compile_model(here / "model.xml", "AUTO", {"INFERENCE_PRECISION_HINT": "<hint>"})',
        '{answer} = session(pixels)["{name}"]',
        "numpy, pillow and openvino",
    ),
    "pt2": (
        ("import torch",),
        'session = torch.export.load(here / "model.pt2").module()',
        '{answer} = session(pixel_values=torch.from_numpy(pixels){cast})["{name}"].detach().float().numpy()',
        "numpy, pillow and torch",
    ),
}


def files_of(info: ExportInfo, model: PreTrainedModel, processor: BaseImageProcessor | None) -> dict[str, str]:
    """Texts by name; without an image processor nothing says how a picture becomes pixel values."""
    lines = None if processor is None else _prepare(processor, info)
    texts = {} if lines is None else {"run.py": _script(info, model, lines)}
    shape = "({}, {}, {}, {})".format(
        "batch", info.image[0], *(("height", "width") if info.any_size else info.image[1:])
    )
    said = {KEPT_TOKENS: "the tokens of each image behind each stage", MERGED_INTO: "which patch each became part of"}
    outputs = ", ".join(f"`{name}`" + (f" ({said[name]})" if name in said else "") for name in info.outputs)
    needs = OPEN[info.format][3]
    how = f"`python run.py IMAGE...` needs {needs} alone:\n" if texts else "Prepare images as the model's authors say."
    card = CARD.format(
        name=type(model).__name__,
        format=info.format,
        file=FORMATS[info.format].file,
        shape=shape,
        outputs=outputs,
        tokens=TOKENS[info.tokens],
        how=how,
        script=texts.get("run.py", ""),
    )
    return {"README.md": card if texts else card.replace("```python\n```\n", ""), **texts}


def _script(info: ExportInfo, model: PreTrainedModel, prepare: list[str]) -> str:
    imports, opened, run, _ = OPEN[info.format]
    name = next(name for name in ("logits", "image_embeds", "pooler_output", info.outputs[0]) if name in info.outputs)
    named = has_head(model) and name == "logits"
    answer = "logits" if named else "answer"
    cast = "" if info.precision == "float32" else f".to(torch.{info.precision})"
    if info.precision == "float16" and info.format == "onnx":
        prepare = [*prepare, "    pixels = pixels.astype(np.float16)"]
    show = f"    print(path, {answer})"
    if named and len(class_names(model)) > 1:
        show = SHOW[task_of(model.config)]
    lines = [
        *(["import json"] if "classes" in show else []),
        "import sys",
        "from pathlib import Path",
        "",
        "import numpy as np",
        *imports,
        "from PIL import Image, ImageOps",
        "",
        "here = Path(__file__).parent",
        *(['classes = json.loads((here / "config.json").read_text())["id2label"]'] if "classes" in show else []),
        opened.replace("<hint>", HINTS.get(info.precision, "f32")),
        "for path in sys.argv[1:]:",
        *prepare,
        "    " + run.format(answer=answer, name=name, cast=cast),
        show,
    ]
    return "\n".join(lines) + "\n"


def _prepare(processor: BaseImageProcessor, info: ExportInfo) -> list[str] | None:
    """Lines that make `pixels` (1, C, H, W) of the picture at `path`; None for a processor that does more or else."""
    # of BEiT's own step nothing is left without `do_reduce_labels`, which is refused below
    steps = STEPS if hasattr(processor, "do_reduce_labels") else (*STEPS, "_preprocess")
    backend = next((kind for kind in (PilBackend, TorchvisionBackend) if isinstance(processor, kind)), None)
    if backend is None or any(getattr(type(processor), step) is not getattr(backend, step) for step in steps):
        return None
    own: Any = processor
    known = {
        "do_resize",
        "do_center_crop",
        "do_rescale",
        "do_normalize",
        "do_convert_rgb",
        "do_pad",
        "do_reduce_labels",
    }
    does = {name for name in vars(own) if name.startswith("do_") and getattr(own, name)}
    if does - known or "do_pad" in does or getattr(own, "do_reduce_labels", False):
        return None
    lines = [
        "    image = ImageOps.exif_transpose(Image.open(path))",
        '    if image.mode[0] in "IF":  # 16 bits, or fractions',
        "        values = np.asarray(image)",
        '        brightest = 1 if image.mode == "F" else 255 if image.mode == "I" and values.max() <= 255 else 65535',
        "        image = Image.fromarray((values * (255 / brightest)).round().astype(np.uint8))",
        f'    image = image.convert("{mode_of(processor)}")',
    ]
    if own.do_resize:
        size, resample = dict(own.size), PIL.Image.Resampling(int(own.resample)).name
        if set(size) == {"shortest_edge"}:
            edge = int(size["shortest_edge"])
            lines += [
                f"    size = [int({edge} * side / min(image.size)) for side in image.size]",
                f"    image = image.resize(size, Image.Resampling.{resample})",
            ]
        elif set(size) == {"height", "width"}:
            width, height = int(size["width"]), int(size["height"])
            lines += [f"    image = image.resize(({width}, {height}), Image.Resampling.{resample})"]
        else:
            return None
    if getattr(own, "do_center_crop", False):
        crop = dict(own.crop_size)
        height, width = int(crop["height"]), int(crop["width"])
        lines += [
            f"    left, top = (image.width - {width}) // 2, (image.height - {height}) // 2",
            f"    image = image.crop((left, top, left + {width}, top + {height}))",
        ]
    factor = own.rescale_factor if own.do_rescale else 1
    axes = "pixels[..., None]" if info.image[0] == 1 else "pixels"
    lines += [f"    pixels = np.asarray(image, np.float32) * {float(factor)!r}"]
    if own.do_normalize:
        mean, std = (
            float(value) if isinstance(value, float | int) else [float(each) for each in value]
            for value in (own.image_mean, own.image_std)
        )
        lines += [f"    pixels = (pixels - np.array({mean}, np.float32)) / np.array({std}, np.float32)"]
    return [*lines, f"    pixels = {axes}.transpose(2, 0, 1)[None]"]
