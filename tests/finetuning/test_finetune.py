"""Fine-tuning: what it changes, what it reaches, how it fails."""

from __future__ import annotations

import copy
import math
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import samples
import tiny
import torch
from tiny import Tolerance
from torch.testing import assert_close
from transformers import PreTrainedModel, ViTConfig, ViTImageProcessorPil, ViTModel

import vitprune
from vitprune.budget.calibration import calibrate, mean_ratio, scale_to_budget
from vitprune.budget.latency_table import CostTable
from vitprune.data.images import Images, load_images
from vitprune.data.splits import Table
from vitprune.data.training_batches import _order
from vitprune.finetuning.finetune import NonFiniteLoss, finetune, require_trainable
from vitprune.finetuning.losses import answer_losses
from vitprune.finetuning.optimization import build_optimizer
from vitprune.finetuning.state import States
from vitprune.finetuning.step import TrainStep
from vitprune.finetuning.student import Student
from vitprune.finetuning.thresholds import GAIN, ThresholdTraining
from vitprune.measure.answers import KINDS
from vitprune.measure.outputs import ImageModel
from vitprune.models.module import pruning_of
from vitprune.recipe.schema import DataSpec, FinetuneSpec, LossWeights, PruningSpec, SplitSpec, ThresholdMode
from vitprune.reports.results import Training
from vitprune.runtime import distributed, signals

BUDGET = 0.6
BOTH = LossWeights(task=1.0, distillation=0.5)
SPEC = FinetuneSpec(epochs=1, batch_size=8, learning_rate=1e-3, augmentation="none", losses=BOTH)
LEARNED = SPEC.model_copy(update={"thresholds": "learned"})
# sums of floats in another order, through AdamW
SAME = Tolerance(rtol=1e-5, atol=1e-5)
EXACT = Tolerance(rtol=0.0, atol=0.0)
GREY = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.5])


def images(tmp_path: Path, *, labelled: bool = True) -> Images:
    data = DataSpec(path=str(samples.write_data(tmp_path / "data", labelled=labelled)))
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return load_images(data, SplitSpec(split="train"), processor, id2label=None)


