"""The command line: verbs, their words of help, and what a failure looks like.

What needs torch is imported by the verbs that need it, so that help comes at once.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from vitprune import __version__
from vitprune.bench.settings import BATCH_SIZES, TARGETS, BenchSettings, is_recipe, read_part, read_target
from vitprune.recipe import shipped
from vitprune.recipe.errors import did_you_mean
from vitprune.recipe.schema import Recipe, RecipeError, json_schema, load_recipe, locate
from vitprune.runtime.signals import FAILED, INTERRUPTED, TERMINATED, USAGE, Terminated

if TYPE_CHECKING:
    from vitprune.reports.results import Document

app = typer.Typer(
    help="Prune tokens of Vision Transformers to a compute budget, as a recipe says.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="Recipes that come with vitprune.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file, such as recipes/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe, such as finetune.epochs=1."),
]


def main() -> None:
    """Entry point of the command `vitprune`."""
    app()


@contextmanager
def _loaded(path: Path, overrides: Sequence[str] | None) -> Iterator[Recipe]:
    """The recipe, and clear messages."""
    with _clear_messages(lambda error: locate(error, path, overrides or ())):
        yield load_recipe(path, overrides or ())


@contextmanager
def _clear_messages(located: Callable[[RecipeError], RecipeError]) -> Iterator[None]:
    """One clear message for what a user can mend. Anything else is our bug and keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        _say("interrupted; nothing half-written is left in the output path")
        raise typer.Exit(INTERRUPTED) from None
    except Terminated:
        _say("terminated (SIGTERM); the same command resumes from what was kept")
        raise typer.Exit(TERMINATED) from None
    except RecipeError as error:
        _say(str(located(error)))
        raise typer.Exit(USAGE) from None
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("VITPRUNE_DEBUG") == "1":
            traceback.print_exc()
        else:
            _say(f"failed: {_explained(error)} (VITPRUNE_DEBUG=1 shows where)")
        raise typer.Exit(FAILED) from None


def _explained(error: Exception) -> str:
    if "LOCAL_RANK" in os.environ:
        from vitprune.runtime.distributed import has_lost_another

        if has_lost_another(error):
            return "another process of this run ended; the same command resumes from what was kept"
    if "DataLoader worker" in str(error):  # which torch raises wherever the main process is just then
        return (
            "a process that loads images was killed, most often for want of memory; lower data.workers, or free some, "
            "and run the same command again: it resumes from what was kept"
        )
    return str(error) or type(error).__name__


def _say(message: str) -> None:
    """One message a run: of several processes the first to fail has it."""
    if "LOCAL_RANK" in os.environ:
        from vitprune.runtime.distributed import first_to_fail

        if not first_to_fail():
            return
        if os.environ.get("RANK") != "0":  # whose progress may stand there without a line's end
            message = f"\n{message}"
    typer.echo(message, err=True)


@dataclass(frozen=True)
class _Talk:
    """How much a command says: tables and progress, JSON for scripts, or nothing but errors."""

    quiet: bool
    as_json: bool

    @contextmanager
    def progress(self) -> Iterator[None]:
        """Show progress of the work inside, and what was slow at its end."""
        from vitprune.runtime.progress import display

        with display(quiet=self.quiet or os.environ.get("RANK", "0") != "0") as shown:
            yield
        if shown.took and not shown.quiet:
            typer.echo(shown.summary(), err=True)

    def tell(self, result: Document, show: Callable[[Any, Console], None], page: Path) -> None:
        """The result, by the main process alone."""
        from vitprune.runtime.distributed import destroy, init

        if init().is_main_process:
            if self.as_json:
                typer.echo(result.model_dump_json(indent=2, by_alias=True))
            elif not self.quiet:
                show(result, Console())
                typer.echo(f"The page: {page}")
        destroy()

    @property
    def options(self) -> list[str]:
        """As they were given."""
        return [option for option, given in (("--quiet", self.quiet), ("--json", self.as_json)) if given]


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, to stdout.")]


@app.command()
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
    talk = _Talk(quiet, as_json)
    if launcher:
        given = [*talk.options, *(["--restart"] if restart else [])]
        raise typer.Exit(_launched(recipe, overrides or [], launcher, given))
    with _loaded(recipe, overrides) as settings:
        from vitprune.reports.run_report import print_report
        from vitprune.runs.apply import apply as run

        with talk.progress():
            report = run(settings, restart=restart)
        talk.tell(report, print_report, Path(settings.output.path) / "report.html")


def _launched(recipe: Path, overrides: Sequence[str], options: Sequence[str], given: Sequence[str]) -> int:
    if not options[0].startswith("-"):
        raise typer.BadParameter(f"unexpected {options[0]!r}; options of the launcher come behind --")
    with _loaded(recipe, overrides):  # a mistake in it is better told once
        from vitprune.runs.launch import launch

    changes = [part for override in overrides for part in ("--set", override)]
    return launch(["apply", str(recipe), *changes, *given], options)


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Show what apply would do: stages, tokens and MACs per block, steps. Runs nothing."""
    with _loaded(recipe, overrides) as settings:
        from vitprune.reports.run_report import print_plan
        from vitprune.runs.plan import plan as run

        print_plan(run(settings), Console())


@app.command()
def prefetch(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Bring what apply needs into the cache, checkpoint and data, so that it runs without a network."""
    with _loaded(recipe, overrides) as settings:
        from vitprune.runs.prefetch import prefetch as run

        for piece in run(settings):
            typer.echo(piece)


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id of a pruned checkpoint.")],
    recipe: RecipePath,
    output: Annotated[Path, typer.Option(help="Folder for report.json and report.html.")] = Path("runs/evaluate"),
    overrides: Overrides = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare a pruned checkpoint with the dense model, on the recipe's data."""
    talk = _Talk(quiet, as_json)
    with _loaded(recipe, overrides) as settings:
        from vitprune.reports.run_report import print_report
        from vitprune.runs.apply import evaluate as run

        with talk.progress():
            report = run(checkpoint, settings, output)
        talk.tell(report, print_report, output / "report.html")


