"""Tokens that leave, against lists of tokens, one Python list an image."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from tiny import Tolerance
from torch import Tensor
from torch.testing import assert_close

from vitprune.pruning.kernels import cpu
from vitprune.pruning.layout import HALF_PRECISION_ROWS
from vitprune.pruning.learning.packed import reduce_softly
from vitprune.pruning.learning.soft_mask import SoftMask
from vitprune.pruning.packed.reduction import reduce_tokens
from vitprune.pruning.selection import Decision
from vitprune.pruning.token_batch import NO_TOKEN, TokenBatch

EXACT = Tolerance(rtol=0.0, atol=0.0)
# sums of a dozen float32 numbers, in another order
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-6)

IMAGES, TOKENS, PREFIX, WIDTH = 4, 14, 2, 3
# no fillers, few, and more than tokens
every_alignment = pytest.mark.parametrize("alignment", [1, 4, 16])


@dataclass(frozen=True)
class Kind:
    """finds: reducing finds out by itself what each token that leaves is merged into, by a metric."""

    dropped: str
    loops: bool
    finds: bool = False

    def __str__(self) -> str:
        return f"{self.dropped} in {'loops' if self.loops else 'operators'}{', found' if self.finds else ''}"


KINDS = [Kind(dropped, loops) for dropped in ("leave", "merge") for loops in (True, False)]
every_kind = pytest.mark.parametrize(
    "kind", [*KINDS, *(Kind("merge", loops, True) for loops in (True, False))], ids=str
)
# in training, where it is known what kept tokens would be merged into
every_taught_kind = pytest.mark.parametrize("kind", [Kind("leave", False), Kind("merge", False)], ids=str)


@dataclass
class Token:
    """A token as the papers speak of it: where it is from, its state, and the dense tokens that it stands for."""

    position: int
    state: Tensor
    stands_for: list[int]

    @property
    def size(self) -> int:
        return len(self.stands_for)


def mean(tokens: list[Token], weights: list[float]) -> Tensor:
    return sum((w * t.state for w, t in zip(weights, tokens, strict=True)), torch.zeros(WIDTH)) / sum(weights)


def reference_stage(tokens: list[Token], keep: list[bool], dst: list[int], dropped: str):
    """One image, one stage. dst: indices into `tokens`."""
    left = [i for i, stays in enumerate(keep) if not stays]
    kept = [Token(t.position, t.state, list(t.stands_for)) for t, stays in zip(tokens, keep, strict=True) if stays]
    if dropped == "merge":
        new_index = {old: new for new, old in enumerate(i for i, stays in enumerate(keep) if stays)}
        for old, new in new_index.items():
            group = [tokens[old], *(tokens[i] for i in left if dst[i] == old)]
            kept[new].state = mean(group, [t.size for t in group])
            kept[new].stands_for = [patch for t in group for patch in t.stands_for]
    return kept


def random_stage(
    images: list[list[Token]], stage: int, *, even: bool = False
) -> tuple[list[list[bool]], list[list[int]], list[Tensor]]:
    """Which stay, what the others are merged into, and unit vectors by which that is the most similar patch that stays.

    About a third leaves; image 0 loses nothing at the first stage, image 1 all but one patch at the second. even: a
    third of each image's patches.
    """
    keeps, dst, metrics = [], [], []
    for number, tokens in enumerate(images):
        keep = [i < PREFIX or bool(torch.rand(()) > 0.35) for i in range(len(tokens))]
        if (number, stage) == (0, 0):
            keep = [True] * len(tokens)
        if (number, stage) == (1, 1):
            keep = [i < PREFIX or i == PREFIX + 1 for i in range(len(tokens))]
        keep[PREFIX] |= not any(keep[PREFIX:])
        if even:
            leaving = torch.randperm(len(tokens) - PREFIX)[: (len(tokens) - PREFIX) // 3] + PREFIX
            keep = [i not in leaving.tolist() for i in range(len(tokens))]
        staying = [i for i in range(PREFIX, len(tokens)) if keep[i]]
        metric = torch.nn.functional.normalize(torch.randn(len(tokens), WIDTH), dim=-1)
        dst.append([max(staying, key=lambda j: float(token @ metric[j])) for token in metric])
        keeps.append(keep)
        metrics.append(metric)
    return keeps, dst, metrics


def dense(*, loops: bool = False, images: int = IMAGES) -> tuple[TokenBatch, Tensor, list[list[Token]]]:
    x_BND = torch.randn(images, TOKENS, WIDTH)
    batch = TokenBatch.dense(images, TOKENS, PREFIX, x_BND.device, kernels=cpu if loops else None)
    return batch, x_BND.flatten(0, 1), [[Token(n, x_BND[b, n], [n]) for n in range(TOKENS)] for b in range(images)]


def in_rows(batch: TokenBatch, images: list[Tensor]) -> Tensor:
    """The images' tokens where the batch has them; nothing that is a number elsewhere."""
    values_T = torch.full((batch.layout.num_rows, *images[0].shape[1:]), torch.nan)
    for start, values in zip(batch.layout.starts, images, strict=True):
        values_T[start : start + len(values)] = values
    return values_T


