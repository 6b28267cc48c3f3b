"""The optimizer of fine-tuning: which weights learn, which of them decay, and how fast thresholds learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.optim import AdamW
from transformers import PreTrainedModel

from vitprune.models.module import pruning_of
from vitprune.recipe.schema import FinetuneSpec

# a key's bias has no gradient but rounding noise; with the usual 1e-8 AdamW makes steps of it, others on each machine
EPSILON = 1e-6


@contextmanager
def learning(model: PreTrainedModel, spec: FinetuneSpec) -> Iterator[None]:
    """Have those weights alone learn that the spec names; afterwards all are as they were."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    thresholds = {id(parameter) for parameter in pruning_of(model).parameters()}
    norms = {id(p) for module in model.modules() if "Norm" in type(module).__name__ for p in module.parameters(False)}
    for parameter, wanted in before:
        if id(parameter) in thresholds:
            parameter.requires_grad_(spec.thresholds == "learned")
        elif spec.train != "all":
            parameter.requires_grad_(wanted and spec.train == "norms" and id(parameter) in norms)
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


def build_optimizer(model: PreTrainedModel, spec: FinetuneSpec) -> AdamW:
    """AdamW over what learns, with weight decay on matrices only, and a learning rate of its own for thresholds.

    Raises ValueError where nothing does, or steps would be lost in a weight's rounding.
    """
    own = list(pruning_of(model).parameters())
    thresholds = [parameter for parameter in own if parameter.requires_grad]
    weights = [p for p in model.parameters() if p.requires_grad and all(p is not other for other in own)]
    if not weights and not thresholds:
        raise ValueError(
            f"{type(model).__name__} has nothing that learns with train: {spec.train}; all of that is frozen "
            "(requires_grad)"
        )
    if half := next((p.dtype for p in weights if p.is_floating_point() and p.dtype.itemsize < 4), None):
        raise ValueError(
            f"{type(model).__name__} has weights in {str(half).removeprefix('torch.')}, in which small steps are lost; "
            "call model.float() before, and say in mixed_precision what training computes in"
        )
    groups: list[dict[str, object]] = [
        {"name": "weights", "params": [p for p in weights if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"name": "weights", "params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
        {"name": "thresholds", "params": thresholds, "lr": spec.threshold_learning_rate, "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=spec.rate, eps=EPSILON)
