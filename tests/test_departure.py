"""Tokens that leave, against lists of tokens, one Python list an image."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tiny
import torch
from tiny import Tolerance
from torch import Tensor
from torch.testing import assert_close

from vitprune.departure import Departure, Teaching, depart
from vitprune.layout import HALF_PRECISION_ROWS
from vitprune.tokens import NOBODY, TokenBatch

EXACT = Tolerance(rtol=0.0, atol=0.0)
# sums of a dozen float32 numbers, in another order
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-6)

IMAGES, TOKENS, PREFIX, WIDTH = 4, 14, 2, 3
# no fillers, few, and more than tokens
every_alignment = pytest.mark.parametrize("alignment", [1, 4, 16])
every_kind = pytest.mark.parametrize("dropped", ["leave", "merge"])


@pytest.fixture(autouse=True, params=["loops", "operators"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "operators":
        tiny.in_operators(monkeypatch)


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


def reference_stage(tokens: list[Token], keep: list[bool], takers: list[int], dropped: str):
    """One image, one stage. takers: indices into `tokens`."""
    left = [i for i, stays in enumerate(keep) if not stays]
    kept = [Token(t.position, t.state, list(t.stands_for)) for t, stays in zip(tokens, keep, strict=True) if stays]
    if dropped == "merge":
        new_index = {old: new for new, old in enumerate(i for i, stays in enumerate(keep) if stays)}
        for old, new in new_index.items():
            group = [tokens[old], *(tokens[i] for i in left if takers[i] == old)]
            kept[new].state = mean(group, [t.size for t in group])
            kept[new].stands_for = [patch for t in group for patch in t.stands_for]
    return kept


def random_stage(images: list[list[Token]], stage: int) -> tuple[list[list[bool]], list[list[int]]]:
    """About a third leaves; image 0 loses nothing at the first stage, image 1 all but one patch at the second."""
    keeps, takers = [], []
    for number, tokens in enumerate(images):
        keep = [i < PREFIX or bool(torch.rand(()) > 0.35) for i in range(len(tokens))]
        if (number, stage) == (0, 0):
            keep = [True] * len(tokens)
        if (number, stage) == (1, 1):
            keep = [i < PREFIX or i == PREFIX + 1 for i in range(len(tokens))]
        keep[PREFIX] |= not any(keep[PREFIX:])
        staying = [i for i in range(PREFIX, len(tokens)) if keep[i]]
        takers.append([staying[int(torch.randint(len(staying), ()))] for _ in tokens])
        keeps.append(keep)
    return keeps, takers


def dense() -> tuple[TokenBatch, Tensor, list[list[Token]]]:
    x_BND = torch.randn(IMAGES, TOKENS, WIDTH)
    batch = TokenBatch.dense(IMAGES, TOKENS, PREFIX, x_BND.device)
    return batch, x_BND.flatten(0, 1), [[Token(n, x_BND[b, n], [n]) for n in range(TOKENS)] for b in range(IMAGES)]


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
    dropped: str, stages: int, dtype: torch.dtype = torch.float32
) -> tuple[TokenBatch, Tensor, list[list[Token]]]:
    batch, x_TD, images = dense()
    x_TD = x_TD.to(dtype)
    for stage in range(stages):
        keeps, takers = random_stage(images, stage)
        departure = Departure(padded(keeps), padded(takers) if dropped == "merge" else None)
        batch, x_TD = depart(batch, x_TD, departure)
        decisions = zip(images, keeps, takers, strict=True)
        images = [reference_stage(*decision, dropped) for decision in decisions]
    return batch, x_TD, images


@every_kind
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_departing_is_what_it_is_for_each_image_alone(dropped: str, stages: int) -> None:
    batch, x_TD, images = run_stages(dropped, stages)
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
def test_each_dense_token_knows_who_stands_for_it(dropped: str, stages: int) -> None:
    batch, _, images = run_stages(dropped, stages)
    for image, tokens in enumerate(images):
        expected = [NOBODY] * TOKENS
        for index, token in enumerate(tokens):
            for patch in token.stands_for:
                expected[patch] = index
        assert batch.carriers_BN[image].tolist() == expected
        own = [any(t.position == n for t in tokens) for n in range(PREFIX, TOKENS)]
        assert batch.kept_patches()[image].tolist() == own


@every_kind
@pytest.mark.parametrize("stages", [0, 1, 3])
def test_unpacking_puts_each_token_where_it_stood(dropped: str, stages: int) -> None:
    batch, x_TD, images = run_stages(dropped, stages)
    y_BND = batch.unpack(x_TD)
    for image, tokens in enumerate(images):
        # nobody stands for what left: the mean of the remaining patches does
        expected = torch.stack([t.state for t in tokens[PREFIX:]]).mean(0).repeat(TOKENS, 1)
        for token in tokens:
            expected[token.stands_for] = token.state
        assert_close(y_BND[image], expected, **FLOAT32)


@every_kind
def test_a_mean_over_unpacked_patches_is_the_mean_over_tokens_by_size(dropped: str) -> None:
    batch, x_TD, images = run_stages(dropped, 3)
    means_BD = batch.unpack(x_TD)[:, PREFIX:].mean(1)
    for image, tokens in enumerate(images):
        patches = tokens[PREFIX:]
        weights = [1.0 if dropped == "leave" else float(t.size) for t in patches]
        assert_close(means_BD[image], mean(patches, weights), **FLOAT32)


def test_sizes_add_up_to_the_dense_tokens() -> None:
    batch, _, _ = run_stages("merge", 3)
    assert batch.sizes_T is not None
    for sizes in of_images(batch, batch.sizes_T).split(list(batch.lengths)):
        assert sizes.sum() == TOKENS
        assert (sizes[:PREFIX] == 1).all()


@every_kind
@pytest.mark.parametrize("stages", [0, 1])
def test_where_nothing_leaves_nothing_is_done(dropped: str, stages: int) -> None:
    batch, x_TD, _ = run_stages(dropped, stages)
    takers_BM = torch.zeros_like(batch.valid_BM, dtype=torch.long) if dropped == "merge" else None
    after, y_TD = depart(batch, x_TD, Departure(batch.valid_BM, takers_BM))
    assert after is batch
    assert y_TD is x_TD


@every_kind
def test_states_keep_their_dtype_and_sizes_are_float32(dropped: str) -> None:
    batch, x_TD, _ = dense()
    keep_BM = (torch.arange(TOKENS) < TOKENS - 2).expand(IMAGES, -1)
    takers_BM = torch.full((IMAGES, TOKENS), PREFIX) if dropped == "merge" else None
    pruned, y_TD = depart(batch, x_TD.bfloat16(), Departure(keep_BM, takers_BM))
    assert y_TD.dtype == pruned.unpack(y_TD).dtype == torch.bfloat16
    assert pruned.sizes_T is None or pruned.sizes_T.dtype == torch.float32


@every_alignment
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_token_is_a_copy_of_its_images_first(
    dtype: torch.dtype, dropped: str, alignment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitprune.layout.KEY_ALIGNMENT", alignment)
    monkeypatch.setattr("vitprune.layout.HALF_PRECISION_PADDING", HALF_PRECISION_ROWS)
    batch, x_TD, _ = run_stages(dropped, 3, dtype)
    is_filler = torch.ones(len(x_TD), dtype=torch.bool)
    for start, length in zip(batch.layout.starts, batch.lengths, strict=True):
        assert start % alignment == 0
        is_filler[start : start + length] = False
    assert len(x_TD) == len(batch.positions_T) == sum(batch.layout.rows) + batch.layout.padding
    assert len(x_TD) % (HALF_PRECISION_ROWS if dtype == torch.bfloat16 else alignment) == 0
    assert (batch.positions_T[is_filler] == NOBODY).all()
    assert (batch.key_bias_T[is_filler] == -torch.inf).all()
    assert batch.key_bias_T[~is_filler].isfinite().all()
    first = batch.starts_B.index_select(0, batch.layout.images(x_TD.device))
    assert_close(x_TD[is_filler], x_TD[first[is_filler]], **EXACT)


@every_alignment
@every_kind
def test_an_image_that_is_not_finite_stays_alone(dropped: str, alignment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitprune.layout.KEY_ALIGNMENT", alignment)
    batch, x_TD, images = dense()
    x_TD[TOKENS : 2 * TOKENS] = torch.nan
    keeps, takers = random_stage(images, 0)
    departure = Departure(padded(keeps), padded(takers) if dropped == "merge" else None)
    batch, y_TD = depart(batch, x_TD, departure)
    assert torch.equal(y_TD.isnan().all(1), batch.layout.images(x_TD.device) == 1)
    assert torch.equal(batch.unpack(y_TD).isnan().flatten(1).any(1), torch.arange(IMAGES) == 1)


def teach(batch: TokenBatch, x_TD: Tensor, dropped: str) -> tuple[TokenBatch, Tensor]:
    """Of each image's patches the 2nd, 5th, … leave near the threshold, the 3rd, 6th, … far from it."""
    slots = torch.arange(batch.valid_BM.shape[1]).expand_as(batch.valid_BM)
    patches = batch.valid_BM & (slots >= PREFIX)
    leaves_near, leaves_far = (patches & ((slots - PREFIX) % 3 == rest) for rest in (1, 2))
    keep = batch.valid_BM & ~leaves_near & ~leaves_far
    mask = keep.float().requires_grad_()
    takers = torch.full_like(slots, PREFIX) if dropped == "merge" else None
    return depart(batch, x_TD, Departure(keep, takers, Teaching(mask, leaves_near)))


