"""Operating points: levels of several budgets in one model, and what lies between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import Tolerance
from torch.testing import assert_close
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTImageProcessorPil

import vitprune
from vitprune.models.module import pruning_of

BUDGETS = ["80%", 0.65, "50%"]
GOT = 0.01  # of what was asked, on the images that the levels were found on
BETWEEN = 0.02


def images() -> torch.Tensor:
    return tiny.images(48)


def pointed(select: str = "threshold", **changes: Any) -> PreTrainedModel:
    spec = vitprune.PruningSpec.model_validate({"before_blocks": (1, 3, 4), "select": select, **changes}, strict=False)
    model = vitprune.prune_(tiny.build("vit"), spec)
    vitprune.find_points(model, images(), BUDGETS, progress=False)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return pointed()


def ratio(model: PreTrainedModel) -> float:
    with vitprune.trace(model) as trace, torch.no_grad():
        model(images())
    return trace.ratio


def test_points_are_found_and_the_first_is_set(model: PreTrainedModel) -> None:
    points = vitprune.points_of(model)
    assert [point.budget for point in points] == [0.8, 0.65, 0.5]
    fresh = pointed()
    assert pruning_of(fresh).levels.tolist() == list(points[0].levels)
    assert ratio(fresh) == pytest.approx(0.8, abs=GOT)


def test_a_budget_above_what_all_patches_cost_keeps_them() -> None:
    # the last block computes what the head reads alone
    model = vitprune.prune_(tiny.build("vit"), vitprune.PruningSpec(before_blocks=(1, 3, 4)))
    high, low = vitprune.find_points(model, images(), ["97%", "65%"], progress=False)
    with vitprune.trace(model) as trace, torch.no_grad():
        model(images())
    assert trace.kept_patches.float().mean() > 0.98 * trace.num_patches
    assert trace.ratio == pytest.approx(high.ratio, abs=1e-6)
    assert high.ratio < 0.93
    assert low.ratio == pytest.approx(0.65, abs=GOT)


def test_what_drops_nothing_is_not_scaled(model: PreTrainedModel) -> None:
    points = vitprune.points_of(model)
    vitprune.set_budget(model, 1)
    with pytest.raises(ValueError, match=r"turned to dropping nothing.*call vitprune.set_budget"):
        vitprune.scale_to_budget(model, images(), 0.5, progress=False)
    assert vitprune.points_of(model) == points


@pytest.mark.parametrize("budget", [0.8, "65%", 0.5])
def test_a_point_has_what_was_asked(model: PreTrainedModel, budget: float | str) -> None:
    expected = vitprune.set_budget(model, budget)
    assert ratio(model) == pytest.approx(expected, abs=1e-6)
    assert expected == pytest.approx(0.65 if budget == "65%" else budget, abs=GOT)


@pytest.mark.parametrize("budget", [0.72, 0.6, 0.55])
def test_between_points_it_is_interpolated(model: PreTrainedModel, budget: float) -> None:
    assert vitprune.set_budget(model, budget) == budget
    assert ratio(model) == pytest.approx(budget, abs=BETWEEN)


def test_the_lower_the_less(model: PreTrainedModel) -> None:
    ratios = []
    for percent in range(50, 81, 3):
        vitprune.set_budget(model, percent / 100)
        ratios.append(ratio(model))
    assert ratios == sorted(ratios)


def test_at_1_nothing_is_dropped(model: PreTrainedModel) -> None:
    expected = vitprune.set_budget(model, 1)
    with vitprune.trace(model) as trace, torch.no_grad():
        answers = model(images()).logits
    assert all(mask.all() for mask in trace.keep_masks)
    assert trace.ratio == pytest.approx(expected, abs=BETWEEN)  # under a trace stages are decided all the same
    assert_close(answers, tiny.build("vit")(images()).logits, **Tolerance(rtol=1e-5, atol=1e-5))


@pytest.mark.parametrize("select", ["top-k", "tome"])
def test_keep_ratios_have_points_too(select: str) -> None:
    stages = {"before_blocks": "every"} if select == "tome" else {}
    model = pointed(select, **stages)
    for budget in (0.8, 0.65, 0.5):
        assert vitprune.set_budget(model, budget) == pytest.approx(budget, abs=3 * GOT)  # counts are whole numbers
    assert vitprune.set_budget(model, 0.6) == 0.6
    assert ratio(model) == pytest.approx(0.6, abs=2 * BETWEEN)
    vitprune.set_budget(model, 1)
    assert pruning_of(model).levels.tolist() == [1.0] * len(pruning_of(model).levels)


def test_they_come_back_with_the_checkpoint(model: PreTrainedModel, tmp_path: Path) -> None:
    vitprune.set_budget(model, 0.65)
    place = vitprune.save(model, tmp_path / "out", processor=ViTImageProcessorPil(size={"height": 32, "width": 32}))
    back = AutoModelForImageClassification.from_pretrained(place)
    assert vitprune.points_of(back) == vitprune.points_of(model)
    assert torch.equal(pruning_of(back).levels, pruning_of(model).levels)
    lower = vitprune.load(place, budget="50%")
    assert ratio(lower) == pytest.approx(0.5, abs=GOT)
    with pytest.raises(ValueError, match=r"budget is 0\.4, outside of what the model was calibrated for, 0\.5 to 0\.8"):
        vitprune.load(place, budget=0.4)


def test_another_calibration_forgets_them() -> None:
    model = pointed()
    vitprune.calibrate(model, images(), 0.7, progress=False)
    assert vitprune.points_of(model) == ()
    again = pointed()
    vitprune.scale_to_budget(again, images(), 0.7, progress=False)
    assert vitprune.points_of(again) == ()


def test_a_model_without_points_says_so() -> None:
    model = vitprune.prune_(tiny.build("vit"), tiny.POLICIES["redundancy-merge"])
    with pytest.raises(ValueError, match=r"levels for one budget alone; find them for several"):
        vitprune.set_budget(model, 0.5)
    with pytest.raises(ValueError, match="isn't pruned"):
        vitprune.set_budget(tiny.build("vit"), 0.5)
    with pytest.raises(ValueError, match="should be a part of the dense MACs"):
        vitprune.set_budget(model, 50)


def test_budgets_that_come_to_the_same_are_refused() -> None:
    model = vitprune.prune_(tiny.build("vit"), {"before_blocks": [1, 3, 4]})
    with pytest.raises(ValueError, match=r"come to the same work"):
        vitprune.find_points(model, images(), [0.6, 0.6], progress=False)
    with pytest.raises(ValueError, match=r"100% needs no levels"):
        vitprune.find_points(model, images(), [1, 0.6], progress=False)


def test_turned_to_dropping_nothing_it_is_saved_and_comes_back(tmp_path: Path) -> None:
    model = pointed()
    vitprune.set_budget(model, 1)
    back = vitprune.load(vitprune.save(model, tmp_path / "out"))
    assert vitprune.set_budget(back, 0.5) == pytest.approx(0.5, abs=GOT)
