"""What every family does under every policy."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

import pytest
import tiny
import torch
import transformers as hf
from tiny import Inputs, Tolerance
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import vitprune
from vitprune import attention, cpu_stage, thresholds, tokens
from vitprune.anatomy import examine
from vitprune.ghosts import GhostRun
from vitprune.recipe import Execution, PruningSpec
from vitprune.tracing import pruning_of

EXACT = Tolerance(rtol=0.0, atol=0.0)
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-5)
# the published masked softmax has an eps, which the packed pass has not; it weighs more the sharper attention is
PUBLISHED_EPS = Tolerance(rtol=1e-2, atol=5e-3)
# a batch's similarity matrices are padded to its largest image, which MACs per image leave out
PADDING = Tolerance(rtol=3e-3, atol=0.0)
# of each parameter, against its largest: sums in another order
GRADIENTS = Tolerance(rtol=1e-3, atol=2e-4)
COUNTED = Tolerance(rtol=1e-9, atol=0.0)
BFLOAT16 = Tolerance(rtol=0.1, atol=0.1)

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)
every_family_and_policy = pytest.mark.parametrize(("family", "policy"), tiny.FAMILIES_AND_POLICIES)


def pruned(family: str, policy: str | PruningSpec) -> PreTrainedModel:
    spec = tiny.POLICIES[policy] if isinstance(policy, str) else policy
    return vitprune.prune_(tiny.build(family), tiny.spec_for(family, spec))


def with_ghosts(policy: str) -> PruningSpec:
    """Temperatures at which tokens are near their threshold."""
    return tiny.POLICIES[policy].model_copy(update={"temperature": 1e-2})


@torch.no_grad()
def run(model: PreTrainedModel, x: Inputs) -> tuple[Tensor, vitprune.Trace]:
    with vitprune.trace(model) as trace:
        result = tiny.answer(tiny.forward(model, x))
    return result, trace


@every_family
@pytest.mark.parametrize("dropped", ["leave", "fuse", "merge"])
@pytest.mark.parametrize("mode", ["masked", "packed", "eval"])
def test_keeping_everything_is_the_dense_model(
    family: str, dropped: Literal["leave", "fuse", "merge"], mode: Literal["masked", "packed", "eval"]
) -> None:
    spec = PruningSpec(score="head-weighted-class-attention", before_blocks=[2, 4], dropped=dropped)
    model, x = pruned(family, spec), tiny.inputs(family, 3)
    if mode != "eval":
        pruning_of(model).execution = mode
    ours, trace = run(model.train(mode != "eval"), x)
    with torch.no_grad():
        dense = tiny.answer(tiny.forward(tiny.build(family), x))
    assert_close(ours, dense, **(PUBLISHED_EPS if mode == "masked" else FLOAT32))
    patches = x.get("pixel_attention_mask", torch.ones_like(trace.keep_masks[0])).bool()
    assert all(torch.equal(mask, patches) for mask in trace.keep_masks)


@every_family_and_policy
def test_masked_and_packed_agree(family: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # without the published eps the two are the same function; test_golden.py has the eps
    monkeypatch.setattr(attention, "MASKED_SOFTMAX_EPS", 0.0)
    model, x = pruned(family, policy), tiny.inputs(family, 5)
    packed, packed_trace = run(model.eval(), x)
    masked, masked_trace = run(model.train(), x)
    for ours, theirs in zip(packed_trace.keep_masks, masked_trace.keep_masks, strict=True):
        assert torch.equal(ours, theirs)
    assert_close(packed_trace.macs, masked_trace.macs)
    assert_close(packed, masked, **FLOAT32)


@every_family_and_policy
def test_an_image_does_not_see_its_batch(family: str, policy: str) -> None:
    model, x = pruned(family, policy), tiny.inputs(family, 5)
    together, trace = run(model, x)
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled, shuffled_trace = run(model, tiny.take(x, order))
    alone = [run(model, image) for image in tiny.each(x)]
    assert_close(shuffled, together[order], **FLOAT32)
    assert_close(torch.cat([result for result, _ in alone]), together, **FLOAT32)
    for stage, mask in enumerate(trace.keep_masks):
        assert torch.equal(shuffled_trace.keep_masks[stage], mask[order])
        assert torch.equal(torch.cat([t.keep_masks[stage] for _, t in alone]), mask)
    assert_close(torch.cat([t.macs for _, t in alone]), trace.macs)
    assert not trace.keep_masks[-1].all(), "the policy drops nothing: this test would see nothing"


@every_family_and_policy
def test_macs_are_what_is_executed(family: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # the counter knows matrix products alone, and only torch's
    monkeypatch.setattr(cpu_stage, "can_loop", lambda *_: False)
    monkeypatch.setattr(torch.linalg, "vecdot", lambda x, y: (x[..., None, :] @ y[..., None])[..., 0, 0])
    # what a CPU's kernel is given beyond an image's own keys isn't counted
    monkeypatch.setattr(tokens, "KEY_ALIGNMENT", 1)
    monkeypatch.setattr(tokens, "CALL_MACS", 0)
    model, x = pruned(family, policy), tiny.inputs(family, 4, padded=False)
    for batch, tolerance in ((tiny.take(x, slice(0, 1)), COUNTED), (x, PADDING)):
        # without fused kernels, which the counter doesn't know on every device
        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            _, trace = run(model, batch)
        assert_close(trace.macs.sum().item(), counter.get_total_flops() / 2, **tolerance)


@every_family
def test_dense_macs_are_what_is_executed(family: str) -> None:
    model = pruned(family, "as-vit")
    x = tiny.inputs(family, 2, padded=False)
    _, trace = run(model, x)
    vitprune.restore_(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tiny.forward(model, x)
    assert_close(trace.dense_macs.sum().item(), counter.get_total_flops() / 2, **COUNTED)


class Waits(TorchDispatchMode):
    """Counts operators whose result the host needs, for which it would wait for a GPU."""

    WAITING = frozenset({torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.WAITING
        return func(*args, **(kwargs or {}))


def test_a_stage_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For how many tokens each image keeps, as every shape depends on it."""
    family = next(iter(tiny.FAMILIES))
    model, x = pruned(family, "redundancy-merge"), tiny.inputs(family, 5)
    stages, asked = pruning_of(model).before_blocks, 0
    lists = Tensor.tolist

    def tolist(tensor: Tensor) -> Any:
        nonlocal asked
        asked += 1
        return lists(tensor)

    monkeypatch.setattr(Tensor, "tolist", tolist)
    with torch.no_grad(), Waits() as waits:
        tiny.forward(model, x)
    assert waits.count == 0
    # beside all levels, once a forward
    assert asked == len(stages) + 1


