"""torchao from a folder of its own: where it is installed, transformers loads it, and it has much to say on stderr."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parents[2] / "tests"
sys.path += [str(TESTS / "support"), str(Path(sys.prefix) / "torchao")]
