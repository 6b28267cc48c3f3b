"""The folder of a run beside its output: what is finished of an interrupted run, so that the same command resumes it.

Files, and the fingerprint that guards them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import TypeAdapter

from vitprune.models.checkpoint import require_free
from vitprune.reports.results import REPORT_JSON
from vitprune.runtime import distributed
from vitprune.runtime.files import beside, write_text_whole
from vitprune.runtime.lock import OutputLock

T = TypeVar("T")
_FINGERPRINT = "fingerprint.json"
_ABSENT = "nothing"


def place_of(output: Path) -> Path:
    return beside(output, "run")


def require_output(output: Path, *, overwrite: bool) -> None:
    """Raise ValueError where the output of a run may not be written; its own, from before it was interrupted, may."""
    require_free(output, overwrite=overwrite or was_saved(output))


def was_saved(output: Path) -> bool:
    """Whether the interrupted run had saved its result, and only cleaning up is left."""
    reports = [place / REPORT_JSON for place in (place_of(output), output)]
    if not all(report.is_file() for report in reports):
        return False
    mine, theirs = (json.loads(report.read_text(encoding="utf-8")).get("created") for report in reports)
    return mine == theirs


@dataclass(frozen=True)
class RunFolder:
    """`.NAME.run` beside the output NAME. Every process has one; the main process alone writes, and holds the lock."""

    path: Path
    lock: OutputLock

    @classmethod
    def open(cls, output: Path, fingerprint: Callable[[], Mapping[str, Any]], *, restart: bool) -> RunFolder:
        """A new folder, or that of an interrupted run, if something of it is finished.

        fingerprint: asked of the main process alone.

        Raises ValueError, with the list of differences, if that run had another recipe, data or base checkpoint; and if
        it is still under way.
        """
        path, lock = place_of(output), OutputLock(output)

        def prepare() -> None:
            lock.acquire()
            try:
                shutil.rmtree(beside(output, "done"), ignore_errors=True)
                path.mkdir(parents=True, exist_ok=True)
                mark = path / _FINGERPRINT
                others = [entry for entry in path.iterdir() if entry.name != _FINGERPRINT]
                if mark.is_file() and not restart and others:
                    _require_same(json.loads(mark.read_text(encoding="utf-8")), fingerprint(), path)
                    return
                for entry in (mark, *others):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
                write_text_whole(mark, json.dumps(fingerprint(), indent=1))
            except BaseException:
                lock.release()
                raise

        distributed.on_main(prepare)
        return cls(path, lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Another process may go on."""
        self.lock.release()

    def once(self, name: str, kind: type[T] | Any, compute: Callable[[], T]) -> T:
        """A step of a run, done once: its result is found here, or computed by all processes and kept.

        kind: the result's type, for JSON.
        """
        adapter: TypeAdapter[T] = TypeAdapter(kind)
        place = self.path / f"{name}.json"

        def find() -> list[T]:
            return [adapter.validate_python(json.loads(place.read_text(encoding="utf-8")))] if place.is_file() else []

        for found in distributed.on_main(find):
            return found
        result = compute()
        if distributed.init().is_main_process:
            write_text_whole(place, json.dumps(adapter.dump_python(result, mode="json"), indent=1))
        return result

    def remove(self) -> None:
        """The run is done."""
        if distributed.init().is_main_process:
            # half a folder is no run to go on with
            done = self.path.with_name(self.path.name.removesuffix("run") + "done")
            self.path.rename(done)
            shutil.rmtree(done, ignore_errors=True)


def _require_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key, _ABSENT) != now.get(key, _ABSENT)]
    if not keys:
        return
    lines = [f"  {key}: {_shown(before.get(key, _ABSENT))} then, {_shown(now.get(key, _ABSENT))} now" for key in keys]
    raise ValueError(
        "an interrupted run there can only be resumed with the settings that it began with; changed are\n"
        + "\n".join(lines)
        + f"\nTake the changes back, write to another output.path, or begin anew with --restart ({path})"
    )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
