"""Pictures of all kinds become what an image processor takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
from transformers import BitImageProcessorPil, ViTImageProcessorPil

from vitprune.data.decoding import blank_image, in_colours, mode_of, processor_at


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


@pytest.mark.parametrize(
    ("processor", "sizes"),
    [
        (ViTImageProcessorPil(size={"height": 32, "width": 32}), {"size": {"height": 48, "width": 64}}),
        (
            BitImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}),
            {"size": {"shortest_edge": 128}, "crop_size": {"height": 112, "width": 112}},
        ),
    ],
)
def test_a_processor_for_another_size(processor: Any, sizes: dict[str, dict[str, int]]) -> None:
    wanted = sizes.get("crop_size") or sizes["size"]
    found: Any = processor_at(processor, wanted["height"], wanted["width"])
    assert blank_image(found).shape[-2:] == (wanted["height"], wanted["width"])
    assert {name: dict(getattr(found, name)) for name in sizes} == sizes
    assert blank_image(processor).shape[-1] != wanted["width"], "it was changed itself"
    assert processor_at(found, wanted["height"], wanted["width"]) is found


def test_a_processor_that_leaves_sizes_alone_is_for_all() -> None:
    processor = ViTImageProcessorPil(do_resize=False)
    assert processor_at(processor, 48, 48) is processor


def test_a_processor_that_takes_no_such_size_is_refused() -> None:
    processor = BitImageProcessorPil(size={"shortest_edge": 64}, do_center_crop=False)
    with pytest.raises(ValueError, match=r"gives images of 64×64 pixels and can't be told to give 48×40"):
        processor_at(processor, 48, 40)
