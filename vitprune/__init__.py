"""Token pruning for Vision Transformers: each image keeps the tokens it needs.

Importing this package is light. Names are imported when first used; the quantizer plug-in, through which transformers
brings a pruned checkpoint back, is registered as soon as transformers' registry exists (see `registration`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitprune.pruner import Trace as Trace
    from vitprune.pruner import prune_ as prune_
    from vitprune.pruner import restore_ as restore_
    from vitprune.pruner import trace as trace
    from vitprune.recipe import PruningSpec as PruningSpec

__version__ = "0.1.0"

_HOMES = {
    "PruningSpec": "vitprune.recipe",
    "Trace": "vitprune.pruner",
    "prune_": "vitprune.pruner",
    "restore_": "vitprune.pruner",
    "trace": "vitprune.pruner",
}
__all__ = ["PruningSpec", "Trace", "prune_", "restore_", "trace"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vitprune' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
