"""Pruned against dense: how good, how much work, how fast.

Knows how to measure two models on the same images in the same run. Leaves the stopwatch to `timing`, what the
numbers are called to `results`, and showing them to `report`.

Tensor suffixes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from vitprune import cpu_stage, processes
from vitprune.answers import Answers, require_same_kind, require_same_width
from vitprune.data import Images
from vitprune.metrics import RANKED, load_metric
from vitprune.recipe import EvaluateSpec
from vitprune.results import Comparison, Distribution, Environment, KeptPatches, Macs, MetricPair, NotFinite, Throughput
from vitprune.timing import PlacedBatches, Runner, placed, time_in_turn, whole_batches
from vitprune.tracing import Trace, eval_mode, pruning_of, trace

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NO_CLASS = -1


def compare(
    dense: nn.Module, pruned: nn.Module, images: Images, spec: EvaluateSpec, *, progress: bool = True
) -> Comparison:
    """Both models on the same images: metrics (where there are labels), agreement, MACs, kept patches.

    Under a launcher each process takes its share of the images; all get the result. Of models without classes
    embeddings are compared. The models stay on their device, in their dtype and in the mode they are in.

    Raises ValueError where there is no image, `pruned` isn't pruned, or isn't made of `dense`, as their answers tell.
    """
    dense_answers, pruned_answers = Answers.of(dense), Answers.of(pruned)
    require_same_kind(pruned_answers, dense_answers)
    state = processes.join()
    own = images.share(state.process_index, state.num_processes)
    batches = own.loader(spec.batch_size)
    total = None if images.streamed else len(batches)
    seen: list[_Seen] = []
    with eval_mode(dense, pruned), torch.no_grad():
        for batch in track(
            batches, "Comparing", total=total, console=Console(stderr=True), transient=True, disable=not progress
        ):
            x_BCHW = batch["pixel_values"]
            before = dense_answers(placed(x_BCHW, dense))
            with trace(pruned) as watched:
                after = pruned_answers(placed(x_BCHW, pruned))
            require_same_width(after, before)
            seen.append(_Seen.of(before, after, watched, batch.get("labels"), are_logits=dense_answers.are_logits))
    everybodys = processes.gathered((seen, own.skipped))
    together = [one for theirs, _ in everybodys for one in theirs]
    if not together:
        raise ValueError("data.eval: there is no image to compare the models on")
    skipped = sum(count for _, count in everybodys)
    return _comparison(_Seen.together(together), pruning_of(pruned).before_blocks, spec.metrics, skipped)


@dataclass(frozen=True)
class _Seen:
    """What was seen of some images. A few numbers each, not logits: those of ImageNet would fill the memory.

    ranked: ids (B, `RANKED`) of the likeliest classes by the dense model and by the pruned one, where there are
    classes; else cosines_B of their embeddings. kept_BS: patches left after each stage, of `patches`.
    """

    macs_B: Tensor
    dense_macs_B: Tensor
    kept_BS: Tensor
    patches: int
    ranked: tuple[Tensor, Tensor] | None
    cosines_B: Tensor | None
    labels_B: Tensor | None
    finite_B: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, dense: Tensor, pruned: Tensor, watched: Trace, labels_B: Tensor | None, *, are_logits: bool) -> _Seen:
        return cls(
            macs_B=watched.macs.cpu(),
            dense_macs_B=watched.dense_macs.cpu(),
            kept_BS=torch.stack([mask.sum(dim=1) for mask in watched.keep_masks], dim=1).cpu(),
            patches=watched.keep_masks[0].shape[1],
            ranked=(_ranked(dense), _ranked(pruned)) if are_logits else None,
            cosines_B=None if are_logits else F.cosine_similarity(dense.float(), pruned.float(), dim=-1).cpu(),
            labels_B=labels_B if are_logits else None,
            finite_B=(_are_finite(dense), _are_finite(pruned)),
        )

    @classmethod
    def together(cls, parts: Sequence[_Seen]) -> _Seen:
        def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
            there = [tensor for tensor in tensors if tensor is not None]
            return torch.cat(there) if there else None

        ranked = [part.ranked for part in parts if part.ranked is not None]
        return cls(
            macs_B=torch.cat([part.macs_B for part in parts]),
            dense_macs_B=torch.cat([part.dense_macs_B for part in parts]),
            kept_BS=torch.cat([part.kept_BS for part in parts]),
            patches=parts[0].patches,
            ranked=(torch.cat([dense for dense, _ in ranked]), torch.cat([own for _, own in ranked]))
            if ranked
            else None,
            cosines_B=joined([part.cosines_B for part in parts]),
            labels_B=joined([part.labels_B for part in parts]),
            finite_B=(
                torch.cat([part.finite_B[0] for part in parts]),
                torch.cat([part.finite_B[1] for part in parts]),
            ),
        )


def _comparison(seen: _Seen, before_blocks: Sequence[int], metrics: Sequence[str], skipped: int) -> Comparison:
    agreement, pairs, finite_B = None, {}, seen.finite_B[0] & seen.finite_B[1]
    if seen.ranked is not None:
        agreement = float(((seen.ranked[0][:, 0] == seen.ranked[1][:, 0]) & finite_B).double().mean())
        if seen.labels_B is not None:
            labels = seen.labels_B.tolist()
            values = [{name: _value(name, ranked.tolist(), labels) for name in metrics} for ranked in seen.ranked]
            pairs = {name: MetricPair(dense=values[0][name], pruned=values[1][name]) for name in metrics}
    return Comparison(
        images=len(seen.macs_B),
        skipped=skipped,
        metrics=pairs,
        agreement=agreement,
        similarity=None if seen.cosines_B is None else float(seen.cosines_B.double().where(finite_B, 0.0).mean()),
        not_finite=NotFinite(dense=int((~seen.finite_B[0]).sum()), pruned=int((~seen.finite_B[1]).sum())),
        macs=Macs(dense=float(seen.dense_macs_B.mean()), pruned=_distribution(seen.macs_B)),
        kept=tuple(
            KeptPatches(before_block=block, patches=seen.patches, kept=_distribution(kept_B))
            for block, kept_B in zip(before_blocks, seen.kept_BS.T, strict=True)
        ),
    )


def _value(name: str, predictions: Sequence[Sequence[int]], references: Sequence[int]) -> float:
    result = load_metric(name).compute(predictions=predictions, references=references)
    assert result is not None  # as it is in the other processes of a distributed metric
    return result[name]


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
        numba=version("numba") if cpu_stage.has_loops() else None,
    )


def _cpu_name() -> str:
    """As Linux calls it; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _ranked(logits: Tensor) -> Tensor:
    """(B, 5) ids of the likeliest classes, likeliest first; all where there are fewer. −1 for answers that are none."""
    ids_BR = logits.topk(min(RANKED, logits.shape[-1]), dim=-1).indices.cpu()
    return ids_BR.masked_fill(~_are_finite(logits)[:, None], NO_CLASS)


def _are_finite(answers: Tensor) -> Tensor:
    """Whether all numbers of an image's answer are, (B,)."""
    return answers.isfinite().flatten(1).all(1).cpu()


def _distribution(values: Tensor) -> Distribution:
    values = values.double()
    quantiles = torch.quantile(values, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    names = ("q05", "q25", "q50", "q75", "q95")
    return Distribution(mean=float(values.mean()), **dict(zip(names, quantiles, strict=True)))
