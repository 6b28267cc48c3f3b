"""What is found in models of each family, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from typing import Any

import pytest
import tiny
import transformers as hf
from suite import FLOAT32
from torch import nn
from torch.testing import assert_close
from transformers import (
    CLIPConfig,
    CLIPModel,
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

import vitprune
from vitprune.models import families, structure
from vitprune.models.families import FAMILIES, supported
from vitprune.models.structure import examine
from vitprune.pruning.costs import CostModel
from vitprune.recipe.schema import PruningSpec

D, H, BLOCKS, LABELS = 48, 4, 6, 5
PATCH = 3 * 4 * 4 * D

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)

# by hand: q, k, v and output projection, then the MLP
MLP = 2 * D * 96
PLAIN = 4 * D * D + MLP
# SwiGLU's width is 2/3 of the MLP's, rounded up to a multiple of 8: 64; in comes twice of it
SWIGLU = 4 * D * D + D * 2 * 64 + 64 * D
# of 8 × 8 pixels in two frames
TUBE = 3 * 2 * 8 * 8 * D
# keys and values of each patch, and what the probe makes of them; query and output projection once, then the MLP
POOLED_PATCH = PATCH + 2 * D * D + 2 * D
POOLING = 2 * D * D + MLP
# to the width that text and images share
PROJECTION = D * 12
CLASSIFIER = D * LABELS
# linear layers for each token, embedding (and keys and values of a pooling) for each patch, the rest once an image
COSTS = {
    "vit": (PLAIN, PATCH, CLASSIFIER),
    "vit-bare": (PLAIN, PATCH, D * D),  # the pooler
    "deit": (PLAIN, PATCH, CLASSIFIER),
    "deit-teacher": (PLAIN, PATCH, 2 * CLASSIFIER),
    "dinov2": (PLAIN, PATCH, 2 * CLASSIFIER),  # class token and mean of the patches
    "dinov2-swiglu": (SWIGLU, PATCH, 2 * CLASSIFIER),
    "vit-msn": (PLAIN, PATCH, CLASSIFIER),
    "dinov2-registers": (PLAIN, PATCH, 2 * CLASSIFIER),
    "dinov3": (PLAIN, PATCH, 0),
    "beit": (PLAIN, PATCH, CLASSIFIER),
    "beit-shared": (PLAIN, PATCH, 0),  # its pooler is a norm
    "data2vec": (PLAIN, PATCH, CLASSIFIER),
    "clip": (PLAIN, PATCH, CLASSIFIER),
    "clip-zero-shot": (PLAIN, PATCH, PROJECTION),
    "clip-tower": (PLAIN, PATCH, PROJECTION),
    "metaclip2": (PLAIN, PATCH, CLASSIFIER),
    "siglip": (PLAIN, POOLED_PATCH, POOLING + CLASSIFIER),
    "siglip-zero-shot": (PLAIN, POOLED_PATCH, POOLING),
    "siglip-tower": (PLAIN, POOLED_PATCH, POOLING),
    "siglip2": (PLAIN, POOLED_PATCH, POOLING + CLASSIFIER),
    "siglip2-tower": (PLAIN, POOLED_PATCH, POOLING),
    "ijepa": (PLAIN, PATCH, CLASSIFIER),
    "videomae": (PLAIN, TUBE, CLASSIFIER),
    "vivit": (PLAIN, TUBE, CLASSIFIER),
    "ast": (PLAIN, 4 * 4 * D, CLASSIFIER),  # sounds have one channel
}
# classifiers that read nothing but class and distillation token
READS_PREFIX = {"vit", "vit-msn", "deit", "deit-teacher", "vivit", "ast"}
# class, distillation and register tokens
PREFIX = {
    **dict.fromkeys(tiny.WITHOUT_CLASS_TOKEN, 0),
    **dict.fromkeys(("deit", "deit-teacher", "ast"), 2),
    **dict.fromkeys(("dinov2-registers", "dinov3"), 5),
}


@pytest.mark.parametrize("family", COSTS)
def test_costs_are_those_counted_by_hand(family: str) -> None:
    linear, patch, head = COSTS[family]
    expected = CostModel(linear=(linear,) * BLOCKS, width=D, head_width=D // H, patch=patch, head=head)
    if family in READS_PREFIX:
        expected = replace(expected, read=PREFIX.get(family, 1), projections=3 * D * D)
    assert examine(tiny.build(family)).cost == expected


def test_a_text_tower_is_not_counted() -> None:
    small, large = (
        CLIPModel(CLIPConfig(**{**tiny.CLIP, "text_config": {**tiny.CLIP["text_config"], "num_hidden_layers": n}}))
        for n in (1, 3)
    )
    assert examine(small).cost == examine(large).cost


def test_a_plain_vit_has_the_papers_twelve_d_squared() -> None:
    config = ViTConfig(**{**tiny.SHAPE, "intermediate_size": 4 * D})
    assert examine(ViTForImageClassification(config)).cost.linear == (12 * D * D,) * BLOCKS


@every_family
def test_blocks_are_found_in_order(family: str) -> None:
    model = tiny.build(family)
    structure = examine(model)
    order: list[nn.Module] = []
    for block in structure.blocks:
        block.register_forward_hook(lambda module, args, output: order.append(module))
    tiny.forward(model, tiny.inputs(family, 1))
    assert len(structure.blocks) == BLOCKS
    assert order == list(structure.blocks)


@every_family
def test_prefix_tokens_are_all_that_is_no_patch(family: str) -> None:
    model = tiny.build(family)
    structure = examine(model)
    sequence = structure.backbone(**tiny.inputs(family, 1)).last_hidden_state
    assert sequence.shape[1] == structure.num_prefix_tokens + tiny.PATCHES
    if family in COSTS:
        assert structure.num_prefix_tokens == PREFIX.get(family, 1)
    assert structure.has_class_token == (family not in tiny.WITHOUT_CLASS_TOKEN)


@every_family
def test_the_backbone_is_the_innermost_model_that_takes_images(family: str) -> None:
    backbone = examine(tiny.build(family)).backbone
    assert backbone.main_input_name in tiny.inputs(family, 1)
    inner = [m for m in backbone.modules() if isinstance(m, PreTrainedModel) and m is not backbone]
    assert not any(backbone.main_input_name in signature(m.forward).parameters for m in inner)


@every_family
def test_no_family_that_is_named_has_to_be_recognised(family: str) -> None:
    structure = examine(tiny.build(family))
    assert not structure.is_generic
    assert structure.family is FAMILIES[structure.model_type]


def test_every_supported_class_is_one_of_transformers() -> None:
    import transformers

    for family in FAMILIES.values():
        for name in family.classes:
            assert issubclass(getattr(transformers, name), PreTrainedModel)


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
    assert supported() in str(refusal.value) or "ViTForImageClassification and ViTModel can be" in str(refusal.value)


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


def test_a_family_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that no entry names, and whose head reads less than one would think."""
    monkeypatch.setattr(families, "FAMILIES", dict(FAMILIES))
    monkeypatch.setattr(structure, "FAMILIES", families.FAMILIES)

    class NovelConfig(hf.ViTConfig):
        model_type = "novel"

    class NovelForImageClassification(hf.ViTForImageClassification):
        config_class = NovelConfig

    novel = vitprune.Family(("NovelForImageClassification",), reads_patches=lambda model: False)
    vitprune.register_family("novel", novel)
    with pytest.raises(ValueError, match="'novel' is registered already"):
        vitprune.register_family("novel", novel)
    model = NovelForImageClassification(NovelConfig(**tiny.MLP)).eval()
    expected = model(tiny.images(2)).logits
    vitprune.prune_(model, PruningSpec(before_blocks=[2]))
    assert examine(model).family is novel
    assert_close(model(tiny.images(2)).logits, expected, **FLOAT32)
