"""One block's attention among packed tokens while thresholds learn: masks have gradients, borderline tokens follow.

The block runs twice: on the kept tokens, then without gradient on the borderline ones, which attend to the kept tokens
of the run before.

Shapes: B images, T rows of the batch laid end to end, X borderline tokens, C of an image, G images of a rectangle and L
rows of each, M tokens of the longest image, H heads, K head width, D width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from vitprune.pruning.attention import (
    NO_STATS,
    KeysAndValuesKnown,
    StatsRequest,
    first_positions,
    row_query,
    stats_logits,
    uncompiled,
)
from vitprune.pruning.learning.borderline import BorderlineTokens, LearningBatch
from vitprune.pruning.learning.mask_gradients import (
    BorderlineKeys,
    KeptKeys,
    borderline_attention,
    mask_gradient_attention,
)
from vitprune.pruning.packed.attention import Kernel, PackedAttention, PackedInputs, of_one_dtype
from vitprune.pruning.scores import (
    TokenStats,
    context_norms,
    head_weighted_attention,
    key_metric,
    mean_query,
    row_logits,
    row_weights,
)


class BorderlinePass:
    """The way of borderline tokens through one block, behind the kept ones.

    states_XD: theirs before the block; after_XD: behind it, None where they end there.
    ends: behind this block they are gone, so their queries, keys and values in it are wanted alone.
    arguments: what the block is given for them in place of what it is given for the kept tokens.
    draws: what stochastic depth drew for the images, and will for these tokens, in the order in which it comes up.
    qkv: of these tokens in this block, (X, H, K) each, once they have been there.
    Gradient checkpointing repeats the pass and finds the same again.
    """

    def __init__(self, tokens: BorderlineTokens, states_XD: Tensor, *, ends: bool) -> None:
        self.tokens, self.states_XD, self.ends = tokens, states_XD, ends
        self.after_XD: Tensor | None = None
        self.arguments: dict[str, Any] = {}
        self.draws: deque[Tensor] = deque()
        self.qkv: tuple[Tensor, Tensor, Tensor] | None = None
        self.is_on = False

    @contextmanager
    def running(self) -> Iterator[None]:
        self.is_on = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.is_on = False
            self.draws.clear()

    def found(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        assert self.qkv is not None
        return self.qkv


class LearningAttention(PackedAttention):
    """Attention of a block behind a stage whose threshold learns. borderline: the pass of those tokens, if any."""

    batch: LearningBatch

    def __init__(
        self,
        batch: LearningBatch,
        request: StatsRequest = NO_STATS,
        borderline: BorderlinePass | None = None,
        kernel: Kernel | None = None,
    ) -> None:
        super().__init__(batch, request, kernel)
        self.borderline = borderline
        self._inputs: PackedInputs | None = None  # of the kept tokens, while the borderline ones need it
        self._contexts_THK: Tensor | None = None

    @uncompiled
    def run(self, block: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        theirs = self.borderline
        if theirs is None:
            return block(hidden_states, *args, **kwargs)
        theirs.draws.clear()
        try:
            output = block(hidden_states, *args, **kwargs)
            with theirs.running(), suppress(KeysAndValuesKnown):
                after = block(theirs.states_XD[None], *args, **{**kwargs, **theirs.arguments})
                theirs.after_XD = (after[0] if isinstance(after, tuple) else after)[0]
            self._finish()
        finally:  # also where checkpointing ends the run early, since it has all that it needs
            self._inputs = self._contexts_THK = None
        return output

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias_1HNN: Tensor | None, scale: float, dropout: float) -> Tensor:
        if self.borderline is not None and self.borderline.is_on:
            return self._attend_borderline(self.borderline, *of_one_dtype(q, k, v))
        if self.kernel is None:
            self.kernel = "buckets" if q.device.type == "cpu" else "padded"  # the others know no masks
        self._inputs = inputs = self.packed_inputs(q, k, v, bias_1HNN, scale, dropout)
        rectangles = inputs.rectangles
        masks, learns = rectangles.split(self.batch.mask_T), rectangles.split(self.batch.learns_T, 0)
        kept = map(KeptKeys, inputs.key_biases, masks, learns)
        contexts = [self._rectangle(inputs, i, keys).transpose(1, 2) for i, keys in enumerate(kept)]
        self._contexts_THK = contexts_THK = rectangles.join(contexts)
        if self.borderline is None:
            self._finish()
            self._inputs = self._contexts_THK = None
        return contexts_THK[None]

    def _rectangle(self, inputs: PackedInputs, i: int, kept: KeptKeys) -> Tensor:
        """Context vectors of a rectangle of kept tokens, (G, H, L, K)."""
        positions_GL = inputs.positions[i]
        pairs = inputs.pairs and inputs.pairs.between(positions_GL, positions_GL)
        theirs = None if self.borderline is None else self._borderline_keys(self.borderline, inputs, i)
        return mask_gradient_attention(*inputs.rectangle(i), kept, theirs, inputs.scale, pairs)

    @staticmethod
    def _borderline_keys(theirs: BorderlinePass, inputs: PackedInputs, i: int) -> BorderlineKeys:
        tokens, all_pairs = theirs.tokens, inputs.pairs
        places, positions_GL = tokens.places.of_images(inputs.rectangles.images[i]), inputs.positions[i]

        def in_backward() -> tuple[Tensor, Tensor, Tensor | None]:
            pairs = None if all_pairs is None else all_pairs.between(positions_GL, places.take(tokens.positions_X))
            keys, values = (places.take(x_XHK, 0.0).transpose(1, 2) for x_XHK in theirs.found()[1:])
            return keys, values, pairs

        return BorderlineKeys(in_backward, places.take(tokens.bias_X, -torch.inf), places.take(tokens.mask_X, 0.0))

    def _attend_borderline(self, theirs: BorderlinePass, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Context vectors of borderline tokens, (1, X, H, K): each attends to itself and its image's kept tokens."""
        own = q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1)
        theirs.qkv = own
        if theirs.ends:
            raise KeysAndValuesKnown
        inputs, tokens = self._inputs, theirs.tokens
        assert inputs is not None
        contexts_XHK = torch.zeros_like(own[0])
        for i, images in enumerate(inputs.rectangles.images):
            places = tokens.places.of_images(images)
            if places.index_GC.shape[1] == 0:
                continue
            positions_GC = places.take(tokens.positions_X)
            own_bias = places.take(tokens.bias_X)[:, None]
            if inputs.pairs:
                own_bias = own_bias + inputs.pairs.between(positions_GC, positions_GC).diagonal(dim1=2, dim2=3)
            q, k, v = (places.take(x_XHK).transpose(1, 2) for x_XHK in own)
            mask = inputs.mask(i, q, positions_GC)
            _, kept_k, kept_v = inputs.rectangle(i)
            contexts = borderline_attention(q, k, v, kept_k, kept_v, own_bias, mask, inputs.scale)
            places.put_(contexts_XHK, contexts.transpose(1, 2))
        return contexts_XHK[None]

    def _finish(self) -> None:
        """What the attention says about the kept tokens, known only when the borderline ones have been there."""
        inputs, contexts_THK, request, batch = self._inputs, self._contexts_THK, self.request, self.batch
        assert inputs is not None
        assert contexts_THK is not None
        metric_TK = key_metric(inputs.k_THK) if request.metric else None
        if request.row is None:
            self.stats = TokenStats(None, metric_TK)
            return
        pairs = None if request.row == "mean" else inputs.pairs  # the mean query stands nowhere
        query_BHK = self._row_query(inputs)
        logits_BMH = stats_logits(query_BHK, batch, inputs.k_THK, inputs.scale, pairs)
        norms_BMH, mask_BM = batch.pad(context_norms(contexts_THK)), batch.pad(batch.mask_T)
        if self.borderline is not None:  # they get no score, but belong in the softmax's denominator
            tokens, places = self.borderline.tokens, self.borderline.tokens.places
            their_k_BCHK = places.take(self.borderline.found()[1], 0.0)
            theirs_BCH = row_logits(query_BHK, their_k_BCHK, inputs.scale)
            if pairs is not None:
                theirs_BCH = (
                    theirs_BCH + pairs.between(first_positions(batch), places.take(tokens.positions_X))[:, :, 0].mT
                )
            theirs_BCH = theirs_BCH + places.take(tokens.bias_X, -torch.inf)[..., None]
            logits_BMH = torch.cat([logits_BMH, theirs_BCH], 1)
            mask_BM = torch.cat([mask_BM, places.take(tokens.mask_X, 0.0)], 1)
        weights_BMH = row_weights(logits_BMH, mask_BM)[:, : norms_BMH.shape[1]]
        self.stats = TokenStats(head_weighted_attention(weights_BMH, norms_BMH), metric_TK)

    def _row_query(self, inputs: PackedInputs) -> Tensor:
        """Of each image the query whose row scores the tokens, (B, H, K); the mean counts tokens by their masks."""
        assert self.request.row is not None
        if self.request.row == "class":
            return row_query("class", self.batch, inputs.q_THK)
        weights_BM = self.batch.key_bias_BM.exp() * self.batch.pad(self.batch.mask_T)
        q_BMHK = self.batch.pad(inputs.q_THK)
        if self.borderline is not None:
            tokens, places = self.borderline.tokens, self.borderline.tokens.places
            their_weights_BC = places.take(tokens.bias_X, -torch.inf).exp() * places.take(tokens.mask_X, 0.0)
            weights_BM = torch.cat([weights_BM, their_weights_BC], 1)
            q_BMHK = torch.cat([q_BMHK, places.take(self.borderline.found()[0], 0.0)], 1)
        return mean_query(q_BMHK, weights_BM)

    def position_arguments(self, make: Callable[[Tensor], dict[str, Any]], positions_T: Tensor) -> dict[str, Any]:
        if self.borderline is not None:
            self.borderline.arguments = make(self.borderline.tokens.positions_X)
        return make(positions_T)

    def drop_path(self, x: Tensor, keep_probability: float) -> Tensor | None:
        theirs = self.borderline
        if theirs is not None and theirs.is_on:
            return x * theirs.draws.popleft().index_select(0, theirs.tokens.images_X)[:, None]
        return super().drop_path(x, keep_probability)

    def draw(self, x: Tensor, keep_probability: float) -> Tensor:
        drawn_B = super().draw(x, keep_probability)
        if self.borderline is not None:
            self.borderline.draws.append(drawn_B)
        return drawn_B
