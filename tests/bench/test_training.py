"""Steps of fine-tuning: that they do the work of one, and change nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch

import vitprune
from vitprune.bench.subjects import BenchSubjects, Levels
from vitprune.bench.training import EXECUTIONS, make_steps, measure_training
from vitprune.models.module import is_pruned, pruning_of
from vitprune.reports.bench_results import Setting


def contest_of(family: str) -> tuple[BenchSubjects, dict[float | None, Levels]]:
    model = tiny.build(family)
    spec = tiny.spec_for(family, tiny.POLICIES["as-vit-merge"]).model_copy(update={"temperature": 1e-2})
    levels = Levels.of(pruning_of(vitprune.prune_(copy.deepcopy(model), spec)))
    return BenchSubjects(model, spec, None), {0.65: levels}


@pytest.mark.parametrize("family", ["vit", "dinov3", "siglip-tower"])
@pytest.mark.parametrize("autocast", [torch.float32, torch.bfloat16])
def test_steps(family: str, autocast: torch.dtype) -> None:
    subjects, levels = contest_of(family)
    before = {name: weight.clone() for name, weight in subjects.dense.state_dict().items()}
    steps = make_steps(subjects, levels, autocast)
    assert list(steps) == ["dense", *(f"{execution} 0.65" for execution in EXECUTIONS)]
    for name, step in steps.items():
        ours = step.train_step
        assert is_pruned(ours.student) is (name != "dense")
        assert ours.student.training
        if is_pruned(ours.student):
            assert pruning_of(ours.student).execution == name.split()[0]
        assert not ours.teacher.model.training
        step(tiny.images(2))
        # the optimizer has seen a gradient of everything that the student's answer needs
        seen = {id(weight) for weight in ours.optimizer.state}
        assert id(next(ours.student.parameters())) in seen
        assert (step.ratios[0] < 1) is is_pruned(ours.student)
    thresholds = pruning_of(steps["masked 0.65"].train_step.student).levels
    assert id(thresholds) in {id(weight) for weight in steps["dense"].train_step.optimizer.state}
    assert torch.equal(thresholds, levels[0.65].levels)
    for name, weight in subjects.dense.state_dict().items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification", "regression"])
def test_measure_training(problem_type: Any) -> None:
    subjects, levels = contest_of("vit")
    subjects.dense.config.problem_type = problem_type
    setting = Setting(image_size=32, dtype="bfloat16")
    rows = measure_training(subjects, levels, setting, tiny.images(6), 4, repeats=2)
    assert [row.execution for row in rows] == ["packed", "masked"]
    for row in rows:
        assert (row.batch_size, row.target, row.dtype) == (4, 0.65, "bfloat16")
        assert 0 < row.dense.fastest <= row.dense.median
        assert 0 < row.macs_ratio < 1
    packed, masked = rows
    # masks beside full-length sequences
    assert masked.pruned_peak_memory > masked.dense_peak_memory > 0
    assert masked.pruned_peak_memory > packed.pruned_peak_memory > 0


def test_float16() -> None:
    subjects, levels = contest_of("vit")
    with pytest.raises(ValueError, match="in float16 the loss has to be scaled"):
        measure_training(subjects, levels, Setting(image_size=32, dtype="float16"), tiny.images(4), 2, repeats=1)


def test_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    subjects, levels = contest_of("vit")
    monkeypatch.setattr("vitprune.measure.memory.free_memory", lambda device: 2.0**20)
    with pytest.raises(MemoryError, match="GiB of working memory"):
        measure_training(subjects, levels, Setting(image_size=32, dtype="float32"), tiny.images(4), 4096, repeats=1)
