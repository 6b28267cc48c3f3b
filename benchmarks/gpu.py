"""What pruning gains on a GPU: dense, pruned, ToMe, cut, attached; eager, compiled, in one graph; interleaved.

    python benchmarks/gpu.py CHECKPOINT DATA --output OUT [--minutes 5]

CHECKPOINT: a dense classifier; beside it ViT-S/16, ViT-B/16 and ViT-L/16 at 384 px with random weights. DATA: as
`data.path` in a recipe, real images. *cut* and *attached* as in efficiency.py. Writes gpu.json anew after every line,
and at the end gpu.md with the tables that go into docs/results.md; what the time didn't allow is listed there. The most
telling cases come first. Runs on a CPU, too, for whoever changes it: `--models vit-small --batch-sizes 2`.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from efficiency import Cut
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from vitprune import (
    DataSpec,
    PruningSpec,
    Runner,
    SplitSpec,
    calibrate,
    describe_environment,
    export,
    load,
    load_images,
    load_processor,
    prune_,
    pruning_of,
    time_in_turn,
    trace,
)

WIDTHS = {"vit-small": (384, 6, 12, 224), "vit-base": (768, 12, 12, 224), "vit-large-384": (1024, 16, 24, 384)}
STAGES = {12: [1, 4, 7], 24: [2, 8, 14]}
CALIBRATION_IMAGES, TIMED_BATCHES = 64, 3
COLUMNS = {
    "model": "model",
    "dtype": "dtype",
    "mode": "mode",
    "batch": "batch",
    "macs": "MACs",
    "dense_ms": "dense, ms",
    "pruned_ms": "pruned, ms",
    "speed_up": "speed-up",
    "efficiency": "efficiency",
    "pruned_by_cut": "pruned ÷ cut",
    "tome": "ToMe, speed-up",
    "attached": "attached ÷ dense",
}
PARTS = {
    "model": "model",
    "batch": "batch",
    "name": "",
    "wall_ms": "wall, ms",
    "kernels_ms": "kernels, ms",
    "kernels": "kernels",
    "longest": "the longest",
}


Row = dict[str, Any]


def build(name: str, checkpoint: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name not in WIDTHS:
        return load(checkpoint)
    width, heads, blocks, size = WIDTHS[name]
    config = ViTConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=blocks,
        intermediate_size=4 * width,
        image_size=size,
    )
    return ViTForImageClassification(config).eval()


def images_for(model: PreTrainedModel, x_BCHW: Tensor) -> Tensor:
    size: Any = model.config.image_size if isinstance(model, ViTForImageClassification) else x_BCHW.shape[-1]
    return x_BCHW if size == x_BCHW.shape[-1] else F.interpolate(x_BCHW, (size, size), mode="bicubic", antialias=True)


def contestants(dense: PreTrainedModel, images: Tensor, budget: float) -> dict[str, PreTrainedModel | Cut]:
    """All that take turns, but the dense model; the pruned one is first."""
    stages = STAGES[dense.config.num_hidden_layers]
    batches = images.split(16)
    specs = PruningSpec(before_blocks=stages), PruningSpec(before_blocks=stages, select="tome")
    pruned, tome = (prune_(copy.deepcopy(dense), spec) for spec in specs)
    for model in (pruned, tome):
        calibrate(model, batches, budget, progress=False)
    attached, cut = copy.deepcopy(pruned), Cut(dense)
    with torch.no_grad(), trace(pruned) as seen:
        pruning_of(attached).thresholds.fill_(-torch.inf)  # keeps everything
        for batch in batches:
            pruned(batch)
    cut.lose_as(pruned, seen)
    return {"pruned": pruned, "tome": tome, "cut": cut, "attached": attached}


def time_all(models: dict[str, Any], batches: Sequence[Tensor], repeats: int) -> dict[str, float]:
    """Medians in seconds."""
    timings, _ = time_in_turn({name: Runner(model, batches) for name, model in models.items()}, repeats)
    return {name: timing.median for name, timing in timings.items()}


def compiled(model: Any) -> Any:
    """Each block by itself, with dynamic shapes, dense and pruned alike."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module).__name__.endswith("Layer"):
            module.compile(dynamic=True)
    return model


