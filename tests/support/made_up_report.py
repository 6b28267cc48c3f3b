"""A report of a run that never was."""

from __future__ import annotations

from typing import Any

import numpy as np
from made_up import MACHINE
from PIL import Image

from vitprune.reports.results import Comparison, Distribution, KeptPatches, Macs, MetricPair, Report, Throughput, Timing
from vitprune.reports.token_pictures import SeenImage, Stage

RECIPE = {"model": {"checkpoint": "facebook/deit-tiny"}, "data": {"path": "imagenet-1k"}}


def spread(mean: float) -> Distribution:
    return Distribution(mean=mean, q05=0.5 * mean, q25=0.8 * mean, q50=mean, q75=1.2 * mean, q95=1.5 * mean)


def comparison(accuracy: float | None = 0.921, ratio: float = 0.6, skipped: int = 0) -> Comparison:
    return Comparison(
        images=1000,
        skipped=skipped,
        metrics={} if accuracy is None else {"accuracy": MetricPair(dense=0.924, pruned=accuracy)},
        agreement=0.975,
        macs=Macs(dense=1.25e9, pruned=spread(ratio * 1.25e9), ratio=ratio),
        kept=(
            KeptPatches(before_block=4, patches=196, kept=spread(150)),
            KeptPatches(before_block=7, patches=196, kept=spread(80)),
        ),
    )


def speed(batch_size: int, speedup: float) -> Throughput:
    dense = Timing(median=0.1 * speedup, fastest=0.09 * speedup, slowest=0.2 * speedup)
    return Throughput(
        batch_size=batch_size, dense=dense, pruned=Timing(median=0.1, fastest=0.09, slowest=0.2), ideal_speedup=1.6
    )


def report(**changes: Any) -> Report:
    environment = MACHINE.model_copy(update={"cpu": "Some CPU", "dtype": "float32"})
    fields: dict[str, Any] = {
        "environment": environment,
        "recipe": RECIPE,
        "budget": 0.6,
        "comparison": comparison(),
        "throughput": (speed(1, 0.93), speed(16, 1.4), speed(64, 1.52)),
    }
    return Report(**{**fields, **changes})


# two rows of three patches: 0 alone, 1 and 2 in 2, 3 gone, 4 and 5 in 4
MERGED = np.array([[0, 2, 2], [-1, 4, 4]])
STAGE = Stage(2, MERGED)
CELL = 40


def seen_image(**changes: Any) -> SeenImage:
    """Each patch of another brightness."""
    levels = np.repeat(np.repeat(np.array([[20, 60, 100], [140, 180, 220]]), CELL, 0), CELL, 1)
    picture = Image.fromarray(np.repeat(levels[..., None], 3, 2).astype(np.uint8))
    fields: dict[str, Any] = {
        "name": "an image",
        "picture": picture,
        "box": (0.0, 0.0, *map(float, picture.size)),
        "stages": (STAGE,),
        "dense_macs": 2e9,
        "macs": 1e9,
        "dense": "cat 90.0 %",
        "pruned": "dog 51.0 %",
    }
    return SeenImage(**{**fields, **changes})
