"""Runs recipes for models that give several labels, or numbers: dense, calibrated and fine-tuned.

    python benchmarks/answer_kinds.py CHECKPOINT DATA WORKDIR --images 1200 --size 112

CHECKPOINT: folder or Hub id of a DINOv2 classifier. DATA: a data set of single pictures of classes, as `data.path` in a
recipe, with splits train and test, such as Fashion-MNIST. WORKDIR gets what is made of it: two pictures side by side,
labelled with both classes, and single ones with the part of their pixels that is dark; a head for each task, fitted to
the dense features by least squares; recipes, and what `vitprune apply` makes of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PIL
from torch import Tensor
from torch.nn import functional as F

from vitprune import Recipe, apply, load, load_processor

RECIPE: dict[str, Any] = {
    "version": 1,
    "pruning": {"before_blocks": [2, 5, 8]},
    "budget": {"macs": "60%"},
    "calibration": {"images": 128},
    "evaluate": {"batch_sizes": []},
}
# heads fitted by least squares are steep, and what is dark, or in a picture at all, a crop would change
LOSSES = {"task": 1.0, "distillation": 0.5}
TUNED: dict[str, Any] = {"epochs": 2, "holdout": 200, "learning_rate": 1e-6, "augmentation": "none", "losses": LOSSES}
DARK = 64  # of 255
RIDGE = 1.0
GAIN = 8.0  # what least squares fits to ±1 becomes logits that are as sure
METRICS = {
    "multi-label": ["mean-average-precision", "f1", "label-accuracy"],
    "regression": ["mean-squared-error", "mean-absolute-error", "correlation"],
}


def pairs(rows: Dataset, count: int, seed: int) -> Iterator[tuple[PIL.Image, list[int]]]:
    """Two pictures side by side on a square, and their classes."""
    chosen = np.random.default_rng(seed).integers(0, len(rows), (count, 2))
    for first, second in chosen.tolist():
        left, right = rows[first], rows[second]
        picture = PIL.new("RGB", (56, 56))
        picture.paste(left["image"].convert("RGB"), (0, 14))
        picture.paste(right["image"].convert("RGB"), (28, 14))
        yield picture, sorted({left["label"], right["label"]})


def singles(rows: Dataset, count: int, seed: int) -> Iterator[tuple[PIL.Image, float]]:
    """A picture, and how much of it is dark."""
    for index in np.random.default_rng(seed).permutation(len(rows))[:count].tolist():
        picture = rows[index]["image"].convert("RGB")
        yield picture, float((np.asarray(picture.convert("L")) < DARK).mean())


def write(folder: Path, name: str, samples: Iterator[tuple[PIL.Image, Any]], feature: Any) -> None:
    pictures, labels = zip(*samples, strict=True)
    rows = Dataset.from_dict(
        {"image": list(pictures), "labels": list(labels)}, features=Features({"image": Image(), "labels": feature})
    )
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(str(folder / f"{name}.parquet"))


@torch.no_grad()
def fit_head(checkpoint: str, data: Path, out: Path, task: str, size: int) -> None:
    """A checkpoint whose head says of the dense features what least squares makes of them."""
    model: Any = load(checkpoint)
    processor: Any = load_processor(checkpoint)
    processor.size, processor.crop_size = {"height": size, "width": size}, {"height": size, "width": size}
    rows: Any = datasets.load_dataset("parquet", data_files=str(data / "train.parquet"), split="train")
    seen: list[Tensor] = []
    handle = model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for start in range(0, len(rows), 32):
        model(**processor(rows[start : start + 32]["image"], return_tensors="pt"))
    handle.remove()
    x_ND = F.pad(torch.cat(seen), (0, 1), value=1.0)
    if task == "multi-label":
        outputs = model.config.num_labels
        y_NC = torch.stack([2.0 * F.one_hot(torch.tensor(ids), outputs).amax(0) - 1 for ids in rows["labels"]])
    else:
        outputs, y_NC = 1, torch.tensor(rows["labels"])[:, None]
    w_DC = torch.linalg.solve(x_ND.T @ x_ND + RIDGE * torch.eye(x_ND.shape[1]), x_ND.T @ y_NC)
    if task == "multi-label":
        w_DC = GAIN * w_DC
    head = torch.nn.Linear(x_ND.shape[1] - 1, outputs)
    head.weight.copy_(w_DC[:-1].T)
    head.bias.copy_(w_DC[-1])
    model.classifier = head
    if outputs == 1:
        model.config.num_labels = 1
    model.save_pretrained(out)
    processor.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("data", type=Path)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(METRICS), choices=METRICS)
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--size", type=int, default=112)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    splits: Any = datasets.load_dataset(str(args.data))
    print("| task | fine-tuned | metric | dense | calibrated | pruned | like the dense model | MACs |")
    print("|---|---|---|---|---|---|---|---|")
    for task in args.tasks:
        feature = List(Value("int64")) if task == "multi-label" else Value("float32")
        data, checkpoint = args.workdir / task / "data", args.workdir / task / "dense"
        for seed, (split, count) in enumerate({"train": args.images, "test": args.images // 2}.items()):
            make = pairs if task == "multi-label" else singles
            write(data, split, make(splits[split], count, seed), feature)
        fit_head(args.checkpoint, data, checkpoint, task, args.size)
        settings = {
            **RECIPE,
            "model": {"checkpoint": str(checkpoint), "task": task},
            "data": {"path": str(data)},
            "evaluate": {**RECIPE["evaluate"], "metrics": METRICS[task]},
            "finetune": TUNED,
            "output": {"path": str(args.workdir / task / "pruned"), "overwrite": True},
        }
        report = apply(Recipe.model_validate(settings, strict=False), restart=True)
        result, before = report.comparison, report.calibrated
        assert before is not None
        like = f"{result.agreement:.4f}" if result.correlation is None else f"r {result.correlation:.4f}"
        kept = report.training is not None and report.training.kept_step
        for name, pair in result.metrics.items():
            values = f"{pair.dense:.4g} | {before.metrics[name].pruned:.4g} | {pair.pruned:.4g}"
            print(f"| {task} | kept step {kept} | {name} | {values} | {like} | {result.macs.ratio:.1%} |")


if __name__ == "__main__":
    main()
