"""What a recipe runs on: the dense model and the pruned one, the image processor, the images of each part.

Tensor suffixes: C classes, E width of an embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME

from vitprune.data.images import Images, load_images
from vitprune.exporting.export import export_like
from vitprune.exporting.exported import ExportedModel, folder_of
from vitprune.finetuning.finetune import require_precision, require_trainable
from vitprune.measure.answers import KINDS, AnswerKind
from vitprune.measure.metrics import metrics_of
from vitprune.measure.outputs import (
    ImageModel,
    class_names,
    declare_task,
    embed_classes,
    has_head,
    is_two_towers,
    names_of_answers,
)
from vitprune.models.checkpoint import digest_weights, load, load_processor, load_tokenizer
from vitprune.models.module import is_pruned, spec_of
from vitprune.models.prune import prune_, restore_
from vitprune.models.structure import examine, require_images
from vitprune.recipe.errors import RecipeError, concerning
from vitprune.recipe.schema import Recipe, SplitSpec, require_thresholds
from vitprune.runtime import distributed

# what may change while a run is interrupted
_NO_MATTER = {
    "output": True,
    "data": {"workers", "on_error"},
    "finetune": {
        "checkpoint_every",
        "checkpoints_kept",
        "batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "trackers",
    },
}


@dataclass(frozen=True)
class RunInputs:
    """The models and images of one run. train, holdout: where the run calibrates or fine-tunes."""

    recipe: Recipe
    dense: PreTrainedModel
    pruned: PreTrainedModel
    answers: tuple[ImageModel, ImageModel]
    processor: BaseImageProcessor
    tokenizer: PreTrainedTokenizerBase | None
    train: Images | None
    holdout: Images | None
    eval: Images
    is_main: bool

    @classmethod
    def load(cls, recipe: Recipe, pruned: str | None = None) -> Self:
        """Load everything; `pruned` names a checkpoint that is pruned already.

        Raises ValueError, naming place and way out, for what isn't there or doesn't go together.
        """
        state = distributed.init()
        distributed.require_same(flat(recipe.model_dump(mode="json")), "recipes")
        recipe, dense, model = _load_models(recipe, pruned, state.device)
        spec = recipe.model
        processor = _load_processor(recipe, pruned)
        with concerning("model", "checkpoint"):
            tokenizer = load_tokenizer(spec.checkpoint, spec.revision) if is_two_towers(dense) else None
        read = partial(read_images, recipe, processor, dense)
        train = holdout = None
        if pruned is None and recipe.reads_training_images:
            train = read(recipe.data.train)
            if recipe.finetune is not None:
                train, holdout = require_training_images(recipe, dense, train)
        compared = read(recipe.data.eval)
        classes_CE = _embed_classes(recipe, dense, tokenizer, compared)
        return cls(
            recipe=recipe,
            dense=dense,
            pruned=model,
            answers=(ImageModel(dense, classes_CE), ImageModel(model, classes_CE)),
            processor=processor,
            tokenizer=tokenizer,
            train=train,
            holdout=holdout,
            eval=compared,
            is_main=state.is_main_process,
        )

    @property
    def class_names(self) -> dict[int, str]:
        """Names of the classes that both models answer with; in zero-shot those of the data."""
        return names_of_answers(self.dense, self.eval.class_names)

    @property
    def dtype(self) -> torch.dtype:
        """What the models compute in while they aren't trained."""
        return _dtype(self.recipe)

    def fingerprint(self) -> dict[str, object]:
        """What a run has to share with the interrupted one that it resumes."""
        images = {"train": self.train, "held out": self.holdout, "eval": self.eval}
        found = {f"images ({name})": one.fingerprint for name, one in images.items() if one is not None}
        weights = {"weights of model.checkpoint": digest_weights(self.dense)}
        return {**lasting(self.recipe), **found, **weights, "processes": distributed.init().num_processes}


def lasting(recipe: Recipe) -> dict[str, object]:
    """What of a recipe, its keys as `--set` writes them, may not change while its run is interrupted."""
    settings = flat(recipe.model_dump(mode="json", exclude=_NO_MATTER))
    if (tuning := recipe.finetune) is not None:
        # the images of a step are what the result depends on, and of a stream how they come
        settings["finetune.batch_size x gradient_accumulation_steps"] = tuning.images_per_step
        if recipe.data.streaming:
            settings["finetune.batch_size"] = tuning.batch_size
            settings["data.workers"] = recipe.data.workers
    return settings


def _load_processor(recipe: Recipe, pruned: str | None) -> BaseImageProcessor:
    """The checkpoint's; of a graph its own, which prepares images of the graph's size."""
    folder = None if pruned is None else folder_of(pruned)
    if folder is not None and (folder / IMAGE_PROCESSOR_NAME).is_file():
        return load_processor(str(folder))
    with concerning("model", "checkpoint"):
        return load_processor(recipe.model.checkpoint, recipe.model.revision)


