"""What a stage does in inference on a CPU, as loops over images and tokens that numba compiles.

The semantics are those of `scores`, `selection` and `packed.reduction`, which do the same in operators of torch: some
seventy a stage, each of them small.

Half precision comes as the bits of bfloat16 in 16-bit integers; numba has no such number. Images are independent, so
what is no number in one image stays there.

spans_3B: of each image the first row, the number of tokens, and of rows; those behind the last image are its own. Array
suffixes: B images, T rows of the batch laid end to end, M tokens of the longest image, N tokens of an image in the
dense sequence, H heads, K head width, D width.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from vitprune.pruning.kernels.cpu_compile import FASTMATH, Loop

NO_TOKEN = -1  # as in `token_batch`


def _bitcast(to: Any, of: Any, kind: ir.Type) -> Any:
    """A function that takes the bits of a number for another's."""

    def typed(_, bits):
        return to(of), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], kind)

    return intrinsic(typed)


_float_of = _bitcast(types.float32, types.uint32, ir.FloatType())
_bits_of = _bitcast(types.uint32, types.float32, ir.IntType(32))


# Python never calls the next two: numba compiles their overloads, which depend on the type, in their place
def _wide(number):
    """As float32."""
    raise NotImplementedError


@overload(_wide)
def _(number):
    if number == types.uint16:
        return lambda number: _float_of(np.uint32(number) << np.uint32(16))
    return lambda number: number


def _like(number, other):
    """A float32 in the precision of `other`; to the nearest even."""
    raise NotImplementedError


@overload(_like)
def _(number, other):
    if other != types.uint16:
        return lambda number, other: number

    def rounded(number, other):
        if number != number:
            return np.uint16(0x7FC0)
        bits = _bits_of(number)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return rounded


@Loop
def compute_stats(
    query_BHK: Any,
    keys_THK: Any,
    contexts_THK: Any,
    sizes_T: Any,
    scale: Any,
    spans_3B: Any,
    scores_BM: Any,
    metric_TK: Any,
) -> None:
    """What a block's attention says about its tokens; `scores.head_weighted_attention` and `scores.key_metric`.

    scores_BM, metric_TK: None where it isn't asked for. sizes_T: None where no token has a size.
    """
    heads, width = keys_THK.shape[1], keys_THK.shape[2]
    for b in numba.prange(spans_3B.shape[1]):
        first, length = spans_3B[0, b], spans_3B[1, b]
        if metric_TK is not None:
            for i in range(first, first + length):
                metric_TK[i] = 0
                for h in range(heads):
                    for c in range(width):
                        metric_TK[i, c] += _wide(keys_THK[i, h, c])
                square = np.float32(0)
                for c in range(width):
                    square += metric_TK[i, c] * metric_TK[i, c]
                norm = max(np.float32(math.sqrt(square)), np.float32(1e-12))
                for c in range(width):
                    metric_TK[i, c] /= norm
        if scores_BM is not None:
            scores_BM[b, length:] = 0
            query_HK = np.empty((heads, width), np.float32)
            for h in range(heads):
                for c in range(width):
                    query_HK[h, c] = _wide(query_BHK[b, h, c]) * scale
            row_MH = np.empty((length, heads), np.float32)
            largest_H = np.full(heads, -np.inf, np.float32)
            for i in range(length):
                bias = np.float32(0) if sizes_T is None else np.float32(math.log(sizes_T[first + i]))
                for h in range(heads):
                    logit = np.float32(0)
                    for c in range(width):
                        logit += _wide(keys_THK[first + i, h, c]) * query_HK[h, c]
                    row_MH[i, h] = logit + bias
                    largest_H[h] = max(largest_H[h], row_MH[i, h])
            sums_H = np.zeros(heads, np.float32)
            for i in range(length):
                for h in range(heads):
                    row_MH[i, h] = math.exp(row_MH[i, h] - largest_H[h])
                    sums_H[h] += row_MH[i, h]
            for i in range(length):
                score, norms = np.float32(0), np.float32(1e-8)
                for h in range(heads):
                    square = np.float32(0)
                    for c in range(width):
                        context = _wide(contexts_THK[first + i, h, c])
                        square += context * context
                    norm = np.float32(math.sqrt(square))
                    score += row_MH[i, h] / sums_H[h] * norm
                    norms += norm
                scores_BM[b, i] = score / norms


