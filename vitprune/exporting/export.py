"""`export`: a model becomes a folder that other runtimes run."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from vitprune.data.decoding import blank_image, processor_at
from vitprune.exporting.card import files_of
from vitprune.exporting.exported import INFO, ExportedModel, ExportInfo, made_with
from vitprune.exporting.formats import FORMATS, OPSET, FormatName, Precision
from vitprune.exporting.graph import trace_graph
from vitprune.models.checkpoint import write_folder
from vitprune.models.module import is_pruned, pruning_of
from vitprune.models.prune import prune_, restore_, tell_configs
from vitprune.models.structure import channels, count_patches, examine
from vitprune.recipe.errors import first_line
from vitprune.runtime.progress import task

Tokens = Literal["adaptive", "fixed"]
DTYPES: dict[Precision, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def export(
    model: PreTrainedModel,
    output: str | Path,
    *,
    to: FormatName = "onnx",
    tokens: Tokens = "adaptive",
    kept: Sequence[int] | None = None,
    dtype: Precision = "float32",
    opset: int = OPSET,
    image_size: int | None = None,
    any_size: bool = False,
    tells_patches: bool = False,
    processor: BaseImageProcessor | None = None,
    overwrite: bool = False,
) -> ExportedModel:
    """Write a model, dense or pruned, as a graph for another runtime, and open it there.

    A pruned model's graph still decides per image which tokens leave. A batch is padded to the longest of its images,
    stage by stage; one image alone is not padded. The folder has the graph, the image processor, labels, and how to run
    it without vitprune or torch.

    Args:
        model: stays as it is; a copy is exported.
        output: folder to write, whole or not at all.
        to: `onnx`, `pt2` (torch.export) or `openvino`.
        tokens: `adaptive`, or `fixed`: every image keeps the `kept` best patches, so that all shapes but the batch are
            known, as runtimes such as TensorRT and CoreML want it, and CUDA graphs.
        kept: with `fixed`, patches behind each stage.
        dtype: of weights and products; bfloat16: with `pt2` only; int8: linear layers only, quantised dynamically by
            ONNX Runtime.
        opset: of ONNX.
        image_size: height and width in pixels; what the image processor gives, or what the model's config says.
        any_size: other heights and widths fit the graph, too, where the model interpolates its positions.
        tells_patches: the graph also gives out `merged_into`, what became of each patch (`Trace.merged_into`).
        processor: written beside the graph, for images of that size.
        overwrite: an exported folder or checkpoint that is there.

    Raises:
        ValueError: a model that can't be exported, with the reason; a package that is missing; a path that is taken.
    """
    kind, output = FORMATS[to], Path(output).resolve()
    kind.require(dtype, any_size=any_size)
    require_exportable(model)
    if any_size and is_pruned(model) and (tokens == "fixed" or pruning_of(model).spec.select != "threshold"):
        raise ValueError(
            "any_size goes with thresholds, as fixed numbers of tokens are of one image size; leave out "
            + ("any_size or tokens: fixed" if tokens == "fixed" else "any_size, or prune with select: threshold")
        )
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists; choose another folder, or overwrite it (--overwrite, overwrite=True)")
    image = image_shape(model, processor, image_size)
    processor = None if processor is None else processor_at(processor, *image[1:])
    own = copy_to_export(model, image, tokens, kept, dtype)
    try:
        program, outputs = trace_graph(own, image, any_size=any_size, tells_patches=tells_patches)
    except Exception as error:  # torch.export says in many ways what it can't
        raise ValueError(f"{type(model).__name__} can't be traced: {first_line(error)}") from error
    info = ExportInfo(
        format=to,
        tokens=tokens if is_pruned(own) else "dense",
        kept=tuple(kept) if kept is not None else None,
        precision=dtype,
        opset=None if to == "pt2" else opset,
        image=image,
        any_size=any_size,
        outputs=outputs,
        patches=count_patches(own, image),
        made_with=made_with(to),
    )

    def write(folder: Path) -> None:
        folder.mkdir()
        kind.write(program, outputs, folder, dtype, opset)
        tell_configs(own)
        own.config.architectures = [type(own).__name__]
        own.config.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        texts = {INFO: info.model_dump_json(indent=2, by_alias=True) + "\n", **files_of(info, own, processor)}
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")

    write_folder(output, write, overwrite=overwrite)
    return ExportedModel.load(output)


def export_like(info: ExportInfo, dense: PreTrainedModel, processor: BaseImageProcessor | None) -> PreTrainedModel:
    """A dense model in the runtime, precision and image size of an exported one, to compare it with."""
    with tempfile.TemporaryDirectory() as place, task("exporting the dense model", total=None):
        exported = export(
            dense,
            Path(place) / "dense",
            to=info.format,
            dtype=info.precision,
            opset=OPSET if info.opset is None else info.opset,
            image_size=None if info.image[1] != info.image[2] else info.image[1],
            any_size=info.any_size,
            processor=processor,
        )
    return exported.model


def require_exportable(model: PreTrainedModel) -> None:
    """Raise ValueError, with the reason and the way out, for a model whose graph can't be made."""
    name, structure = type(model).__name__, examine(model)
    if model.main_input_name == "input_ids":
        raise ValueError(
            f"{name} reads texts, too; export its {type(structure.backbone).__name__}, which has the same weights "
            "without them"
        )
    if structure.family.media != "images":
        raise ValueError(f"{name} takes {structure.family.media}; what is exported are models of images of one shape")
    if not is_pruned(model):
        return
    pruning = pruning_of(model)
    if pruning.spec.select == "random":
        raise ValueError("select: random is a baseline that draws numbers; export a model that is pruned by a score")
    if pruning.is_forgotten:
        raise ValueError(
            "the model's thresholds were never found, so it would prune nothing; call vitprune.calibrate(model, "
            "batches, budget) before"
        )


