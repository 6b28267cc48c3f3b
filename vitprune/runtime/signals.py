"""SIGTERM, by which schedulers announce that a process has to go: what is under way is given up, or first kept.

Installs its handler only inside `watch`, and in the main thread, as Python wants it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


class Terminated(BaseException):
    """SIGTERM came. No `Exception`, which others catch."""


@dataclass
class Notice:
    """received: whether SIGTERM has come."""

    received: bool = False


_notice: ContextVar[Notice | None] = ContextVar("vitprune_notice", default=None)


@contextmanager
def watch() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`, but not inside `deferred`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def deferred() -> Iterator[Notice]:
    """Inside, SIGTERM is only noted: who asked for this ends, when it suits, by raising `Terminated`."""
    notice = Notice()
    token = _notice.set(notice)
    try:
        yield notice
    finally:
        _notice.reset(token)


def leave_to_main(process: int) -> None:
    """In a process that a `DataLoader` starts: pass SIGTERM by, which may go to the whole group.

    The main process says when it is over, also by ending.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _on_sigterm(number: int, frame: object) -> None:
    notice = _notice.get()
    if notice is None:
        raise Terminated
    notice.received = True


FAILED = 1
USAGE = 2
# by SIGTERM, as on pre-emption; what was done is kept, and the same command resumes from there
TERMINATED = 75
INTERRUPTED = 130
