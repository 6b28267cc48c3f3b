"""What is found in models of each family, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

from vitprune.cost import CostModel
from vitprune.families import FAMILIES, examine, supported

D, H, BLOCKS, LABELS = 48, 4, 6, 5
PATCH = 3 * 4 * 4 * D

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)

# by hand: q, k, v and output projection, then the MLP
PLAIN = 4 * D * D + 2 * D * 96
# SwiGLU's width is 2/3 of the MLP's, rounded up to a multiple of 8: 64; in comes twice of it
SWIGLU = 4 * D * D + D * 2 * 64 + 64 * D
LINEAR_AND_HEAD = {
    "vit": (PLAIN, D * LABELS),
    "vit-bare": (PLAIN, D * D),  # the pooler
    "deit": (PLAIN, D * LABELS),
    "deit-teacher": (PLAIN, 2 * D * LABELS),
    "dinov2": (PLAIN, 2 * D * LABELS),  # class token and mean of the patches
    "dinov2-swiglu": (SWIGLU, 2 * D * LABELS),
}


@every_family
def test_costs_are_those_counted_by_hand(family: str) -> None:
    linear, head = LINEAR_AND_HEAD[family]
    expected = CostModel(linear=(linear,) * BLOCKS, width=D, head_width=D // H, patch=PATCH, head=head)
    assert examine(tiny.build(family)).cost == expected


def test_a_plain_vit_has_the_papers_twelve_d_squared() -> None:
    config = ViTConfig(**{**tiny.SHAPE, "intermediate_size": 4 * D})
    assert examine(ViTForImageClassification(config)).cost.linear == (12 * D * D,) * BLOCKS


@every_family
def test_blocks_are_found_in_order(family: str) -> None:
    model = tiny.build(family)
    anatomy = examine(model)
    order: list[nn.Module] = []
    for block in anatomy.blocks:
        block.register_forward_hook(lambda module, args, output: order.append(module))
    model(tiny.images(1))
    assert len(anatomy.blocks) == BLOCKS
    assert order == list(anatomy.blocks)


@every_family
def test_prefix_tokens_are_all_that_is_no_patch(family: str) -> None:
    model = tiny.build(family)
    anatomy = examine(model)
    assert anatomy.backbone is model.base_model
    sequence = anatomy.backbone(tiny.images(1)).last_hidden_state
    assert sequence.shape[1] == anatomy.num_prefix_tokens + tiny.PATCHES


def test_every_supported_class_is_one_of_transformers() -> None:
    import transformers

    for family in FAMILIES.values():
        for name in family.classes:
            assert issubclass(getattr(transformers, name), PreTrainedModel)
            assert name in supported()


class OwnViT(ViTForImageClassification):
    """A user's subclass of a class that works."""


def test_subclasses_of_supported_models_work() -> None:
    model = OwnViT(ViTConfig(**tiny.SHAPE, intermediate_size=96))
    assert len(examine(model).blocks) == BLOCKS


def tiny_swin() -> nn.Module:
    shape: dict[str, Any] = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
    return SwinForImageClassification(SwinConfig(image_size=16, patch_size=4, **shape))


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: nn.Linear(2, 2), "Linear"),
        (tiny_swin, "SwinForImageClassification"),
        (lambda: ViTForMaskedImageModeling(ViTConfig(**tiny.SHAPE, encoder_stride=4)), "ViTForMaskedImageModeling"),
    ],
    ids=["no transformers model", "no plain ViT", "another head"],
)
def test_refusals_name_the_model_and_list_what_works(build, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} ") as refusal:
        examine(build())
    for family in FAMILIES.values():
        assert all(supported_name in str(refusal.value) for supported_name in family.classes)


@pytest.mark.parametrize(
    "model",
    [
        lambda: ViTModel(ViTConfig(**tiny.SHAPE), add_pooling_layer=False),
        lambda: DeiTModel(DeiTConfig(**tiny.SHAPE), add_pooling_layer=False),
        lambda: Dinov2Model(Dinov2Config(**tiny.SHAPE)),
    ],
    ids=["vit", "deit", "dinov2"],
)
def test_bare_models_without_a_pooler_cost_nothing_behind_their_blocks(model) -> None:
    assert examine(model()).cost.head == 0
