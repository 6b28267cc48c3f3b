"""Verbs around recipes: their schema, and those that come with vitprune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vitprune.recipe import shipped
from vitprune.recipe.errors import did_you_mean
from vitprune.recipe.schema import json_schema

app = typer.Typer(help="Recipes that come with vitprune.", no_args_is_help=True)


def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    typer.echo(json.dumps(json_schema(), indent=2))


@app.command("ls")
def list_recipes() -> None:
    """List the recipes that come with vitprune."""
    for name, path in shipped.shipped().items():
        typer.echo(f"{name:24}{shipped.summary(path)}")


@app.command("cp")
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
