"""Where each kind of model keeps its answer."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from tiny import Tolerance
from torch.nn import functional as F
from torch.testing import assert_close

from vitprune.measure.outputs import ImageModel, is_two_towers

EXACT = Tolerance(rtol=0.0, atol=0.0)
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("vit", "logits"),
        ("deit-teacher", "logits"),
        ("siglip", "logits"),
        ("clip-tower", "image_embeds"),
        ("siglip-tower", "pooler_output"),
        ("dinov3", "pooler_output"),
    ],
)
@torch.no_grad()
def test_the_answer_is_the_models_own(family: str, name: str) -> None:
    model, x = tiny.build(family), tiny.images(2)
    answers = ImageModel(model)
    assert_close(answers(x), model(x)[name], **EXACT)
    assert (answers.kind.name == "single-label") == (name == "logits")


@torch.no_grad()
def test_without_class_token_and_pooler_it_is_the_mean() -> None:
    model: Any = tiny.build("ijepa")
    backbone = model.ijepa
    backbone.pooler = None
    assert_close(ImageModel(backbone)(tiny.images(2)), backbone(tiny.images(2)).last_hidden_state.mean(1), **EXACT)


@pytest.mark.parametrize("family", ["clip-zero-shot", "siglip-zero-shot"])
@torch.no_grad()
def test_zero_shot_logits_are_those_of_the_two_towers(family: str) -> None:
    model: Any = tiny.build(family)
    assert is_two_towers(model)
    x, tokens = tiny.images(2), torch.tensor([[0, 5, 6, 1], [0, 7, 1, 1], [0, 8, 9, 1]])
    expected = model(pixel_values=x, input_ids=tokens).logits_per_image
    classes_CE = F.normalize(model.get_text_features(input_ids=tokens).pooler_output, dim=-1)
    answers = ImageModel(model, classes_CE)
    assert answers.kind.name == "single-label"
    assert_close(answers(x), expected, **FLOAT32)
    assert ImageModel(model).kind.name == "embedding"


def test_the_classes_are_no_part_of_a_checkpoint() -> None:
    answers = ImageModel(tiny.build("clip-zero-shot"), torch.ones(3, 12))
    assert "classes_CE" not in answers.state_dict()
    assert ImageModel.of(answers) is answers


def test_a_wrapper_is_refused_with_the_way_to_the_model() -> None:
    with pytest.raises(TypeError, match=r"Sequential is no model of transformers.*peft_model\.get_base_model\(\)"):
        ImageModel.of(torch.nn.Sequential(tiny.build("vit")))
