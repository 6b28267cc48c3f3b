"""Whole sweeps over tiny models, and what becomes of a case that can't be measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import samples
import torch
from transformers import ViTImageProcessorPil

import vitprune
from vitprune.bench.inference import Lineup
from vitprune.bench.settings import BenchSettings, read_target
from vitprune.bench.sweep import bench
from vitprune.models.checkpoint import load_processor
from vitprune.pruning.kernels import cpu
from vitprune.reports.bench_results import Benchmark

Bench = Callable[..., Benchmark]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return samples.write_checkpoint(tmp_path / "model")


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path) -> Bench:
    """A benchmark with few images and repeats."""

    def run(*overrides: str, target: Path = checkpoint, data: Path | None = None, **options: Any) -> Benchmark:
        recipe, random_pixels = read_target(str(target), data and str(data), overrides)
        few: dict[str, Any] = {"targets": (0.65,), "batch_sizes": (2,), "repeats": 1, "calibration_images": 16}
        settings = BenchSettings(recipe, random_pixels, **{**few, **options})
        return bench(settings, output=tmp_path / "out", progress=False)

    return run


def test_a_sweep(run: Bench, tmp_path: Path) -> None:
    result = run(
        targets=(0.8, 0.5),
        batch_sizes=(4, 1),
        dtypes=("float32", "bfloat16"),
        image_sizes=(32, 48),
        training=True,
        training_batch_size=2,
    )
    assert not result.failures
    found = [(c.dtype, c.image_size, c.batch_size, c.target) for c in result.cases]
    sizes = [(dtype, size) for dtype in ("float32", "bfloat16") for size in (32, 48)]
    assert found == [(*size, batch, target) for size in sizes for batch in (1, 4) for target in (0.8, 0.5)]
    for case in result.cases:
        assert case.target is not None
        # calibrated on other images than those that are timed, of which there are few here
        assert case.macs_ratio == pytest.approx(case.target, abs=0.08)
        assert case.mode == "eager"
    assert [(s.dtype, s.image_size, s.execution, s.target) for s in result.training] == [
        (*size, execution, target) for size in sizes for execution in ("packed", "masked") for target in (0.8, 0.5)
    ]
    assert result.environment.dtype == "float32, bfloat16"
    assert result.pruning["score"] == "redundancy"
    assert Benchmark.load(tmp_path / "out" / "bench.json").cases == result.cases


def test_random_pixels_are_named(run: Bench) -> None:
    result = run()
    assert result.images == "random pixels"
    assert "name real ones with --data" in result.notes[0]


def test_what_makes_a_cpu_fast_is_named_where_it_is_missing(run: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_loops", lambda: False)
    result = run()
    assert result.environment.numba is None
    assert "vitprune[cpu]" in result.notes[-1]


def test_real_images_meet_the_target(run: Bench, tmp_path: Path) -> None:
    data = samples.write_data(tmp_path / "data", train=64, test=64)
    result = run("pruning.before_blocks=[1,3]", data=data, batch_sizes=(48,), calibration_images=64)
    assert result.images == "48 images of ./data, split test"
    assert not result.notes
    assert result.cases[0].macs_ratio == pytest.approx(0.65, abs=0.02)


def test_defaults(run: Bench) -> None:
    result = run(targets=None)
    assert [case.target for case in result.cases] == [0.8, 0.65, 0.5, 0.35]
    assert {(case.image_size, case.dtype) for case in result.cases} == {(32, "float32")}


def test_a_recipe_s_dtype(run: Bench) -> None:
    assert run("model.dtype=bfloat16").cases[0].dtype == "bfloat16"


def test_thresholds_of_its_own(run: Bench, checkpoint: Path, tmp_path: Path) -> None:
    dense = vitprune.load(checkpoint)
    spec = vitprune.PruningSpec(before_blocks=[2, 4], thresholds=[0.005, 0.01])
    pruned = vitprune.save(vitprune.prune_(dense, spec), tmp_path / "pruned", processor=load_processor(str(checkpoint)))
    result = run(target=pruned, targets=None)
    assert [case.target for case in result.cases] == [None]
    assert result.cases[0].macs_ratio < 1
    assert result.pruning["before_blocks"] == [2, 4]
    also = run(target=pruned, targets=(0.8,))
    assert [case.target for case in also.cases] == [None, 0.8]
    given = run("pruning.before_blocks=[2, 4]", "pruning.thresholds=[0.005, 0.01]", targets=None)
    assert given.cases[0].macs_ratio == pytest.approx(result.cases[0].macs_ratio)


def test_a_target_out_of_reach_is_a_failure(run: Bench) -> None:
    result = run("pruning.before_blocks=[5]", targets=(0.95, 0.2))
    assert [case.target for case in result.cases] == [0.95]
    (failure,) = result.failures
    assert (failure.target, failure.what, failure.batch_size) == (0.2, "calibration to 20 %", None)
    assert "20.0% can't be met by pruning before blocks [5]" in failure.reason


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError("it would take 9.0 GiB")]
)
def test_out_of_memory_is_a_failure_and_the_rest_goes_on(
    run: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    measure = Lineup.measure

    def fails(self: Lineup, batch_size: int, repeats: int) -> Any:
        if batch_size == 4:
            raise error
        return measure(self, batch_size, repeats)

    monkeypatch.setattr(Lineup, "measure", fails)
    result = run(batch_sizes=(2, 4, 8))
    assert [case.batch_size for case in result.cases] == [2, 8]
    (failure,) = result.failures
    assert (failure.batch_size, failure.what, failure.mode) == (4, "inference", "eager")
    assert failure.reason == str(error)


def test_what_compilation_cannot_do_is_a_failure(run: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: object) -> None:
        vars(model)["forward"] = lambda *args, **kwargs: (_ for _ in ()).throw(TypeError("can't be traced\nat line 3"))

    monkeypatch.setattr("vitprune.bench.inference.compile_", refuse)
    result = run(modes=("eager", "compiled"))
    assert [case.mode for case in result.cases] == ["eager"]
    (failure,) = result.failures
    assert (failure.mode, failure.batch_size, failure.reason) == ("compiled", 2, "can't be traced")


def test_our_bugs_stop_it(run: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Lineup, batch_size: int, repeats: int) -> Any:
        raise KeyError("ours")

    monkeypatch.setattr(Lineup, "measure", broken)
    with pytest.raises(KeyError, match="ours"):
        run()


def test_a_broken_run_keeps_what_it_has(run: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Lineup.measure

    def interrupted(self: Lineup, batch_size: int, repeats: int) -> Any:
        if batch_size == 4:
            raise KeyboardInterrupt
        return measure(self, batch_size, repeats)

    monkeypatch.setattr(Lineup, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(batch_sizes=(2, 4))
    kept = Benchmark.load(tmp_path / "out" / "bench.json")
    assert [case.batch_size for case in kept.cases] == [2]


def test_a_size_that_cannot_be_is_said_before_anything_is_measured(run: Bench, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes no images of 2 px"):
        run(image_sizes=(32, 2))
    assert not (tmp_path / "out").exists()


def test_images_that_are_not_square_are_named(run: Bench, checkpoint: Path, tmp_path: Path) -> None:
    ViTImageProcessorPil(size={"height": 32, "width": 48}).save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="its images are 32 × 48 px"):
        run()
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_place_for_results(run: Bench, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="out is no folder"):
        run()
    assert (tmp_path / "out").read_text() == "mine"


def test_only_images(run: Bench, tmp_path: Path) -> None:
    video = samples.write_checkpoint(tmp_path / "video", "videomae")
    with pytest.raises(ValueError, match="takes videos, and recipes read images"):
        run(target=video)
