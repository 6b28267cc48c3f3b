"""What a stage does in inference on a CPU, in a few calls.

Knows when and how tensors become arrays for `loops`, which numba compiles. Without numba, on other devices and where
gradients flow, `scoring` and `departure` do the same in operators of torch.

Shapes: B images, T rows of the batch laid end to end, M tokens of the longest image, H heads, K head width, D width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16)


@cache
def _loops() -> Any:
    """The module; None without numba."""
    if not has_loops():
        return None
    from vitprune import loops  # now, since it takes its time

    return loops


def has_loops() -> bool:
    """Whether numba is there."""
    return importlib.util.find_spec("numba") is not None


def can_loop(*tensors: Tensor) -> bool:
    """Whether loops may do what is to be done with such tensors."""
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return not learns and all(x.device.type == "cpu" and x.dtype in _DTYPES for x in tensors) and _loops() is not None


def find(
    asking_BHK: Tensor | None,
    k_THK: Tensor,
    contexts_THK: Tensor,
    key_bias_T: Tensor | None,
    scaling: float,
    starts: Sequence[int],
    lengths: Sequence[int],
    *,
    wants_metric: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """What a block's attention says about its tokens.

    asking_BHK: the query of each image whose row scores its tokens; None: no scores.

    Returns AS-ViT's scores (B, M), `scoring.head_weighted_attention`, and what similarity is measured on, (B, M, K),
    `scoring.key_metric`; both float32.
    """
    images, most = len(lengths), max(lengths)
    scores_BM = None if asking_BHK is None else torch.empty(images, most)
    metric_BMK = torch.empty(images, most, k_THK.shape[2]) if wants_metric else None
    known = (asking_BHK, k_THK, contexts_THK, key_bias_T, np.float32(scaling), starts, lengths)
    _run(_loops().find, images, *known, scores_BM, metric_BMK)
    return scores_BM, metric_BMK


def redundancy(
    metric_BMK: Tensor, scores_BM: Tensor | None, exponent: float, num_prefix_tokens: int, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """`scoring.redundancy`, weighed by S^α where there are scores S: (B, M) and the anchors' indices (B, M)."""
    redundancy_BM = torch.empty(metric_BMK.shape[:2])
    anchors_BM = torch.empty(metric_BMK.shape[:2], dtype=torch.long)
    known = (metric_BMK, scores_BM, np.float32(exponent), num_prefix_tokens)
    _run(_loops().redundancy, len(lengths), *known, lengths, redundancy_BM, anchors_BM)
    return redundancy_BM, anchors_BM


def most_similar(metric_BMK: Tensor, keep_BM: Tensor, num_prefix_tokens: int, lengths: Sequence[int]) -> Tensor:
    """For each patch that leaves the most similar one that stays, (B, M) long; `scoring.most_similar`."""
    takers_BM = torch.empty(keep_BM.shape, dtype=torch.long)
    _run(_loops().most_similar, len(lengths), metric_BMK, keep_BM, num_prefix_tokens, lengths, takers_BM)
    return takers_BM


def depart(
    x_TD: Tensor,
    positions_T: Tensor,
    sizes_T: Tensor | None,
    carriers_BN: Tensor,
    keep_BM: Tensor,
    takers_BM: Tensor | None,
    starts: Sequence[int],
    lengths: Sequence[int],
    starts_after: Sequence[int],
    rows_after: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """What `departure.depart` makes of hidden states, positions, sizes and carriers where tokens leave or merge."""
    rows = sum(rows_after)
    y_TD, positions_after_T = x_TD.new_empty(rows, x_TD.shape[1]), positions_T.new_empty(rows)
    sizes_after_T = None if takers_BM is None else torch.empty(rows)
    if takers_BM is not None and sizes_T is None:
        sizes_T = torch.ones(len(x_TD))
    carriers_after_BN = torch.empty_like(carriers_BN)
    before = (x_TD, positions_T, sizes_T, carriers_BN, keep_BM, takers_BM, starts, lengths)
    after = (y_TD, positions_after_T, sizes_after_T, carriers_after_BN)
    _run(_loops().depart, len(lengths), *before, starts_after, rows_after, *after)
    return y_TD, positions_after_T, sizes_after_T, carriers_after_BN


def _run(loop: Any, images: int, *values: Any) -> None:
    threads = torch.get_num_threads()
    loop(*(_array(value) for value in values), threads=1 if images == 1 else threads)
    if torch.get_num_threads() != threads:  # numba shares OpenMP with torch, and sets its threads when it starts
        torch.set_num_threads(threads)


def _array(value: Any) -> Any:
    if isinstance(value, Tensor):
        x = value.detach() if value.requires_grad else value
        return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
    return np.array(value) if isinstance(value, Sequence) else value
