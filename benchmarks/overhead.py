"""What pruning costs a forward beside its work: a ViT so small that Python takes all the time.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py

Dense, attached (thresholds that keep everything) and pruned before three blocks take turns; medians in microseconds,
and the difference to dense for each of the twelve blocks.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

from vitprune import PruningSpec, Runner, describe_environment, prune_, time_in_turn

BLOCKS, REPEATS = 12, 1500
SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 32,
    "patch_size": 8,
}


def main() -> None:
    warnings.filterwarnings("ignore", "nothing is pruned")  # attached
    torch.manual_seed(0)
    dense = ViTForImageClassification(ViTConfig(**SHAPE, num_hidden_layers=BLOCKS)).eval()
    specs = PruningSpec(before_blocks=[1, 4, 7]), PruningSpec(before_blocks=[1, 4, 7], thresholds=[0.05, 0.05, 0.05])
    attached, pruned = (prune_(copy.deepcopy(dense), spec) for spec in specs)
    models, batches = {"dense": dense, "attached": attached, "pruned": pruned}, [torch.randn(1, 3, 32, 32)]
    with torch.inference_mode():
        timings, _ = time_in_turn({name: Runner(model, batches) for name, model in models.items()}, REPEATS, shortest=0)
    print(describe_environment(dense).cpu)
    for name, timing in timings.items():
        more = 1e6 * (timing.median - timings["dense"].median) / BLOCKS
        print(f"{name}: {1e6 * timing.median:.0f} µs, {more:.0f} a block more than dense")


if __name__ == "__main__":
    main()
