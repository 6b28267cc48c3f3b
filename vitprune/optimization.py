"""The optimizer of fine-tuning: which weights decay, and how fast thresholds learn."""

from __future__ import annotations

from torch.optim import AdamW
from transformers import PreTrainedModel

from vitprune.recipe import FinetuneSpec
from vitprune.tracing import pruning_of

# a key's bias has no gradient but rounding noise; with the usual 1e-8 AdamW makes steps of it, others on each machine
EPSILON = 1e-7


def build_optimizer(model: PreTrainedModel, spec: FinetuneSpec) -> AdamW:
    """AdamW with weight decay on matrices only, and a learning rate of its own for thresholds.

    Thresholds live near 1/N, so theirs is relative: AdamW's step, whatever the gradient's size, is
    `threshold_learning_rate` × the mean threshold, the same part at 49 tokens as at 1,369.
    """
    own = {id(parameter) for parameter in pruning_of(model).parameters()}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    groups: list[dict[str, object]] = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    thresholds = list(pruning_of(model).parameters())
    if thresholds:
        levels = pruning_of(model).levels.detach()
        scale = levels[levels.isfinite()].abs().mean().item() if levels.isfinite().any() else 0.0
        groups.append({"params": thresholds, "lr": spec.threshold_learning_rate * scale, "weight_decay": 0.0})
    return AdamW(groups, lr=spec.learning_rate, eps=EPSILON)
