"""Interrupted runs, and what becomes of them: killed, terminated, a full disk, another recipe."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from made_up_recipe import RECIPE, write
from safetensors.torch import load_file
from tiny import Tolerance
from torch.testing import assert_close

from vitprune.finetuning.loop import Loop
from vitprune.finetuning.state import States
from vitprune.finetuning.step import TrainStep
from vitprune.recipe.schema import Recipe, load_recipe
from vitprune.runs import apply as steps
from vitprune.runs import evaluate as evaluation
from vitprune.runs.apply import apply
from vitprune.runs.resume import place_of
from vitprune.runtime import signals
from vitprune.runtime.signals import TERMINATED

FINETUNE = """\
finetune: {epochs: 4, batch_size: 8, holdout: 24, learning_rate: 1e-3, checkpoint_every: 2, checkpoints_kept: 2,
  losses: {task: 1, distillation: 0.5}}
seed: 3
"""
TEXT = RECIPE.replace("batch_sizes: [1, 4]", "batch_sizes: []") + FINETUNE
EXACT = Tolerance(rtol=0.0, atol=0.0)
# sums of floats in another order, through AdamW at 50 times the usual learning rate
REORDERED = Tolerance(rtol=1e-3, atol=1e-3)
PATIENCE = 120  # seconds, for what takes ten


def recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(write(folder, TEXT), overrides)


def result(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights, and the report but for what a clock tells."""
    report = json.loads((folder / "out" / "report.json").read_text())
    return load_file(folder / "out" / "model.safetensors"), {
        key: report[key] for key in ("comparison", "calibrated", "training", "budget")
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("unbroken")
    apply(recipe(folder))
    assert not place_of(folder / "out").exists()
    return result(folder)


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in place_of(folder / "out").glob("step*"))


class Broken(BaseException):
    """As abrupt as can be inside a process."""


def break_off(asked: Recipe, owner: Any, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
    """Runs the recipe until what is named has done its work on arguments that `when` says yes to."""
    original = getattr(owner, name)

    def broken(*args: Any, **options: Any) -> Any:
        done = original(*args, **options)
        if when(*args):
            raise Broken
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, broken)
        with pytest.raises(Broken):
            apply(asked)


@pytest.mark.parametrize(
    ("owner", "name", "when"),
    [
        (steps, "calibrate", lambda *_: True),
        (Loop, "_next_record", lambda loop: loop.step == 1),
        (Loop, "_next_record", lambda loop: loop.step == 7),
        (Accelerator, "save_state", lambda accelerator, path: "000000006" in path),
        (steps, "scale_to_budget", lambda *_: True),
        (evaluation, "compare_closely", lambda *_: True),
        (steps, "model_card", lambda *_: True),
        (steps, "save", lambda *_: True),
    ],
)
def test_a_broken_run_ends_as_an_unbroken_one(
    tmp_path: Path,
    unbroken: tuple[dict[str, torch.Tensor], dict[str, Any]],
    owner: Any,
    name: str,
    when: Callable[..., bool],
) -> None:
    asked = recipe(tmp_path)
    break_off(asked, owner, name, when)
    assert place_of(tmp_path / "out").is_dir()
    torch.manual_seed(1234)  # another process has other random numbers
    apply(asked)
    weights, report = result(tmp_path)
    assert_close(weights, unbroken[0], **EXACT)
    assert report == unbroken[1]
    assert not place_of(tmp_path / "out").exists()


def test_the_best_state_outlasts_a_break(tmp_path: Path) -> None:
    # ever faster, until it is too fast
    rising = ("finetune.learning_rate=0.5", "finetune.warmup=0.99", "finetune.checks=6")
    whole = apply(recipe(tmp_path / "unbroken", *rising)).training
    assert whole is not None
    assert 0 < whole.kept_step < 12
    asked = recipe(tmp_path / "broken", *rising)
    break_off(asked, Loop, "_next_record", lambda loop: loop.step == 11)
    assert apply(asked).training == whole
    expected, found = result(tmp_path / "unbroken"), result(tmp_path / "broken")
    assert_close(found[0], expected[0], **EXACT)
    assert found[1] == expected[1]


@pytest.mark.parametrize(
    ("owner", "name", "when"),
    [
        (steps, "scale_to_budget", lambda *_: True),
        (evaluation, "compare_closely", lambda *_: True),
        (Loop, "_next_record", lambda loop: loop.step == 7),
    ],
)
def test_a_broken_run_at_several_budgets(tmp_path: Path, owner: Any, name: str, when: Callable[..., bool]) -> None:
    """What is compared before training has levels of another budget than training begins with."""
    several = "budget.macs=[80%, 60%, 45%]"
    apply(recipe(tmp_path / "unbroken", several))
    asked = recipe(tmp_path / "broken", several)
    break_off(asked, owner, name, when)
    apply(asked)
    expected, found = result(tmp_path / "unbroken"), result(tmp_path / "broken")
    assert_close(found[0], expected[0], **EXACT)
    assert found[1] == expected[1]


def test_a_stream_goes_on_in_mid_epoch(tmp_path: Path) -> None:
    streamed = ("data.streaming=true", "finetune.steps=7")
    apply(recipe(tmp_path / "unbroken", *streamed))
    asked = recipe(tmp_path / "broken", *streamed)
    break_off(asked, Loop, "_next_record", lambda loop: loop.step == 5)
    apply(asked)
    expected_weights, expected_report = result(tmp_path / "unbroken")
    weights, report = result(tmp_path / "broken")
    assert_close(weights, expected_weights, **EXACT)
    assert report == expected_report