def models(data: Images, **spec: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The dense model, and a pruned one calibrated to the budget."""
    dense = tiny.build("vit")
    settings = {**tiny.AS_VIT, "dropped": "merge", **spec}
    pruned = vitprune.prune_(copy.deepcopy(dense), PruningSpec.model_validate(settings, strict=False))
    calibrate(pruned, pixels(data), BUDGET, progress=False)
    return dense, pruned


def pixels(data: Images) -> list[torch.Tensor]:
    return [batch["pixel_values"] for batch in data.loader(16)]


def test_it_learns_the_task_moves_thresholds_and_meets_the_budget(tmp_path: Path) -> None:
    data = images(tmp_path)
    dense, pruned = models(data)
    teacher_before = copy.deepcopy(dense.state_dict())
    thresholds_before = pruning_of(pruned).levels.detach().clone()
    history = finetune(pruned, dense, data, LEARNED.model_copy(update={"epochs": 8.0}), BUDGET, progress=False)
    assert history.steps == len(history.records) == 48
    assert history.training is None
    tasks = [record["task"] for record in history.records]
    assert sum(tasks[-6:]) < 0.5 * sum(tasks[:6])
    assert (pruning_of(pruned).levels != thresholds_before).all()
    assert_close(dict(dense.state_dict()), dict(teacher_before), **EXACT)
    assert not pruned.training
    scale_to_budget(pruned, pixels(data), BUDGET, progress=False)
    assert mean_ratio(pruned, pixels(data)) == pytest.approx(BUDGET, abs=0.01)


def test_with_a_latency_table_the_budget_is_one_of_time(tmp_path: Path) -> None:
    data = images(tmp_path)
    dense, pruned = models(data)
    # a pruned model that takes no less time, whatever leaves
    table = CostTable(
        batch_size=8,
        tokens=(1.0, 65.0),
        curves=((1.0, 1.0),),
        kinds=(0,) * 6,
        stages=(0.0, 0.0),
        outside_blocks=0.0,
        dense_tokens=65,
        dense_seconds=6.0,
    )
    pruning_of(pruned).latency = table
    spec = SPEC.model_copy(update={"epochs": 0.5})
    for step, record in enumerate(finetune(pruned, dense, data, spec, BUDGET, progress=False).records):
        assert record["ratio"] == pytest.approx(1.0)
        assert record["factor"] == pytest.approx(math.exp(step * GAIN * 0.4))


@pytest.mark.parametrize("thresholds", get_args(ThresholdMode))
@pytest.mark.parametrize("score", ["head-weighted-class-attention", "redundancy"])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_every_policy_trains(tmp_path: Path, thresholds: str, score: str, mixed_precision: str) -> None:
    data = images(tmp_path)
    dense, pruned = models(data, score=score)
    spec = SPEC.model_copy(update={"mixed_precision": mixed_precision, "thresholds": thresholds})
    history = finetune(pruned, dense, data, spec, BUDGET, progress=False)
    assert all(record["loss"] < 100 for record in history.records)
    assert all(p.isfinite().all() for p in pruned.parameters())


def test_levels_of_several_budgets_hold_for_other_weights_alone(tmp_path: Path) -> None:
    data = images(tmp_path)
    dense, pruned = models(data)
    assert vitprune.find_points(pruned, data, [0.8, 0.6], progress=False) == vitprune.points_of(pruned)
    finetune(pruned, dense, data, SPEC.model_copy(update={"steps": 1}), BUDGET, progress=False)
    assert vitprune.points_of(pruned) == ()


def test_without_labels_the_teacher_is_enough(tmp_path: Path) -> None:
    data = images(tmp_path, labelled=False)
    dense, pruned = models(data)
    spec = SPEC.model_copy(update={"losses": LossWeights()})
    history = finetune(pruned, dense, data, spec, BUDGET, progress=False)
    stages = {"kept/before_block_2", "kept/before_block_4"}
    assert set(history.records[0]) == {"loss", "distillation", "ratio", "kept", "factor", "lr", *stages}
    with pytest.raises(ValueError, match=r"finetune\.losses\.task: is 1, but the training images have no labels"):
        finetune(pruned, dense, data, SPEC, BUDGET, progress=False)


def test_fixed_counts_train_and_have_no_thresholds_to_learn(tmp_path: Path) -> None:
    data = images(tmp_path)
    dense, pruned = models(data, select="top-k")
    counts = pruning_of(pruned).levels.clone()
    history = finetune(pruned, dense, data, SPEC, BUDGET, progress=False)
    assert all(record["ratio"] == pytest.approx(BUDGET, abs=0.02) for record in history.records)
    assert torch.equal(pruning_of(pruned).levels, counts)
    with pytest.raises(ValueError, match=r"thresholds: learned has none to learn, as pruning\.select is 'top-k'"):
        finetune(pruned, dense, data, LEARNED, BUDGET, progress=False)


def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path: Path) -> None:
    data = images(tmp_path)
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        dense, pruned = models(data, dropped="leave")
        sizes = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        spec = LEARNED.model_copy(update=sizes | {"epochs": 2.0, "augmentation": "light", "learning_rate": 2e-5})
        history = finetune(pruned, dense, data, spec, BUDGET, progress=False)
        assert history.steps == 12
        results.append((history.records, dict(pruned.state_dict())))
    assert_close(results[0], results[1], **SAME)


@pytest.mark.parametrize("thresholds", ["scaled", "learned"])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, thresholds: str) -> None:
    data = images(tmp_path)
    results = []
    for checkpointing in (False, True):
        dense, pruned = models(data)
        changes = {"gradient_checkpointing": checkpointing, "epochs": 0.5, "thresholds": thresholds}
        spec = SPEC.model_copy(update=changes)
        history = finetune(pruned, dense, data, spec, BUDGET, progress=False)
        results.append((history.records, dict(pruned.state_dict())))
    assert_close(results[0], results[1], **SAME)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_spares_the_weights(tmp_path: Path) -> None:
    data = images(tmp_path)
    dense, pruned = models(data)
    spec = SPEC.model_copy(update={"learning_rate": 1e30, "epochs": 4.0})
    with pytest.raises(NonFiniteLoss, match=r"isn't finite at step \d+.*lower finetune\.learning_rate"):
        finetune(pruned, dense, data, spec, BUDGET, progress=False)
    assert pruned(tiny.images(2)).logits.abs().max() < 100


def test_a_model_that_is_broken_from_the_start_stops_at_the_first_step(tmp_path: Path) -> None:
    data = images(tmp_path)
    dense, pruned = models(data)
    with torch.no_grad():
        pruned.get_parameter("classifier.bias")[0] = torch.nan
    with pytest.raises(NonFiniteLoss, match="isn't finite at step 1"):
        finetune(pruned, dense, data, SPEC, BUDGET, progress=False)


def test_mixed_precision_ends_with_training(tmp_path: Path) -> None:
    data = images(tmp_path)
    dense, pruned = models(data)
    spec = SPEC.model_copy(update={"mixed_precision": "bf16", "epochs": 0.5})
    finetune(pruned, dense, data, spec, BUDGET, progress=False)
    again = copy.deepcopy(pruned)
    assert "forward" not in vars(pruned)
    assert_close(pruned(tiny.images(2)).logits, again(tiny.images(2)).logits, **EXACT)


def test_the_next_training_may_have_another_precision(tmp_path: Path) -> None:
    data = images(tmp_path)
    dense, pruned = models(data)
    for precision in ("no", "bf16", "no"):
        spec = SPEC.model_copy(update={"mixed_precision": precision, "epochs": 0.25})
        finetune(pruned, dense, data, spec, BUDGET, progress=False)


@pytest.mark.parametrize("budget", [65, 0.0, -1.0, float("nan")])
def test_a_budget_is_a_part_of_the_dense_models_cost(tmp_path: Path, budget: float) -> None:
    data = images(tmp_path)
    dense, pruned = models(data)
    with pytest.raises(ValueError, match=r"budget is .*such as 0\.65"):
        finetune(pruned, dense, data, SPEC, budget, progress=False)


def test_a_teacher_answers_as_its_student(tmp_path: Path) -> None:
    data = images(tmp_path)
    dense, pruned = models(data)
    with pytest.raises(ValueError, match=r"name the dense model that the pruned one was made of"):
        finetune(pruned, ViTModel(ViTConfig(**tiny.SHAPE)), data, SPEC, BUDGET, progress=False)
    with pytest.raises(ValueError, match="the teacher is the model itself"):
        finetune(pruned, pruned, data, SPEC, BUDGET, progress=False)
    other: Any = dense
    other.classifier = torch.nn.Linear(48, 1)
    with pytest.raises(ValueError, match=r"name the dense model that the pruned one was made of"):
        finetune(pruned, other, data, SPEC, BUDGET, progress=False)


def test_thresholds_need_a_start(tmp_path: Path) -> None:
    pruned = vitprune.prune_(tiny.build("vit"), PruningSpec(**tiny.AS_VIT))
    with pytest.raises(ValueError, match="call calibrate first"):
        finetune(pruned, tiny.build("vit"), images(tmp_path), SPEC, BUDGET, progress=False)


@pytest.mark.parametrize("temperature", [1e-3, 4e-5])
def test_a_step_of_a_threshold_moves_a_part_of_the_patches(temperature: float) -> None:
    """At 1,369 tokens scores lie 28 times as near to each other as at 49."""
    spec = PruningSpec(**tiny.AS_VIT, thresholds=[0.02, 0.03], temperature=temperature)
    model = vitprune.prune_(tiny.build("vit"), spec)
    parameters, training = pruning_of(model).levels, ThresholdTraining.of(pruning_of(model), "learned", BUDGET)
    optimizer = build_optimizer(model, LEARNED)
    before = training.levels(parameters).detach()
    parameters.grad = torch.tensor([3e-4, -20.0])
    optimizer.step()
    # by its temperature a threshold knows how near the scores are: half a hundredth of them lies within one
    moved = (training.levels(parameters).detach() - before) / (temperature / 0.005)
    assert_close(moved, LEARNED.threshold_learning_rate * torch.tensor([-1.0, 1.0]), rtol=1e-2, atol=0.0)


def test_the_budget_is_held_while_weights_learn(tmp_path: Path) -> None:
    data = images(tmp_path)
    ratios = {}
    for thresholds in ("calibrated", "scaled", "learned"):
        dense, pruned = models(data)
        with torch.no_grad():
            pruning_of(pruned).levels.mul_(1.2)  # as if weights had learned for long
        spec = SPEC.model_copy(update={"epochs": 20.0, "learning_rate": 1e-3, "thresholds": thresholds})
        records = finetune(pruned, dense, data, spec, BUDGET, progress=False).records
        ratios[thresholds] = sum(record["ratio"] for record in records[60:]) / 60
    assert abs(ratios["calibrated"] - BUDGET) > 0.02
    assert ratios["scaled"] == pytest.approx(BUDGET, abs=0.01)
    assert ratios["learned"] == pytest.approx(BUDGET, abs=0.01)


@pytest.mark.parametrize(("train", "learns"), [("norms", "norm"), ("thresholds", "vitprune.thresholds")])
def test_parts_of_a_model_learn_alone(tmp_path: Path, train: str, learns: str) -> None:
    data = images(tmp_path)
    dense, pruned = models(data)
    before = {name: weight.clone() for name, weight in pruned.state_dict().items()}
    spec = SPEC.model_copy(update={"train": train, "thresholds": "learned" if train == "thresholds" else "calibrated"})
    finetune(pruned, dense, data, spec, BUDGET, progress=False)
    changed = {name for name, weight in pruned.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if learns in name}
    assert all(parameter.requires_grad for parameter in pruned.parameters())


def test_the_last_tokens_learn_from_the_teachers(tmp_path: Path) -> None:
    data = images(tmp_path)
    dense, pruned = models(data)
    losses = LossWeights(task=0.0, distillation=1e-9, tokens=1.0)
    spec = SPEC.model_copy(update={"losses": losses, "epochs": 16.0})
    records = finetune(pruned, dense, data, spec, BUDGET, progress=False).records
    tokens = [record["tokens"] for record in records]
    assert sum(tokens[-6:]) < 0.7 * sum(tokens[:6])


def held_out_loss(pruned: PreTrainedModel, dense: PreTrainedModel, data: Images) -> float:
    (batch,) = data.loader(1000)
    with torch.no_grad():
        logits, taught = pruned(batch["pixel_values"]).logits, dense(batch["pixel_values"]).logits
    losses = answer_losses(logits, taught, batch["labels"], SPEC.losses, KINDS["single-label"])
    return sum(loss.item() for loss in losses.values())


def spoil_the_last_check(monkeypatch: pytest.MonkeyPatch, images: int, checks: int) -> None:
    """Have it find a loss that nothing is worse than, as if training had broken the model."""
    look, seen = TrainStep.look, []

    def spoiled(self: TrainStep, batch: Any, taught: Any = None) -> dict[str, float]:
        seen.append(len(batch["pixel_values"]))
        found = look(self, batch, taught)
        return {**found, "task": found["task"] + 100.0} if sum(seen) > images * checks else found

    monkeypatch.setattr(TrainStep, "look", spoiled)


@pytest.mark.parametrize("thresholds", ["scaled", "learned"])
def test_the_best_state_is_kept(tmp_path: Path, thresholds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train, holdout = images(tmp_path).holdout(16, 0)
    dense, pruned = models(train)
    spec = SPEC.model_copy(update={"epochs": 6.0, "checks": 12, "thresholds": thresholds, "learning_rate": 0.03})
    spoil_the_last_check(monkeypatch, len(holdout), 12)
    training = finetune(pruned, dense, train, spec, BUDGET, holdout=holdout, progress=False).training
    assert training is not None
    assert [check.step for check in training.checks] == [*range(0, training.steps + 1, training.steps // 12)]
    losses = {check.step: check.loss for check in training.checks if check.counts and check.loss is not None}
    best = min(losses, key=lambda step: losses[step])
    assert training.kept_step == best
    assert best not in (0, training.steps)
    assert held_out_loss(pruned, dense, holdout) == pytest.approx(losses[best], rel=1e-4)


def test_what_gains_nothing_is_not_kept(tmp_path: Path) -> None:
    train, holdout = images(tmp_path).holdout(16, 0)
    dense, pruned = models(train)
    points = vitprune.find_points(pruned, train, [0.8, 0.6], progress=False)
    before = copy.deepcopy(pruned.state_dict())
    spec = SPEC.model_copy(update={"losses": LossWeights(task=0.0, distillation=1.0), "learning_rate": 0.3})
    training = finetune(pruned, dense, train, spec, BUDGET, holdout=holdout, progress=False).training
    assert training is not None
    assert training.kept_step == 0
    assert_close(dict(pruned.state_dict()), dict(before), **EXACT)
    assert vitprune.points_of(pruned) == points


def test_fsdp_is_told_to_shard_blocks(tmp_path: Path) -> None:
    _, pruned = models(images(tmp_path))
    thresholds = ThresholdTraining.of(pruning_of(pruned), "scaled", BUDGET)
    assert Student(ImageModel.of(pruned), thresholds, wants_tokens=False)._no_split_modules == ["ViTLayer"]


def test_the_teacher_may_be_in_half_precision(tmp_path: Path) -> None:
    data, rest = images(tmp_path).holdout(16, 0)
    dense, pruned = models(data)
    spec = SPEC.model_copy(update={"steps": 2})
    history = finetune(pruned, dense.bfloat16(), data, spec, BUDGET, holdout=rest, progress=False)
    assert all(math.isfinite(record["distillation"]) for record in history.records)


def test_without_a_held_out_image_the_last_state_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = images(tmp_path)
    dense, pruned = models(data)
    before = {name: weight.clone() for name, weight in pruned.state_dict().items()}
    monkeypatch.setattr("vitprune.finetuning.held_out.HeldOut.look", lambda *_: False)
    history = finetune(pruned, dense, data, SPEC, BUDGET, holdout=data, progress=False)
    assert history.training is None
    assert not torch.equal(pruned.get_parameter("classifier.weight"), before["classifier.weight"])


def test_a_look_at_all_tokens_counts_what_inference_does(tmp_path: Path) -> None:
    """A class head reads few tokens of the last block, and the loss on tokens all of them."""
    data = images(tmp_path)
    ratios = []
    for tokens in (0.0, 1.0):
        dense, pruned = models(data)
        spec = SPEC.model_copy(update={"losses": BOTH.model_copy(update={"tokens": tokens}), "steps": 1})
        training = finetune(pruned, dense, data, spec, BUDGET, holdout=data, progress=False).training
        assert training is not None
        ratios.append(training.checks[0].ratio)
    assert ratios[0] == pytest.approx(ratios[1])


def test_both_models_are_as_they_were_but_for_what_was_learned(tmp_path: Path) -> None:
    data = images(tmp_path)
    dense, pruned = models(data)
    dense.get_parameter("classifier.bias").requires_grad_(False)
    before = {name: weight.requires_grad for name, weight in dense.named_parameters()}
    pruned.activation_checkpointing_enable()
    spec = SPEC.model_copy(update={"steps": 1, "gradient_checkpointing": True})
    finetune(pruned, dense, data, spec, BUDGET, progress=False)
    assert {name: weight.requires_grad for name, weight in dense.named_parameters()} == before
    assert pruning_of(pruned).execution == "masked"
    assert any(getattr(module, "gradient_checkpointing", False) for module in pruned.modules())


def test_weights_that_could_not_learn_are_refused(tmp_path: Path) -> None:
    data = images(tmp_path)
    dense, pruned = models(data)
    points = vitprune.find_points(pruned, data, [0.8, 0.6], progress=False)
    with pytest.raises(ValueError, match=r"weights in bfloat16, in which small steps are lost; call model\.float\(\)"):
        finetune(copy.deepcopy(pruned).bfloat16(), dense, data, SPEC, BUDGET, progress=False)
    frozen = copy.deepcopy(pruned).requires_grad_(False)
    with pytest.raises(ValueError, match="has nothing that learns with train: all; all of that is frozen"):
        finetune(frozen, dense, data, SPEC, BUDGET, progress=False)
    half = SPEC.model_copy(update={"mixed_precision": "fp16"})
    with pytest.raises(ValueError, match=r"finetune\.mixed_precision: is fp16, which CPUs don't train in"):
        finetune(pruned, dense, data, half, BUDGET, progress=False)
    assert vitprune.points_of(pruned) == vitprune.points_of(frozen) == points


@pytest.mark.parametrize("steps", [1, 2, 40])
def test_every_step_learns(tmp_path: Path, steps: int) -> None:
    """The rate rises to what was asked for, and neither the first step nor the last has none."""
    data = images(tmp_path)
    dense, pruned = models(data)
    spec = SPEC.model_copy(update={"steps": steps, "warmup": 0.1})
    rates = [record["lr"] for record in finetune(pruned, dense, data, spec, BUDGET, progress=False).records]
    assert all(0 < rate <= 1e-3 for rate in rates)
    warm_up = math.ceil(0.1 * steps)
    assert rates[:warm_up] == pytest.approx([1e-3 * (step + 1) / (warm_up + 1) for step in range(warm_up)])
    assert steps <= warm_up or rates[warm_up] == pytest.approx(1e-3)
    assert rates[warm_up:] == sorted(rates[warm_up:], reverse=True)


def test_a_step_of_broken_images_is_passed_over(tmp_path: Path) -> None:
    """Of a table the images behind it come next, and none twice."""
    data = images(tmp_path)
    dense, pruned = models(data)
    numbers, seen = _order(len(data), 0, 0)[:8].tolist(), list[int]()
    rows: Any = data.rows
    read = rows.reader.read

    def broken(row: Any, number: str) -> Any:
        seen.append(int(number))
        return None if int(number) in numbers else read(row, number)

    reader = SimpleNamespace(read=broken, source=rows.reader.source, processor=rows.reader.processor)
    data = Images(Table(rows.rows, reader, rows.numbers, rows.broken))  # type: ignore[arg-type]
    spec = SPEC.model_copy(update={"steps": 2})
    assert len(finetune(pruned, dense, data, spec, BUDGET, progress=False).records) == 2
    assert sorted(seen[:8]) == sorted(numbers)
    assert len(set(seen)) == len(seen) == 24


def test_images_that_are_all_broken_end_it(tmp_path: Path) -> None:
    data = images(tmp_path)
    dense, pruned = models(data)
    rows: Any = data.rows
    reader = SimpleNamespace(read=lambda *_: None, source=rows.reader.source, processor=rows.reader.processor)
    data = Images(Table(rows.rows, reader, rows.numbers, rows.broken))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data\.train: none of the images left to fine-tune with can be read"):
        finetune(pruned, dense, data, SPEC, BUDGET, progress=False)


def test_sigterm_while_the_last_state_is_written_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = images(tmp_path)
    dense, pruned = models(data)
    save = States.save

    def told(self: States, accelerator: Any, progress: Any, **more: Any) -> None:
        save(self, accelerator, progress, **more)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(States, "save", told)
    spec = SPEC.model_copy(update={"steps": 2})
    (tmp_path / "states").mkdir()
    with signals.watch(), pytest.raises(signals.Terminated):
        finetune(pruned, dense, data, spec, BUDGET, progress=False, states=States.of(spec, tmp_path / "states"))
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["step-000000002"]


def test_a_held_out_loss_that_is_not_finite_is_no_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, holdout = images(tmp_path).holdout(16, 0)
    dense, pruned = models(train, select="top-k")
    look, seen = TrainStep.look, list[int]()

    def overflowing(self: TrainStep, batch: Any, taught: Any = None) -> dict[str, float]:
        seen.append(len(batch["pixel_values"]))
        found = look(self, batch, taught)
        return {**found, "task": math.inf} if sum(seen) > 2 * len(holdout) else found

    monkeypatch.setattr(TrainStep, "look", overflowing)
    spec = SPEC.model_copy(update={"epochs": 4.0, "checks": 2})
    training = finetune(pruned, dense, train, spec, BUDGET, holdout=holdout, progress=False).training
    assert training is not None
    assert [check.loss is None for check in training.checks] == [False, False, True]
    assert [check.counts for check in training.checks][-1] is False
    assert training.kept_step == training.checks[1].step
    assert Training.model_validate_json(training.model_dump_json()) == training


def test_what_a_model_or_its_images_cannot_do_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = images(tmp_path), tiny.build("vit")
    require_trainable(data, SPEC, model, takes_labels=True)
    grey = Images(Table.of(data.rows.rows, replace(data.rows.reader, processor=GREY)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"finetune\.augmentation: 'strong' changes colours"):
        require_trainable(grey, SPEC.model_copy(update={"augmentation": "strong"}), model, takes_labels=True)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match=r"finetune\.gradient_checkpointing: .* can't compute its blocks again"):
        require_trainable(data, SPEC.model_copy(update={"gradient_checkpointing": True}), model, takes_labels=True)
    state = SimpleNamespace(num_processes=3, distributed_type="MULTI_CPU")
    monkeypatch.setattr(distributed, "init", lambda: state)
    with pytest.raises(ValueError, match=r"finetune\.batch_size: 8 can't be shared evenly by 3 processes"):
        require_trainable(data, SPEC, model, takes_labels=True)
    state.distributed_type = "DEEPSPEED"
    with pytest.raises(ValueError, match="doesn't run under DeepSpeed; use FSDP2"):
        require_trainable(data, SPEC, model, takes_labels=True)
