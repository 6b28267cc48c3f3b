"""Calibration: the budget asked for is the budget got, measured again with a trace."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch
from tiny import Tolerance
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

import vitprune
from vitprune.budget.calibration import TEMPERATURE_SHARE, calibrate, mean_ratio, scale_to_budget, set_rate
from vitprune.budget.points import find_points
from vitprune.budget.schedule import MOST_TRIES, WORTH_A_STAGE, Schedule
from vitprune.models.module import pruning_of
from vitprune.models.trace import Trace, watching
from vitprune.recipe.schema import PruningSpec

# what the design asks for: ratio of MACs against the budget
BUDGET = 0.01
EXACT = Tolerance(rtol=0.0, atol=0.0)
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-9)

SPECS: dict[str, dict[str, Any]] = {
    **{f"as-vit {dropped}": {**tiny.AS_VIT, "dropped": dropped} for dropped in ("leave", "merge")},
    **{f"redundancy {dropped}": {"before_blocks": [1, 3, 4], "dropped": dropped} for dropped in ("leave", "merge")},
    **{f"{score}, searched": {"score": score} for score in ("redundancy", "head-weighted-class-attention")},
    "top-k, searched": {"select": "top-k"},
    **{
        f"{select} {dropped}": {**tiny.AS_VIT, "select": select, "dropped": dropped}
        for select in ("top-k", "random")
        for dropped in ("leave", "merge")
    },
    "tome": {"select": "tome"},
}


def batches() -> list[Tensor]:
    order = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    return list(tiny.images(32)[order].split([12, 12, 8]))


def pruned(family: str = "vit", **spec: Any) -> PreTrainedModel:
    return vitprune.prune_(tiny.build(family), PruningSpec(**spec))


@torch.no_grad()
def measured(model: PreTrainedModel) -> float:
    with vitprune.trace(model.eval()) as trace:
        model(torch.cat(batches()))
    return (trace.macs / trace.dense_macs).mean().item()


def rounding(model: PreTrainedModel) -> float:
    """How far whole counts may leave the ratio from a budget: half of one patch more or less at every stage."""
    pruning = pruning_of(model)
    cost, tokens = pruning.cost, tiny.PATCHES + pruning.num_prefix_tokens
    a_token = cost.block(0, tokens) - cost.block(0, tokens - 1)
    blocks = sum(len(cost.linear) - stage for stage in pruning.before_blocks)
    return a_token * blocks / cost.dense(tiny.PATCHES, pruning.num_prefix_tokens) / 2


@pytest.mark.parametrize("budget", [0.8, 0.6])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_budget_asked_for_is_the_budget_got(spec: dict[str, Any], budget: float) -> None:
    model = pruned(**spec)
    result = calibrate(model, batches(), budget, progress=False)
    # counts are whole numbers of 64 patches; what calibration accepts is the limit for them, too
    tolerance = BUDGET if spec.get("select", "threshold") == "threshold" else min(BUDGET, rounding(model))
    assert abs(measured(model) - budget) <= tolerance
    assert_close(result.ratio, measured(model), **FLOAT32)
    assert_close(torch.tensor(result.levels), pruning_of(model).levels.detach(), **EXACT)


@pytest.mark.parametrize("family", ["deit-teacher", "dinov2-swiglu"])
def test_other_families_meet_their_budget_too(family: str) -> None:
    model = pruned(family)
    calibrate(model, batches(), 0.7, progress=False)
    assert abs(measured(model) - 0.7) <= BUDGET


# --- where stages lie ---


@pytest.mark.parametrize(
    ("family", "measure"), [("vit", "KL"), ("vit-bare", "1 - cosine"), ("clip-tower", "1 - cosine"), ("siglip2", "KL")]
)
def test_of_schedules_that_meet_the_budget_the_one_whose_answers_are_nearest_is_taken(
    family: str, measure: str
) -> None:
    model, x = pruned(family), tiny.inputs(family, 8)
    result, pruning = (
        calibrate(model, [tiny.take(x, slice(5)), tiny.take(x, slice(5, 8))], 0.7, progress=False),
        (pruning_of(model)),
    )
    assert result.measure == measure
    assert pruning.before_blocks == pruning.spec.before_blocks == result.tried[0].schedule.before_blocks
    assert len(result.levels) == len(pruning.before_blocks)
    assert 1 < len(result.tried) <= MOST_TRIES
    assert all(abs(tried.ratio - 0.7) <= BUDGET for tried in result.tried)
    # one that comes nearer has to be worth more stages, or moving
    taken = result.tried[0].distance
    assert taken <= min(tried.distance for tried in result.tried) / (1 - WORTH_A_STAGE)
    assert abs(mean_ratio(model, [x]) - 0.7) <= BUDGET


@pytest.mark.parametrize("spec", [tiny.AS_VIT, {"before_blocks": "every"}, {"select": "tome"}], ids=str)
def test_stages_that_are_named_stay(spec: dict[str, Any]) -> None:
    model = pruned(**spec)
    before = pruning_of(model).before_blocks
    result = calibrate(model, batches(), 0.7, progress=False)
    assert pruning_of(model).before_blocks == before
    assert (result.tried, result.measure) == ((), "")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [(tiny.AS_VIT, tiny.PATCHES), ({"before_blocks": [2]}, tiny.PATCHES), ({**tiny.AS_VIT, "select": "top-k"}, None)],
    ids=str,
)
def test_thresholds_know_the_patches_they_were_found_at(spec: dict[str, Any], expected: int | None) -> None:
    model = pruned(**spec)
    calibrate(model, batches(), 0.7, progress=False)
    assert pruning_of(model).spec.patches == expected


def test_a_budget_that_was_refused_leaves_the_stages_to_be_found() -> None:
    model, images = deep_model(), tiny.images(8)[..., :28, :28]
    before = pruning_of(model).spec
    with pytest.raises(ValueError, match="can't be met"):
        calibrate(model, [images], 0.05, progress=False)
    assert pruning_of(model).spec == before
    calibrate(model, [images], 0.25, progress=False)


def test_a_schedule_that_cannot_meet_the_budget_keeps_no_other_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    possible, impossible = Schedule((2, 9), (2 / 3, 1.0)), Schedule.even((5, 9))
    for schedules in ([possible], [impossible, possible]):
        monkeypatch.setattr(
            "vitprune.budget.calibration.search",
            lambda try_, num_blocks, schedules=schedules: [found for s in schedules if (found := try_(s)) is not None],
        )
        result = calibrate(deep_model(), [tiny.images(8)[..., :28, :28]], 0.3, progress=False)
        assert [tried.schedule for tried in result.tried] == [possible]


# --- what follows from levels ---


def test_images_keep_different_numbers_of_tokens() -> None:
    model = pruned(**tiny.AS_VIT)
    result = calibrate(model, batches(), 0.7, progress=False)
    with torch.no_grad(), vitprune.trace(model) as trace:
        model(torch.cat(batches()))
    assert result.images == 32
    assert len(trace.keep_masks[-1].sum(1).unique()) > 3


def test_calibrating_twice_gives_the_same() -> None:
    model = pruned(**tiny.AS_VIT)
    first = calibrate(model, batches(), 0.7, progress=False)
    assert calibrate(model, batches(), 0.7, progress=False) == first


def test_the_mean_ratio_is_the_mean_over_images_not_batches() -> None:
    model = pruned(**tiny.AS_VIT, thresholds=[0.008, 0.012])
    assert_close(mean_ratio(model, batches()), measured(model), **FLOAT32)


def test_levels_are_means_over_images_not_batches() -> None:
    model, (first, *_) = pruned(**tiny.AS_VIT), batches()
    parts, levels = (first, first[:1] + 0.5), []
    for images in ([parts[0]], [parts[1]], parts):
        set_rate(model, images, 0.3)
        levels.append(pruning_of(model).levels[0].item())
    count = len(first)
    assert levels[2] == pytest.approx((count * levels[0] + levels[1]) / (count + 1), rel=1e-5)
    assert levels[0] != pytest.approx(levels[1], rel=1e-2)


@dataclass(eq=False)
class FirstScores(Trace):
    """Scores at the first stage, where nothing has left yet."""

    seen: list[Tensor] = field(default_factory=list)

    def level(self, stage: int, scores_BM: Tensor, valid_BM: Tensor, current: Tensor) -> Tensor:
        if stage == 0:
            self.seen.append(scores_BM[scores_BM.isfinite()])
        return current


@pytest.mark.parametrize("spec", [tiny.AS_VIT, {"before_blocks": [1, 3, 4]}], ids=["as-vit", "redundancy"])
def test_temperatures_follow_the_density_of_the_scores(spec: dict[str, Any]) -> None:
    model = pruned(**spec)
    pruning = pruning_of(model)
    calibrate(model, batches(), 0.7, progress=False)
    seen = FirstScores(pruning, pruning.before_blocks)
    with torch.no_grad(), watching(seen):
        for batch in batches():
            model(batch)
    # half a percent within τ to either side, so ten within 10·τ; some images are few scores
    near = (torch.cat(seen.seen) - pruning.levels[0]).abs() < 10 * pruning.temperatures[0]
    assert near.float().mean().item() == pytest.approx(20 * TEMPERATURE_SHARE, rel=0.4)
    assert (pruning.temperatures > 0).all()
    assert pruning.temperatures.isfinite().all()


def test_a_temperature_that_the_spec_fixes_stays() -> None:
    model = pruned(**tiny.AS_VIT, temperature=3e-3)
    calibrate(model, batches(), 0.7, progress=False)
    assert_close(pruning_of(model).temperatures, torch.tensor([3e-3, 3e-3]), **EXACT)


@pytest.mark.parametrize("drift", [(1.4, 1.1), (0.7, 0.9)], ids=["too few tokens", "too many"])
def test_scaling_brings_thresholds_that_drifted_back_to_the_budget(drift: tuple[float, float]) -> None:
    model = pruned(**tiny.AS_VIT)
    calibrate(model, batches(), 0.7, progress=False)
    pruning = pruning_of(model)
    with torch.no_grad():
        pruning.levels.mul_(torch.tensor(drift))
    drifted = pruning.levels.detach().clone()
    assert abs(measured(model) - 0.7) > BUDGET, "nothing to bring back: this test would see nothing"
    ratio = scale_to_budget(model, batches(), 0.7, progress=False)
    assert abs(measured(model) - 0.7) <= BUDGET
    assert_close(ratio, measured(model), **FLOAT32)
    factors = pruning.levels.detach() / drifted
    assert_close(factors[0], factors[1], **FLOAT32)


def test_counts_cannot_be_scaled() -> None:
    with pytest.raises(ValueError, match="only thresholds can be scaled to a budget, not select: top-k"):
        scale_to_budget(pruned(select="top-k"), batches(), 0.7, progress=False)


def test_thresholds_that_were_never_found_cannot_be_scaled() -> None:
    with pytest.raises(ValueError, match=r"never found, .* call vitprune\.calibrate"):
        scale_to_budget(pruned(before_blocks=[1, 3]), batches(), 0.7, progress=False)


@pytest.mark.parametrize(
    ("spec", "blocks", "nearest"),
    [
        (tiny.AS_VIT, [2, 4], 3),
        # all patches but one may leave behind the first block
        ({"before_blocks": [1, 3, 4]}, [1, 3, 4], 2),
        # every second patch stays
        ({"select": "tome"}, [1, 2, 3, 4, 5], 3),
    ],
    ids=["as-vit", "redundancy", "tome"],
)
def test_an_impossible_budget_is_refused_with_what_would_be_possible(
    spec: dict[str, Any], blocks: list[int], nearest: int
) -> None:
    where, possible = re.escape(str(blocks)), rf"{nearest}\d\.\d%"
    expected = (
        rf"budget.macs: 10.0% can't be met by pruning before blocks {where}: the nearest is {possible}; allow more"
    )
    with pytest.raises(ValueError, match=expected):
        calibrate(pruned(**spec), batches(), 0.1, progress=False)


def test_thresholds_are_scaled_to_the_nearest_or_refused() -> None:
    model = pruned(before_blocks=[1, 3], thresholds="calibrated")
    calibrate(model, batches(), 0.7, progress=False)
    nearest = scale_to_budget(model, batches(), 0.05, progress=False)
    assert nearest > 0.1
    with pytest.raises(ValueError, match=r"5.0% can't be met by pruning before blocks \[1, 3\]: the nearest is"):
        scale_to_budget(model, batches(), 0.05, must_meet=True, progress=False)
    with pytest.raises(ValueError, match=r"5.0% can't be met"):
        vitprune.find_points(model, batches(), [0.7, 0.05], progress=False)


def test_where_no_schedule_meets_the_budget_the_first_is_named() -> None:
    with pytest.raises(ValueError, match=r"10.0% can't be met by pruning before blocks \[1, 2, 4\]: the nearest is 2"):
        calibrate(pruned(), batches(), 0.1, progress=False)


@pytest.mark.parametrize("training", [True, False])
def test_calibrating_leaves_the_mode_as_it_was(training: bool) -> None:
    model = pruned(**tiny.AS_VIT).train(training)
    calibrate(model, batches(), 0.7, progress=False)
    assert all(module.training == training for module in model.modules())


def test_calibration_needs_images_and_a_pruned_model() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        calibrate(pruned(), [], 0.7, progress=False)
    with pytest.raises(ValueError, match="isn't pruned"):
        calibrate(tiny.build("vit"), batches(), 0.7, progress=False)


def test_scaling_needs_images() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        scale_to_budget(pruned(before_blocks="every", thresholds=[0.01] * 5), [], 0.7, progress=False)


def test_weights_are_left_alone_and_have_no_gradient() -> None:
    model = pruned(**tiny.AS_VIT)
    calibrate(model, batches(), 0.7, progress=False)
    dense = dict(tiny.build("vit").named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert name == "vitprune.thresholds" or torch.equal(parameter, dense[name])
    assert pruning_of(model).levels.requires_grad
    model.train()(tiny.images(2)).logits.sum().backward()  # inference mode has left nothing behind


def test_parts_in_eval_mode_stay_so() -> None:
    model = pruned(**tiny.AS_VIT).train()
    model.get_submodule("classifier").eval()
    calibrate(model, batches(), 0.7, progress=False)
    assert not model.get_submodule("classifier").training


def test_a_failure_leaves_the_mode_as_it_was() -> None:
    model = pruned(**tiny.AS_VIT).train()
    with pytest.raises(ValueError, match="doesn't match model"):
        calibrate(model, [*batches(), torch.zeros(1, 3, 8, 8)], 0.7, progress=False)
    assert model.training


def deep_model(**spec: Any) -> PreTrainedModel:
    """Twelve blocks on 49 patches: a search for a small budget comes by images that have but one patch left."""
    config = ViTConfig(**{**tiny.SHAPE, "image_size": 28, "num_hidden_layers": 12}, intermediate_size=96)
    torch.manual_seed(0)
    return vitprune.prune_(ViTForImageClassification(config).eval(), PruningSpec(**spec))


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("blocks", ["every", "auto"])
def test_a_budget_that_leaves_one_patch_is_refused_or_met(blocks: str, batch_size: int) -> None:
    images = tiny.images(8)[..., :28, :28].split(batch_size)
    with pytest.raises(ValueError, match="can't be met"):
        calibrate(deep_model(before_blocks=blocks), images, 0.05, progress=False)
    model = deep_model(before_blocks=blocks)
    calibrate(model, images, 0.25, progress=False)
    assert abs(mean_ratio(model, images) - 0.25) <= BUDGET
    assert pruning_of(model).temperatures.isfinite().all()


@pytest.mark.parametrize(
    ("spec", "batch_size"),
    [
        pytest.param(
            {"select": "tome"},
            8,
        ),
        (tiny.AS_VIT, 8),
        pytest.param(tiny.AS_VIT, 1),
        ({"before_blocks": [2, 4]}, 8),
        ({}, 8),
    ],
    ids=["tome", "as-vit", "as-vit image by image", "redundancy", "searched"],
)
def test_the_whole_budget_keeps_everything(spec: dict[str, Any], batch_size: int) -> None:
    model = pruned(**spec)
    calibrate(model, torch.cat(batches()).split(batch_size), 1.0, progress=False)
    with torch.no_grad(), vitprune.trace(model) as seen:
        model(torch.cat(batches()))
    assert all(mask.all() for mask in seen.keep_masks)


@pytest.mark.parametrize("budget", [-0.1, 0.0, 1.5, float("nan")])
def test_a_budget_is_a_part_of_the_dense_macs(budget: float) -> None:
    with pytest.raises(ValueError, match="budget"):
        calibrate(pruned(), batches(), budget, progress=False)


@pytest.mark.parametrize("kind", ["tensor", "generator", "loader", "dicts"])
def test_images_may_come_in_whatever_holds_them(kind: str) -> None:
    images = torch.cat(batches())
    rows = [{"pixel_values": image, "labels": 0} for image in images]
    given: dict[str, Any] = {
        "tensor": images,
        "generator": (batch for batch in batches()),
        "loader": DataLoader(rows, batch_size=12),  # pyright: ignore[reportArgumentType]
        "dicts": [{"pixel_values": batch, "label": torch.zeros(len(batch))} for batch in batches()],
    }
    spec = {**tiny.AS_VIT, "select": "top-k"}
    expected = calibrate(pruned(**spec), batches(), 0.6, progress=False)
    found = calibrate(pruned(**spec), given[kind], 0.6, progress=False)
    assert found.levels == pytest.approx(expected.levels)


def test_what_holds_no_images_is_refused() -> None:
    given: Any = [["a.png", "b.png"]]
    with pytest.raises(TypeError, match=r"batches hold list; pass vitprune\.load_images"):
        calibrate(pruned(), given, 0.6, progress=False)


# --- what is refused ---


@pytest.mark.parametrize(
    ("run", "select"),
    [
        (calibrate, "threshold"),
        (calibrate, "top-k"),
        (scale_to_budget, "threshold"),
        (find_points, "threshold"),
        (find_points, "top-k"),
    ],
)
def test_a_model_stays_as_it_was_where_a_budget_is_refused(run: Any, select: str) -> None:
    model = pruned(**{**tiny.AS_VIT, "select": select})
    pruning = pruning_of(model)
    points = find_points(model, batches(), [0.85, 0.7], progress=False)
    before = pruning.levels.detach().clone()
    more = {"must_meet": True} if run is scale_to_budget else {}
    budget: Any = [0.05, 0.6] if run is find_points else 0.05
    with pytest.raises(ValueError, match="can't be met"):
        run(model, batches(), budget, progress=False, **more)
    assert torch.equal(pruning.levels, before)
    assert vitprune.points_of(model) == points
