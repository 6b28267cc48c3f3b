"""What every family does under every policy in training: one case, one build, all checks in turn."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import tiny
import torch
import transformers as hf
from suite import (
    ARCHETYPES,
    FAMILIES_AND_POLICIES,
    FLOAT32,
    Gradients,
    gradients,
    pruned,
    run,
    with_borderline,
)
from tiny import Tolerance
from torch.testing import assert_close
from transformers import PreTrainedModel

import vitprune
from vitprune.models.module import pruning_of
from vitprune.pruning.learning import masked, packed, soft_mask
from vitprune.pruning.learning.attention import BorderlinePass
from vitprune.recipe.schema import Execution

# of each parameter, against its largest: sums in another order
GRADIENTS = Tolerance(rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(("family", "policy"), FAMILIES_AND_POLICIES)
def test_learning(family: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed training has the gradients of the published masked one, and both reach what they should."""
    monkeypatch.setattr(masked, "EPS", 0.0)
    model, x = pruned(family, with_borderline(policy)), tiny.inputs(family, 3)
    with monkeypatch.context() as patch:
        # with every token near its threshold nothing is left out, and the two are the same function
        patch.setattr(soft_mask, "BAND", 1e20)
        published = gradients(model, x, "masked")
        same(gradients(model, x, "packed"), published)
    for execution in get_args(Execution):
        reaches_what_it_should(model, family, gradients(model, x, execution))
    if pruning_of(model).spec.select == "threshold":
        # frozen thresholds: weights learn by plain removal
        pruning_of(model).requires_grad_(False)
        same(gradients(model, x, "packed"), gradients(model, x, "masked"))
        assert pruning_of(model).levels.grad is None


def same(ours: Gradients, theirs: Gradients) -> None:
    assert_close(ours.answers, theirs.answers, **FLOAT32)
    assert ours.of.keys() == theirs.of.keys()
    largest = max(expected.abs().max().item() for expected in theirs.of.values())
    for name, expected in theirs.of.items():
        # some are 0 but for rounding: nothing depends on the bias of all keys
        scale = max(expected.abs().max().item(), 1e-2 * largest)
        assert_close(ours.of[name] / scale, expected / scale, **GRADIENTS, msg=lambda m, n=name: f"{n}: {m}")


def reaches_what_it_should(model: PreTrainedModel, family: str, found: Gradients) -> None:
    dense = tiny.build(family).train()
    tiny.answer(tiny.forward(dense, tiny.inputs(family, 3))).square().mean().backward()
    used = {name for name, parameter in dense.named_parameters() if parameter.grad is not None}
    for name, _ in model.named_parameters():
        assert (name in found.of) == (name in used or name.endswith("vitprune.thresholds")), name
        assert name not in found.of or found.of[name].isfinite().all(), name
        if name.endswith("vitprune.thresholds"):
            assert found.of[name].count_nonzero() == len(found.of[name])


@pytest.mark.parametrize("family", ARCHETYPES)
@pytest.mark.parametrize("execution", get_args(Execution))
def test_gradient_checkpointing_changes_nothing(family: str, execution: Execution) -> None:
    found = []
    for checkpointing in (False, True):
        model = pruned(family, with_borderline("redundancy-merge"))
        if checkpointing:
            model.activation_checkpointing_enable()
        found.append(gradients(model, tiny.inputs(family, 3), execution))
    assert_close(found[0], found[1], **FLOAT32)


@pytest.mark.parametrize("family", ARCHETYPES)
@pytest.mark.parametrize("policy", ["as-vit", "redundancy-merge"])
def test_bfloat16_runs_and_thresholds_stay_float32(family: str, policy: str) -> None:
    model, x = pruned(family, with_borderline(policy)), tiny.inputs(family, 3)
    before = pruning_of(model).levels.clone()
    model = model.bfloat16()
    x = {name: v.bfloat16() if v.is_floating_point() else v for name, v in x.items()}
    for training in (False, True):
        result, _ = run(model.train(training), x)
        assert result.dtype == torch.bfloat16
        assert result.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(model, x, "packed").of.values())
    assert torch.equal(pruning_of(model).levels, before)
    assert pruning_of(model).levels.dtype == torch.float32


@pytest.mark.parametrize("execution", get_args(Execution))
def test_stochastic_depth_is_drawn_for_each_image(execution: Execution) -> None:
    """An image whose every residual branch is dropped leaves the blocks as it came, whatever its neighbours do."""
    model = hf.Dinov2Model(hf.Dinov2Config(**tiny.SHAPE, mlp_ratio=2, drop_path_rate=0.9))
    pruning_of(vitprune.prune_(model, tiny.POLICIES["as-vit-merge"])).execution = execution
    x = tiny.inputs("dinov2", 64)
    with torch.no_grad():
        embedded = model.embeddings(**x)
        torch.manual_seed(0)
        output = model.train()(**x, output_hidden_states=True).hidden_states
    # of the class token, behind blocks 4 and 5, where tokens have left
    unchanged = torch.isclose(output[-1][:, 0], output[-2][:, 0]).all(-1)
    assert 0 < unchanged.sum() < len(embedded)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_borderline_tokens_share_what_stochastic_depth_does_to_their_image(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[BorderlinePass] = []

    def record(*args: Any, **kwargs: Any) -> BorderlinePass:
        runs.append(BorderlinePass(*args, **kwargs))
        return runs[-1]

    monkeypatch.setattr(packed, "BorderlinePass", record)
    model = hf.Dinov2Model(hf.Dinov2Config(**tiny.SHAPE, mlp_ratio=2, drop_path_rate=0.9))
    spec = with_borderline("as-vit-merge")
    pruning_of(vitprune.prune_(model, spec)).execution = "packed"
    if checkpointing:
        model.activation_checkpointing_enable()
    torch.manual_seed(0)
    output = model.train()(**tiny.inputs("dinov2", 64), output_hidden_states=True)
    output.last_hidden_state.sum().backward()
    first = pruning_of(model).before_blocks[0]
    lasting = {block: theirs for block, theirs in enumerate(runs, first) if not theirs.ends}
    for block, theirs in lasting.items():
        assert theirs.after_XD is not None
        before, after = output.hidden_states[block : block + 2]
        is_dropped_B = torch.isclose(before[:, 0], after[:, 0]).all(-1)
        is_dropped_X = torch.isclose(theirs.states_XD, theirs.after_XD).all(-1)
        assert torch.equal(is_dropped_X, is_dropped_B[theirs.tokens.images_X])
    assert lasting


# scored by the class token, by the mean query, and by similarity
@pytest.mark.parametrize(
    ("family", "policy"), [("vit", "as-vit"), ("siglip-tower", "as-vit"), ("vit", "redundancy-merge")]
)
def test_in_packed_training_an_image_that_is_not_finite_stays_alone(family: str, policy: str) -> None:
    model, x = pruned(family, with_borderline(policy)).train(), tiny.inputs(family, 3)
    pruning_of(model).execution = "packed"
    expected, _ = run(model, x, grad=True)
    x["pixel_values"][1] = torch.nan
    ours, _ = run(model, x, grad=True)
    assert ours[1].isnan().all()
    assert_close(ours[[0, 2]], expected[[0, 2]], **FLOAT32)
