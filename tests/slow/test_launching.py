"""One recipe under launchers: the same result, one message when something goes wrong, no hang."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from made_up_recipe import RECIPE, write
from ports import free_port
from safetensors.torch import load_file
from tiny import Tolerance
from torch.testing import assert_close

from vitprune.runs.resume import place_of
from vitprune.runtime.signals import TERMINATED, USAGE

TEXT = (
    RECIPE.replace("batch_sizes: [1, 4]", "batch_sizes: []")
    + "finetune: {epochs: 4, batch_size: 8, holdout: 24, checkpoint_every: 2, losses: {task: 1, distillation: 0.5}}\n"
)
# sums of floats in another order, through AdamW
SAME = Tolerance(rtol=1e-5, atol=1e-5)
PATIENCE = 180  # seconds, for what takes twenty
VITPRUNE = [sys.executable, "-m", "vitprune", "apply"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
TWO = ["--", "--num_processes", "2"]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def start(command: list[str], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(command: list[str], **more: str) -> tuple[int, str, str]:
    process = start(command, **more)
    out, error = process.communicate(timeout=PATIENCE)
    return process.returncode, out, error


NOTICE = "Received 15 death signal, shutting down workers"  # which a bar without a line's end used to stand before
PROGRESS = ("calibrating", "comparing", "fine-tuning", "meeting the budget", "timing", "Took ")


def said(error: str) -> list[str]:
    """The lines of an error that are no progress, nor torch's launcher's own notice of a signal."""
    lines = (line.rpartition("\r")[2].strip() for line in error.splitlines())
    return [line for line in lines if line and not line.startswith(PROGRESS) and not line.endswith(NOTICE)]


def result(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    report = json.loads((folder / "out" / "report.json").read_text())
    return load_file(folder / "out" / "model.safetensors"), report["comparison"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("plain")
    code, _, error = run([*VITPRUNE, str(write(folder, TEXT))])
    assert code == 0, error
    return result(folder)


@pytest.mark.parametrize("form", ["own", "accelerate", "accelerate, one", "own, one"])
def test_every_form_gives_the_plain_runs_result(
    tmp_path: Path, plain: tuple[dict[str, torch.Tensor], dict[str, Any]], form: str
) -> None:
    recipe = str(write(tmp_path, TEXT))
    command = {
        "own": [*VITPRUNE, recipe, *TWO],
        "own, one": [*VITPRUNE, recipe, "--", "--num_processes", "1"],
        "accelerate": [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "-m", "vitprune", "apply", recipe],
        "accelerate, one": [*ACCELERATE, "--cpu", "--num_processes", "1", "-m", "vitprune", "apply", recipe],
    }[form]
    code, out, error = run(command)
    assert code == 0, error
    assert out.count("Patches kept") == 1
    weights, comparison = result(tmp_path)
    assert_close(weights, plain[0], **SAME)
    assert comparison.pop("answers") == "single-label"
    assert_close(comparison, {key: value for key, value in plain[1].items() if key != "answers"}, **SAME)
    assert not place_of(tmp_path / "out").exists()


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE
    while not list(place_of(folder / "out").glob(pattern)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.05)


def test_one_of_two_is_killed_and_the_run_goes_on(
    tmp_path: Path, plain: tuple[dict[str, torch.Tensor], dict[str, Any]]
) -> None:
    command = [*VITPRUNE, str(write(tmp_path, TEXT)), *TWO]
    process = start(command)
    wait_for(tmp_path, "step-*[0-9]", process)
    children(process)[1].kill()
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode not in (0, None)
    assert said(error) == [
        "failed: another process of this run ended; the same command resumes from what was kept "
        "(VITPRUNE_DEBUG=1 shows where)"
    ]
    assert run(command)[0] == 0
    assert_close(result(tmp_path)[0], plain[0], **SAME)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_sigterm_passes_through_and_so_does_the_exit_code(tmp_path: Path, processes: str) -> None:
    text = TEXT.replace("epochs: 4", "epochs: 400")
    process = start([*VITPRUNE, str(write(tmp_path, text)), "--", "--num_processes", processes])
    wait_for(tmp_path, "step-*[0-9]", process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == TERMINATED, error
    assert said(error) == ["terminated (SIGTERM); the same command resumes from what was kept"]
    assert not list(place_of(tmp_path / "out").glob("*.unfinished"))


def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    recipe = write(tmp_path, TEXT.replace("[2, 4]", "[2, 99]"))
    code, out, error = run([*VITPRUNE, str(recipe), *TWO])
    assert (code, out) == (USAGE, "")
    assert [line for line in said(error) if "stage 99 is outside the model's 6 blocks" in line] == said(error)


def test_a_batch_that_cannot_be_shared(tmp_path: Path) -> None:
    code, _, error = run([*VITPRUNE, str(write(tmp_path, TEXT)), "--set", "finetune.batch_size=7", *TWO])
    assert code == USAGE
    (line,) = said(error)
    assert "finetune.batch_size: 7 can't be shared evenly by 2 processes; make it a multiple of 2" in line


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def place(rank: int, port: int) -> dict[str, str]:
    """As launchers tell a process its place."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), **address}


def test_a_port_in_use(tmp_path: Path, port: int) -> None:
    code, _, error = run([*VITPRUNE, str(write(tmp_path, TEXT))], **place(0, port))
    assert code == 1
    (line,) = said(error)
    assert "the processes of this run can't form a group" in line
    assert "--main_process_port" in line


def test_processes_with_different_recipes(tmp_path: Path) -> None:
    port = free_port()
    recipe = str(write(tmp_path, TEXT))
    first = start([*VITPRUNE, recipe], **place(0, port))
    second = start([*VITPRUNE, recipe, "--set", "finetune.epochs=2"], **place(1, port))
    errors = [process.communicate(timeout=PATIENCE)[1] for process in (first, second)]
    assert 0 not in (first.returncode, second.returncode)
    (line,) = said(errors[0]) + said(errors[1])
    assert "processes 0 and 1 have different recipes (finetune.epochs: 4.0 and 2.0)" in line
