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
from torch.nn import functional as F
from transformers import PreTrainedModel

from vitprune import (
    DataSpec,
    Images,
    PruningSpec,
    SplitSpec,
    calibrate,
    load,
    load_images,
    load_processor,
    prune_,
    trace,
)

PAPER = {"score": "head-weighted-class-attention", "before_blocks": [4, 7, 10]}
FIRST = {"before_blocks": [1, 4, 7]}
DROPPED = ("leave", "merge")
CALIBRATION_IMAGES = 256
BATCH_SIZE = 32


def policies() -> Iterator[tuple[str, PruningSpec]]:
    yield "vitprune's default: redundancy, stages searched, merge", spec()
    for select, dropped in itertools.product(("threshold", "top-k"), DROPPED):
        yield f"redundancy, stages 1 4 7, {select}, {dropped}", spec(**FIRST, select=select, dropped=dropped)
    yield "redundancy, every block, threshold, merge", spec(before_blocks="every")
    for exponent in (0.0, 0.5, 1.0):
        yield f"redundancy, exponent {exponent:g}, stages 1 4 7, merge", spec(**FIRST, redundancy_exponent=exponent)
    yield "ToMe, every block", spec(select="tome")
    for select, dropped in itertools.product(("threshold", "top-k"), DROPPED):
        yield f"class attention, stages 4 7 10, {select}, {dropped}", spec(**PAPER, select=select, dropped=dropped)
    for dropped in DROPPED:
        yield f"random, stages 4 7 10, {dropped}", spec(**PAPER, select="random", dropped=dropped)


def spec(**settings: object) -> PruningSpec:
    return PruningSpec.model_validate(settings, strict=False)


def batches(images: Images, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [(batch["pixel_values"].to(dtype), batch["labels"]) for batch in images.loader(BATCH_SIZE)]


@torch.inference_mode()
def answers(model: PreTrainedModel, images: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Logits (B, C), float32."""
    return torch.cat([model(pixel_values=x).logits.float() for x, _ in images])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(-1) == labels).double().mean().item()


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
        f"dense: top-1 {accuracy(truth, labels):.1%}, {len(labels)} images, {args.dtype}",
        "",
        "| policy | budget | stages before | MACs | top-1 | agreement | KL |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for budget, (name, policy) in itertools.product(args.budgets, policies()):
        if args.only not in name:
            continue
        start = time.perf_counter()
        model = prune_(copy.deepcopy(dense), policy)
        try:
            calibrate(model, calibration, budget, progress=False)
        except ValueError as error:
            print(f"| {name} | {budget:.0%} | can't be met: {error} |", flush=True)
            continue
        with trace(model) as watched:
            got = answers(model, evaluation)
        ratio = (watched.macs / watched.dense_macs).mean()
        top1, agreement = accuracy(got, labels), accuracy(got, truth.argmax(-1))
        kl = F.kl_div(got.log_softmax(-1), truth.log_softmax(-1), log_target=True, reduction="batchmean")
        stages = " ".join(map(str, watched.before_blocks)) if len(watched.before_blocks) < 5 else "every"
        lines.append(
            f"| {name} | {budget:.0%} | {stages} | {ratio:.1%} | {100 * top1:.1f} | {agreement:.3f} | {kl:.4f} |"
        )
        print(lines[-1], f"  ({time.perf_counter() - start:.0f} s)", flush=True)
        if args.output is not None:
            args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