def decision_of(
    kind: Kind, batch: TokenBatch, keeps: list[list[bool]], dst: list[list[int]], metrics: list[Tensor]
) -> Decision:
    if kind.finds:
        return Decision(padded(keeps), metric_TK=in_rows(batch, metrics))
    return Decision(padded(keeps), padded(dst) if kind.dropped == "merge" else None)


def flat(lists: list[list]) -> Tensor:
    return torch.tensor([value for values in lists for value in values])


def padded(lists: list[list]) -> Tensor:
    longest = max(len(values) for values in lists)
    return torch.tensor([values + [type(values[0])()] * (longest - len(values)) for values in lists])


def of_images(batch: TokenBatch, values_T: Tensor) -> Tensor:
    """The values of all images' tokens in the order of the images, without fillers."""
    images = zip(batch.layout.starts, batch.lengths, strict=True)
    return torch.cat([values_T[start : start + length] for start, length in images])


def run_stages(
    kind: Kind, stages: int, dtype: torch.dtype = torch.float32, *, num_images: int = IMAGES, even: bool = False
) -> tuple[TokenBatch, Tensor, list[list[Token]]]:
    batch, x_TD, images = dense(loops=kind.loops, images=num_images)
    x_TD = x_TD.to(dtype)
    for stage in range(stages):
        keeps, dst, metrics = random_stage(images, stage, even=even)
        batch, x_TD = reduce_tokens(batch, x_TD, decision_of(kind, batch, keeps, dst, metrics))
        decisions = zip(images, keeps, dst, strict=True)
        images = [reference_stage(*decision, kind.dropped) for decision in decisions]
    return batch, x_TD, images


@every_kind
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize(
    ("num_images", "even"), [(IMAGES, False), (IMAGES, True), (1, True)], ids=["uneven", "even", "alone"]
)
def test_reducing_is_what_it_is_for_each_image_alone(kind: Kind, stages: int, num_images: int, even: bool) -> None:
    batch, x_TD, images = run_stages(kind, stages, num_images=num_images, even=even)
    dropped = kind.dropped
    assert (batch.kernels is not None) == kind.loops
    assert batch.lengths == tuple(len(tokens) for tokens in images)
    assert batch.num_prefix_tokens == PREFIX
    assert torch.equal(of_images(batch, batch.positions_T), flat([[t.position for t in tokens] for tokens in images]))
    assert_close(of_images(batch, x_TD), torch.stack([t.state for tokens in images for t in tokens]), **FLOAT32)
    if dropped == "leave":
        assert batch.sizes_T is None
    else:
        assert batch.sizes_T is not None
        assert_close(
            of_images(batch, batch.sizes_T), flat([[float(t.size) for t in tokens] for tokens in images]), **EXACT
        )


