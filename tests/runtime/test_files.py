"""Where an output's files lie while it is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from tiny import images

import vitprune
from vitprune.models.checkpoint import require_free
from vitprune.runs.resume import RunFolder
from vitprune.runtime.files import KINDS, beside, contents, require_name_fits, sibling
from vitprune.runtime.lock import OutputLock


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that something is mounted on: it can't be renamed."""
    place = tmp_path / "mnt"
    (place / "lost+found").mkdir(parents=True)
    rename = Path.rename

    def renamed(self: Path, target: Path) -> Path:
        if place in (self, target):
            raise OSError(16, "Device or resource busy", str(self))
        return rename(self, target)

    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == place)
    monkeypatch.setattr(Path, "rename", renamed)
    return place


def test_everything_lies_beside_an_output(tmp_path: Path) -> None:
    assert {beside(tmp_path / "out", kind) for kind in KINDS} == {tmp_path / f".out.{kind}" for kind in KINDS}


def test_a_mount_point_is_written_into(mount: Path) -> None:
    require_free(mount, overwrite=False)
    model = vitprune.prune_(tiny.build("vit"), tiny.POLICIES["as-vit-merge"])
    with RunFolder.open(mount, lambda: {"a": 1}, restart=False) as folder:
        assert folder.path.parent == mount
        for _ in range(2):  # a folder isn't replaced by another
            files = {"recipe.yaml": "version: 1\n", "assets/images.png": b"png"}
            vitprune.save(model, mount, files=files, overwrite=True)
        folder.remove()
    assert {entry.name for entry in contents(mount)} == {"config.json", "model.safetensors", "recipe.yaml", "assets"}
    assert {entry.name for entry in mount.iterdir()} - {"lost+found"} == {entry.name for entry in contents(mount)}
    vitprune.save(model, mount, overwrite=True)
    assert vitprune.load(mount)(images(2)).logits.equal(model.eval()(images(2)).logits)


def test_a_name_that_would_become_too_long_is_refused_at_the_start(tmp_path: Path) -> None:
    require_name_fits(tmp_path / ("n" * 243))
    with pytest.raises(ValueError, match="its last name is 2 bytes too long"):
        require_free(tmp_path / "deeper" / ("n" * 245), overwrite=False)
    with pytest.raises(ValueError, match=r"\d+ bytes too long"):
        require_free(tmp_path / ("ü" * 125), overwrite=False)


def test_a_lock_that_can_not_say_whose_it_is_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("vitprune.runtime.lock.write_text_whole", full)
        with pytest.raises(OSError, match="No space left"):
            OutputLock(tmp_path / "out").acquire()
    assert not (tmp_path / ".out.lock").exists()
    lock = OutputLock(tmp_path / "out")
    lock.acquire()
    lock.release()
    assert not (tmp_path / ".out.lock").exists()


def test_two_runs_into_one_output_dont_mix(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "out", lambda: {"budget": 0.75}, restart=False) as first:
        first.once("calibration", dict, lambda: {"levels": 1})
        for restart in (False, True):
            with pytest.raises(ValueError, match=r"another run into it is under way \(process \d+ on "):
                RunFolder.open(tmp_path / "out", lambda: {"budget": 0.75}, restart=restart)
    with RunFolder.open(tmp_path / "out", lambda: {"budget": 0.75}, restart=False) as again:
        assert again.once("calibration", dict, lambda: {"levels": 2}) == {"levels": 1}
    with pytest.raises(ValueError, match="changed are"):
        RunFolder.open(tmp_path / "out", lambda: {"budget": 0.55}, restart=False)
    assert not (tmp_path / ".out.lock").exists(), "refused, it has let go"
    with RunFolder.open(tmp_path / "out", lambda: {"budget": 0.55}, restart=True) as anew:
        assert anew.once("calibration", dict, lambda: {"levels": 3}) == {"levels": 3}
        assert json.loads((anew.path / "fingerprint.json").read_text()) == {"budget": 0.55}


def test_a_mount_point_needs_no_room_beside_it(mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) == mount)
    require_free(mount, overwrite=False)
    assert sibling(mount, "logs") == mount / "logs"
    sibling(mount, "logs").mkdir()
    assert list(contents(mount)) == []
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != mount)
    with pytest.raises(ValueError, match="may not be written"):
        require_free(mount, overwrite=False)


def test_a_mount_point_that_was_half_written_is_gone_on_with(mount: Path) -> None:
    (mount / ".vitprune.unfinished").mkdir()
    (mount / "report.json").write_text("{}")
    require_free(mount, overwrite=False)
