"""The tokens of a batch of images laid end to end: what each row is.

Which token belongs to which image, where it came from, for how many patches it stands, and which token stands for a
patch that was dropped.

Shapes: B images, N tokens of one image in the dense sequence (prefix tokens first), T rows of the whole batch laid end
to end, M tokens of the longest image, D width. A `_BM` tensor is the padded view of a `_T` one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vitprune.pruning.layout import Layout, on_device

NO_TOKEN = -1


class Pairs(NamedTuple):
    """What is added to the logits of each pair of tokens: a table by their positions in the dense sequence.

    table_1HNN: (1, H, N, N). positions_T: of each row; for one without, `NO_TOKEN`, nothing is added.
    """

    table_1HNN: Tensor
    positions_T: Tensor


class MeanQuery(Protocol):
    def __call__(self, q_THK: Tensor, sizes_T: Tensor | None, layout: Layout) -> Tensor: ...


class Unpack(Protocol):
    def __call__(
        self, x_TD: Tensor, patch_token_BN: Tensor, layout: Layout, num_prefix_tokens: int, *, averages: bool
    ) -> Tensor: ...


class PackedAttentionKernel(Protocol):
    def __call__(
        self,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THK: Tensor,
        sizes_T: Tensor | None,
        layout: Layout,
        scale: float,
        pairs: Pairs | None = None,
        read: int | None = None,
    ) -> Tensor: ...


class Kernels(Protocol):
    """The parts of a stage as one device does them fastest; `kernels` has them, and chooses once a forward.

    Without them a stage is done in torch's operators, which say the same (`attention`, `scores`, `selection`,
    `packed.reduction`); so are those that a device hasn't got (None), and what knows pairs, where its kernels don't.
    """

    @property
    def knows_pairs(self) -> bool: ...

    @property
    def mean_query(self) -> MeanQuery | None: ...

    @property
    def packed_attention(self) -> PackedAttentionKernel | None: ...

    def fits_attention(self, q: Tensor) -> bool: ...

    @property
    def unpack(self) -> Unpack | None: ...

    def compute_stats(
        self,
        query_BHK: Tensor | None,
        k_THK: Tensor,
        contexts_THK: Tensor,
        sizes_T: Tensor | None,
        scale: float,
        layout: Layout,
        pairs: Pairs | None = None,
        *,
        wants_metric: bool,
    ) -> tuple[Tensor | None, Tensor | None]: ...

    def density_peaks(
        self,
        metric_TK: Tensor,
        scores_BM: Tensor,
        num_patches: int | Tensor,
        exponent: float,
        num_prefix_tokens: int,
        layout: Layout,
    ) -> Tensor: ...

    def select(
        self,
        scores_BM: Tensor,
        threshold: Tensor,
        at_least: int,
        metric_TK: Tensor | None,
        num_prefix_tokens: int,
        layout: Layout,
    ) -> tuple[Tensor, Tensor, Tensor | None]: ...

    def lay_out(self, kept: Sequence[int], kept_B: Tensor | None, x_TD: Tensor) -> Layout: ...

    def reduce(
        self,
        x_TD: Tensor,
        positions_T: Tensor,
        sizes_T: Tensor | None,
        patch_token_BN: Tensor,
        keep_BM: Tensor,
        dst_BM: Tensor | None,
        before: Layout,
        after: Layout,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]: ...


class Origin(Protocol):
    """Where a batch's tokens come from; worked out when it is asked for.

    positions_T: index of each token in the dense sequence; `NO_TOKEN` for fillers.
    patch_token_BN: which of its image's tokens stands for a token of the dense sequence now, or `NO_TOKEN`.
    """

    @property
    def positions_T(self) -> Tensor: ...

    @property
    def patch_token_BN(self) -> Tensor: ...


@dataclass(frozen=True)
class Known:
    """An origin that is there already."""

    positions_T: Tensor
    patch_token_BN: Tensor


@dataclass(frozen=True)
class _Dense:
    """Every image has all of its tokens."""

    batch_size: int
    num_tokens: int
    device: torch.device

    @property
    def patch_token_BN(self) -> Tensor:
        return self._index_BN

    @property
    def positions_T(self) -> Tensor:
        return self._index_BN.flatten()

    @cached_property
    def _index_BN(self) -> Tensor:
        return torch.arange(self.num_tokens, device=self.device).repeat(self.batch_size, 1)


@dataclass(frozen=True)
class TokenBatch:
    """A packed batch; its hidden states (T, D) travel beside it.

    Rows without a token ("fillers") hold a copy of their image's first token, so that they are finite where it is; no
    token sees them.

    num_patches: of the dense image; (B, 1) where images differ.
    sizes_T: float32, for how many patches a token stands, 0 in fillers; None when every token stands for itself.
    covers_all: each token of the dense sequence has a token that stands for it.
    kernels: what stages are done by; None: torch's operators.
    """

    layout: Layout
    num_prefix_tokens: int
    num_patches: int | Tensor
    sizes_T: Tensor | None
    origin: Origin
    device: torch.device
    covers_all: bool = False
    kernels: Kernels | None = None

    @classmethod
    def dense(
        cls,
        batch_size: int,
        num_tokens: int,
        num_prefix_tokens: int,
        device: torch.device,
        kernels: Kernels | None = None,
    ) -> TokenBatch:
        """The batch before anything left: every image has all of its tokens."""
        layout, origin = Layout((num_tokens,) * batch_size), _Dense(batch_size, num_tokens, device)
        patches = num_tokens - num_prefix_tokens
        return cls(layout, num_prefix_tokens, patches, None, origin, device, covers_all=True, kernels=kernels)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each image, prefix included."""
        return self.layout.lengths

    @property
    def positions_T(self) -> Tensor:
        """Index of each token in the dense sequence; `NO_TOKEN` for fillers."""
        return self.origin.positions_T

    @property
    def patch_token_BN(self) -> Tensor:
        """Which of its image's tokens stands now for a token of the dense sequence, or `NO_TOKEN`."""
        return self.origin.patch_token_BN

    @property
    def positions_BM(self) -> Tensor:
        """Index of each token in the dense sequence, in the padded view."""
        return self.pad(self.positions_T)

    @property
    def lengths_B(self) -> Tensor:
        return self.layout.spans(self.device)[1]

    @property
    def starts_B(self) -> Tensor:
        """Row of each image's first token."""
        return self.layout.spans(self.device)[0]

    @property
    def valid_BM(self) -> Tensor:
        """True where the padded view holds a token."""
        return self._valid_BM

    @property
    def index_BM(self) -> Tensor:
        """Row of each place of the padded view; padding repeats the image's last token."""
        return self._index_BM

    @cached_property
    def _valid_BM(self) -> Tensor:
        return on_device(self.layout.valid_BM, self.device)

    @cached_property
    def _index_BM(self) -> Tensor:
        return on_device(self.layout.index_BM, self.device)

    def _slots(self, counts: Sequence[int]) -> Tensor:
        """Places of one image, padded to the largest of the counts."""
        return torch.arange(max(counts), device=self.device)

    @cached_property
    def _rows_B1(self) -> Tensor:
        return on_device(self.layout.rows, self.device)[:, None]

    @cached_property
    def has_row_BM(self) -> Tensor:
        """True where an image, padded to the most rows, has a row of its own."""
        return self._slots(self.layout.rows) < self._rows_B1

    @cached_property
    def rows_BM(self) -> Tensor:
        """Row of each place of images padded to the most rows; padding repeats the image's last row."""
        return self.layout.rows_of(self._slots(self.layout.rows).minimum(self._rows_B1 - 1))

    @cached_property
    def places_T(self) -> Tensor:
        """Place of each row, numbered through, in images padded to the most rows."""
        images_T, slots_T = self.layout.places(self.device)
        most = max(self.layout.rows)  # behind the last image are rows that go on beyond it
        return images_T * most + slots_T.clamp(max=most - 1)

    def rows_at(self, places_X: Tensor) -> Tensor:
        """Rows of places of the padded view, which are numbered through."""
        return places_X if len(self.lengths) == 1 else self.index_BM.flatten().index_select(0, places_X)

    @cached_property
    def key_bias_T(self) -> Tensor:
        """What is added to a key's logits, float32: the log of its size, −inf for fillers."""
        if self.sizes_T is None:
            bias_T = torch.zeros(self.layout.num_rows, device=self.device)
            return bias_T.index_fill_(0, on_device(self.layout.fillers, self.device), -torch.inf)
        if not self.sizes_T.requires_grad:
            return self.sizes_T.log()
        fillers_T = self.sizes_T == 0  # the logarithm of 0 would have a NaN for a gradient
        return self.sizes_T.masked_fill(fillers_T, 1.0).log().masked_fill(fillers_T, -torch.inf)

    @cached_property
    def _bucket_masks(self) -> dict[torch.dtype, list[Tensor]]:
        return {}

    def bucket_masks(self, dtype: torch.dtype) -> list[Tensor]:
        """`key_bias_T` for each bucket as kernels of a precision take it, (G, 1, L, L); made once for all blocks."""
        if dtype not in self._bucket_masks:
            biases = self.layout.split(self.key_bias_T.to(dtype))
            masks = [bias_GL[:, None, None].expand(-1, -1, bias_GL.shape[1], -1) for bias_GL in biases]
            self._bucket_masks[dtype] = masks
        return self._bucket_masks[dtype]

    @property
    def is_bare(self) -> bool:
        """Whether nothing is added to any key's logits."""
        return self.sizes_T is None and not len(self.layout.fillers)

    @property
    def key_bias_BM(self) -> Tensor:
        """`key_bias_T` in the padded view; −inf beyond an image's tokens. Not kept: checkpointing makes it again."""
        return self.hide(self.pad(self.key_bias_T))

    def hide(self, logits_BM: Tensor) -> Tensor:
        """−inf beyond an image's tokens, (B, M, …)."""
        if self.layout.is_even:
            return logits_BM
        beyond_BM = on_device(~self.layout.valid_BM, self.device)
        return logits_BM.masked_fill(beyond_BM.view(*beyond_BM.shape, *(1 for _ in logits_BM.shape[2:])), -torch.inf)

    def attention_kernel(self, q: Tensor) -> PackedAttentionKernel | None:
        """What attends among the packed tokens by such queries; None where the device's kernels don't."""
        return self.kernels.packed_attention if self.kernels is not None and self.kernels.fits_attention(q) else None

    def pad(self, values_T: Tensor) -> Tensor:
        """(T, …) to (B, M, …); what lies beyond an image's tokens is a copy of one of them or a filler of its own."""
        if len(self.lengths) == 1:
            return values_T[None, : self.lengths[0]]
        if len(self.layout.buckets) == 1:
            return self.layout.split(values_T)[0][:, : max(self.lengths)]
        return values_T.index_select(0, self.index_BM.flatten()).unflatten(0, self.index_BM.shape)

    def merged_into(self) -> Tensor:
        """int64 (B, N − P): the patch whose token stands for each patch, itself where it is one of its own still;
        `NO_TOKEN` where none does.
        """
        positions_BN = self.positions_T.index_select(0, self.patch_rows_BN.flatten()).view_as(self.patch_token_BN)
        patches_BN = (positions_BN - self.num_prefix_tokens).where(self.present_BN, NO_TOKEN)
        return patches_BN[:, self.num_prefix_tokens :].long()

    @property
    def present_BN(self) -> Tensor:
        """bool (B, N): tokens of the dense sequence that a token stands for."""
        return self.patch_token_BN != NO_TOKEN

    def unpack(self, x_TD: Tensor) -> Tensor:
        """Hidden states back in the dense sequence, (T, D) to (B, N, D).

        A dropped patch holds the state of the token that stands for it (ToMe's unmerge, §3.3); where none does, the
        mean of the image's remaining patches. So a head that averages the patches averages the kept ones, by size.
        """
        if self.kernels is not None and self.kernels.unpack is not None:
            averages = not self.covers_all
            return self.kernels.unpack(
                x_TD, self.patch_token_BN, self.layout, self.num_prefix_tokens, averages=averages
            )
        rows_BN = self.patch_rows_BN
        if self.sizes_T is None:  # with sizes each patch has a token that stands for it
            images_B1 = torch.arange(len(rows_BN), device=rows_BN.device)[:, None]
            rows_BN = torch.where(self.present_BN, rows_BN, len(x_TD) + images_B1)
            x_TD = torch.cat([x_TD, self._mean_patches(x_TD)])
        return x_TD.index_select(0, rows_BN.flatten()).unflatten(0, rows_BN.shape)

    def _mean_patches(self, x_TD: Tensor) -> Tensor:
        """The mean of each image's patches, (B, D)."""
        patches_BM = self.valid_BM.clone()
        patches_BM[:, : self.num_prefix_tokens] = False
        # multiplied, not filled: a third of the time
        kept_BMD = self.pad(x_TD) * patches_BM[..., None].to(x_TD.dtype)
        sums_BD = kept_BMD.sum(1, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        return (sums_BD / (self.lengths_B - self.num_prefix_tokens)[:, None]).to(x_TD.dtype)

    @property
    def patch_rows_BN(self) -> Tensor:
        """Row that stands for each token of the dense sequence, (B, N); its image's first where none does."""
        return self.layout.rows_of(self.patch_token_BN.clamp(min=0))
