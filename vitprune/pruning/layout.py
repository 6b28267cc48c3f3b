"""Where the tokens of each image lie in a packed batch, as kernels like it.

Shapes: B images, T rows of the whole batch laid end to end, M tokens of the longest image, G images in a bucket, L rows
of each of them, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

# an image's rows are a multiple of this: other numbers of keys slow fused attention down
KEY_ALIGNMENT = 4
# with AMX tiles fused attention in half precision takes up to 2.5 times as long for 191 keys as for 192
TILE_KEY_ALIGNMENT = 16
# what one more attention call costs on a CPU beside its work (30 µs), in multiply-accumulates that would take as long;
# in half precision with AMX's tiles; in a step of training with all that gives masks their gradient
CALL_MACS, TILE_CALL_MACS, LEARNING_CALL_MACS = 2_500_000, 9_000_000, 50_000_000
# half-precision matrix products on a CPU are compiled for their shape (up to milliseconds each): keep to few
HALF_PRECISION_ROWS = 64
# but of fewer rows no more than this part may be unused
HALF_PRECISION_PADDING = 1 / 32


def is_half(x: Tensor) -> bool:
    """Whether a tensor is in half precision."""
    return x.dtype in (torch.bfloat16, torch.float16)


def needs_tiles(x: Tensor) -> bool:
    """Whether fused attention on such tensors works in tiles of AMX."""
    return x.device.type == "cpu" and is_half(x) and torch.cpu._is_amx_tile_supported()


def _alignment(counts: Sequence[int], width: int, least: int, call_macs: int) -> int:
    """Fewer buckets are fewer attention calls, and more fillers for the 12·D² MACs of a row: what costs least."""

    def macs(alignment: int) -> int:
        rows = [count + -count % alignment for count in counts]
        return len(set(rows)) * call_macs + (sum(rows) - sum(counts)) * 12 * width * width

    return min((least, 2 * least, 4 * least, 8 * least), key=macs)


def row_multiple_for(rows: int, x_TD: Tensor) -> int:
    """Of which number the rows of hidden states should be a multiple.

    `HALF_PRECISION_ROWS`, or as many of them as pad no more than they may, in powers of two: shapes stay few.
    """
    if x_TD.device.type != "cpu" or not is_half(x_TD):
        return 1
    multiple = HALF_PRECISION_ROWS
    while multiple > max(1, rows * HALF_PRECISION_PADDING):
        multiple //= 2
    return multiple


def on_device(values: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """Whole numbers that the host knows; doesn't wait for what the device still has to do. Not to be written to."""
    known = torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.tensor(values, dtype=torch.int64)
    # on MPS a copy that isn't waited for reads memory that may be another's by then
    return known if device.type == "cpu" else known.to(device, non_blocking=device.type == "cuda")


