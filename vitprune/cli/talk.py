"""What verbs share: the recipe they are given, what a failure looks like, and how much they say."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from vitprune.bench.settings import read_part
from vitprune.recipe.schema import Recipe, RecipeError, load_recipe, locate
from vitprune.runtime.signals import FAILED, INTERRUPTED, TERMINATED, USAGE, Terminated

if TYPE_CHECKING:
    from vitprune.reports.results import Document

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file, such as recipes/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe, such as finetune.epochs=1."),
]


@contextmanager
def loaded(path: Path, overrides: Sequence[str] | None) -> Iterator[Recipe]:
    """The recipe, and clear messages."""
    with clear_messages(lambda error: locate(error, path, overrides or ())):
        yield load_recipe(path, overrides or ())


@contextmanager
def clear_messages(located: Callable[[RecipeError], RecipeError]) -> Iterator[None]:
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
    text = str(error)
    if "DataLoader worker (pid" in text:  # which torch raises wherever the main process is just then
        is_shared = "shared memory" in text
        lacking = "shared memory (in a container: --shm-size)" if is_shared else "memory"
        return (
            f"a process that loads images was killed, most often for want of {lacking}; lower data.workers, or free "
            "some, and run the same command again: it resumes from what was kept"
        )
    if "in DataLoader worker process" in text:  # behind a traceback of that process, as text
        name = type(error).__name__
        text = re.split(rf"^(?:\w+\.)*{name}: ", text, flags=re.MULTILINE)[-1].strip()
    return text or type(error).__name__


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
class Talk:
    """How much a command says: tables and progress, JSON for scripts, or nothing but errors and warnings."""

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


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors and warnings.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, to stdout.")]


def read_macs(text: str) -> float:
    try:
        return read_part(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
