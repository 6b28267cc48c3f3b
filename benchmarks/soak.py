"""How much memory a process holds that prunes ever new batches: resident set over many batches of different images.

    python benchmarks/soak.py CHECKPOINT DATA --batches 1000 --batch-size 16 --dtype bfloat16

CHECKPOINT: folder or Hub id of a dense classifier. DATA: as `data.path` in a recipe, with splits train and test. Prints
the resident memory every so many batches, and what it grew by after the first 50.
"""

from __future__ import annotations

import argparse

import psutil
import torch

from vitprune import DataSpec, PruningSpec, SplitSpec, calibrate, load, load_images, load_processor, prune_

WARM_UP = 50
CALIBRATION_IMAGES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("data")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--dense", action="store_true", help="the dense model, for comparison")
    args = parser.parse_args()

    dtype, process = getattr(torch, args.dtype), psutil.Process()
    model, processor = load(args.checkpoint, dtype=dtype), load_processor(args.checkpoint)
    data = DataSpec(path=args.data)
    images = load_images(data, SplitSpec(split="test"), processor, id2label=None)
    if not args.dense:
        train = load_images(data, SplitSpec(split="train", limit=CALIBRATION_IMAGES), processor, id2label=None)
        prune_(model, PruningSpec(before_blocks=[1, 4, 7]))
        calibrate(model, [batch["pixel_values"].to(dtype) for batch in train.loader(16)], args.budget, progress=False)
    first = resident = 0.0
    done = 0
    with torch.inference_mode():
        while done < args.batches:
            for batch in images.loader(args.batch_size):
                model(pixel_values=batch["pixel_values"].to(dtype))
                done += 1
                resident = process.memory_info().rss / 2**20
                if done == WARM_UP:
                    first = resident
                if done in (1, WARM_UP) or done % 100 == 0:
                    print(f"{done} batches: {resident:.0f} MiB", flush=True)
                if done == args.batches:
                    break
    if done > WARM_UP:
        print(f"grew by {resident - first:.0f} MiB after the first {WARM_UP} batches")


if __name__ == "__main__":
    main()
