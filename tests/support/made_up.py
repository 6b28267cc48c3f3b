"""Made-up benchmarks, for tests of what numbers come to."""

from __future__ import annotations

from vitprune.reports.bench_results import Benchmark, Case, Failure, TrainingStep
from vitprune.reports.results import Environment, Timing

MACHINE = Environment(
    vitprune="0.1.0",
    torch="2.13.0",
    transformers="5.23.0",
    python="3.12",
    cpu="A CPU",
    threads=2,
    device="cpu",
    dtype="bfloat16",
)


def timing(seconds: float) -> Timing:
    return Timing(median=seconds, fastest=seconds - 0.001, slowest=seconds + 0.003)


def case(batch_size: int, speedup: float, *, target: float | None = 0.65, ratio: float = 0.65, **setting: str) -> Case:
    dense = 0.1 * batch_size
    return Case(
        image_size=224,
        dtype=setting.get("dtype", "bfloat16"),
        mode=setting.get("mode", "eager"),
        batch_size=batch_size,
        target=target,
        dense=timing(dense),
        attached=timing(dense / 0.8),
        pruned=timing(dense / speedup),
        macs_ratio=ratio,
        dense_peak_memory=3 * 2**20,
        attached_peak_memory=4 * 2**20,
        pruned_peak_memory=2 * 2**20,
    )


def step(target: float | None) -> TrainingStep:
    return TrainingStep(
        image_size=224,
        dtype="bfloat16",
        batch_size=16,
        execution="masked",
        target=target,
        dense=timing(1.0),
        pruned=timing(1.25),
        macs_ratio=0.5,
        dense_peak_memory=2**30,
        pruned_peak_memory=2**31,
    )


def failure() -> Failure:
    return Failure(image_size=896, dtype="float32", batch_size=256, what="inference", reason="no memory [left]")


def benchmark(*cases: Case, **fields: object) -> Benchmark:
    values: dict[str, object] = {
        "environment": MACHINE,
        "checkpoint": "/models/dinov2-small",
        "pruning": {"select": "threshold"},
        "images": "48 images of imagenet, split test",
        "repeats": 7,
        "cases": cases,
        **fields,
    }
    return Benchmark.model_validate(values)
