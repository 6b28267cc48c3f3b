"""An exported folder, and what runs it: `ExportedModel`.

Tensor suffixes: B images, C channels, H height, W width, S stages.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import PIL.Image
import PIL.ImageOps
import torch
from pydantic import Field, ValidationError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils.generic import ModelOutput

from vitprune.data.decoding import in_colours, mode_of
from vitprune.exporting.formats import FORMATS, FormatName, Precision, Session
from vitprune.exporting.graph import ANSWERS, KEPT_TOKENS, MERGED_INTO
from vitprune.models import context
from vitprune.models.checkpoint import EXPORTED as INFO
from vitprune.models.checkpoint import load_config, load_processor, model_class, outline
from vitprune.models.hooks import SUBMODULE
from vitprune.models.module import Pruning, spec_of
from vitprune.models.structure import count_tokens
from vitprune.models.trace import Trace
from vitprune.pruning.costs import CostCounter
from vitprune.pruning.selection import Policy
from vitprune.recipe.errors import first_line
from vitprune.recipe.values import Spec


class ExportInfo(Spec):
    """What an exported folder holds; `export.json`."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    format: FormatName
    tokens: Literal["adaptive", "fixed", "dense"]
    kept: tuple[int, ...] | None = None
    """With fixed tokens: patches that every image keeps behind each stage."""
    precision: Precision
    opset: int | None = None
    image: tuple[int, int, int]
    """Channels, height and width."""
    any_size: bool = False
    """Whether height and width may be others."""
    outputs: tuple[str, ...]
    patches: int
    """Of an image of that size."""
    made_with: dict[str, str]

    @property
    def file(self) -> str:
        return FORMATS[self.format].file


def folder_of(path: str | Path) -> Path | None:
    """The exported folder that a path names, itself or by its graph; None where it is none."""
    place = Path(path)
    folder = place.parent if place.is_file() else place
    return folder if (folder / INFO).is_file() else None


@dataclass(frozen=True, eq=False)
class ExportedModel:
    """A graph in the runtime that it was made for, with its image processor.

    model: looks to `vitprune.compare`, `measure_throughput` and `trace` as a model of transformers does; its forward is
    the graph, and it has no weights of its own. session: pixel values (B, C, H, W) to the graph's outputs by name.
    """

    folder: Path
    info: ExportInfo
    model: PreTrainedModel
    session: Session

    @classmethod
    def load(cls, path: str | Path) -> ExportedModel:
        """Open an exported folder, or the graph in it.

        Raises:
            ValueError: it is none, or what runs it isn't installed.
        """
        folder = folder_of(path)
        if folder is None:
            raise ValueError(f"{path} is no exported model: there is no {INFO}; make one by `vitprune export`")
        try:
            info = ExportInfo.model_validate_json((folder / INFO).read_text(encoding="utf-8"))
        except ValidationError as error:
            raise ValueError(f"{folder / INFO} can't be read: {first_line(error)}; export the model again") from error
        kind = FORMATS[info.format]
        kind.require(info.precision)
        try:
            session = kind.open(folder / info.file)
        except Exception as error:  # each runtime has errors of its own
            raise ValueError(f"{folder / info.file} can't be opened: {first_line(error)}") from error
        return cls(folder, info, _shell(folder, info, session), session)

    @cached_property
    def processor(self) -> BaseImageProcessor:
        return load_processor(str(self.folder))

    def __call__(self, images: PIL.Image.Image | Sequence[PIL.Image.Image]) -> dict[str, Tensor]:
        """Run the graph on pictures, which are turned upright; its outputs by name."""
        pictures = [images] if isinstance(images, PIL.Image.Image) else list(images)
        mode = mode_of(self.processor)
        upright = [in_colours(PIL.ImageOps.exif_transpose(picture), mode) for picture in pictures]
        pixels: Any = self.processor(upright, return_tensors="pt")
        return self.session(pixels["pixel_values"])


def _shell(folder: Path, info: ExportInfo, session: Session) -> PreTrainedModel:
    """A model of the graph's class whose forward is the graph. Its weights are memory that nobody touches."""
    config = load_config(str(folder))
    spec = spec_of(config)
    model, structure = outline(model_class(str(folder), config), config)
    model.to_empty(device="cpu")
    where = "" if session.device == "CPU" else f", on {session.device}"
    runtime = f"{FORMATS[info.format].runtime()}, {info.precision}{where}"
    pruning = None
    if spec is not None:
        pruning = Pruning(spec, structure)
        model.add_module(SUBMODULE, pruning)
    vars(model)["forward"] = _GraphForward(session, pruning, _patches(info, type(model), config), runtime)
    return model.eval().requires_grad_(False)


def _patches(info: ExportInfo, cls: type[PreTrainedModel], config: PreTrainedConfig) -> Callable[[int, int], int]:
    """How many patches an image of such a height and width has."""

    @cache
    def at(height: int, width: int) -> int:
        channels, *size = info.image
        if [height, width] == size:
            return info.patches
        _, structure = outline(cls, config)
        with torch.no_grad():
            tokens = count_tokens(structure, torch.empty(1, channels, height, width, device="meta"))
        return tokens - structure.num_prefix_tokens

    return at


@dataclass(frozen=True)
class _Past:
    """What a run of the graph did, for traces."""

    policy: Policy
    counter: CostCounter
    merged_into: list[Tensor]


@dataclass(frozen=True, eq=False)
class _GraphForward:
    """Stands in for a model's `forward`. patches: of an image, by its height and width. runtime: what runs it."""

    session: Session
    pruning: Pruning | None
    patches: Callable[[int, int], int]
    runtime: str

    def __call__(self, pixel_values: Tensor, **unused: Any) -> ModelOutput:
        found = self.session(pixel_values)
        traces = [one for one in context.current().traces if isinstance(one, Trace) and one.pruning is self.pruning]
        if traces and self.pruning is not None:
            past = self._past(self.pruning(), self.patches(*pixel_values.shape[-2:]), found)
            for watched in traces:
                watched.record(past)
        return ModelOutput({name: found[name] for name in ANSWERS if name in found})

    @staticmethod
    def _past(policy: Policy, patches: int, found: dict[str, Tensor]) -> _Past:
        """Count what a packed forward would: padding is in no image's work."""
        kept_BS = found[KEPT_TOKENS].float()
        tokens_B = kept_BS.new_full((len(kept_BS),), patches + policy.num_prefix_tokens)
        counter = CostCounter(policy.cost, policy.stage_macs, tokens_B)
        behind = dict(zip(policy.before_blocks, kept_BS.unbind(1), strict=True))
        for block in range(len(policy.cost.linear)):
            if block in behind:
                counter.add_stage(tokens_B, behind[block])
                tokens_B = behind[block]
            counter.add_block(block, tokens_B)
        merged_BSN = found.get(MERGED_INTO)
        return _Past(policy, counter, [] if merged_BSN is None else list(merged_BSN.unbind(1)))


def made_with(kind: FormatName) -> dict[str, str]:
    """Versions, for `export.json`."""
    name, number = FORMATS[kind].runtime().split()
    packages = {package: version(package) for package in ("vitprune", "torch", "transformers")}
    return {**packages, name: number, "python": ".".join(map(str, sys.version_info[:3]))}
