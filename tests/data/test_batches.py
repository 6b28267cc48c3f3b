"""Images as callers have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import samples
import tiny
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel, ViTImageProcessorPil

import vitprune
from vitprune.data.batches import each, named, without_labels

X = tiny.images(12)
LABELS = torch.arange(12) % 5
FORMS: dict[str, Any] = {
    "a tensor": lambda: X,
    "tensors": lambda: [X[:8], X[8:]],
    "dicts": lambda: [{"pixel_values": X[:8], "labels": LABELS[:8]}, {"pixel_values": X[8:], "label": LABELS[8:]}],
    "pairs with lists": lambda: [(X[:6], LABELS[:6].tolist()), (X[6:], LABELS[6:].tolist())],
    "a loader of pairs": lambda: DataLoader(TensorDataset(X, LABELS), batch_size=5),
    "a generator": lambda: (part for part in X.split(4)),
}


def pruned() -> PreTrainedModel:
    return vitprune.prune_(tiny.build("vit"), {"before_blocks": [1, 3], "dropped": "merge"})


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_the_same_images(form: str) -> None:
    assert torch.equal(torch.cat([named(batch)["pixel_values"] for batch in each(FORMS[form]())]), X)
    model = pruned()
    vitprune.calibrate(model, FORMS[form](), "70%", progress=False)
    assert vitprune.scale_to_budget(model, FORMS[form](), 0.7, progress=False) == pytest.approx(0.7, abs=0.01)
    result = vitprune.compare(tiny.build("vit"), model, FORMS[form](), progress=False)
    assert result.images == 12
    has_labels = form in ("dicts", "pairs with lists", "a loader of pairs")
    assert set(result.metrics) == ({"accuracy"} if has_labels else set())


def test_our_own_images_are_taken_everywhere(tmp_path: Path) -> None:
    data = vitprune.DataSpec(path=str(samples.write_data(tmp_path / "data")))
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    images = vitprune.load_images(data, vitprune.SplitSpec(split="train"), processor, id2label=None)
    model = pruned()
    vitprune.calibrate(model, images, 0.7, progress=False)
    assert vitprune.compare(tiny.build("vit"), model, images, {"metrics": ["f1"]}, progress=False).metrics.keys() == {
        "f1"
    }


def test_labels_stay_out_of_the_model() -> None:
    assert torch.equal(without_labels({"pixel_values": X, "label": LABELS}), X)  # type: ignore[arg-type]
    assert without_labels({"pixel_values": X, "mask": LABELS}).keys() == {"pixel_values", "mask"}  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", [None, 5, {"pixel_values": X}, ["a.png"], [torch.tensor(1)], [{}], [[1, 2]]], ids=str)
def test_what_holds_no_images_is_a_type_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"pass vitprune\.load_images"):
        vitprune.calibrate(pruned(), wrong, 0.7, progress=False)
    with pytest.raises(TypeError, match=r"pass vitprune\.load_images"):
        vitprune.compare(tiny.build("vit"), pruned(), wrong, progress=False)


def test_specs_and_budgets_that_say_nothing_sensible() -> None:
    with pytest.raises(ValueError, match=r"^before_block: unknown key \(did you mean 'before_blocks'\?\)$"):
        vitprune.prune_(tiny.build("vit"), {"before_block": [1]})
    with pytest.raises(ValueError, match=r"^before_blocks\[0\]: is 0, should be greater than 0$"):
        vitprune.prune_(tiny.build("vit"), {"before_blocks": [0, 2]})
    with pytest.raises(TypeError, match="str is no PruningSpec"):
        vitprune.prune_(tiny.build("vit"), "as-vit")  # type: ignore[arg-type]
    for budget in ("much", "0%", 1.5, "130 %", None):
        with pytest.raises(ValueError, match=r"budget is .* such as 0\.65 or '65%'"):
            vitprune.calibrate(pruned(), X, budget, progress=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"pass vitprune\.load_images.*TrainerCallback"):
        vitprune.finetune(pruned(), tiny.build("vit"), [X], {"steps": 1}, 0.7)  # type: ignore[arg-type]
