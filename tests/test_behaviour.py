"""What every family does under every policy. What training does: test_learning."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Literal

import pytest
import tiny
import torch
from suite import COUNTED, EXACT, FLOAT32, every_family, every_family_and_policy, gradients, pruned, run, with_ghosts
from tiny import Tolerance
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import vitprune
from vitprune import attention, layout, scoring
from vitprune.anatomy import examine
from vitprune.recipe import PruningSpec
from vitprune.tracing import pruning_of

# sums of float32 in another order, on other CPUs too: they round by their largest terms
OF_LARGEST = Tolerance(rtol=0.0, atol=1e-5)
# the published masked softmax has an eps, which the packed pass has not; it weighs more the sharper attention is
PUBLISHED_EPS = Tolerance(rtol=1e-2, atol=5e-3)
BFLOAT16 = Tolerance(rtol=0.1, atol=0.1)


@every_family
@pytest.mark.parametrize("dropped", ["leave", "merge"])
@pytest.mark.parametrize("mode", ["masked", "packed", "eval"])
def test_keeping_everything_is_the_dense_model(
    family: str, dropped: Literal["leave", "merge"], mode: Literal["masked", "packed", "eval"]
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
    largest = masked.abs().max()
    assert_close(packed / largest, masked / largest, **OF_LARGEST)


@every_family_and_policy
def test_a_stage_in_loops_is_one_in_operators(family: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = pruned(family, policy), tiny.inputs(family, 5)
    looped, loops = run(model, x)
    tiny.in_operators(monkeypatch)
    operated, operators = run(model, x)
    assert_close(looped, operated, **FLOAT32)
    for ours, theirs in zip(loops.keep_masks, operators.keep_masks, strict=True):
        assert torch.equal(ours, theirs)


@every_family
def test_where_nothing_can_leave_a_forward_is_the_dense_one(family: str) -> None:
    spec = PruningSpec(score="head-weighted-class-attention", before_blocks=[2, 4], dropped="merge")
    model, x = pruned(family, spec), tiny.inputs(family, 3)
    with torch.no_grad():
        ours, dense = (tiny.answer(tiny.forward(m, x)) for m in (model, tiny.build(family)))
    reads_all = examine(tiny.build(family)).cost.read is None
    assert_close(ours, dense, **(EXACT if reads_all else FLOAT32))


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


def padding(model: PreTrainedModel, trace: vitprune.Trace) -> float:
    """MACs of a batch beyond its images' own: similarities and the last block's few rows are as wide as the largest."""
    policy = pruning_of(model)()
    patches_S = [
        torch.full_like(trace.macs, trace.keep_masks[0].shape[1]),
        *(m.sum(1).double() for m in trace.keep_masks),
    ]
    total = 0.0
    for before, after in pairwise(patches_S):
        similarities = [(policy.cost.bipartite, before)] if policy.is_tome else []
        if policy.is_redundancy:
            similarities.append((lambda patches: policy.cost.density_peaks(patches, scoring.TILE), before))
        for cost, patches in similarities:
            total += (len(patches) * cost(patches.max()) - cost(patches).sum()).item()
        if policy.spec.dropped == "merge" and not policy.is_tome:
            left = before - after
            all_images = len(left) * policy.cost.merge(left.max(), after.max())
            total += (all_images - policy.cost.merge(left, after).sum()).item()
    last = patches_S[-1]
    return total + 2 * policy.cost.width * (policy.cost.read or 0) * (len(last) * last.max() - last.sum()).item()


@every_family_and_policy
def test_macs_are_what_is_executed(family: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # the counter knows matrix products alone, and only torch's
    tiny.in_operators(monkeypatch)
    monkeypatch.setattr(torch.linalg, "vecdot", lambda x, y: (x[..., None, :] @ y[..., None])[..., 0, 0])
    # what a CPU's kernel is given beyond an image's own keys isn't counted
    monkeypatch.setattr(layout, "KEY_ALIGNMENT", 1)
    monkeypatch.setattr(layout, "CALL_MACS", 0)
    model, x = pruned(family, policy), tiny.inputs(family, 4, padded=False)
    for batch in (tiny.take(x, slice(0, 1)), x):
        # without fused kernels, which the counter doesn't know on every device
        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            _, trace = run(model, batch)
        executed = counter.get_total_flops() / 2
        assert_close(trace.macs.sum().item() + padding(model, trace), executed, **COUNTED)


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
    tiny.in_operators(monkeypatch)  # as on a device
    with torch.no_grad(), Waits() as waits:
        tiny.forward(model, x)
    assert waits.count == 0
    # beside all levels, once a forward
    assert asked == len(stages) + 1


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
@pytest.mark.parametrize("policy", ["as-vit", "redundancy-merge"])
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