def ranges(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For numbers laid end to end, so many of each image: the image of each, and its place among its image's."""
    images_X = np.repeat(np.arange(len(lengths)), lengths)
    return images_X, np.arange(len(images_X)) - np.repeat(lengths.cumsum() - lengths, lengths)


@dataclass(frozen=True)
class Layout:
    """Which rows belong to which image. Images of as many rows lie side by side: rectangles, the buckets.

    An image's tokens come first in its rows, then fillers; behind the last image may be unused rows.

    lengths: tokens of each image, prefix included. On the host: every ragged operation needs them there.
    alignment: of which number the rows of an image are a multiple.
    row_multiple: of which number all rows are a multiple.
    in_order: images lie as they come, for kernels that want no buckets.
    """

    lengths: tuple[int, ...]
    alignment: int = 1
    row_multiple: int = 1
    in_order: bool = False

    @classmethod
    def fitting(cls, lengths: Sequence[int], x_TD: Tensor, *, learns: bool = False) -> Layout:
        """As the kernels like it that work on such hidden states. learns: in a step of training."""
        if x_TD.device.type != "cpu":
            return cls(tuple(lengths))
        least = TILE_KEY_ALIGNMENT if needs_tiles(x_TD) else KEY_ALIGNMENT
        row_multiple = row_multiple_for(sum(lengths), x_TD)
        if len(lengths) == 1:  # all rows are its own
            return cls(tuple(lengths), max(least, row_multiple))
        call_macs = LEARNING_CALL_MACS if learns else TILE_CALL_MACS if least == TILE_KEY_ALIGNMENT else CALL_MACS
        alignment = _alignment(lengths, x_TD.shape[-1], least, call_macs)
        return cls(tuple(lengths), alignment, row_multiple)

    @cached_property
    def rows(self) -> list[int]:
        """Rows of each image."""
        return [count + -count % self.alignment for count in self.lengths]

    @cached_property
    def order(self) -> list[int]:
        """Images in the order in which they lie."""
        if self.in_order:
            return list(range(len(self.rows)))
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

    @cached_property
    def padding(self) -> int:
        """Rows behind the last image."""
        return -sum(self.rows) % self.row_multiple

    @cached_property
    def num_rows(self) -> int:
        """All rows, T."""
        return sum(self.rows) + self.padding

    @cached_property
    def all_rows(self) -> list[int]:
        """Rows of each image, with those behind the last image as its own."""
        rows = list(self.rows)
        rows[self.order[-1]] += self.padding
        return rows

    @cached_property
    def spans_on(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        """What `spans` knows already."""
        return {}

    def spans(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """First row and number of tokens of each image, int64 (B,) each."""
        if device not in self.spans_on:
            images, tokens = len(self.lengths), self.lengths[0]
            if device.type != "cpu" and self.is_even and self.rows == list(self.lengths):  # nothing has to be copied
                starts_B = torch.arange(0, images * tokens, tokens, device=device)
                lengths_B = torch.full((images,), tokens, device=device)
                self.spans_on[device] = starts_B, lengths_B
            else:
                self.spans_on[device] = on_device(self.starts, device), on_device(self.lengths, device)
        return self.spans_on[device]

    @cached_property
    def spans_3B(self) -> np.ndarray:
        """Of each image the first row, the number of tokens, and of `all_rows`; int64."""
        return np.array([self.starts, self.lengths, self.all_rows])

    @cached_property
    def is_even(self) -> bool:
        """Whether all images have equally many tokens."""
        return len(set(self.lengths)) == 1

    @cached_property
    def valid_BM(self) -> np.ndarray:
        """Where images, padded to the longest, have a token."""
        return np.arange(max(self.lengths)) < np.array(self.lengths)[:, None]

    @cached_property
    def index_BM(self) -> np.ndarray:
        """Row of each place of images padded to the longest; padding repeats the image's last token."""
        slots_BM = np.minimum(np.arange(max(self.lengths)), np.array(self.lengths)[:, None] - 1)
        return np.array(self.starts)[:, None] + slots_BM

    @cached_property
    def slot_of_row_T(self) -> tuple[np.ndarray, np.ndarray]:
        """Image of each row, and which of its tokens it is; a filler is its image's first."""
        lengths_B, order_B = np.array(self.lengths), np.array(self.order)
        images_T, slots_T = ranges(np.array(self.all_rows)[order_B])
        images_T = order_B[images_T]
        return images_T, np.where(slots_T < lengths_B[images_T], slots_T, 0)

    @cached_property
    def fillers(self) -> np.ndarray:
        """Rows without a token."""
        if self.num_rows == sum(self.lengths):
            return np.empty(0, np.int64)
        has_token_T = np.zeros(self.num_rows, np.bool_)
        has_token_T[self.index_BM[self.valid_BM]] = True
        return np.flatnonzero(~has_token_T)

    def rows_of(self, slots_BM: Tensor) -> Tensor:
        """Rows of tokens that are numbered within their image."""
        if len(self.lengths) == 1:
            return slots_BM
        return slots_BM + on_device(self.starts, slots_BM.device)[:, None]

    def spread(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """Each image's number at all of its rows, (T,); the last image's go on behind it."""
        counts = [self.all_rows[image] for image in self.order]
        if len(counts) == 1:
            return torch.full((counts[0],), numbers[0], device=device)
        in_order = on_device([numbers[image] for image in self.order], device)
        return in_order.repeat_interleave(on_device(counts, device), output_size=sum(counts))

    def images(self, device: torch.device) -> Tensor:
        """Image of each row, (T,); the last image's go on behind it."""
        return self.spread(range(len(self.lengths)), device)

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Image of each row, (T,), and its place within that image's rows, (T,)."""
        images_T = self.images(device)
        return images_T, torch.arange(len(images_T), device=device) - self.spread(self.starts, device)

    def split(self, values_T: Tensor) -> list[Tensor]:
        """(T, …) as one view (G, L, …) a bucket."""
        if len(self.rows) == 1:
            return [values_T[None, : self.rows[0]]]
        parts = values_T.split([*(images * rows for images, rows in self.buckets), self.padding])
        shape = values_T.shape[1:]  # a view is made in half the time that unflatten takes
        return [part.view(*bucket, *shape) for part, bucket in zip(parts, self.buckets, strict=False)]

    def split_heads(self, values_1HTK: Tensor) -> list[Tensor]:
        """(1, H, T, K) as one view (G, H, L, K) a bucket."""
        sizes = [images * rows for images, rows in self.buckets]
        if len(sizes) == 1 and not self.padding:
            parts: Sequence[Tensor] = (values_1HTK,)
        else:
            parts = values_1HTK.split([*sizes, self.padding], 2)
        return [
            part if images == 1 else part[0].unflatten(1, (images, rows)).transpose(0, 1)
            for part, (images, rows) in zip(parts, self.buckets, strict=False)
        ]

    def join(self, values: list[Tensor]) -> Tensor:
        """What `split` took apart, with zeros behind the last image."""
        parts = [value.flatten(0, 1) for value in values]
        if self.padding:
            parts.append(parts[0].new_zeros(self.padding, *parts[0].shape[1:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
