"""`vitprune apply RECIPE -- LAUNCHER OPTIONS`: the same command under Accelerate's launcher."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from vitprune.runtime.signals import INTERRUPTED, TERMINATED


def launch(command: Sequence[str], options: Sequence[str]) -> int:
    """Run `vitprune *command` under `accelerate launch *options`; return the exit code of what failed first, or 0.

    Raises SystemExit (2) for options that the launcher doesn't know.
    """
    args = launch_command_parser().parse_args([*options, "--module", "vitprune", *command])
    _run_on_cpus(args)
    # DDP's remarks on every process's first step
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # what failed has said so itself, and defaults are what was asked for
    for name in ("torch.distributed.elastic", "accelerate.commands.launch"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with _signals_passed_on():
        try:
            launch_command(args)
        except ChildFailedError as error:
            return _as_shells_do(error.get_first_failure()[1].exitcode)
        except subprocess.CalledProcessError as error:
            return _as_shells_do(error.returncode)
        except SignalException as error:
            return TERMINATED if error.sigval == signal.SIGTERM else INTERRUPTED
        except KeyboardInterrupt:
            return INTERRUPTED
    return 0


def _as_shells_do(code: int) -> int:
    """128 + the signal that killed a process."""
    return code if code >= 0 else 128 - code


def _run_on_cpus(args: Any) -> None:
    """Several processes without a GPU: Accelerate's launcher starts them by MPI alone, torch's own needs none."""
    wants_cpu = args.cpu or not torch.accelerator.is_available()
    chosen = args.config_file or args.mpirun_hostfile or args.use_fsdp or args.use_deepspeed
    if not wants_cpu or chosen or (args.num_processes or 1) < 2:
        return
    args.cpu, args.multi_gpu = False, True
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if args.num_cpu_threads_per_process is None and "OMP_NUM_THREADS" not in os.environ:
        args.num_cpu_threads_per_process = max(1, (psutil.cpu_count(logical=False) or 1) // args.num_processes)


@contextmanager
def _signals_passed_on() -> Iterator[None]:
    """Torch's launcher ends its processes by itself; Accelerate's plain one would leave its own behind."""

    def pass_on(number: int, frame: object) -> None:
        for child in psutil.Process().children():
            child.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
