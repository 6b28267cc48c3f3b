"""Verbs that make checkpoints, and say what they are worth."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vitprune.bench.settings import TARGETS
from vitprune.cli.talk import AsJson, Overrides, Quiet, RecipePath, Talk, clear_messages, loaded, read_macs


def apply(
    recipe: RecipePath,
    launcher: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- LAUNCHER OPTIONS]",
            help="Options of `accelerate launch`, such as -- --num_processes 4, which then runs this.",
        ),
    ] = None,
    overrides: Overrides = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew where a run was interrupted; otherwise it is resumed.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Prune, fine-tune, evaluate and save a checkpoint. Resumes an interrupted run."""
    talk = Talk(quiet, as_json)
    if launcher:
        given = [*talk.options, *(["--restart"] if restart else [])]
        raise typer.Exit(_launched(recipe, overrides or [], launcher, given))
    with loaded(recipe, overrides) as settings:
        from vitprune.reports.run_report import print_report
        from vitprune.runs.apply import apply as run

        with talk.progress():
            report = run(settings, restart=restart)
        talk.tell(report, print_report, Path(settings.output.path) / "report.html")


def _launched(recipe: Path, overrides: Sequence[str], options: Sequence[str], given: Sequence[str]) -> int:
    if not options[0].startswith("-"):
        raise typer.BadParameter(f"unexpected {options[0]!r}; options of the launcher come behind --")
    with loaded(recipe, overrides):  # a mistake in it is better told once
        from vitprune.runs.launch import launch

    changes = [part for override in overrides for part in ("--set", override)]
    return launch(["apply", str(recipe), *changes, *given], options)


def plan(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Show what apply would do: stages, tokens and MACs per block, steps. Runs nothing."""
    with loaded(recipe, overrides) as settings:
        from vitprune.runs.plan import plan as run
        from vitprune.runs.plan import print_plan

        print_plan(run(settings), Console())


def prefetch(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Bring what apply needs into the cache, checkpoint and data, so that it runs without a network."""
    with loaded(recipe, overrides) as settings:
        from vitprune.runs.prefetch import prefetch as run

        for piece in run(settings):
            typer.echo(piece)


def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder or Hub id of a pruned checkpoint; or of an exported one, or its model.onnx.")
    ],
    recipe: RecipePath,
    output: Annotated[Path, typer.Option(help="Folder for report.json and report.html.")] = Path("runs/evaluate"),
    overrides: Overrides = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare a pruned checkpoint with the dense model, on the recipe's data."""
    talk = Talk(quiet, as_json)
    with loaded(recipe, overrides) as settings:
        from vitprune.reports.run_report import print_report
        from vitprune.runs.evaluate import evaluate as run

        with talk.progress():
            report = run(checkpoint, settings, output)
        talk.tell(report, print_report, output / "report.html")


def push(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint that apply wrote.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, such as user/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private where it isn't there yet.")] = False,
) -> None:
    """Upload a checkpoint to the Hub, with its card, pictures, results and recipe."""
    with clear_messages(lambda error: error):
        from vitprune.runs.push import push as run

        typer.echo(run(checkpoint, repo, private=private))


class ExportFormat(StrEnum):
    """What a model is exported to."""

    onnx = "onnx"
    pt2 = "pt2"
    openvino = "openvino"


class ExportTokens(StrEnum):
    """How many tokens an exported model keeps."""

    adaptive = "adaptive"
    fixed = "fixed"


class ExportDtype(StrEnum):
    """What an exported model computes in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    int8 = "int8"


def export(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id of a pruned or dense checkpoint.")],
    to: Annotated[ExportFormat, typer.Option(help="Format.")] = ExportFormat.onnx,
    tokens: Annotated[
        ExportTokens, typer.Option(help="Each image its own number, or all as many, for static shapes.")
    ] = ExportTokens.adaptive,
    kept: Annotated[
        str | None,
        typer.Option(
            help="With fixed: patches behind each stage, 180,126,87; or q50, q75, q95 of the report, or its mean, the "
            "default."
        ),
    ] = None,
    dtype: Annotated[
        ExportDtype, typer.Option(help="bfloat16: pt2 alone; int8: linear layers, ONNX alone.")
    ] = ExportDtype.float32,
    opset: Annotated[int, typer.Option(min=18, help="Version of ONNX's operators.")] = 20,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels; the checkpoint's own size.")] = None,
    any_size: Annotated[bool, typer.Option("--any-size", help="Other heights and widths fit, too.")] = False,
    tells_patches: Annotated[
        bool, typer.Option("--tells-patches", help="The graph also says what became of each patch.")
    ] = False,
    budget: Annotated[str | None, typer.Option(help="Of a checkpoint with several operating points.")] = None,
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/export"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an exported folder that is there.")] = False,
) -> None:
    """Write a checkpoint as a graph for ONNX Runtime, torch.export or OpenVINO, and check it there."""
    with clear_messages(lambda error: error):
        from vitprune.runs.export import CHECKED, export_checkpoint

        with Talk(quiet=False, as_json=False).progress():
            found = export_checkpoint(
                checkpoint,
                output,
                to=to.value,
                tokens=tokens.value,
                kept=kept,
                dtype=dtype.value,
                opset=opset,
                image_size=image_size,
                any_size=any_size,
                tells_patches=tells_patches,
                budget=budget,
                overwrite=overwrite,
            )
        path = found.model.folder / found.model.info.file
        typer.echo(f"{path}: {found.size / 2**20:.1f} MiB in {found.seconds:.0f} s, {found.model.info.tokens} tokens")
        others = f", {found.other_tokens} of them with other numbers of tokens" if found.other_tokens else ""
        typer.echo(f"On {CHECKED} images of noise its answers are within {found.difference:.1e} of torch's{others}.")
        typer.echo(f"How to run it: {found.model.folder / 'README.md'}")


class Baseline(StrEnum):
    """What a sweep compares with."""

    tome = "tome"
    as_vit = "as-vit"
    random = "random"


def sweep(
    recipe: RecipePath,
    more: Annotated[list[str] | None, typer.Argument(metavar="[BUDGET]...", help="More budgets.")] = None,
    budgets: Annotated[
        list[str] | None, typer.Option("--budgets", metavar="BUDGET...", help="Such as 80% 65% 50% 35%, the default.")
    ] = None,
    baseline: Annotated[list[Baseline] | None, typer.Option(help="Also run another policy; can be repeated.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for sweep.json, sweep.html and a checkpoint a point.")] = Path(
        "runs/sweep"
    ),
    overrides: Overrides = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew; otherwise what is done isn't done again.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe at several budgets: the curve of quality and speed over work, as a page. Resumes."""
    talk = Talk(quiet, as_json)
    parts = [read_macs(text) for text in (*(budgets or ()), *(more or ()))] or [*TARGETS]
    with loaded(recipe, overrides) as settings:
        from vitprune.reports.sweep_report import print_sweep
        from vitprune.runs.sweep import SWEEP_PAGE
        from vitprune.runs.sweep import sweep as run

        others = [kind.value for kind in baseline or ()]

        def announce(text: str) -> None:
            if not quiet and os.environ.get("RANK", "0") == "0":
                typer.echo(text, err=True)

        with talk.progress():
            found = run(settings, parts, output=output, baselines=others, restart=restart, tell=announce)
        talk.tell(found, print_sweep, output / SWEEP_PAGE)
