"""What a benchmark looks like on the terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from made_up import benchmark, case, failure, step
from rich.console import Console

from vitprune.reports.bench_report import headlines, print_benchmark, print_files
from vitprune.reports.bench_results import Benchmark

WIDTH = 80


def printed(result: Benchmark) -> str:
    console = Console(file=io.StringIO(), width=WIDTH)
    print_benchmark(result, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, *beginning: str) -> list[str]:
    """The cells of the first row that begins so."""
    rows = ([cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│"))
    return next(cells for cells in rows if cells[: len(beginning)] == list(beginning))


def test_cases() -> None:
    text = printed(benchmark(case(16, 1.2), case(16, 1.5, target=None, ratio=0.5)))
    assert "Timed on 48 images of imagenet, split test; medians of 7" in text
    assert "224 px, bfloat16, eager" in text
    assert row(text, "16") == ["16", "dense", "1600.0 ± 2.0", "", "", "", "3.0"]
    assert row(text, "", "attached") == ["", "attached", "2000.0 ± 2.0", "0.80x", "", "", "4.0"]
    assert row(text, "", "65.0 %") == ["", "65.0 %", "1333.3 ± 2.0", "1.20x", "1.54x", "78 %", "2.0"]
    assert row(text, "", "50.0 % own") == ["", "50.0 % own", "1066.7 ± 2.0", "1.50x", "2.00x", "75 %", "2.0"]
    assert "fine-tuning" not in text


def test_where_it_pays() -> None:
    text = printed(benchmark(case(1, 0.9), case(4, 1.2), case(1, 0.9, dtype="float32", target=None)))
    assert row(text, "224 px, bfloat16, eager") == ["224 px, bfloat16, eager", "4", ""]
    assert row(text, "224 px, float32, eager") == ["224 px, float32, eager", "", "never"]


def test_training_and_failures() -> None:
    text = printed(benchmark(training=(step(0.5), step(0.35)), failures=(failure(),), notes=("A note.",)))
    assert "A step of fine-tuning, 224 px, bfloat16, batch size 16" in text
    assert row(text, "dense") == ["dense", "", "1000.0 ± 2.0", "", "", "", "1024.0"]
    assert text.count("masked") == 2
    assert row(text, "masked") == ["masked", "50.0 %", "1250.0 ± 2.0", "0.80x", "1.60x", "50 %", "2048.0"]
    words = " ".join(text.split())
    assert "- Not measured: 896 px, float32, eager, inference at batch size 256: no memory [left]" in words
    assert "- A note." in text
    assert "Pays from" not in text


def test_one_sentence_for_each_setting() -> None:
    result = benchmark(
        case(4, 1.1, target=0.8, ratio=0.8),
        case(4, 1.2, target=0.65, ratio=0.66),
        case(4, 1.3, target=0.5, ratio=0.5),
        case(4, 1.3, target=0.5, ratio=0.5, dtype="float32"),
    )
    first, second = headlines(result)
    assert "pruned to 66 % of the MACs" in first
    assert "in float32" in second
    assert first in " ".join(printed(result).split())


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=200)
    print_files(benchmark(case(4, 1.2)), tmp_path, console)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    print_files(benchmark(case(4, 1.2)), tmp_path, console)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        f"In {tmp_path}: bench.json, speedup.png, efficiency.png",
        "no pictures: matplotlib isn't installed; pip install 'vitprune[plots]' brings it",
        f"In {tmp_path}: bench.json",
    ]
