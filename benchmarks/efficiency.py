"""How much of the speed-up that the MACs allow is real: pruned against dense fused attention (sdpa), interleaved.

    python benchmarks/efficiency.py CHECKPOINT DATA --budgets 0.65 --batch-sizes 16 --dtypes float32 bfloat16

CHECKPOINT: folder or Hub id of a dense classifier. DATA: as `data.path` in a recipe; timed on real test images, as it
depends on the images how many tokens stay. Nothing else should run on the machine.

Beside them runs the dense model *cut*: at each stage all images lose as many of their last tokens as the pruned model
takes from them on average, and nothing is scored, decided, merged or unpacked. What it misses of the MACs' promise no
pruning could win on this machine; *pruned ÷ cut* is what is ours to win. And *attached*: pruned, with thresholds that
keep everything.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.modeling_layers import GradientCheckpointingLayer

from vitprune import (
    DataSpec,
    PruningSpec,
    Runner,
    SplitSpec,
    Trace,
    calibrate,
    describe_environment,
    load,
    load_images,
    load_processor,
    prune_,
    pruning_of,
    time_in_turn,
    trace,
)

POLICIES = {
    "paper, leave": PruningSpec(score="head-weighted-class-attention", before_blocks=[4, 7, 10], dropped="leave"),
    "paper, merge": PruningSpec(score="head-weighted-class-attention", before_blocks=[4, 7, 10], dropped="merge"),
    "redundancy, merge": PruningSpec(before_blocks=[1, 4, 7]),
}
TIMED_BATCHES = 4
VIT_SMALL = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
COLUMNS = (
    "policy | dtype | batch | MACs | dense | pruned | speed-up | efficiency | cut | pruned ÷ cut | attached ÷ dense"
)


def pixels(checkpoint: str, data: str, split: str, count: int, size: int | None = None) -> Tensor:
    """size: in pixels; None: what the checkpoint's processor gives. DINOv2 takes any."""
    images = load_images(
        DataSpec(path=data), SplitSpec(split=split, limit=count), load_processor(checkpoint), id2label=None
    )
    x_BCHW = images.pixels()
    return x_BCHW if size is None else F.interpolate(x_BCHW, (size, size), mode="bicubic", antialias=True)


class Cut(nn.Module):
    """A dense model; before a block only the first so many tokens of each image go on. counts: by block."""

    def __init__(self, dense: PreTrainedModel) -> None:
        super().__init__()
        self.dense = copy.deepcopy(dense)
        self.counts: dict[int, int] = {}
        blocks = [module for module in self.dense.modules() if isinstance(module, GradientCheckpointingLayer)]
        for block, module in enumerate(blocks):
            module.register_forward_pre_hook(partial(self._cut, block))

    def lose_as(self, pruned: PreTrainedModel, seen: Trace) -> None:
        """Images lose as many tokens at each stage as they did on average in what was seen of a pruned model."""
        prefix = pruning_of(pruned).num_prefix_tokens
        kept = [prefix + mask.sum(1).float().mean() for mask in seen.keep_masks]
        self.counts = {block: round(count.item()) for block, count in zip(seen.before_blocks, kept, strict=True)}

    def _cut(self, block: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        count = self.counts.get(block)
        return args if count is None else (args[0][:, :count].contiguous(), *args[1:])

    def forward(self, x_BCHW: Tensor) -> None:
        self.dense(x_BCHW)


@torch.no_grad()
def measure(dense: PreTrainedModel, pruned: PreTrainedModel, batches: Sequence[Tensor], repeats: int) -> str:
    """One line of the table, from `MACs` on."""
    attached, cut = copy.deepcopy(pruned), Cut(dense)
    pruning_of(attached).thresholds.data.fill_(-torch.inf)  # keeps everything
    with trace(pruned) as seen:
        for batch in batches:
            pruned(batch)
    cut.lose_as(pruned, seen)
    models = {"dense": dense, "pruned": pruned, "cut": cut, "attached": attached}
    timings, _ = time_in_turn({name: Runner(model, batches) for name, model in models.items()}, repeats)
    macs = (seen.macs.sum() / seen.dense_macs.sum()).item()
    seconds = {name: timing.median for name, timing in timings.items()}
    faster = {name: seconds["dense"] / s for name, s in seconds.items()}
    return (
        f"{macs:.1%} | {1e3 * seconds['dense']:.1f} ms | {1e3 * seconds['pruned']:.1f} ms | {faster['pruned']:.2f} | "
        f"{macs * faster['pruned']:.2f} | {macs * faster['cut']:.2f} | {seconds['cut'] / seconds['pruned']:.2f} | "
        f"{1 / faster['attached']:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("data")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.65, 0.5])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="run the policies whose name contains this")
    parser.add_argument("--image-size", type=int, help="in pixels; else what the checkpoint's processor gives")
    parser.add_argument("--calibration-images", type=int, default=64)
    parser.add_argument(
        "--vit-small", action="store_true", help="ViT-S/16 with random weights in place of the checkpoint's model"
    )
    args = parser.parse_args()

    calibration = pixels(args.checkpoint, args.data, "train", args.calibration_images, args.image_size)
    timed = pixels(args.checkpoint, args.data, "test", TIMED_BATCHES * max(args.batch_sizes), args.image_size)
    print(f"| {COLUMNS} |\n|{'---|' * (COLUMNS.count('|') + 1)}")
    torch.manual_seed(0)
    model = ViTForImageClassification(VIT_SMALL) if args.vit_small else load(args.checkpoint)
    for dtype in args.dtypes:
        dense = copy.deepcopy(model).to(getattr(torch, dtype)).eval()
        for name, spec in POLICIES.items():
            if args.only not in name:
                continue
            for budget in args.budgets:
                pruned = prune_(copy.deepcopy(dense), spec)
                calibrate(pruned, calibration.to(dense.dtype).split(32), budget, progress=False)
                for batch_size in args.batch_sizes:
                    batches = list(timed[: TIMED_BATCHES * batch_size].to(dense.dtype).split(batch_size))
                    found = measure(dense, pruned, batches, args.repeats)
                    print(f"| {name} | {dtype} | {batch_size} | {found} |", flush=True)
    environment = describe_environment(model)
    print(f"\n{environment.cpu}, {environment.threads} threads, torch {environment.torch}")


if __name__ == "__main__":
    main()
