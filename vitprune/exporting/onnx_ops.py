"""What torch's exporter to ONNX can't say yet, or says at length."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18

op: Any = opset18  # whose annotations know no graph


def _sort_stable(self: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """TopK of all values: of equal ones it gives the one of the lower index first."""
    count = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
    values, indices = op.TopK(self, count, axis=dim, largest=int(descending), sorted=1)
    return values, indices


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Without torch's care for rows in which everything is masked: there are none."""
    assert not is_causal
    assert not enable_gqa
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scaled = op.Mul(query, op.CastLike(op.Constant(value_float=factor), query))
    logits = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None:
        logits = op.Add(logits, attn_mask)
    return op.MatMul(op.Softmax(logits, axis=-1), value)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.sort.stable: _sort_stable,
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
}
"""For `torch.onnx.export(custom_translation_table=…)`."""