def copy_to_export(
    model: PreTrainedModel,
    image: tuple[int, int, int],
    tokens: Tokens = "adaptive",
    kept: Sequence[int] | None = None,
    dtype: Precision = "float32",
) -> PreTrainedModel:
    """A copy on the CPU, in the dtype of the graph, with the policy that is asked for: what a graph is traced from."""
    if (kept is not None) != (tokens == "fixed"):
        raise ValueError("`kept`, patches behind each stage, goes with tokens: fixed, and fixed needs it")
    own = copy.deepcopy(model).eval()
    nn.Module.to(own, device="cpu", dtype=DTYPES.get(dtype, torch.float32))
    for config in (own.config, examine(own).backbone.config):
        config.output_hidden_states = False  # no graph gives them out
    if is_pruned(own):  # a graph has one budget
        pruning_of(own).keep_points(None)
    if kept is None:
        return own
    if not is_pruned(own):
        raise ValueError(f"{type(model).__name__} isn't pruned, so there is no stage at which to keep a fixed number")
    pruning = pruning_of(own)
    if pruning.spec.select == "tome":
        raise ValueError("select: tome keeps fixed numbers of tokens by itself; export it with tokens: adaptive")
    if len(kept) != len(pruning.before_blocks):
        raise ValueError(f"`kept` has {len(kept)} numbers for {len(pruning.before_blocks)} stages; give one per stage")
    spec, stages = pruning.spec, pruning.before_blocks
    restore_(own)
    patches = count_patches(own, image)
    before = (patches, *kept[:-1])
    if any(not 0 < now <= then for now, then in zip(kept, before, strict=True)):
        raise ValueError(
            f"`kept` is {list(kept)}, which should fall from the {patches} patches of an image to 1 or more"
        )
    ratios = tuple(now / then for now, then in zip(kept, before, strict=True))
    changes: dict[str, Any] = {
        "select": "top-k",
        "before_blocks": stages,
        "thresholds": "calibrated",
        "keep_ratios": ratios,
        "points": None,
    }
    return prune_(own, spec.model_copy(update=changes))


def image_shape(
    model: PreTrainedModel, processor: BaseImageProcessor | None, size: int | None = None
) -> tuple[int, int, int]:
    """Channels, height and width of a model's images: of `size`, as the processor gives them, or as the config says.

    Raises ValueError where nothing says so.
    """
    if size is not None:
        return channels(model), size, size
    if processor is not None:
        given = blank_image(processor).shape
        return given[-3], given[-2], given[-1]
    own = getattr(examine(model).backbone.config, "image_size", None)
    if own is None:
        raise ValueError(f"{type(model).__name__} doesn't say which images it takes; give `image_size`")
    height, width = (own, own) if isinstance(own, int) else own
    return channels(model), height, width
