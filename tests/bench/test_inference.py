"""Timing forwards of tiny models: who is timed on what, MACs and bytes; how long it takes decides no test."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import vitprune
from vitprune.bench import inference
from vitprune.bench.inference import Lineup, Ratios
from vitprune.bench.subjects import BenchSubjects, Levels
from vitprune.measure.memory import peak_memory
from vitprune.models.module import pruning_of
from vitprune.reports.bench_results import Setting

SETTING = Setting(image_size=32, dtype="float32")
CPU = torch.device("cpu")


@pytest.fixture
def subjects() -> BenchSubjects:
    return BenchSubjects(tiny.build("vit"), tiny.POLICIES["redundancy-merge"], None)


@pytest.fixture
def levels(subjects: BenchSubjects) -> dict[float | None, Levels]:
    pruning = pruning_of(subjects.pruned(Levels.of(pruning_of(vitprune.prune_(tiny.build("vit"), subjects.spec)))))
    milder = Levels(pruning.before_blocks, pruning.levels.detach() / 2, pruning.temperatures)
    return {0.5: Levels.of(pruning), None: milder}


@torch.no_grad()
def ratio(subjects: BenchSubjects, levels: Levels, x: torch.Tensor) -> float:
    model = subjects.pruned(levels)
    with vitprune.trace(model) as seen:
        model(x)
    return float(seen.macs.sum() / seen.dense_macs.sum())


def test_cases(subjects: BenchSubjects, levels: dict[float | None, Levels]) -> None:
    x = tiny.images(10)
    lineup = Lineup.of(subjects, levels, SETTING, x)
    cases = lineup.measure(4, repeats=1)
    assert [(case.target, case.batch_size, case.mode) for case in cases] == [(0.5, 4, "eager"), (None, 4, "eager")]
    for case in cases:
        # one repeat: the first batch only
        assert case.macs_ratio == pytest.approx(ratio(subjects, levels[case.target], x[:4]))
        for timing in (case.dense, case.attached, case.pruned):
            assert timing is not None
            assert 0 < timing.fastest <= timing.median <= timing.slowest
        assert case.dense == cases[0].dense
    both = lineup.measure(4, repeats=2)
    assert both[0].macs_ratio == pytest.approx(ratio(subjects, levels[0.5], x[:8]))
    assert both[0].macs_ratio != pytest.approx(cases[0].macs_ratio)


def test_peak_memory(subjects: BenchSubjects, levels: dict[float | None, Levels]) -> None:
    x = tiny.images(4)
    case = Lineup.of(subjects, levels, SETTING, x).measure(4, repeats=1)[0]
    with torch.no_grad():
        assert case.dense_peak_memory == peak_memory(lambda: subjects.dense(x), CPU)
        pruned = subjects.pruned(levels[0.5])
        assert case.pruned_peak_memory == peak_memory(lambda: pruned(x), CPU)
    # with gradients a forward would keep what each block computes
    assert case.dense_peak_memory is not None
    assert case.dense_peak_memory < peak_memory(lambda: subjects.dense(x), CPU)


def test_everyone_gets_the_same_batches(
    subjects: BenchSubjects, levels: dict[float | None, Levels], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[dict[str, Any]] = []
    time_in_turn = inference.time_in_turn

    def spy(runners: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        timed.append(runners)
        return time_in_turn(runners, *args, **kwargs)

    monkeypatch.setattr(inference, "time_in_turn", spy)
    x = tiny.images(6)
    Lineup.of(subjects, levels, SETTING, x).measure(2, repeats=1)
    (runners,) = timed
    assert list(runners) == ["dense", "attached", "0.5", "None"]
    assert len({id(runner.batches) for runner in runners.values()}) == 1
    assert torch.equal(torch.cat(list(runners["dense"].batches)), x)


def test_ratios_count_each_image_once(subjects: BenchSubjects, levels: dict[float | None, Levels]) -> None:
    x = tiny.images(20)
    ratios = Ratios(subjects.pruned(levels[0.5]), x)
    assert ratios.of_first(3) == pytest.approx(ratio(subjects, levels[0.5], x[:3]))
    assert len(ratios.macs) == inference.TRACED
    assert ratios.of_first(20) == pytest.approx(ratio(subjects, levels[0.5], x))
    assert len(ratios.macs) == 20


def test_more_than_there_is(
    subjects: BenchSubjects, levels: dict[float | None, Levels], monkeypatch: pytest.MonkeyPatch
) -> None:
    lineup = Lineup.of(subjects, levels, SETTING, tiny.images(4))
    monkeypatch.setattr("vitprune.measure.memory.free_memory", lambda device: 2.0**20)
    lineup.measure(4, repeats=1)
    with pytest.raises(MemoryError, match=r"it would take \d+\.\d GiB of working memory, 0\.0 GiB are free"):
        lineup.measure(4096, repeats=1)


def test_compiled_models_are_others(
    subjects: BenchSubjects, levels: dict[float | None, Levels], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(inference, "compile_", compiled.append)
    eager = Lineup.of(subjects, levels, SETTING, tiny.images(4))
    lineup = eager.compiled(subjects, levels)
    assert compiled == [answers.model for answers in lineup.answers.values()]
    theirs = {id(answers.model) for answers in eager.answers.values()}
    assert theirs.isdisjoint(map(id, compiled))
    assert [case.mode for case in lineup.measure(2, repeats=1)] == ["compiled", "compiled"]


def test_compiled_warm_up_goes_over_all_batches(
    subjects: BenchSubjects, levels: dict[float | None, Levels], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "compile_", lambda model: model)
    eager = Lineup.of(subjects, levels, SETTING, tiny.images(4))
    compiled = eager.compiled(subjects, levels)
    assert (eager._warm_up(5), compiled._warm_up(5), compiled._warm_up(1)) == (2, 5, 2)
