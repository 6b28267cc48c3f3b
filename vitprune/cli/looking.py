"""Verbs that look at a model: what it does to images, and how fast it is."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vitprune.bench.settings import BATCH_SIZES, TRAINING_BATCH_SIZE, BenchSettings, is_recipe, read_target, with_data
from vitprune.cli.talk import AsJson, Overrides, Quiet, Talk, clear_messages, read_macs
from vitprune.recipe.schema import locate


def show(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id of a pruned checkpoint.")],
    images: Annotated[
        list[str] | None, typer.Argument(metavar="[IMAGE]...", help="Image files, or folders of them.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Or a data set, as data.path in a recipe.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of --data; test.")] = None,
    rows: Annotated[str | None, typer.Option(help="Rows of the split to draw, such as 0-9,20; 0-9.")] = None,
    dense: Annotated[
        str | None, typer.Option(help="Dense checkpoint to show beside; the same weights, unpruned, if left out.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Of a checkpoint with several operating points, such as 50%.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("runs/show"),
) -> None:
    """Draw which patches of images stay after each stage, and both models' answers. Writes PNG files."""
    with clear_messages(lambda error: error):
        from vitprune.reports.token_pictures import in_a_line
        from vitprune.runs.show import show_files

        place = {"data": data, "split": split, "rows": rows}
        found = show_files(checkpoint, images or [], **place, dense=dense, budget=budget, output=output)
        with Talk(quiet=False, as_json=False).progress():
            for seen, path in found:
                typer.echo(f"{path}: {in_a_line(seen)}")


class Dtype(StrEnum):
    """What a benchmark computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class BenchMode(StrEnum):
    """How a benchmark runs the blocks."""

    eager = "eager"
    compiled = "compiled"


def bench(
    target: Annotated[
        str, typer.Argument(help="Checkpoint (folder or Hub id), dense or pruned; a recipe file; or a model.onnx.")
    ],
    data: Annotated[str | None, typer.Option(help="Real images, as data.path in a recipe; else random pixels.")] = None,
    macs: Annotated[
        list[float] | None,
        typer.Option(parser=read_macs, metavar="PART", help="Part of the MACs; 80, 65, 50, 35 %."),
    ] = None,
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Images at a time; 1 and 16.")] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option(help="What it computes in; the recipe's, or float32.")] = None,
    image_size: Annotated[list[int] | None, typer.Option(min=1, help="Pixels; the checkpoint's own size.")] = None,
    mode: Annotated[list[BenchMode] | None, typer.Option(help="How the blocks run; eager.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements, of which the median counts.")] = 7,
    training: Annotated[bool, typer.Option("--training", help="Also time steps of fine-tuning.")] = False,
    training_batch_size: Annotated[int | None, typer.Option(min=1, help="Images of such a step; 16.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for bench.json and pictures.")] = Path("runs/bench"),
    overrides: Overrides = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory against the dense model on this machine. Options that take several can be repeated."""
    if training_batch_size is not None and not training:
        raise typer.BadParameter("is of steps of fine-tuning; add --training", param_hint="--training-batch-size")
    path = Path(target)
    changed = with_data(data, overrides or ())
    with clear_messages(lambda error: locate(error, path, changed) if is_recipe(target) else error):
        recipe, random_pixels = read_target(target, data, overrides or ())
        settings = BenchSettings(
            recipe,
            random_pixels,
            targets=tuple(macs) if macs else None,
            batch_sizes=tuple(batch_size or BATCH_SIZES),
            dtypes=tuple(kind.value for kind in dtype or ()),
            image_sizes=tuple(image_size or ()),
            modes=tuple(kind.value for kind in mode or (BenchMode.eager,)),
            repeats=repeats,
            training=training,
            training_batch_size=training_batch_size or TRAINING_BATCH_SIZE,
        )
        from vitprune.bench.sweep import bench as run
        from vitprune.reports.bench_report import print_benchmark, print_files

        with Talk(quiet, as_json).progress():
            benchmark = run(settings, output=output)
        if as_json:
            typer.echo(benchmark.model_dump_json(indent=2, by_alias=True))
        elif not quiet:
            print_benchmark(benchmark, Console())
        print_files(benchmark, output, Console(quiet=quiet or as_json))
