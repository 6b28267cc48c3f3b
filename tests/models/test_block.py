"""What stands in for a block's forward: what it leaves behind, and what a block that runs again is told."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from tiny import Tolerance
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from written_out import batch_of

import vitprune
from vitprune.models import context
from vitprune.models.block import BlockForward, attention_forward, pack_rope, rope_of_all
from vitprune.models.module import pruning_of
from vitprune.models.structure import examine
from vitprune.pruning.attention import Attention, DenseAttention, StatsRequest
from vitprune.pruning.forward import PackedForward
from vitprune.pruning.layout import Layout
from vitprune.pruning.packed.attention import PackedAttention
from vitprune.pruning.token_batch import NO_TOKEN, TokenBatch

EXACT = Tolerance(rtol=0.0, atol=0.0)

B, N, D = 2, 5, 6


class Counting(ModelHook):
    """A hook of Accelerate's, such as those that move a block's weights to where they are needed."""

    def __init__(self) -> None:
        self.forwards = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.forwards += 1
        return args, kwargs


class Listening(nn.Module):
    """A block that takes nothing but hidden states and writes down which call it ran with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.heard: list[Attention | None] = []

    def forward(self, x: Tensor) -> Tensor:
        self.heard.append(context.attention())
        q = self.linear(x)[:, None]
        return F.scaled_dot_product_attention(q, q, q)[:, 0]


class ListeningLayer(Listening, GradientCheckpointingLayer):
    """The same as transformers' layers are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def use_checkpoints(self) -> None:
        self.gradient_checkpointing = True
        vars(self)["_gradient_checkpointing_func"] = partial(checkpoint, use_reentrant=False)


every_kind = pytest.mark.parametrize("kind", [Listening, ListeningLayer])


def first_block(model: PreTrainedModel) -> nn.Module:
    return examine(model).blocks[0]


def run(block: nn.Module, attention: Attention, x: Tensor) -> Tensor:
    """The block's output with such an attention."""
    return vars(block)["forward"].run(attention, x)


def looks(block: nn.Module) -> tuple[Any, ...]:
    return [name for name, _ in block.named_modules()], list(block.state_dict()), list(vars(block)), block.forward


# --- what is left behind ---


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_names_and_weights_stay_and_removing_leaves_nothing(family: str) -> None:
    block = first_block(tiny.build(family))
    before = looks(block)
    handle = BlockForward(block, intercept=False).attach()
    assert looks(block)[:2] == before[:2]
    handle.remove()
    assert looks(block) == before


def test_a_forward_of_the_instance_is_used_and_comes_back() -> None:
    block, x = Listening(), torch.randn(B, N, D)

    def doubled(x: Tensor) -> Tensor:
        return 2 * Listening.forward(block, x)

    expected = 2 * block(x)
    block.forward = doubled
    handle = BlockForward(block, intercept=False).attach()
    assert_close(block(x), expected, **EXACT)
    assert_close(run(block, DenseAttention(), x), expected, **EXACT)
    handle.remove()
    assert block.forward is doubled


@pytest.mark.parametrize("family", ["vit", "beit", "data2vec"])
def test_hooks_of_accelerate_are_called_and_come_back(family: str) -> None:
    model, x = tiny.build(family), tiny.inputs(family, 2)
    block, hook = first_block(model), Counting()
    expected = tiny.forward(vitprune.prune_(tiny.build(family), tiny.POLICIES["as-vit"]), x)
    clean = looks(block)
    add_hook_to_module(block, hook)
    before = looks(block)
    vitprune.prune_(model, tiny.POLICIES["as-vit"])
    assert_close(tiny.answer(tiny.forward(model, x)), tiny.answer(expected), **EXACT)
    assert hook.forwards == 1
    vitprune.restore_(model)
    assert looks(block) == before
    tiny.forward(model, x)
    assert hook.forwards == 2
    remove_hook_from_module(block)
    assert looks(block)[:2] == clean[:2]
    assert_close(tiny.answer(tiny.forward(model, x)), tiny.answer(tiny.forward(tiny.build(family), x)), **EXACT)


def test_hooks_that_accelerate_sets_later_stay() -> None:
    # as `from_pretrained` does with a device map: it prunes the empty model first
    model, x, hook = tiny.build("vit"), tiny.images(2), Counting()
    expected = vitprune.prune_(tiny.build("vit"), tiny.POLICIES["as-vit"])(x).logits
    vitprune.prune_(model, tiny.POLICIES["as-vit"])
    add_hook_to_module(first_block(model), hook)
    assert_close(model(x).logits, expected, **EXACT)
    assert hook.forwards == 1
    vitprune.restore_(model)
    assert_close(model(x).logits, tiny.build("vit")(x).logits, **EXACT)
    assert hook.forwards == 2
    vitprune.prune_(model, tiny.POLICIES["as-vit"])  # the first time's forward is still inside Accelerate's
    assert_close(model(x).logits, expected, **EXACT)
    assert hook.forwards == 3


