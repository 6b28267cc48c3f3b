"""Token pruning for Vision Transformers: each image keeps the tokens it needs.

Importing this package is light. Names are imported when first used; the quantizer plug-in, through which transformers
brings a pruned checkpoint back, is registered as soon as transformers' registry exists (see `registration`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vitprune import registration

if TYPE_CHECKING:
    from vitprune.calibration import calibrate as calibrate
    from vitprune.calibration import scale_to_budget as scale_to_budget
    from vitprune.checkpoint import load as load
    from vitprune.checkpoint import load_processor as load_processor
    from vitprune.checkpoint import save as save
    from vitprune.cost_measurement import measure_latency as measure_latency
    from vitprune.data import load_images as load_images
    from vitprune.evaluation import compare as compare
    from vitprune.finetuning import finetune as finetune
    from vitprune.latency import budget_latency as budget_latency
    from vitprune.pruner import prune_ as prune_
    from vitprune.pruner import restore_ as restore_
    from vitprune.recipe import DataSpec as DataSpec
    from vitprune.recipe import EvaluateSpec as EvaluateSpec
    from vitprune.recipe import FinetuneSpec as FinetuneSpec
    from vitprune.recipe import PruningSpec as PruningSpec
    from vitprune.recipe import SplitSpec as SplitSpec
    from vitprune.tracing import Trace as Trace
    from vitprune.tracing import trace as trace

__version__ = "0.1.0"

_HOMES = {
    "scale_to_budget": "vitprune.calibration",
    "load_processor": "vitprune.checkpoint",
    "load_images": "vitprune.data",
    "SplitSpec": "vitprune.recipe",
    "FinetuneSpec": "vitprune.recipe",
    "EvaluateSpec": "vitprune.recipe",
    "DataSpec": "vitprune.recipe",
    "PruningSpec": "vitprune.recipe",
    "Trace": "vitprune.tracing",
    "budget_latency": "vitprune.latency",
    "calibrate": "vitprune.calibration",
    "compare": "vitprune.evaluation",
    "finetune": "vitprune.finetuning",
    "load": "vitprune.checkpoint",
    "measure_latency": "vitprune.cost_measurement",
    "save": "vitprune.checkpoint",
    "prune_": "vitprune.pruner",
    "restore_": "vitprune.pruner",
    "trace": "vitprune.tracing",
}
__all__ = [
    "DataSpec",
    "EvaluateSpec",
    "FinetuneSpec",
    "PruningSpec",
    "SplitSpec",
    "Trace",
    "budget_latency",
    "calibrate",
    "compare",
    "finetune",
    "load",
    "load_images",
    "load_processor",
    "measure_latency",
    "prune_",
    "restore_",
    "save",
    "scale_to_budget",
    "trace",
]


registration.register()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vitprune' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
