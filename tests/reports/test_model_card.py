"""What a checkpoint's model card says, and to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from made_up_report import comparison, report

from vitprune.reports.model_card import model_card


def front_matter(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def test_model_card() -> None:
    card = model_card(report(), "me/deit-tiny-60")
    head = front_matter(card)
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "image-classification"
    assert {"vitprune", "token-pruning"} <= set(head["tags"])
    assert head["base_model"] == "facebook/deit-tiny"
    assert head["datasets"] == ["imagenet-1k"]
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.921}]
    assert 'AutoModelForImageClassification.from_pretrained("me/deit-tiny-60")' in card
    assert "| accuracy | 92.40 % | 92.10 % | -0.30 points |" in card


def test_model_card_tells_no_local_paths(tmp_path: Path) -> None:
    recipe = {"model": {"checkpoint": str(tmp_path / "vit")}, "data": {"path": str(tmp_path / "photos")}}
    card = model_card(report(recipe=recipe), "pruned-vit")
    assert str(tmp_path) not in card
    assert "`vit` with token pruning" in card
    assert "images of photos only" in card
    assert not {"base_model", "datasets"} & set(front_matter(card))
    assert "A Vision Transformer with token pruning" in model_card(report(recipe={}), "pruned-vit")


def test_without_labels_it_has_no_accuracy() -> None:
    assert "accuracy" not in model_card(report(comparison=comparison(None)), "x")
