"""What is said of the Hub's caches."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from vitprune.runtime.hub_cache import Cache


def test_the_cache_that_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of data sets come through the cache of models, which may lie on another disk."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "data")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "models"))
    for name in ("data", "models"):
        (tmp_path / name).mkdir()
    error = OSError(errno.ENOSPC, "No space left on device")
    for full, variable in (("data", "HF_DATASETS_CACHE"), ("models", "HF_HUB_CACHE")):
        monkeypatch.setenv(variable, str(tmp_path / full))
        room = {tmp_path / name: 0 if name == full else 10**9 for name in ("data", "models")}
        monkeypatch.setattr(shutil, "disk_usage", lambda path, room=room: SimpleNamespace(free=room[path]))
        said = Cache.of_data().full(error)
        assert said is not None
        assert f"the cache {tmp_path / full} is full; make room, or set {variable} to" in said
    assert Cache.of_data().full(OSError(errno.EACCES, "Permission denied")) is None
