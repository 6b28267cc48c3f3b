"""What an exported model gains: its graph and the dense one's in turn, in the same runtime, on the same batches."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers.utils import IMAGE_PROCESSOR_NAME

from vitprune.bench.images import RANDOM_PIXELS, real_images
from vitprune.bench.settings import BenchSettings
from vitprune.exporting.export import export_like
from vitprune.exporting.exported import ExportedModel
from vitprune.measure.throughput import describe_environment, measure_throughput
from vitprune.models.checkpoint import load_config, model_class
from vitprune.models.module import pruning_of
from vitprune.reports.bench_results import Benchmark, Case, Setting


def bench_exported(folder: Path, settings: BenchSettings, fewest: int, *, progress: bool) -> Benchmark:
    """Measure an exported model at each batch size, beside a dense one of its class with weights by chance.

    fewest: images, so that small batches are different ones.

    Raises ValueError for settings that a graph has no choice of, and for a dense one.
    """
    asked = {
        "--macs": settings.targets,
        "--dtype": settings.dtypes,
        "--image-size": settings.image_sizes,
        "--mode": settings.modes != ("eager",),
        "--training": settings.training,
    }
    if given := [name for name, value in asked.items() if value]:
        raise ValueError(f"{folder} is a graph, measured as it is; leave {', '.join(given)} out")
    exported = ExportedModel.load(folder)
    info = exported.info
    if info.tokens == "dense":
        raise ValueError(f"{folder} holds a dense model; name a pruned one, the dense one is measured beside it")
    count = max(fewest, *settings.batch_sizes)
    if settings.random_pixels:
        x_BCHW = torch.randn(count, *info.image, generator=torch.Generator().manual_seed(settings.recipe.seed))
        described = RANDOM_PIXELS
    else:
        recipe = settings.recipe
        model = recipe.model.model_copy(update={"checkpoint": str(folder)})
        images = real_images(recipe.model_copy(update={"model": model}), 1, count)
        x_BCHW, described = images.timed(None), images.described
    config = load_config(str(folder))
    cls = model_class(str(folder), config)
    vars(config).pop("quantization_config", None)
    processor = exported.processor if (folder / IMAGE_PROCESSOR_NAME).is_file() else None
    dense = export_like(info, cls(config).eval(), processor)
    setting = Setting(image_size=info.image[1], dtype=info.precision, mode=info.format)
    models = dense, exported.model
    timed = measure_throughput(*models, x_BCHW, settings.batch_sizes, settings.repeats, progress=progress)
    return Benchmark(
        created=datetime.now(UTC),
        environment=describe_environment(exported.model),
        checkpoint=f"./{folder.name}",
        pruning=pruning_of(exported.model).spec.model_dump(mode="json"),
        images=described,
        repeats=settings.repeats,
        cases=tuple(
            Case(
                **setting.model_dump(),
                batch_size=one.batch_size,
                target=None,
                dense=one.dense,
                pruned=one.pruned,
                macs_ratio=1 / one.ideal_speedup,
            )
            for one in timed
        ),
    )
