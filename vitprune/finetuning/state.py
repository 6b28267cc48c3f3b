"""The full state of a fine-tuning, written beside its place and renamed, the last few kept.

Knows when a state is due and how it is found again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitprune.data.training_batches import Position
from vitprune.recipe.errors import first_line
from vitprune.recipe.schema import FinetuneSpec
from vitprune.recipe.values import seconds
from vitprune.runtime.files import GIB

_BEST = "best.safetensors"


@dataclass(frozen=True)
class Progress:
    """How far a fine-tuning has come: optimizer steps, where its data is, the log of the factor on its thresholds.

    checks: of so many held-out images, so far; first: their losses before training, in groups; held_out_factor: the log
    of theirs, and the ratio's sensitivity to it. best_factor: of the best state, whose weights lie beside; None while
    it is the first.
    """

    steps: int
    position: Position
    log_factor: float = 0.0
    held_out: int = 0
    first: tuple[float, ...] = ()
    checks: tuple[dict[str, Any], ...] = ()
    held_out_factor: float = 0.0
    held_out_sensitivity: float = 0.0
    best_factor: float | None = None


@dataclass
class States:
    """States of one fine-tuning in a folder: every so many steps or seconds, `kept` of them."""

    folder: Path
    steps: int | None
    seconds: float | None
    kept: int
    _saved_at: float = field(default_factory=time.monotonic, init=False)

    @classmethod
    def of(cls, spec: FinetuneSpec, folder: Path) -> States:
        every = spec.checkpoint_every
        if isinstance(every, int):
            return cls(folder, steps=every, seconds=None, kept=spec.checkpoints_kept)
        return cls(folder, steps=None, seconds=seconds(every), kept=spec.checkpoints_kept)

    def is_due(self, step: int) -> bool:
        if self.steps is not None:
            return step % self.steps == 0
        assert self.seconds is not None
        return time.monotonic() - self._saved_at >= self.seconds

    def save(self, accelerator: Accelerator, progress: Progress, best: Mapping[str, Tensor] | None = None) -> None:
        """Called by all processes at once. best: weights of the best state.

        Raises OSError where it can't be written; what was there before still is.
        """
        place = self.folder / f"step-{progress.steps:09d}"
        unfinished = place.with_suffix(".unfinished")
        with self._told(progress, accelerator.is_main_process, unfinished):
            accelerator.save_state(str(unfinished))
            if accelerator.is_main_process:
                if best is not None:
                    save_file({name: weight.contiguous() for name, weight in best.items()}, unfinished / _BEST)
                (unfinished / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                unfinished.rename(place)
                for old in self._complete()[: -self.kept]:
                    shutil.rmtree(old)
            accelerator.wait_for_everyone()
        self._saved_at = time.monotonic()

    def load(self, accelerator: Accelerator) -> tuple[Progress, dict[str, Tensor] | None] | None:
        """Go back to the newest state, in all processes; None where there is none. Also the weights of the best."""
        complete = self._complete()
        if not complete:
            return None
        accelerator.load_state(str(complete[-1]))
        # states are kept between steps; how many parts those have may have changed since
        accelerator.step = 0
        found = json.loads((complete[-1] / "progress.json").read_text(encoding="utf-8"))
        found["position"] = Position(**found["position"])
        for name in ("checks", "first"):
            found[name] = tuple(found[name])
        progress = Progress(**found)
        best = complete[-1] / _BEST
        return progress, load_file(best) if best.is_file() else None

    def newest(self) -> int | None:
        """The step that a run would go on from."""
        complete = self._complete()
        return int(complete[-1].name.removeprefix("step-")) if complete else None

    def _complete(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if not path.suffix)

    @contextmanager
    def _told(self, progress: Progress, mine: bool, unfinished: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            free = shutil.disk_usage(self.folder).free / GIB
            newest = self.newest()
            where = "the beginning" if newest is None else f"step {newest}"
            raise OSError(
                f"the state of step {progress.steps} can't be written to {self.folder}: {first_line(error)} "
                f"({free:.1f} GiB are free there); make room and run the same command again: it resumes from {where}"
            ) from error
        finally:
            if mine:
                shutil.rmtree(unfinished, ignore_errors=True)
