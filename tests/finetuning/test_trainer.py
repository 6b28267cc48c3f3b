"""A pruned model in transformers' Trainer: the budget is held, met at the end, and PEFT's wrappers don't matter."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

import vitprune
from vitprune.budget.calibration import mean_ratio
from vitprune.models import context
from vitprune.models.module import pruning_of

CLOSE = 0.01  # of the dense MACs
BUDGET = 0.7
SPECS: dict[str, dict[str, Any]] = {
    "as-vit": {**tiny.AS_VIT, "dropped": "merge"},
    "redundancy": {"before_blocks": [1, 3, 4]},
}


class Pictures(Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.x, self.labels = tiny.images(32), torch.arange(32) % 5

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.x[index], "labels": self.labels[index]}


def calibrated(name: str) -> PreTrainedModel:
    model = vitprune.prune_(tiny.build("vit"), vitprune.PruningSpec(**SPECS[name]))
    vitprune.calibrate(model, [tiny.images(16)], BUDGET, progress=False)
    return model


def train(
    model: Any,
    folder: Path,
    *callbacks: Any,
    steps: int = 12,
    save_steps: int | None = None,
    resume: Path | None = None,
    **more: Any,
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no" if save_steps is None else "steps",
        save_steps=save_steps or steps,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **more,
    )
    data = {"train_dataset": Pictures(), "eval_dataset": Pictures() if more else None}
    trainer = Trainer(model=model, args=arguments, callbacks=list(callbacks), **data)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("thresholds", ["scaled", "learned", "calibrated"])
@pytest.mark.parametrize("execution", ["packed", "masked"])
def test_the_budget_is_held_and_met(tmp_path: Path, name: str, thresholds: Any, execution: Any) -> None:
    model = calibrated(name)
    before = copy.deepcopy(model.state_dict())
    held = [tiny.images(40)[24:]]
    callback = vitprune.TrainerCallback(BUDGET, held, thresholds=thresholds, execution=execution)
    train(model, tmp_path, callback)
    assert len(callback.ratios) == 12
    assert abs(mean_ratio(model, held) - BUDGET) < CLOSE
    after = model.state_dict()
    assert any(not torch.equal(after[key], before[key]) for key in before if "query" in key or "q_proj" in key)
    # as it was, but for what was learned
    assert pruning_of(model).execution == "masked"
    assert pruning_of(model).levels.requires_grad
    assert len(model._forward_pre_hooks) == len(calibrated(name)._forward_pre_hooks)


def test_training_without_a_budget_is_said_once(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"thresholds learn here from the loss alone.*vitprune\.TrainerCallback"
    ) as said:
        train(calibrated("as-vit"), tmp_path)
    assert len([one for one in said if "thresholds learn here" in str(one.message)]) == 1
    frozen = calibrated("as-vit")
    pruning_of(frozen).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(frozen, tmp_path)
        train(calibrated("as-vit"), tmp_path, vitprune.TrainerCallback(BUDGET, [tiny.images(16)]))


def test_learned_thresholds_move_apart(tmp_path: Path) -> None:
    """By the task's gradient, not by one factor alone."""
    model = calibrated("as-vit")
    before = pruning_of(model).levels.detach().clone()
    train(model, tmp_path, vitprune.TrainerCallback(BUDGET, [tiny.images(16)], thresholds="learned"))
    factors = pruning_of(model).levels.detach() / before
    assert (factors.max() / factors.min()).item() > 1.0001
    scaled = calibrated("as-vit")
    train(scaled, tmp_path, vitprune.TrainerCallback(BUDGET, [tiny.images(16)]))
    factors = pruning_of(scaled).levels.detach() / before
    assert_close(factors.max(), factors.min(), rtol=1e-5, atol=0.0)


