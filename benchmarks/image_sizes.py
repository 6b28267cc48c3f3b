"""Thresholds that were found at one image size, at others: part of the MACs, and agreement with the dense model.

    python benchmarks/image_sizes.py CHECKPOINT DATA --budget 0.5 --scales 0.5 1 1.5 2 --images 256 --dtype bfloat16

CHECKPOINT: folder or Hub id of a dense classifier that takes other sizes than its own. DATA: as `data.path` in a
recipe, with splits train and test. Images are scaled; thresholds are found at scale 1 and not again. Prints a Markdown
table.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from vitprune import DataSpec, PruningSpec, SplitSpec, calibrate, load, load_images, load_processor, prune_, trace

CALIBRATION_IMAGES = 256
AT_A_TIME = 8


def processor_at(checkpoint: str, scale: float) -> Any:
    """The checkpoint's image processor for sides `scale` times as long."""
    processor: Any = load_processor(checkpoint)
    for name in ("size", "crop_size"):
        sides = getattr(processor, name, None)
        if sides is not None:
            setattr(processor, name, {side: round(pixels * scale) for side, pixels in dict(sides).items() if pixels})
    return processor


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("data")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--before-blocks", type=int, nargs="+", default=[1, 4, 7, 10])
    args = parser.parse_args()

    dtype, data = getattr(torch, args.dtype), DataSpec(path=args.data)
    dense = load(args.checkpoint, dtype=dtype)
    pruned = prune_(load(args.checkpoint, dtype=dtype), PruningSpec(before_blocks=args.before_blocks))
    train = load_images(data, SplitSpec(split="train"), load_processor(args.checkpoint), id2label=None)
    found = train.sample(CALIBRATION_IMAGES, 0).loader(AT_A_TIME)
    calibrate(pruned, [batch["pixel_values"].to(dtype) for batch in found], args.budget, progress=False)
    print("| pixels | patches | MACs | agreement |\n|---|---|---|---|")
    for scale in args.scales:
        split = SplitSpec(split="test", limit=args.images)
        images = load_images(data, split, processor_at(args.checkpoint, scale), id2label=None)
        same, pixels, looked_at = 0, 0, 0
        with trace(pruned) as seen:
            for batch in images.loader(AT_A_TIME):
                x_BCHW = batch["pixel_values"].to(dtype)
                pixels = x_BCHW.shape[-1]
                ours, theirs = (model(pixel_values=x_BCHW).logits.argmax(-1) for model in (pruned, dense))
                same += int((ours == theirs).sum())
                looked_at += len(ours)
        patches = seen.keep_masks[0].shape[1]
        print(f"| {pixels} | {patches} | {seen.ratio:.1%} | {same / looked_at:.3f} |", flush=True)


if __name__ == "__main__":
    main()
