"""Does a run that is killed at any moment end as if nothing had happened?

    python benchmarks/broken_runs.py RECIPE --runs 20 --set finetune.checkpoint_every=2

Runs the recipe once unbroken. Then, so many times: starts it, kills it (SIGKILL) at a random moment, `--kills` times,
and lets it end. Compares weights and report, but for what a clock tells. With `-- LAUNCHER OPTIONS` at the end, such as
-- --num_processes 2, one process by chance is killed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

CLOCKED = ("created", "throughput", "latency", "environment")


def result(output: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    report = json.loads((output / "report.json").read_text())
    report.pop("recipe")
    return load_file(output / "model.safetensors"), {key: report[key] for key in report if key not in CLOCKED}


def start(recipe: str, output: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    changes = [f"--set={change}" for change in (*options.set, f"output.path={output}", "output.overwrite=false")]
    launcher = ["--", *options.launcher] if options.launcher else []
    command = [sys.executable, "-m", "vitprune", "apply", recipe, *changes, *launcher]
    output.parent.mkdir(parents=True, exist_ok=True)
    with errors_of(output).open("wb") as errors:  # a pipe that nobody reads would stop a long run
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)


def errors_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.stderr")


def finish(recipe: str, output: Path, options: argparse.Namespace) -> None:
    process = start(recipe, output, options)
    if process.wait():
        sys.exit(f"a run failed ({process.returncode}): {errors_of(output).read_text()[-2000:]}")


def kill(process: subprocess.Popen[bytes], *, launched: bool) -> None:
    """The run's process, or one of several by chance; their launcher then ends the others."""
    victims = [process.pid]
    if launched:
        victims = [child.pid for child in psutil.Process(process.pid).children()] or victims
    psutil.Process(random.choice(victims)).send_signal(signal.SIGKILL)
    process.wait()


def is_done(output: Path) -> bool:
    return output.exists() and not output.with_name(f".{output.name}.run").exists()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--output", type=Path, default=Path("runs/broken"))
    arguments, launcher = sys.argv[1:], []
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, launcher = arguments[:cut], arguments[cut + 1 :]
    options = parser.parse_args(arguments, argparse.Namespace(launcher=launcher))
    output = options.output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    began = time.monotonic()
    finish(options.recipe, output / "unbroken", options)
    length = time.monotonic() - began
    weights, report = result(output / "unbroken")
    largest, same = 0.0, 0
    for run in range(options.runs):
        path = output / f"broken-{run}"
        moments: list[float] = []
        while len(moments) < options.kills and not is_done(path):
            process = start(options.recipe, path, options)
            moments.append(random.uniform(0, length))
            try:
                process.wait(moments[-1])
            except subprocess.TimeoutExpired:
                kill(process, launched=bool(options.launcher))
        if not is_done(path):
            finish(options.recipe, path, options)
        own_weights, own_report = result(path)
        difference = max(float((own_weights[name] - weight).abs().max()) for name, weight in weights.items())
        largest = max(largest, difference)
        equal = difference == 0.0 and own_report == report
        same += equal
        killed = ", ".join(f"{moment:.1f} s" for moment in moments)
        print(
            f"run {run}: killed at {killed} of {length:.1f} s; difference {difference:.1e}, equal: {equal}",
            flush=True,
        )
    print(f"{same} of {options.runs} bitwise equal in weights and report; largest difference of a weight {largest:.1e}")


if __name__ == "__main__":
    main()
