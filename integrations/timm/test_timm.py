"""The behaviour suite over timm's plain vision transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import samples
import timm
import tiny
import torch
from transformers import PreTrainedModel, TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel

SHAPE = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 6, "num_heads": 4, "mlp_ratio": 2}


def config(architecture: str, model_args: dict[str, Any]) -> TimmWrapperConfig:
    made = TimmWrapperConfig(architecture=architecture, model_args=model_args)
    made.num_labels = 5
    return made


def timm_model(kind: type[PreTrainedModel] = TimmWrapperForImageClassification, **options: Any) -> PreTrainedModel:
    model = kind(config("vit_tiny_patch16_224", {**SHAPE, **options}))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.3)  # attention far from uniform
    return model


def unfused(model: Any) -> PreTrainedModel:
    for block in model.timm_model.blocks:
        block.attn.fused_attn = False
    return model


tiny.FAMILIES = {
    "class token": timm_model,
    "mean of patches": lambda: timm_model(class_token=False, global_pool="avg"),
    "registers": lambda: timm_model(reg_tokens=4),
    "qk norm and layer scale": lambda: timm_model(qk_norm=True, init_values=0.1),
    "not fused": lambda: unfused(timm_model()),
    "bare": lambda: timm_model(TimmWrapperModel),
}
tiny.ARCHETYPES = dict.fromkeys(tiny.FAMILIES, "timm")
tiny.WITHOUT_CLASS_TOKEN = {"mean of patches"}

import suite  # noqa: E402 - the suites read what they run over when they are imported
import test_inference  # noqa: E402
import test_learning  # noqa: E402

import vitprune  # noqa: E402
from vitprune import apply, load_recipe, plan  # noqa: E402

# these name their families
ELSEWHERE = {"test_in_packed_training_an_image_that_is_not_finite_stays_alone"}
SUITES = {**vars(test_inference), **vars(test_learning)}
globals().update({n: t for n, t in SUITES.items() if n.startswith("test_") and n not in ELSEWHERE})

RECIPE = """\
version: 1
model: {checkpoint: checkpoint}
data: {path: data}
pruning: {before_blocks: [2, 4]}
budget: {macs: 60%}
calibration: {images: 24, batch_size: 8}
evaluate: {batch_sizes: []}
"""


def test_hidden_states_are_refused() -> None:
    model = vitprune.prune_(timm_model(), tiny.POLICIES["as-vit"])
    with pytest.raises(ValueError, match="gives out no hidden states"):
        model(tiny.images(1), output_hidden_states=True)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_comes_back_as_it_was(family: str, tmp_path: Path) -> None:
    model = suite.pruned(family, "redundancy-merge")
    x = tiny.inputs(family, 3)
    expected, _ = suite.run(model, x)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(suite.run(again, x)[0], expected, **suite.EXACT)


def test_what_is_no_plain_vision_transformer_is_refused() -> None:
    with pytest.raises(ValueError, match="wraps timm's SwinTransformer, no VisionTransformer"), torch.device("meta"):
        vitprune.prune_(
            TimmWrapperForImageClassification(config("swin_tiny_patch4_window7_224", {})), tiny.POLICIES["as-vit"]
        )


def write(folder: Path, *, by_timm: bool = False) -> None:
    """A checkpoint and data. by_timm: as timm saves it for the Hub, where no class of transformers is named."""
    samples.write_data(folder / "data")
    model: Any = timm_model()
    if by_timm:
        place, names = folder / "checkpoint", {"label_names": samples.NAMES}
        timm.models.save_for_hf(model.timm_model, str(place), model_config=names, safe_serialization=True)
        known = json.loads((place / "config.json").read_text())
        assert "architectures" not in known
        assert "num_classes" in known["model_args"], "which transformers gives a second time"
        return
    model.config.id2label = dict(enumerate(samples.NAMES))
    model.config.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    model.save_pretrained(folder / "checkpoint")


def test_training_gives_back_what_it_sets_and_export_has_a_processor_that_says_little(tmp_path: Path) -> None:
    write(tmp_path)
    dense = vitprune.load(tmp_path / "checkpoint")
    processor = vitprune.load_processor(str(tmp_path / "checkpoint"))
    images = vitprune.load_images({"path": str(tmp_path / "data")}, "train", processor)
    model: Any = vitprune.prune_(copy.deepcopy(dense), {"before_blocks": [2, 4]})
    vitprune.calibrate(model, images.sample(16, 0), 0.6, progress=False)
    spec = {"steps": 2, "batch_size": 8, "augmentation": "strong", "gradient_checkpointing": True}
    vitprune.finetune(model, dense, images, spec, 0.6, progress=False)
    assert not model.timm_model.grad_checkpointing
    exported = vitprune.export(model, tmp_path / "onnx", processor=processor)
    assert not (tmp_path / "onnx" / "run.py").exists()
    x = tiny.images(3)
    with torch.no_grad():
        torch.testing.assert_close(exported.model(x).logits, model(x).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by_timm", [False, True])
def test_a_recipe_becomes_a_checkpoint(tmp_path: Path, by_timm: bool) -> None:
    write(tmp_path, by_timm=by_timm)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    assert plan(load_recipe(recipe)).family == "timm_wrapper"
    report = apply(load_recipe(recipe, [f"output.path={tmp_path / 'out'}"]))
    assert report.comparison.macs.ratio == pytest.approx(0.6, abs=0.05)
    again = vitprune.load(tmp_path / "out")
    assert again(tiny.images(1)).logits.shape == (1, 5)
    assert again.config.id2label == dict(enumerate(samples.NAMES))


def test_a_batch_without_images_has_no_answers() -> None:
    dense = timm_model().eval()
    expected = dense(tiny.images(1)[:0]).logits.shape
    assert vitprune.prune_(dense, tiny.POLICIES["as-vit"])(tiny.images(1)[:0]).logits.shape == expected
