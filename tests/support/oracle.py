"""A model run image by image by `pruning/reference.py`: what all other ways to run it are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from vitprune.models import context, hooks
from vitprune.models.module import Pruning
from vitprune.pruning import reference
from vitprune.pruning.attention import Attention
from vitprune.pruning.forward import Forward
from vitprune.pruning.token_batch import NO_TOKEN


class ReferenceAttention(Attention):
    """Attention written out; keeps what the reference scores tokens by."""

    def __init__(self, positions: list[int], sizes_N: Tensor) -> None:
        super().__init__()
        self.positions, self.sizes_N = positions, sizes_N

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias_1HNN: Tensor | None, scale: float, dropout: float) -> Tensor:
        bias = 0.0 if bias_1HNN is None else bias_1HNN[0][:, self.positions][:, :, self.positions]
        self.q_HNK, self.k_HNK, self.scale = q[0], k[0], scale
        self.weights_HNN, self.contexts_HNK = reference.attend(q[0], k[0], v[0], self.sizes_N, bias, scale)
        return self.contexts_HNK.transpose(0, 1)[None]


class ReferenceForward(Forward):
    """One image. positions: index in the dense sequence of each token; owner: of each dense token the one that stands
    for it, an index into `positions`, or None.
    """

    def enter_block(
        self, block: int, hidden_states: Tensor, valid_BN: Tensor | None = None
    ) -> tuple[Tensor, Attention]:
        if block == 0:
            assert len(hidden_states) == 1
            self._count(hidden_states, valid_BN)
            self.there = (
                list(range(hidden_states.shape[1])) if valid_BN is None else valid_BN[0].nonzero()[:, 0].tolist()
            )
            self.positions_of = self.there
            self.owner: list[int | None] = [None] * hidden_states.shape[1]
            for place, position in enumerate(self.there):
                self.owner[position] = place
            self.patches = len(self.there) - self.policy.num_prefix_tokens
            self.sizes_N = torch.ones(len(self.there))
            hidden_states = hidden_states[:, self.there]
            self.owners = [self.owner]
        assert self.counter is not None
        self.counter.add_block(block, self._number(len(self.positions_of)))
        self.attention = ReferenceAttention(self.positions_of, self.sizes_N)
        return hidden_states, self.attention

    @staticmethod
    def _number(count: int) -> Tensor:
        return torch.tensor([count], dtype=torch.float64)

    def leave_block(self, block: int, hidden_states: Tensor) -> Tensor:
        if block + 1 in self.policy.before_blocks:
            hidden_states = self.reduce(self.policy.before_blocks.index(block + 1), hidden_states[0])[None]
        self.owners.append(self.owner)
        return hidden_states

    def score(self, metric_NK: Tensor, stage: int) -> Tensor:
        policy, found = self.policy, self.attention
        prefix, spec = policy.num_prefix_tokens, policy.spec
        if spec.select == "random":
            table = torch.rand(1 + max(self.positions_of), generator=torch.Generator().manual_seed(stage))
            return table[self.positions_of]
        row_HN = found.weights_HNN[:, 0]
        if spec.score == "head-weighted-mean-attention" or not policy.has_class_token:
            row_HN = reference.mean_row(found.q_HNK, found.k_HNK, self.sizes_N, found.scale)
        attention_N = reference.class_attention(row_HN, found.contexts_HNK)
        if spec.score != "redundancy":
            return attention_N
        return reference.density_peaks(attention_N, metric_NK, prefix, self.patches, spec.redundancy_exponent)

    def reduce(self, stage: int, x_ND: Tensor) -> Tensor:
        policy, level = self.policy, self.policy.levels[stage]
        prefix, spec = policy.num_prefix_tokens, policy.spec
        count = max(int((level * (len(x_ND) - prefix)).round()), spec.min_tokens) if spec.select != "threshold" else 0
        metric_NK, dst = reference.metric(self.attention.k_HNK), None
        if spec.select == "tome":
            scores_N, anchors = reference.matching(metric_NK, prefix)
            keep = reference.keep_best(scores_N, count, prefix)
            keep = sorted({*keep, *(i for i in range(len(x_ND)) if i not in anchors)})
            dst = {i: anchors[i] for i in range(len(x_ND)) if i not in keep}
        elif spec.select == "threshold":
            keep = reference.keep_above(self.score(metric_NK, stage), level.item(), prefix, spec.min_tokens)
        else:
            keep = reference.keep_best(self.score(metric_NK, stage), count, prefix)
        assert self.counter is not None
        before, after = self._number(len(x_ND)), self._number(len(keep))
        self.counter.add_stage(before, after)
        place = {i: place for place, i in enumerate(keep)}
        if spec.dropped == "merge":
            dst = reference.nearest_kept(metric_NK, keep, prefix) if dst is None else dst
            x_ND, self.sizes_N = reference.merge(x_ND, self.sizes_N, dst)
            place |= {i: place[j] for i, j in dst.items()}
        self.owner = [None if i is None else place.get(i) for i in self.owner]
        self.positions_of, self.sizes_N = [self.positions_of[i] for i in keep], self.sizes_N[keep]
        owners = [NO_TOKEN if i is None else self.positions_of[i] - prefix for i in self.owner]
        self.merged_into.append(torch.tensor([owners[prefix:]]))
        return x_ND[keep]

    def positions(self) -> Tensor:
        return torch.tensor(self.positions_of)

    def absent_BN(self) -> Tensor | None:
        absent_BN = torch.tensor([[i is None for i in self.owner]])
        return absent_BN if absent_BN.any() else None

    def unpack(self, hidden_states: Tensor) -> Tensor:
        return self.unpack_recorded(-1, hidden_states)

    def unpack_recorded(self, block: int, hidden_states: Tensor) -> Tensor:
        """A patch without a token holds the mean of the patches that are left; padding zeros."""
        if hidden_states.shape[1] == self.num_tokens and block == len(self.policy.cost.linear):
            return hidden_states  # unpacked already
        owner, x_ND = self.owners[block], hidden_states[0]
        mean_D = x_ND[self.policy.num_prefix_tokens :].mean(0)
        rows = [mean_D if i is None else x_ND[i] for i in owner]
        return torch.stack([row if n in self.there else torch.zeros_like(row) for n, row in enumerate(rows)])[None]


@contextmanager
def reference_forwards() -> Iterator[None]:
    """Inside, pruned models run by the reference, an image at a time."""

    def make_forward(pruning: Pruning, *, training: bool, for_head: bool) -> Forward:
        assert not training
        return ReferenceForward(pruning(), context.current().traces)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "make_forward", make_forward)
        yield
