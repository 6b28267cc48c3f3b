"""What `apply` would do, without doing any of it."""

from __future__ import annotations

from vitprune.budget.calibration import TOLERANCE
from vitprune.budget.schedule import MOST_TRIES, Schedule, unreachable
from vitprune.data.decoding import blank_image
from vitprune.models.checkpoint import load_config, load_processor, model_class, outline
from vitprune.models.module import quantization_method
from vitprune.models.structure import count_tokens, require_images
from vitprune.pruning.costs import CostModel
from vitprune.recipe.errors import Problem, RecipeError
from vitprune.recipe.finetune_spec import Trained
from vitprune.recipe.pruning_spec import ANCHORS, METHOD
from vitprune.recipe.schema import Recipe
from vitprune.reports.results import Plan, PlanRow

_WHAT: dict[Trained, str] = {"all": "all weights", "norms": "norms", "thresholds": "thresholds"}


def plan(recipe: Recipe) -> Plan:
    """What `apply` would do. Loads no weights and no data."""
    spec = recipe.model
    config = load_config(spec.checkpoint, spec.revision)
    cls = model_class(spec.checkpoint, config)
    _, structure = outline(cls, config)
    require_images(spec.checkpoint, structure)
    if quantization_method(config) == METHOD:
        raise ValueError(f"model.checkpoint {spec.checkpoint} is pruned already; name the dense model")
    stages = structure.stages(recipe.pruning)
    pixels = blank_image(load_processor(spec.checkpoint, spec.revision))
    prefix, cost = structure.num_prefix_tokens, structure.cost
    patches = count_tokens(structure, pixels.to("meta")) - prefix
    expected: list[float | None] = [None] * len(cost.linear)
    if recipe.budget.macs is not None and _meets_budget(recipe):  # what takes some time is known when it was measured
        schedule = Schedule.even(stages)
        _require_reachable(recipe, schedule, cost, patches, prefix)
        strength = schedule.strength(cost, patches, prefix, recipe.budget.macs)
        expected = [*schedule.tokens(strength, len(cost.linear), patches, prefix)]
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
        steps=_steps(recipe),
    )


def _require_reachable(recipe: Recipe, first: Schedule, cost: CostModel, patches: int, prefix: int) -> None:
    """Raises ValueError for a budget that would take more than all patches but those that always stay."""
    budget, least = recipe.budget.macs, recipe.pruning.min_tokens
    assert budget is not None
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
        raise RecipeError([Problem(("budget", "macs"), unreachable(budget, schedule.before_blocks, nearest, "MACs"))])


def _meets_budget(recipe: Recipe) -> bool:
    """Whether levels are found for the budget; those that are given are as they are."""
    return recipe.pruning.is_calibrated or (recipe.finetune is not None and recipe.pruning.select == "threshold")


def _steps(recipe: Recipe) -> tuple[str, ...]:
    steps = []
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
            f"calibrate on {recipe.calibration.images} training images to {recipe.budget.part:.0%} of the {counts}"
        )
    if (tuning := recipe.finetune) is not None:
        length = f"{tuning.epochs:g} epochs" if tuning.steps is None else f"{tuning.steps} steps"
        steps.append(f"fine-tune {_WHAT[tuning.train]} for {length} in batches of {tuning.batch_size}")
        steps.append(f"keep the best state, and meet the budget, on {tuning.holdout} training images held out")
    steps.append(f"compare with the dense model on split '{recipe.data.eval.split}' of {recipe.data.path}")
    if recipe.evaluate.batch_sizes:
        sizes = ", ".join(map(str, recipe.evaluate.batch_sizes))
        steps.append(f"time both at batch sizes {sizes}")
    if recipe.budget.latency is not None:
        steps.append(f"check by measurement that pruned takes {recipe.budget.latency:.0%} of the dense model's time")
    steps.append(f"save to {recipe.output.path}")
    return tuple(steps)
