"""Pruned checkpoints come back through plain transformers, and are written whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import tiny
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from suite import FAMILIES_AND_POLICIES
from tiny import Tolerance
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
    pipeline,
)

import vitprune
from vitprune.budget.calibration import calibrate
from vitprune.measure.outputs import ImageModel
from vitprune.models.checkpoint import load_processor, load_tokenizer, require_room
from vitprune.models.families import FAMILIES
from vitprune.models.module import is_pruned, pruning_of
from vitprune.recipe.schema import PruningSpec

EXACT = Tolerance(rtol=0.0, atol=0.0)


def logits(model: PreTrainedModel, family: str = "vit") -> torch.Tensor:
    with torch.no_grad():
        return tiny.answer(tiny.forward(model, tiny.inputs(family, 3)))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    model = vitprune.prune_(tiny.build("vit"), tiny.POLICIES["as-vit-merge"])
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return model, vitprune.save(model, tmp_path / "out", processor=processor, files={"recipe.yaml": "version: 1\n"})


@pytest.mark.parametrize(("family", "policy"), FAMILIES_AND_POLICIES)
def test_it_comes_back_as_it_was(family: str, policy: str, tmp_path: Path) -> None:
    model = vitprune.prune_(tiny.build(family), tiny.spec_for(family, tiny.POLICIES[policy]))
    path = vitprune.save(model, tmp_path / "out")
    expected = logits(model, family)
    plain = type(model).from_pretrained(path)
    assert_close(logits(plain, family), expected, **EXACT)
    back = vitprune.load(path)
    assert type(back) is type(model)
    assert_close(logits(back, family), expected, **EXACT)
    assert pruning_of(back).spec == pruning_of(plain).spec == pruning_of(model).spec
    vitprune.restore_(back)
    assert_close(logits(back, family), logits(tiny.build(family), family), **EXACT)


@pytest.mark.parametrize("family", ["vit", "siglip2"])
@pytest.mark.parametrize(
    "spec", [{}, {"score": "head-weighted-mean-attention"}, {"select": "top-k"}], ids=["redundancy", "mean", "top-k"]
)
def test_what_calibration_found_out_comes_back(spec: dict[str, Any], family: str, tmp_path: Path) -> None:
    model = vitprune.prune_(tiny.build(family), PruningSpec(before_blocks="auto", **spec))
    calibrate(model, [tiny.inputs(family, 6)], 0.7, progress=False)
    pruning = pruning_of(model)
    assert isinstance(pruning.spec.before_blocks, tuple)
    assert pruning.spec.patches == (None if "select" in spec else tiny.PATCHES)
    path = vitprune.save(model, tmp_path / "out")
    for back in (vitprune.load(path), type(model).from_pretrained(path)):
        assert pruning_of(back).spec == pruning.spec
        assert pruning_of(back).before_blocks == pruning.before_blocks
        assert_close(pruning_of(back).state_dict(), pruning.state_dict(), **EXACT)
        assert_close(logits(back, family), logits(model, family), **EXACT)


# --- formats ---


def rewrite(path: Path, format: int, **changes: object) -> None:
    """Makes a checkpoint's entry one of another format, with other values in it."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    entry = config["quantization_config"]
    entry["format"] = format
    entry["pruning"].update(changes)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_checkpoints_are_written_in_the_second_format(saved: tuple[PreTrainedModel, Path]) -> None:
    config = json.loads((saved[1] / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["format"] == 2


@pytest.mark.parametrize("policy", ["as-vit", "as-vit-merge", "top-k-merge", "random-merge", "tome"])
def test_what_means_the_same_is_read_of_the_first_format(policy: str, tmp_path: Path) -> None:
    model = vitprune.prune_(tiny.build("vit"), tiny.POLICIES[policy])
    path = vitprune.save(model, tmp_path / "out")
    rewrite(path, 1)
    assert_close(logits(vitprune.load(path)), logits(model), **EXACT)


WAY_OUT = r"; prune the dense model again with `vitprune apply`.*, or load the weights dense"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"score": "redundancy"}, "score 'redundancy' in its first form"),
        ({"score": "redundancy", "select": "top-k"}, "score 'redundancy' in its first form"),
        ({"dropped": "fuse"}, "dropped: fuse, which is gone"),
    ],
    ids=["threshold", "top-k", "fuse"],
)
def test_what_would_mean_something_else_is_refused(
    changes: dict[str, object], what: str, saved: tuple[PreTrainedModel, Path]
) -> None:
    _, path = saved
    rewrite(path, 1, **changes)
    expected = rf"config\.json: quantization_config is of format 1, with {what}{WAY_OUT}"
    for load in (vitprune.load, AutoModelForImageClassification.from_pretrained):
        with pytest.raises(ValueError, match=expected):
            load(path)


