"""Finds the parts of a model that its code doesn't name, and plain ViTs among models that no entry of `families` names.

Such a model is taken for a plain ViT where it declares its blocks as transformers' own models do and, run once on the
meta device (no weights, no work), gives every block and every attention one sequence of the same length, prefix tokens
first, and hands blocks nothing beside it.
"""

from __future__ import annotations

import copy
import inspect
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from vitprune.models import block, context
from vitprune.models.families import Family
from vitprune.pruning.attention import DenseAttention, StatsRequest
from vitprune.pruning.token_batch import TokenBatch

MOST_PREFIX_TOKENS = 16
CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")


def find_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The innermost module whose forward takes what the model's images come as."""

    def takes_images(module: PreTrainedModel) -> bool:
        name: Any = module.main_input_name
        return isinstance(name, str) and name != "input_ids" and name in inspect.signature(module.forward).parameters

    found = [module for module in model.modules() if isinstance(module, PreTrainedModel) and takes_images(module)]
    return found[-1] if found else model


def find_blocks(backbone: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The blocks in order: instances of the class that the model records hidden states from; none if it names none."""
    declared = next(
        (m._can_record_outputs for m in backbone.modules() if isinstance(m, PreTrainedModel) and m._can_record_outputs),
        None,
    )
    block_class = (declared or {}).get("hidden_states")
    if not isinstance(block_class, type):
        return ()
    return tuple(module for module in backbone.modules() if isinstance(module, block_class))


@dataclass(frozen=True)
class Recognised:
    """A plain ViT that no entry names.

    twin: a backbone of its make on the meta device. macs: the twin's multiply-accumulates for one image of so many
        patches.
    """

    family: Family
    twin: PreTrainedModel
    patches: int
    macs: int


def detect(model: PreTrainedModel, backbone: PreTrainedModel) -> Recognised | None:
    """What a model is that no entry of `FAMILIES` names; None for what is no plain ViT."""
    size, patch = (getattr(backbone.config, name, None) for name in ("image_size", "patch_size"))
    if not find_blocks(backbone) or not isinstance(size, int) or not isinstance(patch, int):
        return None
    if not type(model).__name__.endswith(("ForImageClassification", "Model")):
        return None
    seen = _look(backbone, size)
    if seen is None or len(seen.lengths) != 1:
        return None
    patches = (size // patch) ** 2
    prefix = min(seen.lengths) - patches
    if not 0 <= prefix <= MOST_PREFIX_TOKENS:
        return None
    family = Family(
        (type(model).__name__,),
        num_prefix_tokens=lambda _: prefix,
        final_norm=seen.final_norm,
        has_class_token=lambda found: prefix > 0 and _has_class_token(found),
    )
    return Recognised(family, seen.twin, patches, seen.macs)


def _has_class_token(backbone: PreTrainedModel) -> bool:
    return any(name.endswith(CLASS_TOKENS) for name, _ in backbone.named_parameters())


@dataclass
class _Look:
    """What one forward shows: tokens of an image in each block and attention, and the norm right behind the blocks."""

    twin: PreTrainedModel
    lengths: set[int] = field(default_factory=set)
    final_norm: str | None = None
    macs: int = 0


def _look(backbone: PreTrainedModel, image_size: int) -> _Look | None:
    """Run a model of that make on the meta device; None where it isn't run with one image."""
    with torch.device("meta"):
        twin = type(backbone)(copy.deepcopy(backbone.config)).eval()
        image = torch.empty(1, getattr(backbone.config, "num_channels", 3), image_size, image_size)
    twin.set_attn_implementation(block.NAME)
    look, calls, blocks = _Look(twin), list[DenseAttention](), find_blocks(twin)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # positions and masks that blocks are given would have to travel with their tokens
        alone = all(x is None or isinstance(x, bool) for x in (*args[1:], *kwargs.values()))
        sequence = args[0] if args and isinstance(args[0], Tensor) and args[0].ndim == 3 and alone else None
        look.lengths.add(0 if sequence is None else sequence.shape[1])
        calls.append(DenseAttention(TokenBatch.dense(1, 1, 0, torch.device("meta")), StatsRequest(metric=True)))
        context.attend_by(calls[-1])

    def normalise(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        behind = len(calls) == len(blocks) and look.final_norm is None
        if behind and isinstance(args[0], Tensor) and args[0].shape[:2] == (1, max(look.lengths)):
            look.final_norm = names[module]

    names = {module: name for name, module in twin.named_modules()}
    inside = {module for layer in blocks for module in layer.modules()}
    for layer in blocks:
        layer.register_forward_pre_hook(enter, with_kwargs=True)
    for module in names.keys() - inside:
        if "Norm" in type(module).__name__:
            module.register_forward_hook(normalise)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            copy_context().run(twin, image)
    except Exception:  # whatever a model of unknown make raises
        return None
    look.macs = counter.get_total_flops() // 2
    for call in calls:
        # windows of an image have as many keys in all; what their attention costs tells them apart
        metric_TK = call.stats.metric_TK
        look.lengths.add(0 if metric_TK is None else metric_TK.shape[0])
    return look
