"""The quantizer plug-in: how plain `from_pretrained` brings a pruned model back.

transformers lets a quantizer change a model before its weights are loaded; ours prunes it, so that thresholds find
their place like any other weight. Imported while transformers itself is being imported: only from modules that are
ready by then, everything else when it is needed.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from vitprune.recipe.pruning_spec import FORMAT, METHOD, PruningSpec

# where weights wait that accelerate brings to the device that a model runs on
OFFLOADED = {"cpu", "disk"}


@register_quantization_config(METHOD)
class PruningConfig(QuantizationConfigMixin):
    """The entry `quantization_config` of a pruned checkpoint's config.json: a `PruningSpec` and a format number.

    part: path of the module that is pruned, where that is a part of a larger model.
    """

    def __init__(
        self, pruning: dict[str, Any], format: int = FORMAT, quant_method: str = METHOD, part: str = ""
    ) -> None:
        if format not in (1, FORMAT):
            raise ValueError(
                f"config.json: quantization_config.format is {format}, this vitprune reads up to {FORMAT}; "
                "install the version of vitprune that the checkpoint's model card names"
            )
        if format == 1:
            _require_readable(pruning)
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue] — an enum of their own methods
        self.format = format
        self.pruning = pruning
        self.part = part


def _require_readable(pruning: dict[str, Any]) -> None:
    """Raise ValueError for a checkpoint of format 1 whose thresholds would mean something else now."""
    by_redundancy = pruning.get("score") == "redundancy" and pruning.get("select") in ("threshold", "top-k")
    if by_redundancy or pruning.get("dropped") == "fuse":
        what = "score 'redundancy' in its first form" if by_redundancy else "dropped: fuse, which is gone"
        raise ValueError(
            f"config.json: quantization_config is of format 1, with {what}; prune the dense model again with "
            "`vitprune apply` and the checkpoint's recipe.yaml, or load the weights dense, without `import vitprune`"
        )


def _part_of(model: Any, path: str) -> Any:
    """The part that was pruned, also where the model was saved with a head and comes without, or the other way round.

    Raises ValueError, naming the part, where it isn't there.
    """
    if path and path == model.base_model_prefix and not hasattr(model, path):
        return model
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    for there in (path, path.removeprefix(prefix), f"{prefix}{path}"):
        try:
            return model.get_submodule(there)
        except AttributeError:
            continue
    raise ValueError(
        f"config.json says that part {path!r} is pruned, and {type(model).__name__} has no such part; load it as the "
        "class that it was saved from (`architectures`)"
    )


@register_quantizer(METHOD)
class PruningQuantizer(HfQuantizer):
    """Prunes the empty model before its weights come in."""

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise ValueError where the model is to run on several devices: what a forward knows of tokens is on one."""
        places = device_map.values() if isinstance(device_map, dict) else ()
        devices = sorted({str(place) for place in places} - OFFLOADED)
        if len(devices) > 1:
            raise ValueError(
                f"device_map spreads the model over {', '.join(devices)}, but a pruned model runs on one device; "
                "name that one, as in device_map='cuda:0'"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from vitprune.models.hooks import SUBMODULE
        from vitprune.models.prune import prune_

        if self.pre_quantized:
            entry = vars(self.quantization_config)
            prune_(_part_of(model, entry["part"]), PruningSpec.model_validate(entry["pruning"], strict=False))
            # thresholds live near 1/N: half precision would move them
            model._keep_in_fp32_modules_strict.add(SUBMODULE)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Raise ValueError where thresholds weren't in the checkpoint: transformers leaves memory as it was there."""
        from vitprune.models.module import is_pruned, pruning_of

        if is_pruned(model):
            pruning = pruning_of(model)
            tensors = (*pruning.named_parameters(), *pruning.named_buffers())
            # by which transformers knows what came from the checkpoint
            there = {name for name, tensor in tensors if getattr(tensor, "_is_hf_initialized", False) or tensor.is_meta}
            lacking = [name for name, _ in tensors if name not in there]
            if lacking:
                raise ValueError(
                    f"config.json says that the checkpoint is pruned, but its weights lack {', '.join(lacking)}; it "
                    "was saved without `import vitprune`: take the entry `quantization_config` out of config.json to "
                    "load it dense, or save the pruned model again"
                )
        # nothing is quantized: .half() and .float() are as free as on a model fresh from prune_
        model.is_quantized = False
        return model

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] — declared without a type
        """A pruned model saves like any other."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
        """Trainer may train it."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """All of it, not only adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Nothing here forbids it."""
        return True
