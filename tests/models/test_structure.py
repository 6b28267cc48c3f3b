"""ViTs that no entry names are recognised by looking at them, and what is no plain ViT is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from tiny import Tolerance
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import PreTrainedModel
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer

import vitprune
from vitprune.models import context
from vitprune.models.families import FAMILIES
from vitprune.models.module import is_pruned, pruning_of
from vitprune.models.structure import channels, examine, find_backbone
from vitprune.recipe.schema import PruningSpec

EXACT = Tolerance(rtol=0.0, atol=0.0)
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-5)

MEAN = "head-weighted-mean-attention"
CLASS = "head-weighted-class-attention"


class NovelViTConfig(hf.ViTConfig):
    model_type = "novel_vit"


class NovelViTModel(hf.ViTModel):
    config_class = NovelViTConfig


class NovelViTForImageClassification(hf.ViTForImageClassification):
    config_class = NovelViTConfig

    def __init__(self, config: NovelViTConfig) -> None:
        super().__init__(config)
        self.vit = NovelViTModel(config, add_pooling_layer=False)
        self.post_init()


class NovelDeiTConfig(hf.DeiTConfig):
    model_type = "novel_deit"


class NovelDeiTForImageClassification(hf.DeiTForImageClassification):
    config_class = NovelDeiTConfig


class NovelRegistersConfig(hf.Dinov2WithRegistersConfig):
    model_type = "novel_registers"


class NovelRegistersModel(hf.Dinov2WithRegistersModel):
    config_class = NovelRegistersConfig


class NovelIJepaConfig(hf.IJepaConfig):
    model_type = "novel_ijepa"


class NovelIJepaForImageClassification(hf.IJepaForImageClassification):
    config_class = NovelIJepaConfig


# and their prefix tokens
NOVEL: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {
    "vit": (lambda: NovelViTForImageClassification(NovelViTConfig(**tiny.MLP)), 1),
    "vit-bare": (lambda: NovelViTModel(NovelViTConfig(**tiny.MLP)), 1),
    "deit": (lambda: NovelDeiTForImageClassification(NovelDeiTConfig(**tiny.MLP)), 2),
    "registers": (lambda: NovelRegistersModel(NovelRegistersConfig(**tiny.SHAPE, **tiny.REGISTERS)), 5),
    "ijepa": (lambda: NovelIJepaForImageClassification(NovelIJepaConfig(**tiny.MLP)), 0),
}
every_novelty = pytest.mark.parametrize("name", NOVEL)


def novel(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return NOVEL[name][0]().eval()


def spec_for(name: str, spec: PruningSpec) -> PruningSpec:
    has_class_token = NOVEL[name][1] > 0
    return spec if has_class_token or spec.score != CLASS else spec.model_copy(update={"score": MEAN})


@torch.no_grad()
def run(model: PreTrainedModel, x: Tensor) -> Tensor:
    return tiny.answer(model(x))


# --- a ViT that no entry names ---


@every_novelty
def test_a_novel_vit_is_recognised(name: str) -> None:
    model = novel(name)
    structure = examine(model)
    assert structure.is_generic
    assert structure.model_type not in FAMILIES
    assert structure.num_prefix_tokens == NOVEL[name][1]
    assert structure.has_class_token == (NOVEL[name][1] > 0)
    assert len(structure.blocks) == 6
    assert all(any(block is module for module in model.modules()) for block in structure.blocks)


@pytest.mark.parametrize(("name", "family"), [("vit", "vit"), ("vit-bare", "vit-bare"), ("deit", "deit")])
def test_a_novel_vit_costs_what_its_likeness_costs(name: str, family: str) -> None:
    # nobody knows what the head of a novel model reads
    assert examine(novel(name)).cost == replace(examine(tiny.build(family)).cost, read=None, projections=0)


@every_novelty
def test_looking_changes_nothing(name: str) -> None:
    model = novel(name)
    x = tiny.images(2)
    before = run(model, x), model.config.to_dict(), find_backbone(model).config._attn_implementation
    state = torch.get_rng_state()
    examine(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(run(model, x), before[0], **EXACT)
    assert (model.config.to_dict(), find_backbone(model).config._attn_implementation) == before[1:]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert context.current() == context.Context()


@every_novelty
@pytest.mark.parametrize("dropped", ["leave", "merge"])
def test_a_novel_vit_that_keeps_everything_is_the_dense_model(name: str, dropped: Any) -> None:
    spec = spec_for(name, PruningSpec(score=CLASS, before_blocks=[2, 4], dropped=dropped))
    model, x = vitprune.prune_(novel(name), spec), tiny.images(3)
    assert_close(run(model, x), run(novel(name), x), **FLOAT32)


@every_novelty
@pytest.mark.parametrize("policy", tiny.REPRESENTATIVE)
def test_in_a_novel_vit_an_image_does_not_see_its_batch(name: str, policy: str) -> None:
    model = vitprune.prune_(novel(name), spec_for(name, tiny.POLICIES[policy]))
    x = tiny.images(5)
    with vitprune.trace(model) as trace:
        together = run(model, x)
    assert_close(torch.cat([run(model, image) for image in x.split(1)]), together, **FLOAT32)
    assert not trace.keep_masks[-1].all(), "the policy drops nothing: this test would see nothing"


@pytest.mark.parametrize(("name", "family"), [("vit", "vit"), ("deit", "deit"), ("ijepa", "ijepa")])
@pytest.mark.parametrize("policy", tiny.REPRESENTATIVE)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_novel_vit_is_pruned_like_its_likeness(name: str, family: str, policy: str, mode: str) -> None:
    spec, x = spec_for(name, tiny.POLICIES[policy]), tiny.images(3)
    ours, theirs = novel(name), tiny.build(family)
    ours.load_state_dict(theirs.state_dict())
    results = [run(vitprune.prune_(model, spec).train(mode == "train"), x) for model in (ours, theirs)]
    assert_close(*results, **FLOAT32)


@every_novelty
def test_restoring_a_novel_vit_gives_back_the_dense_model_exactly(name: str) -> None:
    model, dense, x = novel(name), novel(name), tiny.images(2)
    vitprune.restore_(vitprune.prune_(model, spec_for(name, tiny.POLICIES["as-vit"])))
    assert_close(run(model, x), run(dense, x), **EXACT)
    assert list(model.state_dict()) == list(dense.state_dict())
    assert find_backbone(model).config._attn_implementation == find_backbone(dense).config._attn_implementation


@every_novelty
def test_a_novel_vit_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    model, x = vitprune.prune_(novel(name), spec_for(name, tiny.POLICIES["as-vit"])), tiny.images(2)
    back = type(model).from_pretrained(vitprune.save(model, tmp_path / "out"))
    assert_close(run(back, x), run(model, x), **EXACT)
    assert pruning_of(back).spec == pruning_of(model).spec


# --- what is no plain ViT ---


class PrivateAttention(ViTAttention):
    """Attends by itself, so that nobody can tell it who is there."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        return F.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states), None


