"""Augmentation keeps shape and scale, changes every image in its own way, and follows torch's seed."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ViTImageProcessorPil

from vitprune.data.augmentation import augment, pixel_scale

IMAGENET: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSORS: dict[str, dict[str, Any]] = {
    "imagenet": IMAGENET,
    "not-normalised": {"do_normalize": False},
    "not-rescaled": {"do_normalize": False, "do_rescale": False},
}


def processed(processor: ViTImageProcessorPil, count: int = 8) -> Tensor:
    images = torch.randint(0, 256, (count, 3, 24, 20), dtype=torch.uint8)
    return processor(list(images), do_resize=False, return_tensors="pt")["pixel_values"].float()


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("kind", ["light", "strong"])
def test_shape_and_scale_stay(kind: Any, processor: str) -> None:
    made_by = ViTImageProcessorPil(**PROCESSORS[processor])
    change = augment(kind, made_by)
    assert change is not None
    x_BCHW = processed(made_by)
    for _ in range(10):
        y_BCHW = change(x_BCHW)
        assert y_BCHW.shape == x_BCHW.shape
        assert y_BCHW.dtype == torch.float32
        # Interpolation stays between the darkest and the brightest that the processor can give.
        low, high = (made_by([torch.full_like(x_BCHW[0], v)], do_resize=False, return_tensors="pt") for v in (0, 255))
        slack = 1e-3 * float((high["pixel_values"] - low["pixel_values"]).max())
        assert bool((y_BCHW >= low["pixel_values"] - slack).all())
        assert bool((y_BCHW <= high["pixel_values"] + slack).all())


@pytest.mark.parametrize("kind", ["light", "strong"])
def test_each_image_its_own_way_by_the_seed(kind: Any) -> None:
    processor = ViTImageProcessorPil(**IMAGENET)
    change = augment(kind, processor)
    assert change is not None
    x_BCHW = processed(processor, 1).expand(6, -1, -1, -1)
    torch.manual_seed(1)
    first = change(x_BCHW)
    torch.manual_seed(1)
    torch.testing.assert_close(change(x_BCHW), first)
    assert len({tuple(image.flatten().tolist()) for image in first}) == 6
    assert not torch.equal(change(x_BCHW), first)


class Silent(ViTImageProcessorPil):
    """Whose settings don't say how it scales, as those of timm's."""

    def to_dict(self) -> dict[str, Any]:
        return {"image_processor_type": "Silent"}


def test_the_scale_is_what_the_processor_does() -> None:
    scale_C, shift_C = pixel_scale(Silent(**IMAGENET))
    mean_C, std_C = (torch.tensor(IMAGENET[name]) for name in ("image_mean", "image_std"))
    torch.testing.assert_close(scale_C, 1 / std_C, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(shift_C, -mean_C / std_C, rtol=1e-5, atol=0.0)


def test_other_sizes_one_after_the_other() -> None:
    change = augment("light", ViTImageProcessorPil())
    assert change is not None
    for size in (8, 12, 8):
        assert change(torch.rand(2, 3, size, size)).shape == (2, 3, size, size)


def test_none_and_what_needs_colours() -> None:
    grey = ViTImageProcessorPil(image_mean=[0.5], image_std=[0.5])
    assert augment("none", grey) is None
    light = augment("light", grey)
    assert light is not None
    assert light(torch.rand(2, 1, 8, 8)).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="images of 3 channels, not 1; use 'light'"):
        augment("strong", grey)


@pytest.mark.parametrize("kind", ["light", "strong"])
def test_loader_processes_can_be_sent_it(kind: Any) -> None:
    copy = pickle.loads(pickle.dumps(augment(kind, ViTImageProcessorPil())))
    assert copy(torch.rand(2, 3, 8, 8)).shape == (2, 3, 8, 8)


def test_kornia_is_imported_when_needed() -> None:
    code = "import sys, vitprune.data.augmentation; sys.exit('kornia' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
