"""An output folder and what lies beside it while it is made: a run's folder, what is half-written, what was there.

A folder that something is mounted on (a volume of a container) can't be renamed and has no room beside it, so all of
that lies inside it, under names that begin with a dot.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

GIB = 2**30
KINDS = ("run", "done", "unfinished", "old", "lock")
"""What may lie beside an output, hidden."""
SIBLINGS = ("last-good", "logs")
"""And what may lie there for people to see."""


def beside(path: Path, kind: str) -> Path:
    """Where something of an output is."""
    assert kind in KINDS
    return path / f".vitprune.{kind}" if os.path.ismount(path) else path.with_name(f".{path.name}.{kind}")


def sibling(path: Path, name: str) -> Path:
    """Where something of an output is that a person looks for: of `SIBLINGS`."""
    assert name in SIBLINGS
    return path / name if os.path.ismount(path) else path.with_name(f"{path.name}.{name}")


def contents(path: Path) -> Iterator[Path]:
    """What lies in an output folder, without what may have been put there in place of beside it."""
    own = {*(f".vitprune.{kind}" for kind in KINDS), *SIBLINGS, "lost+found"} if os.path.ismount(path) else set()
    return (entry for entry in path.iterdir() if entry.name not in own)


def there(path: Path) -> Path:
    """The nearest folder above a path, or itself, that is there, as far as may be seen."""
    return next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))


def require_writable(folder: Path, path: Path | None = None) -> None:
    """Raise ValueError where a folder can't be written, or made. path: what it is needed for, where not for itself."""
    above = there(folder)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        trouble = "may not be written" if above.is_dir() else "is no folder"
        raise ValueError(f"{path or folder}: {above} {trouble}; choose another path")


def require_name_fits(path: Path) -> None:
    """Raise ValueError where a name that will be needed is longer than the file system takes."""
    above = there(path.parent)
    longest = max((beside(path, kind).name for kind in KINDS), key=lambda name: len(os.fsencode(name)))
    limit = os.pathconf(above, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    if (excess := len(os.fsencode(longest)) - limit) > 0:
        raise ValueError(
            f"{path}: its last name is {excess} bytes too long, as a run writes beside it "
            f"({longest[:12]}…{longest[-12:]}); choose a shorter one"
        )


def write_text_whole(path: Path, text: str) -> None:
    """As `write_whole`, of a text in UTF-8."""
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and renames it, so that it is there whole or not at all."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
