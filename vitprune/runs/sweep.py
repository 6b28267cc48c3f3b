"""A recipe at several budgets, and baselines beside it: `sweep`. Each point is a run of `apply` of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from vitprune.finetuning.losses import NonFiniteLoss
from vitprune.models.checkpoint import load_config, model_class, outline
from vitprune.recipe.errors import concerning, first_line
from vitprune.recipe.for_readers import without_paths
from vitprune.recipe.pruning_spec import at_depths
from vitprune.recipe.schema import BudgetSpec, PruningSpec, Recipe
from vitprune.reports.page import sweep_page
from vitprune.reports.sweep_report import Missed, Sweep, SweepPoint
from vitprune.reports.text import asked_for
from vitprune.runs.apply import apply
from vitprune.runs.inputs import lasting
from vitprune.runtime import distributed
from vitprune.runtime.files import contents, require_writable, write_text_whole
from vitprune.runtime.lock import OutputLock

BASELINES = ("tome", "as-vit", "random")
SWEEP_JSON, SWEEP_PAGE = "sweep.json", "sweep.html"
OWN = "vitprune"
_STEMS = (SWEEP_JSON, SWEEP_PAGE, *(f"{method}-" for method in (OWN, *BASELINES)))
PUBLISHED_DEPTHS = (4 / 12, 7 / 12, 10 / 12)  # of AS-ViT's stages


def sweep(
    recipe: Recipe,
    budgets: Sequence[float],
    *,
    output: Path,
    baselines: Sequence[str] = (),
    restart: bool = False,
    tell: Callable[[str], object] = lambda text: None,
) -> Sweep:
    """Run a recipe at each budget, and baselines at the same ones.

    Writes sweep.json, sweep.html and a folder for each point, with its checkpoint and report. What is done isn't done
    again, unless `restart`. A point that can't be had is listed with its reason.

    baselines: of `BASELINES`. tell: is told what begins.

    Raises:
        ValueError: the output holds a sweep of another recipe, or of none, or one is under way there; names the way
            out.
    """
    asked, output = _fingerprint(recipe), output.resolve()
    distributed.on_main(lambda: require_writable(output))
    with _alone(output):
        found = distributed.on_main(lambda: _begun(output, asked, restart=restart))
        for method, budget, part in _points(recipe, sorted(budgets, reverse=True), baselines):
            if found.has(method, budget):
                continue
            name = f"{method}-{100 * budget:g}"
            tell(f"{method} at {asked_for(budget)}")
            own = {"path": str(output / name), "overwrite": True, "push_to_hub": None, "private": False}
            point = part.model_copy(update={"output": part.output.model_copy(update=own)})
            try:
                report = apply(point, restart=restart)
            except (ValueError, NonFiniteLoss) as error:
                if not found.points or distributed.init().num_processes > 1:
                    raise  # a mistake in the recipe, most likely; of several processes the others wait for this one
                reason = without_paths(first_line(error), point)
                found = _kept(found.without(Missed(method=method, budget=budget, reason=reason)), output)
                continue
            now, done = datetime.now(UTC), SweepPoint.of(method, budget, name, report)
            found = _kept(found.with_(done, environment=report.environment, created=now), output)
    return found


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """While a sweep runs no other writes to its output."""
    lock = OutputLock(output)
    distributed.on_main(lock.acquire)
    try:
        yield
    finally:
        lock.release()


def _kept(found: Sweep, output: Path) -> Sweep:
    if distributed.init().is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        found.save(output / SWEEP_JSON)
        page = sweep_page(found, output.name)
        write_text_whole(output / SWEEP_PAGE, page)
    return found


def _begun(output: Path, asked: str, *, restart: bool) -> Sweep:
    """The sweep that the output holds, or a new one."""
    place = output / SWEEP_JSON
    if restart:
        place.unlink(missing_ok=True)
    if not place.is_file():
        others = contents(output) if output.exists() else ()
        if not all(other.name.lstrip(".").startswith(_STEMS) for other in others):
            raise ValueError(f"--output {output} holds something that is no sweep; choose another folder")
        return Sweep(asked=asked)
    found = Sweep.load(place)
    if found.asked != asked:
        raise ValueError(
            f"--output {output} holds a sweep of another recipe, or of this one as it was; choose another folder, or "
            "begin anew with --restart"
        )
    return found


def _fingerprint(recipe: Recipe) -> str:
    """What the points of a sweep share."""
    shared = {key: value for key, value in lasting(recipe).items() if key not in ("budget.macs", "budget.latency")}
    shared["counts"] = "time" if recipe.budget.macs is None else "MACs"
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


def _points(recipe: Recipe, budgets: Sequence[float], baselines: Sequence[str]) -> Iterator[tuple[str, float, Recipe]]:
    """Method, budget and what to apply."""
    for method, own in ((OWN, recipe), *((name, _baseline(recipe, name)) for name in baselines)):
        for budget in budgets:
            key = "macs" if recipe.budget.macs is not None else "latency"
            spec = BudgetSpec.model_validate({**recipe.budget.model_dump(), key: budget})
            yield method, budget, own.model_copy(update={"budget": spec})


def _baseline(recipe: Recipe, name: str) -> Recipe:
    """The same run with another policy. Thresholds that would learn are held: most baselines have none.

    Where nothing else would learn the baseline isn't trained.
    """
    if name not in BASELINES:
        raise ValueError(f"there is no baseline {name!r}; there are {', '.join(BASELINES)}")
    with concerning("model", "checkpoint"):
        config = load_config(recipe.model.checkpoint, recipe.model.revision)
        _, structure = outline(model_class(recipe.model.checkpoint, config), config)
    blocks = len(structure.blocks)
    published = at_depths(PUBLISHED_DEPTHS, blocks)
    score = "head-weighted-class-attention" if structure.has_class_token else "head-weighted-mean-attention"
    settings: dict[str, dict[str, object]] = {
        "tome": {"select": "tome", "before_blocks": "every"},
        "as-vit": {"score": score, "before_blocks": published, "dropped": "leave"},
        "random": {"select": "random", "before_blocks": published},
    }
    pruning, finetune = PruningSpec.model_validate(settings[name], strict=False), recipe.finetune
    if finetune is not None and finetune.thresholds == "learned" and pruning.select != "threshold":
        learns = finetune.train != "thresholds"
        finetune = finetune.model_copy(update={"thresholds": "calibrated"}) if learns else None
    return recipe.model_copy(update={"pruning": pruning, "finetune": finetune})
