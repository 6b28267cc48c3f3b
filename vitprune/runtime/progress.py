"""Progress for people: a live bar in a terminal, a line every few seconds elsewhere, nothing where it isn't wanted.

What works for long reports to the display that is in force; a command opens one, which also remembers what took how
long. All goes to stderr.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import datasets
from huggingface_hub import utils as hub
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from transformers.utils import logging as transformers_logging

Item = TypeVar("Item")

EVERY = 5.0  # seconds between two lines where there is no terminal
WORTH_WAITING = 10.0  # seconds
SLOW = 3  # steps that the end names as what took longest
WORTH_SAYING = 0.05  # of the whole time


class Task(Protocol):
    """A piece of work that is under way."""

    def advance(self, count: int = 1) -> None: ...

    def note(self, text: str) -> None: ...

    def rename(self, description: str) -> None: ...


@contextmanager
def task(
    description: str,
    *,
    total: int | None = None,
    done: int = 0,
    unit: str = "",
    steady: bool = False,
    shown: bool = True,
) -> Iterator[Task]:
    """Say of the work inside how far it is.

    total: of how many; unknown if None. done: before it begins. steady: nothing is drawn between two advances, so that
    what is timed isn't disturbed. shown: False is silent.
    """
    display = _display.get() or Display(keeps=False)
    if not shown or display.quiet:
        yield _Silent()
        return
    with display.show(_Counted(description, total, done, unit, first=done), steady=steady) as one:
        yield one


def track(
    items: Iterable[Item],
    description: str,
    *,
    total: int | None = None,
    unit: str = "",
    steady: bool = False,
    shown: bool = True,
) -> Iterator[Item]:
    """Give items one by one, and say how far it is."""
    with task(description, total=total, unit=unit, steady=steady, shown=shown) as one:
        for item in items:
            yield item
            one.advance()


@contextmanager
def display(*, quiet: bool = False) -> Iterator[Display]:
    """Be the display of all work inside; keep a line of each step that is done, and know in the end what was slow.

    Bars of other libraries are switched off inside, but those of downloads.
    """
    found = Display(quiet=quiet)
    token = _display.set(found)
    bars = transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    downloads = not hub.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # those of downloads, too
    datasets.disable_progress_bars()
    if downloads and not quiet:
        hub.enable_progress_bars()
    try:
        yield found
    finally:
        _display.reset(token)
        if bars[0]:
            transformers_logging.enable_progress_bar()
        if not bars[1]:
            datasets.enable_progress_bars()
        # which transformers' switch on, too
        (hub.enable_progress_bars if downloads else hub.disable_progress_bars)()


class _Silent:
    def advance(self, count: int = 1) -> None: ...

    def note(self, text: str) -> None: ...

    def rename(self, description: str) -> None: ...


@dataclass
class _Counted:
    """How far a piece of work is; tells who draws it of each change."""

    description: str
    total: int | None
    done: int
    unit: str
    remark: str = ""
    began: float = field(default_factory=lambda: time.monotonic())
    changed: Callable[[_Counted], object] = lambda counted: None
    parts: dict[str, float] = field(default_factory=dict)
    first: int = 0  # how far it was when it began
    _part_began: float = field(default_factory=lambda: time.monotonic())

    def advance(self, count: int = 1) -> None:
        self.done += count
        self.changed(self)

    def note(self, text: str) -> None:
        self.remark = text
        self.changed(self)

    def rename(self, description: str) -> None:
        if description != self.description:
            self.end()
            self.description = description
        self.changed(self)

    def end(self) -> None:
        """Add up the time under the present name."""
        now = time.monotonic()
        self.parts[self.description] = self.parts.get(self.description, 0.0) + now - self._part_began
        self._part_began = now

    @property
    def count(self) -> str:
        if not (self.done or self.total):
            return ""
        of = "" if self.total in (None, self.done) else f" of {self.total}"
        units = self.unit if self.done == 1 and not of else plural(self.unit)
        return f"{self.done}{of} {units}{self.left}".strip()

    @property
    def left(self) -> str:
        """How long it will go on, if that is worth saying."""
        now = self.done - self.first
        if self.total is None or now <= 0:
            return ""
        seconds = self.seconds / now * (self.total - self.done)
        return f", {duration(seconds)} left" if seconds >= WORTH_WAITING else ""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


class Display:
    """What all pieces of work of one command are shown on. keeps: a line of each that is done stays.

    took: seconds by name, of what was done outside of other work.
    """

    def __init__(self, *, quiet: bool = False, keeps: bool = True) -> None:
        self.quiet, self.keeps = quiet, keeps
        self.console = Console(stderr=True)
        self.took: dict[str, float] = {}
        self.began = time.monotonic()
        self._depth = 0

    @contextmanager
    def show(self, counted: _Counted, *, steady: bool) -> Iterator[_Counted]:
        self._depth += 1
        draw = self._in_terminal if self.console.is_interactive or self.console.is_jupyter else self._in_lines
        try:
            with draw(counted, steady=steady):
                yield counted
            counted.end()
            if self._depth == 1:
                for name, seconds in counted.parts.items():
                    self.took[name] = self.took.get(name, 0.0) + seconds
                if self.keeps:
                    ended = "" if not counted.count else f": {counted.count}"
                    least = WORTH_SAYING * counted.seconds
                    named = " and ".join(name for name, took in counted.parts.items() if took >= least)
                    self.console.print(f"{named}{ended} in {duration(counted.seconds)}", highlight=False)
        finally:
            self._depth -= 1

    @contextmanager
    def _in_terminal(self, counted: _Counted, *, steady: bool) -> Iterator[None]:
        """A bar that goes when the work is done; work within other work has none."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            TextColumn("{task.fields[count]} {task.fields[remark]}", markup=False, style="dim"),
        )
        bar = Progress(
            *columns,
            console=self.console,
            transient=True,
            auto_refresh=not steady,
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),  # otherwise what a command prints meanwhile would go to stderr
        )
        if self._depth > 1:  # rich has one live display at a time: the outer one goes on
            yield
            return
        with bar:
            number: TaskID = bar.add_task(counted.description, total=counted.total, count="", remark="")

            def draw(one: _Counted) -> None:
                bar.update(
                    number,
                    description=one.description,
                    completed=one.done,
                    count=one.count,
                    remark=one.remark,
                    refresh=steady,
                )

            counted.changed = draw
            draw(counted)
            yield
            counted.changed = lambda one: None

    @contextmanager
    def _in_lines(self, counted: _Counted, *, steady: bool) -> Iterator[None]:
        """A line when there is something to say, and every few seconds, without control characters."""
        last = counted.began - EVERY

        def say(one: _Counted) -> None:
            nonlocal last
            if time.monotonic() - last >= EVERY and one.done != one.total:
                last = time.monotonic()
                remark = f", {one.remark}" if one.remark else ""
                print(f"{one.description}: {one.count}{remark} ({duration(one.seconds)})", file=sys.stderr, flush=True)

        counted.changed = say
        yield
        counted.changed = lambda one: None

    def summary(self) -> str:
        """What the command took, and which steps the most of it."""
        whole = time.monotonic() - self.began
        slow = sorted(self.took.items(), key=lambda item: -item[1])[:SLOW]
        named = [f"{name} {duration(seconds)}" for name, seconds in slow if seconds >= WORTH_SAYING * whole]
        return f"Took {duration(whole)}{': ' if named else ''}{', '.join(named)}."


def plural(unit: str) -> str:
    """More than one of a unit."""
    if not unit:
        return ""
    return f"{unit}es" if unit.endswith(("s", "ch")) else f"{unit}s"


def duration(seconds: float) -> str:
    """Time as people say it: 0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


_display: ContextVar[Display | None] = ContextVar("display", default=None)
