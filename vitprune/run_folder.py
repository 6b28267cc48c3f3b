"""The folder of a run beside its output: what is finished, so that the same command goes on where it was broken off.

Knows files and the fingerprint that guards them. Leaves what the stages are to `apply`, the states of fine-tuning to
`training_state`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from vitprune import processes

T = TypeVar("T")
_FINGERPRINT = "fingerprint.json"
_REPORT = "report.json"
_ABSENT = "nothing"


def place_of(output: Path) -> Path:
    return output.parent / f".{output.name}.run"


def was_saved(output: Path) -> bool:
    """Whether what is at the output is the result of the run that was broken off: only its folder is still there."""
    reports = [place / _REPORT for place in (place_of(output), output)]
    if not all(report.is_file() for report in reports):
        return False
    mine, theirs = (json.loads(report.read_text(encoding="utf-8")).get("created") for report in reports)
    return mine == theirs


@dataclass(frozen=True)
class RunFolder:
    """`.NAME.run` beside the output NAME. Every process has one; the main process alone writes."""

    path: Path

    @classmethod
    def open(cls, output: Path, fingerprint: Callable[[], Mapping[str, Any]], *, restart: bool) -> RunFolder:
        """A new folder, or that of a run which was broken off, if something of it is finished.

        fingerprint: asked of the main process alone.

        Raises ValueError, with the list of differences, if that run had another recipe, data or base checkpoint.
        """
        path = place_of(output)

        def prepare() -> None:
            shutil.rmtree(path.with_suffix(".done"), ignore_errors=True)
            mark = path / _FINGERPRINT
            if mark.is_file() and not restart and any(entry != mark for entry in path.iterdir()):
                _require_same(json.loads(mark.read_text(encoding="utf-8")), fingerprint(), path)
                return
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True, exist_ok=True)
            _write(mark, json.dumps(fingerprint(), indent=1))

        processes.on_main(prepare)
        return cls(path)

    def stage(self, name: str, kind: type[T] | Any, compute: Callable[[], T]) -> T:
        """The result of a stage: found here, or computed, by all processes, and kept. `kind`: its type, for JSON."""
        adapter: TypeAdapter[T] = TypeAdapter(kind)
        place = self.path / f"{name}.json"

        def find() -> list[T]:
            return [adapter.validate_python(json.loads(place.read_text(encoding="utf-8")))] if place.is_file() else []

        for found in processes.on_main(find):
            return found
        result = compute()
        if processes.join().is_main_process:
            _write(place, json.dumps(adapter.dump_python(result, mode="json"), indent=1))
        return result

    def remove(self) -> None:
        """The run is done."""
        if processes.join().is_main_process:
            # half a folder is no run to go on with
            done = self.path.with_suffix(".done")
            self.path.rename(done)
            shutil.rmtree(done)


def _write(place: Path, text: str) -> None:
    unfinished = place.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(place)


def _require_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key, _ABSENT) != now.get(key, _ABSENT)]
    if not keys:
        return
    lines = [f"  {key}: {_shown(before.get(key, _ABSENT))} then, {_shown(now.get(key, _ABSENT))} now" for key in keys]
    raise ValueError(
        "a run was broken off there, which can only go on as it began; different are\n"
        + "\n".join(lines)
        + f"\nTake the changes back, write to another output.path, or begin anew with --restart ({path})"
    )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
