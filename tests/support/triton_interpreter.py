"""Triton's interpreter, which runs the CUDA door's kernels on the CPU, as devices have it.

In 3.9 it multiplies the bits of bfloat16 numbers instead of the numbers, and cuts off what it converts to bfloat16
where devices round to the nearest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def _widened(bits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16).float().numpy()


def _cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
    kinds = src.dtype.scalar, dst_type.scalar
    if kinds == (tl.bfloat16, tl.float32):
        return TensorHandle(_widened(src.data), tl.float32)
    if kinds == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy()
        return TensorHandle(rounded.view(np.uint16), tl.bfloat16)
    return _cast(self, src, dst_type)


def _create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    a, b = (TensorHandle(_widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _dot(self, a, b, *rest)


def mend() -> None:
    vars_of: Any = InterpreterBuilder
    vars_of.cast_impl, vars_of.create_dot = _cast_impl, _create_dot
