"""What a stage decides from what a block found, for every way to select."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import Tolerance
from torch import Tensor
from torch.testing import assert_close

from vitprune.pruning.costs import CostModel
from vitprune.pruning.kernels import cpu
from vitprune.pruning.learning.masked import KeptTokens
from vitprune.pruning.learning.soft_mask import with_all_destinations
from vitprune.pruning.packed.reduction import reduce_tokens
from vitprune.pruning.scores import Redundancy, TokenStats, true_indices
from vitprune.pruning.selection import Decision, Policy, decide
from vitprune.pruning.token_batch import TokenBatch
from vitprune.recipe.schema import PruningSpec

EXACT = Tolerance(rtol=0.0, atol=0.0)
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-7)

AS_VIT: dict[str, Any] = {"score": "head-weighted-class-attention", "before_blocks": [2]}
MEAN: dict[str, Any] = {**AS_VIT, "score": "head-weighted-mean-attention"}
PREFIX, M, K = 1, 9, 4
# the second image has lost three patches before
VALID_BN = torch.tensor([[True] * 9, [True, False, True, True, False, True, True, False, True]])
VALID = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])
COST = CostModel(linear=(100, 100, 100), width=8, head_width=4, patch=1, head=1)


def policy(level: float = 0.5, *, has_class_token: bool = True, **spec: Any) -> Policy:
    spec = {"before_blocks": [2], **spec}
    levels, temperatures = torch.tensor([level]), torch.tensor([1e-4])
    return Policy(PruningSpec(**spec), (2,), PREFIX, has_class_token, COST, levels, temperatures)


Tokens = TokenBatch | KeptTokens


@pytest.fixture(params=["in loops", "in operators", "in a masked pass"])
def tokens(request: pytest.FixtureRequest) -> Tokens:
    return masked_tokens() if request.param == "in a masked pass" else packed_tokens(loops=request.param == "in loops")


@pytest.fixture(params=["in operators", "in a masked pass"])
def learning_tokens(request: pytest.FixtureRequest) -> Tokens:
    """Where a gradient flows, there are no loops."""
    return masked_tokens() if request.param == "in a masked pass" else packed_tokens()


def masked_tokens() -> KeptTokens:
    index_BM = true_indices(VALID_BN)
    rows_BM = index_BM + torch.tensor([[0], [M]])
    return KeptTokens(VALID_BN.gather(1, index_BM), index_BM, rows_BM, M - PREFIX, PREFIX)


def packed_tokens(*, loops: bool = False) -> TokenBatch:
    dense = TokenBatch.dense(2, M, PREFIX, VALID.device, cpu if loops else None)
    return reduce_tokens(dense, torch.zeros(2 * M, 1), Decision(VALID_BN))[0]


def findings(tokens: Tokens) -> TokenStats:
    # all of 0.1 … 0.9 in two orders: some patches of either image are above 0.5 and some are not
    scores = torch.stack([torch.arange(M) * 4 % 9 + 1, torch.arange(M) * 7 % 9 + 1]) / 10
    if tokens.layout is None:  # nobody sees them, but they have their scores
        return TokenStats(scores, torch.nn.functional.normalize(torch.randn(2 * M, K), dim=-1))
    metric_TK = torch.nn.functional.normalize(torch.randn(tokens.layout.num_rows, K), dim=-1)
    metric_TK[torch.from_numpy(tokens.layout.fillers)] = torch.nan
    return TokenStats(torch.where(VALID, scores, 0.0), metric_TK)


def found_by(tokens: Tokens, found: TokenStats) -> tuple[Tensor, Tensor]:
    """Scores (B, M) and the metric (B, M, K)."""
    assert found.attention_BM is not None
    assert found.metric_TK is not None
    return found.attention_BM, found.metric_TK[tokens.index_BM]


def ask(policy: Policy, found: TokenStats, tokens: Tokens, *, learns: bool = False) -> Decision:
    decision = decide(policy, 0, found, tokens)
    # a masked pass always learns
    return with_all_destinations(decision, tokens) if learns or tokens.layout is None else decision


def scores_of(decision: Decision) -> Tensor:
    assert decision.scores_BM is not None
    return decision.scores_BM


def kept(decision: Decision) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in decision.keep_BM]


# needs: whose attention, metric
@pytest.mark.parametrize(
    ("spec", "row", "metric"),
    [
        ({**AS_VIT, "dropped": "leave"}, "class", False),
        ({**AS_VIT, "dropped": "merge"}, "class", True),
        ({**AS_VIT, "select": "top-k", "dropped": "merge"}, "class", True),
        ({**AS_VIT, "select": "random", "dropped": "leave"}, None, False),
        ({**MEAN, "dropped": "leave"}, "mean", False),
        ({**MEAN, "dropped": "merge"}, "mean", True),
        ({**MEAN, "select": "random", "dropped": "leave"}, None, False),
        ({"select": "random", "dropped": "merge"}, None, True),
        ({"dropped": "merge"}, "class", True),
        ({"dropped": "leave"}, "class", True),
        # who is more important is a matter of attention
        ({"redundancy_exponent": 0.0}, "class", True),
        ({"select": "top-k"}, "class", True),
        ({"select": "tome"}, None, True),
    ],
    ids=str,
)
def test_a_policy_asks_a_block_for_what_it_needs_only(spec: dict[str, Any], row: str | None, metric: bool) -> None:
    ours = policy(**spec)
    assert (ours.row, ours.compares_keys) == (row, metric)


@pytest.mark.parametrize(
    ("spec", "attention"),
    [({}, "mean"), (MEAN, "mean"), ({"select": "tome"}, None)],
    ids=str,
)
def test_without_a_class_token_the_mean_query_is_asked(spec: dict[str, Any], attention: str | None) -> None:
    assert policy(**spec, has_class_token=False).row == attention


def test_a_threshold_keeps_what_is_above_and_prefix_and_no_padding(tokens: Tokens) -> None:
    found = findings(tokens)
    decision = ask(policy(**AS_VIT, dropped="leave"), found, tokens)
    scores = found.attention_BM
    assert scores is not None
    for b in range(2):
        patches = [i for i in range(PREFIX, M) if VALID[b, i] and scores[b, i] > 0.5]
        assert kept(decision)[b] == [0, *patches]
    assert decision.dst_BM is None
    if tokens.kernels is None:  # kernels know by themselves
        assert (scores_of(decision)[:, 0] == math.inf).all()
        assert (scores_of(decision)[~VALID] == -math.inf).all()


@pytest.mark.parametrize("min_tokens", [1, 3])
def test_so_many_of_the_best_patches_always_stay(min_tokens: int, tokens: Tokens) -> None:
    found = findings(tokens)
    decision = ask(policy(level=9.0, **AS_VIT, dropped="leave", min_tokens=min_tokens), found, tokens)
    assert found.attention_BM is not None
    for b, row in enumerate(found.attention_BM.tolist()):
        patches = [i for i in range(PREFIX, M) if VALID[b, i]]
        best = sorted(patches, key=lambda i: -row[i])[:min_tokens]
        assert kept(decision)[b] == [0, *sorted(best)]


@pytest.mark.parametrize("select", ["top-k", "random"])
def test_counts_are_a_part_of_each_images_patches(select: str, tokens: Tokens) -> None:
    decision = ask(policy(level=0.6, **AS_VIT, select=select, dropped="leave"), findings(tokens), tokens)
    # round(0.6·8), round(0.6·5), and the prefix
    assert [len(row) for row in kept(decision)] == [5 + 1, 3 + 1]


def test_top_k_keeps_the_best(tokens: Tokens) -> None:
    found = findings(tokens)
    decision = ask(policy(level=0.6, **AS_VIT, select="top-k", dropped="leave"), found, tokens)
    assert found.attention_BM is not None
    for b, (patches, count) in enumerate([(8, 5), (5, 3)]):
        row = found.attention_BM[b].tolist()
        assert kept(decision)[b] == [0, *sorted(sorted(range(1, patches + 1), key=lambda i: -row[i])[:count])]


def test_a_random_choice_goes_by_position_and_needs_no_findings(tokens: Tokens) -> None:
    ours = policy(**AS_VIT, select="random", dropped="leave")
    together = ask(ours, TokenStats(), tokens)
    of_second = KeptTokens(VALID[1:, :6], tokens.positions_BM[1:, :6], tokens.index_BM[1:, :6], M - PREFIX, PREFIX)
    assert kept(together)[1] == kept(decide(ours, 0, TokenStats(), of_second, ()))[0]


# --- redundancy ---


def delta(importance: list[float], metric_MK: Tensor, patches: list[int], i: int) -> Tensor:
    """1 − the largest cosine of one patch to those that are more important."""
    others = [j for j in patches if importance[j] > importance[i] or (importance[j] == importance[i] and j < i)]
    if not others:
        return torch.tensor(math.inf)
    return torch.stack([1 - (metric_MK[i] * metric_MK[j]).sum() for j in others]).min()


def redundancy(scores_M: Tensor, metric_MK: Tensor, patches: list[int], exponent: float) -> list[Tensor]:
    """δ(i)·(n·S(i))^α of one image, with gradient, where n = 8 patches are those of the dense image."""
    deltas = [delta(scores_M.tolist(), metric_MK, patches, i) for i in patches]
    weights = [(8 * scores_M[i]) ** exponent for i in patches]
    return [d if d == math.inf else d * w for d, w in zip(deltas, weights, strict=True)]


def patches_of(image: int) -> list[int]:
    return [i for i in range(PREFIX, M) if VALID[image, i]]


def most_similar_one(metric_MK: Tensor, i: int, stay: list[int]) -> int:
    return max((j for j in stay if j != i), key=lambda j: float(metric_MK[i] @ metric_MK[j]))


@pytest.mark.parametrize("dropped", ["leave", "merge"])
@pytest.mark.parametrize(("exponent", "level"), [(0.0, 0.3), (0.5, 0.5), (1.0, 1.5)])
def test_patches_that_resemble_more_important_ones_leave(
    exponent: float, level: float, dropped: str, tokens: Tokens
) -> None:
    found = findings(tokens)
    scores_BM, metric_BMK = found_by(tokens, found)
    decision = ask(policy(level, redundancy_exponent=exponent, dropped=dropped), found, tokens)
    for b in range(2):
        patches = patches_of(b)
        expected = redundancy(scores_BM[b], metric_BMK[b], patches, exponent)
        assert_close(scores_of(decision)[b, patches], torch.stack(expected), **FLOAT32)
        stay = [i for i, r in zip(patches, expected, strict=True) if r > level]
        assert kept(decision)[b] == [0, *stay]
        assert 1 < len(stay) < len(patches), "nothing leaves or nothing stays: this test would see little"
        if decision.dst_BM is not None:
            dst = {i: int(decision.dst_BM[b, i]) for i in patches if i not in stay}
            assert dst == {i: most_similar_one(metric_BMK[b], i, stay) for i in dst}
    assert (scores_of(decision)[:, 0] == math.inf).all()
    assert (scores_of(decision)[~VALID] == -math.inf).all()


def test_destinations_are_found_later_only_in_operators(tokens: Tokens) -> None:
    found = findings(tokens)
    decision = ask(policy(dropped="merge"), found, tokens)
    in_operators = isinstance(tokens, TokenBatch) and tokens.kernels is None
    assert (decision.dst_BM is None) == in_operators
    assert (decision.metric_TK is None) != in_operators
    if in_operators:
        assert found.metric_TK is not None
        assert_close(decision.metric_TK, found.metric_TK, rtol=0.0, atol=0.0, equal_nan=True)
    leaves = ask(policy(dropped="leave"), found, tokens)
    assert (leaves.dst_BM, leaves.metric_TK) == (None, None)


def test_the_most_important_patch_alone_stays_whatever_its_score(tokens: Tokens) -> None:
    found = findings(tokens)
    scores_BM, _ = found_by(tokens, found)
    decision = ask(policy(level=1e9), found, tokens)
    for b in range(2):
        assert kept(decision)[b] == [0, max(patches_of(b), key=lambda i: float(scores_BM[b, i]))]


def test_of_equally_important_patches_the_first_one_stays(tokens: Tokens) -> None:
    found = findings(tokens)
    assert found.attention_BM is not None
    found.attention_BM.copy_(torch.where(VALID, 0.5, 0.0))
    assert kept(ask(policy(level=1e9), found, tokens)) == [[0, 1], [0, 1]]


@pytest.mark.parametrize("level", [0.3, 0.6])
def test_top_k_keeps_the_least_redundant(level: float, tokens: Tokens) -> None:
    found = findings(tokens)
    scores_BM, metric_BMK = found_by(tokens, found)
    decision = ask(policy(level, select="top-k"), found, tokens)
    for b in range(2):
        patches = patches_of(b)
        r = dict(zip(patches, redundancy(scores_BM[b], metric_BMK[b], patches, 0.5), strict=True))
        best = sorted(patches, key=lambda i: -float(r[i]))[: round(level * len(patches))]
        assert kept(decision)[b] == [0, *sorted(best)]


def test_redundancy_has_no_gradient(learning_tokens: Tokens) -> None:
    found = findings(learning_tokens)
    assert found.attention_BM is not None
    assert found.metric_TK is not None
    found.attention_BM.requires_grad_()
    found.metric_TK.requires_grad_()
    assert not scores_of(ask(policy(), found, learning_tokens, learns=True)).requires_grad


@pytest.mark.parametrize("spoiled", ["scores", "metric", "both"])
def test_an_image_that_is_no_number_loses_nothing_and_spoils_no_other(spoiled: str, tokens: Tokens) -> None:
    found = findings(tokens)
    assert found.attention_BM is not None
    assert found.metric_TK is not None
    expected = ask(policy(), found, tokens)
    if spoiled != "metric":
        found.attention_BM[1, VALID[1]] = torch.nan
    if spoiled != "scores":
        found.metric_TK[tokens.index_BM[1]] = torch.nan
    ours = ask(policy(), found, tokens)
    assert kept(ours)[0] == kept(expected)[0]
    assert torch.equal(ours.keep_BM[1], VALID[1])


# --- ToMe ---


def test_tome_drops_the_most_similar_candidates_into_their_anchors(tokens: Tokens) -> None:
    found = findings(tokens)
    decision = ask(policy(select="tome"), found, tokens)
    _, metric_BMK = found_by(tokens, found)
    assert decision.dst_BM is not None
    for b in range(2):
        patches = patches_of(b)
        anchors, candidates = patches[::2], patches[1::2]
        nearest = {i: most_similar_one(metric_BMK[b], i, anchors) for i in candidates}
        r = {i: 1 - float(metric_BMK[b, i] @ metric_BMK[b, nearest[i]]) for i in candidates}
        leave = sorted(candidates, key=lambda i: r[i])[: len(patches) - round(0.5 * len(patches))]
        assert kept(decision)[b] == [0, *(i for i in patches if i not in leave)]
        assert leave, "nothing leaves: this test would see nothing"
        assert [int(decision.dst_BM[b, i]) for i in leave] == [nearest[i] for i in leave]


def test_counts_never_reach_the_anchors(tokens: Tokens) -> None:
    decision = ask(policy(level=0.1, select="tome"), findings(tokens), tokens)
    assert kept(decision) == [[0, 1, 3, 5, 7], [0, 1, 3, 5]]


@pytest.mark.parametrize("way", ["in loops", "learning", "masked"])
def test_merging_goes_to_the_most_similar_kept_patch(way: str) -> None:
    tokens = masked_tokens() if way == "masked" else packed_tokens(loops=way == "in loops")
    found, learns = findings(tokens), way != "in loops"
    decision = ask(policy(**AS_VIT, dropped="merge"), found, tokens, learns=learns)
    _, metric_BMK = found_by(tokens, found)
    assert decision.dst_BM is not None
    for b in range(2):
        stay = [i for i in kept(decision)[b] if i >= PREFIX]
        for i in patches_of(b):
            if learns or i not in stay:
                # never into the class token; what stays is asked where it would go
                assert decision.dst_BM[b, i] == most_similar_one(metric_BMK[b], i, stay)


# --- images of other sizes ---


def test_a_score_of_attention_counts_by_the_patches_it_is_spread_over(tokens: Tokens) -> None:
    found = findings(tokens)
    expected = scores_of(ask(policy(**AS_VIT, dropped="leave"), found, tokens))
    # of half as many patches each would have seen twice as much
    ours = ask(policy(**AS_VIT, dropped="leave", patches=4), found, tokens)
    assert_close(scores_of(ours), 2 * expected, **EXACT)
    assert kept(ours) == kept(ask(policy(0.25, **AS_VIT, dropped="leave"), found, tokens))
    as_found = ask(policy(**AS_VIT, dropped="leave", patches=M - PREFIX), found, tokens)
    assert_close(scores_of(as_found), expected, **EXACT)


def test_images_of_different_sizes_are_each_judged_by_their_own(tokens: Tokens) -> None:
    of_many_sizes = replace(tokens, num_patches=torch.tensor([[8], [2]]))
    found = findings(tokens)
    expected = scores_of(ask(policy(**AS_VIT, dropped="leave"), found, tokens))
    ours = scores_of(ask(policy(**AS_VIT, dropped="leave", patches=4), found, of_many_sizes))
    assert_close(ours, expected * torch.tensor([[2.0], [0.5]]), **EXACT)
    # n·S is what redundancy is weighed by
    plain = scores_of(ask(policy(redundancy_exponent=1.0), found, tokens))
    weighed = scores_of(ask(policy(redundancy_exponent=1.0), found, of_many_sizes))
    assert_close(weighed, plain * torch.tensor([[1.0], [0.25]]), **FLOAT32)


def test_redundancy_grows_with_the_patches_that_lie_between(tokens: Tokens) -> None:
    found = findings(tokens)
    expected = scores_of(ask(policy(), found, tokens))
    ours = scores_of(ask(policy(patches=4), found, tokens))
    assert_close(ours, expected * 2**Redundancy.size_power, **FLOAT32)
    assert_close(scores_of(ask(policy(patches=M - PREFIX), found, tokens)), expected, **EXACT)


@pytest.mark.parametrize("spec", [{"select": "tome"}, {**AS_VIT, "select": "random"}], ids=str)
def test_other_scores_say_the_same_of_images_of_any_size(spec: dict[str, Any], tokens: Tokens) -> None:
    found = findings(tokens)
    ours, expected = (ask(policy(**s), found, tokens).scores_BM for s in ({**spec, "patches": 4}, spec))
    assert_close(ours, expected, **EXACT)


@pytest.mark.parametrize(
    ("level", "spec", "expected"),
    [
        (-math.inf, {}, True),
        (-1e-6, AS_VIT, True),
        (0.0, {}, False),
        (1.0, {"select": "tome"}, True),
        (1.0, {"select": "random"}, True),
        (0.99, {**AS_VIT, "select": "top-k"}, False),
    ],
    ids=str,
)
def test_a_stage_that_keeps_everything_is_known_beforehand(
    level: float, spec: dict[str, Any], expected: bool, tokens: Tokens
) -> None:
    ours = policy(level=level, **spec)
    assert ours.keeps_all(level) == expected
    if expected:
        assert torch.equal(ask(ours, findings(tokens), tokens).keep_BM, VALID)


class Overrule:
    """An observer that sets a level of its own."""

    def __init__(self, level: float) -> None:
        self.own = torch.tensor(level)
        self.seen: list[float] = []

    def level(self, stage: int, scores_BM: Tensor, valid_BM: Tensor, current: Tensor) -> Tensor:
        self.seen.append(current.item())
        return self.own


def test_observers_are_asked_in_turn_and_the_last_one_has_the_say(tokens: Tokens) -> None:
    observers = (Overrule(-1.0), Overrule(9.0))
    decision = decide(policy(**AS_VIT, dropped="leave"), 0, findings(tokens), tokens, observers)
    assert [o.seen for o in observers] == [[0.5], [-1.0]]
    assert decision.level == 9.0
    assert [len(row) for row in kept(decision)] == [2, 2]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        # 9 tokens of width 8, head width 4; 8 patches, of which 5 stay
        ({**AS_VIT, "dropped": "leave"}, 8 * 9),
        ({**AS_VIT, "dropped": "merge"}, 8 * 9 + 4 * 3 * 5),
        ({**MEAN, "dropped": "leave"}, 8 * 9),
        ({"select": "random", "dropped": "leave"}, 0),
        ({"select": "random", "dropped": "merge"}, 4 * 3 * 5),
        ({"dropped": "merge"}, 8 * 9 + 4 * 8 * 8 + 4 * 3 * 5),
        ({"dropped": "leave"}, 8 * 9 + 4 * 8 * 8),
        ({"select": "top-k", "dropped": "leave"}, 8 * 9 + 4 * 8 * 8),
        ({"select": "tome"}, 4 * 4 * 4),
    ],
    ids=str,
)
def test_a_stage_costs_what_it_compares(spec: dict[str, Any], expected: int) -> None:
    macs = policy(**spec).stage_macs(torch.tensor([9.0]).double(), torch.tensor([6.0]).double())
    assert_close(macs, torch.tensor([float(expected)]).double(), **FLOAT32)
