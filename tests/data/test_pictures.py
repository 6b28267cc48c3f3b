"""Which part of a picture an image processor keeps."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, ViTImageProcessorPil

from vitprune.data.pictures import seen_box

WHOLE = ViTImageProcessorPil(size={"height": 32, "width": 32})
# the shorter side to 64, the middle 56 of both
CROPPED = BitImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56})
BARE: Any = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, do_normalize=False, do_rescale=False)
LEVEL = 1 / 256  # of a side: what a level of brightness is


@pytest.mark.parametrize(
    ("processor", "size", "expected"),
    [
        (WHOLE, (100, 60), (0, 0, 100, 60)),
        (WHOLE, (8, 8), (0, 0, 8, 8)),
        (WHOLE, (1, 50), (0, 0, 1, 50)),
        (CROPPED, (640, 320), (180, 20, 460, 300)),
        (CROPPED, (320, 640), (20, 180, 300, 460)),
        (CROPPED, (64, 64), (4, 4, 60, 60)),
        (BARE, (30, 20), (0, 0, 30, 20)),
    ],
)
def test_box(processor: Any, size: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert seen_box(processor, size) == pytest.approx(expected, abs=max(size) * LEVEL)


def test_box_of_a_checkpoint_that_sees_grey() -> None:
    grey = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5])
    assert seen_box(grey, (40, 20)) == pytest.approx((0, 0, 40, 20), abs=40 * LEVEL)
