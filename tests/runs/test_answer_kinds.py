"""Recipes for models that give several labels an image, or numbers: from beginning to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, Features, Image, List, Value
from made_up_recipe import FINETUNE
from PIL import Image as PIL
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import vitprune
from vitprune.models.module import is_pruned
from vitprune.recipe.schema import Recipe, RecipeError, load_recipe
from vitprune.reports.run_report import findings
from vitprune.runs.apply import apply
from vitprune.runs.evaluate import evaluate
from vitprune.runs.plan import plan

RECIPE = """\
version: 1
model: {checkpoint: checkpoint}
data: {path: data}
pruning: {before_blocks: [2, 4], score: head-weighted-class-attention}
budget: {macs: 70%}
calibration: {images: 16, batch_size: 8}
evaluate: {batch_sizes: []}
"""


def write(folder: Path, problem_type: Any, outputs: int, labels: Any, feature: Any, text: str = RECIPE) -> Recipe:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**{**tiny.MLP, "num_labels": outputs}))
    model.config.problem_type = problem_type
    model.save_pretrained(folder / "checkpoint")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "checkpoint")
    rng, data = np.random.default_rng(0), folder / "data"
    data.mkdir()
    for split, count in {"train": 40, "test": 20}.items():
        noise = rng.integers(0, 255, (count, 32, 32, 3)).astype("uint8")
        columns = {"image": list(map(PIL.fromarray, noise)), "labels": [labels(i) for i in range(count)]}
        rows = Dataset.from_dict(columns, features=Features({"image": Image(), "labels": feature}))
        rows.to_parquet(str(data / f"{split}.parquet"))
    (folder / "recipe.yaml").write_text(text + f"output: {{path: {folder / 'out'}}}\n")
    return load_recipe(folder / "recipe.yaml")


@pytest.mark.parametrize("finetune", ["", FINETUNE.replace("24", "8")], ids=["calibrated", "fine-tuned"])
def test_several_labels_an_image(tmp_path: Path, finetune: str) -> None:
    several = write(
        tmp_path,
        "multi_label_classification",
        5,
        lambda i: [i % 5, (i + 2) % 5],
        List(Value("int64")),
        RECIPE + finetune,
    )
    report = apply(several)
    result = report.comparison
    assert result.answers == "multi-label"
    assert set(result.metrics) == {"mean-average-precision"}
    assert result.agreement is not None
    assert 0.3 < result.agreement < 1
    assert result.similarity is result.correlation is None
    assert any("labels as the dense model does for" in sentence for sentence in findings(report))
    back = vitprune.load(tmp_path / "out")
    assert is_pruned(back)
    assert back.config.problem_type == "multi_label_classification"
    assert (
        evaluate(
            str(tmp_path / "out"), load_recipe(tmp_path / "out" / "recipe.yaml"), tmp_path / "evaluated"
        ).comparison
        == result
    )


@pytest.mark.parametrize("finetune", ["", FINETUNE.replace("24", "8")], ids=["calibrated", "fine-tuned"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_numbers(tmp_path: Path, finetune: str, outputs: int) -> None:
    number = (lambda i: i / 10) if outputs == 1 else (lambda i: [i / 10, 1.0, -i])
    feature = Value("float32") if outputs == 1 else List(Value("float32"))
    numbers = write(tmp_path, None if outputs == 1 else "regression", outputs, number, feature, RECIPE + finetune)
    report = apply(numbers)
    result = report.comparison
    assert result.answers == "regression"
    assert set(result.metrics) == {"mean-squared-error"}
    assert not result.metrics["mean-squared-error"].is_fraction
    assert result.agreement is result.similarity is None
    assert result.correlation is not None
    assert result.deviation is not None
    assert result.correlation < 1
    assert result.deviation > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "have a correlation of" in card
    assert "100.0 %" not in card.split("## Results")[1].split("MACs")[0]
    assert (
        evaluate(
            str(tmp_path / "out"), load_recipe(tmp_path / "out" / "recipe.yaml"), tmp_path / "evaluated"
        ).comparison
        == result
    )


def test_a_recipe_may_name_the_task(tmp_path: Path) -> None:
    apply(
        write(
            tmp_path,
            None,
            5,
            lambda i: [i % 5],
            List(Value("int64")),
            RECIPE.replace("checkpoint}", "checkpoint, task: multi-label}"),
        )
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["problem_type"] == "multi_label_classification"


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["model.task=regression", "evaluate.metrics=[accuracy]"],
            "'accuracy' doesn't fit a model whose task is regression",
        ),
        (["data.label_column=labels"], "several labels an image needs model.task: multi-label"),
    ],
)
def test_what_does_not_fit_is_known_before_the_run(tmp_path: Path, overrides: list[str], text: str) -> None:
    write(tmp_path, None, 5, lambda i: [i % 5, 1, 2, 0, 0], List(Value("int64")))
    asked = load_recipe(tmp_path / "recipe.yaml", overrides)
    with pytest.raises((RecipeError, ValueError), match=text):
        apply(asked)
    with pytest.raises((RecipeError, ValueError), match=text):
        plan(asked)
    assert not (tmp_path / "out").exists()
