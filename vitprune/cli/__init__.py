"""The command line: verbs, their words of help, and what a failure looks like.

What needs torch is imported by the verbs that need it, so that help comes at once.
"""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from vitprune import __version__
from vitprune.cli import looking, recipes, runs

app = typer.Typer(
    help="Prune tokens of Vision Transformers to a compute budget, as a recipe says.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (
    runs.apply,
    runs.plan,
    runs.prefetch,
    runs.evaluate,
    runs.export,
    runs.sweep,
    looking.show,
    looking.bench,
    runs.push,
    recipes.schema,
):
    app.command()(verb)
app.add_typer(recipes.app, name="recipes")


def main() -> None:
    """Entry point of the command `vitprune`."""
    warnings.formatwarning = _as_a_line
    app()


def _as_a_line(message: Warning | str, category: type[Warning], *place: object, **more: object) -> str:
    """A warning without the line of code that it comes from, which tells a user nothing."""
    return f"{'note' if category is UserWarning else category.__name__}: {message}\n"


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
