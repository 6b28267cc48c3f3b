"""Makes transformers know pruned checkpoints as soon as transformers is imported, and not before.

`import vitprune` has to be light (the command line answers without torch) and still has to be all that plain
`from_pretrained` needs. So the plug-in waits for the module that keeps transformers' registry of quantizers.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
PLUG_IN = "vitprune.models.hf_plugin"


def register() -> None:
    """Register the plug-in now if transformers' registry is there, else when it is imported."""
    if REGISTRY in sys.modules:
        importlib.import_module(PLUG_IN)
    else:
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(PLUG_IN)

        spec.loader.exec_module = execute_and_register
        return spec
