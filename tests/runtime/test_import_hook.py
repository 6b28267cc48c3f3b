"""The plug-in finds its way into transformers whichever is imported first, and `import vitprune` stays light."""

from __future__ import annotations

import subprocess
import sys

import pytest

import vitprune

REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
import sys
assert AUTO_QUANTIZER_MAPPING["vitprune"].__module__ == "vitprune.models.hf_plugin"
assert AUTO_QUANTIZATION_CONFIG_MAPPING["vitprune"].__module__ == "vitprune.models.hf_plugin"
assert not any(type(finder).__module__.startswith("vitprune") for finder in sys.meta_path)
"""


def in_a_fresh_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_vitprune_imports_nothing_heavy() -> None:
    in_a_fresh_python(
        """
import sys
import vitprune
vitprune.PruningSpec(before_blocks=[4, 7, 10])
heavy = {"torch", "transformers", "numpy", "accelerate", "datasets", "evaluate"} & set(sys.modules)
assert not heavy, heavy
"""
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import vitprune, transformers",
        "import transformers, vitprune",
        "import transformers.quantizers.auto, vitprune",
        # looking for it is not importing it
        "import vitprune, importlib.util; importlib.util.find_spec('transformers.quantizers.auto')",
    ],
)
def test_transformers_knows_the_plug_in_whichever_comes_first(imports: str) -> None:
    in_a_fresh_python(imports + REGISTERED)


def test_the_api_can_be_listed() -> None:
    assert set(vitprune.__all__) <= set(dir(vitprune))
