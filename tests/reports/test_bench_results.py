"""What follows from a benchmark's numbers, which are made up here, and its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_up import benchmark, case, failure, step

from vitprune.reports.bench_results import Benchmark, break_even
from vitprune.reports.results import Report

BEGINNING = "On this machine (A CPU, 2 threads), pruned to 65 % of the MACs, dinov2-small is "


def test_gains() -> None:
    row = case(16, 1.2, ratio=0.5)
    assert row.speedup == pytest.approx(1.2)
    assert row.ideal_speedup == 2.0
    assert row.efficiency == pytest.approx(0.6)
    assert row.attached_speedup == pytest.approx(0.8)


def test_gains_of_training() -> None:
    row = step(0.5)
    assert row.speedup == pytest.approx(0.8)
    # the teacher's forward stays whole: 4 forwards become 1 + 3 · 0.5
    assert row.ideal_speedup == pytest.approx(4 / 2.5)
    assert row.efficiency == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ({1: 1.1, 4: 1.2}, 1),
        ({1: 0.9, 4: 1.2, 16: 1.4}, 4),
        ({1: 1.1, 4: 0.9, 16: 1.4}, 16),
        ({1: 1.1, 4: 0.9}, None),
        ({1: 1.0}, None),
        ({1: 1.04}, None),
        ({1: 1.04, 4: 1.05}, 4),
    ],
)
def test_break_even(speedups: dict[int, float], expected: int | None) -> None:
    cases = [case(size, gain) for size, gain in speedups.items()]
    assert break_even(cases[::-1]) == expected


@pytest.mark.parametrize(
    ("speedups", "sentence"),
    [
        (
            {1: 0.9, 4: 1.1, 64: 1.52},
            "1.52x as fast as dense at batch size 64 in bfloat16 at 224 px (1.54x is what the MACs allow); it pays "
            "from batch size 4 on.",
        ),
        (
            {1: 1.1, 4: 1.2},
            "1.20x as fast as dense at batch size 4 in bfloat16 at 224 px (1.54x is what the MACs allow); it pays at "
            "every batch size measured.",
        ),
        (
            {1: 0.7, 4: 0.9},
            "0.90x as fast as dense at batch size 4 in bfloat16 at 224 px (1.54x is what the MACs allow); it doesn't "
            "pay here.",
        ),
        (
            {1: 1.3, 4: 1.02},
            "1.02x as fast as dense at batch size 4 in bfloat16 at 224 px (1.54x is what the MACs allow); it pays at "
            "batch size 1 alone.",
        ),
        (
            {4: 1.2},
            "1.20x as fast as dense at batch size 4 in bfloat16 at 224 px (1.54x is what the MACs allow); it pays "
            "there, the only batch size measured.",
        ),
    ],
)
def test_sentences(speedups: dict[int, float], sentence: str) -> None:
    (verdict,) = benchmark(*(case(size, gain) for size, gain in speedups.items())).verdicts
    assert verdict.sentence == BEGINNING + sentence


def test_a_sentence_names_what_is_special() -> None:
    result = benchmark(case(4, 1.2, mode="compiled"))
    gpu = result.environment.model_copy(update={"device": "NVIDIA X"})
    (verdict,) = result.model_copy(update={"environment": gpu}).verdicts
    assert "(NVIDIA X)" in verdict.sentence
    assert "at 224 px, compiled (" in verdict.sentence


def test_a_verdict_for_each_setting_and_target() -> None:
    result = benchmark(
        case(1, 0.9),
        case(1, 0.8, target=0.5, ratio=0.5),
        case(4, 1.2),
        case(4, 0.9, target=0.5, ratio=0.5),
        case(4, 1.3, dtype="float32"),
    )
    found = [(v.dtype, v.target, v.batch_size, v.break_even) for v in result.verdicts]
    assert found == [("bfloat16", 0.65, 4, 4), ("bfloat16", 0.5, 4, None), ("float32", 0.65, 4, 4)]
    assert result.verdicts[0].speedup == pytest.approx(1.2)


def test_file(tmp_path: Path) -> None:
    result = benchmark(case(1, 0.9), case(4, 1.2, target=None), training=(step(0.5),), failures=(failure(),))
    path = tmp_path / "bench.json"
    result.save(path)
    assert Benchmark.load(path) == result
    assert [entry.name for entry in tmp_path.iterdir()] == ["bench.json"]
    written = json.loads(path.read_text())
    assert written["schema"] == 1
    assert written["cases"][1]["speedup"] == pytest.approx(1.2)
    assert written["verdicts"][0]["break_even"] is None
    assert written["training"][0]["ideal_speedup"] == pytest.approx(1.6)


def test_another_file(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text('{"schema": 1}')
    with pytest.raises(ValueError, match="is no benchmark that this version of vitprune reads"):
        Benchmark.load(path)
    with pytest.raises(ValueError, match="is no report that this version of vitprune reads"):
        Report.load(path)
