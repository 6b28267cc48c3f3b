"""What `apply` would do, without doing any of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
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
from vitprune.recipe.finetune_spec import Trained
from vitprune.recipe.pruning_spec import ANCHORS
from vitprune.recipe.schema import Recipe, as_recipe
from vitprune.reports.text import Cells, count, percent, rich_table
from vitprune.runs.inputs import prepare, read_images, require_training_images, with_policy_of
from vitprune.runs.resume import require_output


@dataclass(frozen=True)
class PlanRow:
    """One block. Tokens count prefix tokens too; MACs are of one image; both at the budget are expected values.

    None where the budget is of time, which isn't known before it is measured.
    """

    block: int
    tokens_dense: int
    tokens_budget: float | None
    macs_dense: float
    macs_budget: float | None


@dataclass(frozen=True)
class Plan:
    """What `apply` would do. `steps` says it in plain words; `counts`: what the budget is a part of.

    `macs_outside`: of embedding and head, which no pruning saves.

    `obstacle`: why it would not begin as things are, such as an output that exists.
    """

    checkpoint: str
    family: str
    model_class: str
    num_blocks: int
    num_prefix_tokens: int
    stages: tuple[int, ...]
    budget: float
    rows: tuple[PlanRow, ...]
    macs_outside: float
    steps: tuple[str, ...]
    counts: Literal["MACs", "time"] = "MACs"
    obstacle: str | None = None


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
        macs_outside=cost.outside(patches),
        steps=_steps(recipe, is_pruned=is_pruned),
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


def print_plan(plan: Plan, console: Console) -> None:
    """What `apply` would do, as tokens and MACs of each block, and step by step."""
    prefix = f"{plan.num_prefix_tokens} prefix token{'' if plan.num_prefix_tokens == 1 else 's'}"
    model = f"{plan.checkpoint}: {plan.model_class} ({plan.family}), {plan.num_blocks} blocks, {prefix}"
    console.print(escape(model), highlight=False)
    stages = ", ".join(map(str, plan.stages))
    budget = f"Budget {percent(plan.budget)} of the {plan.counts}"
    console.print(f"{budget}, stages before blocks {stages}", highlight=False)
    console.print(rich_table("Blocks, one image", _plan_cells(plan)))
    for place, step in enumerate(plan.steps, start=1):
        console.print(f"{place}. {escape(step)}", highlight=False)
    if plan.obstacle is not None:
        console.print(f"As it is, apply will stop at once: {escape(plan.obstacle)}", highlight=False)


def _plan_cells(plan: Plan) -> Cells:
    """With tokens and MACs at the budget where they are known."""
    cells: Cells = [("block", "", "tokens dense", "at the budget", "MACs dense", "at the budget")]
    dense = budget = 0.0
    for row in plan.rows:
        stage = "stage" if row.block in plan.stages else ""
        dense, budget = dense + row.macs_dense, budget + (row.macs_budget or 0.0)
        tokens = "" if row.tokens_budget is None else f"{row.tokens_budget:.1f}"
        macs = "" if row.macs_budget is None else count(row.macs_budget)
        cells.append((str(row.block), stage, str(row.tokens_dense), tokens, count(row.macs_dense), macs))
    outside = count(plan.macs_outside)
    cells.append(("outside", "", "", "", outside, outside))
    dense, at_budget = dense + plan.macs_outside, budget + plan.macs_outside
    cells.append(("all", "", "", "", count(dense), f"{count(at_budget)} ({percent(at_budget / dense)})"))
    if budget:
        return cells
    return [(*row[:3], row[4]) for row in cells]


_WHAT: dict[Trained, str] = {"all": "all weights", "norms": "norms", "thresholds": "thresholds"}


def _steps(recipe: Recipe, *, is_pruned: bool) -> tuple[str, ...]:
    """What a run does, step by step. is_pruned: whether the checkpoint is already."""
    steps = (
        [f"take {recipe.model.checkpoint}, which is pruned already, for dense and pruned model"] if is_pruned else []
    )
    counts = "MACs" if recipe.budget.latency is None else "dense model's time"
    if recipe.budget.latency is not None and (recipe.pruning.is_calibrated or recipe.finetune is not None):
        steps.append(f"measure what blocks and stages take by tokens, in batches of {recipe.budget.timed_batch}")
    if recipe.pruning.is_searched:
        steps.append(
            f"try up to {MOST_TRIES} schedules, the first of which is shown above, on {recipe.calibration.images} "
            "training images"
        )
    if recipe.pruning.is_calibrated:
        steps.append(
            f"calibrate on {recipe.calibration.images} training images to {percent(recipe.budget.strictest)} of the "
            f"{counts}"
        )
    elif _meets_budget(recipe):
        steps.append(f"scale the thresholds to {percent(recipe.budget.strictest)} of the {counts}")
    if (tuning := recipe.finetune) is not None:
        length = f"{tuning.epochs:g} epochs" if tuning.steps is None else f"{tuning.steps} steps"
        steps.append(f"fine-tune {_WHAT[tuning.train]} for {length} in batches of {tuning.batch_size}")
        steps.append(f"keep the best state, and meet the budget, on {tuning.holdout} training images held out")
    if len(points := recipe.budget.points) > 1:
        steps.append(f"find levels for {', '.join(map(percent, points))} of the {counts}")
    steps.append(f"compare with the dense model on split '{recipe.data.eval.split}' of {recipe.data.path}")
    if recipe.evaluate.batch_sizes:
        sizes = ", ".join(map(str, recipe.evaluate.batch_sizes))
        steps.append(f"time both at batch sizes {sizes}")
    if recipe.budget.latency is not None:
        asked = percent(recipe.budget.latency)
        steps.append(f"check by measurement that pruned takes {asked} of the dense model's time")
    steps.append(f"save to {recipe.output.path}")
    if recipe.output.push_to_hub is not None:
        steps.append(f"upload it to {recipe.output.push_to_hub}")
    return tuple(steps)