@pytest.mark.parametrize("format", [0, 3])
def test_other_formats_are_refused(format: int, saved: tuple[PreTrainedModel, Path]) -> None:
    _, path = saved
    rewrite(path, format)
    with pytest.raises(ValueError, match=rf"format is {format}, this vitprune reads up to 2; install the version"):
        vitprune.load(path)


def test_plain_from_pretrained_is_enough(saved: tuple[PreTrainedModel, Path]) -> None:
    model, path = saved
    back = AutoModelForImageClassification.from_pretrained(path)
    assert_close(logits(back), logits(model), **EXACT)
    assert is_pruned(back)
    bare = AutoModel.from_pretrained(path, add_pooling_layer=False)
    assert_close(pruning_of(bare).levels, pruning_of(model).levels, **EXACT)


def test_a_pipeline_runs_it(saved: tuple[PreTrainedModel, Path]) -> None:
    from PIL import Image

    _, path = saved
    classify = pipeline("image-classification", str(path), use_fast=False)
    assert len(classify(Image.new("RGB", (40, 40), "red"))) == 5
    assert is_pruned(classify.model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_thresholds_stay_float32(saved: tuple[PreTrainedModel, Path], dtype: torch.dtype) -> None:
    model, path = saved
    back = AutoModelForImageClassification.from_pretrained(path, dtype=dtype)
    assert back.dtype == dtype
    assert_close(pruning_of(back).levels, pruning_of(model).levels, **EXACT)
    assert_close(pruning_of(back).temperatures, pruning_of(model).temperatures, **EXACT)
    # and through a second round in that dtype
    again = vitprune.load(vitprune.save(back, path.with_name("again")), dtype=dtype)
    assert_close(pruning_of(again).levels, pruning_of(model).levels, **EXACT)


def test_save_pretrained_is_enough_too(tmp_path: Path) -> None:
    model = vitprune.prune_(tiny.build("dinov2"), tiny.POLICIES["redundancy-merge"])
    model.save_pretrained(tmp_path / "plain")
    assert_close(logits(vitprune.load(tmp_path / "plain")), logits(model), **EXACT)


def test_trainer_takes_it(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    _, path = saved
    model = AutoModelForImageClassification.from_pretrained(path)
    before = pruning_of(model).levels.detach().clone()
    data = [{"pixel_values": image, "labels": i % 5} for i, image in enumerate(tiny.images(8))]
    arguments = TrainingArguments(
        str(tmp_path / "trainer"),
        max_steps=2,
        report_to=[],
        use_cpu=True,
        learning_rate=1e-3,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=data)  # type: ignore[arg-type]
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    back = vitprune.load(tmp_path / "trained")
    assert_close(logits(back), logits(model.eval().cpu()), **EXACT)
    assert not torch.equal(pruning_of(back).levels, before)


def test_a_failure_while_saving_leaves_nothing(
    saved: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = saved

    def disk_full(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    before = {file.name: file.read_bytes() for file in path.iterdir()}
    monkeypatch.setattr(Path, "write_bytes", disk_full)
    for target in (path, path.with_name("new")):
        with pytest.raises(OSError, match="No space left"):
            vitprune.save(model, target, files={"report.json": "{}"}, overwrite=True)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [entry.name for entry in path.parent.iterdir()] == ["out"]


def test_what_is_there_stays_unless_overwritten(saved: tuple[PreTrainedModel, Path]) -> None:
    model, path = saved
    with pytest.raises(ValueError, match=r" exists; choose another path or set output\.overwrite=true"):
        vitprune.save(model, path)
    vitprune.save(model, path, overwrite=True)
    assert not (path / "recipe.yaml").exists()
    assert [entry.name for entry in path.parent.iterdir()] == ["out"]


def test_broken_weights_are_named(saved: tuple[PreTrainedModel, Path]) -> None:
    _, path = saved
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=r"its weights can't be read: .*Git LFS"):
        vitprune.load(path)


def test_missing_weights_are_named(saved: tuple[PreTrainedModel, Path]) -> None:
    _, path = saved
    weights = {n: w for n, w in load_file(path / "model.safetensors").items() if not n.startswith("classifier.")}
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of ViTForImageClassification \(classifier\.bias"):
        vitprune.load(path)


def test_it_changes_dtype_like_any_model(saved: tuple[PreTrainedModel, Path]) -> None:
    _, path = saved
    back = AutoModelForImageClassification.from_pretrained(path)
    assert back.half().float().dtype == torch.float32


def test_a_folder_of_something_else_is_never_overwritten(saved: tuple[PreTrainedModel, Path]) -> None:
    model, path = saved
    with pytest.raises(ValueError, match="is no pruned checkpoint, so it isn't overwritten"):
        vitprune.save(model, path.parent, overwrite=True)
    tiny.build("vit").save_pretrained(path.with_name("dense"))
    with pytest.raises(ValueError, match="is no pruned checkpoint, so it isn't overwritten"):
        vitprune.save(model, path.with_name("dense"), overwrite=True)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="isn't pruned"):
        vitprune.save(tiny.build("vit"), tmp_path / "out")


def test_a_foreign_checkpoint_is_refused_with_a_list(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "swin", "architectures": ["SwinForImageClassification"]}')
    with pytest.raises(ValueError, match=r"SwinForImageClassification .* supported are ViTs of the model types vit, "):
        vitprune.load(tmp_path)


def test_a_tokenizer_without_words_is_none(tmp_path: Path) -> None:
    folder = samples.write_checkpoint(tmp_path / "clip", "clip-zero-shot")
    assert load_tokenizer(str(folder))("a photo")["input_ids"][1:3] == [3, 4]
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r": no tokenizer: .*; add its files$"):
        load_tokenizer(str(folder))


def test_offloaded_weights_are_there_when_they_are_needed(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, path = saved
    places = {"vit.embeddings": "cpu", "vit.layers": "disk", "vit.layernorm": "cpu", "classifier": "cpu"}
    places["vitprune"] = "disk"
    back = AutoModelForImageClassification.from_pretrained(path, device_map=places, offload_folder=tmp_path / "off")
    assert pruning_of(back).levels.is_meta
    assert_close(logits(back), logits(model), **EXACT)


def test_several_devices_are_refused(saved: tuple[PreTrainedModel, Path]) -> None:
    places = {"vit.embeddings": 0, "vit.layers": "cuda:1", "vit.layernorm": "cpu", "classifier": "disk", "vitprune": 0}
    with pytest.raises(ValueError, match=r"spreads the model over 0, cuda:1.*device_map='cuda:0'"):
        AutoModelForImageClassification.from_pretrained(saved[1], device_map=places)


def changed(path: Path, **values: object) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))
    return path


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    tiny.build("vit").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dtype", "torch.float16"),
        ("hidden_size", "48"),
        ("hidden_act", "nope"),
        ("num_hidden_layers", 0),
        ("image_size", None),
        ("num_attention_heads", 0),
        ("id2label", 7),
    ],
)
def test_odd_values_in_a_config_are_one_line_that_names_the_checkpoint(dense: Path, key: str, value: object) -> None:
    with pytest.raises(ValueError, match=str(dense)) as failed:
        vitprune.load(changed(dense, **{key: value}))
    assert "\n" not in str(failed.value)


