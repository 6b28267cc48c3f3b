"""`vitprune sweep`: points, baselines, resuming, and what can't be had."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up_recipe import RECIPE, recipe

import vitprune
from vitprune.finetuning.losses import NonFiniteLoss
from vitprune.recipe.schema import Recipe
from vitprune.reports.sweep_report import Sweep, sweep_cells, sweep_findings
from vitprune.runs import sweep as module
from vitprune.runs.sweep import BASELINES, SWEEP_JSON, SWEEP_PAGE, sweep

FAST = RECIPE.replace("batch_sizes: [1, 4]", "batch_sizes: [4]").replace("repeats: 3", "repeats: 1")


def test_each_budget_is_a_checkpoint_and_the_curve_falls(tmp_path: Path) -> None:
    told: list[str] = []
    asked = recipe(tmp_path, FAST)
    found = sweep(asked, [0.5, 0.8], output=tmp_path / "sweep", baselines=BASELINES, tell=told.append)
    assert told[:2] == ["vitprune at 80 %", "vitprune at 50 %"]
    assert list(found.methods) == ["vitprune", *BASELINES]
    for points in found.methods.values():
        assert [point.budget for point in points] == [0.8, 0.5]
        assert points[0].ratio > points[1].ratio
        assert [row.batch_size for row in points[0].throughput] == [4]
    assert Sweep.load(tmp_path / "sweep" / SWEEP_JSON) == found
    page = (tmp_path / "sweep" / SWEEP_PAGE).read_text(encoding="utf-8")
    for point in found.points:
        assert (tmp_path / "sweep" / point.folder / "report.html").is_file()
        assert f"{point.folder}/report.html" in page
    assert str(tmp_path) not in page
    assert page.count("Compared with the dense model on") == 1
    own = vitprune.load(tmp_path / "sweep" / "vitprune-50")
    assert vitprune.pruning_of(own).spec.score == "head-weighted-class-attention"
    assert vitprune.pruning_of(vitprune.load(tmp_path / "sweep" / "tome-50")).spec.select == "tome"
    cells = sweep_cells(found)
    assert cells[0][:4] == ("method", "budget", "MACs", "accuracy")
    assert [row[0] for row in cells[1:]] == ["dense", *(name for name in found.methods for _ in range(2))]
    assert any("loss of accuracy is seen" in s or "points below" in s for s in sweep_findings(found))


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, output, applied = recipe(tmp_path, FAST), tmp_path / "sweep", []

    def apply(part: Recipe, *, restart: bool) -> object:
        applied.append(part.budget.part)
        if len(applied) == 2:
            raise KeyboardInterrupt
        return module_apply(part, restart=restart)

    module_apply = module.apply
    monkeypatch.setattr(module, "apply", apply)
    with pytest.raises(KeyboardInterrupt):
        sweep(asked, [0.8, 0.6], output=output)
    assert len(Sweep.load(output / SWEEP_JSON).points) == 1
    found = sweep(asked, [0.8, 0.6], output=output)
    assert applied == [0.8, 0.6, 0.6]
    assert sweep(asked, [0.8, 0.6], output=output) == found
    more = sweep(asked, [0.8, 0.7], output=output)
    assert applied == [0.8, 0.6, 0.6, 0.7]
    assert [point.budget for point in more.methods["vitprune"]] == [0.8, 0.7, 0.6]
    # what the message of a run out of memory advises, or of one that lost a worker
    easier = asked.model_copy(update={"data": asked.data.model_copy(update={"workers": 1})})
    assert sweep(easier, [0.8, 0.7], output=output) == more
    others = asked.model_copy(update={"seed": 1})
    with pytest.raises(ValueError, match="holds a sweep of another recipe"):
        sweep(others, [0.8], output=output)
    assert [point.budget for point in sweep(others, [0.8], output=output, restart=True).points] == [0.8]


def test_a_budget_that_can_not_be_met_is_listed(tmp_path: Path) -> None:
    asked = recipe(tmp_path, FAST)
    found = sweep(asked, [0.7, 0.01], output=tmp_path / "sweep")
    assert [point.budget for point in found.points] == [0.7]
    (missed,) = found.missed
    assert missed.budget == 0.01
    assert "1.0% can't be met by pruning before blocks [2, 4]" in missed.reason
    assert any(missed.reason in sentence for sentence in sweep_findings(found))
    assert str(tmp_path) not in missed.reason
    assert sweep(asked, [0.7, 0.01], output=tmp_path / "sweep").missed == (missed,), "it is tried again"


def test_a_training_that_diverges_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, module_apply = recipe(tmp_path, FAST), module.apply

    def apply(part: Recipe, *, restart: bool) -> object:
        if part.budget.part == 0.6:
            raise NonFiniteLoss(f"the loss of step 3 is nan; see {part.output.path}.last-good")
        return module_apply(part, restart=restart)

    monkeypatch.setattr(module, "apply", apply)
    found = sweep(asked, [0.8, 0.6, 0.5], output=tmp_path / "sweep")
    assert [point.budget for point in found.points] == [0.8, 0.5]
    assert [missed.reason for missed in found.missed] == ["the loss of step 3 is nan; see vitprune-60.last-good"]


def test_a_second_sweep_into_the_same_output_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, output = recipe(tmp_path, FAST), tmp_path / "sweep"

    def apply(part: Recipe, *, restart: bool) -> object:
        with pytest.raises(ValueError, match=r"is under way .*; wait for it, or choose another output"):
            sweep(asked, [0.7], output=output)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "apply", apply)
    with pytest.raises(KeyboardInterrupt):
        sweep(asked, [0.8], output=output)
    assert not list(tmp_path.glob(".sweep*")), "the lock is left"


def test_the_points_of_a_sweep_are_not_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitprune.runs.apply.push", None)
    asked = recipe(tmp_path, FAST, "vit", "output.push_to_hub=ada/vit")
    assert len(sweep(asked, [0.7], output=tmp_path / "sweep").points) == 1


def test_a_budget_of_time_is_another_sweep(tmp_path: Path) -> None:
    asked = recipe(tmp_path, FAST)
    by_time = recipe(tmp_path, FAST.replace("macs: 60%", "latency: 60%"))
    assert module._fingerprint(asked) != module._fingerprint(by_time)
    assert module._fingerprint(asked) == module._fingerprint(recipe(tmp_path, FAST.replace("60%", "50%")))


def test_what_a_killed_sweep_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "sweep" / ".vitprune-70.run").mkdir(parents=True)
    (tmp_path / "sweep" / "vitprune-90").mkdir()
    assert len(sweep(recipe(tmp_path, FAST), [0.7], output=tmp_path / "sweep").points) == 1


def test_into_a_mounted_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = tmp_path / "volume"
    (volume / "lost+found").mkdir(parents=True)
    (volume / f"{SWEEP_JSON}.7.unfinished").touch()  # of one that was killed in its first moment
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == volume)
    assert [point.folder for point in sweep(recipe(tmp_path, FAST), [0.625], output=volume).points] == ["vitprune-62.5"]
    assert "vitprune, 62.5&nbsp;%</a>" in (volume / SWEEP_PAGE).read_text(encoding="utf-8")
    assert not (volume / ".vitprune.lock").exists()


def test_a_file_is_no_place_for_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "sweep").touch()
    with pytest.raises(ValueError, match=r"sweep is no folder; choose another path"):
        sweep(recipe(tmp_path, FAST), [0.7], output=tmp_path / "sweep")


def test_the_first_failure_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage 99"):
        sweep(recipe(tmp_path, FAST, "vit", "pruning.before_blocks=[99]"), [0.7], output=tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_what_is_no_sweep_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds something that is no sweep"):
        sweep(recipe(tmp_path, FAST), [0.7], output=tmp_path / "mine")
    with pytest.raises(ValueError, match="there is no baseline 'best'"):
        sweep(recipe(tmp_path, FAST), [0.7], output=tmp_path / "sweep", baselines=["best"])


def test_a_baseline_without_thresholds_is_not_trained_where_they_alone_learn(tmp_path: Path) -> None:
    asked = recipe(tmp_path, FAST + "finetune: {steps: 2, holdout: 8, train: thresholds, thresholds: learned}\n")
    found = sweep(asked, [0.8], output=tmp_path / "sweep", baselines=["random"])
    assert not found.missed
    assert [
        vitprune.Report.load(tmp_path / "sweep" / p.folder / "report.json").training is None for p in found.points
    ] == [
        False,
        True,
    ]
