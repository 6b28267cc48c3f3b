"""CUDA's door: the parts of a stage in inference, and attention among packed tokens, as kernels in Triton.

Serves float32 and half precision without gradients where Triton is installed, as it comes with torch for CUDA. The host
waits for the device once a stage, to learn how many tokens each image keeps.

Shapes: B images, T rows of the batch laid end to end, M tokens of the longest image, N tokens of an image in the dense
sequence, H heads, K head width, D width.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vitprune.pruning.layout import Layout
from vitprune.pruning.token_batch import Pairs
from vitprune.recipe.errors import first_line

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton has matrix products of bfloat16 from NVIDIA's Ampere on
_LEAST_CAPABILITY = (8, 0)
knows_pairs = True
# tokens of an image that a program takes at a time, where it doesn't compare them
_SINGLE = 32
# the widest head whose tile of keys fits into a program
_WIDEST_HEAD = 256


@cache
def _launches() -> Any:
    """The module; None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from vitprune.pruning.kernels import cuda_launches  # now, since it takes its time

    return cuda_launches


@cache
def _can_launch(device: torch.device) -> bool:
    """Whether Triton is there and works: it builds in C what launches its kernels, and those for the device."""
    try:
        if _launches() is None:
            return False
        kept_B = torch.ones(1, dtype=torch.int64, device=device)
        return int(lay_out((1,), kept_B, kept_B).spans(device)[0]) == 0
    except Exception as error:  # without a compiler, Python's headers, or a cache that can be written; a newer device
        warnings.warn(
            f"Triton doesn't work on {device} ({first_line(error)}), so pruning is done by torch's operators, which "
            "takes longer; it needs a C compiler such as gcc, a cache that it can write to (TRITON_CACHE_DIR), and to "
            "know the device",
            stacklevel=2,
        )
        return False


def fits(x: Tensor) -> bool:
    """Whether kernels may do the stages of a forward on such hidden states."""
    if not x.is_cuda or x.dtype not in _DTYPES or torch.is_grad_enabled():
        return False
    return torch.cuda.get_device_capability(x.device) >= _LEAST_CAPABILITY and _can_launch(x.device)


def fits_attention(q: Tensor) -> bool:
    """Whether `packed.attention` takes such queries."""
    return q.dtype in _DTYPES and q.shape[-1] <= _WIDEST_HEAD


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
    """As the other doors' (`cpu.compute_stats`); scores beyond an image's tokens are 0."""
    rows, heads, width = k_THK.shape
    k_THK, contexts_THK = _with_unit_stride(k_THK), _with_unit_stride(contexts_THK)
    starts_B, lengths_B = layout.spans(k_THK.device)
    new = _new_of(k_THK)
    logits_TH, norms_TH = (new(rows, heads), new(rows, heads)) if query_BHK is not None else (None, None)
    metric_TK = new(rows, width) if wants_metric else None
    images, longest = len(layout.lengths), max(layout.lengths)
    query_strides = (0, 0) if query_BHK is None else query_BHK.stride()[:2]
    _launch("token_stats", (images, _tiles(longest, _SINGLE)),
        query_BHK, k_THK, contexts_THK, sizes_T, *_of_pairs(pairs), starts_B, lengths_B,
        logits_TH, norms_TH, metric_TK, scale,
        *query_strides, *k_THK.stride()[:2], *contexts_THK.stride()[:2],
        HEADS=heads, WIDTH=width, BLOCK_K=_power(width), BLOCK_M=_SINGLE, HAS_QUERY=query_BHK is not None,
        HAS_SIZES=sizes_T is not None, HAS_PAIRS=pairs is not None, HAS_METRIC=wants_metric,
    )  # fmt: skip
    if query_BHK is None:
        return None, metric_TK
    scores_BM = new(images, longest)
    known = logits_TH, norms_TH, starts_B, lengths_B, scores_BM, longest
    _launch("head_weighted_attention", (images,), *known, HEADS=heads, BLOCK_M=_power(longest))
    return scores_BM, metric_TK


def mean_query(q_THK: Tensor, sizes_T: Tensor | None, layout: Layout) -> Tensor:
    """`scores.mean_query` of packed queries, (B, H, K)."""
    (_, heads, width), images = q_THK.shape, len(layout.lengths)
    q_THK = _with_unit_stride(q_THK)
    means_BHK = q_THK.new_empty(images, heads, width)
    _launch("mean_query", (images, heads),
        q_THK, sizes_T, *layout.spans(q_THK.device), means_BHK, *q_THK.stride()[:2],
        HEADS=heads, WIDTH=width, BLOCK_K=_power(width), BLOCK_M=_SINGLE, HAS_SIZES=sizes_T is not None,
    )  # fmt: skip
    return means_BHK


