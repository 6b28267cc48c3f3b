"""What a stage decides from what a block found, for every way to select."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
from tiny import Tolerance
from torch import Tensor
from torch.testing import assert_close

from vitprune.attention import Findings
from vitprune.cost import CostModel
from vitprune.departure import Departure, depart
from vitprune.recipe import PruningSpec
from vitprune.stage import Decision, Policy, SeenTokens, decide, stage_macs
from vitprune.tokens import TokenBatch

EXACT = Tolerance(rtol=0.0, atol=0.0)
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-7)

AS_VIT: dict[str, Any] = {"score": "head-weighted-class-attention", "before_blocks": [2]}
MEAN: dict[str, Any] = {**AS_VIT, "score": "head-weighted-mean-attention"}
PREFIX, M, K = 1, 9, 4
# the second image has lost three patches before
VALID = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])
COST = CostModel(linear=(100, 100, 100), width=8, head_width=4, patch=1, head=1)


def policy(level: float = 0.5, *, has_class_token: bool = True, **spec: Any) -> Policy:
    spec = {"before_blocks": [2], **spec}
    levels, temperatures = torch.tensor([level]), torch.tensor([1e-4])
    return Policy(PruningSpec(**spec), (2,), PREFIX, has_class_token, COST, levels, temperatures)


def findings() -> Findings:
    # all of 0.1 … 0.9 in two orders: some patches of either image are above 0.5 and some are not
    scores = torch.stack([torch.arange(M) * 4 % 9 + 1, torch.arange(M) * 7 % 9 + 1]) / 10
    return Findings(scores, torch.nn.functional.normalize(torch.randn(2, M, K), dim=-1))


@pytest.fixture(autouse=True, params=["in loops", "in operators"])
def _ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in operators":
        tiny.in_operators(monkeypatch)


def tokens() -> TokenBatch:
    dense = TokenBatch.dense(2, M, PREFIX, VALID.device)
    keep_BM = torch.ones_like(VALID)
    keep_BM[1, [1, 4, 7]] = False
    return depart(dense, torch.zeros(2 * M, 1), Departure(keep_BM))[0]


def ask(policy: Policy, found: Findings, **options: Any) -> Decision:
    return decide(policy, 0, found, tokens(), (), **options)


def kept(decision: Decision) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in decision.keep_BM]


# needs: whose attention, metric
@pytest.mark.parametrize(
    ("spec", "redundancy", "attention", "metric"),
    [
        ({**AS_VIT, "dropped": "leave"}, False, "class", False),
        ({**AS_VIT, "dropped": "merge"}, False, "class", True),
        ({**AS_VIT, "select": "top-k", "dropped": "merge"}, False, "class", True),
        ({**AS_VIT, "select": "random", "dropped": "leave"}, False, None, False),
        ({**MEAN, "dropped": "leave"}, False, "mean", False),
        ({**MEAN, "dropped": "merge"}, False, "mean", True),
        ({**MEAN, "select": "random", "dropped": "leave"}, False, None, False),
        ({"select": "random", "dropped": "merge"}, False, None, True),
        ({"dropped": "merge"}, True, "class", True),
        ({"dropped": "leave"}, True, "class", True),
        ({"redundancy_exponent": 0.0}, True, None, True),
        ({"select": "top-k"}, True, "class", True),
        ({"select": "tome"}, True, None, True),
    ],
    ids=str,
)
def test_a_policy_asks_a_block_for_what_it_needs_only(
    spec: dict[str, Any], redundancy: bool, attention: str | None, metric: bool
) -> None:
    ours = policy(**spec)
    assert (ours.is_redundancy, ours.scores_of, ours.needs_metric) == (redundancy, attention, metric)


@pytest.mark.parametrize(
    ("spec", "attention"),
    [({}, "mean"), (MEAN, "mean"), ({"select": "tome"}, None)],
    ids=str,
)
def test_without_a_class_token_the_mean_query_is_asked(spec: dict[str, Any], attention: str | None) -> None:
    assert policy(**spec, has_class_token=False).scores_of == attention


def test_a_threshold_keeps_what_is_above_and_prefix_and_no_padding() -> None:
    found = findings()
    decision = ask(policy(**AS_VIT, dropped="leave"), found)
    scores = found.attention_scores_BM
    assert scores is not None
    for b in range(2):
        patches = [i for i in range(PREFIX, M) if VALID[b, i] and scores[b, i] > 0.5]
        assert kept(decision)[b] == [0, *patches]
    assert decision.takers_BM is None
    assert (decision.scores_BM[:, 0] == math.inf).all()
    assert (decision.scores_BM[~VALID] == -math.inf).all()


@pytest.mark.parametrize("min_tokens", [1, 3])
def test_so_many_of_the_best_patches_always_stay(min_tokens: int) -> None:
    found = findings()
    decision = ask(policy(level=9.0, **AS_VIT, dropped="leave", min_tokens=min_tokens), found)
    assert found.attention_scores_BM is not None
    for b, row in enumerate(found.attention_scores_BM.tolist()):
        patches = [i for i in range(PREFIX, M) if VALID[b, i]]
        best = sorted(patches, key=lambda i: -row[i])[:min_tokens]
        assert kept(decision)[b] == [0, *sorted(best)]


@pytest.mark.parametrize("select", ["top-k", "random"])
def test_counts_are_a_part_of_each_images_patches(select: str) -> None:
    decision = ask(policy(level=0.6, **AS_VIT, select=select, dropped="leave"), findings())
    # round(0.6·8), round(0.6·5), and the prefix
    assert [len(row) for row in kept(decision)] == [5 + 1, 3 + 1]


def test_top_k_keeps_the_best() -> None:
    found = findings()
    decision = ask(policy(level=0.6, **AS_VIT, select="top-k", dropped="leave"), found)
    assert found.attention_scores_BM is not None
    row = found.attention_scores_BM[0].tolist()
    assert kept(decision)[0] == [0, *sorted(sorted(range(1, M), key=lambda i: -row[i])[:5])]


def test_a_random_choice_goes_by_position_and_needs_no_findings() -> None:
    together = ask(policy(**AS_VIT, select="random", dropped="leave"), Findings())
    both = tokens()
    of_second = SeenTokens(VALID[1:, :6], both.positions_BM[1:, :6])
    alone = decide(policy(**AS_VIT, select="random", dropped="leave"), 0, Findings(), of_second, ())
    assert kept(together)[1] == kept(alone)[0]


@pytest.mark.parametrize("spec", [{}, {"select": "tome"}], ids=["threshold", "tome"])
def test_redundancy_drops_the_most_redundant_candidates_into_their_anchors(spec: dict[str, Any]) -> None:
    found = findings()
    level = 0.5 if spec else 0.3
    decision = ask(policy(level=level, **spec), found)
    metric, attention = found.metric_BMK, found.attention_scores_BM
    assert metric is not None
    assert attention is not None
    assert decision.takers_BM is not None
    for b in range(2):
        patches = [i for i in range(PREFIX, M) if VALID[b, i]]
        anchors, candidates = patches[::2], patches[1::2]
        cosines = {(i, a): float(metric[b, i] @ metric[b, a]) for i in candidates for a in anchors}
        nearest = {i: max(anchors, key=lambda a: cosines[i, a]) for i in candidates}
        r = {i: 1 - cosines[i, nearest[i]] for i in candidates}
        if spec:  # tome: a number of them, by similarity alone
            leave = sorted(candidates, key=lambda i: r[i])[: len(patches) - round(0.5 * len(patches))]
        else:
            leave = [i for i in candidates if r[i] * float(attention[b, i]) ** 0.5 <= level]
        assert kept(decision)[b] == [0, *(i for i in patches if i not in leave)]
        assert leave, "nothing leaves: this test would see nothing"
        assert [int(decision.takers_BM[b, i]) for i in leave] == [nearest[i] for i in leave]


def test_counts_never_reach_the_anchors() -> None:
    decision = ask(policy(level=0.1, select="tome"), findings())
    assert kept(decision) == [[0, 1, 3, 5, 7], [0, 1, 3, 5]]


@pytest.mark.parametrize("learns", [False, True])
def test_merging_goes_to_the_most_similar_kept_patch(learns: bool) -> None:
    found = findings()
    decision = ask(policy(**AS_VIT, dropped="merge"), found, learns=learns)
    metric = found.metric_BMK
    assert decision.takers_BM is not None
    assert metric is not None
    for b in range(2):
        stay = [i for i in kept(decision)[b] if i >= PREFIX]
        for i in range(PREFIX, M):
            if VALID[b, i] and (learns or i not in stay):
                # never into the class token; what stays is asked where it would go
                similarity = {j: float(metric[b, i] @ metric[b, j]) for j in stay if j != i}
                assert decision.takers_BM[b, i] == max(similarity, key=lambda j: similarity[j])


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
def test_a_stage_that_keeps_everything_is_known_beforehand(level: float, spec: dict[str, Any], expected: bool) -> None:
    ours = policy(level=level, **spec)
    assert ours.keeps_all(level) == expected
    if expected:
        assert torch.equal(ask(ours, findings()).keep_BM, VALID)


class Overrule:
    """An observer that sets a level of its own."""

    def __init__(self, level: float) -> None:
        self.own = torch.tensor(level)
        self.seen: list[float] = []

    def level(self, stage: int, scores_BM: Tensor, valid_BM: Tensor, current: Tensor) -> Tensor:
        self.seen.append(current.item())
        return self.own


def test_observers_are_asked_in_turn_and_the_last_one_has_the_say() -> None:
    observers = (Overrule(-1.0), Overrule(9.0))
    decision = decide(policy(**AS_VIT, dropped="leave"), 0, findings(), tokens(), observers)
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
        ({"dropped": "merge"}, 8 * 9 + 4 * 4 * 4),
        ({"dropped": "leave"}, 8 * 9 + 4 * 4 * 4),
        ({"select": "tome"}, 4 * 4 * 4),
    ],
    ids=str,
)
def test_a_stage_costs_what_it_compares(spec: dict[str, Any], expected: int) -> None:
    macs = stage_macs(policy(**spec), torch.tensor([9.0]).double(), torch.tensor([6.0]).double())
    assert_close(macs, torch.tensor([float(expected)]).double(), **FLOAT32)
