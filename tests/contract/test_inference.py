"""What every family does under every policy in inference: one case, one build, all checks in turn.

A new family needs no more than its tiny model in `tiny.FAMILIES`.
"""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from suite import (
    ARCHETYPES,
    ARCHETYPES_AND_POLICIES,
    COUNTED,
    EXACT,
    FAMILIES_AND_POLICIES,
    FLOAT32,
    OF_LARGEST,
    every_family,
    pruned,
    run,
    run_as_graphs_do,
    run_by_reference,
    same_decisions,
)
from tiny import Inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import vitprune
from vitprune.models.module import pruning_of
from vitprune.models.structure import examine
from vitprune.pruning import layout
from vitprune.pruning.learning import masked
from vitprune.pruning.packed import attention as packed_attention
from vitprune.pruning.scores import TILE
from vitprune.recipe.schema import PruningSpec


@pytest.mark.parametrize(("family", "policy"), FAMILIES_AND_POLICIES)
def test_inference(family: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = pruned(family, policy), tiny.inputs(family, 5)
    oracle = run_by_reference(model, x)
    assert (oracle.merged_into[-1] != torch.arange(oracle.merged_into[-1].shape[1])).any(), (
        "the policy drops nothing: this test would see nothing"
    )

    def same(answers: Tensor, trace: vitprune.Trace, images: Tensor | slice = slice(None)) -> None:
        """One function, whatever way it is computed."""
        same_decisions(trace, oracle, images)
        assert_close(answers / oracle.largest, oracle.answers[images] / oracle.largest, **OF_LARGEST)

    same(*run(model, x))
    in_another_batch = torch.tensor([3, 1, 4, 0])
    same(*run(model, tiny.take(x, in_another_batch)), in_another_batch)
    same(*run(model, tiny.take(x, slice(1, 2))), slice(1, 2))
    copies_have_a_life_of_their_own(model, x)
    hidden_states_are_dense_sequences(model, x)
    with monkeypatch.context() as patch:
        tiny.in_operators(patch)  # as without numba
        same(*run(model, x))
        patch.setattr(packed_attention, "kernel_for", lambda *_: "padded")  # as on other devices
        same(*run(model, x))
    if family == ARCHETYPES[0] or (family in ARCHETYPES and policy == "redundancy-merge"):
        with monkeypatch.context() as patch:
            tiny.in_triton(patch)  # as on CUDA
            same(*run(model, x))
    if "random" not in policy:  # which draws numbers
        with monkeypatch.context() as patch:
            for images in (slice(None), in_another_batch, slice(1, 2)):
                answers, merged_into = run_as_graphs_do(model, tiny.take(x, images), patch)
                for ours, theirs in zip(merged_into, oracle.merged_into, strict=True):
                    assert torch.equal(ours, theirs[images])
                assert_close(answers / oracle.largest, oracle.answers[images] / oracle.largest, **OF_LARGEST)
    with monkeypatch.context() as patch:
        # without the published eps masks are the same function; test_golden.py has the eps
        patch.setattr(masked, "EPS", 0.0)
        same(*run(model.train(), x))
    pruning_of(model).execution = "packed"
    with torch.enable_grad():
        same(*run(model, x, grad=True))
    restore_gives_back_the_dense_model(model.eval(), family, x)


def hidden_states_are_dense_sequences(model: PreTrainedModel, x: Inputs) -> None:
    structure = examine(model)
    if structure.inner is not None:
        return  # a wrapped model has hidden states from another forward, and refuses
    with torch.no_grad():
        hidden_states = tiny.forward(model, x, output_hidden_states=True).hidden_states
    prefix = structure.num_prefix_tokens
    assert len(hidden_states) == len(structure.blocks) + 1
    assert all(h.shape == (5, prefix + tiny.PATCHES, 48) for h in hidden_states)
    own, last = run(model, x)[1].keep_masks[-1], hidden_states[-1]
    with torch.no_grad():
        if structure.final_norm is not structure.blocks[-1]:
            last = structure.final_norm(last)
        output = structure.backbone(**x).last_hidden_state
    assert_close(output[:, prefix:][own], last[:, prefix:][own], **FLOAT32)


def copies_have_a_life_of_their_own(model: PreTrainedModel, x: Inputs) -> None:
    expected, _ = run(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(run(twin, x)[0], expected, **EXACT)
        vitprune.restore_(twin)
        assert not torch.equal(tiny.answer(tiny.forward(twin, x)), expected)
    assert_close(run(model, x)[0], expected, **EXACT)


def restore_gives_back_the_dense_model(model: PreTrainedModel, family: str, x: Inputs) -> None:
    dense = tiny.build(family)
    assert vitprune.restore_(model) is model
    with torch.no_grad():
        assert_close(tiny.answer(tiny.forward(model, x)), tiny.answer(tiny.forward(dense, x)), **EXACT)
    assert list(model.state_dict()) == list(dense.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in dense.named_modules()]
    assert model.config._attn_implementation == dense.config._attn_implementation
    hooks = [[len(module._forward_pre_hooks) for module in each.modules()] for each in (model, dense)]
    assert hooks[0] == hooks[1]


@every_family
def test_keeping_everything_is_the_dense_model(family: str, tmp_path: Path) -> None:
    spec = PruningSpec(score="head-weighted-class-attention", before_blocks=[2, 4])
    model, x = pruned(family, spec), tiny.inputs(family, 3)
    with torch.no_grad():
        dense = tiny.answer(tiny.forward(tiny.build(family), x))
        unwatched = tiny.answer(tiny.forward(model, x))
    # where nothing can leave, and nobody watches, it is the dense forward itself
    reads_all = examine(tiny.build(family)).cost.read is None
    assert_close(unwatched, dense, **(EXACT if reads_all else FLOAT32))
    watched, trace = run(model, x)
    assert_close(watched, dense, **FLOAT32)
    patches = x.get("pixel_attention_mask", torch.ones_like(trace.keep_masks[0])).bool()
    assert all(torch.equal(mask, patches) for mask in trace.keep_masks)
    pruning_of(model).execution = "packed"
    assert_close(run(model.train(), x, grad=True)[0], dense, **FLOAT32)


@pytest.mark.parametrize(("family", "policy"), ARCHETYPES_AND_POLICIES)
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


def padding(model: PreTrainedModel, trace: vitprune.Trace) -> float:
    """MACs of a batch beyond its images' own: similarities and the last block's few rows are as wide as the largest."""
    policy = pruning_of(model)()
    first = torch.full_like(trace.macs, trace.keep_masks[0].shape[1])
    patches_S, total = [first, *(mask.sum(1).double() for mask in trace.keep_masks)], 0.0
    is_tome = policy.spec.select == "tome"
    for before, after in pairwise(patches_S):
        similarities = [policy.cost.bipartite] if is_tome else []
        if policy.score is not None and policy.score.compares_keys:
            similarities.append(lambda patches: policy.cost.density_peaks(patches, TILE))
        for cost in similarities:
            total += (len(before) * cost(before.max()) - cost(before).sum()).item()
        if policy.spec.dropped == "merge" and not is_tome:
            left = before - after
            all_images = len(left) * policy.cost.merge(left.max(), after.max())
            total += (all_images - policy.cost.merge(left, after).sum()).item()
    last = patches_S[-1]
    return total + 2 * policy.cost.width * (policy.cost.read or 0) * (len(last) * last.max() - last.sum()).item()


@every_family
def test_dense_macs_are_what_is_executed(family: str) -> None:
    model, x = pruned(family, "as-vit"), tiny.inputs(family, 2, padded=False)
    _, trace = run(model, x)
    vitprune.restore_(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tiny.forward(model, x)
    assert_close(trace.dense_macs.sum().item(), counter.get_total_flops() / 2, **COUNTED)
