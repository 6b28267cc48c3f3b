"""What `apply` would do, without doing any of it."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from vitprune.budget.calibration import TOLERANCE
from vitprune.budget.schedule import MOST_TRIES, Schedule, unreachable
from vitprune.data.decoding import blank_image
from vitprune.data.source import require_found, require_splits
from vitprune.models.checkpoint import load_config, load_processor, model_class, outline
from vitprune.models.module import spec_of
from vitprune.models.structure import count_tokens, require_images
from vitprune.pruning.costs import CostModel
from vitprune.recipe.errors import RecipeError, concerning
from vitprune.recipe.pruning_spec import ANCHORS
from vitprune.recipe.schema import Recipe, as_recipe
from vitprune.reports.results import Plan, PlanRow
from vitprune.reports.run_report import plan_steps
from vitprune.runs.inputs import prepare, read_images, require_training_images, with_policy_of
from vitprune.runs.resume import require_output


def plan(recipe: Recipe | str | Path) -> Plan:
    """Say what `apply` would do; no weights are loaded, and of data that is here what labels and splits it has.

    recipe: a file, or what `load_recipe` makes of it.

    Raises ValueError, as `apply` would, for all that can be known of it: a budget that can't be reached, a split that
    isn't there, labels that don't fit the model.
    """
    recipe = as_recipe(recipe)
    spec = recipe.model
    with concerning("model", "checkpoint"):
        config = load_config(spec.checkpoint, spec.revision)
        cls = model_class(spec.checkpoint, config)
        model, structure = outline(cls, config)
        require_images(spec.checkpoint, structure)
        processor = load_processor(spec.checkpoint, spec.revision)
    is_pruned = spec_of(config) is not None
    recipe = with_policy_of(recipe, config)
    stages = structure.stages(recipe.pruning)
    prepare(recipe, model)
    pixels = blank_image(processor)
    prefix, cost = structure.num_prefix_tokens, structure.cost
    patches = count_tokens(structure, pixels.to("meta")) - prefix
    expected: list[float | None] = [None] * len(cost.linear)
    if recipe.budget.macs is not None and _meets_budget(recipe):  # what takes some time is known when it was measured
        schedule = Schedule.even(stages)
        _require_reachable(recipe, schedule, cost, patches, prefix)
        strength = schedule.strength(cost, patches, prefix, recipe.budget.part)
        expected = [*schedule.tokens(strength, len(cost.linear), patches, prefix)]
    _require_data(recipe, model, processor)
    rows = tuple(
        PlanRow(
            block=block,
            tokens_dense=patches + prefix,
            tokens_budget=tokens,
            macs_dense=cost.block(block, float(patches + prefix)),
            macs_budget=None if tokens is None else cost.pruned_block(block, tokens),
        )
        for block, tokens in enumerate(expected)
    )
    return Plan(
        checkpoint=spec.checkpoint,
        family=f"{structure.model_type}{', recognised generically' if structure.is_generic else ''}",
        model_class=cls.__name__,
        num_blocks=len(structure.blocks),
        num_prefix_tokens=prefix,
        stages=stages,
        budget=recipe.budget.part,
        counts="time" if recipe.budget.macs is None else "MACs",
        rows=rows,
        steps=plan_steps(recipe, MOST_TRIES, is_pruned=is_pruned),
        obstacle=_obstacle(recipe),
    )


def _require_data(recipe: Recipe, model: PreTrainedModel, processor: BaseImageProcessor) -> None:
    """Raise ValueError where splits or labels aren't what the run needs; of a Hub data set only splits are asked."""
    data, trains = recipe.data, recipe.reads_training_images
    if not Path(data.path).expanduser().exists():
        require_splits(data, [data.train.split, data.eval.split] if trains else [data.eval.split])
        return
    if trains:
        train = read_images(recipe, processor, model, data.train)
        if recipe.finetune is not None:
            require_training_images(recipe, model, train)
    read_images(recipe, processor, model, data.eval)


def _obstacle(recipe: Recipe) -> str | None:
    """An output that is taken, or a data set that isn't here and that the Hub can't be asked for now."""
    try:
        require_found(recipe.data)
        with concerning("output", "path"):
            require_output(Path(recipe.output.path).resolve(), overwrite=recipe.output.overwrite)
    except ValueError as error:
        return str(error)
    return None


def _require_reachable(recipe: Recipe, first: Schedule, cost: CostModel, patches: int, prefix: int) -> None:
    """Raise ValueError for a budget that would take more than all patches but those that always stay."""
    budget, least = recipe.budget.strictest, recipe.pruning.min_tokens
    schedule = Schedule.even((1,)) if recipe.pruning.is_searched else first
    # by ToMe half of them stay at each stage
    stays = ANCHORS if recipe.pruning.select == "tome" else 0.0
    tokens, left = [], float(patches)
    for block in range(len(cost.linear)):
        if block in schedule.before_blocks:
            left = max(least, left * stays)
        tokens.append(prefix + left)
    macs = sum(cost.pruned_block(block, n) for block, n in enumerate(tokens)) + cost.outside(patches)
    nearest = macs / cost.dense(patches, prefix)
    if nearest > budget + 5 * TOLERANCE:
        raise RecipeError.at(("budget", "macs"), unreachable(budget, schedule.before_blocks, nearest, "MACs"))


def _meets_budget(recipe: Recipe) -> bool:
    """Whether levels are found for the budget; those that are given are as they are."""
    return recipe.pruning.is_calibrated or (recipe.finetune is not None and recipe.pruning.select == "threshold")