@every_kind
def test_what_stays_is_what_inference_keeps(dropped: str) -> None:
    batch, x_TD, _ = dense()
    taught, taught_TD = teach(batch, x_TD, dropped)
    slots = torch.arange(TOKENS).expand(IMAGES, -1)
    keep = (slots < PREFIX) | ((slots - PREFIX) % 3 == 0)
    takers = torch.full_like(slots, PREFIX) if dropped == "merge" else None
    inferred, inferred_TD = depart(batch, x_TD, Departure(keep, takers))
    assert_close(of_images(taught, taught_TD), of_images(inferred, inferred_TD), **FLOAT32)
    assert_close(taught.unpack(taught_TD), inferred.unpack(inferred_TD), **FLOAT32)


def test_giving_away_has_the_gradient_of_the_amount() -> None:
    """One token of size 1 is merged into another: x' = x_j + a(x_i - x_j)/(1 + a), at a = 1."""
    batch = TokenBatch.dense(1, 3, 1, torch.device("cpu"))
    x_TD = torch.randn(3, WIDTH)
    mask = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)
    departure = Departure(
        torch.tensor([[True, True, False]]),
        takers_BM=torch.tensor([[0, 0, 1]]),
        teaching=Teaching(mask, torch.tensor([[False, False, True]])),
    )
    merged, y_TD = depart(batch, x_TD, departure)
    (gradient,) = torch.autograd.grad(y_TD[merged.layout.starts[0] + 1].sum(), mask)
    # of m = 1 - a
    assert_close(gradient[0, 2], -(x_TD[2] - x_TD[1]).sum() / 4, **FLOAT32)