def in_one_graph(model: PreTrainedModel, images: Tensor, kept: Sequence[int] | None = None) -> Any:
    """As torch.export sees it, with CUDA graphs. kept: patches that every image keeps; None for dense."""
    how: dict[str, Any] = {} if kept is None else {"tokens": "fixed", "kept": kept}
    dtype: Any = str(model.dtype)[6:]
    with tempfile.TemporaryDirectory() as folder:
        exported = export(model, Path(folder) / "out", to="pt2", dtype=dtype, image_size=images.shape[-1], **how)
        program = torch.export.load(exported.folder / exported.info.file)
    whole = torch.compile(move_to_device_pass(program, images.device).module(), mode="reduce-overhead")
    return lambda pixel_values: whole(pixel_values=pixel_values)


def graphs_of(models: dict[str, Any], images: Tensor) -> dict[str, Any]:
    """Both in one graph each, of any batch size. Every image keeps what the pruned model's keep on average."""
    with torch.no_grad(), trace(models["pruned"]) as seen:
        models["pruned"](images)
    kept = [round(count) for count in seen.kept_patches.double().mean(0).tolist()]
    return {"dense": in_one_graph(models["dense"], images), "pruned": in_one_graph(models["pruned"], images, kept)}


def line(
    models: dict[str, Any], batches: Sequence[Tensor], repeats: int, make: Callable[[], dict[str, Any]] | None = None
) -> dict[str, float]:
    """make: of what is timed in the models' place."""
    with torch.no_grad():
        with trace(models["pruned"]) as seen:
            for batch in batches:
                models["pruned"](batch)
        seconds = time_all(models if make is None else make(), batches, repeats)
    macs = (seen.macs.sum() / seen.dense_macs.sum()).item()
    faster = {name: seconds["dense"] / own for name, own in seconds.items()}
    found = {
        "macs": macs,
        "dense_ms": 1e3 * seconds["dense"],
        "pruned_ms": 1e3 * seconds["pruned"],
        "speed_up": faster["pruned"],
        "efficiency": macs * faster["pruned"],
    }
    if "cut" in seconds:
        found["pruned_by_cut"] = seconds["cut"] / seconds["pruned"]
        found |= {"tome": faster["tome"], "attached": 1 / faster["attached"]}
    return found


def parts(model: Any, batch: Tensor) -> dict[str, Any]:
    """Time of a forward on the clock and inside kernels, and which took longest."""
    activities = [ProfilerActivity.CUDA if batch.is_cuda else ProfilerActivity.CPU]
    with torch.no_grad():
        for _ in range(3):
            model(batch)
        wait(batch)
        began = time.perf_counter()
        for _ in range(10):
            model(batch)
        wait(batch)
        wall = (time.perf_counter() - began) / 10
        with profile(activities=activities) as profiled:
            model(batch)
            wait(batch)
    everything: list[Any] = list(profiled.key_averages())
    kind = "CUDA" if batch.is_cuda else "CPU"  # not what the host calls
    events = [event for event in everything if event.device_type.name == kind]
    times = {
        event.key: event.self_device_time_total if batch.is_cuda else event.self_cpu_time_total for event in events
    }
    longest = sorted(times, key=times.__getitem__, reverse=True)[:5]
    return {
        "wall_ms": 1e3 * wall,
        "kernels_ms": sum(times.values()) / 1e3,
        "kernels": sum(event.count for event in events),
        "longest": ", ".join(f"{name[:40]} {times[name] / 1e3:.2f}" for name in longest),
    }


def wait(batch: Tensor) -> None:
    if batch.is_cuda:
        torch.cuda.synchronize()


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)

    lines = [" | ".join(cell(row.get(key)) for key in columns) for row in rows]
    return "\n".join(
        f"| {text} |" for text in (" | ".join(columns.values()), " | ".join("---" for _ in columns), *lines)
    )


class Results:
    """What was measured so far, in gpu.json after every line; ends: when the time is over."""

    def __init__(self, output: Path, minutes: float) -> None:
        self.output, self.ends = output, time.monotonic() + 60 * minutes
        self.lines: list[Row] = []
        self.parts: list[Row] = []
        self.left_out: list[str] = []
        output.mkdir(parents=True, exist_ok=True)

    def add(self, to: list[Row], case: Row, measure: Callable[..., Row], *values: Any) -> None:
        name = " ".join(map(str, case.values()))
        if time.monotonic() > self.ends:
            self.left_out.append(name)
            return
        try:
            to.append({**case, **measure(*values)})
            print(to[-1], flush=True)
        except Exception as error:  # a case that a compiler can't do is no reason to lose the others
            self.leave_out(name, error)
        found = {"lines": self.lines, "parts": self.parts, "left out": self.left_out}
        (self.output / "gpu.json").write_text(json.dumps(found, indent=1), encoding="utf-8")

    def leave_out(self, name: str, error: Exception) -> None:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"{name}: {why}", flush=True)
        self.left_out.append(f"{name} ({why})")

    def write(self, where: str) -> None:
        text = f"{where}\n\n{table(self.lines, COLUMNS)}\n\n{table(self.parts, PARTS)}\n"
        text += f"\nNot measured, for want of time where no reason is said: {'; '.join(self.left_out) or 'nothing'}.\n"
        (self.output / "gpu.md").write_text(text, encoding="utf-8")
        print(text)


