"""A model's parts, found without a path into its modules, and what they cost."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from vitprune.models.detection import detect, find_backbone, find_blocks
from vitprune.models.families import FAMILIES, Family, Stem, attention_of_timm, supported
from vitprune.pruning.costs import CostModel
from vitprune.recipe.errors import RecipeError
from vitprune.recipe.schema import PruningSpec

# pixel values, or all that a backbone takes by name
Inputs = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Structure:
    """The parts of one model that pruning touches or counts.

    backbone: the innermost module whose forward takes the image.
    blocks: the transformer blocks in order.
    final_norm: behind its output the dense sequence comes back; the last block where there is none.
    pooling, inner: as in `Family`.
    is_generic: no entry names the model; its parts were found by looking.
    """

    model_type: str
    family: Family
    backbone: PreTrainedModel
    blocks: tuple[nn.Module, ...]
    final_norm: nn.Module
    pooling: nn.Module | None
    inner: nn.Module | None
    num_prefix_tokens: int
    has_class_token: bool
    cost: CostModel
    is_generic: bool = False

    def stages(self, spec: PruningSpec) -> tuple[int, ...]:
        """The blocks before which `spec` prunes.

        Raises:
            ValueError: a stage outside the blocks, or a score that the model can't give.
        """
        if spec.score == "head-weighted-class-attention" and not self.has_class_token:
            text = (
                f"is 'head-weighted-class-attention', but {type(self.backbone).__name__} has no class token; "
                "use 'head-weighted-mean-attention' or 'redundancy'"
            )
            raise RecipeError.at(("pruning", "score"), text)
        return spec.stages(len(self.blocks))


def _unsupported(model: nn.Module, why: str = "is no plain ViT") -> ValueError:
    kind = f" (model type '{model.config.model_type}')" if isinstance(model, PreTrainedModel) else ""
    return ValueError(f"{type(model).__name__}{kind} {why}; {_nearest(model) or f'supported are {supported()}'}")


def _nearest(model: nn.Module) -> str | None:
    """What near a model can be pruned."""
    if not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):
            return "pass the model that it wraps, peft_model.get_base_model()"
        inside = next((name for name, part in model.named_children() if isinstance(part, PreTrainedModel)), None)
        if inside is not None:
            return f"pass the model that it wraps, model.{inside}"
        if type(model).__module__.startswith("timm."):
            return "load it as TimmWrapperForImageClassification.from_pretrained('timm/...'), of transformers"
        return None
    family = FAMILIES.get(model.config.model_type)
    if family is not None:
        return f"of this type {' and '.join(family.classes)} can be"
    for path, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and part.config.model_type in FAMILIES and part is not model:
            try:
                examine(part)
            except ValueError:
                continue
            return f"its {type(part).__name__} can be: vitprune.prune_(model.{path}, spec)"
    return None


def examine(model: nn.Module) -> Structure:
    """Find the parts of a model.

    Raises:
        ValueError: the model is no plain ViT that vitprune can prune; lists those that work.
    """
    if not isinstance(model, PreTrainedModel):
        raise _unsupported(model, "is no transformers model")
    backbone = find_backbone(model)
    family = FAMILIES.get(backbone.config.model_type)
    if family is None:
        return _dissect(model, backbone, _detected(model, backbone), is_generic=True)
    if {cls.__name__ for cls in type(model).__mro__}.isdisjoint(family.classes):
        raise _unsupported(model)
    if family.inner is not None:
        wrapped: Any = backbone.get_submodule(family.inner)
        if type(wrapped).__name__ != "VisionTransformer" or wrapped.attn_pool is not None:
            raise _unsupported(model, f"wraps timm's {type(wrapped).__name__}, no VisionTransformer that pools plainly")
        for block in wrapped.blocks:
            if attention_of_timm(block) is None:
                raise _unsupported(
                    model, f"wraps blocks of timm's {type(block).__name__} that don't attend once, plainly"
                )
    elif not family.has_interface and backbone.config._attn_implementation == "eager":
        raise ValueError(f"{type(model).__name__} has eager attention; load it with attn_implementation='sdpa'")
    return _dissect(model, backbone, family)


def _detected(model: PreTrainedModel, backbone: PreTrainedModel) -> Family:
    """The family of a model that no entry names, if what it costs is understood."""
    found = detect(model, backbone)
    if found is None:
        raise _unsupported(model)
    cost = _cost(found.twin, find_blocks(found.twin), *found.family.heads(found.twin))
    if cost.dense(found.patches, found.family.num_prefix_tokens(found.twin)) != found.macs:
        raise _unsupported(model, "works on its patches outside its blocks, too")
    return found.family


def first_image(inputs: Inputs) -> Inputs:
    return inputs[:1] if isinstance(inputs, Tensor) else {name: values[:1] for name, values in inputs.items()}


def run_on_images(model: nn.Module, inputs: Inputs) -> None:
    """Run the part of a model that sees images, its head included, for what hooks and traces learn from it."""
    assert isinstance(model, PreTrainedModel)
    sees: Any = find_backbone(model) if model.main_input_name == "input_ids" else model
    sees(**inputs) if isinstance(inputs, Mapping) else sees(inputs)


def count_tokens(structure: Structure, pixel_values: Tensor) -> int:
    """Tokens of an image in the first block, prefix included; the model and the image may be on the meta device."""
    seen: list[int] = []
    handle = structure.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[1]))
    try:
        structure.backbone(pixel_values)
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def count_patches(model: PreTrainedModel, image: tuple[int, int, int]) -> int:
    """Patches of an image of (channels, height, width)."""
    structure, first = examine(model), next(model.parameters())
    x_1CHW = torch.zeros(1, *image, dtype=first.dtype, device=first.device)
    return count_tokens(structure, x_1CHW) - structure.num_prefix_tokens


def channels(model: PreTrainedModel) -> int:
    """Of the images that a model takes."""
    backbone = examine(model).backbone
    first = (module.in_channels for module in backbone.modules() if isinstance(module, nn.Conv2d))
    return getattr(backbone.config, "num_channels", None) or next(first, 3)


def _dissect(
    model: PreTrainedModel, backbone: PreTrainedModel, family: Family, *, is_generic: bool = False
) -> Structure:
    """The parts of a model whose family is known."""
    path = family.blocks
    blocks = find_blocks(backbone) if path is None else tuple(backbone.get_submodule(path).children())
    assert blocks, f"{type(backbone).__name__} declares no block class"
    # some models have these or not, as their config says
    modules = dict(backbone.named_modules())
    final_norm = None if family.final_norm is None else modules.get(family.final_norm)
    prefix = family.num_prefix_tokens(backbone)
    read = None if family.reads_patches(model) else prefix
    return Structure(
        model_type=backbone.config.model_type,
        family=family,
        backbone=backbone,
        blocks=blocks,
        final_norm=final_norm or blocks[-1],
        pooling=None if family.pooling is None else modules.get(family.pooling),
        inner=backbone.get_submodule(family.inner) if family.inner is not None else None,
        num_prefix_tokens=prefix,
        has_class_token=family.has_class_token(backbone),
        cost=_cost(model, blocks, *family.heads(backbone), read, family.stem(backbone)),
        is_generic=is_generic,
    )


def _cost(
    model: PreTrainedModel,
    blocks: tuple[nn.Module, ...],
    heads: int,
    head_width: int,
    read: int | None = None,
    stem: Stem | None = None,
) -> CostModel:
    """Linear layers inside blocks work on every token. Outside, embeddings and the keys and values of a pooling head
    work on every patch, other linear layers once an image. A text tower isn't counted.
    """
    patch, head = 0 if stem is None else _stem_macs(stem) / stem.patches, 0
    inside = {id(module) for part in (*blocks, *(() if stem is None else (stem.module,))) for module in part.modules()}
    for name, module in model.named_modules():
        if id(module) in inside or name.startswith("text_"):
            continue
        match module:
            case nn.Conv2d() | nn.Conv3d():
                patch += module.weight.numel()
            case nn.Linear() if "embeddings." in name:
                patch += module.weight.numel()
            case nn.Linear():
                head += module.weight.numel()
            case nn.MultiheadAttention():
                head += module.embed_dim**2
                patch += 2 * module.embed_dim**2 + 2 * module.embed_dim
    return CostModel(
        linear=tuple(_linear_macs(block) for block in blocks),
        width=heads * head_width,
        head_width=head_width,
        patch=patch,
        head=head,
        read=read,
        projections=0 if read is None else 3 * heads * head_width * _hidden_size(blocks[-1]),
    )


def _stem_macs(stem: Stem) -> int:
    """Of one image, counted on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(stem.module).to("meta").eval()(torch.empty(1, *stem.image, device="meta"))
    return counter.get_total_flops() // 2


def _hidden_size(block: nn.Module) -> int:
    return next(module.in_features for module in block.modules() if isinstance(module, nn.Linear))


def _linear_macs(block: nn.Module) -> int:
    return sum(module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear))


def require_images(checkpoint: str, structure: Structure) -> None:
    """Raise ValueError for a model that a recipe can't feed."""
    if structure.family.media != "images":
        raise ValueError(
            f"{checkpoint}: {type(structure.backbone).__name__} takes {structure.family.media}, and "
            "recipes read images; use the Python API: prune_, calibrate and a training loop of your own"
        )
