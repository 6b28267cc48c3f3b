"""The command line: verbs, their words of help, and what a failure looks like.

Knows arguments and exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 130 interrupted. Leaves the work to
`apply.py` and showing it to `report.py`; both bring torch along and are imported by the verbs that need them.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vitprune import __version__, recipes
from vitprune.recipe import Recipe, RecipeError, json_schema, load_recipe, locate
from vitprune.recipe_errors import did_you_mean

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
    """The recipe; and one clear message for what a user can mend. Anything else is our bug and keeps its traceback."""
    try:
        yield load_recipe(path, overrides or ())
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing half-written is left in the output path", err=True)
        raise typer.Exit(130) from None
    except RecipeError as error:
        typer.echo(locate(error, path, overrides or ()), err=True)
        raise typer.Exit(2) from None
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("VITPRUNE_DEBUG") == "1":
            traceback.print_exc()
        else:
            typer.echo(f"failed: {str(error) or type(error).__name__} (VITPRUNE_DEBUG=1 shows where)", err=True)
        raise typer.Exit(1) from None


@app.command()
def apply(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Prune, fine-tune, evaluate and save a checkpoint."""
    with _loaded(recipe, overrides) as settings:
        from vitprune.apply import apply as run
        from vitprune.report import print_report

        print_report(run(settings), Console())


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Show what apply would do: stages, tokens and MACs per block, steps. Runs nothing."""
    with _loaded(recipe, overrides) as settings:
        from vitprune.planning import plan as run
        from vitprune.report import print_plan

        print_plan(run(settings), Console())


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id of a pruned checkpoint.")],
    recipe: RecipePath,
    overrides: Overrides = None,
) -> None:
    """Compare a pruned checkpoint with the dense model, on the recipe's data."""
    with _loaded(recipe, overrides) as settings:
        from vitprune.apply import evaluate as run
        from vitprune.report import print_report

        print_report(run(checkpoint, settings), Console())


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    typer.echo(json.dumps(json_schema(), indent=2))


@recipes_app.command("ls")
def list_recipes() -> None:
    """List the recipes that come with vitprune."""
    for name, path in recipes.shipped().items():
        typer.echo(f"{name:24}{recipes.summary(path)}")


@recipes_app.command("cp")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="Name from `vitprune recipes ls`.")],
    destination: Annotated[Path, typer.Argument(metavar="[DEST]", help="Folder to copy it into.")] = Path(),
) -> None:
    """Copy a recipe, and the files it comes with, to a folder. Nothing is overwritten."""
    known = list(recipes.shipped())
    name = name.removesuffix(".yaml")
    if name not in known:
        raise typer.BadParameter(f"no recipe {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")
    try:
        copied = recipes.copy(name, destination)
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
