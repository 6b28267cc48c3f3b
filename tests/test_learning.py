"""What every family does under every policy in training, masked and packed."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import tiny
import torch
import transformers as hf
from suite import COUNTED, FLOAT32, every_family, every_family_and_policy, gradients, pruned, run, with_ghosts
from tiny import Tolerance
from torch.testing import assert_close

import vitprune
from vitprune import attention, thresholds
from vitprune.ghosts import GhostRun
from vitprune.recipe import Execution
from vitprune.tracing import pruning_of

# of each parameter, against its largest: sums in another order
GRADIENTS = Tolerance(rtol=1e-3, atol=2e-4)


@every_family_and_policy
def test_packed_training_has_the_gradients_of_masked(family: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # with every token near its threshold nothing is left out, and the two are the same function
    monkeypatch.setattr(attention, "MASKED_SOFTMAX_EPS", 0.0)
    monkeypatch.setattr(thresholds, "BAND", 1e20)
    assert_masked_is_packed(pruned(family, with_ghosts(policy)), family)


def assert_masked_is_packed(model: hf.PreTrainedModel, family: str) -> None:
    x = tiny.inputs(family, 3)
    masked, masked_gradients = gradients(model, x, "masked")
    packed, packed_gradients = gradients(model, x, "packed")
    assert_close(packed, masked, **FLOAT32)
    assert packed_gradients.keys() == masked_gradients.keys()
    largest = max(expected.abs().max().item() for expected in masked_gradients.values())
    for name, expected in masked_gradients.items():
        # some are 0 but for rounding: nothing depends on the bias of all keys
        scale = max(expected.abs().max().item(), 1e-2 * largest)
        assert_close(packed_gradients[name] / scale, expected / scale, **GRADIENTS, msg=lambda m, n=name: f"{n}: {m}")


@every_family
@pytest.mark.parametrize("policy", ["as-vit", "redundancy-merge"])
def test_weights_have_the_same_gradients_packed_and_masked_while_thresholds_are_frozen(
    family: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MASKED_SOFTMAX_EPS", 0.0)
    model = pruned(family, policy)
    pruning_of(model).requires_grad_(False)
    assert_masked_is_packed(model, family)
    assert pruning_of(model).levels.grad is None


@every_family_and_policy
def test_packed_training_sees_what_inference_sees(family: str, policy: str) -> None:
    model, x = pruned(family, policy), tiny.inputs(family, 4)
    inferred, trace = run(model.eval(), x)
    pruning_of(model).execution = "packed"
    trained, training = run(model.train(), x)
    assert_close(trained, inferred, **FLOAT32)
    assert_close(training.macs, trace.macs, **COUNTED)
    for ours, theirs in zip(training.keep_masks, trace.keep_masks, strict=True):
        assert torch.equal(ours, theirs)


@every_family_and_policy
@pytest.mark.parametrize("execution", get_args(Execution))
def test_a_training_step_reaches_what_it_should(family: str, policy: str, execution: Execution) -> None:
    spec = with_ghosts(policy)
    model = pruned(family, spec).train()
    pruning_of(model).execution = execution
    with vitprune.trace(model) as trace:
        loss = (
            tiny.answer(tiny.forward(model, tiny.inputs(family, 3))).square().mean()
            + (trace.macs / trace.dense_macs).mean()
        )
    loss.backward()
    dense = tiny.build(family).train()
    tiny.answer(tiny.forward(dense, tiny.inputs(family, 3))).square().mean().backward()
    used = {name for name, parameter in dense.named_parameters() if parameter.grad is not None}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in used or name.endswith("vitprune.thresholds")), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    if spec.select == "threshold":
        gradient = pruning_of(model).levels.grad
        assert gradient is not None
        assert gradient.count_nonzero() == len(gradient)


@every_family
@pytest.mark.parametrize("policy", ["as-vit-merge", "redundancy-merge"])
@pytest.mark.parametrize("execution", get_args(Execution))
def test_gradient_checkpointing_changes_nothing(family: str, policy: str, execution: Execution) -> None:
    found = []
    for checkpointing in (False, True):
        model = pruned(family, with_ghosts(policy))
        if checkpointing:
            model.activation_checkpointing_enable()
        found.append(gradients(model, tiny.inputs(family, 3), execution))
    assert_close(found[0], found[1], **FLOAT32)


@pytest.mark.parametrize("execution", get_args(Execution))
def test_stochastic_depth_is_drawn_for_each_image(execution: Execution) -> None:
    """An image whose every residual branch is dropped leaves the blocks as it came, whatever its neighbours do."""
    model = hf.Dinov2Model(hf.Dinov2Config(**tiny.SHAPE, mlp_ratio=2, drop_path_rate=0.9))
    vitprune.prune_(model, tiny.POLICIES["as-vit-merge"])
    pruning_of(model).execution = execution
    x = tiny.inputs("dinov2", 64)
    with torch.no_grad():
        embedded = model.embeddings(**x)
        torch.manual_seed(0)
        output = model.train()(**x, output_hidden_states=True).hidden_states
    # of the class token, behind blocks 4 and 5, where tokens have left
    unchanged = torch.isclose(output[-1][:, 0], output[-2][:, 0]).all(-1)
    assert 0 < unchanged.sum() < len(embedded)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_ghosts_share_what_stochastic_depth_does_to_their_image(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[GhostRun] = []

    def record(*args: Any, **kwargs: Any) -> GhostRun:
        runs.append(GhostRun(*args, **kwargs))
        return runs[-1]

    monkeypatch.setattr("vitprune.packed.GhostRun", record)
    model = hf.Dinov2Model(hf.Dinov2Config(**tiny.SHAPE, mlp_ratio=2, drop_path_rate=0.9))
    spec = with_ghosts("as-vit-merge")
    pruning_of(vitprune.prune_(model, spec)).execution = "packed"
    if checkpointing:
        model.activation_checkpointing_enable()
    torch.manual_seed(0)
    output = model.train()(**tiny.inputs("dinov2", 64), output_hidden_states=True)
    output.last_hidden_state.sum().backward()
    first = pruning_of(model).before_blocks[0]
    lasting = {block: ghost_run for block, ghost_run in enumerate(runs, first) if not ghost_run.ends}
    for block, ghost_run in lasting.items():
        assert ghost_run.after_XD is not None
        before, after = output.hidden_states[block : block + 2]
        is_dropped_B = torch.isclose(before[:, 0], after[:, 0]).all(-1)
        is_dropped_X = torch.isclose(ghost_run.states_XD, ghost_run.after_XD).all(-1)
        assert torch.equal(is_dropped_X, is_dropped_B[ghost_run.ghosts.images_X])
    assert lasting


# scored by the class token, by the mean query, and by similarity
@pytest.mark.parametrize(
    ("family", "policy"), [("vit", "as-vit"), ("siglip-tower", "as-vit"), ("vit", "redundancy-merge")]
)
def test_in_packed_training_an_image_that_is_not_finite_stays_alone(family: str, policy: str) -> None:
    model, x = pruned(family, with_ghosts(policy)).train(), tiny.inputs(family, 3)
    pruning_of(model).execution = "packed"
    expected, _ = run(model, x)
    x["pixel_values"][1] = torch.nan
    ours, _ = run(model, x)
    assert ours[1].isnan().all()
    assert_close(ours[[0, 2]], expected[[0, 2]], **FLOAT32)
