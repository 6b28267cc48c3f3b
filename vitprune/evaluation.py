"""Pruned against dense: how good, how much work, how fast.

Knows how to measure two models on the same images in the same run. Leaves the stopwatch to `timing`, what the
numbers are called to `results`, and showing them to `report`.

Tensor suffixes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from vitprune.answers import Answers
from vitprune.data import Images
from vitprune.metrics import RANKED, RankedMetric, load_metric
from vitprune.recipe import EvaluateSpec
from vitprune.results import Comparison, Distribution, Environment, KeptPatches, Macs, MetricPair, Throughput
from vitprune.timing import PlacedBatches, Runner, placed, time_in_turn, whole_batches
from vitprune.tracing import Trace, eval_mode, trace

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def compare(
    dense: nn.Module, pruned: nn.Module, images: Images, spec: EvaluateSpec, *, progress: bool = True
) -> Comparison:
    """Both models on the same images: metrics (where there are labels), agreement, MACs, kept patches.

    Of models without classes embeddings are compared. The models stay on their device, in their dtype and in the mode
    they are in.

    Raises ValueError where there is no image, or `pruned` isn't pruned.
    """
    dense_answers, pruned_answers = Answers.of(dense), Answers.of(pruned)
    are_logits = dense_answers.are_logits
    tally = _Tally(spec.metrics if images.labelled and are_logits else (), are_logits)
    batches = images.loader(spec.batch_size)
    total = None if images.streamed else len(batches)
    with eval_mode(dense, pruned), torch.no_grad():
        for batch in track(
            batches, "Comparing", total=total, console=Console(stderr=True), transient=True, disable=not progress
        ):
            x_BCHW = batch["pixel_values"]
            before = dense_answers(placed(x_BCHW, dense))
            with trace(pruned) as seen:
                after = pruned_answers(placed(x_BCHW, pruned))
            tally.add(before, after, seen, batch.get("labels"))
    return tally.comparison(images.skipped)


class _Tally:
    """What has been seen so far. Keeps numbers a few per image, not logits: those of ImageNet would fill the memory."""

    def __init__(self, metrics: Sequence[str], are_logits: bool) -> None:
        self.are_logits = are_logits
        self.dense_metrics = {name: load_metric(name) for name in metrics}
        self.pruned_metrics = {name: load_metric(name) for name in metrics}
        self.images, self.agreeing, self.cosines = 0, 0, 0.0
        self.macs: list[Tensor] = []
        self.dense_macs: list[Tensor] = []
        self.stages: list[_StageTally] = []

    def add(self, dense: Tensor, pruned: Tensor, seen: Trace, labels: Tensor | None) -> None:
        self.images += len(dense)
        if self.are_logits:
            self._add_ranked(_ranked(dense), _ranked(pruned), labels)
        else:
            self.cosines += F.cosine_similarity(dense.float(), pruned.float(), dim=-1).sum().item()
        self.macs.append(seen.macs.cpu())
        self.dense_macs.append(seen.dense_macs.cpu())
        self.stages = self.stages or [_StageTally(block) for block in seen.before_blocks]
        for stage, keep_mask in zip(self.stages, seen.keep_masks, strict=True):
            stage.patches = keep_mask.shape[1]
            stage.kept.append(keep_mask.sum(dim=1).cpu())

    def _add_ranked(self, before: Tensor, after: Tensor, labels: Tensor | None) -> None:
        self.agreeing += int((before[:, 0] == after[:, 0]).sum())
        if labels is not None:
            for metrics, ranked in ((self.dense_metrics, before), (self.pruned_metrics, after)):
                for metric in metrics.values():
                    metric.add_batch(predictions=ranked.tolist(), references=labels.tolist())

    def comparison(self, skipped: int) -> Comparison:
        if self.images == 0:
            raise ValueError("data.eval: there is no image to compare the models on")
        dense, pruned = (
            {name: _value(metric, name) for name, metric in metrics.items()}
            for metrics in (self.dense_metrics, self.pruned_metrics)
        )
        return Comparison(
            images=self.images,
            skipped=skipped,
            metrics={name: MetricPair(dense=dense[name], pruned=pruned[name]) for name in dense},
            agreement=self.agreeing / self.images if self.are_logits else None,
            similarity=None if self.are_logits else self.cosines / self.images,
            macs=Macs(dense=float(torch.cat(self.dense_macs).mean()), pruned=_distribution(torch.cat(self.macs))),
            kept=tuple(stage.result() for stage in self.stages),
        )


def _value(metric: RankedMetric, name: str) -> float:
    result = metric.compute()
    assert result is not None  # as it is in the other processes of a distributed metric
    return result[name]


@dataclass
class _StageTally:
    before_block: int
    patches: int = 0
    kept: list[Tensor] = field(default_factory=list)

    def result(self) -> KeptPatches:
        kept = _distribution(torch.cat(self.kept))
        return KeptPatches(before_block=self.before_block, patches=self.patches, kept=kept)


def measure_throughput(
    dense: nn.Module,
    pruned: nn.Module,
    images: Tensor,
    batch_sizes: Sequence[int],
    repeats: int,
    *,
    progress: bool = True,
) -> list[Throughput]:
    """Times both models on the same images, in turn, warmed up; the median of `repeats` counts.

    `images`: pixel values (B, C, H, W) of real images by chance, since how many tokens an image keeps decides how fast
    it is; repeated where a batch size is larger than B.

    Raises ValueError where `pruned` isn't pruned.
    """
    console = Console(stderr=True)
    answers = Answers.of(dense), Answers.of(pruned)
    with eval_mode(dense, pruned), torch.no_grad():
        return [
            _throughput(*answers, whole_batches(images, size), repeats)
            for size in track(batch_sizes, "Timing", console=console, transient=True, disable=not progress)
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
    """Versions and machine, with the device and dtype that `model` has now."""
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
    )


def _cpu_name() -> str:
    """As Linux calls it; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _ranked(logits: Tensor) -> Tensor:
    """(B, 5) ids of the likeliest classes, likeliest first; all where there are fewer."""
    return logits.topk(min(RANKED, logits.shape[-1]), dim=-1).indices.cpu()


def _distribution(values: Tensor) -> Distribution:
    values = values.double()
    quantiles = torch.quantile(values, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    names = ("q05", "q25", "q50", "q75", "q95")
    return Distribution(mean=float(values.mean()), **dict(zip(names, quantiles, strict=True)))
