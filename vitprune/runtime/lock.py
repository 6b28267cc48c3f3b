"""The right to write an output: of one run at a time, whichever process or machine it is on."""

from __future__ import annotations

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
            who = owner.read_text(encoding="utf-8") if owner.is_file() else "another process"
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
        if os.name != "nt":  # before others may have it: what lies there then is theirs
            shutil.rmtree(self._folder, ignore_errors=True)
        self._file.release()
        if os.name == "nt":  # where an open file can't be removed
            shutil.rmtree(self._folder, ignore_errors=True)
