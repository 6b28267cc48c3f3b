"""How much of the speed-up that the MACs allow is real: pruned against dense fused attention (sdpa), interleaved.

    python benchmarks/efficiency.py CHECKPOINT DATA --budget 0.65 --batch-sizes 16 --dtypes float32 bfloat16

CHECKPOINT: folder or Hub id of a dense classifier. DATA: as `data.path` in a recipe; timed on real test images, as it
depends on the images how many tokens stay. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor

from vitprune import PruningSpec, calibrate, load, prune_
from vitprune.checkpoint import load_processor
from vitprune.data import load_images
from vitprune.evaluation import describe_environment, measure_throughput
from vitprune.recipe import DataSpec, SplitSpec

POLICIES = {
    "paper, leave": PruningSpec(score="head-weighted-class-attention", before_blocks=[4, 7, 10], dropped="leave"),
    "paper, merge": PruningSpec(score="head-weighted-class-attention", before_blocks=[4, 7, 10], dropped="merge"),
    "redundancy, every block, merge": PruningSpec(),
}
CALIBRATION_IMAGES = 64
TIMED_BATCHES = 4


def pixels(checkpoint: str, data: str, split: str, count: int) -> Tensor:
    images = load_images(
        DataSpec(path=data), SplitSpec(split=split, limit=count), load_processor(checkpoint), id2label=None
    )
    return images.pixels()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("data")
    parser.add_argument("--budget", type=float, default=0.65)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="run the policies whose name contains this")
    args = parser.parse_args()

    calibration = pixels(args.checkpoint, args.data, "train", CALIBRATION_IMAGES)
    timed = pixels(args.checkpoint, args.data, "test", TIMED_BATCHES * max(args.batch_sizes))
    print("| policy | dtype | batch | dense images/s | pruned images/s | speed-up | MACs allow | efficiency |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in args.dtypes:
        dense = load(args.checkpoint, dtype=getattr(torch, dtype))
        for name, spec in POLICIES.items():
            if args.only not in name:
                continue
            pruned = prune_(copy.deepcopy(dense), spec)
            calibrate(pruned, calibration.to(dense.dtype).split(32), args.budget, progress=False)
            for row in measure_throughput(dense, pruned, timed, args.batch_sizes, args.repeats, progress=False):
                print(
                    f"| {name} | {dtype} | {row.batch_size} | {row.dense_images_per_second:.1f} | "
                    f"{row.pruned_images_per_second:.1f} | {row.speedup:.2f} | {row.ideal_speedup:.2f} | "
                    f"{row.efficiency:.2f} |",
                    flush=True,
                )
    environment = describe_environment(load(args.checkpoint))
    print(f"\n{environment.cpu}, {environment.threads} threads, torch {environment.torch}")


if __name__ == "__main__":
    main()
