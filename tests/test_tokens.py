"""Packed tokens against lists of tokens, one Python list an image."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tiny import Tolerance
from torch import Tensor
from torch.testing import assert_close

from vitprune.tokens import NOBODY, Departure, TokenBatch, depart, pad_rows

EXACT = Tolerance(rtol=0.0, atol=0.0)
# sums of a dozen float32 numbers, in another order
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-6)

IMAGES, TOKENS, PREFIX, WIDTH = 4, 14, 2, 3
every_kind = pytest.mark.parametrize("dropped", ["leave", "merge", "fuse"])


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


def reference_stage(tokens: list[Token], keep: list[bool], takers: list[int], weights: list[float], dropped: str):
    """One image, one stage. takers: indices into `tokens`."""
    left = [i for i, stays in enumerate(keep) if not stays]
    kept = [Token(t.position, t.state, list(t.stands_for)) for t, stays in zip(tokens, keep, strict=True) if stays]
    if dropped == "merge":
        new_index = {old: new for new, old in enumerate(i for i, stays in enumerate(keep) if stays)}
        for old, new in new_index.items():
            group = [tokens[old], *(tokens[i] for i in left if takers[i] == old)]
            kept[new].state = mean(group, [t.size for t in group])
            kept[new].stands_for = [patch for t in group for patch in t.stands_for]
    if dropped == "fuse" and left:
        state = mean([tokens[i] for i in left], [weights[i] for i in left])
        kept.append(Token(NOBODY, state, [patch for i in left for patch in tokens[i].stands_for]))
    return kept


def random_stage(images: list[list[Token]], stage: int) -> tuple[list[list[bool]], list[list[int]], list[list[float]]]:
    """About a third leaves; image 0 loses nothing at the first stage, image 1 all but one patch at the second."""
    keeps, takers, weights = [], [], []
    for number, tokens in enumerate(images):
        keep = [i < PREFIX or bool(torch.rand(()) > 0.35) for i in range(len(tokens))]
        if (number, stage) == (0, 0):
            keep = [True] * len(tokens)
        if (number, stage) == (1, 1):
            keep = [i < PREFIX or i == PREFIX + 1 for i in range(len(tokens))]
        keep[PREFIX] |= not any(keep[PREFIX:])
        staying = [i for i in range(PREFIX, len(tokens)) if keep[i]]
        takers.append([staying[int(torch.randint(len(staying), ()))] for _ in tokens])
        weights.append([float(torch.rand(())) + 0.1 for _ in tokens])
        keeps.append(keep)
    return keeps, takers, weights


def dense() -> tuple[TokenBatch, Tensor, list[list[Token]]]:
    x_BND = torch.randn(IMAGES, TOKENS, WIDTH)
    batch = TokenBatch.dense(IMAGES, TOKENS, PREFIX, x_BND.device)
    return batch, x_BND.flatten(0, 1), [[Token(n, x_BND[b, n], [n]) for n in range(TOKENS)] for b in range(IMAGES)]


def flat(lists: list[list]) -> Tensor:
    return torch.tensor([value for values in lists for value in values])


def run_stages(dropped: str, stages: int) -> tuple[TokenBatch, Tensor, list[list[Token]]]:
    batch, x_TD, images = dense()
    for stage in range(stages):
        keeps, takers, weights = random_stage(images, stage)
        packed_takers = [
            [start + i for i in image] for start, image in zip(batch.starts_B.tolist(), takers, strict=True)
        ]
        departure = Departure(
            flat(keeps),
            takers_T=flat(packed_takers) if dropped == "merge" else None,
            fuse_weights_T=flat(weights) if dropped == "fuse" else None,
        )
        batch, x_TD = depart(batch, x_TD, departure)
        decisions = zip(images, keeps, takers, weights, strict=True)
        images = [reference_stage(*decision, dropped) for decision in decisions]
    return batch, x_TD, images


@every_kind
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_departing_is_what_it_is_for_each_image_alone(dropped: str, stages: int) -> None:
    batch, x_TD, images = run_stages(dropped, stages)
    assert batch.lengths == tuple(len(tokens) for tokens in images)
    assert batch.num_prefix_tokens == PREFIX
    assert torch.equal(batch.positions_T, flat([[t.position for t in tokens] for tokens in images]))
    assert_close(x_TD, torch.stack([t.state for tokens in images for t in tokens]), **FLOAT32)
    if dropped == "leave":
        assert batch.sizes_T is None
    else:
        assert batch.sizes_T is not None
        assert_close(batch.sizes_T, flat([[float(t.size) for t in tokens] for tokens in images]), **EXACT)


@every_kind
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_each_dense_token_knows_who_stands_for_it(dropped: str, stages: int) -> None:
    batch, _, images = run_stages(dropped, stages)
    start = 0
    for image, tokens in enumerate(images):
        expected = [NOBODY] * TOKENS
        for index, token in enumerate(tokens):
            for patch in token.stands_for:
                expected[patch] = start + index
        assert batch.carriers_BN[image].tolist() == expected
        own = [any(t.position == n for t in tokens) for n in range(PREFIX, TOKENS)]
        assert batch.kept_patches(TOKENS)[image].tolist() == own
        start += len(tokens)


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


@pytest.mark.parametrize("dropped", ["merge", "fuse"])
def test_sizes_add_up_to_the_dense_tokens(dropped: str) -> None:
    batch, _, _ = run_stages(dropped, 3)
    assert batch.sizes_T is not None
    for sizes in batch.sizes_T.split(list(batch.lengths)):
        assert sizes.sum() == TOKENS
        assert (sizes[:PREFIX] == 1).all()


def test_fusing_nothing_adds_nothing() -> None:
    batch, x_TD, _ = dense()
    everything = torch.ones(len(x_TD), dtype=torch.bool)
    fused, y_TD = depart(batch, x_TD, Departure(everything, fuse_weights_T=torch.ones(len(x_TD))))
    assert fused.lengths == batch.lengths
    assert_close(y_TD, x_TD, **EXACT)


def test_fusing_tokens_without_weight_gives_their_mean() -> None:
    batch = TokenBatch.dense(1, 5, 1, torch.device("cpu"))
    x_TD = torch.randn(5, WIDTH)
    keep_T = torch.tensor([True, True, False, False, False])
    _, y_TD = depart(batch, x_TD, Departure(keep_T, fuse_weights_T=torch.zeros(5)))
    assert_close(y_TD[-1], x_TD[2:].mean(0), **FLOAT32)


@every_kind
def test_states_keep_their_dtype_and_sizes_are_float32(dropped: str) -> None:
    batch, x_TD, _ = dense()
    keep_T = torch.arange(len(x_TD)) % TOKENS < TOKENS - 2
    takers_T = torch.arange(len(x_TD)) // TOKENS * TOKENS + PREFIX if dropped == "merge" else None
    weights_T = torch.rand(len(x_TD)) if dropped == "fuse" else None
    pruned, y_TD = depart(batch, x_TD.bfloat16(), Departure(keep_T, takers_T, weights_T))
    assert y_TD.dtype == pruned.unpack(y_TD).dtype == torch.bfloat16
    assert pruned.sizes_T is None or pruned.sizes_T.dtype == torch.float32


@pytest.mark.parametrize("lengths", [(4, 4, 4), (5, 2, 7), (3,)])
def test_padding_and_flattening_undo_each_other(lengths: tuple[int, ...]) -> None:
    total, longest = sum(lengths), max(lengths)
    batch = TokenBatch(lengths, 1, torch.zeros(total), None, torch.zeros(len(lengths), 1))
    values_TD = torch.randn(total, WIDTH)
    padded = batch.pad(values_TD)
    assert padded.shape == (len(lengths), longest, WIDTH)
    assert_close(batch.flatten(padded), values_TD, **EXACT)
    for image, tokens in enumerate(values_TD.split(lengths)):
        assert batch.valid_BM[image].tolist() == [i < len(tokens) for i in range(longest)]
        for i in range(longest):
            # padding repeats the image's last token, so that it holds nothing of another image
            assert_close(padded[image, i], tokens[min(i, len(tokens) - 1)], **EXACT)
            if i < len(tokens):
                assert batch.images_T[batch.starts_B[image] + i] == image


@pytest.mark.parametrize(("rows", "padding"), [(13, 3), (16, 0), (17, 7)])
def test_empty_rows_fill_up_to_a_multiple(rows: int, padding: int) -> None:
    batch, x_TD = TokenBatch.dense(1, rows, 1, torch.device("cpu")), torch.randn(rows, WIDTH)
    padded, y_TD = pad_rows(batch, x_TD, 8)
    assert padded.lengths == batch.lengths
    assert padded.padding == padding
    assert_close(y_TD, torch.cat([x_TD, torch.zeros(padding, WIDTH)]), **EXACT)
