"""Progress: in a terminal, in a log, and where nobody wants it."""

from __future__ import annotations

import io
import re

import datasets
import pytest
from huggingface_hub import utils as hub
from rich.console import Console
from transformers.utils import logging as transformers_logging

from vitprune.runtime import progress
from vitprune.runtime.progress import display, duration, plural, task, track


class Time:
    """Takes the place of `time.monotonic`: a second for each look at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.time, "monotonic", Time())


def test_in_a_log_there_are_lines_without_control_characters(seconds: None, capsys: pytest.CaptureFixture[str]) -> None:
    with display() as shown:
        for _ in track(range(20), "comparing", total=20, unit="batch"):
            pass
    said = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"comparing: \d+ of 20 batches, .* left \(.* s\)", said[0]), said
    assert re.fullmatch(r"comparing: 20 batches in .*", said[-1])
    assert 3 < len(said) < 20, "one every few seconds"
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", "".join(said))
    assert shown.took.keys() == {"comparing"}


def test_in_a_terminal_a_bar_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    with display() as shown:
        shown.console = Console(file=written, force_terminal=True, width=80)
        with task("fine-tuning", total=3, unit="step", steady=True) as one:
            for step in range(3):
                one.advance()
                one.note(f"loss {step}")
    text = written.getvalue()
    assert "2 of 3 steps loss 1" in text
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).strip())
    assert lines[-1].startswith("fine-tuning: 3 steps in ")
    assert max(map(len, lines)) <= 80


def test_what_is_printed_beside_a_bar_stays_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with display() as shown:
        shown.console = Console(stderr=True, force_terminal=True, width=80)
        with task("looking", total=1, unit="image"):
            print("a picture")
    assert capsys.readouterr().out == "a picture\n"


def test_work_within_work_belongs_to_it(seconds: None) -> None:
    with display() as shown, task("outer") as outer:
        with task("inner"):
            pass
        outer.rename("outer again")
    assert shown.took.keys() == {"outer", "outer again"}


def test_quiet_and_unshown_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with display(quiet=True):
        assert list(track(range(3), "comparing")) == [0, 1, 2]
    assert list(track(range(3), "comparing", shown=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_outside_of_a_command_nothing_stays(capsys: pytest.CaptureFixture[str]) -> None:
    with task("calibrating", unit="pass") as one:
        one.advance()
    assert re.fullmatch(r"calibrating: 1 pass \(.* s\)\n", capsys.readouterr().err), "a line while it works, none after"


def test_bars_of_other_libraries_are_off_inside_alone() -> None:
    def off() -> tuple[bool, bool, bool]:
        loading = not transformers_logging.is_progress_bar_enabled()
        return loading, datasets.are_progress_bars_disabled(), hub.are_progress_bars_disabled()

    hub.enable_progress_bars()
    before = off()
    with display():
        assert off() == (True, True, False), "downloads are shown"
    assert off() == before
    with display(quiet=True):
        assert off() == (True, True, True)
    assert off() == before


def test_the_end_names_what_was_slow(seconds: None) -> None:
    with display() as shown:
        shown.took = {"comparing": 0.01, "fine-tuning": 70.0, "timing": 10.0}
        shown.began -= 100
    assert re.fullmatch(r"Took 1 min 4\d s: fine-tuning 1 min 10 s, timing 10 s\.", shown.summary())


def test_a_failure_ends_the_bar_and_is_not_counted() -> None:
    with display() as shown, pytest.raises(ValueError, match="broken"), task("comparing"):
        raise ValueError("broken")
    assert shown.took == {}


@pytest.mark.parametrize(
    ("seconds_", "said"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (7200, "2 h"),
    ],
)
def test_durations(seconds_: float, said: str) -> None:
    assert duration(seconds_) == said


def test_plurals() -> None:
    assert [plural(unit) for unit in ("", "pass", "batch", "batch size", "step")] == [
        "",
        "passes",
        "batches",
        "batch sizes",
        "steps",
    ]
