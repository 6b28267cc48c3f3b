"""What a killed run leaves behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from made_up_recipe import FINETUNE, RECIPE, write

import vitprune
from vitprune.models.module import is_pruned


def test_a_killed_run_leaves_a_whole_checkpoint_or_none(tmp_path: Path) -> None:
    """SIGKILL at moments between the start of training and after the end of saving."""
    path = write(tmp_path, RECIPE + FINETUNE)
    command = [sys.executable, "-m", "vitprune", "apply", str(path), "--set", "evaluate.batch_sizes=[]"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    subprocess.run(command, check=True, env=environment, capture_output=True)
    whole = {file.name for file in (tmp_path / "out").iterdir()}
    duration = time.monotonic() - started
    chance = random.Random(0)
    for _ in range(3):
        # replacing what is there has the most ways to go wrong
        process = subprocess.Popen(
            [*command, "--set", "output.overwrite=true"], env=environment, stdout=-3, stderr=-3, start_new_session=True
        )
        time.sleep(duration * chance.uniform(0.5, 1.0))
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()
        assert {file.name for file in (tmp_path / "out").iterdir()} == whole
        assert is_pruned(vitprune.load(tmp_path / "out"))
