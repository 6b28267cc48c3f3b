"""Images a second of pruned against dense, and the machine that it was measured on."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from vitprune.measure.outputs import ImageModel
from vitprune.measure.timing import PlacedBatches, Runner, time_in_turn, whole_batches
from vitprune.models.trace import eval_mode, trace
from vitprune.pruning.kernels import cpu
from vitprune.reports.results import (
    Environment,
    Throughput,
)
from vitprune.runtime.progress import track


def measure_throughput(
    dense: nn.Module,
    pruned: nn.Module,
    images: Tensor,
    batch_sizes: Sequence[int],
    repeats: int,
    *,
    progress: bool = True,
) -> list[Throughput]:
    """Time both models on the same images, in turn, warmed up; the median of `repeats` counts.

    `images`: pixel values (B, C, H, W) of real images by chance, since how many tokens an image keeps decides how fast
    it is; repeated where a batch size is larger than B.

    Raises ValueError where `pruned` isn't pruned.
    """
    answers = ImageModel.of(dense), ImageModel.of(pruned)
    with eval_mode(dense, pruned), torch.no_grad():
        return [
            _throughput(*answers, whole_batches(images, size), repeats)
            for size in track(
                batch_sizes, "timing", total=len(batch_sizes), unit="batch size", steady=True, shown=progress
            )
        ]


def _throughput(dense: nn.Module, pruned: nn.Module, batches: Sequence[Tensor], repeats: int) -> Throughput:
    models = {"dense": dense, "pruned": pruned}
    runners = {name: Runner(model, PlacedBatches(batches, model)) for name, model in models.items()}
    timings, measured = time_in_turn(runners, repeats)
    with trace(pruned) as seen:
        for index in range(measured):
            pruned(runners["pruned"].batches[index])
    return Throughput(
        batch_size=len(batches[0]),
        dense=timings["dense"],
        pruned=timings["pruned"],
        ideal_speedup=float(seen.dense_macs.sum() / seen.macs.sum()),
    )


def describe_environment(model: nn.Module) -> Environment:
    """Describe versions and machine, with the device and dtype that `model` has now."""
    first = next(model.parameters())
    on_cuda = first.device.type == "cuda"
    return Environment(
        vitprune=version("vitprune"),
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
        cpu=_cpu_name(),
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(first.device) if on_cuda else first.device.type,
        dtype=str(first.dtype).removeprefix("torch."),
        numba=version("numba") if cpu.has_loops() else None,
        runtime=getattr(vars(model).get("forward"), "runtime", None),  # of a graph that stands in for torch's
    )


def _cpu_name() -> str:
    """As Linux calls it; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
