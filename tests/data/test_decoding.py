"""Pictures of all kinds become what an image processor takes."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
from transformers import ViTImageProcessorPil

from vitprune.data.decoding import in_colours, mode_of


def picture(value: float, dtype: type) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.full((4, 6), value, dtype))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (picture(300, np.uint16), 1),
        (picture(40000, np.uint16), 156),
        (picture(65535, np.uint16), 255),
        (picture(40000, np.int32), 156),
        (picture(0.9, np.float32), 229),
        (picture(1.0, np.float32), 255),
        (picture(77, np.uint8), 77),
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_numbers_are_scaled_to_8_bits(given: PIL.Image.Image, expected: int, mode: str) -> None:
    found = in_colours(given, mode)
    assert found.mode == mode
    assert (np.asarray(found) == expected).all()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (picture(70000, np.int32), r"mode I\) go from 70000 to 70000, and only whole numbers of 16 bits"),
        (picture(-1, np.int32), r"mode I\) go from -1 to -1"),
        (picture(3.5, np.float32), r"mode F\) go from 3.5 to 3.5, and only fractions from 0 to 1"),
        (picture(np.nan, np.float32), r"mode F\) go from nan to nan"),
    ],
)
def test_others_are_refused_by_their_mode_and_range(given: PIL.Image.Image, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        in_colours(given, "RGB")


def test_what_is_transparent_shows_the_colour_beneath() -> None:
    beneath = PIL.Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert in_colours(beneath, "RGB").getpixel((0, 0)) == (10, 20, 30)


def test_a_checkpoint_of_one_channel_sees_grey_and_of_others_nothing() -> None:
    assert mode_of(ViTImageProcessorPil()) == "RGB"
    assert mode_of(ViTImageProcessorPil(image_mean=[0.5], image_std=[0.5])) == "L"
    assert mode_of(ViTImageProcessorPil(image_mean=[0.5], image_std=[0.5], do_normalize=False)) == "RGB"
    with pytest.raises(ValueError, match="have 13 channels"):
        mode_of(ViTImageProcessorPil(image_mean=[0.5] * 13, image_std=[0.5] * 13))
