"""Tokens of a batch of images laid end to end, and how some of them leave.

Knows which token belongs to which image, where it came from, for how many patches it stands and who stands for those
that left. Leaves to others which tokens leave (`thresholds`) and whom they resemble (`scoring`).

Shapes: B images, N tokens of one image in the dense sequence (prefix tokens first), T tokens of the whole batch laid
end to end, M tokens of the longest image, D width. A `_BM` tensor is the padded view of a `_T` one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

NOBODY = -1
# fused attention on a CPU takes up to 2.5 times as long for 191 keys as for 192 (bfloat16; in float32 a quarter longer)
KEY_ALIGNMENT = 16


@dataclass(frozen=True)
class TokenBatch:
    """The layout of a packed batch; the hidden states (T, D) travel beside it.

    lengths: tokens of each image, prefix included. On the host: every ragged operation needs them there.
    positions_T: index of each token in the dense sequence; `NOBODY` for a token that a stage added (`fuse`).
    sizes_T: float32, for how many patches a token stands; None when every token stands for itself.
    carriers_BN: for each token of the dense sequence the packed index of the one that stands for it now, or `NOBODY`.
    padding: rows behind the last token that belong to nobody (see `pad_rows`).
    """

    lengths: tuple[int, ...]
    num_prefix_tokens: int
    positions_T: Tensor
    sizes_T: Tensor | None
    carriers_BN: Tensor
    padding: int = 0

    @classmethod
    def dense(cls, batch_size: int, num_tokens: int, num_prefix_tokens: int, device: torch.device) -> TokenBatch:
        """The layout before anything left: every image has all of its tokens."""
        index = torch.arange(batch_size * num_tokens, device=device)
        return cls(
            lengths=(num_tokens,) * batch_size,
            num_prefix_tokens=num_prefix_tokens,
            positions_T=index % num_tokens,
            sizes_T=None,
            carriers_BN=index.view(batch_size, num_tokens),
        )

    @cached_property
    def lengths_B(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.positions_T.device)

    @cached_property
    def starts_B(self) -> Tensor:
        """Packed index of each image's first token."""
        return self.lengths_B.cumsum(0) - self.lengths_B

    @cached_property
    def images_T(self) -> Tensor:
        """Image that each token belongs to."""
        images = torch.arange(len(self.lengths), device=self.positions_T.device)
        return images.repeat_interleave(self.lengths_B, output_size=sum(self.lengths))

    @cached_property
    def valid_BM(self) -> Tensor:
        """True where the padded view holds a token."""
        return torch.arange(max(self.lengths), device=self.positions_T.device) < self.lengths_B[:, None]

    @cached_property
    def index_BM(self) -> Tensor:
        """Packed index of each place of the padded view; padding repeats the image's last token."""
        slots = torch.arange(max(self.lengths), device=self.positions_T.device)
        return self.starts_B[:, None] + torch.minimum(slots, self.lengths_B[:, None] - 1)

    @cached_property
    def buckets(self) -> Buckets:
        return Buckets.of(self)

    @property
    def is_even(self) -> bool:
        """Whether all images have the same number of tokens, so that packed and padded are views of each other."""
        return len(set(self.lengths)) == 1

    def pad(self, values_T: Tensor) -> Tensor:
        """(T + padding, …) to (B, M, …), where an image's last token fills its row."""
        if self.is_even:
            return values_T[: sum(self.lengths)].unflatten(0, (len(self.lengths), -1))
        return values_T.index_select(0, self.index_BM.flatten()).unflatten(0, self.index_BM.shape)

    def flatten(self, values_BM: Tensor) -> Tensor:
        """(B, M, …) to (T, …), without the padding."""
        return values_BM.flatten(0, 1) if self.is_even else values_BM[self.valid_BM]

    def kept_patches(self, num_tokens: int) -> Tensor:
        """bool (B, N − P): which patches of the dense sequence are still tokens of their own."""
        keep = torch.zeros(len(self.lengths), num_tokens, dtype=torch.bool, device=self.positions_T.device)
        own = self.positions_T != NOBODY
        keep[self.images_T[own], self.positions_T[own]] = True
        return keep[:, self.num_prefix_tokens :]

    def unpack(self, x_TD: Tensor) -> Tensor:
        """Hidden states back in the dense sequence, (T, D) to (B, N, D).

        A patch that left holds the state of the token that stands for it (ToMe's unmerge); where nobody does, the
        mean of the image's remaining patches. So a head that averages the patches averages the kept ones, by size.
        """
        if self.sizes_T is not None:  # with sizes every token has a carrier
            return x_TD[self.carriers_BN]
        images, prefix = len(self.lengths), self.num_prefix_tokens
        sums_BD = x_TD.new_zeros(images, x_TD.shape[-1], dtype=torch.float32).index_add_(0, self.images_T, x_TD.float())
        for token in range(prefix):
            sums_BD = sums_BD - x_TD[self.starts_B + token]
        means_BD = (sums_BD / (self.lengths_B - prefix)[:, None]).to(x_TD.dtype)
        y_BND = means_BD[:, None].repeat(1, self.carriers_BN.shape[1], 1)
        y_BND[self.images_T, self.positions_T] = x_TD
        return y_BND


