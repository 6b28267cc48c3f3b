"""The images of a benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest
import samples
import tiny
import torch
from transformers import ViTImageProcessorPil

from vitprune.bench.images import random_images, real_images, require_square
from vitprune.bench.settings import read_target


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return samples.write_checkpoint(tmp_path / "model")


def test_random_pixels(checkpoint: Path) -> None:
    recipe, _ = read_target(str(checkpoint), None)
    images = random_images(recipe, tiny.build("vit"), 3, 5)
    assert images.described == "random pixels"
    assert images.size == 32
    x = images.timed(48)
    assert x.shape == (5, 3, 48, 48)
    assert images.calibration(48).shape == (3, 3, 48, 48)
    assert torch.equal(x, images.timed(48))
    assert not torch.equal(x[:3], images.calibration(48))
    other, _ = read_target(str(checkpoint), None, ["seed=1"])
    assert not torch.equal(x, random_images(other, tiny.build("vit"), 3, 5).timed(48))


def test_without_an_image_processor_the_config_says_the_size(checkpoint: Path) -> None:
    (checkpoint / "preprocessor_config.json").unlink()
    recipe, _ = read_target(str(checkpoint), None)
    assert random_images(recipe, tiny.build("vit"), 1, 1).size == 32


def test_real_images(checkpoint: Path, tmp_path: Path) -> None:
    recipe, _ = read_target(str(checkpoint), str(samples.write_data(tmp_path / "data")))
    images = real_images(recipe, 6, 100)
    assert images.size == 32
    assert images.described == "24 images of ./data, split test"
    x = images.timed(32)
    assert x.shape == (24, 3, 32, 32)
    assert images.calibration(32).shape == (6, 3, 32, 32)
    larger = images.timed(64)
    assert larger.shape == (24, 3, 64, 64)
    # the same pictures: their brightness stays
    torch.testing.assert_close(larger.mean((1, 2, 3)), x.mean((1, 2, 3)), atol=0.02, rtol=0)


def test_training_images_are_read_when_they_are_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    (samples.write_data(tmp_path / "data") / "train.parquet").unlink()
    recipe, _ = read_target(str(checkpoint), str(tmp_path / "data"))
    images = real_images(recipe, 6, 6)
    assert len(images.timed(32)) == 6
    with pytest.raises(ValueError, match=r"data.train.split: .* Unknown split"):
        images.calibration(32)


def test_images_that_are_not_square(checkpoint: Path, tmp_path: Path) -> None:
    ViTImageProcessorPil(size={"height": 32, "width": 48}).save_pretrained(checkpoint)
    recipe, _ = read_target(str(checkpoint), str(samples.write_data(tmp_path / "data")))
    for images in (real_images(recipe, 3, 3), random_images(recipe, tiny.build("vit"), 3, 3)):
        assert (images.height, images.size) == (32, 48)
        with pytest.raises(ValueError, match=r"its images are 32 × 48 px; `vitprune bench` measures square ones"):
            require_square(images)
        assert images.timed(None).shape == (3, 3, 32, 48)
        assert images.timed(48).shape == (3, 3, 48, 48)


def test_no_image(checkpoint: Path, tmp_path: Path) -> None:
    recipe, _ = read_target(str(checkpoint), str(samples.write_data(tmp_path / "data")))
    with pytest.raises(ValueError, match=r"split 'test' of .* has no image"):
        real_images(recipe, 6, 0)
