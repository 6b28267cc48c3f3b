"""The same real images in batches of 1, 7 and 64, shuffled: the same tokens and the same answers."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import Tolerance
from torch.testing import assert_close

import vitprune
from vitprune.budget.calibration import calibrate
from vitprune.data.images import load_images
from vitprune.models.checkpoint import load, load_processor
from vitprune.recipe.schema import DataSpec, PruningSpec, SplitSpec

IMAGES = 64
FLOAT32 = Tolerance(rtol=0.0, atol=1e-4)
POLICIES = {
    "as-vit": PruningSpec(score="head-weighted-class-attention", before_blocks=[4, 7, 10], dropped="leave"),
    "as-vit-merge": PruningSpec(score="head-weighted-class-attention", before_blocks=[4, 7, 10]),
    "redundancy": PruningSpec(),
}


def check(checkpoint: Path, data: Path, spec: PruningSpec) -> None:
    model, processor = load(checkpoint), load_processor(str(checkpoint))
    images = load_images(DataSpec(path=str(data)), SplitSpec(split="test", limit=IMAGES), processor, id2label=None)
    x = torch.cat([batch["pixel_values"] for batch in images.loader(16)])
    vitprune.prune_(model, spec)
    calibrate(model, x[:16].split(16), 0.65, progress=False)
    order = torch.randperm(IMAGES)
    back = order.argsort()
    runs = []
    for size in (1, 7, IMAGES):
        with torch.no_grad(), vitprune.trace(model) as trace:
            logits = torch.cat([model(batch).logits for batch in x[order].split(size)])
        runs.append((logits[back], [mask[back] for mask in trace.keep_masks], trace.macs[back]))
        order = torch.randperm(IMAGES)
        back = order.argsort()
    for logits, keep_masks, macs in runs[1:]:
        assert_close(logits, runs[0][0], **FLOAT32)
        assert all(torch.equal(ours, alone) for ours, alone in zip(keep_masks, runs[0][1], strict=True))
        assert torch.equal(macs, runs[0][2])
