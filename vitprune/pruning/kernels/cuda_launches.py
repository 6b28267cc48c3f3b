"""The CUDA door's kernels in Triton: a stage in ten launches, and attention among packed tokens in one.

Every program works for one image, which has `length` rows from `start` on; what it holds never meets another's.
Each sums in a fixed order: there are no atomic operations, and the same input gives the same bits.

Shapes: B images, T rows of the batch laid end to end, M tokens of the longest image, N tokens of an image in the dense
sequence, H heads, K head width, D width. Row numbers are 64 bits wide, since T·D can pass 2³¹.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# Triton builds a kernel anew where an integer becomes a multiple of 16, and this one changes from batch to batch
_of_any_length = triton.jit(do_not_specialize=["longest"])


@triton.jit
def token_stats(
    query, k, contexts, sizes, table, positions, table_head, table_query, table_key, starts, lengths,
    logits, norms, metric, scale, query_image, query_head, k_row, k_head, contexts_row, contexts_head,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_QUERY: tl.constexpr, HAS_SIZES: tl.constexpr, HAS_PAIRS: tl.constexpr, HAS_METRIC: tl.constexpr,
):  # fmt: skip
    """Of each token and head its logit for the image's query and the norm of its context vector, (T, H); metric (T, K).

    Grid: images, tiles of an image's tokens.
    """
    image, tile = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + image)
    if tile * BLOCK_M >= length:
        return
    slots, columns = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    rows = tl.load(starts + image) + slots
    is_row, is_column = slots < length, columns < WIDTH
    is_both = is_row[:, None] & is_column[None]
    keys = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for head in range(HEADS):
        places = rows[:, None] * k_row + head * k_head + columns[None]
        key = tl.load(k + places, mask=is_both, other=0.0).to(tl.float32)
        keys += key
        if HAS_QUERY:
            asked = tl.load(query + image * query_image + head * query_head + columns, mask=is_column, other=0.0)
            logit = tl.sum(key * asked.to(tl.float32)[None], 1) * scale
            if HAS_SIZES:
                logit += tl.log2(tl.load(sizes + rows, mask=is_row, other=1.0)) / LOG2E
            if HAS_PAIRS:
                first, position = (
                    tl.load(positions + tl.load(starts + image)),
                    tl.load(positions + rows, mask=is_row, other=-1),
                )
                cells = head * table_head + first * table_query + position * table_key
                logit += tl.load(table + cells, mask=position >= 0, other=0.0).to(tl.float32)
            places = rows[:, None] * contexts_row + head * contexts_head + columns[None]
            context = tl.load(contexts + places, mask=is_both, other=0.0).to(tl.float32)
            tl.store(logits + rows * HEADS + head, logit, mask=is_row)
            tl.store(norms + rows * HEADS + head, tl.sqrt(tl.sum(context * context, 1)), mask=is_row)
    if HAS_METRIC:
        length_of_key = tl.maximum(tl.sqrt(tl.sum(keys * keys, 1)), 1e-12)
        tl.store(metric + rows[:, None] * WIDTH + columns[None], keys / length_of_key[:, None], mask=is_both)


@_of_any_length
def head_weighted_attention(
    logits, norms, starts, lengths, scores, longest, HEADS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """`scores.head_weighted_attention` of logits' softmax, (B, M); 0 beyond an image's tokens. Grid: images."""
    image, slots = tl.program_id(0), tl.arange(0, BLOCK_M)
    is_token = slots < tl.load(lengths + image)
    rows = tl.load(starts + image) + slots
    weighted, total = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for head in range(HEADS):
        logit = tl.load(logits + rows * HEADS + head, mask=is_token, other=-float("inf"))
        norm = tl.load(norms + rows * HEADS + head, mask=is_token, other=0.0)
        weight = tl.exp2((logit - tl.max(logit, 0)) * LOG2E)
        weighted += weight / tl.sum(weight, 0) * norm
        total += norm
    score = tl.where(is_token, weighted / (total + 1e-8), 0.0)
    tl.store(scores + image * longest + slots, score, mask=slots < longest)


@triton.jit
def mean_query(
    q, sizes, starts, lengths, means, q_row, q_head,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, HAS_SIZES: tl.constexpr,
):  # fmt: skip
    """`scores.mean_query`, (B, H, K). Grid: images, heads."""
    image, head = tl.program_id(0), tl.program_id(1)
    start, length, columns = tl.load(starts + image), tl.load(lengths + image), tl.arange(0, BLOCK_K)
    total, size = tl.zeros([BLOCK_K], tl.float32), 0.0
    for first in range(0, length, BLOCK_M):
        slots = first + tl.arange(0, BLOCK_M)
        is_row = slots < length
        places = (start + slots)[:, None] * q_row + head * q_head + columns[None]
        queries = tl.load(q + places, mask=is_row[:, None] & (columns < WIDTH)[None], other=0.0).to(tl.float32)
        weights = is_row.to(tl.float32)
        if HAS_SIZES:
            weights = tl.load(sizes + start + slots, mask=is_row, other=0.0)
        total += tl.sum(queries * weights[:, None], 0)
        size += tl.sum(weights, 0)
    tl.store(means + (image * HEADS + head) * WIDTH + columns, total / size, mask=columns < WIDTH)


@triton.jit
def _importance(scores, image, longest, slots, is_patch):
    """What patches are ordered by: what is no number is the most important."""
    score = tl.load(scores + image * longest + slots, mask=is_patch, other=-float("inf"))
    return tl.where(score == score, score, float("inf"))


@_of_any_length
def order_by_importance(scores, lengths, order, longest, PREFIX: tl.constexpr, BLOCK: tl.constexpr):
    """Each image's patches by falling score, of equal ones the first first, (B, M). Grid: images, tiles of patches.

    A patch's place is the number of patches before it, so nothing has to be sorted.
    """
    image, length = tl.program_id(0), tl.load(lengths + tl.program_id(0))
    slots = PREFIX + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = _importance(scores, image, longest, slots, slots < length)
    place = tl.zeros([BLOCK], tl.int32)
    for first in range(PREFIX, length, BLOCK):
        others = first + tl.arange(0, BLOCK)
        other = _importance(scores, image, longest, others, others < length)
        is_equal_before = (other[None] == own[:, None]) & (others[None] < slots[:, None])
        before = ((other[None] > own[:, None]) | is_equal_before) & (others < length)[None]
        place += tl.sum(before.to(tl.int32), 1)
    tl.store(order + image * longest + place, slots.to(tl.int32), mask=slots < length)


@triton.jit
def _keys_at(metric, order, image, longest, start, places, are_there, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tokens at such places of an image's order, and their rows of the metric."""
    slots, columns = tl.load(order + image * longest + places, mask=are_there, other=0), tl.arange(0, BLOCK_K)
    at = (start + slots)[:, None] * WIDTH + columns[None]
    return slots, tl.load(metric + at, mask=are_there[:, None] & (columns < WIDTH)[None], other=0.0)


