"""The models of a benchmark: whose weights they have, what they keep, which images they take."""

from __future__ import annotations

from pathlib import Path

import pytest
import samples
import tiny
import torch
from transformers import PreTrainedModel

import vitprune
from vitprune.bench.settings import read_target
from vitprune.bench.subjects import BenchSubjects, Levels, compile_, twin
from vitprune.models.checkpoint import load_processor
from vitprune.models.module import is_pruned, pruning_of
from vitprune.models.structure import examine

CPU = torch.device("cpu")


@pytest.fixture(params=["vit", "dinov2"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return samples.write_checkpoint(tmp_path / "model", request.param)


def subjects(path: Path, *overrides: str) -> BenchSubjects:
    return BenchSubjects.load(read_target(str(path), None, overrides)[0], torch.float32, CPU)


@torch.no_grad()
def logits(model: PreTrainedModel, size: int = 32) -> torch.Tensor:
    torch.manual_seed(3)
    return model(torch.randn(2, 3, size, size)).logits


@pytest.mark.parametrize("family", ["vit", "vit-bare", "deit-teacher", "dinov2"])
def test_a_twin_shares_weights_and_nothing_else(family: str) -> None:
    model = tiny.build(family)
    other = twin(model)
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    assert all(first is second for first, second in pairs)
    modules = zip(model.modules(), other.modules(), strict=True)
    assert all(first is not second for first, second in modules)
    vitprune.prune_(other, vitprune.PruningSpec())
    assert is_pruned(other)
    assert not is_pruned(model)
    assert model.config._attn_implementation == "sdpa"
    assert not any(block._forward_pre_hooks for block in examine(model).blocks)


@pytest.mark.parametrize(
    "policy", ["pruning.dropped=leave", "pruning.select=top-k", "pruning.select=random", "pruning.select=tome"]
)
def test_attached_keeps_everything(checkpoint: Path, policy: str) -> None:
    found = subjects(checkpoint, policy)
    attached = found.attached()
    with vitprune.trace(attached) as seen:
        after = logits(attached)
    assert len(seen.keep_masks) == (5 if "tome" in policy else 3)
    assert all(mask.all() for mask in seen.keep_masks)
    torch.testing.assert_close(after, logits(found.dense), rtol=1e-4, atol=1e-4)


def test_attached_keeps_everything_of_a_recipe_with_thresholds(checkpoint: Path) -> None:
    found = subjects(checkpoint, "pruning.before_blocks=[2]", "pruning.thresholds=[0.1]")
    assert found.own is not None
    assert found.own.levels.tolist() == pytest.approx([0.1])
    with vitprune.trace(attached := found.attached()) as seen:
        logits(attached)
    assert all(mask.all() for mask in seen.keep_masks)


@pytest.mark.parametrize("policy", ["pruning.dropped=merge", "pruning.select=top-k"])
def test_calibrated(checkpoint: Path, policy: str) -> None:
    found = subjects(checkpoint, policy)
    assert found.own is None
    images = tiny.images(16)
    for target in (0.8, 0.5):
        pruned = found.pruned(found.calibrated([images], target))
        with vitprune.trace(pruned) as seen, torch.no_grad():
            pruned(images)
        assert float((seen.macs / seen.dense_macs).mean()) == pytest.approx(target, abs=0.02)
    assert not is_pruned(found.dense)


def test_a_pruned_checkpoint_becomes_dense_again(checkpoint: Path, tmp_path: Path) -> None:
    dense = vitprune.load(checkpoint)
    before = logits(dense)
    pruned = vitprune.prune_(dense, tiny.POLICIES["redundancy-merge"])
    with torch.no_grad():
        pruning_of(pruned).levels.mul_(1.5)
    after, levels = logits(pruned), pruning_of(pruned).levels.clone()
    path = vitprune.save(pruned, tmp_path / "pruned", processor=load_processor(str(checkpoint)))
    found = subjects(path)
    torch.testing.assert_close(logits(found.dense), before)
    assert found.own is not None
    assert torch.equal(found.own.levels, levels)
    torch.testing.assert_close(logits(found.pruned(found.own)), after)
    with pytest.raises(ValueError, match=r"^pruning: .* is pruned already; leave this section out"):
        subjects(path, "pruning.dropped=leave")


def test_levels_are_a_copy() -> None:
    pruning = pruning_of(vitprune.prune_(tiny.build("vit"), tiny.POLICIES["as-vit"]))
    levels = Levels.of(pruning)
    with torch.no_grad():
        pruning.levels.zero_()
        pruning.temperatures.zero_()
    assert levels.levels.tolist() == pytest.approx([0.008, 0.012])
    levels.give(pruning)
    assert pruning.levels.tolist() == pytest.approx([0.008, 0.012])
    assert (pruning.temperatures > 0).all()


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "dinov3", "clip-tower"])
def test_other_sizes(family: str) -> None:
    model = tiny.build(family)
    found = BenchSubjects(model, vitprune.PruningSpec(), None).at(48)
    attached = found.attached()
    with vitprune.trace(attached) as seen, torch.no_grad():
        attached(torch.randn(2, 3, 48, 48))
    assert seen.keep_masks[0].shape == (2, 144)
    # the model itself is as it was
    assert not model._forward_pre_hooks
    assert not examine(model).backbone._forward_pre_hooks


def test_the_own_size_stays_as_it_is(checkpoint: Path) -> None:
    found = subjects(checkpoint)
    torch.testing.assert_close(logits(found.at(32).dense), logits(found.dense), rtol=0, atol=0)


def test_a_size_that_the_model_does_not_take() -> None:
    found = BenchSubjects(tiny.build("vit"), vitprune.PruningSpec(), None)  # its patches are 4 × 4
    with pytest.raises(ValueError, match=r"takes no images of 2 px \(.*leave --image-size out"):
        found.at(2)


def test_compile_takes_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("vit")
    compiled: list[tuple[object, dict[str, object]]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    compile_(model)
    assert [module for module, _ in compiled] == list(examine(model).blocks)
    assert all(options == {"dynamic": True} for _, options in compiled)