@numba.njit(fastmath=FASTMATH, nogil=True)
def _nearest(row_K: Any, columns_KA: Any, cosines_A: Any) -> Any:
    """Index of the most similar column, the first of equals, and its cosine; 0 and -inf where none is a number."""
    cosines_A[:] = 0
    c = 0
    while c + 4 <= len(row_K):  # four at a time are half the time
        for a in range(len(cosines_A)):
            cosines_A[a] += (row_K[c] * columns_KA[c, a] + row_K[c + 1] * columns_KA[c + 1, a]) + (
                row_K[c + 2] * columns_KA[c + 2, a] + row_K[c + 3] * columns_KA[c + 3, a]
            )
        c += 4
    while c < len(row_K):
        for a in range(len(cosines_A)):
            cosines_A[a] += row_K[c] * columns_KA[c, a]
        c += 1
    nearest, best = 0, np.float32(-np.inf)
    for a in range(len(cosines_A)):
        if cosines_A[a] > best:
            nearest, best = a, cosines_A[a]
    return nearest, best


@numba.njit(fastmath=FASTMATH, nogil=True)
def _most_similar_before(sorted_KN: Any, found_N: Any) -> None:
    """Of each column the largest cosine to one before it, NaN where one of those is none; of the first −inf."""
    width, count = sorted_KN.shape
    cosines_2N = np.empty((2, count), np.float32)
    for n in range(0, count, 2):  # two columns and four rows at a time, so that loads don't hold products up
        last = min(n + 1, count - 1)
        cosines_2N[:, :last] = 0
        c = 0
        while c + 4 <= width:
            a0, a1, a2, a3 = sorted_KN[c, n], sorted_KN[c + 1, n], sorted_KN[c + 2, n], sorted_KN[c + 3, n]
            b0, b1, b2, b3 = sorted_KN[c, last], sorted_KN[c + 1, last], sorted_KN[c + 2, last], sorted_KN[c + 3, last]
            for m in range(last):
                x0, x1, x2, x3 = sorted_KN[c, m], sorted_KN[c + 1, m], sorted_KN[c + 2, m], sorted_KN[c + 3, m]
                cosines_2N[0, m] += (a0 * x0 + a1 * x1) + (a2 * x2 + a3 * x3)
                cosines_2N[1, m] += (b0 * x0 + b1 * x1) + (b2 * x2 + b3 * x3)
            c += 4
        while c < width:
            a0, b0 = sorted_KN[c, n], sorted_KN[c, last]
            for m in range(last):
                cosines_2N[0, m] += a0 * sorted_KN[c, m]
                cosines_2N[1, m] += b0 * sorted_KN[c, m]
            c += 1
        for row in range(last - n + 1):
            best, total = np.float32(-np.inf), np.float32(0)
            for m in range(n + row):
                best, total = max(best, cosines_2N[row, m]), total + cosines_2N[row, m]
            found_N[n + row] = best if total == total else total


@Loop
def density_peaks(
    metric_TK: Any,
    scores_BM: Any,
    num_patches_B: Any,
    exponent: Any,
    num_prefix_tokens: Any,
    spans_3B: Any,
    redundancy_BM: Any,
) -> None:
    """δ times (n·S)^α; +inf for prefix tokens, −inf beyond an image's. Of equal patches the first is more important."""
    for b in numba.prange(spans_3B.shape[1]):
        length = spans_3B[1, b]
        first, patches = spans_3B[0, b] + num_prefix_tokens, length - num_prefix_tokens
        redundancy_BM[b, :num_prefix_tokens] = np.inf
        redundancy_BM[b, length:] = -np.inf
        order_N = np.argsort(-scores_BM[b, num_prefix_tokens:length], kind="mergesort")
        sorted_KN, cosines_N = np.empty((metric_TK.shape[1], patches), np.float32), np.empty(patches, np.float32)
        for n in range(patches):
            for c in range(sorted_KN.shape[0]):
                sorted_KN[c, n] = metric_TK[first + order_N[n], c]
        _most_similar_before(sorted_KN, cosines_N)
        for n in range(patches):
            i = num_prefix_tokens + order_N[n]
            distance = max(np.float32(1) - cosines_N[n], np.float32(0))
            redundancy_BM[b, i] = distance * (num_patches_B[b] * scores_BM[b, i]) ** exponent