@_of_any_length
def density_peaks(
    metric, scores, order, patches, starts, lengths, redundancy, longest, dense_patches, exponent,
    PREFIX: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    DIFFER: tl.constexpr, WEIGHS: tl.constexpr,
):  # fmt: skip
    """γ of `reference.density_peaks`, (B, M). Grid: images, tiles of patches in the order of their importance.

    +inf for prefix tokens and the most important patch, −inf beyond an image's tokens. WEIGHS: the exponent isn't 0.
    """
    image, tile = tl.program_id(0), tl.program_id(1)
    start, patches_here = tl.load(starts + image), tl.load(lengths + image) - PREFIX
    places, out = tile * BLOCK + tl.arange(0, BLOCK), redundancy + image * longest
    is_patch = places < patches_here
    if tile == 0:
        tl.store(out + places, float("inf"), mask=places < PREFIX)
    tl.store(out + PREFIX + places, -float("inf"), mask=(places >= patches_here) & (PREFIX + places < longest))
    if tile * BLOCK >= patches_here:
        return
    slots, keys = _keys_at(metric, order, image, longest, start, places, is_patch, WIDTH, BLOCK_K)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    for first in range(0, (tile + 1) * BLOCK, BLOCK):
        others = first + tl.arange(0, BLOCK)
        is_other = others < patches_here
        _, theirs = _keys_at(metric, order, image, longest, start, others, is_other, WIDTH, BLOCK_K)
        cosines = tl.dot(keys, tl.trans(theirs), input_precision="ieee")
        more_important = (others[None] < places[:, None]) & is_other[None]
        best = tl.maximum(best, tl.max(tl.where(more_important, cosines, -float("inf")), 1))
    score = tl.maximum(1.0 - best, 0.0)
    if WEIGHS:
        dense = dense_patches
        if DIFFER:
            dense = tl.load(patches + image).to(tl.float32)
        weight = tl.load(scores + image * longest + slots, mask=is_patch, other=1.0) * dense
        # what is no number stays none
        weight = tl.where(weight > 0, tl.exp2(exponent * tl.log2(tl.where(weight > 0, weight, 1.0))), weight * 0)
        score *= weight
    tl.store(out + slots, tl.where(places == 0, float("inf"), score), mask=is_patch)