def test_an_index_without_a_map_is_one_line(dense: Path) -> None:
    (dense / "model.safetensors").unlink()
    (dense / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="its weights can't be read"):
        vitprune.load(dense)


def test_a_checkpoint_that_does_not_say_its_class_names_one(dense: Path) -> None:
    with pytest.raises(ValueError, match=r'add .* "architectures": \["ViTForImageClassification"\]'):
        vitprune.load(changed(dense, architectures=None))
    assert isinstance(vitprune.load(changed(dense, architectures="ViTForImageClassification")), PreTrainedModel)
    with pytest.raises(ValueError, match=r"Nobody \(`architectures` in config.json"):
        vitprune.load(changed(dense, architectures=["Nobody"]))


def test_pickled_weights_alone_are_refused_with_the_way_out(dense: Path) -> None:
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"nothing is unpickled; load it where you trust it, `save_pretrained` it"):
        vitprune.load(dense)


def test_a_package_that_is_missing_is_one_line(dense: Path) -> None:
    with pytest.raises(ValueError, match=r"bitsandbytes.*isn't installed") as failed:
        vitprune.load(changed(dense, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}))
    assert "\n" not in str(failed.value)


def test_a_disk_without_room_is_found_at_the_start_and_at_the_end(
    saved: tuple[PreTrainedModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = saved
    require_room(tmp_path / "new" / "out", model)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"out: the checkpoint takes .* GiB, and .* are free"):
        require_room(tmp_path / "new" / "out", model)

    def write(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(model, "save_pretrained", write)
    with pytest.raises(OSError, match=r"can't be written to .*No space left on device.*make room, or choose"):
        vitprune.save(model, tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []


def test_thresholds_are_never_uninitialised_memory(saved: tuple[PreTrainedModel, Path]) -> None:
    """As saved by somebody without vitprune, whose weights lack them while the config still says so."""
    _, path = saved
    weights = load_file(path / "model.safetensors")
    without = {name: weight for name, weight in weights.items() if not name.startswith("vitprune.")}
    save_file(without, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="its weights lack thresholds, temperatures; it was saved without"):
        AutoModelForImageClassification.from_pretrained(path)


def test_attention_maps_asked_for_when_loading_are_refused(saved: tuple[PreTrainedModel, Path]) -> None:
    with pytest.raises(ValueError, match="output_attentions in its config"):
        AutoModelForImageClassification.from_pretrained(saved[1], output_attentions=True)


@pytest.mark.parametrize("pruned", [False, True])
def test_a_model_that_was_built_without_a_pooler_comes_back_so(tmp_path: Path, pruned: bool) -> None:
    model = ViTModel(ViTConfig(**tiny.SHAPE), add_pooling_layer=False).eval()
    if pruned:
        vitprune.save(vitprune.prune_(model, tiny.POLICIES["as-vit"]), tmp_path / "ck")
    else:
        model.save_pretrained(tmp_path / "ck")
    back = vitprune.load(tmp_path / "ck")
    assert is_pruned(back) is pruned
    with torch.no_grad():
        found, expected = back(tiny.images(2)), model(tiny.images(2))
    assert_close(found.last_hidden_state, expected.last_hidden_state, **EXACT)


@pytest.mark.parametrize("cls", [CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection])
def test_the_tower_of_a_pruned_pair_comes_back_pruned_alone(cls: Any, tmp_path: Path) -> None:
    model = vitprune.prune_(tiny.build("clip-zero-shot"), tiny.POLICIES["redundancy-merge"])
    thresholds = pruning_of(model).levels.tolist()
    model.save_pretrained(tmp_path)
    back = cls.from_pretrained(tmp_path).eval()
    assert pruning_of(back).levels.tolist() == thresholds
    x = tiny.images(3)
    found, expected = ImageModel(back), ImageModel(model.eval())
    if cls is not CLIPVisionModel:  # which has no projection
        with torch.no_grad():
            assert_close(found(x), expected(x), **EXACT)
    restored = vitprune.restore_(back)
    assert "quantization_config" not in restored.config.to_json_string()


def test_a_processor_that_lacks_a_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any, **__: Any) -> None:
        raise ImportError("DINOv3ViTImageProcessor requires the Torchvision library")

    monkeypatch.setattr("vitprune.models.checkpoint.AutoImageProcessor.from_pretrained", lacking)
    with pytest.raises(ValueError, match=r"no image processor: .*Torchvision library; pip install torchvision$"):
        load_processor(str(tmp_path))


def test_what_is_around_a_model_is_not_saved_as_one(tmp_path: Path) -> None:
    model = vitprune.prune_(tiny.build("vit"), PruningSpec(before_blocks=[2], thresholds=[0.1]))
    wrapped: Any = torch.nn.Sequential(model)
    with pytest.raises(ValueError, match=r"Sequential is no model of transformers .*merge_and_unload"):
        vitprune.save(wrapped, tmp_path / "out")
    assert not list(tmp_path.iterdir())


class OwnConfig(ViTConfig):
    model_type = "own-vit"


class OwnViT(ViTForImageClassification):
    config_class = OwnConfig


def test_a_class_that_was_registered_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "own-vit", replace(FAMILIES["vit"], classes=("OwnViT",)))
    model = vitprune.prune_(OwnViT(OwnConfig(**tiny.SHAPE)), PruningSpec(before_blocks=[2], thresholds=[0.1]))
    vitprune.save(model, tmp_path / "own")
    with pytest.raises(ValueError, match="own-vit"):
        vitprune.load(tmp_path / "own")
    AutoConfig.register("own-vit", OwnConfig)
    with pytest.raises(ValueError, match=r"nor registered with its Auto classes; .*: OwnViT\.from_pretrained"):
        vitprune.load(tmp_path / "own")
    AutoModelForImageClassification.register(OwnConfig, OwnViT)
    assert isinstance(vitprune.load(tmp_path / "own"), OwnViT)