@Loop
def select(
    scores_BM: Any,
    threshold: Any,
    at_least: Any,
    metric_TK: Any,
    num_prefix_tokens: Any,
    spans_3B: Any,
    keep_BM: Any,
    kept_B: Any,
    dst_BM: Any,
) -> None:
    """Which tokens stay, `selection.above_threshold`, how many, and who takes in the others, `scores.nearest`.

    at_least: tokens that an image keeps whatever their scores. metric_TK, dst_BM: None where it isn't asked for.
    """
    for b in numba.prange(spans_3B.shape[1]):
        first, length = spans_3B[0, b], spans_3B[1, b]
        keep_BM[b, :num_prefix_tokens] = True
        keep_BM[b, length:] = False
        kept = min(num_prefix_tokens, length)
        for i in range(num_prefix_tokens, length):
            keep_BM[b, i] = not scores_BM[b, i] <= threshold  # so what is no number stays
            kept += keep_BM[b, i]
        while kept < min(at_least, length):
            best = NO_TOKEN  # of equal scores the first
            for i in range(num_prefix_tokens, length):
                if not keep_BM[b, i] and (best == NO_TOKEN or scores_BM[b, i] > scores_BM[b, best]):
                    best = i
            keep_BM[b, best] = True
            kept += 1
        kept_B[b] = kept
        if metric_TK is not None:
            dst_BM[b, :] = 0
            stay_A = np.nonzero(keep_BM[b, num_prefix_tokens:length])[0] + num_prefix_tokens
            stay_KA = np.empty((metric_TK.shape[1], len(stay_A)), np.float32)
            for a in range(len(stay_A)):
                for c in range(stay_KA.shape[0]):
                    stay_KA[c, a] = metric_TK[first + stay_A[a], c]
            cosines_A = np.empty(len(stay_A), np.float32)
            for i in range(num_prefix_tokens, length):
                if not keep_BM[b, i]:
                    dst_BM[b, i] = stay_A[_nearest(metric_TK[first + i], stay_KA, cosines_A)[0]]


@Loop
def reduce(
    x_TD: Any,
    positions_T: Any,
    sizes_T: Any,
    patch_token_BN: Any,
    keep_BM: Any,
    dst_BM: Any,
    spans_3B: Any,
    spans_after_3B: Any,
    y_TD: Any,
    positions_after_T: Any,
    sizes_after_T: Any,
    patch_token_after_BN: Any,
) -> None:
    """Move kept tokens together and merge the others into their destinations, or drop them.

    dst_BM: None for `leave`, and then no token has a size.
    """
    width = x_TD.shape[1]
    for b in numba.prange(spans_3B.shape[1]):
        before, after, length = spans_3B[0, b], spans_after_3B[0, b], spans_3B[1, b]
        slots_M = np.full(length, NO_TOKEN, np.int64)
        kept = 0
        for i in range(length):
            if keep_BM[b, i]:
                slots_M[i] = kept
                positions_after_T[after + kept] = positions_T[before + i]
                if dst_BM is not None:
                    sizes_after_T[after + kept] = sizes_T[before + i]
                for c in range(width):
                    y_TD[after + kept, c] = x_TD[before + i, c]
                kept += 1
        for row in range(after + kept, after + spans_after_3B[2, b]):
            positions_after_T[row] = NO_TOKEN
            if dst_BM is not None:
                sizes_after_T[row] = 0
            for c in range(width):
                y_TD[row, c] = x_TD[before, c]
        if dst_BM is not None:
            # for each destination the last token that is merged into it, and for each of those the one before
            last_M, previous_M = np.full(length, NO_TOKEN, np.int64), np.empty(length, np.int64)
            for i in range(length):
                if not keep_BM[b, i]:
                    dst = dst_BM[b, i]
                    slots_M[i] = slots_M[dst]
                    previous_M[i], last_M[dst] = last_M[dst], i
                    sizes_after_T[after + slots_M[i]] += sizes_T[before + i]
            mean_D = np.empty(width, np.float32)
            for dst in range(length):
                i = last_M[dst]
                if i == NO_TOKEN:
                    continue
                row = after + slots_M[dst]
                for c in range(width):
                    mean_D[c] = _wide(x_TD[before + dst, c])
                while i != NO_TOKEN:
                    share = sizes_T[before + i] / sizes_after_T[row]
                    for c in range(width):
                        mean_D[c] += (_wide(x_TD[before + i, c]) - _wide(x_TD[before + dst, c])) * share
                    i = previous_M[i]
                for c in range(width):
                    y_TD[row, c] = _like(mean_D[c], y_TD[row, c])
        for n in range(patch_token_BN.shape[1]):
            token = patch_token_BN[b, n]
            patch_token_after_BN[b, n] = NO_TOKEN if token == NO_TOKEN else slots_M[token]
