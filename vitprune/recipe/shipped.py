"""The recipes that come with vitprune: where they are and how to take one along."""

from __future__ import annotations

import shutil
import stat
import tempfile
from pathlib import Path

SCHEMA = "recipe.schema.json"
"""The file beside the recipes that their first line points editors at."""


def folder() -> Path:
    """Where the shipped recipes are: inside the installed package, or in the checkout."""
    package = Path(__file__).parents[1]
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped() -> dict[str, Path]:
    """The recipes by name."""
    return {path.stem: path for path in sorted(folder().glob("*.yaml"))}


def summary(path: Path) -> str:
    """What a recipe says it does: its first comment that isn't for the editor."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and "yaml-language-server" not in line:
            return line.removeprefix("# ")
    return ""


def copy(name: str, destination: Path) -> list[Path]:
    """Copy a shipped recipe and the folder of its name, if there is one, into a folder.

    Returns what is new there. Raises FileExistsError before anything is written where something would be replaced, and
    KeyError for a name that is not shipped.
    """
    recipe = shipped()[name]
    if destination.exists() and not destination.is_dir():
        raise FileExistsError(f"{destination} is no folder; name one")
    sources = [path for path in (recipe, recipe.with_suffix("")) if path.exists()]
    for source in sources:
        if (destination / source.name).exists():
            raise FileExistsError(f"{destination / source.name} is already there; name another folder")
    schema = recipe.with_name(SCHEMA)
    if schema.exists() and not (destination / SCHEMA).exists():
        sources.append(schema)
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination) as unfinished:
        for source in sources:
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                copied = shutil.copytree(source, Path(unfinished, source.name), ignore=ignored)
                copied.chmod(copied.stat().st_mode | stat.S_IRWXU)  # a folder that can't be written can't be moved
            else:
                shutil.copyfile(source, Path(unfinished, source.name))
        for source in sources:
            Path(unfinished, source.name).rename(destination / source.name)
    return [destination / source.name for source in sources]
