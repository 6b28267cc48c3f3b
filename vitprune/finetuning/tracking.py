"""What experiment trackers are told of a fine-tuning: the recipe, figures of every step, pictures of kept tokens.

Knows names and units of the figures.

Shapes: B images, C channels, H height, W width, P patches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor, nn

from vitprune.finetuning.losses import LOSSES
from vitprune.finetuning.thresholds import ThresholdTraining
from vitprune.models.module import pruning_of
from vitprune.models.trace import eval_mode, trace
from vitprune.recipe.errors import RecipeError
from vitprune.reports.results import Check
from vitprune.runtime import distributed

DIMMED = 0.25  # how bright a picture is where its tokens left
_TAKE_PICTURES = ("tensorboard", "wandb", "aim", "clearml", "swanlab")
_PACKAGES = {"comet_ml": "comet-ml"}


@dataclass(frozen=True)
class TrackerContext:
    """What trackers are given besides figures.

    folder: for those that write files. run: its name. settings: the flat recipe, shown as hyperparameters. samples:
    pixel values (B, C, H, W) whose kept tokens are shown every epoch. scale_C, shift_C: pixel values are
    unit · scale + shift, unit in [0, 1].
    """

    folder: Path
    run: str
    settings: Mapping[str, Any]
    samples: Tensor
    scale_C: Tensor
    shift_C: Tensor


def require_installed(trackers: Sequence[str]) -> None:
    """Raise ValueError naming a tracker whose package isn't there."""
    there = {str(name) for name in get_available_trackers()}
    for name in trackers:
        if name not in there:
            text = f"{name!r} isn't installed; pip install {_PACKAGES.get(name, name)}"
            raise RecipeError.at(("finetune", "trackers"), text)


@dataclass
class Tracking:
    """Tells the trackers of one fine-tuning. Called in all processes; the main one tells."""

    accelerator: Accelerator
    student: nn.Module
    thresholds: ThresholdTraining
    tracker_context: TrackerContext
    images_per_step: int
    _last: float = field(default_factory=time.perf_counter, init=False)

    def begin(self) -> None:
        plain = {key: value if isinstance(value, str | int | float) else str(value) for key, value in self._settings()}
        self.accelerator.init_trackers(self.tracker_context.run, config=plain)
        self._last = time.perf_counter()

    def log_step(
        self, record: Mapping[str, float], learning_rates: Mapping[str, float], step: int, check: Check | None = None
    ) -> None:
        """Figures of one step: losses, ratio, kept parts, thresholds, learning rates, images a second; a check's."""
        now = time.perf_counter()
        speed, self._last = self.images_per_step / (now - self._last), now
        pruning = pruning_of(self.student)
        levels = self.thresholds.levels(distributed.full_tensor(pruning.levels)).tolist()
        self.accelerator.log(
            {
                **{_NAMES.get(name, name): value for name, value in record.items() if name != "lr"},
                **{f"level/before_block_{b}": level for b, level in zip(pruning.before_blocks, levels, strict=True)},
                **{f"learning_rate/{name}": rate for name, rate in learning_rates.items()},
                **({} if check is None else _held_out(check)),
                "images_per_second": speed,
            },
            step=step,
        )

    def log_check(self, check: Check) -> None:
        """Figures of a check before any step."""
        self.accelerator.log(_held_out(check), step=check.step)

    def leave_out(self, seconds: float) -> None:
        """So much of the time since the last step was no training."""
        self._last += seconds

    def log_images(self, step: int) -> None:
        """Pictures of the samples, each beside itself with the tokens dimmed that didn't stay to the end."""
        began = time.perf_counter()
        x_BCHW = self.tracker_context.samples.to(self.accelerator.device)
        with trace(self.student) as seen, eval_mode(self.student), torch.no_grad(), self.accelerator.autocast():
            self.student(x_BCHW)
        unit_BCHW = unscaled(self.tracker_context.samples, self.tracker_context.scale_C, self.tracker_context.shift_C)
        pictures = beside_kept(unit_BCHW, seen.keep_masks[-1].cpu())
        if pictures is not None:
            for tracker in self.accelerator.trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                if tracker.name in _TAKE_PICTURES:
                    tracker.log_images({"kept tokens": pictures}, step=step, **layout)
        self.leave_out(time.perf_counter() - began)

    def end(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _settings(self) -> Sequence[tuple[str, Any]]:
        return [(key, "none" if value is None else value) for key, value in self.tracker_context.settings.items()]


def _held_out(check: Check) -> dict[str, float]:
    seen = {"loss": check.loss, "ratio": check.ratio, **check.losses}
    return {f"held_out/{name}": value for name, value in seen.items() if value is not None}


_NAMES = {name: f"loss/{name}" for name in LOSSES} | {"loss": "loss/total"}


def unscaled(x_BCHW: Tensor, scale_C: Tensor, shift_C: Tensor) -> Tensor:
    """Pixel values as an image processor scales them, in [0, 1] again."""
    return ((x_BCHW - shift_C[:, None, None]) / scale_C[:, None, None]).clamp(0.0, 1.0)


def beside_kept(unit_BCHW: Tensor, keep_BP: Tensor) -> Any:
    """uint8 array (B, H, 2·W, C): each image beside itself, dimmed where its patch isn't kept; None without a grid."""
    height, width = unit_BCHW.shape[-2:]
    patches = keep_BP.shape[1]
    rows = round(math.sqrt(patches * height / width))
    if patches % rows:
        return None
    light_B1HW = nn.functional.interpolate(
        keep_BP.float().clamp(min=DIMMED).unflatten(1, (1, rows, patches // rows)), size=(height, width)
    )
    both_BCHW = torch.cat([unit_BCHW, unit_BCHW * light_B1HW], dim=3)
    return (both_BCHW * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
