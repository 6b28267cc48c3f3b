"""The files that a graph is written to, and the runtimes that run them: ONNX Runtime, torch.export, OpenVINO.

Each `Format` writes one file and opens it again as a function of pixel values. What a format needs beside torch is
imported when it is asked for.
"""

from __future__ import annotations

import io
import json
import logging
import tempfile
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from vitprune.exporting.graph import INPUT

FormatName = Literal["onnx", "pt2", "openvino"]
Precision = Literal["float32", "float16", "bfloat16", "int8"]
OPSET = 20
SINGLE_FILE = int(1.5 * 2**30)
"""Bytes of weights above which an ONNX file keeps them in a file of their own: protobuf ends at 2 GiB."""

CUDA = "CUDAExecutionProvider"


@dataclass(frozen=True)
class Session:
    """Pixel values (B, C, H, W) to what the graph gives out, by name. device: where it is computed."""

    run: Callable[[Tensor], dict[str, Tensor]]
    device: str = "CPU"

    def __call__(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return self.run(pixel_values)


class Format(ABC):
    """One kind of file.

    needs: packages beside torch, by import name. precisions: of weights and products. any_size: whether heights and
    widths can stay open; torch's own graphs are guarded against the size at which a model interpolates nothing.
    """

    file: ClassVar[str]
    extra: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    precisions: ClassVar[tuple[Precision, ...]] = ("float32", "float16")
    any_size: ClassVar[bool] = True

    @classmethod
    def require(cls, precision: Precision, *, any_size: bool = False) -> None:
        """Raise ValueError where a package is missing, or the format can't do what is asked for."""
        if any_size and not cls.any_size:
            raise ValueError(f"{cls.file} is for images of one size; leave any_size out, or export to onnx")
        missing = [name for name in cls.needs if find_spec(name) is None]
        if missing:
            raise ValueError(f"{cls.file} needs {', '.join(missing)}; pip install 'vitprune[{cls.extra}]'")
        if precision not in cls.precisions:
            raise ValueError(f"dtype {precision} isn't there for {cls.file}; choose of {', '.join(cls.precisions)}")

    @classmethod
    @abstractmethod
    def write(
        cls, program: ExportedProgram, outputs: tuple[str, ...], folder: Path, precision: Precision, opset: int
    ) -> None:
        """Write a traced graph, whose outputs have these names, to the folder."""

    @classmethod
    @abstractmethod
    def open(cls, path: Path) -> Session:
        """Get a file ready to run, on as many threads as torch has."""

    @classmethod
    @abstractmethod
    def runtime(cls) -> str:
        """What runs it, with its version."""


class Onnx(Format):
    """`model.onnx`, plain operators of ONNX alone; int8: linear layers by ONNX Runtime's dynamic quantisation."""

    file, extra = "model.onnx", "onnx"
    needs = ("onnx", "onnxscript", "onnxruntime")
    precisions = ("float32", "float16", "int8")

    @classmethod
    def write(
        cls, program: ExportedProgram, outputs: tuple[str, ...], folder: Path, precision: Precision, opset: int
    ) -> None:
        from vitprune.exporting.onnx_ops import TRANSLATIONS

        with _quiet():
            made: Any = torch.onnx.export(
                program,
                input_names=[INPUT],
                output_names=[*outputs],
                opset_version=opset,
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
        path = folder / cls.file
        if precision != "int8":
            made.save(str(path), external_data=program_bytes(program) > SINGLE_FILE)
            return
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with tempfile.TemporaryDirectory(dir=folder) as place, _quiet():
            proto = made.model_proto
            # before ONNX Runtime 1.32 quantisation stumbles over the shapes of weights that it has transposed
            del proto.graph.value_info[:]
            onnx.save(proto, Path(place) / cls.file, save_as_external_data=program_bytes(program) > SINGLE_FILE)
            quantize_dynamic(
                Path(place) / cls.file,
                path,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
                use_external_data_format=program_bytes(program) > 4 * SINGLE_FILE,
            )

    @classmethod
    def open(cls, path: Path) -> Session:
        import onnxruntime

        options: Any = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers = [name for name in (CUDA, "CPUExecutionProvider") if name in onnxruntime.get_available_providers()]
        session: Any = onnxruntime.InferenceSession(str(path), options, providers=providers)
        names = [output.name for output in session.get_outputs()]
        dtype = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32

        def run(x_BCHW: Tensor) -> dict[str, Tensor]:
            found = session.run(names, {INPUT: x_BCHW.cpu().numpy().astype(dtype, copy=False)})
            return {name: torch.from_numpy(values) for name, values in zip(names, found, strict=True)}

        # what a package was built with may not be there
        return Session(run, "CUDA" if session.get_providers()[0] == CUDA else "CPU")

    @classmethod
    def runtime(cls) -> str:
        import onnxruntime  # which several packages have: the one for CUDA has a name of its own

        return f"onnxruntime {onnxruntime.__version__}"


class Pt2(Format):
    """`model.pt2`, the graph as torch itself runs it."""

    file = "model.pt2"
    precisions = ("float32", "float16", "bfloat16")
    any_size = False

    @classmethod
    def write(
        cls, program: ExportedProgram, outputs: tuple[str, ...], folder: Path, precision: Precision, opset: int
    ) -> None:
        torch.export.save(program, folder / cls.file)

    @classmethod
    def open(cls, path: Path) -> Session:
        _require_no_pickles(path)
        module = torch.export.load(path).module()
        dtype = next(module.parameters()).dtype

        @torch.no_grad()
        def run(x_BCHW: Tensor) -> dict[str, Tensor]:
            return module(**{INPUT: x_BCHW.to(dtype)})

        return Session(run)

    @classmethod
    def runtime(cls) -> str:
        return f"torch {torch.__version__}"


class OpenVino(Format):
    """`model.xml` with `model.bin`, for Intel's CPUs, GPUs and NPUs."""

    file, extra = "model.xml", "openvino"
    needs = (*Onnx.needs, "openvino")

    @classmethod
    def write(
        cls, program: ExportedProgram, outputs: tuple[str, ...], folder: Path, precision: Precision, opset: int
    ) -> None:
        import openvino

        with tempfile.TemporaryDirectory(dir=folder) as place:
            Onnx.write(program, outputs, Path(place), precision, opset)
            model = openvino.convert_model(str(Path(place) / Onnx.file))
            openvino.save_model(model, str(folder / cls.file), compress_to_fp16=precision == "float16")

    @classmethod
    def open(cls, path: Path) -> Session:
        import openvino

        core: Any = openvino.Core()
        hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        model = core.compile_model(str(path), "CPU", hints)
        names = [output.get_any_name() for output in model.outputs]

        def run(x_BCHW: Tensor) -> dict[str, Tensor]:
            found = model(x_BCHW.cpu().float().numpy())
            return {name: torch.from_numpy(np.array(found[name])) for name in names}

        return Session(run)

    @classmethod
    def runtime(cls) -> str:
        import openvino

        return f"openvino {openvino.__version__.partition('-')[0]}"


FORMATS: dict[FormatName, type[Format]] = {"onnx": Onnx, "pt2": Pt2, "openvino": OpenVino}


def _require_no_pickles(path: Path) -> None:
    """Raise ValueError for a pt2 file in which torch would unpickle something, which may run anything."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(("_weights_config.json", "_constants_config.json")):
                for key, entry in json.loads(archive.read(name))["config"].items():
                    if entry["use_pickle"] or not str(entry["path_name"]).startswith(("weight_", "tensor_")):
                        raise ValueError(f"{path} holds a pickled object ({key}); export the model again")
            if "/sample_inputs/" in name:
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)


def program_bytes(program: ExportedProgram) -> int:
    return sum(weight.numel() * weight.element_size() for weight in program.state_dict.values())


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters say much that is of no use to who called them."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