class Watch(transformers.TrainerCallback):
    """Notes the thresholds of each step."""

    def __init__(self, ours: vitprune.TrainerCallback) -> None:
        self.ours = ours
        self.seen: dict[int, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.ours._training is not None
        self.seen[state.global_step] = self.ours._training.levels(pruning_of(kwargs["model"]).levels).detach()


@pytest.mark.parametrize("thresholds", ["scaled", "learned"])
def test_checkpoints_on_the_way_have_the_thresholds_of_their_step(tmp_path: Path, thresholds: Any) -> None:
    model = calibrated("as-vit")
    callback = vitprune.TrainerCallback(BUDGET, [tiny.images(16)], thresholds=thresholds)
    watch = Watch(callback)
    train(model, tmp_path, callback, watch, save_steps=6)
    assert not torch.equal(watch.seen[6], watch.seen[12])
    for step, levels in watch.seen.items():
        if step in (6, 12):
            assert_close(pruning_of(vitprune.load(tmp_path / f"checkpoint-{step}")).levels.detach(), levels)
    again = vitprune.TrainerCallback(BUDGET, [tiny.images(16)], thresholds=thresholds)
    train(calibrated("as-vit"), tmp_path / "again", again, resume=tmp_path / "checkpoint-6")
    assert again._training is not None
    assert again._training.starts == pytest.approx(watch.seen[6].tolist())
    assert abs(sum(again.ratios[-3:]) / 3 - BUDGET) < 0.1


@pytest.mark.parametrize("thresholds", ["scaled", "learned"])
def test_the_best_checkpoint_is_taken_with_its_thresholds(tmp_path: Path, thresholds: Any) -> None:
    model = calibrated("as-vit")
    callback = vitprune.TrainerCallback(BUDGET, [tiny.images(16)], thresholds=thresholds)
    watch = Watch(callback)
    best = {"eval_strategy": "steps", "eval_steps": 6, "load_best_model_at_end": True, "greater_is_better": True}
    trainer = train(model, tmp_path, callback, watch, save_steps=6, metric_for_best_model="loss", **best)
    step = trainer.state.best_global_step
    assert step == 6, "the loss falls, so that the first is the worst, which is asked for"
    factors = pruning_of(model).levels.detach() / watch.seen[step]  # scaled to the budget afterwards
    assert_close(factors, factors[:1].expand_as(factors))


def test_the_price_of_macs_is_in_the_models_loss(tmp_path: Path) -> None:
    model = calibrated("as-vit").train()
    callback = vitprune.TrainerCallback(BUDGET, [tiny.images(4)], thresholds="learned")
    arguments: Any = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    callback.on_train_begin(arguments, None, None, model=model)  # type: ignore[arg-type]
    assert callback._training is not None
    x, labels = tiny.images(4), torch.arange(4)
    losses = []
    for log_factor in (0.0, 0.3):
        callback._training.log_factor = log_factor
        losses.append(model(x, labels=labels))
    plain = torch.nn.functional.cross_entropy(losses[1].logits, labels)
    ratio = callback._since[1].mean()
    assert_close(losses[1].loss, plain + callback._training.price(2.0) * ratio.float(), rtol=1e-5, atol=1e-6)
    # of four images of a step that has twelve over its parts and processes, Trainer wants a third of the mean
    third = model(x, labels=labels, num_items_in_batch=torch.tensor(12))
    assert_close(third.loss, losses[1].loss / 3, rtol=1e-5, atol=1e-6)


def test_trainer_says_how_many_images_a_step_has(tmp_path: Path) -> None:
    seen = []

    class Watch(vitprune.TrainerCallback):
        def _leave(self, module: Any, args: Any, inputs: dict[str, Any], output: Any) -> Any:
            seen.append(int(inputs["num_items_in_batch"]))
            return super()._leave(module, args, inputs, output)

    train(
        calibrated("as-vit"),
        tmp_path,
        Watch(BUDGET, [tiny.images(16)], thresholds="learned"),
        steps=2,
        gradient_accumulation_steps=2,
    )
    assert seen == [16] * 4


def test_thresholds_do_not_learn_without_the_price(tmp_path: Path) -> None:
    callback = vitprune.TrainerCallback(BUDGET, [tiny.images(4)], thresholds="learned")
    with pytest.raises(ValueError, match=r"adds the price of MACs to the model's own loss.*thresholds='scaled'"):
        train(calibrated("as-vit"), tmp_path, callback, label_smoothing_factor=0.1)


def test_what_would_go_wrong_is_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget is 65"):
        vitprune.TrainerCallback(65, [])
    with pytest.raises(ValueError, match="isn't pruned"):
        train(tiny.build("vit"), tmp_path, vitprune.TrainerCallback(0.5, [tiny.images(4)]))
    raw = vitprune.prune_(tiny.build("vit"), vitprune.PruningSpec())
    with pytest.raises(ValueError, match=r"call vitprune\.calibrate"):
        train(raw, tmp_path, vitprune.TrainerCallback(0.5, [tiny.images(4)]))


LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(pixel_values=tiny.images(6)).logits


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("saved", [None, ["vitprune"], ["vitprune", "classifier"]], ids=str)
def test_lora_trains_is_saved_loaded_and_merged(tmp_path: Path, saved: list[str] | None) -> None:
    base = calibrated("as-vit")
    vitprune.save(base, tmp_path / "base")
    model = get_peft_model(base, LoraConfig(**LORA, modules_to_save=saved))
    held = [tiny.images(40)[24:]]
    train(model, tmp_path, vitprune.TrainerCallback(BUDGET, held))
    assert abs(mean_ratio(model, held) - BUDGET) < CLOSE
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded: Any = vitprune.load(tmp_path / "base")
    again = PeftModel.from_pretrained(loaded, str(tmp_path / "adapter"))
    if saved is None:  # the adapter has no thresholds: those that the budget was met with are the base model's
        vitprune.scale_to_budget(again, held, BUDGET, progress=False)
        assert abs(mean_ratio(again, held) - BUDGET) < CLOSE
    else:
        assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
    before = logits(again)
    merged: Any = again.merge_and_unload()
    assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)
    vitprune.save(merged, tmp_path / "merged")
    assert_close(logits(vitprune.load(tmp_path / "merged")), logits(merged), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_copy_that_peft_trains_is_in_force() -> None:
    model: Any = get_peft_model(calibrated("as-vit"), LoraConfig(**LORA, modules_to_save=["vitprune"]))
    model.train()(pixel_values=tiny.images(4)).logits.sum().backward()
    copies = {name: weight for name, weight in model.named_parameters() if "modules_to_save" in name}
    (thresholds,) = copies.values()
    assert thresholds is pruning_of(model).levels
    assert thresholds.grad is not None
    with torch.no_grad():
        thresholds.fill_(1.0)
    model.eval()
    with vitprune.trace(model) as seen, torch.no_grad():
        model(pixel_values=tiny.images(4))
    assert seen.keep_masks[-1].sum(1).max() <= pruning_of(model).spec.min_tokens
    with model.disable_adapter(), vitprune.trace(model) as seen, torch.no_grad():
        model(pixel_values=tiny.images(4))
    assert seen.keep_masks[-1].sum(1).max() > pruning_of(model).spec.min_tokens


class Interrupt(transformers.TrainerCallback):
    """Breaks a training off behind its fifth step, or in the next one's forward."""

    def __init__(self, inside: bool) -> None:
        self.inside = inside

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < 5:
            return
        if not self.inside:
            raise KeyboardInterrupt
        last = kwargs["model"].get_submodule("classifier")
        self.handle = last.register_forward_pre_hook(self._interrupt)

    def _interrupt(self, module: Any, args: Any) -> None:
        self.handle.remove()
        raise KeyboardInterrupt


@pytest.mark.parametrize("thresholds", ["scaled", "learned"])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_training_goes_on_behind_one_that_broke_off(tmp_path: Path, thresholds: Any, same: bool, inside: bool) -> None:
    model, held = calibrated("as-vit"), [tiny.images(40)[24:]]
    callback = vitprune.TrainerCallback(BUDGET, held, thresholds=thresholds)
    watch = Watch(callback)
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path, callback, watch, Interrupt(inside))
    again = callback if same else vitprune.TrainerCallback(BUDGET, held, thresholds=thresholds)
    told = len(again.ratios)
    train(model, tmp_path, again, steps=1)
    assert abs(again.ratios[told] - callback.ratios[4]) < 0.1
    assert context.current() == context.Context()
    assert again._training is not None
    assert again._training.starts == pytest.approx(watch.seen[5].tolist())
    assert abs(mean_ratio(model, held) - BUDGET) < CLOSE
    assert pruning_of(model).execution == "masked"
    assert len(model._forward_pre_hooks) == len(calibrated("as-vit")._forward_pre_hooks)
    vitprune.save(model, tmp_path / "saved")
    assert_close(pruning_of(vitprune.load(tmp_path / "saved")).levels, pruning_of(model).levels)