@triton.jit(do_not_specialize=["longest"], do_not_specialize_on_alignment=["level"])
def select(scores, level, lengths, keep, kept, order, longest, at_least, PREFIX: tl.constexpr, BLOCK_M: tl.constexpr):
    """`selection.above_threshold`: who stays (B, M), how many (B,), and the order, who stays first. Grid: images."""
    image, slots = tl.program_id(0), tl.arange(0, BLOCK_M)
    length, threshold = tl.load(lengths + image), tl.load(level)
    is_token = slots < length
    score = tl.load(scores + image * longest + slots, mask=is_token, other=-float("inf"))
    stays = (is_token & ~(score <= threshold)) | (slots < PREFIX)
    count = tl.sum(stays.to(tl.int32), 0)
    # what stays anyway is among the best
    for _ in range(count, at_least):
        rest = tl.where(is_token & ~stays, score, -float("inf"))
        is_best = (rest == tl.max(rest, 0)) & (rest > -float("inf"))
        stays = stays | (slots == tl.min(tl.where(is_best, slots, BLOCK_M), 0))
    count = tl.sum(stays.to(tl.int32), 0)
    before = tl.cumsum(stays.to(tl.int32), 0)
    place = tl.where(stays, before - 1, count + slots - before)
    tl.store(keep + image * longest + slots, stays.to(tl.uint8), mask=slots < longest)
    tl.store(kept + image, count.to(tl.int64))
    tl.store(order + image * longest + place, slots, mask=is_token)