@dataclass(frozen=True)
class Buckets:
    """Images of similar length side by side: rectangles for kernels that take nothing else.

    S slots: the places of all rectangles, one after the other.

    shapes: images and slots of an image in each bucket.
    tokens_S: packed token in each slot; padding repeats its image's first token, so that no image sees another's.
    bias_S: float32, what is added to a key's logits: the log of its size, −inf in the padding.
    slots_T: slot of each packed token; of the rows that belong to nobody just any.
    """

    shapes: tuple[tuple[int, int], ...]
    tokens_S: Tensor
    bias_S: Tensor
    slots_T: Tensor

    @property
    def slots(self) -> list[int]:
        """Slots of each bucket."""
        return [images * length for images, length in self.shapes]

    def biases(self) -> Iterator[Tensor]:
        """`bias_S` of each bucket, (G, L)."""
        return (bias.view(shape) for bias, shape in zip(self.bias_S.split(self.slots), self.shapes, strict=True))

    @classmethod
    def of(cls, batch: TokenBatch) -> Buckets:
        """On a CPU a bucket for each multiple of `KEY_ALIGNMENT`; elsewhere, where launches are dear, one for all."""
        device = batch.positions_T.device
        if device.type == "cpu":
            rounded = [length + -length % KEY_ALIGNMENT for length in batch.lengths]
        else:
            rounded = [max(batch.lengths)] * len(batch.lengths)
        order = sorted(range(len(rounded)), key=rounded.__getitem__)
        counts = Counter(rounded)
        shapes = tuple((counts[length], length) for length in sorted(counts))
        slots_B = torch.tensor(rounded, device=device)[order]
        ends_B = slots_B.cumsum(0)
        images_S = torch.arange(len(rounded), device=device).repeat_interleave(slots_B, output_size=sum(rounded))
        offsets_S = torch.arange(sum(rounded), device=device) - (ends_B - slots_B)[images_S]
        valid_S = offsets_S < batch.lengths_B[order][images_S]
        tokens_S = batch.starts_B[order][images_S] + offsets_S * valid_S
        bias_S = torch.zeros(len(tokens_S), device=device) if batch.sizes_T is None else batch.sizes_T.log()[tokens_S]
        slots_T = torch.zeros(sum(batch.lengths) + batch.padding, dtype=torch.long, device=device)
        slots_T[tokens_S[valid_S]] = valid_S.nonzero().squeeze(1)
        return cls(shapes, tokens_S, bias_S.masked_fill(~valid_S, -torch.inf), slots_T)


@dataclass(frozen=True)
class Departure:
    """Who leaves at a stage and who takes over: all indices are into the packed tokens before the stage.

    keep_T: bool, tokens that stay.
    takers_T: for a token that leaves, the token that stays and takes it in (`merge`); None for `leave` and `fuse`.
    fuse_weights_T: weights of the mean that becomes the extra token (`fuse`); None otherwise.
    """

    keep_T: Tensor
    takers_T: Tensor | None = None
    fuse_weights_T: Tensor | None = None


