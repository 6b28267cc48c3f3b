"""A clock that only a model's blocks move, for tests of what is measured."""

from __future__ import annotations

from typing import Any

from torch import nn


class Clock:
    """Blocks of tiny ViTs take `base` seconds and one more for every row; packed ones `slower` times as long."""

    def __init__(self) -> None:
        self.now = 1.0
        self.base = 20.0
        self.slower = 1.0

    def ran(self, module: nn.Module, args: Any, output: Any) -> None:
        if type(module).__name__ == "ViTMLP":  # inside a block, and so before the stage that follows it
            images, rows, _ = output.shape
            self.now += (self.base + images * rows) * (self.slower if images == 1 else 1.0)