def gradients(model: PreTrainedModel, x: Inputs, execution: Execution) -> tuple[Tensor, dict[str, Tensor]]:
    """What a training pass answers, and all gradients of a loss with a share for the MACs."""
    pruning_of(model).execution = execution
    model.zero_grad()
    with vitprune.trace(model) as trace:
        answer = tiny.answer(tiny.forward(model.train(), x))
    torch.manual_seed(0)
    loss = (answer * torch.randn_like(answer)).mean() + (trace.macs / trace.dense_macs).mean()
    loss.backward()
    return answer.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_family_and_policy
def test_packed_training_has_the_gradients_of_masked(family: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # with every token near its threshold nothing is left out, and the two are the same function
    monkeypatch.setattr(attention, "MASKED_SOFTMAX_EPS", 0.0)
    monkeypatch.setattr(thresholds, "BAND", 1e20)
    model, x = pruned(family, with_ghosts(policy)), tiny.inputs(family, 3)
    masked, masked_gradients = gradients(model, x, "masked")
    packed, packed_gradients = gradients(model, x, "packed")
    assert_close(packed, masked, **FLOAT32)
    assert packed_gradients.keys() == masked_gradients.keys()
    largest = max(expected.abs().max().item() for expected in masked_gradients.values())
    for name, expected in masked_gradients.items():
        # some are 0 but for rounding: nothing depends on the bias of all keys
        scale = max(expected.abs().max().item(), 1e-2 * largest)
        assert_close(packed_gradients[name] / scale, expected / scale, **GRADIENTS, msg=lambda m, n=name: f"{n}: {m}")


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
@pytest.mark.parametrize("policy", ["as-vit-merge", "redundancy-merge", "as-vit-fuse"])
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
    first = pruning_of(model).policy().before_blocks[0]
    for block, ghost_run in enumerate(runs[:-1], first):  # behind the last one comes the final norm
        assert ghost_run.after_XD is not None
        before, after = output.hidden_states[block : block + 2]
        is_dropped_B = torch.isclose(before[:, 0], after[:, 0]).all(-1)
        is_dropped_X = torch.isclose(ghost_run.states_XD, ghost_run.after_XD).all(-1)
        assert torch.equal(is_dropped_X, is_dropped_B[ghost_run.ghosts.images_X])
    assert runs


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


@every_family
def test_restore_gives_back_the_dense_model_exactly(family: str) -> None:
    dense = tiny.build(family)
    model = pruned(family, "redundancy-merge")
    run(model, tiny.inputs(family, 2))
    assert vitprune.restore_(model) is model
    x = tiny.inputs(family, 3)
    with torch.no_grad():
        assert_close(tiny.answer(tiny.forward(model, x)), tiny.answer(tiny.forward(dense, x)), **EXACT)
    assert list(model.state_dict()) == list(dense.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in dense.named_modules()]
    assert model.config._attn_implementation == dense.config._attn_implementation
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    assert hooks == [len(m._forward_pre_hooks) for m in dense.modules()]


@every_family
def test_copies_have_a_life_of_their_own(family: str) -> None:
    model, x = pruned(family, "as-vit"), tiny.inputs(family, 3)
    expected, _ = run(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        pruning_of(twin).levels.data.fill_(0.0)
        assert not torch.equal(run(twin, x)[0], expected)
        vitprune.restore_(twin)
        assert_close(run(model, x)[0], expected, **EXACT)


@every_family
@pytest.mark.parametrize("policy", ["as-vit", "redundancy-merge", "as-vit-fuse"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_bfloat16_runs_and_thresholds_stay_float32(family: str, policy: str, mode: str) -> None:
    model, x = pruned(family, with_ghosts(policy)), tiny.inputs(family, 3)
    before = pruning_of(model).levels.clone()
    model = model.bfloat16().train(mode == "train")
    x = {name: v.bfloat16() if v.is_floating_point() else v for name, v in x.items()}
    result, _ = run(model, x)
    if mode == "train":
        _, found = gradients(model, x, "packed")
        assert all(gradient.isfinite().all() for gradient in found.values())
    assert result.dtype == torch.bfloat16
    assert result.isfinite().all()
    assert_close(pruning_of(model).levels, before, **EXACT)


@every_family
def test_state_dict_brings_back_thresholds(family: str) -> None:
    model = pruned(family, "as-vit")
    other = pruned(family, PruningSpec(**tiny.AS_VIT, dropped="leave"))
    other.load_state_dict(model.state_dict())
    x = tiny.inputs(family, 2)
    assert_close(run(other, x)[0], run(model, x)[0], **EXACT)


def test_two_threads_may_run_one_model() -> None:
    model, x = pruned("vit", "as-vit-merge"), tiny.inputs("vit", 8)
    expected = [run(model, image) for image in tiny.each(x)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda image: run(model, image), tiny.each(x) * 4))
    for (ours, trace), (theirs, their_trace) in zip(results, expected * 4, strict=True):
        assert_close(ours, theirs, **EXACT)
        assert_close(trace.macs, their_trace.macs, **EXACT)


@every_family_and_policy
def test_hidden_states_are_dense_sequences(family: str, policy: str) -> None:
    model, x = pruned(family, policy), tiny.inputs(family, 3)
    with torch.no_grad():
        hidden_states = tiny.forward(model, x, output_hidden_states=True).hidden_states
    anatomy = examine(model)
    prefix = anatomy.num_prefix_tokens
    assert len(hidden_states) == 7
    assert all(h.shape == (3, prefix + tiny.PATCHES, 48) for h in hidden_states)
    _, trace = run(model, x)
    own = trace.keep_masks[-1]
    last = hidden_states[-1]
    with torch.no_grad():
        if anatomy.final_norm is not anatomy.blocks[-1]:
            last = anatomy.final_norm(last)
        output = anatomy.backbone(**x).last_hidden_state
    assert_close(output[:, prefix:][own], last[:, prefix:][own], **FLOAT32)


def test_a_failing_forward_leaves_nothing_behind() -> None:
    model, x = pruned("vit", "as-vit"), tiny.inputs("vit", 2)
    expected, _ = run(model, x)
    with pytest.raises(ValueError, match="doesn't match model"):
        model(torch.zeros(1, 3, 8, 8))
    assert_close(run(model, x)[0], expected, **EXACT)
    with pytest.raises(ValueError, match="no attention_mask"):
        model(**x, attention_mask=torch.ones(2, 65))
    assert_close(run(model, x)[0], expected, **EXACT)
