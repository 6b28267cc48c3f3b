"""The processes of a run: how one joins the others, and how they agree."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from datasets import disable_progress_bars
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.tensor import DTensor
from transformers.utils import logging as transformers_logging

T = TypeVar("T")

# the others wait while the main process calibrates, meets a budget or takes times
PATIENCE = timedelta(hours=2)
_FAILURES = "vitprune/failures"
# the main process computes what the others wait for: they would miss what it tells or asks them now
_alone: ContextVar[bool] = ContextVar("vitprune_alone", default=False)
# gloo's errors are RuntimeErrors with its name in them
_LOST = r"gloo|[Cc]onnection (closed|reset|refused)"


def on_cpu() -> bool:
    """Whether the run computes on CPUs: no accelerator is there, or none is wanted."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def init() -> PartialState:
    """This process's place in the run; the first call forms the group that a launcher started.

    Raises OSError where the processes can't reach one another.
    """
    try:
        state = PartialState(cpu=on_cpu(), timeout=PATIENCE) if _is_launched() else PartialState(cpu=on_cpu())
    except distributed.DistNetworkError as error:
        raise OSError(
            f"the processes of this run can't form a group: {str(error).splitlines()[0]}; if the port is in use give "
            "another (--main_process_port, 0 finds a free one), and on several machines see that all reach the first"
        ) from error
    if not state.is_main_process:
        transformers_logging.disable_progress_bar()
        disable_progress_bars()
    return state


def _is_launched() -> bool:
    return distributed.is_torchelastic_launched() or distributed.is_initialized()


def destroy() -> None:
    """End the group, if there is one."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def on_main(compute: Callable[[], T]) -> T:
    """What the main process computes, in every process. Not within what it computes so."""
    assert not _alone.get()
    token = _alone.set(True)
    try:
        own = compute() if init().is_main_process else None
    finally:
        _alone.reset(token)
    (result,) = broadcast_object_list([own])
    return result  # pyright: ignore[reportReturnType] — all have the main process's now


def all_gather(value: T) -> list[T]:
    """The values of all processes, in their order."""
    assert not _alone.get()
    return gather_object([value])


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that is sharded over the processes; another as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def require_same(what: Mapping[str, object], name: str) -> None:
    """Raise ValueError naming the keys where another process's values aren't the main process's."""
    first, *others = all_gather(dict(what))
    for index, other in enumerate(others, start=1):
        if other != first:
            keys = sorted(key for key in {*first, *other} if first.get(key) != other.get(key))
            shown = ", ".join(f"{key}: {first.get(key)!r} and {other.get(key)!r}" for key in keys)
            raise ValueError(f"processes 0 and {index} have different {name} ({shown}); give all the same")


def has_lost_another(error: BaseException) -> bool:
    """Whether an error says that another process of the run is gone."""
    if not distributed.is_initialized():
        return False
    return isinstance(error, distributed.DistError) or re.search(_LOST, str(error)) is not None


def first_to_fail() -> bool:
    """Whether no other process has failed before: its error is the cause, and the only one to be shown."""
    if not distributed.is_initialized():
        return True
    try:
        return _get_default_store().add(_FAILURES, 1) == 1
    except RuntimeError:  # the process that keeps the count is gone
        return False
