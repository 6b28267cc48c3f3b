"""What a tracker is told: read back from TensorBoard's own files, and by hand for pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_recipe import RECIPE, recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitprune.finetuning.tracking import DIMMED, beside_kept, require_installed, unscaled
from vitprune.runs.apply import apply

FINETUNE = "finetune: {epochs: 2, batch_size: 8, holdout: 24, trackers: [tensorboard], losses: {task: 1}}\n"
# tensorboard's own, of its dependencies
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")


def test_tensorboard_is_told_of_every_step(tmp_path: Path) -> None:
    apply(recipe(tmp_path, RECIPE + FINETUNE, "vit", "pruning.dropped=leave", "finetune.thresholds=learned"))
    events = EventAccumulator(str(tmp_path / "out.logs" / "out"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    losses = {"loss/total", "loss/task", "loss/distillation"}
    held_out = {f"held_out/{name}" for name in ("loss", "task", "distillation", "ratio")}
    stages = {f"{name}/before_block_{block}" for name in ("kept", "level") for block in (2, 4)}
    rates = {"learning_rate/weights", "learning_rate/thresholds"}
    others = {"ratio", "kept", "factor", "images_per_second"}
    assert losses | held_out | stages | rates | others <= set(events.Tags()["scalars"])
    for name in ("loss/total", "ratio", "level/before_block_2", "images_per_second"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("held_out/loss")] == [0, 2, 3, 4, 5, 6]
    rates = [event.value for event in events.Scalars("learning_rate/weights")]
    assert rates[1] == max(rates) == pytest.approx(1e-5), "of the step itself"
    assert rates[-1] > 0
    total = [event.value for event in events.Scalars("loss/total")]
    parts = zip(*([event.value for event in events.Scalars(name)] for name in losses - {"loss/total"}), strict=True)
    assert total == pytest.approx([sum(part) for part in parts], rel=1e-5)
    pictures = [tag for tag in events.Tags()["images"] if tag.startswith("kept tokens")]
    assert {event.step for event in events.Images(pictures[0])} == {3, 6}
    settings = next((tmp_path / "out.logs" / "out").rglob("hparams.yml")).read_text()
    assert "finetune.epochs: 2.0" in settings
    assert "budget.macs: 0.6" in settings


def test_a_picture_is_dimmed_where_a_patch_left() -> None:
    unit_BCHW = torch.ones(1, 3, 4, 6)
    keep_BP = torch.tensor([[True, False, True, True, True, True]])  # a grid of 2 x 3
    picture = beside_kept(unit_BCHW, keep_BP)
    assert picture.shape == (1, 4, 12, 3)
    assert (picture[:, :, :6] == 255).all()
    dimmed = np.full((4, 6), 255)
    dimmed[:2, 2:4] = round(DIMMED * 255)
    assert (picture[0, :, 6:, 0] == dimmed).all()
    assert beside_kept(unit_BCHW, torch.ones(1, 7, dtype=torch.bool)) is None


def test_pixels_are_scaled_back() -> None:
    scale_C, shift_C = torch.tensor([2.0, 4.0, 5.0]), torch.tensor([-1.0, 0.0, 1.0])
    unit_BCHW = torch.rand(2, 3, 4, 4)
    x_BCHW = unit_BCHW * scale_C[:, None, None] + shift_C[:, None, None]
    torch.testing.assert_close(unscaled(x_BCHW, scale_C, shift_C), unit_BCHW, rtol=0, atol=1e-6)


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitprune.finetuning.tracking.get_available_trackers", lambda: ["tensorboard"])
    require_installed(["tensorboard"])
    with pytest.raises(ValueError, match=r"finetune\.trackers: 'comet_ml' isn't installed; pip install comet-ml"):
        require_installed(["tensorboard", "comet_ml"])
