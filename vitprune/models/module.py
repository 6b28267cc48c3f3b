"""What a pruned model holds beyond the dense one: its thresholds, and the policy of its forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vitprune.models.structure import Structure
from vitprune.pruning.costs import Costs
from vitprune.pruning.selection import Policy
from vitprune.recipe.pruning_spec import FORMAT, METHOD, OperatingPoint
from vitprune.recipe.schema import Execution, PruningSpec

PUBLISHED_TEMPERATURE = 1e-4
# a threshold that keeps everything: what a stage has until it is calibrated
KEEPS_ALL = -torch.inf


class Pruning(nn.Module):
    """What a pruned model knows beyond the dense one: `model.vitprune`, with timm `model.timm_model.vitprune`.

    levels: parameter `thresholds` (stages,) for `select: threshold`, else buffer `keep_ratios` (stages,).
    temperatures: (stages,), τ of the straight-through gradient.
    execution: how it trains: `masked` as published, or `packed`, where tokens leave that no threshold learns from.
    latency: a measured table that the budget counts by, instead of MACs; isn't saved with the model.
    All tensors stay float32 whatever the model's dtype: thresholds live near 1/N.
    """

    temperatures: Tensor

    def __init__(self, spec: PruningSpec, structure: Structure) -> None:
        super().__init__()
        self.spec = spec
        self.before_blocks = structure.stages(spec)
        self.num_prefix_tokens = structure.num_prefix_tokens
        self.has_class_token = structure.has_class_token
        self.cost = structure.cost
        self.dense_attention = structure.backbone.config._attn_implementation or "sdpa"
        self.execution: Execution = "masked"
        self.latency: Costs | None = None
        self.was_warned = False  # that its thresholds learn without a budget
        self.was_looked_at = False  # whether they were ever found
        self._seen: tuple[Tensor, int, int, tuple[float, ...]] | None = None
        self._make_levels(torch.device("cpu"))

    def _make_levels(self, device: torch.device) -> None:
        """Those of the spec; where they are to be calibrated, such that everything stays."""
        spec, count = self.spec, len(self.before_blocks)
        if spec.select == "threshold":
            given = [self.keeps_all] * count if spec.thresholds == "calibrated" else list(spec.thresholds)
            self.thresholds = nn.Parameter(torch.tensor(given, dtype=torch.float32, device=device))
        else:
            given = [self.keeps_all] * count if spec.keep_ratios == "calibrated" else list(spec.keep_ratios)
            self.register_buffer("keep_ratios", torch.tensor(given, dtype=torch.float32, device=device))
        temperature = spec.temperature or PUBLISHED_TEMPERATURE
        self.register_buffer("temperatures", torch.full((count,), temperature, dtype=torch.float32, device=device))

    def settle(self, *, before_blocks: tuple[int, ...] | None = None, patches: int | None = None) -> None:
        """Take over what was found out about where to prune and at which image size; it is saved with the model.

        before_blocks: other stages than before begin with levels that keep everything. patches: of a dense image.
        """
        found: dict[str, object] = {} if patches is None else {"patches": patches}
        if before_blocks is not None and (before_blocks != self.before_blocks or self.spec.before_blocks == "auto"):
            found["before_blocks"] = before_blocks
        if found:
            self.adopt(self.spec.model_copy(update=found), before_blocks or self.before_blocks)

    def keep_points(self, points: tuple[OperatingPoint, ...] | None) -> None:
        """Take over the levels of several budgets in place of those that are there; None: they hold no longer."""
        if points != self.spec.points:
            self.spec = self.spec.model_copy(update={"points": points})

    def adopt(self, spec: PruningSpec, before_blocks: tuple[int, ...]) -> None:
        """Another spec in place of this one, which may prune before other blocks."""
        self.spec = spec
        if before_blocks != self.before_blocks:
            self.before_blocks = before_blocks
            self._make_levels(self.levels.device)

    @property
    def keeps_all(self) -> float:
        """The level at which a stage drops nothing."""
        return KEEPS_ALL if self.spec.select == "threshold" else 1.0

    @property
    def is_forgotten(self) -> bool:
        """Whether thresholds were to be calibrated and nobody did it, so that everything is kept."""
        spec = self.spec
        if spec.points:  # it may be turned to dropping nothing
            return False
        awaits = spec.select == "threshold" and spec.thresholds == "calibrated" and not self.levels.is_meta
        return awaits and bool((self.levels == KEEPS_ALL).all())

    @property
    def levels(self) -> Tensor:
        return self.get_parameter("thresholds") if self.spec.select == "threshold" else self.get_buffer("keep_ratios")

    def forward(self) -> Policy:
        """What one forward of the model needs to know; called as modules are, so that offloaded levels are there."""
        levels = self.levels
        return Policy(
            self.spec,
            self.before_blocks,
            self.num_prefix_tokens,
            self.has_class_token,
            self.cost,
            levels,
            self.temperatures,
            self.latency,
            lambda: self._known(levels),  # as they are now: what is offloaded is gone afterwards
        )

    def _known(self, levels: Tensor) -> tuple[float, ...]:
        """Levels as numbers, without waiting for a device whose levels were read before.

        A change through `.data` isn't seen there. Of thresholds that costs time only: stages run by what is on the
        device, and levels by which a stage would be left out are read again.
        """
        if levels.is_cpu or levels.is_inference():  # no wait, or no count of changes
            return tuple(levels.tolist())
        seen = self._seen  # other threads may run the model, too
        if seen is None or seen[0] is not levels or seen[1:3] != _state_of(levels):
            seen = levels, *_state_of(levels), tuple(levels.tolist())
        are_read_again = any(level < 0 if self.spec.select == "threshold" else level >= 1 for level in seen[3])
        self._seen = None if are_read_again else seen
        return seen[3]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Pruning:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        return f"{self.spec.score}, {self.spec.select}, {self.spec.dropped}, before blocks {self.before_blocks}"


def _state_of(x: Tensor) -> tuple[int, int]:
    """Where a tensor lies and how often it was written to."""
    return x.data_ptr(), x._version


def as_config(spec: PruningSpec, part: str = "") -> dict[str, object]:
    """The entry of a config.json that `hf_plugin` reads when the model comes back through `from_pretrained`.

    part: path of the module that is pruned, where that is a part of a larger model.
    """
    unused = {"points"} if spec.points is None else None  # which earlier versions don't know
    entry = {"quant_method": METHOD, "format": FORMAT, "pruning": spec.model_dump(mode="json", exclude=unused)}
    return {**entry, "part": part} if part else entry


def spec_of(config: PreTrainedConfig) -> PruningSpec | None:
    """How the model of a config is pruned; None for a dense one."""
    if quantization_method(config) != METHOD:
        return None
    entry: Any = config.quantization_config
    return PruningSpec.model_validate(entry["pruning"] if isinstance(entry, dict) else entry.pruning, strict=False)


def quantization_method(config: PreTrainedConfig) -> str | None:
    """By what name a config says that its model is more than plain weights: `METHOD` of a pruned one."""
    entry: Any = getattr(config, "quantization_config", None)
    method = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
    return None if entry is None else str(getattr(method, "value", method))


@dataclass(frozen=True)
class Levels:
    """What a `Pruning` has learned: where it prunes, levels and temperatures, (stages,) float32 each.

    patches: of a dense image they were found at, where they depend on it. points: of other budgets.
    """

    before_blocks: tuple[int, ...]
    levels: Tensor
    temperatures: Tensor
    patches: int | None = None
    points: tuple[OperatingPoint, ...] | None = None

    @classmethod
    def of(cls, pruning: Pruning) -> Levels:
        levels, temperatures = pruning.levels.detach().cpu().clone(), pruning.temperatures.cpu().clone()
        return cls(pruning.before_blocks, levels, temperatures, pruning.spec.patches, pruning.spec.points)

    @classmethod
    def from_lists(cls, lists: Mapping[str, Any]) -> Levels:
        """Of what `to_lists` gave, exactly."""
        levels, temperatures = (torch.tensor(lists[name], dtype=torch.float32) for name in ("levels", "temperatures"))
        points = tuple(OperatingPoint.model_validate(point) for point in lists.get("points", ())) or None
        return cls(tuple(lists["before_blocks"]), levels, temperatures, lists["patches"], points)

    def to_lists(self) -> dict[str, Any]:
        numbers = {"levels": self.levels.tolist(), "temperatures": self.temperatures.tolist()}
        points = [point.model_dump(mode="json") for point in self.points or ()]
        return {"before_blocks": list(self.before_blocks), "patches": self.patches, **numbers, "points": points}

    @torch.no_grad()
    def give(self, pruning: Pruning) -> None:
        """Make them those of `pruning`."""
        pruning.settle(before_blocks=self.before_blocks, patches=self.patches)
        pruning.keep_points(self.points)
        pruning.levels.copy_(self.levels)
        pruning.temperatures.copy_(self.temperatures)


@contextmanager
def all_or_nothing(pruning: Pruning) -> Iterator[None]:
    """Give a `Pruning` back what it knew, where what is done to it within breaks off."""
    spec, known = pruning.spec, Levels.of(pruning)
    try:
        yield
    except BaseException:
        pruning.adopt(spec, known.before_blocks)
        with torch.no_grad():
            pruning.levels.copy_(known.levels)
            pruning.temperatures.copy_(known.temperatures)
        raise


def pruning_of(model: nn.Module) -> Pruning:
    """Find the `Pruning` of a model, also of one that is wrapped for distributed training, or by PEFT.

    Raises:
        ValueError: the model isn't pruned.
    """
    found = next((found for module in model.modules() if (found := in_force(module)) is not None), None)
    if found is None:
        raise not_pruned(model)
    return found


def not_pruned(model: nn.Module) -> ValueError:
    """What to raise for a model that should be."""
    return ValueError(f"{type(model).__name__} isn't pruned; call vitprune.prune_(model, spec) first")


def in_force(module: nn.Module) -> Pruning | None:
    """The `Pruning` that a module is, or that PEFT has put into its place to train it; None for any other module."""
    if isinstance(module, Pruning):
        return module
    original = module._modules.get("original_module")
    if not isinstance(original, Pruning):
        return None
    wrapper: Any = module  # peft.utils.ModulesToSaveWrapper: a copy for each adapter
    active = [] if wrapper.disable_adapters else wrapper.active_adapters
    return wrapper.modules_to_save[active[0]] if active else original


def is_pruned(model: nn.Module) -> bool:
    return any(isinstance(module, Pruning) for module in model.modules())
