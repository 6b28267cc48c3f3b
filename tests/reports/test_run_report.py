"""What is said about results."""

from __future__ import annotations

from io import StringIO

import pytest
from made_up_report import comparison, report, speed
from rich.console import Console

from vitprune.reports.results import Latency, MetricPair, Report, Timing
from vitprune.reports.run_report import findings, print_report


def printed(value: Report) -> str:
    console = Console(file=StringIO(), width=140)
    print_report(value, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_tables() -> None:
    text = printed(report(calibrated=comparison(0.9)))
    for words in (
        "92.40 %",
        "90.00 %",
        "92.10 %",
        "-0.30 points",
        "1.25 G",
        "750 M (60.0 %)",
        "calibrated only",
        "150.0",
        "1.52x",
        "95.0 %",
        "Some CPU, 2 threads, float32",
    ):
        assert words in text, words
    assert "calibrated only" not in printed(report())


def test_budget_sentence() -> None:
    assert "the budget of 60.0 % is met" in findings(report())[0]
    assert "the budget of 50.0 % is not met" in findings(report(budget=0.5))[0]
    assert "budget" not in findings(report(budget=None))[0]


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        (0.921, "accuracy is 0.30 points below the dense model's: 92.10 % against 92.40 %"),
        (0.934, "accuracy is 1.00 points above"),
        (0.924, "accuracy is that of the dense model"),
    ],
)
def test_quality_sentence(accuracy: float, words: str) -> None:
    assert words in findings(report(comparison=comparison(accuracy)))[1]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            (-0.009, 0.006, 0.7),
            "95 % interval of the difference -0.9 to +0.6 points: no difference seen on 1000 images (McNemar's p 0.7).",
        ),
        (
            (-0.014, -0.001, 0.065),  # where the two disagree the test counts, as in a sweep
            "-1.4 to -0.1 points: no difference seen on 1000 images (McNemar's p 0.065).",
        ),
        (
            (-0.019, -0.006, 0.0341),
            "95 % interval of the difference -1.9 to -0.6 points (McNemar's p 0.034, 1000 images).",
        ),
    ],
)
def test_quality_sentence_says_how_sure_it_is(found: tuple[float, float, float], words: str) -> None:
    pair = MetricPair(dense=0.924, pruned=0.9225, interval=found[:2], p_value=found[2])
    said = findings(report(comparison=comparison().model_copy(update={"metrics": {"accuracy": pair}})))
    assert said[1].endswith(words)


def test_agreement_is_said_with_its_interval() -> None:
    said = findings(report(comparison=comparison().model_copy(update={"agreement_interval": (0.963, 0.983)})))
    assert "for 97.5 % of 1000 images (95 % interval 96.3 % to 98.3 %)." in said[2]


def test_without_labels_or_timings() -> None:
    bare = report(comparison=comparison(None, skipped=3), throughput=())
    said = findings(bare)
    assert len(said) == 3
    assert "dense model's answer for 97.5 % of 1000 images" in said[1]
    assert said[2] == "3 broken images were left out."
    assert "Speed" not in printed(bare)


@pytest.mark.parametrize(
    ("speedups", "words"),
    [
        (
            (0.93, 1.4, 1.5),
            "doesn't pay at small batches: 0.93x (slower) at batch size 1; it pays from batch size 16 on",
        ),
        ((1.2, 1.4, 1.5), "pays at every batch size measured: 1.20x at batch size 1, 1.40x"),
        ((0.8, 1.0, 1.04), "doesn't pay here at any batch size measured: 0.80x (slower) at batch size 1, 1.00x"),
        (
            (1.2, 1.0, 1.5),
            "pays at some batch sizes: 1.20x at batch size 1, 1.50x at batch size 64; not at others: 1.00x",
        ),
    ],
)
def test_where_it_pays(speedups: tuple[float, ...], words: str) -> None:
    rows = tuple(speed(size, speedup) for size, speedup in zip((1, 16, 64), speedups, strict=True))
    said = findings(report(throughput=rows[::-1]))
    assert any(words in sentence for sentence in said), said
    assert any(f"At batch size 64 it has {100 * speedups[2] / 1.6:.1f} %" in sentence for sentence in said)


def latency(measured: float, predicted: float | None = 0.61) -> Latency:
    times = (Timing(median=seconds, fastest=seconds, slowest=seconds) for seconds in (2.0, 2.0 * measured))
    return Latency(asked=0.6, predicted=predicted, batch_size=16, dense=next(times), pruned=next(times), table=None)


@pytest.mark.parametrize(("measured", "met"), [(0.57, "met"), (0.6, "met"), (0.56, "met"), (0.64, "not met")])
def test_a_latency_budget_is_met_up_to_five_percent_above_it(measured: float, met: str) -> None:
    said = findings(report(budget=None, latency=latency(measured)))
    assert (
        f"At batch size 16 pruned takes {100 * measured:.1f} % of the dense model's time (the measured table expects "
        f"61.0 %): the latency budget of 60.0 % is {met}."
    ) in said
    text = printed(report(budget=None, latency=latency(measured)))
    assert "Latency budget on Some CPU, 2 threads, float32" in text
    assert "multiply-accumulates (MACs): the budget" not in text


def test_a_latency_that_was_only_checked_expects_nothing() -> None:
    said = findings(report(budget=None, latency=latency(0.6, predicted=None)))
    assert any("of the dense model's time: the latency budget of 60.0 % is met" in sentence for sentence in said)