def depart(batch: TokenBatch, x_TD: Tensor, departure: Departure) -> tuple[TokenBatch, Tensor]:
    """Removes tokens from a packed batch; returns the new layout and hidden states (T', D)."""
    if departure.fuse_weights_T is not None:
        return _fuse(batch, x_TD, departure.keep_T, departure.fuse_weights_T)
    keep_T, takers_T = departure.keep_T, departure.takers_T
    kept = keep_T.nonzero().squeeze(1)
    new_index_T = keep_T.cumsum(0) - 1
    sizes_T = batch.sizes_T
    if takers_T is None:
        x, destination_T = x_TD.index_select(0, kept), torch.where(keep_T, new_index_T, NOBODY)
    else:
        left = (~keep_T).nonzero().squeeze(1)
        if sizes_T is None:
            sizes_T = x_TD.new_ones(len(x_TD), dtype=torch.float32)
        takers = takers_T[left]
        sizes_T = sizes_T.index_add(0, takers, sizes_T[left])
        # the taker's new state is the mean by size; written as a change, so that only what leaves is touched
        shares = (sizes_T[left] / sizes_T[takers])[:, None].to(x_TD.dtype)
        change = (x_TD.index_select(0, left) - x_TD.index_select(0, takers)) * shares
        x = x_TD.index_select(0, kept).index_add_(0, new_index_T[takers], change)
        destination_T = new_index_T.index_copy(0, left, new_index_T[takers])
        sizes_T = sizes_T[kept]
    kept_B = torch.zeros_like(batch.lengths_B).index_add_(0, batch.images_T, keep_T.long())
    return TokenBatch(
        lengths=tuple(kept_B.tolist()),
        num_prefix_tokens=batch.num_prefix_tokens,
        positions_T=batch.positions_T[kept],
        sizes_T=sizes_T,
        carriers_BN=_redirect(batch.carriers_BN, destination_T),
    ), x


def pad_rows(batch: TokenBatch, x_TD: Tensor, multiple: int) -> tuple[TokenBatch, Tensor]:
    """Appends empty rows up to a multiple of some number, so that matrix products come in few shapes.

    Kernels that are compiled for a shape (oneDNN in bfloat16: milliseconds each) would else be compiled for each batch.
    """
    padding = -len(x_TD) % multiple
    return replace(batch, padding=padding), F.pad(x_TD, (0, 0, 0, padding))


def _fuse(batch: TokenBatch, x_TD: Tensor, keep_T: Tensor, weights_T: Tensor) -> tuple[TokenBatch, Tensor]:
    """All that leaves an image becomes one token at its end: the weighted mean (EViT, arXiv 2202.07800)."""
    images, left_T = len(batch.lengths), ~keep_T
    sizes_T = batch.sizes_T if batch.sizes_T is not None else x_TD.new_ones(len(x_TD), dtype=torch.float32)

    def total(values_T: Tensor) -> Tensor:
        zeros = values_T.new_zeros(images, *values_T.shape[1:])
        return zeros.index_add(0, batch.images_T[left_T], values_T[left_T])

    w_T1 = (weights_T + torch.finfo(torch.float32).tiny)[:, None]
    fused_BD = (total(w_T1 * x_TD) / total(w_T1).clamp(min=torch.finfo(torch.float32).tiny)).to(x_TD.dtype)
    fuses_B = total(left_T.long()) > 0
    # one place more at the end of each image that loses something
    extra_B = fuses_B.cumsum(0) - fuses_B.long()
    new_index_T = keep_T.cumsum(0) - 1 + extra_B[batch.images_T]
    kept_B = torch.zeros_like(batch.lengths_B).index_add_(0, batch.images_T, keep_T.long())
    lengths_B = kept_B + fuses_B.long()
    last_B = lengths_B.cumsum(0) - 1
    # rows of [kept tokens, fused tokens] in their new order
    order = torch.cat([new_index_T[keep_T], last_B[fuses_B]]).argsort()

    def arrange(kept: Tensor, fused: Tensor) -> Tensor:
        return torch.cat([kept[keep_T], fused[fuses_B]])[order]

    return TokenBatch(
        lengths=tuple(lengths_B.tolist()),
        num_prefix_tokens=batch.num_prefix_tokens,
        positions_T=arrange(batch.positions_T, torch.full_like(last_B, NOBODY)),
        sizes_T=arrange(sizes_T, total(sizes_T)),
        carriers_BN=_redirect(batch.carriers_BN, torch.where(keep_T, new_index_T, last_B[batch.images_T])),
    ), arrange(x_TD, fused_BD)


def _redirect(carriers_BN: Tensor, destination_T: Tensor) -> Tensor:
    return torch.where(carriers_BN == NOBODY, NOBODY, destination_T[carriers_BN.clamp(min=0)])
