"""A ViT that is a part of a larger model: pruned there, saved with it, brought back with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from torch import nn
from torch.testing import assert_close
from transformers import PreTrainedModel

import vitprune
from vitprune.models.module import is_pruned, pruning_of

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 4,
}
TEXT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 100}


def llava() -> Any:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TEXT, intermediate_size=64),
        image_token_index=99,
        image_seq_length=64,
    )
    return hf.LlavaForConditionalGeneration(config).eval()


def captioner() -> Any:
    words: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50, "add_cross_attention": True}
    decoder = hf.GPT2LMHeadModel(hf.GPT2Config(**words, bos_token_id=0, eos_token_id=1))
    encoder: Any = hf.ViTModel(hf.ViTConfig(**VISION))
    return hf.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder).eval()


WHOLES: dict[str, tuple[Callable[[], Any], str]] = {
    "vision-language": (llava, "model.vision_tower"),
    "encoder-decoder": (captioner, "encoder"),
}


@pytest.fixture(params=WHOLES)
def whole(request: pytest.FixtureRequest) -> tuple[Any, str]:
    """A larger model, pruned and calibrated, and the path of its part."""
    torch.manual_seed(0)
    build, path = WHOLES[request.param]
    model = build()
    part = vitprune.prune_(model.get_submodule(path), vitprune.PruningSpec(before_blocks=[1, 3]))
    vitprune.calibrate(part, [tiny.images(8)], 0.7, progress=False)
    return model, path


@torch.no_grad()
def seen(model: Any, path: str) -> torch.Tensor:
    return model.get_submodule(path)(tiny.images(2)).last_hidden_state


@pytest.mark.parametrize("own", [False, True], ids=["save_pretrained", "vitprune.save"])
def test_it_comes_back_pruned(whole: tuple[Any, str], tmp_path: Path, own: bool) -> None:
    model, path = whole
    if own:
        vitprune.save(model, tmp_path / "saved")
    else:
        model.save_pretrained(tmp_path / "saved")
    back = type(model).from_pretrained(tmp_path / "saved").eval()
    assert is_pruned(back)
    assert_close(pruning_of(back).levels, pruning_of(model).levels, rtol=0, atol=0)
    assert pruning_of(back).before_blocks == pruning_of(model).before_blocks
    assert_close(seen(back, path), seen(model, path), rtol=0, atol=0)
    # and once more, from what came back
    back.save_pretrained(tmp_path / "again")
    assert_close(seen(type(model).from_pretrained(tmp_path / "again").eval(), path), seen(model, path), rtol=0, atol=0)


def test_what_is_found_after_it_was_saved_is_saved_too(whole: tuple[Any, str], tmp_path: Path) -> None:
    model, path = whole
    model.save_pretrained(tmp_path / "first")
    part = vitprune.restore_(model.get_submodule(path))
    vitprune.prune_(part, vitprune.PruningSpec(before_blocks=[2], thresholds=[0.1]))
    model.save_pretrained(tmp_path / "second")
    assert pruning_of(type(model).from_pretrained(tmp_path / "second")).before_blocks == (2,)


def test_a_copy_is_saved_alike(whole: tuple[Any, str], tmp_path: Path) -> None:
    model, _ = whole
    copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    assert is_pruned(type(model).from_pretrained(tmp_path / "copy"))


def test_a_restored_part_comes_back_dense(whole: tuple[Any, str], tmp_path: Path) -> None:
    model, path = whole
    model.save_pretrained(tmp_path / "pruned")
    vitprune.restore_(model.get_submodule(path))
    model.save_pretrained(tmp_path / "dense")
    assert not is_pruned(type(model).from_pretrained(tmp_path / "dense"))


def test_the_whole_is_refused_with_the_way_to_its_part() -> None:
    with pytest.raises(ValueError, match=r"vitprune\.prune_\(model\.model\.vision_tower, spec\)$") as refusal:
        vitprune.prune_(llava(), vitprune.PruningSpec())
    assert len(str(refusal.value)) < 400


class Peft(nn.Module):
    """As PEFT wraps a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> nn.Module:
        return self.base_model


class Parallel(nn.Module):
    """As DistributedDataParallel wraps a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.module = model


@pytest.mark.parametrize(
    ("wrapper", "way_out"), [(Peft, r"peft_model\.get_base_model\(\)"), (Parallel, r"model\.module")]
)
def test_a_wrapper_is_refused_with_the_way_inside(wrapper: Any, way_out: str) -> None:
    with pytest.raises(ValueError, match=f"pass the model that it wraps, {way_out}$"):
        vitprune.prune_(wrapper(tiny.build("vit")), vitprune.PruningSpec())


def test_a_part_is_found_with_and_without_a_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llava()
    spec = vitprune.PruningSpec(before_blocks=[1, 3], thresholds=[0.01, 0.02])
    part = vitprune.prune_(model.model.vision_tower, spec)
    expected = part(tiny.images(2)).last_hidden_state
    model.save_pretrained(tmp_path / "with")
    bare: Any = hf.AutoModel.from_pretrained(tmp_path / "with").eval()
    assert_close(bare.vision_tower(tiny.images(2)).last_hidden_state, expected, rtol=0, atol=0)
    bare.save_pretrained(tmp_path / "without")
    again: Any = hf.AutoModel.from_pretrained(tmp_path / "without").eval()
    assert_close(again.vision_tower(tiny.images(2)).last_hidden_state, expected, rtol=0, atol=0)


class Pair(PreTrainedModel):
    config_class = hf.ViTConfig

    def __init__(self, config: hf.ViTConfig) -> None:
        super().__init__(config)
        self.a, self.b = hf.ViTModel(config), hf.ViTModel(config)
        self.post_init()


def test_two_pruned_parts_are_not_saved_as_one(tmp_path: Path) -> None:
    model = Pair(hf.ViTConfig(**VISION))
    for part in (model.a, model.b):
        vitprune.prune_(part, vitprune.PruningSpec(before_blocks=[2], thresholds=[0.1]))
    with pytest.raises(ValueError, match=r"2 parts of Pair are pruned \(a, b\), .* can't be saved"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="can't be restored at once"):
        vitprune.restore_(model)
    vitprune.restore_(model.b)
    model.save_pretrained(tmp_path / "saved")
    assert not is_pruned(model.b)
    assert is_pruned(vitprune.restore_(model)) is False
