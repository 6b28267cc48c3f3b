"""torchao's int8 linear layers in a pruned model, whichever came first."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.testing import assert_close
from transformers import PreTrainedModel

import vitprune

torchao: Any = importlib.import_module("torchao.quantization")  # there for these tests alone
quantize_ = torchao.quantize_

KINDS: dict[str, Any] = {
    "weights": torchao.Int8WeightOnlyConfig,
    "weights and activations": torchao.Int8DynamicActivationInt8WeightConfig,
}
# int8 rounds where float32 goes on, so a rounding of float32 may become one of int8
BUDGET, CLOSE = 0.7, 0.01


def pruned(family: str) -> PreTrainedModel:
    model = vitprune.prune_(tiny.build(family), vitprune.PruningSpec(before_blocks=[1, 3, 4]))
    vitprune.calibrate(model, [tiny.images(16)], BUDGET, progress=False)
    return model


@torch.no_grad()
def run(model: Any) -> tuple[torch.Tensor, list[torch.Tensor], float]:
    with vitprune.trace(model) as seen:
        answers = model(tiny.images(8)).logits
    return answers, seen.keep_masks, seen.ratio


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["vit", "dinov2", "siglip"])
def test_quantised_after_loading_it_decides_as_before_saving(tmp_path: Path, kind: str, family: str) -> None:
    model = pruned(family)
    vitprune.save(model, tmp_path / "saved")
    quantize_(model, KINDS[kind]())
    back = vitprune.load(tmp_path / "saved")
    quantize_(back, KINDS[kind]())
    (before, masks, ratio), (after, masks_back, _) = run(model), run(back)
    assert_close(after, before, rtol=0, atol=0)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(masks_back, masks, strict=True))
    assert abs(ratio - BUDGET) < 5 * CLOSE  # int8 moves scores a little; thresholds can be scaled again
    vitprune.scale_to_budget(back, [tiny.images(16)], BUDGET, progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_quantised_model_can_be_pruned(kind: str) -> None:
    model = tiny.build("vit")
    quantize_(model, KINDS[kind]())
    dense = copy.deepcopy(model)
    vitprune.prune_(model, vitprune.PruningSpec(before_blocks=[1, 3, 4]))
    vitprune.calibrate(model, [tiny.images(16)], BUDGET, progress=False)
    answers, _, ratio = run(model)
    assert abs(ratio - BUDGET) < 5 * CLOSE
    with torch.no_grad():
        assert not torch.equal(dense(tiny.images(8)).logits, answers)
    restored = vitprune.restore_(model)
    with torch.no_grad():
        assert_close(restored(tiny.images(8)).logits, dense(tiny.images(8)).logits, rtol=0, atol=0)


@pytest.mark.parametrize("own", [False, True], ids=["save_pretrained", "vitprune.save"])
def test_what_is_quantised_is_not_half_saved(tmp_path: Path, own: bool) -> None:
    model = pruned("vit")
    quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"is quantised \(torchao's Int8Tensor\).*save before quantize_"):
        vitprune.save(model, tmp_path / "saved") if own else model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert vitprune.pruning_of(model).levels.isfinite().all()
