"""How much memory a call takes, and how much there is.

Knows bytes of working memory: what torch allocates at its peak beyond what was there before the call, so neither
weights nor the batch. Exact, the same in every run, and not what the operating system shows: that also has libraries,
and memory that the allocator keeps for later.

Tensor suffixes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vitprune.runtime.files import GIB

PROBED = 2  # images
_CGROUP = Path("/sys/fs/cgroup")
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that the call holds at its peak, beyond what is held before it."""
    match device.type:
        case "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            call()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        case _:
            return _peak_on_cpu(call)


def _peak_on_cpu(call: Callable[[], object]) -> int:
    """By the profiler's events, one for every allocation and every release."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces start and end on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        call()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue] — their stub lacks it
        peak = max(peak, held)
    return peak


def require_memory(call: Callable[[Tensor], object], x_BCHW: Tensor, batch_size: int) -> None:
    """Raise MemoryError if a call on so many images would take more working memory than there is.

    Told from what it takes on one image and on two, of `x_BCHW`: where memory runs out a process may be killed unasked.
    """
    if len(x_BCHW) < PROBED or batch_size <= PROBED:
        return
    one, two = (peak_memory(lambda count=count: call(x_BCHW[:count]), x_BCHW.device) for count in (1, PROBED))
    needed, free = one + (batch_size - 1) * (two - one), free_memory(x_BCHW.device)
    if needed > free:
        raise MemoryError(f"it would take {needed / GIB:.1f} GiB of working memory, {free / GIB:.1f} GiB are free")


def free_memory(device: torch.device) -> float:
    """Bytes that a process could still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(psutil.virtual_memory().available, _left_in_container())


def _left_in_container() -> float:
    limit, used = (_CGROUP / name for name in ("memory.max", "memory.current"))
    if not limit.is_file() or not used.is_file():
        return math.inf
    text = limit.read_text(encoding="utf-8").strip()
    if text == "max":
        return math.inf
    stat, freed = _CGROUP / "memory.stat", 0
    if stat.is_file():  # files that were read count as used, until something else needs the room
        entries = dict(line.split() for line in stat.read_text(encoding="utf-8").splitlines())
        freed = sum(int(entries.get(name, 0)) for name in ("inactive_file", "slab_reclaimable"))
    return int(text) - int(used.read_text(encoding="utf-8")) + freed


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: CUDA has a class for it, torch's CPU allocator has not."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
