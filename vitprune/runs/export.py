"""`vitprune export`: a checkpoint becomes a folder for another runtime, and is checked there against torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from vitprune.exporting.export import Tokens, copy_to_export, export
from vitprune.exporting.exported import ExportedModel
from vitprune.exporting.formats import FormatName
from vitprune.measure.outputs import ImageModel
from vitprune.measure.timing import placed
from vitprune.models.checkpoint import load, load_processor
from vitprune.models.module import is_pruned
from vitprune.models.trace import trace
from vitprune.recipe.values import read_budget
from vitprune.reports.results import REPORT_JSON, Comparison, Report
from vitprune.runtime.progress import task

CHECKED = 4  # images of noise
QUANTILES = ("mean", "q05", "q25", "q50", "q75", "q95")
"""Of the patches that evaluated images kept, by which `--tokens fixed` keeps as many."""


@dataclass(frozen=True)
class Exported:
    """What was written. size: of all graph files, in bytes. difference: of answers to torch's, the largest.

    other_tokens: of `CHECKED` images those that kept another number of tokens at any stage.
    """

    model: ExportedModel
    size: int
    seconds: float
    difference: float
    other_tokens: int


def export_checkpoint(
    checkpoint: str,
    output: Path,
    *,
    to: FormatName = "onnx",
    tokens: Tokens = "adaptive",
    kept: str | None = None,
    budget: str | None = None,
    **options: Any,
) -> Exported:
    """Export a checkpoint and run a few images through the result and through torch.

    kept: with fixed tokens numbers such as "180,126,87", or one of `QUANTILES` of the checkpoint's own report, the mean
    if None. options: as of `vitprune.export`.

    Raises ValueError as `vitprune.export`, and where the checkpoint's report doesn't say what images keep.
    """
    if kept is not None and tokens != "fixed":
        raise ValueError(f"--kept {kept} says how many patches fixed tokens keep; add --tokens fixed, or leave it out")
    model = load(checkpoint, budget=budget)
    processor = _processor(checkpoint)
    began = time.perf_counter()
    with task(f"exporting to {to}"):
        exported = export(
            model,
            output,
            to=to,
            tokens=tokens,
            kept=_kept(checkpoint, kept or "mean", budget) if tokens == "fixed" and is_pruned(model) else None,
            processor=processor,
            **options,
        )
    seconds = time.perf_counter() - began
    files = [path for path in exported.folder.iterdir() if path.name.startswith("model.")]
    info = exported.info
    # with fixed tokens the graph has a policy of its own, which is no fault of it
    difference, others = _check(
        exported, model if info.kept is None else copy_to_export(model, info.image, "fixed", info.kept)
    )
    return Exported(exported, sum(path.stat().st_size for path in files), seconds, difference, others)


def _processor(checkpoint: str) -> BaseImageProcessor | None:
    try:
        return load_processor(checkpoint)
    except ValueError:  # the graph takes pixel values, wherever they come from
        return None


def _kept(checkpoint: str, kept: str, budget: str | None) -> Sequence[int]:
    """Patches behind each stage."""
    if kept not in QUANTILES:
        try:
            return [int(number) for number in kept.split(",")]
        except ValueError:
            way_out = f"write numbers such as 180,126,87, or one of {', '.join(QUANTILES)}"
            raise ValueError(f"--kept is {kept!r}; {way_out}") from None
    path = Path(checkpoint) / REPORT_JSON
    if not path.is_file():
        raise ValueError(
            f"{checkpoint} has no report.json that says how many patches images keep; name them: --kept 180,126,87"
        )
    report = Report.load(path)
    found: Comparison = report.comparison
    if budget is not None:
        asked = read_budget(budget)
        points = [point for point in report.points if point.budget == asked]
        if not points:
            raise ValueError(f"the checkpoint's report says nothing of {budget}; name the numbers: --kept 180,126,87")
        found = points[0].comparison
    return [max(1, round(getattr(stage.kept, kept))) for stage in found.kept]


@torch.no_grad()
def _check(exported: ExportedModel, model: PreTrainedModel) -> tuple[float, int]:
    """Answers' largest difference, and how many images kept other numbers of tokens, where those aren't fixed."""
    x_BCHW = torch.randn(CHECKED, *exported.info.image, generator=torch.Generator().manual_seed(0))
    answers, graph = ImageModel.of(model), ImageModel.of(exported.model)

    def difference() -> float:
        return float((answers(placed(x_BCHW, model)).float() - graph(x_BCHW).float()).abs().max())

    if exported.info.tokens != "adaptive":
        return difference(), 0
    with trace(model) as here, trace(exported.model) as there:
        found = difference()
    return found, int((here.kept_patches != there.kept_patches).any(1).sum())
