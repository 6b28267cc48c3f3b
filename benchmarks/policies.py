"""Compares pruning policies on one checkpoint without any training: score × select × dropped, calibrated to budgets.

    python benchmarks/policies.py CHECKPOINT DATA --budgets 0.65 0.5 --images 1000 --dtype bfloat16 --output FILE.md

CHECKPOINT: folder or Hub id of a dense classifier. DATA: as `data.path` in a recipe, with splits train and test.
Writes a Markdown table of top-1 and agreement with the dense model, row after row, so that a broken run keeps its rows.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitprune import PruningSpec, calibrate, load, prune_, trace
from vitprune.checkpoint import load_processor
from vitprune.data import Images, load_images
from vitprune.recipe import DataSpec, SplitSpec

PAPER = {"score": "head-weighted-class-attention", "before_blocks": [4, 7, 10]}
DROPPED = ("leave", "fuse", "merge")
CALIBRATION_IMAGES = 256
BATCH_SIZE = 32


def policies() -> Iterator[tuple[str, PruningSpec]]:
    for select, dropped in itertools.product(("threshold", "top-k"), DROPPED):
        yield f"class attention, stages 4 7 10, {select}, {dropped}", spec(**PAPER, select=select, dropped=dropped)
    for dropped in DROPPED:
        yield f"random, stages 4 7 10, {dropped}", spec(**PAPER, select="random", dropped=dropped)
    for select, dropped in itertools.product(("threshold", "top-k"), DROPPED):
        yield f"redundancy · S^½, every block, {select}, {dropped}", spec(select=select, dropped=dropped)
    yield "redundancy, every block, threshold, merge", spec(redundancy_exponent=0.0)
    yield "ToMe, every block", spec(select="tome")


def spec(**settings: object) -> PruningSpec:
    return PruningSpec.model_validate(settings, strict=False)


def batches(images: Images, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [(batch["pixel_values"].to(dtype), batch["labels"]) for batch in images.loader(BATCH_SIZE)]


@torch.inference_mode()
def answers(model: PreTrainedModel, images: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([model(pixel_values=x).logits.argmax(-1) for x, _ in images])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("data")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.65, 0.5])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", default="", help="run the policies whose name contains this")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    dense, processor = load(args.checkpoint, dtype=dtype), load_processor(args.checkpoint)
    data, names = DataSpec(path=args.data), {int(i): name for i, name in (dense.config.id2label or {}).items()}
    train = load_images(data, SplitSpec(split="train", limit=CALIBRATION_IMAGES), processor, id2label=names)
    test = load_images(data, SplitSpec(split="test", limit=args.images), processor, id2label=names)
    calibration, evaluation = [x for x, _ in batches(train, dtype)], batches(test, dtype)
    labels = torch.cat([y for _, y in evaluation])
    truth = answers(dense, evaluation)
    lines = [
        f"dense: top-1 {(truth == labels).double().mean():.1%}, {len(labels)} images, {args.dtype}",
        "",
        "| policy | budget | MACs | top-1 | agreement |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for budget, (name, policy) in itertools.product(args.budgets, policies()):
        if args.only not in name:
            continue
        start = time.perf_counter()
        model = prune_(copy.deepcopy(dense), policy)
        calibrate(model, calibration, budget, progress=False)
        with trace(model) as watched:
            got = answers(model, evaluation)
        ratio = (watched.macs / watched.dense_macs).mean()
        top1, agreement = (got == labels).double().mean(), (got == truth).double().mean()
        lines.append(f"| {name} | {budget:.0%} | {ratio:.1%} | {100 * top1:.1f} | {agreement:.3f} |")
        print(lines[-1], f"  ({time.perf_counter() - start:.0f} s)", flush=True)
        if args.output is not None:
            args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
