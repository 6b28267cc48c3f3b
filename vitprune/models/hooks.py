"""The hooks of a pruned model: where a forward begins and ends. What happens at each block is in `block`.

Objects and functions, not closures, so that a copy of the model has hooks of its own. torch.compile leaves them alone:
how many tokens an image keeps is decided by their values.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from vitprune.models import context
from vitprune.models.block import NAME, BlockForward
from vitprune.models.module import Pruning, in_force, not_pruned
from vitprune.models.structure import Structure
from vitprune.models.trace import Trace
from vitprune.pruning.forward import Forward, PackedForward
from vitprune.pruning.learning.masked import MaskedForward
from vitprune.pruning.learning.packed import LearningForward
from vitprune.pruning.padded import PaddedForward
from vitprune.pruning.selection import Policy
from vitprune.recipe.pruning_spec import METHOD

SUBMODULE = METHOD
"""Name of the submodule that `prune_` adds."""


class Removable(Protocol):
    """What was hung on a model, and can be taken off."""

    def remove(self) -> None: ...


def attach(model: PreTrainedModel, owner: nn.Module, structure: Structure) -> None:
    """Hang all hooks on a model; `Begin.of(model).remove()` takes them off again. owner: has the submodule."""
    family, backbone = structure.family, structure.backbone
    norm = None if structure.final_norm in structure.blocks else structure.final_norm
    begin = Begin(model, owner, family.has_interface, structure.inner, norm)
    handles = begin.handles
    handles += [
        backbone.register_forward_pre_hook(begin, with_kwargs=True),
        backbone.register_forward_hook(_End(structure.inner), always_call=True),
        structure.final_norm.register_forward_hook(_Unpack(norms=structure.final_norm not in structure.blocks)),
    ]
    if structure.pooling is not None:
        handles.append(structure.pooling.register_forward_pre_hook(_pool_what_is_there, with_kwargs=True))
    # Data2Vec's encoder makes the table that all blocks share anew for each
    whole = {*backbone.modules()} - {backbone, *structure.blocks}
    around = [module for module in whole if structure.blocks[0] in module.modules()]
    handles += [module.register_forward_pre_hook(_interpolated_already, with_kwargs=True) for module in around]
    # transformers and timm have a class of that name for stochastic depth
    drops = (module for module in backbone.modules() if type(module).__name__.endswith("DropPath"))
    handles += [module.register_forward_hook(_drop_by_image) for module in drops]
    if structure.cost.read is not None:
        handles.append(model.register_forward_pre_hook(_begin_for_head, prepend=True, with_kwargs=True))
        handles.append(model.register_forward_hook(_end_for_head, always_call=True))
    told = {"intercept": not family.has_interface, "rope": family.rope, "pads": family.pads}
    handles += [BlockForward(block, index, **told).attach() for index, block in enumerate(structure.blocks)]


def pruned_part(model: nn.Module) -> PreTrainedModel:
    """What `prune_` was called on, inside whatever wraps it: PEFT, distributed training, a larger model.

    Raises:
        ValueError: the model isn't pruned.
    """
    begin = Begin.of(model)
    if begin is None:
        raise not_pruned(model)
    return begin.model


@torch.compiler.disable()
def _begin_for_head(module: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> None:
    wanted = kwargs.get("output_hidden_states")
    wanted = module.config.output_hidden_states if wanted is None else wanted
    context.change(for_head=not (wanted or context.current().whole_sequence))


@torch.compiler.disable()
def _end_for_head(module: nn.Module, args: Any, output: Any) -> None:
    context.change(for_head=False)


def make_forward(pruning: Pruning, *, training: bool, for_head: bool) -> Forward:
    """What carries a forward of the model out, by what it is asked for. for_head: as in `context.Context`."""
    asked, policy = context.current(), pruning()
    observers = tuple(t for t in asked.traces if isinstance(t, Trace) and t.pruning is pruning)
    if not observers and not pruning.was_looked_at:
        _warn_of_no_calibration(pruning)
    if training and not observers and policy.levels.requires_grad and torch.is_grad_enabled():
        _warn_of_no_budget(pruning)
    if training and pruning.execution == "masked":
        return MaskedForward(policy, observers)
    # with `whole_sequence` in eval mode what inference would execute is counted, as in training
    trains = training or asked.whole_sequence
    if trains and policy.levels.requires_grad and torch.is_grad_enabled():
        return LearningForward(policy, observers)
    return PackedForward(policy, observers, trains=trains, for_head=for_head)


def _exported(policy: Policy, *, training: bool, for_head: bool) -> PaddedForward:
    """What a graph is traced from, in which levels have no values: the exporter gave them beforehand."""
    if training:
        raise ValueError("a pruned model is exported as it is in inference; call model.eval() before")
    asked = context.current()
    known = None if asked.exporting is None else asked.exporting.levels
    if known is None and policy.spec.select != "threshold":
        raise ValueError(
            f"select: {policy.spec.select} keeps fixed numbers of tokens, which torch.export alone doesn't see; call "
            "vitprune.export(model, ...)"
        )
    # where thresholds aren't known, no stage is left out
    known = (math.nan,) * len(policy.before_blocks) if known is None else known
    forward = PaddedForward(replace(policy, read_levels=lambda: known), for_head=for_head)
    if asked.exporting is not None:
        asked.exporting.forward = forward
    return forward


def _warn_of_no_calibration(pruning: Pruning) -> None:
    pruning.was_looked_at = True
    if pruning.is_forgotten:
        warnings.warn(
            "nothing is pruned: the model's thresholds were never found; call vitprune.calibrate(model, batches, "
            "budget), or give thresholds in the PruningSpec",
            stacklevel=2,
        )


def _warn_of_no_budget(pruning: Pruning) -> None:
    if not pruning.was_warned:
        pruning.was_warned = True
        warnings.warn(
            "thresholds learn here from the loss alone, without a budget: add the costs of vitprune.trace to it, give "
            "Trainer a vitprune.TrainerCallback, or freeze them (vitprune.pruning_of(model).requires_grad_(False))",
            stacklevel=2,
        )


@dataclass(frozen=True, eq=False)
class Begin:
    """What the backbone begins with; it also remembers what `prune_` did.

    model: what was pruned. owner: has the submodule, in which another may stand by now, such as PEFT's. inner: its own
    gradient checkpointing would run the blocks' hooks twice, so the blocks do it. final_norm: None where a block is the
    last.
    """

    model: PreTrainedModel
    owner: nn.Module
    has_interface: bool
    inner: nn.Module | None
    final_norm: nn.Module | None = None
    handles: list[Removable] = field(default_factory=list)

    @staticmethod
    def of(model: nn.Module) -> Begin | None:
        """That of a model, or of the pruned part of a larger one."""
        return next(Begin.all_of(model), None)

    @staticmethod
    def all_of(model: nn.Module) -> Iterator[Begin]:
        """Those of all pruned parts of a model."""
        hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
        return (hook for hook in hooks if isinstance(hook, Begin))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    @property
    def pruning(self) -> Pruning:
        found = in_force(self.owner.get_submodule(SUBMODULE))
        assert found is not None
        return found

    @torch.compiler.disable()
    def __call__(self, module: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> None:
        for_head = context.current().for_head and not self._is_looked_at(module)
        context.change(for_head=False)
        self._refuse(module, kwargs)
        forward: Forward | None = None
        checkpoints = False
        if torch.compiler.is_exporting():
            forward = _exported(self.pruning(), training=module.training, for_head=for_head)
        # no image: what the dense model makes of it
        elif not any(isinstance(x, Tensor) and x.ndim and not len(x) for x in (*args, *kwargs.values())):
            forward = make_forward(self.pruning, training=module.training, for_head=for_head)
            if isinstance(forward, PackedForward) and forward.is_dense:
                forward = None
            if forward is not None and self.inner is not None:
                interrupted = context.running(module)  # which left the inner one's switch off
                was_on = interrupted is not None and interrupted.checkpoints
                checkpoints = was_on or bool(self.inner.grad_checkpointing)
        context.enter(module, forward, checkpoints=checkpoints)
        if checkpoints:
            vars(self.inner)["grad_checkpointing"] = False

    def _is_looked_at(self, module: nn.Module) -> bool:
        """Whether hooks of others take what the backbone gives out, which they expect whole."""
        parts = (module,) if self.final_norm is None else (module, self.final_norm)
        hooks = (hook for part in parts for hook in part._forward_hooks.values())
        # of timm's the model is its own backbone
        return any(not isinstance(hook, _End | _Unpack) and hook is not _end_for_head for hook in hooks)

    def _refuse(self, module: PreTrainedModel, kwargs: dict[str, Any]) -> None:
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            raise ValueError(
                "a pruned model can't be traced: what is in an image decides how many tokens go on; torch.export and "
                "vitprune.export take it"
            )
        if "_is_replica" in vars(module):
            raise ValueError(
                "nn.DataParallel's copies of a pruned model aren't pruned; start a process for each GPU, as accelerate "
                "launch does, or let one GPU be seen (CUDA_VISIBLE_DEVICES=0)"
            )
        # the last two are of timm's models
        asked = [kwargs.get(name) for name in ("attention_mask", "output_attentions", "attn_mask", "is_causal")]
        if any(value is not None and value is not False for value in asked):
            raise ValueError(
                "a pruned model takes no attention_mask and gives out no attention maps: its images have different "
                "tokens in every block; call vitprune.restore_(model) for the dense model"
            )
        if self.has_interface and module.config._attn_implementation != NAME:
            raise ValueError(
                f"the pruned model's attention implementation was changed to '{module.config._attn_implementation}'; "
                f"call model.set_attn_implementation('{NAME}')"
            )
        wanted = kwargs.get("output_hidden_states")
        wanted = getattr(module.config, "output_hidden_states", False) if wanted is None else wanted
        if self.inner is not None and wanted:
            raise ValueError("a pruned timm model gives out no hidden states; call vitprune.restore_(model) first")


@dataclass(frozen=True, eq=False)
class _End:
    inner: nn.Module | None

    @torch.compiler.disable()
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        running = context.leave(module)
        if running is None:  # it was refused
            return output
        forward = running.forward
        if running.checkpoints and self.inner is not None:
            vars(self.inner)["grad_checkpointing"] = True
        if forward is None or output is None:  # the forward failed
            return output
        for watched in forward.observers:
            assert isinstance(watched, Trace)
            watched.record(forward)
        if isinstance(output, ModelOutput) and output.get("hidden_states") is not None:
            output["hidden_states"] = _unpacked(forward, output["hidden_states"])
        elif isinstance(output, tuple):  # return_dict=False: hidden states are the only tuple in it
            output = tuple(_unpacked(forward, item) if isinstance(item, tuple) else item for item in output)
        return output


def _unpacked(forward: Forward, hidden_states: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    # those that weren't selected are None
    return tuple(None if x is None else forward.unpack_recorded(block, x) for block, x in enumerate(hidden_states))


@torch.compiler.disable()
def _interpolated_already(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """What embeds the image has interpolated positions; further in they would be stretched to rows that are left."""
    if context.current().forward is None or not kwargs.get("interpolate_pos_encoding"):
        return None
    return args, {**kwargs, "interpolate_pos_encoding": False}


@torch.compiler.disable()
def _drop_by_image(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    """Stochastic depth drops whole images, which packed tokens don't show it."""
    attention = context.attention()
    if not module.training or attention is None:
        return None
    drops: Any = module
    return attention.drop_path(args[0], 1 - drops.drop_prob)


@dataclass(frozen=True, eq=False)
class _Unpack:
    """norms: behind a norm, not a block."""

    norms: bool

    @torch.compiler.disable()
    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        forward = context.current().forward
        if forward is None or forward.is_unpacked:  # some models norm the pooled token once more
            return None
        if self.norms:
            forward.enter_norm(module.forward)
        forward.is_unpacked = True
        return forward.unpack(output)


@torch.compiler.disable()
def _pool_what_is_there(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Attention pooling over patches that a token stands for; those merged into another count as often as they are."""
    forward = context.current().forward
    absent_BN = None if forward is None else forward.absent_BN()
    if absent_BN is None:
        return None
    bias_BN = torch.zeros(absent_BN.shape, dtype=args[0].dtype, device=absent_BN.device)
    return args, {**kwargs, "key_padding_mask": bias_BN.masked_fill(absent_BN, -torch.inf)}
