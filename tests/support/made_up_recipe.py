"""A recipe over made-up images and a tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

import samples

from vitprune.recipe.schema import Recipe, load_recipe

FINETUNE = "finetune: {epochs: 1, batch_size: 8, holdout: 24, learning_rate: 1e-3}\n"
RECIPE = """\
version: 1
model: {checkpoint: checkpoint}
data: {path: data}
pruning: {before_blocks: [2, 4], score: head-weighted-class-attention}
budget: {macs: 60%}
calibration: {images: 24, batch_size: 8}
evaluate: {batch_sizes: [1, 4], repeats: 3, metrics: [accuracy, f1, top-5-accuracy]}
"""


def write(folder: Path, text: str = RECIPE, family: str = "vit") -> Path:
    samples.write_checkpoint(folder / "checkpoint", family)
    samples.write_data(folder / "data")
    path = folder / "recipe.yaml"
    path.write_text(text + f"output: {{path: {folder / 'out'}}}\n")
    return path


def recipe(folder: Path, text: str = RECIPE, family: str = "vit", *overrides: str) -> Recipe:
    return load_recipe(write(folder, text, family), overrides)
