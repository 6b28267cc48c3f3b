"""timm from a folder of its own: it brings torchvision, which has no build for every machine that the tests run on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # as tests/conftest.py

import torch

HERE = Path(__file__).parent
TESTS = HERE.parents[1] / "tests"
sys.path += [str(TESTS / "support"), str(TESTS / "contract"), str(HERE), str(Path(sys.prefix) / "timm")]

# torchvision's Python part asks for these on import; nothing here calls them
LIBRARY = torch.library.Library("torchvision", "DEF")
LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from triton_interpreter import mend  # noqa: E402 - it is in a folder that was just named

mend()
