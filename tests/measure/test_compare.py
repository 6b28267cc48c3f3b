"""Comparing and timing tiny models: against what forwards and traces say, image by image."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, Features, Image, disable_progress_bars, enable_progress_bars
from PIL.Image import fromarray
from torch import Tensor
from transformers import PreTrainedModel, ViTConfig, ViTImageProcessorPil, ViTModel

import vitprune
from vitprune.budget.calibration import mean_ratio
from vitprune.data.images import Images, load_images
from vitprune.measure.compare import compare
from vitprune.measure.statistics import paired_difference, part_interval
from vitprune.measure.throughput import describe_environment, measure_throughput
from vitprune.recipe.schema import DataSpec, EvaluateSpec, SplitSpec

SPEC = EvaluateSpec(metrics=("accuracy", "top-5-accuracy", "f1"), batch_size=4)


@pytest.fixture
def dense() -> PreTrainedModel:
    return tiny.build("vit")


@pytest.fixture
def pruned(dense: PreTrainedModel) -> PreTrainedModel:
    return vitprune.prune_(copy.deepcopy(dense), tiny.POLICIES["redundancy-merge"])


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Images]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def load(labelled: bool = True, streaming: bool = False) -> Images:
        pixels = (tiny.images(10).clamp(-1, 1) * 127.5 + 127.5).byte().permute(0, 2, 3, 1).numpy()
        features = Features({"image": Image(), "label": ClassLabel(num_classes=5)})
        rows = Dataset.from_dict({"image": list(map(fromarray, pixels)), "label": [0, 1, 2, 3, 4] * 2}, features)
        disable_progress_bars()
        (rows if labelled else rows.remove_columns("label")).save_to_disk(str(tmp_path / "data"))
        enable_progress_bars()
        data = DataSpec(path=str(tmp_path / "data"), streaming=streaming)
        processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
        return load_images(data, SplitSpec(split="train"), processor, id2label={i: f"LABEL_{i}" for i in range(5)})

    return load


def everything(images: Images) -> tuple[Tensor, Tensor]:
    (batch,) = images.loader(100)
    return batch["pixel_values"], batch["labels"]


@torch.inference_mode()
@pytest.mark.parametrize("streaming", [False, True])
def test_compare(
    dense: PreTrainedModel, pruned: PreTrainedModel, images: Callable[..., Images], streaming: bool
) -> None:
    x, labels = everything(images())
    before = dense(x).logits
    with vitprune.trace(pruned) as seen:
        after = pruned(x).logits
    result = compare(dense, pruned, images(streaming=streaming), SPEC, progress=False)

    assert result.images == 10
    assert result.skipped == 0
    assert result.agreement == pytest.approx(float((before.argmax(1) == after.argmax(1)).double().mean()))
    accuracy = result.metrics["accuracy"]
    assert accuracy.dense == pytest.approx(float((before.argmax(1) == labels).double().mean()))
    assert accuracy.pruned == pytest.approx(float((after.argmax(1) == labels).double().mean()))
    assert accuracy.difference == accuracy.pruned - accuracy.dense
    dense_right, pruned_right = before.argmax(1) == labels, after.argmax(1) == labels
    lost, won = (dense_right & ~pruned_right).sum(), (pruned_right & ~dense_right).sum()
    expected = paired_difference(int(lost), int(won), 10)
    assert (accuracy.interval, accuracy.p_value) == (expected.interval, expected.p_value)
    same = int((before.argmax(1) == after.argmax(1)).sum())
    assert result.agreement_interval == part_interval(same, 10)
    assert result.metrics["top-5-accuracy"].dense == 1.0
    assert result.metrics["top-5-accuracy"].interval is None
    assert 0 <= result.metrics["f1"].pruned <= 1

    assert result.macs.dense == pytest.approx(float(seen.dense_macs[0]))
    assert result.macs.pruned.mean == pytest.approx(float(seen.macs.mean()))
    assert result.macs.pruned.q50 == pytest.approx(float(seen.macs.quantile(0.5)))
    assert result.macs.ratio == pytest.approx(float((seen.macs / seen.dense_macs).mean()))
    assert [stage.before_block for stage in result.kept] == [1, 3, 4]
    for stage, keep_mask in zip(result.kept, seen.keep_masks, strict=True):
        assert stage.patches == tiny.PATCHES
        assert stage.kept.mean == pytest.approx(float(keep_mask.sum(1).double().mean()))
        assert stage.kept.q05 <= stage.kept.q25 <= stage.kept.q50 <= stage.kept.q75 <= stage.kept.q95


def test_without_labels(dense: PreTrainedModel, pruned: PreTrainedModel, images: Callable[..., Images]) -> None:
    result = compare(dense, pruned, images(labelled=False), SPEC, progress=False)
    assert result.metrics == {}
    assert result.images == 10


def test_a_model_agrees_with_itself(dense: PreTrainedModel, images: Callable[..., Images]) -> None:
    keeps_all = vitprune.prune_(copy.deepcopy(dense), vitprune.PruningSpec(score="head-weighted-class-attention"))
    result = compare(dense, keeps_all, images(), SPEC, progress=False)
    assert result.agreement == 1.0
    assert all(pair.difference == 0 for pair in result.metrics.values())
    assert all(stage.kept.mean == tiny.PATCHES for stage in result.kept)


def test_models_stay_in_their_mode_and_dtype(
    dense: PreTrainedModel, pruned: PreTrainedModel, images: Callable[..., Images]
) -> None:
    dense.eval()
    pruned.train().bfloat16()
    compare(dense, pruned, images(), SPEC, progress=False)
    assert not dense.training
    assert pruned.training
    assert pruned.dtype == torch.bfloat16


def test_no_image(dense: PreTrainedModel, pruned: PreTrainedModel, images: Callable[..., Images]) -> None:
    with pytest.raises(ValueError, match="there is no image"):
        compare(dense, pruned, images().sample(0, seed=0), SPEC, progress=False)


def test_pruned_has_to_be_pruned(dense: PreTrainedModel, images: Callable[..., Images]) -> None:
    with pytest.raises(ValueError, match="isn't pruned"):
        compare(dense, dense, images(), SPEC, progress=False)


def test_pruned_has_to_be_made_of_dense(pruned: PreTrainedModel, images: Callable[..., Images]) -> None:
    with pytest.raises(
        ValueError,
        match=r"pruned ViTForImageClassification answers with logits of classes, but the dense ViTModel answers",
    ):
        compare(ViTModel(ViTConfig(**tiny.SHAPE)), pruned, images(), SPEC, progress=False)
    others: Any = tiny.build("vit")
    others.classifier = torch.nn.Linear(48, 1)
    with pytest.raises(
        ValueError, match=r"answers with 5 numbers an image, the dense one with 1; name the dense model"
    ):
        compare(others, pruned, images(), SPEC, progress=False)


def test_throughput(dense: PreTrainedModel, pruned: PreTrainedModel) -> None:
    x = tiny.images(3)
    rows = measure_throughput(dense, pruned, x, (1, 5), repeats=2, progress=False)
    assert [row.batch_size for row in rows] == [1, 5]
    for row in rows:
        for timing in (row.dense, row.pruned):
            assert 0 < timing.fastest <= timing.median <= timing.slowest
        assert row.speedup == pytest.approx(row.dense.median / row.pruned.median)
        assert row.efficiency == pytest.approx(row.speedup / row.ideal_speedup)
        assert row.dense_images_per_second == pytest.approx(row.batch_size / row.dense.median)
    with vitprune.trace(pruned) as seen, torch.inference_mode():
        pruned(x)
    macs = seen.macs[[0, 1, 2, 0, 1]]
    assert rows[1].ideal_speedup == pytest.approx(float(seen.dense_macs[0] * 5 / macs.sum()))


def test_environment(dense: PreTrainedModel) -> None:
    environment = describe_environment(dense.bfloat16())
    assert environment.vitprune == vitprune.__version__
    assert environment.torch == torch.__version__
    assert environment.device == "cpu"
    assert environment.dtype == "bfloat16"
    assert environment.numba == version("numba")
    assert environment.threads >= 1
    assert environment.cpu


def test_answers_that_are_no_numbers_are_counted_and_wrong(
    dense: PreTrainedModel, images: Callable[..., Images]
) -> None:
    """In float16 a layer may overflow: neither the same answer nor a right one."""
    with torch.no_grad():
        dense.get_parameter("classifier.bias")[0] = torch.nan
    pruned = vitprune.prune_(copy.deepcopy(dense), tiny.POLICIES["redundancy-merge"])
    result = compare(dense, pruned, images(), SPEC, progress=False)
    assert (result.not_finite.dense, result.not_finite.pruned) == (10, 10)
    assert result.agreement == 0.0
    assert result.metrics["accuracy"].dense == result.metrics["accuracy"].pruned == 0.0
    assert result.metrics["top-5-accuracy"].pruned == 0.0


@pytest.mark.parametrize("family", ["siglip2", "ast"])
def test_batches_may_hold_more_than_pixels(family: str) -> None:
    """What calibration takes."""
    x, dense = tiny.inputs(family, 6), tiny.build(family)
    model = vitprune.prune_(copy.deepcopy(dense), tiny.spec_for(family, tiny.POLICIES["redundancy-merge"]))
    batch = {**x, "labels": torch.arange(6) % 5}
    result = compare(dense, model, [batch], EvaluateSpec(metrics=("accuracy",)), progress=False)
    assert result.images == 6
    with torch.no_grad():
        expected = (dense.eval()(**x).logits.argmax(1) == batch["labels"]).double().mean().item()
    assert result.metrics["accuracy"].dense == pytest.approx(expected)
    # images of several sizes differ in what the dense model costs
    assert result.macs.ratio == pytest.approx(mean_ratio(model, [x]))
