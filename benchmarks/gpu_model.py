"""What a GPU should gain, on paper: launches × their time + bytes ÷ bandwidth + operations ÷ rate, dense and pruned.

    python benchmarks/gpu_model.py

Launches are counted on the CPU: operators of torch, and the CUDA door's kernels in Triton's interpreter, for ViT-S/16
with three stages. How long a launch takes on the host, and what an H100 (SXM) does, are named below; so is the part of
its rates that such a model reaches. The host launches while the device works, so a part of a forward takes as long as
the slower of the two; where the host waits, at a stage, both begin anew. tests/contract/test_launches.py holds the
counts down.
"""

from __future__ import annotations

import itertools
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import ViTConfig, ViTForImageClassification

from vitprune import PruningSpec, calibrate, prune_, pruning_of

# seconds on the host: an operator with transformers' Python around it, a launch by Triton, a wait for the device
OPERATOR, LAUNCH, WAIT = 12e-6, 20e-6, 15e-6
# an H100's bytes a second, and operations a second in bfloat16 and in float32, and what part of them is reached
BANDWIDTH, HALF, FULL, REACHED = 3.35e12, 989e12, 67e12, 0.5
PATCHES, BLOCKS, STAGES = 196, 12, (1, 4, 7)
FREE = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "alias")
MODELS = {"ViT-S/16": (384, 6), "ViT-B/16": (768, 12)}


class Count(TorchDispatchMode):
    """Operators that do something on a device; views and allocations don't."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.operators[name] += not is_view and name not in FREE
        return func(*args, **(kwargs or {}))


class Counted(NamedTuple):
    operators: int
    kernels: int


def count(model: ViTForImageClassification) -> Counted:
    """Of a forward of two images; more images launch no more."""
    from vitprune.pruning import kernels  # what a GPU would choose is no public choice
    from vitprune.pruning.kernels import cuda

    launched: Counter[str] = Counter()
    choose, launch = kernels.choose, cuda._launch

    def counting(name: str, *values: Any, **constants: Any) -> None:
        launched[name] += 1
        with _disable_current_modes():
            launch(name, *values, **constants)

    kernels.choose, cuda._launch = lambda _: cuda, counting
    try:
        with torch.no_grad(), Count() as counted:
            model(torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
    finally:
        kernels.choose, cuda._launch = choose, launch
    return Counted(counted.operators.total(), launched.total())


def block_seconds(tokens: float, images: int, width: int) -> float:
    """A block on so many tokens an image, in bfloat16, on the device."""
    rows = tokens * images
    operations = 24 * width**2 * rows + 4 * width * tokens * rows
    # weights; norms, projections, attention, additions and the MLP read and write 38 times the states
    moved = 2 * (12 * width**2 + 38 * width * rows)
    return operations / (HALF * REACHED) + moved / (BANDWIDTH * REACHED)


def stage_seconds(tokens: float, kept: float, images: int, width: int, heads: int) -> float:
    """Similarities in float32; keys and contexts read, states read and written, a metric written and read twice."""
    operations = 2 * (width / heads) * (tokens**2 / 2 + (tokens - kept) * kept) * images
    moved = images * (2 * width * (3 * tokens + kept) + 4 * 3 * (width / heads) * tokens)
    return operations / (FULL * REACHED) + moved / (BANDWIDTH * REACHED)


def segments(kept: list[float] | None, images: int, width: int, heads: int) -> list[float]:
    """Seconds on the device between waits; kept: tokens behind each stage, None for the dense model."""
    found, tokens = [0.0], PATCHES + 1.0
    for block in range(BLOCKS):
        if kept is not None and block in STAGES:
            left = kept[STAGES.index(block)]
            found[-1] += stage_seconds(tokens, left, images, width, heads)
            found.append(0.0)
            tokens = left
        found[-1] += block_seconds(tokens, images, width)
    return found


def total(counted: Counted, on_device: list[float]) -> tuple[float, float]:
    """A forward, and the host's part of it, in seconds; launches are spread over blocks and stages alike."""
    host = (counted.operators * OPERATOR + counted.kernels * LAUNCH) / len(on_device)
    return sum(max(host, part) + WAIT for part in on_device), host * len(on_device)


def macs_ratio(cost: Any, kept: list[float]) -> float:
    """MACs of a forward that keeps so many tokens behind each stage, of the dense model's."""
    tokens = [PATCHES + 1.0, *kept]
    blocks = sum(cost.block(block, tokens[sum(block >= stage for stage in STAGES)]) for block in range(BLOCKS))
    return (blocks + cost.outside(PATCHES)) / cost.dense(PATCHES, 1)


def kept_at(cost: Any, budget: float) -> list[float]:
    """Tokens behind each stage where every stage keeps the same part of its patches."""

    def kept(part: float) -> list[float]:
        return [1 + PATCHES * part ** (stage + 1) for stage in range(len(STAGES))]

    low, high = 0.0, 1.0
    for _ in range(40):
        part = (low + high) / 2
        low, high = (part, high) if macs_ratio(cost, kept(part)) < budget else (low, part)
    return kept(low)


def main() -> None:
    models = {}
    for name, (width, heads) in MODELS.items():
        torch.manual_seed(0)
        config = ViTConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width)
        models[name] = ViTForImageClassification(config).eval()
    small = models["ViT-S/16"]  # the others launch as much
    dense = count(small)
    prune_(small, PruningSpec(before_blocks=STAGES))
    calibrate(small, torch.randn(4, 3, 224, 224).split(2), 0.5, progress=False)
    pruned = count(small)
    print(f"launches: dense {dense.operators}; pruned {pruned.operators} operators and {pruned.kernels} kernels\n")
    print("| model | MACs | batch | dense: host, device, ms | pruned: host, device, ms | speed-up | efficiency |")
    print("|---|---|---|---|---|---|---|")
    for name, (width, heads) in MODELS.items():
        if name != "ViT-S/16":
            prune_(models[name], PruningSpec(before_blocks=STAGES))
        cost = pruning_of(models[name]).cost
        for budget, images in itertools.product((0.65, 0.5), (1, 8, 16, 64, 256)):
            kept = kept_at(cost, budget)
            of_dense, of_pruned = segments(None, images, width, heads), segments(kept, images, width, heads)
            (slow, host), (fast, own_host) = total(dense, of_dense), total(pruned, of_pruned)
            print(
                f"| {name} | {budget:.0%} | {images} | {1e3 * host:.1f}, {1e3 * sum(of_dense):.2f} | "
                f"{1e3 * own_host:.1f}, {1e3 * sum(of_pruned):.2f} | {slow / fast:.2f} | {budget * slow / fast:.2f} |"
            )


if __name__ == "__main__":
    main()