def density_peaks(
    metric_TK: Tensor,
    scores_BM: Tensor,
    num_patches: int | Tensor,
    exponent: float,
    num_prefix_tokens: int,
    layout: Layout,
) -> Tensor:
    """As the other doors' (`cpu.density_peaks`)."""
    (images, longest), width = scores_BM.shape, metric_TK.shape[1]
    starts_B, lengths_B = layout.spans(metric_TK.device)
    order_BM = scores_BM.new_empty(scores_BM.shape, dtype=torch.int32)
    tile = _paired_tile(width)
    grid = images, _tiles(max(longest - num_prefix_tokens, num_prefix_tokens), tile)
    known = scores_BM, lengths_B, order_BM, longest
    _launch("order_by_importance", grid, *known, PREFIX=num_prefix_tokens, BLOCK=tile)
    redundancy_BM = torch.empty_like(scores_BM)
    differ = isinstance(num_patches, Tensor)
    dense = 0.0 if differ else float(num_patches)
    patches_B = num_patches if differ else None
    _launch("density_peaks", grid,
        metric_TK, scores_BM, order_BM, patches_B, starts_B, lengths_B, redundancy_BM, longest, dense, exponent,
        PREFIX=num_prefix_tokens, WIDTH=width, BLOCK_K=_power(width), BLOCK=tile,
        DIFFER=differ, WEIGHS=exponent != 0,
    )  # fmt: skip
    return redundancy_BM