def test_a_copy_of_a_block_has_a_forward_of_its_own() -> None:
    block = Listening()
    BlockForward(block, intercept=False).attach()
    twin = copy.deepcopy(block)
    run(twin, DenseAttention(), torch.randn(B, N, D))
    assert (len(twin.heard), len(block.heard)) == (1, 0)
    forward = vars(twin)["forward"]
    assert isinstance(forward, BlockForward)
    assert forward.block is twin


# --- what a block is told ---


@every_kind
def test_a_block_runs_with_its_call_and_without_it_as_ever(kind: type[Listening]) -> None:
    block, x, call = kind(), torch.randn(B, N, D), DenseAttention()
    expected = block(x)
    BlockForward(block, intercept=False).attach()
    assert_close(block(x), expected, **EXACT)
    assert_close(run(block, call, x), expected, **EXACT)
    assert len(block.heard) == 3
    assert block.heard[:2] == [None, None]
    assert block.heard[2] is call
    assert context.current() == context.Context()
    assert context.attention() is None


@pytest.mark.parametrize("intercept", [False, True])
def test_a_block_may_have_torchs_attention_taken(intercept: bool) -> None:
    block, call = Listening(), DenseAttention(TokenBatch.dense(B, N, 1, torch.device("cpu")), StatsRequest(metric=True))
    BlockForward(block, intercept=intercept).attach()
    run(block, call, torch.randn(B, N, D))
    assert (call.stats.metric_TK is not None) == intercept


@pytest.mark.parametrize("name", ["position_bias", "softcap"])
def test_what_packed_attention_does_not_know_is_refused(name: str) -> None:
    q, unknown = torch.zeros(1, 2, 3, 4), dict[str, Any]({name: torch.ones(())})
    with context.Attending(DenseAttention()), pytest.raises(ValueError, match=f"Module attends with {name}"):
        attention_forward(nn.Module(), q, q, q, None, **unknown)


def test_reentrant_checkpointing_is_refused() -> None:
    model = vitprune.prune_(tiny.build("vit"), tiny.POLICIES["as-vit"]).train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r"use_reentrant=True.*'use_reentrant': False"):
        tiny.forward(model, tiny.inputs("vit", 2))


def test_transformers_checkpointing_runs_a_block_again_with_the_same_call() -> None:
    block, x, call = ListeningLayer().train(), torch.randn(B, N, D, requires_grad=True), DenseAttention()
    block.use_checkpoints()
    BlockForward(block, intercept=False).attach()
    output = run(block, call, x)
    assert len(block.heard) == 1
    with context.Attending(DenseAttention()):  # what another forward is at by then
        output.sum().backward()
    assert len(block.heard) == 2
    assert all(heard is call for heard in block.heard)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_checkpointing_that_the_model_does_itself_is_done_by_the_blocks(checkpoints: bool) -> None:
    block, x, call = Listening().train(), torch.randn(B, N, D, requires_grad=True), DenseAttention()
    BlockForward(block, intercept=True).attach()
    policy = pruning_of(vitprune.prune_(tiny.build("vit"), tiny.POLICIES["as-vit"]))()
    with context.within(forward=PackedForward(policy), checkpoints=checkpoints):
        output = run(block, call, x)
    output.sum().backward()
    assert len(block.heard) == 1 + checkpoints
    assert all(heard is call for heard in block.heard)


def test_checkpointed_blocks_are_run_again_among_the_same_tokens() -> None:
    batch = batch_of(Layout((3, 3)), torch.tensor([0, 1, 4, 0, 2, 3]), tokens=5)
    x = torch.randn(1, 6, D)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        block, own = ListeningLayer().train(), x.clone().requires_grad_()
        if checkpointing:
            block.use_checkpoints()
        BlockForward(block, intercept=True).attach()
        run(block, PackedAttention(batch), own).square().sum().backward()
        assert len(block.heard) == 1 + checkpointing
        gradients.append((own.grad, block.linear.weight.grad))
    assert_close(gradients[1], gradients[0], **EXACT)


# --- rotary positions ---


def test_rotary_tables_go_by_position_and_do_not_turn_what_has_none() -> None:
    patches, prefix = 7, 3
    cos, sin = torch.rand(patches, D), torch.rand(patches, D)
    positions = torch.tensor([0, 1, 2, 4, 9, NO_TOKEN, 0, 1, 2, 3, NO_TOKEN])
    ours_cos, ours_sin = pack_rope(rope_of_all((cos, sin), prefix), positions)
    for row, position in enumerate(positions.tolist()):
        turns = position >= prefix
        assert_close(ours_cos[row], cos[position - prefix] if turns else torch.ones(D), **EXACT)
        assert_close(ours_sin[row], sin[position - prefix] if turns else torch.zeros(D), **EXACT)


def test_rotary_tables_of_all_tokens_are_those_that_were() -> None:
    cos, sin = torch.rand(7, D).bfloat16(), torch.rand(7, D).bfloat16()
    ours = pack_rope(rope_of_all((cos, sin), 3), torch.arange(3, 10))
    assert_close(ours, (cos, sin), **EXACT)
