"""Tokens of a batch of images laid end to end, and how some of them leave.

Knows which token belongs to which image, where it came from, for how many patches it stands and who stands for those
that left. Leaves to others which tokens leave (`thresholds`) and whom they resemble (`scoring`).

Shapes: B images, N tokens of one image in the dense sequence (prefix tokens first), T rows of the whole batch laid end
to end, M tokens of the longest image, G images in a bucket, L rows of each of them, D width. A `_BM` tensor is the
padded view of a `_T` one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

NOBODY = -1
# an image's rows are a multiple of this: fillers cost matrix products, other numbers of keys slow fused attention down
KEY_ALIGNMENT = 4
# on a CPU in half precision fused attention takes up to 2.5 times as long for 191 keys as for 192
HALF_PRECISION_KEY_ALIGNMENT = 16
# half-precision matrix products on a CPU are compiled for their shape (milliseconds each): keep to few
HALF_PRECISION_ROWS = 64


@dataclass(frozen=True)
class Layout:
    """Which rows belong to which image. Images of as many rows lie side by side: rectangles, the buckets.

    An image's tokens come first in its rows, then fillers; behind the last image may be rows that are nobody's.

    lengths: tokens of each image, prefix included. On the host: every ragged operation needs them there.
    alignment: of which number the rows of an image are a multiple.
    row_multiple: of which number all rows are a multiple.
    """

    lengths: tuple[int, ...]
    alignment: int = 1
    row_multiple: int = 1

    @cached_property
    def rows(self) -> list[int]:
        """Rows of each image."""
        return [length + -length % self.alignment for length in self.lengths]

    @cached_property
    def order(self) -> list[int]:
        """Images in the order in which they lie."""
        return sorted(range(len(self.rows)), key=self.rows.__getitem__)

    @cached_property
    def starts(self) -> list[int]:
        """First row of each image."""
        starts, start = [0] * len(self.rows), 0
        for image in self.order:
            starts[image] = start
            start += self.rows[image]
        return starts

    @cached_property
    def buckets(self) -> list[tuple[int, int]]:
        """Images of each bucket and rows of each of them."""
        return [(images, rows) for rows, images in sorted(Counter(self.rows).items())]

    @property
    def padding(self) -> int:
        """Rows behind the last image."""
        return -sum(self.rows) % self.row_multiple

    def images(self, device: torch.device) -> Tensor:
        """Image of each row, (T,); the last image's go on behind it."""
        counts = [self.rows[image] for image in self.order]
        counts[-1] += self.padding
        order = torch.tensor(self.order, device=device)
        return order.repeat_interleave(torch.tensor(counts, device=device), output_size=sum(counts))

    def split(self, values_T: Tensor) -> list[Tensor]:
        """(T, …) as one view (G, L, …) a bucket."""
        parts = values_T.split([*(images * rows for images, rows in self.buckets), self.padding])
        return [part.unflatten(0, bucket) for part, bucket in zip(parts, self.buckets, strict=False)]

    def join(self, values: list[Tensor]) -> Tensor:
        """What `split` took apart, with zeros behind the last image."""
        parts = [value.flatten(0, 1) for value in values]
        if self.padding:
            parts.append(parts[0].new_zeros(self.padding, *parts[0].shape[1:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class TokenBatch:
    """A packed batch; its hidden states (T, D) travel beside it.

    Rows without a token ("fillers") hold a copy of their image's first token, so that they are finite where it is; no
    token sees them.

    positions_T: index of each token in the dense sequence; `NOBODY` for fillers and tokens that a stage added (`fuse`).
    sizes_T: float32, for how many patches a token stands, 0 in fillers; None when every token stands for itself.
    carriers_BN: which of its image's tokens stands now for a token of the dense sequence, or `NOBODY`.
    """

    layout: Layout
    num_prefix_tokens: int
    positions_T: Tensor
    sizes_T: Tensor | None
    carriers_BN: Tensor

    @classmethod
    def dense(cls, batch_size: int, num_tokens: int, num_prefix_tokens: int, device: torch.device) -> TokenBatch:
        """The batch before anything left: every image has all of its tokens."""
        positions_BN = torch.arange(num_tokens, device=device).repeat(batch_size, 1)
        layout = Layout((num_tokens,) * batch_size)
        return cls(layout, num_prefix_tokens, positions_BN.flatten(), None, positions_BN)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each image, prefix included."""
        return self.layout.lengths

    @cached_property
    def lengths_B(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.positions_T.device)

    @cached_property
    def starts_B(self) -> Tensor:
        """Row of each image's first token."""
        return torch.tensor(self.layout.starts, device=self.positions_T.device)

    @cached_property
    def valid_BM(self) -> Tensor:
        """True where the padded view holds a token."""
        return torch.arange(max(self.lengths), device=self.positions_T.device) < self.lengths_B[:, None]

    @cached_property
    def index_BM(self) -> Tensor:
        """Row of each place of the padded view; padding repeats the image's last token."""
        slots = torch.arange(max(self.lengths), device=self.positions_T.device)
        return self.starts_B[:, None] + torch.minimum(slots, self.lengths_B[:, None] - 1)

    @cached_property
    def key_bias_T(self) -> Tensor:
        """What is added to a key's logits, float32: the log of its size, −inf for fillers."""
        if self.sizes_T is not None:
            return self.sizes_T.log()
        return torch.where(self.positions_T == NOBODY, -torch.inf, 0.0)

    def pad(self, values_T: Tensor) -> Tensor:
        """(T, …) to (B, M, …); what lies beyond an image's tokens is a copy of one of them or a filler of its own."""
        if len(self.layout.buckets) == 1:
            return self.layout.split(values_T)[0][:, : max(self.lengths)]
        return values_T.index_select(0, self.index_BM.flatten()).unflatten(0, self.index_BM.shape)

    def kept_patches(self) -> Tensor:
        """bool (B, N − P): which patches of the dense sequence are still tokens of their own."""
        positions_BN = self.positions_T.index_select(0, self._carrier_rows()).view_as(self.carriers_BN)
        own_BN = positions_BN == torch.arange(self.carriers_BN.shape[1], device=positions_BN.device)
        return own_BN[:, self.num_prefix_tokens :]

    def unpack(self, x_TD: Tensor) -> Tensor:
        """Hidden states back in the dense sequence, (T, D) to (B, N, D).

        A patch that left holds the state of the token that stands for it (ToMe's unmerge); where nobody does, the
        mean of the image's remaining patches. So a head that averages the patches averages the kept ones, by size.
        """
        y_BND = x_TD.index_select(0, self._carrier_rows()).unflatten(0, self.carriers_BN.shape)
        if self.sizes_T is not None:  # with sizes every token has a carrier
            return y_BND
        gone_BN1, prefix = (self.carriers_BN == NOBODY)[..., None], self.num_prefix_tokens
        sums_BD = y_BND.masked_fill(gone_BN1, 0.0)[:, prefix:].sum(1, dtype=torch.float32)
        means_BD = (sums_BD / (self.lengths_B - prefix)[:, None]).to(x_TD.dtype)
        return torch.where(gone_BN1, means_BD[:, None], y_BND)

    def _carrier_rows(self) -> Tensor:
        """Row that stands for each token of the dense sequence, (B·N,); its image's first where nobody does."""
        return (self.starts_B[:, None] + self.carriers_BN.clamp(min=0)).flatten()


@dataclass(frozen=True)
class Departure:
    """Who leaves at a stage and who takes over. Tokens are numbered within their image.

    keep_BM: bool, tokens that stay; False where there is none.
    takers_BM: for a token that leaves, the token that stays and takes it in (`merge`); None for `leave` and `fuse`.
    fuse_weights_BM: weights of the mean that becomes the extra token (`fuse`); None otherwise.
    """

    keep_BM: Tensor
    takers_BM: Tensor | None = None
    fuse_weights_BM: Tensor | None = None


def depart(batch: TokenBatch, x_TD: Tensor, departure: Departure) -> tuple[TokenBatch, Tensor]:
    """Removes tokens from a packed batch; returns the new batch and its hidden states (T', D)."""
    keep_BM, device = departure.keep_BM, x_TD.device
    slots_BM, lengths_B = _destinations(batch, departure)
    half_on_cpu = device.type == "cpu" and x_TD.dtype != torch.float32
    multiples = (HALF_PRECISION_KEY_ALIGNMENT, HALF_PRECISION_ROWS) if half_on_cpu else (KEY_ALIGNMENT, 1)
    layout = Layout(tuple(lengths_B.tolist()), *multiples)
    starts_B = torch.tensor(layout.starts, device=device)
    rows = batch.index_BM.flatten(), (starts_B[:, None] + slots_BM).flatten()
    before, after = _select(rows, keep_BM)
    # what isn't a token that stays, fillers and tokens that `fuse` adds, begins as a copy of the image's first
    source_T = batch.starts_B.index_select(0, layout.images(device)).index_copy_(0, after, before)
    y_TD = x_TD.index_select(0, source_T)
    positions_T = torch.full_like(source_T, NOBODY)
    positions_T.index_copy_(0, after, batch.positions_T.index_select(0, before))
    sizes_T = None
    if departure.takers_BM is not None or departure.fuse_weights_BM is not None:
        leave_BM = batch.valid_BM & ~keep_BM
        left, takers = _select(rows, leave_BM)
        old_sizes_T = x_TD.new_ones(len(x_TD), dtype=torch.float32) if batch.sizes_T is None else batch.sizes_T
        left_sizes = old_sizes_T.index_select(0, left)
        sizes_T = old_sizes_T.new_zeros(len(y_TD)).index_copy_(0, after, old_sizes_T.index_select(0, before))
        sizes_T.index_add_(0, takers, left_sizes)
        left_states = x_TD.index_select(0, left)
        if departure.fuse_weights_BM is None:
            shares = left_sizes / sizes_T.index_select(0, takers)
            _merge_(y_TD, left_states, takers, shares)
        else:
            _fuse_(y_TD, left_states, takers, departure.fuse_weights_BM[leave_BM])
    return TokenBatch(
        layout, batch.num_prefix_tokens, positions_T, sizes_T, _redirect(batch.carriers_BN, slots_BM)
    ), y_TD


def _destinations(batch: TokenBatch, departure: Departure) -> tuple[Tensor, Tensor]:
    """Which of its image's tokens each token is or becomes part of, (B, M), and how many an image has then, (B,)."""
    keep_BM, takers_BM = departure.keep_BM, departure.takers_BM
    slots_BM = keep_BM.cumsum(1) - 1
    kept_B = slots_BM[:, -1] + 1
    if takers_BM is not None:
        return torch.where(keep_BM, slots_BM, slots_BM.gather(1, takers_BM)), kept_B
    if departure.fuse_weights_BM is not None:  # one more at the end of an image that loses something
        return torch.where(keep_BM, slots_BM, kept_B[:, None]), kept_B + (kept_B < batch.lengths_B)
    return torch.where(keep_BM, slots_BM, NOBODY), kept_B


def _select(rows: tuple[Tensor, Tensor], mask_BM: Tensor) -> tuple[Tensor, Tensor]:
    """Rows before and after a stage of the tokens in a mask."""
    index = mask_BM.flatten().nonzero().squeeze(1)
    return rows[0].index_select(0, index), rows[1].index_select(0, index)


def _merge_(y_TD: Tensor, left: Tensor, takers: Tensor, shares: Tensor) -> None:
    """Makes takers the mean by size; written as a change of theirs, so that only what leaves is touched."""
    y_TD.index_add_(0, takers, (left - y_TD.index_select(0, takers)) * shares[:, None].to(y_TD.dtype))


def _fuse_(y_TD: Tensor, left: Tensor, takers: Tensor, weights: Tensor) -> None:
    """Makes takers the weighted mean of what leaves, summed in float32 (EViT, arXiv 2202.07800)."""
    weights = weights + torch.finfo(torch.float32).tiny
    extra, index = takers.unique_consecutive(return_inverse=True)
    totals = weights.new_zeros(len(extra)).index_add_(0, index, weights)
    shares = weights / totals.index_select(0, index)
    means = weights.new_zeros(len(extra), y_TD.shape[1]).index_add_(0, index, left * shares[:, None])
    y_TD.index_copy_(0, extra, means.to(y_TD.dtype))


def _redirect(carriers_BN: Tensor, slots_BM: Tensor) -> Tensor:
    return torch.where(carriers_BN == NOBODY, NOBODY, slots_BM.gather(1, carriers_BN.clamp(min=0)))
