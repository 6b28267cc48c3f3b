"""Fixtures for all tests: tiny models from configs, and the folder with golden values where it exists."""

from __future__ import annotations

import os

# Triton reads it when it is first imported, which torch may do: without a GPU the CUDA door's kernels run in its
# interpreter. TRITON_INTERPRET=0: on the GPU
os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState
from made_up_clock import Clock
from samples import SHARED
from torch.nn.modules.module import register_module_forward_hook
from triton_interpreter import mend

if os.environ["TRITON_INTERPRET"] == "1":
    mend()
_left_out: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "shared: needs the folder `shared` beside the checkout (golden values, a real model)"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SHARED.is_dir():
        return
    for item in items:
        if item.get_closest_marker("shared"):
            _left_out.append(item.nodeid)
            item.add_marker(pytest.mark.skip(reason=f"{SHARED} isn't there"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _left_out:
        terminalreporter.write_line(f"{len(_left_out)} tests were left out: they need the folder {SHARED}", yellow=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate fixes devices and precision once a process; each test has its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _few_tries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages are looked for among few schedules; test_schedule looks among all."""
    if request.module.__name__.rpartition(".")[2] != "test_schedule":
        monkeypatch.setattr("vitprune.budget.schedule.MOST_TRIES", 3)


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test looks at how long something took."""
    monkeypatch.setattr("vitprune.measure.timing.SHORTEST", 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """Takes the place of `time.perf_counter`."""
    clock = Clock()
    handle = register_module_forward_hook(clock.ran)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    # calls cost nothing by this clock, and rows do: no fillers to save calls
    monkeypatch.setattr("vitprune.pruning.layout.CALL_MACS", 0)
    yield clock
    handle.remove()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # two processes with two threads each wait for one another on small machines
    torch.set_num_threads(1)