class HalvingLayer(ViTLayer):
    """Gives out every second token."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states, *args, **kwargs)[:, ::2]


def tiny_video_mae() -> PreTrainedModel:
    decoder: dict[str, Any] = {
        "decoder_hidden_size": 24,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
    }
    return hf.VideoMAEForPreTraining(hf.VideoMAEConfig(**tiny.VIDEO, **decoder, decoder_intermediate_size=24))


STAGES: dict[str, Any] = {"num_channels": 3, "image_size": 32, "num_labels": 5}
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "Swin": lambda: hf.SwinForImageClassification(
        hf.SwinConfig(**STAGES, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    ),
    "Swin bare": lambda: hf.SwinModel(
        hf.SwinConfig(**STAGES, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    ),
    "Hiera": lambda: hf.HieraForImageClassification(
        hf.HieraConfig(image_size=[64, 64], embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2])
    ),
    "PVT": lambda: hf.PvtForImageClassification(
        hf.PvtConfig(image_size=64, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2])
    ),
    "LeViT": lambda: hf.LevitForImageClassification(
        hf.LevitConfig(image_size=64, hidden_sizes=[16, 16, 16], num_attention_heads=[1, 1, 1], depths=[1, 1, 1])
    ),
    "ConvNext": lambda: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, image_size=32)
    ),
    "BERT": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ),
    "SegFormer": lambda: hf.SegformerForImageClassification(
        hf.SegformerConfig(hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2])
    ),
    "VitDet": lambda: hf.VitDetModel(
        hf.VitDetConfig(**tiny.SHAPE, pretrain_image_size=32, window_size=4, window_block_indices=[0, 2])
    ),
    "SAM": lambda: hf.SamVisionModel(
        hf.SamVisionConfig(**tiny.SHAPE, output_channels=8, window_size=4, global_attn_indexes=[2], mlp_dim=96)
    ),
    "a random part of the patches": lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**tiny.MLP)),
    "masked images": lambda: hf.ViTForMaskedImageModeling(hf.ViTConfig(**tiny.MLP, encoder_stride=4)),
    "masked videos": tiny_video_mae,
    "no transformers model": lambda: nn.Linear(2, 2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_vit_is_refused_with_a_list_of_what_works(name: str) -> None:
    model = REFUSED[name]()
    with pytest.raises(ValueError, match=f"^{type(model).__name__} ") as refusal:
        vitprune.prune_(model, PruningSpec())  # type: ignore[arg-type]
    text = str(refusal.value)
    assert len(text) < 400
    family = FAMILIES.get(model.config.model_type) if isinstance(model, PreTrainedModel) else None
    if family is None:
        assert text.endswith(f"; supported are ViTs of the model types {', '.join(FAMILIES)}")
    else:
        assert text.endswith(f"; of this type {' and '.join(family.classes)} can be")
    assert not is_pruned(model)


@pytest.mark.parametrize("name", ["Swin", "VitDet", "SAM"])
def test_a_refused_model_is_as_it_was(name: str) -> None:
    model = REFUSED[name]()
    assert isinstance(model, PreTrainedModel)
    before = model.config.to_dict(), model.config._attn_implementation
    with pytest.raises(ValueError, match=r"supported are|can be"):
        examine(model)
    assert (model.config.to_dict(), model.config._attn_implementation) == before


class NovelHalvingModel(NovelViTModel):
    """A pyramid of ViT layers."""

    def __init__(self, config: NovelViTConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.layers[2] = HalvingLayer(config)


class NovelPrivateModel(NovelViTModel):
    def __init__(self, config: NovelViTConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        for layer in self.layers:
            layer.attention = PrivateAttention(config)


class NovelManyPrefixModel(NovelRegistersModel):
    """More tokens that are no patches than any ViT has."""


class NovelRegressionForDepth(NovelViTForImageClassification):
    """A ViT with a head that nobody knows."""


@pytest.mark.parametrize(
    "build",
    [
        lambda: NovelHalvingModel(NovelViTConfig(**tiny.MLP)),
        lambda: NovelPrivateModel(NovelViTConfig(**tiny.MLP)),
        lambda: NovelManyPrefixModel(NovelRegistersConfig(**tiny.SHAPE, num_register_tokens=40)),
        lambda: NovelRegressionForDepth(NovelViTConfig(**tiny.MLP)),
    ],
    ids=["pyramid", "attention of its own", "forty registers", "another head"],
)
def test_a_novel_model_that_is_no_plain_vit_is_refused(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    with pytest.raises(ValueError, match=f"^{type(model).__name__} .model type 'novel_.* supported are "):
        examine(model)


# --- what a model can't be asked for ---


@pytest.mark.parametrize("family", sorted(tiny.WITHOUT_CLASS_TOKEN))
def test_without_a_class_token_its_attention_is_no_score(family: str) -> None:
    model = tiny.build(family)
    backbone = type(find_backbone(model)).__name__
    with pytest.raises(ValueError, match=f"{backbone} has no class token.*use '{MEAN}' or 'redundancy'") as refusal:
        vitprune.prune_(model, PruningSpec(score=CLASS))
    assert f"'{CLASS}'" in str(refusal.value)
    assert not is_pruned(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["vit", "clip", "siglip"])
def test_a_stage_outside_the_blocks_is_named(family: str) -> None:
    structure = examine(tiny.build(family))
    assert structure.stages(PruningSpec(before_blocks=[1, 5])) == (1, 5)
    with pytest.raises(ValueError, match=r"before_blocks: stage 6 is outside the model's 6 blocks \(1 to 5\)"):
        structure.stages(PruningSpec(before_blocks=[2, 6]))


def test_data2vec_needs_fused_attention() -> None:
    config = hf.Data2VecVisionConfig(**tiny.BEIT)
    config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="Data2VecVisionModel has eager attention; load it with attn_implementation"):
        examine(hf.Data2VecVisionModel(config))


def test_channels_are_the_configs_or_the_first_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    grey = hf.ViTForImageClassification(hf.ViTConfig(**tiny.SHAPE, num_channels=1))
    assert (channels(tiny.build("dinov2")), channels(grey)) == (3, 1)
    untold: Any = nn.Sequential(nn.Conv2d(4, 8, 2), nn.Conv2d(8, 8, 2))  # as timm's, whose configs don't say it
    untold.config = SimpleNamespace()
    monkeypatch.setattr("vitprune.models.structure.examine", lambda model: SimpleNamespace(backbone=model))
    assert channels(untold) == 4
