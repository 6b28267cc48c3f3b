"""What is known of each family of ViTs, and how a model's parts are found without a path into its modules.

A family is one entry of `FAMILIES`. Blocks come from transformers' own declaration (`_can_record_outputs`), so a
renamed list of layers changes nothing here. Leaves changing the model to `pruner`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from vitprune.cost import CostModel


@dataclass(frozen=True)
class Family:
    """What differs between plain ViTs.

    classes: the model classes that work; the last hidden state means one thing to all of them.
    num_prefix_tokens: class, distillation and register tokens, which are never pruned; the class token is the first.
    final_norm: attribute of the backbone behind which the dense sequence is wanted back.
    """

    classes: tuple[str, ...]
    num_prefix_tokens: Callable[[PreTrainedConfig], int]
    final_norm: str


FAMILIES = {
    "vit": Family(
        classes=("ViTForImageClassification", "ViTModel"),
        num_prefix_tokens=lambda config: 1,
        final_norm="layernorm",
    ),
    "deit": Family(
        classes=("DeiTForImageClassification", "DeiTForImageClassificationWithTeacher", "DeiTModel"),
        num_prefix_tokens=lambda config: 2,
        final_norm="layernorm",
    ),
    "dinov2": Family(
        classes=("Dinov2ForImageClassification", "Dinov2Model"),
        num_prefix_tokens=lambda config: 1,
        final_norm="layernorm",
    ),
}


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model that pruning touches or counts.

    backbone: the module whose forward takes the image and gives the last hidden state.
    blocks: the transformer blocks in order.
    """

    model_type: str
    backbone: PreTrainedModel
    blocks: tuple[nn.Module, ...]
    final_norm: nn.Module
    num_prefix_tokens: int
    cost: CostModel


def supported() -> str:
    """The model classes that work, for messages and docs."""
    return ", ".join(name for family in FAMILIES.values() for name in family.classes)


def examine(model: nn.Module) -> Anatomy:
    """Finds the parts of a model.

    Raises:
        ValueError: the model is no plain ViT that vitprune knows; lists those that work.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is no transformers model; supported are: {supported()}")
    model_type = model.config.model_type
    family = FAMILIES.get(model_type)
    names = {cls.__name__ for cls in type(model).__mro__}
    if family is None or names.isdisjoint(family.classes):
        raise ValueError(
            f"{type(model).__name__} (model type '{model_type}') is not a ViT that vitprune can prune; "
            f"supported are: {supported()}"
        )
    backbone = model.base_model
    assert isinstance(backbone, PreTrainedModel)
    blocks = find_blocks(backbone)
    return Anatomy(
        model_type=model_type,
        backbone=backbone,
        blocks=blocks,
        final_norm=backbone.get_submodule(family.final_norm),
        num_prefix_tokens=family.num_prefix_tokens(model.config),
        cost=_cost(model, blocks),
    )


def find_blocks(backbone: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The blocks in order: instances of the class that the model records hidden states from."""
    declared = next(
        (m._can_record_outputs for m in backbone.modules() if isinstance(m, PreTrainedModel) and m._can_record_outputs),
        None,
    )
    block_class = (declared or {}).get("hidden_states")
    assert isinstance(block_class, type), f"{type(backbone).__name__} declares no block class"
    return tuple(module for module in backbone.modules() if isinstance(module, block_class))


def _cost(model: PreTrainedModel, blocks: tuple[nn.Module, ...]) -> CostModel:
    """Linear layers inside blocks work on every token; those outside once an image; the convolution on every patch."""
    inside = {id(module) for block in blocks for module in block.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    config = model.config
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return CostModel(
        linear=tuple(_linear_macs(list(block.modules())) for block in blocks),
        width=heads * head_width,
        head_width=head_width,
        patch=sum(m.weight.numel() for m in outside if isinstance(m, nn.Conv2d)),
        head=_linear_macs(outside),
    )


def _linear_macs(modules: list[nn.Module]) -> int:
    return sum(module.weight.numel() for module in modules if isinstance(module, nn.Linear))
