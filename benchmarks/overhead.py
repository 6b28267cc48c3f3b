"""What pruning costs a forward beside its work: a ViT so small that Python takes all the time.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py

Dense, attached (thresholds that keep everything) and pruned before three blocks take turns, forward by forward; the
lower quartiles of each, in microseconds, and the difference to dense for each of the twelve blocks.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

from vitprune import PruningSpec, describe_environment, prune_

BLOCKS, FORWARDS = 12, 1500
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
    models, x_BCHW = {"dense": dense, "attached": attached, "pruned": pruned}, torch.randn(1, 3, 32, 32)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(FORWARDS):
            for name, model in models.items():
                began = time.perf_counter()
                model(pixel_values=x_BCHW)
                seconds[name].append(time.perf_counter() - began)
    found = {name: 1e6 * statistics.quantiles(times, n=4)[0] for name, times in seconds.items()}
    print(describe_environment(dense).cpu)
    for name, microseconds in found.items():
        print(f"{name}: {microseconds:.0f} µs, {(microseconds - found['dense']) / BLOCKS:.0f} a block more than dense")


if __name__ == "__main__":
    main()