@every_kind
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_each_dense_token_knows_which_token_stands_for_it(kind: Kind, stages: int) -> None:
    batch, _, images = run_stages(kind, stages)
    for image, tokens in enumerate(images):
        expected = [NO_TOKEN] * TOKENS
        for index, token in enumerate(tokens):
            for patch in token.stands_for:
                expected[patch] = index
        assert batch.patch_token_BN[image].tolist() == expected
        owners = [NO_TOKEN if n == NO_TOKEN else tokens[n].position - PREFIX for n in expected[PREFIX:]]
        assert batch.merged_into()[image].tolist() == owners


@every_kind
@pytest.mark.parametrize("stages", [0, 1, 3])
def test_unpacking_puts_each_token_where_it_stood(kind: Kind, stages: int) -> None:
    batch, x_TD, images = run_stages(kind, stages)
    y_BND = batch.unpack(x_TD)
    for image, tokens in enumerate(images):
        # no token stands for what left: the mean of the remaining patches does
        expected = torch.stack([t.state for t in tokens[PREFIX:]]).mean(0).repeat(TOKENS, 1)
        for token in tokens:
            expected[token.stands_for] = token.state
        assert_close(y_BND[image], expected, **FLOAT32)


@every_kind
def test_a_mean_over_unpacked_patches_is_the_mean_over_tokens_by_size(kind: Kind) -> None:
    batch, x_TD, images = run_stages(kind, 3)
    means_BD = batch.unpack(x_TD)[:, PREFIX:].mean(1)
    for image, tokens in enumerate(images):
        patches = tokens[PREFIX:]
        weights = [1.0 if kind.dropped == "leave" else float(t.size) for t in patches]
        assert_close(means_BD[image], mean(patches, weights), **FLOAT32)


@pytest.mark.parametrize("kind", [Kind("merge", True), Kind("merge", False), Kind("merge", False, True)], ids=str)
def test_sizes_add_up_to_the_dense_tokens(kind: Kind) -> None:
    batch, _, _ = run_stages(kind, 3)
    assert batch.sizes_T is not None
    for sizes in of_images(batch, batch.sizes_T).split(list(batch.lengths)):
        assert sizes.sum() == TOKENS
        assert (sizes[:PREFIX] == 1).all()


@every_kind
@pytest.mark.parametrize("stages", [0, 1])
def test_where_nothing_leaves_nothing_is_done(kind: Kind, stages: int) -> None:
    batch, x_TD, _ = run_stages(kind, stages)
    keeps = [[True] * length for length in batch.lengths]
    dst, metrics = [[0] * length for length in batch.lengths], [torch.randn(n, WIDTH) for n in batch.lengths]
    after, y_TD = reduce_tokens(batch, x_TD, decision_of(kind, batch, keeps, dst, metrics))
    assert after is batch
    assert y_TD is x_TD


@every_kind
def test_counts_that_the_host_knows_already_change_nothing(kind: Kind) -> None:
    batch, x_TD, images = dense(loops=kind.loops)
    keeps, dst, metrics = random_stage(images, 1)
    decision = decision_of(kind, batch, keeps, dst, metrics)
    known = replace(decision, kept=tuple(sum(keep) for keep in keeps))
    (ours, ours_TD), (expected, expected_TD) = (reduce_tokens(batch, x_TD, d) for d in (known, decision))
    assert ours.layout == expected.layout
    assert_close(ours_TD, expected_TD, **EXACT)
    assert_close(ours.positions_T, expected.positions_T, **EXACT)


@every_kind
def test_states_keep_their_dtype_and_sizes_are_float32(kind: Kind) -> None:
    pruned, y_TD, _ = run_stages(kind, 2, torch.bfloat16)
    assert y_TD.dtype == pruned.unpack(y_TD).dtype == torch.bfloat16
    assert pruned.sizes_T is None or pruned.sizes_T.dtype == torch.float32