def select(
    scores_BM: Tensor,
    threshold: Tensor,
    at_least: int,
    metric_TK: Tensor | None,
    num_prefix_tokens: int,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the other doors' (`cpu.select`)."""
    images, longest = scores_BM.shape
    starts_B, lengths_B = layout.spans(scores_BM.device)
    scores_BM, threshold = scores_BM.contiguous(), threshold.to(scores_BM.device)  # where a device map put it elsewhere
    keep_BM = scores_BM.new_empty(scores_BM.shape, dtype=torch.bool)
    kept_B, order_BM = torch.empty_like(lengths_B), scores_BM.new_empty(scores_BM.shape, dtype=torch.int32)
    known = scores_BM, threshold, lengths_B, keep_BM.view(torch.uint8), kept_B, order_BM, longest, at_least
    _launch("select", (images,), *known, PREFIX=num_prefix_tokens, BLOCK_M=_power(longest))
    if metric_TK is None:
        return keep_BM, kept_B, None
    dst_BM = scores_BM.new_empty(scores_BM.shape, dtype=torch.int64)
    width = metric_TK.shape[1]
    tile = _paired_tile(width)
    _launch("nearest_kept", (images, _tiles(longest, tile)),
        metric_TK, order_BM, kept_B, starts_B, lengths_B, dst_BM, longest,
        PREFIX=num_prefix_tokens, WIDTH=width, BLOCK_K=_power(width), BLOCK=tile,
    )  # fmt: skip
    return keep_BM, kept_B, dst_BM


def lay_out(kept: Sequence[int], kept_B: Tensor | None, x_TD: Tensor) -> Layout:
    """Images in their order, without fillers; where each begins is known on the device.

    kept_B: what `kept` says, where the device knows.
    """
    layout = Layout(tuple(kept), in_order=True)
    if kept_B is None:
        return layout
    starts_B = torch.empty_like(kept_B)
    _launch("lay_end_to_end", (1,), kept_B, starts_B, len(kept), BLOCK_B=_power(len(kept)))
    layout.spans_on[x_TD.device] = starts_B, kept_B
    return layout


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
    """As the other doors' (`cpu.reduce`)."""
    (images, longest), rows, width, merges = keep_BM.shape, after.num_rows, x_TD.shape[1], dst_BM is not None
    (starts_B, lengths_B), (starts_after_B, kept_B) = (layout.spans(x_TD.device) for layout in (before, after))
    x_TD, keep_BM = _with_unit_stride(x_TD), keep_BM.contiguous().view(torch.uint8)
    order_BM = keep_BM.new_empty(keep_BM.shape, dtype=torch.int32)
    slots_after_BM = torch.empty_like(order_BM)
    known = keep_BM, lengths_B, order_BM, slots_after_BM, longest
    _launch("number_kept", (images,), *known, BLOCK_M=_power(longest))
    y_TD, positions_after_T = x_TD.new_empty(rows, width), positions_T.new_empty(rows)
    sizes_after_T = x_TD.new_empty(rows, dtype=torch.float32) if merges else None
    _launch("reduce", (images, max(after.lengths)),
        x_TD, positions_T, sizes_T, dst_BM, order_BM, starts_B, lengths_B, starts_after_B, kept_B,
        y_TD, positions_after_T, sizes_after_T, longest, x_TD.stride(0),
        WIDTH=width, BLOCK_D=_power(width), MERGES=merges, HAS_SIZES=sizes_T is not None,
    )  # fmt: skip
    patch_token_BN = patch_token_BN.contiguous()
    patch_token_after_BN, dense_tokens = torch.empty_like(patch_token_BN), patch_token_BN.shape[1]
    _launch("move_patches", (images, _tiles(dense_tokens, _SINGLE)),
        patch_token_BN, keep_BM, dst_BM, slots_after_BM, patch_token_after_BN, longest, dense_tokens,
        BLOCK_N=_SINGLE, MERGES=merges,
    )  # fmt: skip
    return y_TD, positions_after_T, sizes_after_T, patch_token_after_BN


def unpack(x_TD: Tensor, patch_token_BN: Tensor, layout: Layout, num_prefix_tokens: int, *, averages: bool) -> Tensor:
    """As `TokenBatch.unpack`. averages: some tokens of the dense sequence have none that stands for them."""
    (images, dense_tokens), width = patch_token_BN.shape, x_TD.shape[1]
    x_TD, (starts_B, lengths_B) = _with_unit_stride(x_TD), layout.spans(x_TD.device)
    means_BD = x_TD.new_empty(images, width) if averages else None
    known = {"WIDTH": width, "BLOCK_D": 128}
    if averages:
        places = starts_B, lengths_B, means_BD, x_TD.stride(0)
        _launch("mean_patches", (images, _tiles(width, 128)), x_TD, *places, PREFIX=num_prefix_tokens, **known)
    out_BND = x_TD.new_empty(images, dense_tokens, width)
    _launch("unpack", (images, _tiles(dense_tokens, 4)),
        x_TD, patch_token_BN.contiguous(), starts_B, means_BD, out_BND, dense_tokens, x_TD.stride(0),
        WIDTH=width, BLOCK_D=_power(width), BLOCK_N=4, AVERAGES=averages,
    )  # fmt: skip
    return out_BND


def packed_attention(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    sizes_T: Tensor | None,
    layout: Layout,
    scale: float,
    pairs: Pairs | None = None,
    read: int | None = None,
) -> Tensor:
    """Context vectors of packed queries, (T, H, K): every image attends to its own tokens only.

    sizes_T: float32, whose logarithms are added to the logits of keys; None: all are one. pairs: what is added, too.
    read: so many queries an image, laid end to end; None: queries lie as keys do.
    """
    rows, heads, width = q_THK.shape
    q_THK, k_THK, v_THK = map(_with_unit_stride, (q_THK, k_THK, v_THK))
    contexts_THK, most = v_THK.new_empty(rows, heads, width), read or max(layout.lengths)
    query_tile, key_tile = _attention_tiles(v_THK, most)
    _launch("packed_attention", (_tiles(most, query_tile), len(layout.lengths), heads),
        q_THK, k_THK, v_THK, sizes_T, *_of_pairs(pairs), *layout.spans(q_THK.device), contexts_THK, scale,
        *q_THK.stride()[:2], *k_THK.stride()[:2], *v_THK.stride()[:2],
        HEADS=heads, WIDTH=width, READ=read or 0, BLOCK_K=_power(width), BLOCK_Q=query_tile, BLOCK_N=key_tile,
        HAS_SIZES=sizes_T is not None, HAS_PAIRS=pairs is not None,
    )  # fmt: skip
    return contexts_THK


def _of_pairs(pairs: Pairs | None) -> tuple[Tensor | None, Tensor | None, int, int, int]:
    """Table, positions, and what a head, a query and a key are apart in the table."""
    if pairs is None:
        return None, None, 0, 0, 0
    _, head, query, key = pairs.table_1HNN.stride()
    return pairs.table_1HNN, pairs.positions_T, head, query, key


def _paired_tile(width: int) -> int:
    """Tokens of an image that a program compares with as many others at a time; more don't fit into its registers."""
    return 32 if width <= 128 else 16


def _attention_tiles(v_THK: Tensor, longest: int) -> tuple[int, int]:
    """Queries and keys of a tile; they fit into 99 KiB, what the smallest of these devices has for a program."""
    width = v_THK.shape[-1]
    if v_THK.dtype == torch.float32:
        return (64, 32) if width <= 64 else (32, 32) if width <= 128 else (16, 16)
    return (128, 64) if width <= 64 and longest > 64 else (64, 64) if width <= 128 else (32, 32)


def _launch(name: str, grid: tuple[int, ...], *values: Any, **constants: int) -> None:
    """A kernel on the device of its tensors, which needn't be the current one."""
    x = next(value for value in values if isinstance(value, Tensor))
    with torch.cuda.device_of(x) if x.is_cuda else nullcontext():
        getattr(_launches(), name)[grid](*values, **constants)


def _power(count: int) -> int:
    """The power of two that isn't less, and what Triton's matrix products take at least."""
    return max(16, 1 << (count - 1).bit_length())


def _tiles(count: int, tile: int) -> int:
    return -(-count // tile)


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _new_of(x: Tensor) -> Any:
    def new(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    return new