@_of_any_length
def nearest_kept(
    metric, order, kept, starts, lengths, dst, longest,
    PREFIX: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For each token that leaves the most similar patch that stays, (B, M). Grid: images, tiles of those that leave."""
    image, tile = tl.program_id(0), tl.program_id(1)
    count, start = tl.load(kept + image), tl.load(starts + image)
    places, length = count + tile * BLOCK + tl.arange(0, BLOCK), tl.load(lengths + image)
    if count + tile * BLOCK >= length:
        return
    leaves = places < length
    slots, keys = _keys_at(metric, order, image, longest, start, places, leaves, WIDTH, BLOCK_K)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    # where no cosine is a number, the first patch that stays
    chosen = tl.zeros([BLOCK], tl.int32) + tl.load(order + image * longest + PREFIX)
    for first in range(PREFIX, count, BLOCK):
        others = first + tl.arange(0, BLOCK)
        stays = others < count
        their_slots, theirs = _keys_at(metric, order, image, longest, start, others, stays, WIDTH, BLOCK_K)
        cosines = tl.dot(keys, tl.trans(theirs), input_precision="ieee")
        cosines = tl.where(stays[None] & (cosines == cosines), cosines, -float("inf"))
        most = tl.max(cosines, 1)
        # of equal ones the first
        is_most = (cosines == most[:, None]) & stays[None]
        slot = tl.min(tl.where(is_most, their_slots[None], 2147483647), 1)
        chosen = tl.where(most > best, slot, chosen)
        best = tl.maximum(best, most)
    tl.store(dst + image * longest + slots, chosen.to(tl.int64), mask=leaves)


@triton.jit(do_not_specialize=["images"])
def lay_end_to_end(kept, starts, images, BLOCK_B: tl.constexpr):
    """First row of each image when images of so many tokens lie end to end, (B,). One program."""
    index = tl.arange(0, BLOCK_B)
    count = tl.load(kept + index, mask=index < images, other=0)
    tl.store(starts + index, tl.cumsum(count, 0) - count, mask=index < images)


@_of_any_length
def number_kept(keep, lengths, order, slots_after, longest, BLOCK_M: tl.constexpr):
    """Tokens in order, who stays first, and what number each that stays has afterwards, (B, M) each. Grid: images."""
    image, slots = tl.program_id(0), tl.arange(0, BLOCK_M)
    is_token = slots < tl.load(lengths + image)
    stays = tl.load(keep + image * longest + slots, mask=is_token, other=0).to(tl.int32)
    before = tl.cumsum(stays, 0)
    place = tl.where(stays != 0, before - 1, tl.sum(stays, 0) + slots - before)
    tl.store(order + image * longest + place, slots, mask=is_token)
    tl.store(slots_after + image * longest + slots, before - 1, mask=is_token)


@_of_any_length
def reduce(
    x, positions, sizes, dst, order, starts, lengths, starts_after, kept,
    y, positions_after, sizes_after, longest, x_row,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, MERGES: tl.constexpr, HAS_SIZES: tl.constexpr,
):  # fmt: skip
    """The tokens that stay, with what is merged into them by size (ToMe §3.2). Grid: images, tokens that stay."""
    image, slot = tl.program_id(0), tl.program_id(1)
    count = tl.load(kept + image)
    if slot >= count:
        return
    start, length, row_after = tl.load(starts + image), tl.load(lengths + image), tl.load(starts_after + image) + slot
    own, columns = tl.load(order + image * longest + slot), tl.arange(0, BLOCK_D)
    is_column = columns < WIDTH
    state = tl.load(x + (start + own) * x_row + columns, mask=is_column, other=0.0)
    tl.store(positions_after + row_after, tl.load(positions + start + own))
    if MERGES:
        size = 1.0
        if HAS_SIZES:
            size = tl.load(sizes + start + own)
        total, total_size = state.to(tl.float32) * size, size
        for place in range(count, length):
            other = tl.load(order + image * longest + place)
            if tl.load(dst + image * longest + other) == own:
                their_size = 1.0
                if HAS_SIZES:
                    their_size = tl.load(sizes + start + other)
                theirs = tl.load(x + (start + other) * x_row + columns, mask=is_column, other=0.0)
                total += theirs.to(tl.float32) * their_size
                total_size += their_size
        # alone it stays what it is
        state = tl.where(total_size == size, state, (total / total_size).to(state.dtype))
        tl.store(sizes_after + row_after, total_size)
    tl.store(y + row_after * WIDTH + columns, state, mask=is_column)


@_of_any_length
def move_patches(
    patch_token, keep, dst, slots_after, patch_token_after, longest, dense_tokens,
    BLOCK_N: tl.constexpr, MERGES: tl.constexpr,
):  # fmt: skip
    """`TokenBatch.patch_token_BN` behind a stage. Grid: images, tiles of the dense sequence."""
    image, tokens = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token = tokens < dense_tokens
    token = tl.load(patch_token + image * dense_tokens + tokens, mask=is_token, other=-1)
    is_there = token >= 0
    token = tl.where(is_there, token, 0)
    stays = tl.load(keep + image * longest + token, mask=is_token, other=0) != 0
    if MERGES:
        taker = tl.load(dst + image * longest + token, mask=is_token & is_there & ~stays, other=0)
        token = tl.where(stays, token, taker)
    slot = tl.load(slots_after + image * longest + token, mask=is_token, other=0).to(tl.int64)
    if not MERGES:
        is_there = is_there & stays
    tl.store(patch_token_after + image * dense_tokens + tokens, tl.where(is_there, slot, -1), mask=is_token)


@triton.jit
def mean_patches(
    x, starts, lengths, means, x_row, PREFIX: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The mean of each image's patches, (B, D). Grid: images, tiles of the width."""
    image, columns = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start, length, is_column = tl.load(starts + image), tl.load(lengths + image), columns < WIDTH
    total = tl.zeros([BLOCK_D], tl.float32)
    for slot in range(PREFIX, length):
        total += tl.load(x + (start + slot) * x_row + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(means + image * WIDTH + columns, total / (length - PREFIX).to(tl.float32), mask=is_column)


@triton.jit
def unpack(
    x, patch_token, starts, means, out, dense_tokens, x_row,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, AVERAGES: tl.constexpr,
):  # fmt: skip
    """`TokenBatch.unpack`, (B, N, D). Grid: images, tiles of the dense sequence."""
    image, columns = tl.program_id(0), tl.arange(0, BLOCK_D)
    tokens, is_column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), columns < WIDTH
    is_token, places = tokens < dense_tokens, image.to(tl.int64) * dense_tokens + tokens
    is_both = is_token[:, None] & is_column[None]
    token = tl.load(patch_token + places, mask=is_token, other=0)
    rows = tl.load(starts + image) + tl.maximum(token, 0)
    states = tl.load(x + rows[:, None] * x_row + columns[None], mask=is_both, other=0.0)
    if AVERAGES:
        mean = tl.load(means + image * WIDTH + columns, mask=is_column, other=0.0)
        states = tl.where((token >= 0)[:, None], states, mean[None])
    tl.store(out + places[:, None] * WIDTH + columns[None], states, mask=is_both)


@triton.jit
def packed_attention(
    q, k, v, sizes, table, positions, table_head, table_query, table_key, starts, lengths, contexts, scale,
    q_row, q_head, k_row, k_head, v_row, v_head,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, READ: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SIZES: tl.constexpr, HAS_PAIRS: tl.constexpr,
):  # fmt: skip
    """`reference.attend` among each image's tokens, (T, H, K), by online softmax (FlashAttention, arXiv 2205.14135).

    Grid: tiles of an image's queries, images, heads. READ: so many queries an image, end to end; 0: as keys lie.
    """
    tile, image, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, length = tl.load(starts + image), tl.load(lengths + image)
    asking = READ if READ else length
    if tile * BLOCK_Q >= asking:
        return
    queries, columns = tile * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    q_rows = (image.to(tl.int64) * READ if READ else start) + queries
    is_query, is_column = queries < asking, columns < WIDTH
    places = q_rows[:, None] * q_row + head * q_head + columns[None]
    query = tl.load(q + places, mask=is_query[:, None] & is_column[None], other=0.0)
    if HAS_PAIRS:
        own_position = tl.load(positions + q_rows, mask=is_query, other=-1)
    highest = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    output = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for first in range(0, length, BLOCK_N):
        slots = first + tl.arange(0, BLOCK_N)
        is_key = slots < length
        rows = start + slots
        is_both = is_key[:, None] & is_column[None]
        key = tl.load(k + rows[:, None] * k_row + head * k_head + columns[None], mask=is_both, other=0.0)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2E)
        if HAS_SIZES:
            logits += tl.log2(tl.load(sizes + rows, mask=is_key, other=1.0))[None]
        if HAS_PAIRS:
            their_position = tl.load(positions + rows, mask=is_key, other=-1)
            cells = head * table_head + own_position[:, None] * table_query + their_position[None] * table_key
            are_placed = (own_position >= 0)[:, None] & (their_position >= 0)[None]
            logits += tl.load(table + cells, mask=are_placed, other=0.0).to(tl.float32) * LOG2E
        logits = tl.where(is_key[None], logits, -float("inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp2(logits - higher[:, None])
        fade = tl.exp2(highest - higher)
        value = tl.load(v + rows[:, None] * v_row + head * v_head + columns[None], mask=is_both, other=0.0)
        total = total * fade + tl.sum(weights, 1)
        output = output * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        highest = higher
    output = (output / total[:, None]).to(query.dtype)
    places = (q_rows[:, None] * HEADS + head) * WIDTH + columns[None]
    tl.store(contexts + places, output, mask=is_query[:, None] & is_column[None])
