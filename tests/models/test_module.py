"""What a pruned model holds beyond the dense one, and what a trace records of its forwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from suite import pruned
from tiny import Tolerance
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

import vitprune
from vitprune.models.module import Levels, Pruning, as_config, pruning_of
from vitprune.models.trace import Trace, watching
from vitprune.recipe.schema import PruningSpec

EXACT = Tolerance(rtol=0.0, atol=0.0)
# the same images in other batches: sums in another order
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-5)


# --- model.vitprune ---


def test_the_submodule_says_what_it_does() -> None:
    assert repr(pruned("vit", "as-vit-merge").get_submodule("vitprune")) == (
        "Pruning(head-weighted-class-attention, threshold, merge, before blocks (2, 4))"
    )


def test_thresholds_are_learned_and_keep_ratios_are_not() -> None:
    by_threshold, by_count = pruning_of(pruned("vit", "as-vit")), pruning_of(pruned("vit", "top-k-merge"))
    assert [name for name, _ in by_threshold.named_parameters()] == ["thresholds"]
    assert list(by_count.parameters()) == []
    assert_close(by_threshold.levels.detach(), torch.tensor([0.008, 0.012]), **EXACT)
    assert_close(by_count.levels, torch.tensor([0.7, 0.7]), **EXACT)
    assert_close(by_threshold.temperatures, torch.tensor([1e-4, 1e-4]), **EXACT)


class OnADevice:
    """Levels that the host has to wait for; counts how often it does."""

    is_cpu = False

    def __init__(self, levels: Tensor) -> None:
        self.levels, self.waits = levels, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.levels, name)

    def tolist(self) -> list[float]:
        self.waits += 1
        return self.levels.tolist()


def test_the_host_waits_for_levels_of_a_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = OnADevice(torch.tensor([0.25, 0.5]))
    monkeypatch.setattr(Pruning, "levels", levels)
    pruning = pruning_of(pruned("vit", "as-vit"))
    assert [pruning().known_levels for _ in range(3)] == [(0.25, 0.5)] * 3
    assert levels.waits == 1
    levels.levels.mul_(0.5)
    assert [pruning().known_levels for _ in range(2)] == [(0.125, 0.25)] * 2
    assert levels.waits == 2
    levels.levels.data = torch.tensor([0.75, 0.5])
    assert pruning().known_levels == (0.75, 0.5)
    # of thresholds one that nothing reaches leaves no stage out
    levels.levels.copy_(torch.tensor([0.75, 1.25]))
    waits = levels.waits
    assert [pruning().known_levels for _ in range(3)] == [(0.75, 1.25)] * 3
    assert levels.waits == waits + 1
    # one that keeps everything leaves its stage out, so it is looked at each time, whoever changed it how
    levels.levels.copy_(torch.tensor([-torch.inf, 0.5]))
    assert pruning().known_levels == (-torch.inf, 0.5)
    levels.levels.data.fill_(0.5)
    assert pruning().known_levels == (0.5, 0.5)


def test_until_they_are_calibrated_levels_keep_everything() -> None:
    for select in ("threshold", "top-k"):
        model = vitprune.prune_(tiny.build("vit"), PruningSpec(before_blocks=[2, 4], select=select))
        with torch.no_grad(), vitprune.trace(model) as trace:
            model(tiny.images(2))
        assert all(mask.all() for mask in trace.keep_masks)


@pytest.mark.parametrize("policy", ["as-vit", "top-k-merge"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_levels_and_temperatures_stay_float32_in_any_dtype(policy: str, dtype: torch.dtype) -> None:
    model = pruned("vit", policy)
    before = {name: tensor.clone() for name, tensor in pruning_of(model).state_dict().items()}
    nn.Module.to(model, device="cpu", dtype=dtype)
    assert model.dtype == dtype
    assert_close(dict(pruning_of(model).state_dict()), before, **EXACT)


# --- what is found out later ---


def unsettled(**spec: Any) -> PreTrainedModel:
    return vitprune.prune_(tiny.build("vit"), PruningSpec(**spec))


def test_until_stages_are_found_they_lie_at_parts_of_the_depth_and_keep_everything() -> None:
    model = unsettled()
    assert pruning_of(model).before_blocks == (1, 2, 4)
    assert (pruning_of(model).levels == -torch.inf).all()
    assert_close(model(tiny.images(2)).logits, tiny.build("vit")(tiny.images(2)).logits, **FLOAT32)


@pytest.mark.parametrize("spec", [{}, {"select": "top-k"}, {"before_blocks": [3]}, {"temperature": 0.5}], ids=str)
def test_other_stages_begin_with_levels_that_keep_everything(spec: dict[str, Any]) -> None:
    model, x = unsettled(**spec), tiny.images(4)
    pruning = pruning_of(model)
    with torch.no_grad():
        pruning.levels.fill_(0.5)
    pruning.settle(before_blocks=(2, 5))
    assert pruning.before_blocks == pruning.spec.before_blocks == (2, 5)
    keeps_all = 1.0 if pruning.spec.select == "top-k" else -torch.inf
    assert pruning.levels.tolist() == [keeps_all] * 2
    assert_close(pruning.temperatures, torch.full((2,), spec.get("temperature", 1e-4)), **EXACT)
    assert pruning.levels.requires_grad == (pruning.spec.select == "threshold")
    assert list(pruning.state_dict()) == list(pruning_of(unsettled(**spec)).state_dict())
    assert all(mask.all() for mask in run(model, x).keep_masks)
    with torch.no_grad():
        pruning.levels[1] = 0.5
    first, second = run(model, x).keep_masks
    assert first.all()
    assert not second.all()


def test_stages_that_are_there_already_keep_their_levels() -> None:
    pruning = pruning_of(unsettled())
    with torch.no_grad():
        pruning.levels.fill_(0.5)
    pruning.settle(before_blocks=pruning.before_blocks)
    assert pruning.levels.tolist() == [0.5] * 3
    # but where they lie is no question any more
    assert pruning.spec.before_blocks == (1, 2, 4)
    assert not pruning.spec.is_searched


def test_what_is_no_news_changes_nothing() -> None:
    for spec in ({"before_blocks": "every"}, {"before_blocks": [1, 3]}):
        pruning = pruning_of(unsettled(**spec))
        before = pruning.spec
        pruning.settle(before_blocks=pruning.before_blocks)
        pruning.settle()
        assert pruning.spec == before


def test_what_was_found_out_is_in_the_config_that_is_saved(tmp_path: Path) -> None:
    model = unsettled(**{**tiny.AS_VIT, "before_blocks": "auto"})
    pruning = pruning_of(model)
    pruning.settle(before_blocks=(2, 5))
    pruning.settle(patches=64)
    with torch.no_grad():
        pruning.levels.fill_(0.01)
    model.save_pretrained(tmp_path)
    assert model.config.quantization_config == as_config(pruning.spec)
    entry = as_config(pruning.spec)
    assert (entry["quant_method"], entry["format"]) == ("vitprune", 2)
    assert entry["pruning"] == pruning.spec.model_dump(mode="json", exclude={"points"})
    assert pruning.spec == PruningSpec(score="head-weighted-class-attention", before_blocks=(2, 5), patches=64)
    vitprune.restore_(model)
    assert "quantization_config" not in vars(model.config)


@pytest.mark.parametrize("score", ["redundancy", "head-weighted-class-attention"])
def test_levels_go_through_json_to_a_model_that_does_not_know_its_stages(score: str) -> None:
    model = unsettled(score=score)
    pruning, x = pruning_of(model), tiny.images(3)
    pruning.settle(before_blocks=(2, 5), patches=None if score == "redundancy" else 48)
    with torch.no_grad():
        pruning.levels.copy_(torch.tensor([0.1, 1 / 3]) if score == "redundancy" else torch.tensor([0.008, 0.012]))
        pruning.temperatures.copy_(torch.tensor([1e-3, 1 / 7]))
    found = json.loads(json.dumps(Levels.of(pruning).to_lists()))
    other = unsettled(score=score)
    Levels.from_lists(found).give(pruning_of(other))
    assert pruning_of(other).spec == pruning.spec
    assert pruning_of(other).before_blocks == pruning.before_blocks
    assert_close(pruning_of(other).state_dict(), pruning.state_dict(), **EXACT)
    with torch.no_grad():
        assert_close(other(x).logits, model(x).logits, **EXACT)
    assert not run(model, x).keep_masks[-1].all(), "nothing leaves: this test would see nothing"


def test_a_wrapped_model_is_traced_like_its_content() -> None:
    model = pruned("vit", "as-vit")
    wrapped = nn.Sequential(model)
    assert pruning_of(wrapped) is pruning_of(model)
    with torch.no_grad(), vitprune.trace(wrapped) as trace:
        wrapped(tiny.images(2))
    assert len(trace.macs) == 2


# --- trace ---


@torch.no_grad()
def run(model: PreTrainedModel, *batches: Tensor) -> Trace:
    with vitprune.trace(model) as trace:
        for batch in batches:
            model(batch)
    return trace


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_trace_has_the_images_of_all_batches_in_order(mode: str) -> None:
    model, x = pruned("vit", "as-vit").train(mode == "train"), tiny.images(6)
    together, in_parts = run(model, x), run(model, x[:1], x[1:4], x[4:])
    assert together.before_blocks == in_parts.before_blocks == (2, 4)
    for ours, theirs in zip(in_parts.keep_masks, together.keep_masks, strict=True):
        assert ours.shape == (6, tiny.PATCHES)
        assert torch.equal(ours, theirs)
    assert_close(in_parts.macs, together.macs, **FLOAT32)
    assert in_parts.macs.shape == in_parts.dense_macs.shape == (6,)
    assert (in_parts.macs < in_parts.dense_macs).all()
    ratios = [(pruned / dense).item() for pruned, dense in zip(together.macs, together.dense_macs, strict=True)]
    assert_close(in_parts.ratio, sum(ratios) / 6, **FLOAT32)


@pytest.mark.parametrize("policy", tiny.POLICIES)
def test_what_left_at_a_stage_is_gone_at_the_next(policy: str) -> None:
    trace = run(pruned("vit", policy), tiny.images(4))
    for before, after in zip(trace.keep_masks, trace.keep_masks[1:], strict=False):
        assert (after <= before).all()
        assert not torch.equal(after, before)


def test_macs_follow_from_the_kept_tokens() -> None:
    model = pruned("vit", "as-vit")
    trace, cost = run(model, tiny.images(4)), pruning_of(model).cost
    for image in range(4):
        tokens, macs = 65, float(cost.outside(tiny.PATCHES))
        for block in range(6):
            if block in trace.before_blocks:
                macs += cost.attention_row(tokens)
                tokens = 1 + int(trace.keep_masks[trace.before_blocks.index(block)][image].sum())
            macs += cost.pruned_block(block, tokens)
        assert_close(trace.macs[image].item(), macs, **FLOAT32)


def test_traces_nest_and_end() -> None:
    model, x = pruned("vit", "as-vit"), tiny.images(6)
    with torch.no_grad(), vitprune.trace(model) as outer:
        model(x[:1])
        with vitprune.trace(model) as inner:
            model(x[1:3])
        model(x[3:4])
    model(x)
    assert (len(outer.macs), len(inner.macs)) == (4, 2)
    assert_close(outer.macs[1:3], inner.macs, **EXACT)


def test_two_models_traced_at_once_each_have_their_own() -> None:
    first, second, x = pruned("vit", "as-vit"), pruned("deit", "redundancy-merge"), tiny.images(3)
    with torch.no_grad(), vitprune.trace(first) as of_first, vitprune.trace(second) as of_second:
        first(x)
        second(x[:2])
        first(x)
    assert (len(of_first.macs), len(of_first.keep_masks)) == (6, 2)
    assert (len(of_second.macs), len(of_second.keep_masks)) == (2, 3)


def test_a_failing_forward_is_not_recorded_and_a_failing_block_ends_the_trace() -> None:
    model, x = pruned("vit", "as-vit"), tiny.images(2)
    with torch.no_grad(), vitprune.trace(model) as trace:
        model(x)
        with pytest.raises(ValueError, match="doesn't match model"):
            model(torch.zeros(1, 3, 8, 8))
    assert len(trace.macs) == 2
    with pytest.raises(KeyError), vitprune.trace(model) as trace:
        raise KeyError
    model(x)
    with pytest.raises(ValueError, match="saw no forward"):
        _ = trace.macs


class Everything(Trace):
    """Keeps everything, whatever the thresholds say."""

    def level(self, stage: int, scores_BM: Tensor, valid_BM: Tensor, current: Tensor) -> Tensor:
        return torch.full_like(current, -torch.inf)


def test_a_trace_of_ones_own_making_may_set_levels() -> None:
    model = pruned("vit", "as-vit")
    with torch.no_grad(), watching(Everything(pruning_of(model), (2, 4))) as trace:
        model(tiny.images(2))
    assert all(mask.all() for mask in trace.keep_masks)
    assert not run(model, tiny.images(2)).keep_masks[0].all()


def test_macs_carry_a_gradient_to_the_thresholds_in_training() -> None:
    # of one stage: an earlier one of several also raises the scores of those that it keeps
    spec = PruningSpec(
        score="head-weighted-class-attention", before_blocks=[3], thresholds=[0.01], dropped="leave", temperature=1e-2
    )
    model = vitprune.prune_(tiny.build("vit"), spec).train()
    with vitprune.trace(model) as trace:
        model(tiny.images(3))
    (trace.macs / trace.dense_macs).mean().backward()
    gradient = pruning_of(model).levels.grad
    assert gradient is not None
    assert gradient.item() < 0, "a higher threshold has to cost less"


def test_a_trace_of_two_sizes_has_macs_and_no_masks() -> None:
    model = pruned("vit", "as-vit").eval()
    with vitprune.trace(model) as trace, torch.no_grad():
        model(tiny.images(2))
        model(torch.rand(1, 3, 64, 64), interpolate_pos_encoding=True)
    assert trace.macs.shape == (3,)
    with pytest.raises(ValueError, match=r"images of different sizes \(\d+, \d+ patches\).*use a trace for each size"):
        _ = trace.keep_masks


def test_a_trace_without_a_forward_says_so() -> None:
    with vitprune.trace(pruned("vit", "as-vit")) as trace:
        pass
    for name in ("keep_masks", "macs", "dense_macs", "costs", "dense_costs", "ratio"):
        with pytest.raises(ValueError, match="the trace saw no forward"):
            getattr(trace, name)