@app.command()
def show(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id of a pruned checkpoint.")],
    images: Annotated[
        list[str] | None, typer.Argument(metavar="[IMAGE]...", help="Image files, or folders of them.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Or a data set, as data.path in a recipe.")] = None,
    split: Annotated[str, typer.Option(help="Of it.")] = "test",
    rows: Annotated[str, typer.Option(help="Of that, such as 0-9,20.")] = "0-9",
    dense: Annotated[
        str | None, typer.Option(help="Dense checkpoint to show beside; the same weights, unpruned, if left out.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Of a checkpoint with several operating points, such as 50%.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("runs/show"),
) -> None:
    """Draw which patches of images stay after each stage, and both models' answers. Writes PNG files."""
    with _clear_messages(lambda error: error):
        from vitprune.reports.token_pictures import in_a_line
        from vitprune.runs.show import show_files

        place = {"data": data, "split": split, "rows": rows}
        found = show_files(checkpoint, images or [], **place, dense=dense, budget=budget, output=output)
        with _Talk(quiet=False, as_json=False).progress():
            for seen, path in found:
                typer.echo(f"{path}: {in_a_line(seen)}")


@app.command()
def push(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint that apply wrote.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, such as user/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private where it isn't there yet.")] = False,
) -> None:
    """Upload a checkpoint to the Hub, with its card, pictures, results and recipe."""
    with _clear_messages(lambda error: error):
        from vitprune.runs.push import push as run

        typer.echo(run(checkpoint, repo, private=private))


def _macs(text: str) -> float:
    try:
        return read_part(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


class Baseline(str, Enum):
    """What a sweep compares with."""

    tome = "tome"
    as_vit = "as-vit"
    random = "random"


@app.command()
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
    talk = _Talk(quiet, as_json)
    parts = [_macs(text) for text in (*(budgets or ()), *(more or ()))] or [*TARGETS]
    with _loaded(recipe, overrides) as settings:
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


class Dtype(str, Enum):
    """What a benchmark computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class BenchMode(str, Enum):
    """How a benchmark runs the blocks."""

    eager = "eager"
    compiled = "compiled"


@app.command()
def bench(
    target: Annotated[str, typer.Argument(help="Folder or Hub id of a dense or pruned checkpoint, or a recipe file.")],
    data: Annotated[str | None, typer.Option(help="Real images, as data.path in a recipe; else random pixels.")] = None,
    macs: Annotated[
        list[float] | None, typer.Option(parser=_macs, metavar="PART", help="Part of the MACs; 80, 65, 50, 35 %.")
    ] = None,
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Images at a time; 1 and 16.")] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option(help="The recipe's, or float32.")] = None,
    image_size: Annotated[list[int] | None, typer.Option(min=1, help="Pixels; the checkpoint's own size.")] = None,
    mode: Annotated[list[BenchMode] | None, typer.Option(help="eager.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements, of which the median counts.")] = 7,
    training: Annotated[bool, typer.Option("--training", help="Also time steps of fine-tuning.")] = False,
    training_batch_size: Annotated[int, typer.Option(min=1, help="Images of such a step.")] = 16,
    output: Annotated[Path, typer.Option(help="Folder for bench.json and pictures.")] = Path("runs/bench"),
    overrides: Overrides = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory against the dense model on this machine. Options that take several can be repeated."""
    path = Path(target)
    with _clear_messages(lambda error: locate(error, path, overrides or ()) if is_recipe(target) else error):
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
            training_batch_size=training_batch_size,
        )
        from vitprune.bench.sweep import bench as run
        from vitprune.reports.bench_report import print_benchmark, print_files

        with _Talk(quiet, as_json).progress():
            benchmark = run(settings, output=output)
        if as_json:
            typer.echo(benchmark.model_dump_json(indent=2, by_alias=True))
        elif not quiet:
            print_benchmark(benchmark, Console())
            print_files(benchmark, output, Console())


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    typer.echo(json.dumps(json_schema(), indent=2))


@recipes_app.command("ls")
def list_recipes() -> None:
    """List the recipes that come with vitprune."""
    for name, path in shipped.shipped().items():
        typer.echo(f"{name:24}{shipped.summary(path)}")


@recipes_app.command("cp")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="Name from `vitprune recipes ls`.")],
    destination: Annotated[Path, typer.Argument(metavar="[DEST]", help="Folder to copy it into.")] = Path(),
) -> None:
    """Copy a recipe, and the files it comes with, to a folder. Nothing is overwritten."""
    known = list(shipped.shipped())
    name = name.removesuffix(".yaml")
    if name not in known:
        raise typer.BadParameter(f"no recipe {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")
    try:
        copied = shipped.copy(name, destination)
    except OSError as error:
        typer.echo(f"failed: {error}", err=True)
        raise typer.Exit(1) from None
    for path in copied:
        typer.echo(path)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vitprune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...
