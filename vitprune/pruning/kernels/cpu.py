"""The CPU's door: the parts of a stage in inference as loops over arrays, which numba compiles.

Serves float32 and bfloat16 without gradients where numba is installed. Here tensors become arrays and back.

Shapes: B images, T rows of the batch laid end to end, M tokens of the longest image, N tokens of an image in the dense
sequence or, of order and distances, patches at the stage, H heads, K head width, D width.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from vitprune.pruning.layout import Layout
from vitprune.pruning.token_batch import MeanQuery, PackedAttentionKernel, Pairs, Unpack

_DTYPES = (torch.float32, torch.bfloat16)

knows_pairs = False
# torch's are as fast
mean_query: MeanQuery | None = None
packed_attention: PackedAttentionKernel | None = None
unpack: Unpack | None = None


@cache
def _loops() -> Any:
    """The module; None without numba, or with one that doesn't work here, which is said once."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        import numba

        from vitprune.pruning.kernels import cpu_loops  # now, since it takes its time
    except Exception as error:  # it has many ways not to fit numpy, Python or the machine
        warnings.warn(
            f"numba is installed and can't be used ({type(error).__name__}: {error}); stages run without it, which "
            "takes several times as long",
            stacklevel=2,
        )
        return None
    settings: Any = numba.config  # pyright: ignore[reportPrivateImportUsage]
    return None if settings.DISABLE_JIT else cpu_loops


def has_loops() -> bool:
    """Whether numba is there, and works."""
    return _loops() is not None


def fits(x: Tensor) -> bool:
    """Whether loops may do the stages of a forward on such hidden states."""
    if not x.is_cpu or x.dtype not in _DTYPES or torch.is_autocast_enabled("cpu"):
        return False
    return not torch.is_grad_enabled() and _loops() is not None


def fits_attention(q: Tensor) -> bool:
    """Whether there is attention for such queries: there is none."""
    return False


def compute_stats(
    query_BHK: Tensor | None,
    k_THK: Tensor,
    contexts_THK: Tensor,
    sizes_T: Tensor | None,
    scale: float,
    layout: Layout,
    pairs: Pairs | None = None,
    *,
    wants_metric: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """What a block's attention says about its tokens.

    query_BHK: the query of each image whose row scores its tokens; None: no scores.

    Returns AS-ViT's scores (B, M), `scores.head_weighted_attention`, and what similarity is measured on, (T, K),
    `scores.key_metric`; both float32.
    """
    assert pairs is None
    images = len(layout.lengths)
    scores_BM = None if query_BHK is None else np.empty((images, max(layout.lengths)), np.float32)
    metric_TK = np.empty((k_THK.shape[0], k_THK.shape[2]), np.float32) if wants_metric else None
    known = (_array(query_BHK), _array(k_THK), _array(contexts_THK), _array(sizes_T), np.float32(scale))
    _run(_loops().compute_stats, *known, layout.spans_3B, scores_BM, metric_TK, images=images)
    return _tensor(scores_BM), _tensor(metric_TK)


def density_peaks(
    metric_TK: Tensor,
    scores_BM: Tensor,
    num_patches: int | Tensor,
    exponent: float,
    num_prefix_tokens: int,
    layout: Layout,
) -> Tensor:
    """`scores.density_peaks`, weighed by (n·S)^α, (B, M): +inf for prefix tokens, −inf beyond an image's tokens."""
    images, redundancy_BM = len(scores_BM), np.empty(scores_BM.shape, np.float32)
    patches_B = _alike(images, num_patches) if isinstance(num_patches, int) else _array(num_patches.flatten().float())
    known = _array(metric_TK), _array(scores_BM), patches_B, np.float32(exponent), num_prefix_tokens, layout.spans_3B
    _run(_loops().density_peaks, *known, redundancy_BM, images=images)
    return _tensor(redundancy_BM)


@cache
def _alike(images: int, number: int) -> np.ndarray:
    """The same number for each image, (B,) float32. Not to be written to."""
    return np.full(images, number, np.float32)


def select(
    scores_BM: Tensor,
    threshold: Tensor,
    at_least: int,
    metric_TK: Tensor | None,
    num_prefix_tokens: int,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Which tokens stay, how many of each image, and for each that leaves the most similar patch that stays.

    `selection.above_threshold`, bool (B, M), and by a metric, if there is one, `scores.nearest`, (B, M) long.
    scores_BM: those of prefix tokens don't matter, nor what lies beyond an image's tokens.
    """
    shape_BM = scores_BM.shape
    keep_BM, kept_B = np.empty(shape_BM, np.bool_), np.empty(shape_BM[0], np.int64)
    dst_BM = None if metric_TK is None else np.empty(shape_BM, np.int64)
    least = np.float32(threshold.item())
    known = _array(scores_BM), least, at_least, _array(metric_TK), num_prefix_tokens, layout.spans_3B
    _run(_loops().select, *known, keep_BM, kept_B, dst_BM, images=shape_BM[0])
    return _tensor(keep_BM), _tensor(kept_B), _tensor(dst_BM)


def lay_out(kept: Sequence[int], kept_B: Tensor | None, x_TD: Tensor) -> Layout:
    """Where images of so many tokens lie. kept_B: the same as a tensor, where there is one."""
    return Layout.fitting(kept, x_TD)


def reduce(
    x_TD: Tensor,
    positions_T: Tensor,
    sizes_T: Tensor | None,
    patch_token_BN: Tensor,
    keep_BM: Tensor,
    dst_BM: Tensor | None,
    before: Layout,
    after: Layout,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """What `reduction.reduce_tokens` makes of hidden states, positions, sizes and `TokenBatch.patch_token_BN`."""
    rows = after.num_rows
    y_TD = x_TD.new_empty(rows, x_TD.shape[1])  # linear layers like how torch aligns it
    positions_after_T, patch_token_after_BN = np.empty(rows, np.int64), np.empty(patch_token_BN.shape, np.int64)
    sizes, sizes_after_T = _array(sizes_T), None
    if dst_BM is not None:
        sizes_after_T = np.empty(rows, np.float32)
        sizes = np.ones(len(x_TD), np.float32) if sizes is None else sizes
    known = _array(x_TD), _array(positions_T), sizes, _array(patch_token_BN), _array(keep_BM), _array(dst_BM)
    made = _array(y_TD), positions_after_T, sizes_after_T, patch_token_after_BN
    _run(_loops().reduce, *known, before.spans_3B, after.spans_3B, *made, images=len(before.lengths))
    return y_TD, _tensor(positions_after_T), _tensor(sizes_after_T), _tensor(patch_token_after_BN)


def _run(loop: Any, *values: Any, images: int) -> None:
    threads = torch.get_num_threads()
    loop(*values, threads=1 if images == 1 else threads)
    if torch.get_num_threads() != threads:  # numba shares OpenMP with torch, and sets its threads when it starts
        torch.set_num_threads(threads)


@overload
def _array(x: Tensor) -> np.ndarray: ...
@overload
def _array(x: Tensor | None) -> np.ndarray | None: ...
def _array(x: Tensor | None) -> np.ndarray | None:
    if x is None:
        return None
    x = x.detach() if x.requires_grad else x
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


@overload
def _tensor(x: np.ndarray) -> Tensor: ...
@overload
def _tensor(x: np.ndarray | None) -> Tensor | None: ...
def _tensor(x: np.ndarray | None) -> Tensor | None:
    return None if x is None else torch.from_numpy(x)
