"""Exported models against torch: the same tokens and answers on real images, how fast, and what int8 adds.

python benchmarks/exported.py CHECKPOINT DATA [--images 256] [--accuracy 1000]

CHECKPOINT: a pruned folder that `vitprune apply` wrote. DATA: as data.path in a recipe; its split `test` is used.
Prints three tables in markdown. Equality: images whose kept patches differ from torch's at any stage are named.
Speed: dense and pruned, float32 and int8 in ONNX Runtime and both in torch, in turn in one run, medians. Quality:
dense, pruned and int8 on the same images.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch

import vitprune

BATCHES = (1, 7, 64)
TIMED = (1, 16)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("data")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--accuracy", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    pruned = vitprune.load(given.checkpoint)
    dense = vitprune.restore_(copy.deepcopy(pruned))
    processor = vitprune.load_processor(given.checkpoint)
    labels: Any = pruned.config.id2label
    spec = vitprune.DataSpec(path=given.data)
    images = vitprune.load_images(spec, vitprune.SplitSpec(split="test"), processor, id2label=labels)
    x = images.sample(given.images, 0).pixels()
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as place:

        def export(model: Any, name: str, **options: Any) -> vitprune.ExportedModel:
            return vitprune.export(model, f"{place}/{name}", processor=processor, **options)

        equal(pruned, export(pruned, "told", tells_patches=True), x)
        graphs = {
            "ONNX Runtime": (export(dense, "dense").model, export(pruned, "pruned").model),
            "ONNX Runtime, int8": (
                export(dense, "dense8", dtype="int8").model,
                export(pruned, "pruned8", dtype="int8").model,
            ),
        }
        speed({**graphs, "torch": (dense, pruned)}, x, given.repeats)
        quality({**graphs, "torch": (dense, pruned)}, dense, images.sample(given.accuracy, 1))


@torch.no_grad()
def equal(pruned: Any, exported: vitprune.ExportedModel, x: torch.Tensor) -> None:
    """Kept patches and answers of the graph against torch's."""
    with vitprune.trace(pruned) as here:
        expected = torch.cat([pruned(part).logits for part in x.split(16)])
    titles = "batch size | images | other kept patches | merged into another patch | largest difference of logits"
    print(f"| {titles} |\n" + "|---" * 5 + "|")
    for size in BATCHES:
        with vitprune.trace(exported.model) as there:
            answers = torch.cat([exported.model(part).logits for part in x.split(size)])
        kept = _named(here.keep_masks, there.keep_masks)
        merged = _named(here.merged_into, there.merged_into)
        print(f"| {size} | {len(x)} | {kept} | {merged} | {(answers - expected).abs().max():.1e} |", flush=True)


def _named(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> str:
    """How many images differ at any stage, and which."""
    differ = torch.stack([(own != other).any(1) for own, other in zip(ours, theirs, strict=True)]).any(0)
    names = ", ".join(map(str, differ.nonzero().flatten().tolist()))
    return f"{int(differ.sum())} ({names})" if names else "0"


@torch.no_grad()
def speed(models: dict[str, tuple[Any, Any]], x: torch.Tensor, repeats: int) -> None:
    """Milliseconds of a batch, and what of the speed-up that MACs allow is real."""
    print(
        "\n| batch size | runtime | dense, ms | pruned, ms | speed-up | MACs allow | efficiency |\n" + "|---" * 7 + "|"
    )
    for size in TIMED:
        timed = x[: max(size, 32)]
        batches = list(timed.split(size))
        with vitprune.trace(models["torch"][1]) as seen:
            for batch in batches:
                models["torch"][1](batch)
        allowed = float(seen.dense_macs.sum() / seen.macs.sum())
        calls: dict[str, Callable[[torch.Tensor], object]] = {}
        for name, pair in models.items():
            calls |= {f"{name} dense": pair[0], f"{name} pruned": pair[1]}
        runners = {name: vitprune.Runner(call, batches) for name, call in calls.items()}
        times, _ = vitprune.time_in_turn(runners, repeats, shortest=3.0 if size == 1 else 0.1)
        for name in models:
            before, after = times[f"{name} dense"].median, times[f"{name} pruned"].median
            gain = before / after
            cells = (
                f"{1e3 * before:.1f} | {1e3 * after:.1f} | {gain:.2f}x | {allowed:.2f}x | {100 * gain / allowed:.0f} %"
            )
            print(f"| {size} | {name} | {cells} |", flush=True)


def quality(models: dict[str, tuple[Any, Any]], dense: Any, images: vitprune.Images) -> None:
    """Top-1 of each, and agreement with the dense model in torch."""
    print("\n| runtime | dense, top-1 | pruned, top-1 | same answer as dense in torch |\n|---|---|---|---|")
    for name, (own, pruned) in models.items():
        found = vitprune.compare(dense, pruned, images, {"batch_size": 16}, progress=False)
        pair = found.metrics["accuracy"]
        before = pair.dense
        if own is not dense:
            with_own = vitprune.compare(own, pruned, images, {"batch_size": 16}, progress=False)
            before = with_own.metrics["accuracy"].dense
        agreement = found.agreement
        assert agreement is not None
        print(f"| {name} | {100 * before:.2f} % | {100 * pair.pruned:.2f} % | {100 * agreement:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