def _load_models(
    recipe: Recipe, pruned: str | None, device: torch.device | None
) -> tuple[Recipe, PreTrainedModel, PreTrainedModel]:
    """The dense model, and the pruned one: a copy of it, or what `pruned` names.

    A checkpoint that is pruned already goes on as it is pruned, and the recipe says so, unless that says how; the dense
    model is its weights without pruning.
    """
    # weights are trained in float32, whatever the model computes in afterwards
    dtype = torch.float32 if recipe.finetune is not None and pruned is None else _dtype(recipe)
    spec = recipe.model
    with concerning("model", "checkpoint"):
        found = moved(load(spec.checkpoint, dtype=dtype, revision=spec.revision), device)
        require_images(spec.checkpoint, examine(found))
    prepare(recipe, found)
    _require_device(recipe, found.device)
    if recipe.finetune is not None and pruned is None:
        require_precision(recipe.finetune, found.device)
    dense = restore_(copy.deepcopy(found)) if is_pruned(found) else found
    if pruned is None:
        going_on = with_policy_of(recipe, found.config)
        return going_on, dense, prune_(copy.deepcopy(dense), recipe.pruning) if going_on is recipe else found
    if folder_of(pruned) is not None:
        exported = ExportedModel.load(pruned)
        _require_same_names(pruned, exported.model, spec.checkpoint, dense)
        return recipe, export_like(exported.info, dense, _load_processor(recipe, pruned)), exported.model
    model = moved(load(pruned, dtype=dtype), device)
    if not is_pruned(model):
        raise ValueError(f"{pruned} isn't pruned; name a checkpoint that `vitprune apply` wrote")
    _require_same_names(pruned, model, spec.checkpoint, dense)
    return recipe, dense, model


def with_policy_of(recipe: Recipe, config: PreTrainedConfig) -> Recipe:
    """The recipe, saying how its checkpoint is pruned already; the same one if it isn't, or is to be pruned anew.

    Raises ValueError for thresholds that should learn where it has none.
    """
    spec = spec_of(config)
    if spec is None or "pruning" in recipe.model_fields_set:
        return recipe
    if recipe.finetune is not None:
        with concerning("finetune", "thresholds"):
            require_thresholds(spec, recipe.finetune)
    levels = "thresholds" if spec.select == "threshold" else "keep_ratios"
    return recipe.model_copy(update={"pruning": spec.model_copy(update={levels: "calibrated", "points": None})})


def _require_same_names(pruned: str, model: PreTrainedModel, checkpoint: str, dense: PreTrainedModel) -> None:
    """Answers are compared by class id."""
    if has_head(model) and has_head(dense) and model.config.id2label != dense.config.id2label:
        raise ValueError(
            f"{pruned} and model.checkpoint {checkpoint} have different classes (`id2label` in config.json); name the "
            "dense model that the pruned one was made of"
        )


def prepare(recipe: Recipe, dense: PreTrainedModel) -> None:
    """Give a model the task that the recipe names. Raises RecipeError where prompt, task or metrics don't fit it."""
    spec, metrics = recipe.model, recipe.evaluate.metrics
    if spec.prompt is not None and not is_two_towers(dense):
        raise RecipeError.at(("model", "prompt"), f"{type(dense).__name__} reads no text; leave the prompt out")
    if spec.task is not None:
        with concerning("model", "task"):
            declare_task(dense, spec.task)
    with concerning("evaluate", "metrics"):
        metrics_of(_kind(recipe, dense), metrics)


def require_training_images(recipe: Recipe, dense: PreTrainedModel, train: Images) -> tuple[Images, Images]:
    """Those to train on, and those held out. Raises ValueError where images, losses and model don't go together."""
    assert recipe.finetune is not None
    require_trainable(train, recipe.finetune, dense, takes_labels=_kind(recipe, dense).takes_labels)
    with concerning("finetune", "holdout"):
        return train.holdout(recipe.finetune.holdout, recipe.seed)


def _require_device(recipe: Recipe, device: torch.device) -> None:
    """Raise ValueError for a run that isn't where its time is to be measured."""
    asked = recipe.budget.device
    if asked is not None and asked != device.type:
        way_out = "set ACCELERATE_USE_CPU=true to run it there" if asked == "cpu" else "run it there"
        text = f"is {asked!r}, but this run is on {device.type!r}; {way_out}, or leave the device out"
        raise RecipeError.at(("budget", "device"), text)


def _kind(recipe: Recipe, dense: PreTrainedModel) -> AnswerKind:
    """How answers are judged; a prompt makes classes of them."""
    return ImageModel(dense).kind if recipe.model.prompt is None else KINDS["single-label"]


def _embed_classes(
    recipe: Recipe, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, images: Images
) -> Tensor | None:
    """What a prompt says of the data's classes, (C, E); None without a prompt."""
    if recipe.model.prompt is None:
        return None
    if images.class_names is None:
        text = "needs names of the classes, but the data has none; cast its labels to ClassLabel(names=[...])"
        raise RecipeError.at(("model", "prompt"), text)
    assert tokenizer is not None
    return embed_classes(dense, tokenizer, images.class_names, recipe.model.prompt)


def read_images(recipe: Recipe, processor: BaseImageProcessor, dense: PreTrainedModel, split: SplitSpec) -> Images:
    """Labels are the model's classes; without a head they are those of the data; of no use without a prompt.

    Those of training images aren't read, nor need they fit, unless something is learned from them.
    """
    kind = _kind(recipe, dense)
    learns = recipe.finetune is not None and recipe.finetune.losses.task > 0
    labels = class_names(dense) if has_head(dense) else None
    with concerning("data", "path"):
        return load_images(
            recipe.data,
            split,
            processor,
            id2label=labels,
            labelled=kind.takes_labels and (learns or split is not recipe.data.train),
            task="single-label" if kind.name == "embedding" else kind.name,
            seed=recipe.seed,
        )


def moved(model: PreTrainedModel, to: torch.device | torch.dtype | None) -> PreTrainedModel:
    """`model.to(...)`, in place, which transformers declares without types."""
    nn.Module.to(model, to)
    return model


def flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested keys as a recipe's `--set` writes them."""
    found: dict[str, object] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _dtype(recipe: Recipe) -> torch.dtype:
    return getattr(torch, recipe.model.dtype)
