"""`prune_(model, spec)` and `restore_(model)`: the only place that changes a model.

A pruned model is the same modules under the same names, plus one submodule `vitprune` that holds what is learned, and
hooks: on the backbone (one forward begins and ends), on each block (tokens leave behind it), on the final norm (the
dense sequence comes back), on an attention pooling, on stochastic depth, and on a model whose head reads few tokens.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from vitprune.models.block import NAME
from vitprune.models.hooks import SUBMODULE, Begin, attach
from vitprune.models.module import Pruning, as_config, is_pruned, pruning_of, quantization_method
from vitprune.models.structure import examine, find_backbone
from vitprune.recipe.pruning_spec import METHOD, PruningSpec
from vitprune.recipe.values import as_spec

_TELLS = "tells_which_part_is_pruned"
_QUANTIZER_MARKS = ("hf_quantizer", "quantization_method", "is_quantized")


def prune_(model: PreTrainedModel, spec: PruningSpec | Mapping[str, Any]) -> PreTrainedModel:
    """Make a ViT drop tokens, in place.

    In eval mode tokens are removed. In train mode all tokens are masked, or, with `model.vitprune.execution =
    "packed"`, tokens are removed that no threshold learns from; frozen thresholds learn from none. Module names stay.
    With `thresholds: calibrated` everything is kept until `calibrate` has been called. Where the head reads nothing but
    prefix tokens, the last block computes no more than it needs for them. A forward with `output_hidden_states=True`
    gives dense sequences: a patch that left holds the state of the token that stands for
    it, or under `leave` the mean of the image's remaining patches.

    Raises:
        ValueError: a spec that says nothing sensible, no plain ViT, a stage outside its blocks, or already pruned.
    """
    if is_pruned(model):
        raise ValueError(f"{type(model).__name__} is pruned already; call vitprune.restore_(model) first")
    spec = as_spec(PruningSpec, spec)
    _require_plain(model)
    structure = examine(model)
    if Begin.of(structure.backbone) is not None:
        raise ValueError(
            f"{type(model).__name__} is part of a model that is pruned already; call vitprune.restore_ on it"
        )
    _own_config(model)
    _tell_when_saved()
    pruning = Pruning(spec, structure)
    device = next(model.parameters()).device
    owner = model if structure.inner is None else structure.inner
    owner.add_module(SUBMODULE, pruning if device.type == "meta" else pruning.to(device))
    attach(model, owner, structure)
    if structure.family.has_interface:
        set_attention(structure.backbone, NAME)
    tell_configs(model)
    return model


def _require_plain(model: nn.Module) -> None:
    """Raise ValueError for a model that is more than its weights: quantised, or asked for attention maps for good."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for config in configs:
        method = quantization_method(config)
        if method not in (None, METHOD):
            raise ValueError(
                f"{type(model).__name__} is quantised ({method}); prune the model that it "
                "was made from, and quantise afterwards"
            )
        if getattr(config, "output_attentions", False):
            raise ValueError(
                f"{type(model).__name__} is set to give out attention maps (output_attentions in its config), which a "
                "pruned model hasn't; set it to false"
            )


def _tell_when_saved() -> None:
    """Have every model say in its config, when it is saved, which part of it is pruned: no part knows its whole."""
    saves: Any = PreTrainedModel.save_pretrained
    if hasattr(saves, _TELLS):
        return

    @functools.wraps(saves)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if is_pruned(self):
            _require_one_part(self, "saved")
        tell_configs(self)
        if is_pruned(self):
            _require_savable(self)
        return saves(self, *args, **kwargs)

    setattr(save_pretrained, _TELLS, True)
    PreTrainedModel.save_pretrained = save_pretrained


def _require_one_part(model: PreTrainedModel, verb: str) -> None:
    """Raise ValueError for a model of which several parts are pruned."""
    parts = {id(begin.model) for begin in Begin.all_of(model)}
    if len(parts) > 1:
        paths = [path for path, module in model.named_modules() if id(module) in parts]
        raise ValueError(
            f"{len(parts)} parts of {type(model).__name__} are pruned ({', '.join(paths)}), and a model with more than "
            f"one can't be {verb}; call vitprune.restore_ on all but one of them"
        )


def _require_savable(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that would prune nothing, and for weights that a pruned checkpoint can't hold."""
    if pruning_of(model).is_forgotten:
        raise ValueError(
            "the model's thresholds were never found, so it would prune nothing; call vitprune.calibrate(model, "
            "batches, budget) before it is saved, or vitprune.restore_(model) to save it dense"
        )
    for name, weight in model.named_parameters():
        if type(weight.data).__module__.startswith("torchao"):
            raise ValueError(
                f"{name} is quantised (torchao's {type(weight.data).__name__}), which a pruned checkpoint can't hold; "
                "save before quantize_, and call quantize_ again after loading; the quantised weights come out the same"
            )


def tell_configs(model: PreTrainedModel) -> None:
    """Write into a model's config how it is pruned, by which it comes back pruned; and into that of its tower.

    Of a larger model: which part of it is pruned, or that none is any more.
    """
    begin = Begin.of(model)
    if begin is None:
        if quantization_method(model.config) == METHOD:
            vars(model.config).pop("quantization_config")
        return
    path = next((path for path, module in model.named_modules() if module is begin.model), "")
    for config in (begin.model.config, find_backbone(begin.model).config):
        config.quantization_config = as_config(begin.pruning.spec)
    if path:
        model.config.quantization_config = as_config(begin.pruning.spec, path)


def _own_config(model: nn.Module) -> None:
    """Give a model configs of its own, since models that are made from one config object share it."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(vars(module).get("config"), PreTrainedConfig):
            vars(module)["config"] = copy.deepcopy(module.config, copies)


def set_attention(backbone: PreTrainedModel, name: str) -> None:
    """Have a model attend by an implementation.

    Also where layers have a config of their own, as those of an encoder that was put into a larger model.
    """
    backbone.set_attn_implementation(name)
    for module in backbone.modules():
        config: Any = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and config._attn_implementation != name:
            config._attn_implementation = name


def restore_(model: PreTrainedModel) -> PreTrainedModel:
    """Give back the dense model exactly, in place: `prune_` undone, weights as they are now.

    Raises:
        ValueError: the model isn't pruned, or several parts of it are.
    """
    pruning, begin = pruning_of(model), Begin.of(model)
    assert begin is not None
    _require_one_part(model, "restored at once")
    begin.remove()
    backbone = find_backbone(begin.model)
    if backbone.config._attn_implementation == NAME:
        set_attention(backbone, pruning.dense_attention)
    delattr(begin.owner, SUBMODULE)
    # also what from_pretrained left on a model that it brought back
    for config in (model.config, begin.model.config, backbone.config):
        vars(config).pop("quantization_config", None)
    for name in _QUANTIZER_MARKS:
        vars(model).pop(name, None)
    return model