def test_a_stream_needs_a_number_of_steps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"finetune\.steps: needed with data\.streaming"):
        apply(recipe(tmp_path, "data.streaming=true"))


def test_finished_stages_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(tmp_path)
    break_off(asked, steps, "scale_to_budget")
    monkeypatch.setattr(steps, "calibrate", lambda *_, **__: pytest.fail("was done already"))
    monkeypatch.setattr(Loop, "_next_record", lambda _: pytest.fail("was done already"))
    apply(asked)


def test_the_last_states_are_kept(tmp_path: Path) -> None:
    break_off(recipe(tmp_path), steps, "scale_to_budget")
    assert states(tmp_path) == ["step-000000010", "step-000000012"]


def test_another_recipe_is_refused_with_what_differs_and_restart_begins_anew(tmp_path: Path) -> None:
    break_off(recipe(tmp_path), steps, "scale_to_budget")
    changed = recipe(tmp_path, "finetune.learning_rate=1e-4", "seed=4")
    with pytest.raises(
        ValueError, match=r"(?s)finetune\.learning_rate: 0\.001 then, 0\.0001 now.*seed: 3 then, 4 now.*--restart"
    ):
        apply(changed)
    assert apply(changed, restart=True).recipe["seed"] == 4


def test_other_weights_or_images_are_refused(tmp_path: Path) -> None:
    break_off(recipe(tmp_path), Loop, "_next_record", lambda loop: loop.step == 1)
    asked = recipe(tmp_path, "data.train.limit=40")
    with pytest.raises(ValueError, match=r"(?s)data\.train\.limit: null then, 40 now.*images \(train\)"):
        apply(asked)


def test_of_a_run_that_finished_nothing_anything_may_change(tmp_path: Path) -> None:
    break_off(recipe(tmp_path), steps, "calibrate")
    assert apply(recipe(tmp_path, "seed=4")).recipe["seed"] == 4


def test_how_often_states_are_kept_may_change(tmp_path: Path) -> None:
    break_off(recipe(tmp_path), Loop, "_next_record", lambda loop: loop.step == 5)
    # written anew the images would be others
    overrides = ("finetune.checkpoint_every=2h", "finetune.checkpoints_kept=1")
    apply(load_recipe(tmp_path / "recipe.yaml", overrides))


def test_a_step_may_be_cut_in_smaller_batches(
    tmp_path: Path, unbroken: tuple[dict[str, torch.Tensor], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the message on memory that ran out advises."""
    asked = recipe(tmp_path, "finetune.checkpoint_every=5")  # an odd number of batches before
    original = TrainStep.__call__

    def update(self: TrainStep, parts: Any, step: int) -> Any:
        if step == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, parts, step)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", update)
        with pytest.raises(RuntimeError, match="memory ran out") as raised:
            apply(asked)
    assert "at step 6, in batches of 8" in str(raised.value)
    advice = re.findall(r"finetune\.(?:batch_size|gradient_accumulation_steps)=\d+", str(raised.value))
    assert advice == ["finetune.batch_size=4", "finetune.gradient_accumulation_steps=2"]
    assert states(tmp_path) == ["step-000000005"]
    apply(load_recipe(tmp_path / "recipe.yaml", advice))
    assert_close(result(tmp_path)[0], unbroken[0], **REORDERED)


def test_sigterm_keeps_the_state_and_has_an_exit_code_of_its_own(
    tmp_path: Path, unbroken: tuple[dict[str, torch.Tensor], dict[str, Any]]
) -> None:
    path = write(tmp_path, TEXT)
    command = [sys.executable, "-m", "vitprune", "apply", str(path), "--set", "finetune.checkpoint_every=1h"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    seen = ""
    while "steps, looking at held-out images" not in seen:  # in the midst of fine-tuning
        seen += process.stderr.read(1)
        assert process.poll() is None, seen
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == TERMINATED, seen + error
    assert "terminated (SIGTERM); the same command resumes" in error
    assert "Traceback" not in error
    assert len(list(place_of(tmp_path / "out").glob("step-*"))) == 1
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    weights, report = result(tmp_path)
    assert_close(weights, unbroken[0], **EXACT)
    assert report == unbroken[1]


def test_sigterm_elsewhere_ends_at_once() -> None:
    with signals.watch(), pytest.raises(signals.Terminated):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_full_disk_leaves_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Accelerator.save_state

    def full(self: Accelerator, path: str, **options: Any) -> object:
        if "000000006" not in path:
            return original(self, path, **options)
        Path(path).mkdir()
        (Path(path) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    asked = recipe(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(Accelerator, "save_state", full)
        with pytest.raises(OSError, match=r"step 6 can't be written.*No space left.*resumes from step 4"):
            apply(asked)
    assert states(tmp_path) == ["step-000000002", "step-000000004"]
    apply(asked)


def test_a_state_is_due_by_steps_or_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_steps = States(tmp_path, steps=3, seconds=None, kept=1)
    assert [step for step in range(1, 8) if by_steps.is_due(step)] == [3, 6]
    by_time = States(tmp_path, steps=None, seconds=60.0, kept=1)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 59)
    assert not by_time.is_due(1)
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert by_time.is_due(2)
