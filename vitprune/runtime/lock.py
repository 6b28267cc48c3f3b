"""The right to write an output: of one run at a time, whichever process or machine it is on."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from vitprune.runtime.files import beside, require_writable, write_text_whole


class OutputLock:
    """Held by the main process of a run; gone with that process, however it ends."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._folder = beside(output, "lock")
        self._file = FileLock(self._folder / "lock", blocking=False)

    def acquire(self) -> None:
        """Raise ValueError, without waiting, where another run has it."""
        require_writable(self._folder, self._output)
        self._folder.mkdir(parents=True, exist_ok=True)
        owner = self._folder / "owner.txt"
        try:
            self._file.acquire()
        except Timeout:
            who = "another process"
            with contextlib.suppress(OSError):
                who = owner.read_text(encoding="utf-8")
            raise ValueError(
                f"{self._output}: another run into it is under way ({who}); wait for it, or choose another output"
            ) from None
        try:
            write_text_whole(owner, f"process {os.getpid()} on {platform.node()}")
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Let others write, and leave nothing behind. Does nothing where the lock isn't held."""
        if not self._file.is_locked:
            return
        shutil.rmtree(self._folder, ignore_errors=True)  # before others may have it: what lies there then is theirs
        self._file.release()
        with contextlib.suppress(OSError):  # not every file system removes an open file
            if os.name == "nt":  # nor this one any that another process has opened
                Path(self._file.lock_file).unlink()
            self._folder.rmdir()
