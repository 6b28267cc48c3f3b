"""A recipe becomes a compressed checkpoint: `apply`, read from top to bottom. Also `plan` and `evaluate`.

Knows the order of things; leaves each to its module.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from vitprune.calibration import calibrate, scale_to_budget, uniform_rate, uniform_tokens
from vitprune.checkpoint import load, load_config, load_processor, model_class, require_classifier, require_free, save
from vitprune.data import Images, load_images
from vitprune.evaluation import compare, describe_environment, measure_throughput
from vitprune.families import examine
from vitprune.finetuning import NonFiniteLoss, finetune, require_trainable
from vitprune.pruner import is_pruned, prune_, pruning_of
from vitprune.recipe import Recipe
from vitprune.report import model_card
from vitprune.results import Comparison, Plan, PlanRow, Report

# different batches of the largest size that throughput is measured on
TIMED_BATCHES = 3


def apply(recipe: Recipe) -> Report:
    """Prunes, calibrates, fine-tunes, compares and saves, as the recipe says; returns what was measured.

    Raises:
        ValueError: something in the recipe, its data or its checkpoint doesn't fit; names the place and the way out.
        NonFiniteLoss: fine-tuning broke off; the model from before is saved beside the output path.
    """
    output = Path(recipe.output.path).resolve()
    require_free(output, overwrite=recipe.output.overwrite)
    run = _Run.start(recipe)
    calibrated = None
    if _is_calibrated(recipe):
        calibrate(run.pruned, run.calibration_batches(), recipe.budget.macs, progress=run.is_main)
    if recipe.finetune is not None:
        calibrated = run.compare()
        run.finetune(output)
    comparison = run.compare()
    report = run.report(comparison, calibrated)
    if run.is_main:
        files = {
            "recipe.yaml": _with_versions(recipe, report),
            "report.json": report.model_dump_json(indent=2, by_alias=True) + "\n",
            "README.md": model_card(report, output.name),
        }
        save(run.pruned, output, processor=run.processor, files=files, overwrite=recipe.output.overwrite)
    return report


def evaluate(checkpoint: str, recipe: Recipe) -> Report:
    """Compares a pruned checkpoint with the recipe's dense one on the recipe's images."""
    run = _Run.start(recipe, pruned=checkpoint)
    return run.report(run.compare(), None)


def plan(recipe: Recipe) -> Plan:
    """What `apply` would do. Loads no weights and no data."""
    spec = recipe.model
    config = load_config(spec.checkpoint, spec.revision)
    cls = model_class(spec.checkpoint, config)
    require_classifier(spec.checkpoint, cls)
    with torch.device("meta"):
        model = cls(config)
    anatomy = examine(model)
    stages = recipe.pruning.stages(len(anatomy.blocks))
    pixels = _blank_image(load_processor(spec.checkpoint, spec.revision))
    embedded = anatomy.backbone.get_submodule("embeddings")(pixels.to("meta"))
    patches, prefix, cost = embedded.shape[1] - anatomy.num_prefix_tokens, anatomy.num_prefix_tokens, anatomy.cost
    rate = uniform_rate(cost, stages, patches, prefix, recipe.budget.macs)
    rows = tuple(
        PlanRow(
            block=block,
            tokens_dense=patches + prefix,
            tokens_budget=tokens,
            macs_dense=cost.block(block, float(patches + prefix)),
            macs_budget=cost.block(block, tokens),
        )
        for block, tokens in enumerate(uniform_tokens(stages, len(cost.linear), patches, prefix, rate))
    )
    return Plan(
        checkpoint=spec.checkpoint,
        family=anatomy.model_type,
        model_class=cls.__name__,
        num_blocks=len(anatomy.blocks),
        num_prefix_tokens=prefix,
        stages=stages,
        budget=recipe.budget.macs,
        rows=rows,
        steps=_steps(recipe),
    )


@dataclass(frozen=True)
class _Run:
    """The models and images of one run, and what is done with them."""

    recipe: Recipe
    dense: PreTrainedModel
    pruned: PreTrainedModel
    processor: BaseImageProcessor
    train: Images | None
    holdout: Images | None
    eval: Images
    is_main: bool

    @classmethod
    def start(cls, recipe: Recipe, pruned: str | None = None) -> _Run:
        """Loads everything; `pruned` names a checkpoint that is pruned already."""
        state = PartialState()
        # weights are trained in float32, whatever the model computes in afterwards
        dtype = torch.float32 if recipe.finetune is not None and pruned is None else _dtype(recipe)
        spec = recipe.model
        dense = _moved(load(spec.checkpoint, dtype=dtype, revision=spec.revision), state.device)
        require_classifier(spec.checkpoint, type(dense))
        if is_pruned(dense):
            raise ValueError(f"model.checkpoint {spec.checkpoint} is pruned already; name the dense model")
        if pruned is None:
            model = prune_(copy.deepcopy(dense), recipe.pruning)
        else:
            model = _moved(load(pruned, dtype=dtype), state.device)
            pruning_of(model)
        processor = load_processor(spec.checkpoint, spec.revision)
        labels = {int(index): name for index, name in (dense.config.id2label or {}).items()}
        train = holdout = None
        if pruned is None and (recipe.finetune is not None or _is_calibrated(recipe)):
            train = load_images(recipe.data, recipe.data.train, processor, id2label=labels, seed=recipe.seed)
            if recipe.finetune is not None:
                require_trainable(train, recipe.finetune)
                train, holdout = train.holdout(recipe.finetune.holdout, recipe.seed)
        return cls(
            recipe=recipe,
            dense=dense,
            pruned=model,
            processor=processor,
            train=train,
            holdout=holdout,
            eval=load_images(recipe.data, recipe.data.eval, processor, id2label=labels, seed=recipe.seed),
            is_main=state.is_main_process,
        )

    def calibration_batches(self) -> list[Tensor]:
        spec = self.recipe.calibration
        assert self.train is not None
        return self._batches(self.train.sample(spec.images, self.recipe.seed), spec.batch_size)

    def finetune(self, output: Path) -> None:
        """Fine-tunes and scales the thresholds to the budget on images held out."""
        recipe = self.recipe
        assert recipe.finetune is not None
        assert self.train is not None
        assert self.holdout is not None
        budget = recipe.budget.macs
        try:
            finetune(
                self.pruned, self.dense, self.train, recipe.finetune, budget, seed=recipe.seed, progress=self.is_main
            )
        except NonFiniteLoss as error:
            rescued = output.with_name(f"{output.name}.last-good")
            if self.is_main:
                save(self.pruned, rescued, processor=self.processor, overwrite=True)
            raise NonFiniteLoss(f"{error}; the last good model is in {rescued}") from error
        _moved(self.pruned, _dtype(recipe))
        _moved(self.dense, _dtype(recipe))
        if recipe.pruning.select == "threshold":
            batches = self._batches(self.holdout, recipe.calibration.batch_size)
            scale_to_budget(self.pruned, batches, budget, progress=self.is_main)

    def compare(self) -> Comparison:
        return compare(self.dense, self.pruned, self.eval, self.recipe.evaluate, progress=self.is_main)

    def report(self, comparison: Comparison, calibrated: Comparison | None) -> Report:
        """Measures throughput on images by chance and puts everything together."""
        spec = self.recipe.evaluate
        throughput = []
        if spec.batch_sizes:
            chosen = self.eval.sample(TIMED_BATCHES * max(spec.batch_sizes), self.recipe.seed)
            images = torch.cat([batch["pixel_values"] for batch in chosen.loader(spec.batch_size)])
            throughput = measure_throughput(
                self.dense, self.pruned, images, spec.batch_sizes, spec.repeats, progress=self.is_main
            )
        return Report(
            created=datetime.now(timezone.utc),
            environment=describe_environment(self.pruned),
            recipe=self.recipe.model_dump(mode="json"),
            budget=self.recipe.budget.macs,
            comparison=comparison,
            calibrated=calibrated,
            throughput=tuple(throughput),
        )

    def _batches(self, images: Images, batch_size: int) -> list[Tensor]:
        device, dtype = self.pruned.device, self.pruned.dtype
        return [batch["pixel_values"].to(device, dtype) for batch in images.loader(batch_size)]


def _moved(model: PreTrainedModel, to: torch.device | torch.dtype | None) -> PreTrainedModel:
    """`model.to(...)`, in place, which transformers declares without types."""
    nn.Module.to(model, to)
    return model


def _dtype(recipe: Recipe) -> torch.dtype:
    return getattr(torch, recipe.model.dtype)


def _is_calibrated(recipe: Recipe) -> bool:
    spec = recipe.pruning
    return (spec.thresholds if spec.select == "threshold" else spec.keep_ratios) == "calibrated"


def _blank_image(processor: BaseImageProcessor) -> Tensor:
    """Pixel values of an empty image, (1, C, H, W): the size that the processor gives every image."""
    return processor(Image.new("RGB", (256, 256)), return_tensors="pt")["pixel_values"]


def _with_versions(recipe: Recipe, report: Report) -> str:
    made_with: Mapping[str, str] = report.environment.model_dump()
    versions = ", ".join(f"{name} {made_with[name]}" for name in ("vitprune", "torch", "transformers", "python"))
    return f"# made with {versions}\n{recipe.to_yaml()}"


def _steps(recipe: Recipe) -> tuple[str, ...]:
    steps = []
    if _is_calibrated(recipe):
        steps.append(
            f"calibrate on {recipe.calibration.images} training images to {recipe.budget.macs:.0%} of the MACs"
        )
    if (tuning := recipe.finetune) is not None:
        steps.append(f"fine-tune for {tuning.epochs:g} epochs in batches of {tuning.batch_size}")
        steps.append(f"meet the budget on {tuning.holdout} training images held out")
    steps.append(f"compare with the dense model on split '{recipe.data.eval.split}' of {recipe.data.path}")
    if recipe.evaluate.batch_sizes:
        sizes = ", ".join(map(str, recipe.evaluate.batch_sizes))
        steps.append(f"time both at batch sizes {sizes}")
    steps.append(f"save to {recipe.output.path}")
    return tuple(steps)
