"""How loops become fast functions: numba compiles them, for one thread and for several."""

from __future__ import annotations

from functools import cache
from threading import Lock
from types import FunctionType
from typing import Any

import numba
import numpy as np
from numba.np.ufunc import threading_layer

# sums in any order, which makes vectors of them; but what is no number stays what it is
FASTMATH = {"reassoc", "contract", "nsz"}
# not asked of numba.get_num_threads, which would start its threads
_MOST_THREADS: int = numba.config.NUMBA_NUM_THREADS  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]


def _compiled(function: FunctionType, **options: Any) -> Any:
    options = {"fastmath": FASTMATH, "nogil": True, **options}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to keep what was compiled
        return numba.njit(**options)(function)


def _nothing(numbers: Any) -> None:
    for i in numba.prange(len(numbers)):
        numbers[i] = 0


_lock = Lock()


@cache
def _shares_threads() -> bool:
    """Whether several threads of Python may run loops in parallel at once; numba's own pool would end the process."""
    _compiled(_nothing, parallel=True)(np.zeros(2))
    return threading_layer() != "workqueue"


class Loop:
    """A function over images, compiled for one thread and for several; takes arrays, None for no array, and numbers.

    The first call for several threads starts numba's, which may change how many OpenMP has in this thread.
    """

    def __init__(self, function: FunctionType) -> None:
        self._serial = _compiled(function)
        # under a name of its own, by which numba keeps what it compiled
        twin = FunctionType(function.__code__, function.__globals__)
        twin.__qualname__ += "_in_parallel"
        self._parallel = _compiled(twin, parallel=True)

    def __call__(self, *values: Any, threads: int) -> None:
        threads = min(threads, _MOST_THREADS)
        if threads > 1:
            with _lock:
                threads = threads if _shares_threads() else 1
        if threads == 1:
            return self._serial(*values)
        others = numba.get_num_threads()  # what this thread's other users of numba have
        numba.set_num_threads(threads)
        try:
            return self._parallel(*values)
        finally:
            numba.set_num_threads(others)