def measure_eager(
    results: Results, name: str, dense: PreTrainedModel, images: tuple[Tensor, Tensor], args: argparse.Namespace
) -> None:
    """One model in one dtype, and of the first budget where its time goes. images: to calibrate with, to time with."""
    own, timed = images
    half = str(dense.dtype)[6:]
    in_full = dense.dtype == torch.bfloat16
    for budget in args.budgets if in_full else args.budgets[:1]:
        models = {"dense": dense, **contestants(dense, own, budget)}
        for size in args.batch_sizes if in_full else args.batch_sizes[:1]:
            case = {"model": name, "dtype": half, "mode": "eager", "batch": size}
            results.add(results.lines, case, line, models, batches_of(timed, size), args.repeats)
        if in_full and budget == args.budgets[0]:
            size = args.batch_sizes[0]
            for key in ("dense", "pruned"):
                case = {"model": name, "batch": size, "name": key}
                results.add(results.parts, case, parts, models[key], timed[:size])


def measure_compiled(
    results: Results, name: str, dense: PreTrainedModel, images: tuple[Tensor, Tensor], args: argparse.Namespace
) -> None:
    """The same model at the first budget, compiled block by block, and as one graph."""
    own, timed = images
    half, size = str(dense.dtype)[6:], args.batch_sizes[0]
    pair = {"dense": dense, "pruned": contestants(dense, own, args.budgets[0])["pruned"]}
    case = {"model": name, "dtype": half, "mode": "compiled", "batch": size}
    in_blocks = {key: compiled(model) for key, model in pair.items()}
    results.add(results.lines, case, line, in_blocks, batches_of(timed, size), args.repeats)
    graphs = cache(partial(graphs_of, pair, timed[:CALIBRATION_IMAGES]))  # once, and not where time is over
    for size in args.batch_sizes[:3]:
        case = {"model": name, "dtype": half, "mode": "one graph, fixed", "batch": size}
        results.add(results.lines, case, line, pair, batches_of(timed, size), args.repeats, graphs)


def batches_of(images: Tensor, size: int) -> list[Tensor]:
    times = -(-TIMED_BATCHES * size // len(images))
    return list(images.repeat(times, 1, 1, 1).split(size))[:TIMED_BATCHES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("data")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["vit-small", "vit-base", "checkpoint", "vit-large-384"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 1, 8, 256])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.65])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "nothing is pruned")  # attached
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = Results(args.output, args.minutes)
    processor = load_processor(args.checkpoint)
    splits = SplitSpec(split="train", limit=CALIBRATION_IMAGES), SplitSpec(split="test", limit=256)
    data = DataSpec(path=args.data)
    own, timed = (load_images(data, split, processor, id2label=None).pixels() for split in splits)
    half, other = torch.bfloat16, torch.float16
    rounds = ((half, measure_eager), (half, measure_compiled), (other, measure_eager))
    for dtype, measure in rounds:
        for name in args.models:
            case = f"{name} {str(dtype)[6:]}, {measure.__name__.removeprefix('measure_')}"
            if time.monotonic() > results.ends:
                results.left_out.append(case)
                continue
            try:
                dense = build(name, args.checkpoint)
                nn.Module.to(dense, device, dtype)
                known = images_for(dense, own).to(device, dtype), images_for(dense, timed).to(device, dtype)
                measure(results, name, dense, known, args)
            except Exception as error:
                results.leave_out(case, error)
    environment = describe_environment(nn.Linear(1, 1))
    where = torch.cuda.get_device_name() if device.type == "cuda" else environment.cpu
    results.write(f"{where}, torch {environment.torch}, transformers {environment.transformers}")


if __name__ == "__main__":
    main()