@every_alignment
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_token_is_a_copy_of_its_images_first(
    dtype: torch.dtype, kind: Kind, alignment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitprune.pruning.layout.KEY_ALIGNMENT", alignment)
    monkeypatch.setattr("vitprune.pruning.layout.HALF_PRECISION_PADDING", HALF_PRECISION_ROWS)
    batch, x_TD, _ = run_stages(kind, 3, dtype)
    is_filler = torch.ones(len(x_TD), dtype=torch.bool)
    for start, length in zip(batch.layout.starts, batch.lengths, strict=True):
        assert start % alignment == 0
        is_filler[start : start + length] = False
    assert len(x_TD) == len(batch.positions_T) == sum(batch.layout.rows) + batch.layout.padding
    assert len(x_TD) % (HALF_PRECISION_ROWS if dtype == torch.bfloat16 else alignment) == 0
    assert (batch.positions_T[is_filler] == NO_TOKEN).all()
    assert (batch.key_bias_T[is_filler] == -torch.inf).all()
    assert batch.key_bias_T[~is_filler].isfinite().all()
    first = batch.starts_B.index_select(0, batch.layout.images(x_TD.device))
    assert_close(x_TD[is_filler], x_TD[first[is_filler]], **EXACT)


@every_alignment
@every_kind
def test_an_image_that_is_not_finite_stays_alone(kind: Kind, alignment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitprune.pruning.layout.KEY_ALIGNMENT", alignment)
    batch, x_TD, images = dense(loops=kind.loops)
    x_TD[TOKENS : 2 * TOKENS] = torch.nan
    keeps, dst, metrics = random_stage(images, 0)
    metrics[1][:] = torch.nan
    batch, y_TD = reduce_tokens(batch, x_TD, decision_of(kind, batch, keeps, dst, metrics))
    assert torch.equal(y_TD.isnan().all(1), batch.layout.images(x_TD.device) == 1)
    assert torch.equal(batch.unpack(y_TD).isnan().flatten(1).any(1), torch.arange(IMAGES) == 1)


def teach(batch: TokenBatch, x_TD: Tensor, dropped: str) -> tuple[TokenBatch, Tensor]:
    """Of each image's patches the 2nd, 5th, … leave near the threshold, the 3rd, 6th, … far from it."""
    slots = torch.arange(batch.valid_BM.shape[1]).expand_as(batch.valid_BM)
    patches = batch.valid_BM & (slots >= PREFIX)
    leaves_near, leaves_far = (patches & ((slots - PREFIX) % 3 == rest) for rest in (1, 2))
    keep = batch.valid_BM & ~leaves_near & ~leaves_far
    mask = keep.float().requires_grad_()
    dst = torch.full_like(slots, PREFIX) if dropped == "merge" else None
    return reduce_softly(batch, x_TD, Decision(keep, dst), SoftMask(mask, leaves_near))


@every_taught_kind
def test_what_stays_is_what_inference_keeps(kind: Kind) -> None:
    dropped = kind.dropped
    batch, x_TD, _ = dense()
    taught, taught_TD = teach(batch, x_TD, dropped)
    slots = torch.arange(TOKENS).expand(IMAGES, -1)
    keep = (slots < PREFIX) | ((slots - PREFIX) % 3 == 0)
    dst = torch.full_like(slots, PREFIX) if dropped == "merge" else None
    inferred, inferred_TD = reduce_tokens(batch, x_TD, Decision(keep, dst))
    assert_close(of_images(taught, taught_TD), of_images(inferred, inferred_TD), **FLOAT32)
    assert_close(taught.unpack(taught_TD), inferred.unpack(inferred_TD), **FLOAT32)


def test_merging_has_the_gradient_of_the_amount() -> None:
    """One token of size 1 is merged into another: x' = x_j + a(x_i - x_j)/(1 + a), at a = 1."""
    batch = TokenBatch.dense(1, 3, 1, torch.device("cpu"))
    x_TD = torch.randn(3, WIDTH)
    mask = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)
    decision = Decision(torch.tensor([[True, True, False]]), torch.tensor([[0, 0, 1]]))
    merged, y_TD = reduce_softly(batch, x_TD, decision, SoftMask(mask, torch.tensor([[False, False, True]])))
    (gradient,) = torch.autograd.grad(y_TD[merged.layout.starts[0] + 1].sum(), mask)
    # of m = 1 - a
    assert_close(gradient[0, 2], -(x_TD[2] - x_TD[1]).sum() / 4, **FLOAT32)
