"""What is said about results, and that report.json comes back as it was."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from vitprune.report import findings, model_card, print_plan, print_report
from vitprune.results import (
    Comparison,
    Distribution,
    Environment,
    KeptPatches,
    Latency,
    Macs,
    MetricPair,
    Plan,
    PlanRow,
    Report,
    Throughput,
    Timing,
)

RECIPE = {"model": {"checkpoint": "facebook/deit-tiny"}, "data": {"path": "imagenet-1k"}}


def spread(mean: float) -> Distribution:
    return Distribution(mean=mean, q05=0.5 * mean, q25=0.8 * mean, q50=mean, q75=1.2 * mean, q95=1.5 * mean)


def comparison(accuracy: float | None = 0.921, ratio: float = 0.6, skipped: int = 0) -> Comparison:
    return Comparison(
        images=1000,
        skipped=skipped,
        metrics={} if accuracy is None else {"accuracy": MetricPair(dense=0.924, pruned=accuracy)},
        agreement=0.975,
        macs=Macs(dense=1.25e9, pruned=spread(ratio * 1.25e9)),
        kept=(
            KeptPatches(before_block=4, patches=196, kept=spread(150)),
            KeptPatches(before_block=7, patches=196, kept=spread(80)),
        ),
    )


def speed(batch_size: int, speedup: float) -> Throughput:
    dense = Timing(median=0.1 * speedup, fastest=0.09 * speedup, slowest=0.2 * speedup)
    return Throughput(
        batch_size=batch_size, dense=dense, pruned=Timing(median=0.1, fastest=0.09, slowest=0.2), ideal_speedup=1.6
    )


def report(**changes: Any) -> Report:
    environment = Environment(
        vitprune="0.1.0",
        torch="2.13.0",
        transformers="5.23.0",
        python="3.11.7",
        cpu="Some CPU",
        threads=2,
        device="cpu",
        dtype="float32",
    )
    fields: dict[str, Any] = {
        "environment": environment,
        "recipe": RECIPE,
        "budget": 0.6,
        "comparison": comparison(),
        "throughput": (speed(1, 0.93), speed(16, 1.4), speed(64, 1.52)),
    }
    return Report(**{**fields, **changes})


def printed(value: Report | Plan) -> str:
    console = Console(file=StringIO(), width=140)
    print_report(value, console) if isinstance(value, Report) else print_plan(value, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_report_comes_back_from_its_file(tmp_path: Path) -> None:
    saved = report(calibrated=comparison(0.9), notes=("a note",))
    saved.save(tmp_path / "report.json")
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    assert Report.load(tmp_path / "report.json") == saved
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["schema"] == 1
    assert content["comparison"]["macs"]["ratio"] == pytest.approx(0.6)
    assert content["comparison"]["metrics"]["accuracy"]["difference"] == pytest.approx(-0.003)
    assert content["throughput"][2]["speedup"] == pytest.approx(1.52)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(
        json.dumps({**json.loads(report().model_dump_json(by_alias=True)), "schema": 2})
    )
    with pytest.raises(ValueError, match=r"report\.json is no report that this version of vitprune reads"):
        Report.load(tmp_path / "report.json")


def test_every_field_is_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "report.md").read_text()
    schema = Report.model_json_schema(mode="serialization")
    for part in (schema, *schema["$defs"].values()):
        for name in part["properties"]:
            assert f"`{name}`" in page, name


def test_tables() -> None:
    text = printed(report(calibrated=comparison(0.9)))
    for words in (
        "92.40 %",
        "90.00 %",
        "92.10 %",
        "-0.30 points",
        "1.25 G",
        "750 M (60.0 %)",
        "calibrated only",
        "150.0",
        "1.52x",
        "95.0 %",
        "Some CPU, 2 threads, float32",
    ):
        assert words in text, words
    assert "calibrated only" not in printed(report())


def test_budget_sentence() -> None:
    assert "the budget of 60.0 % is met" in findings(report())[0]
    assert "the budget of 50.0 % is not met" in findings(report(budget=0.5))[0]
    assert "budget" not in findings(report(budget=None))[0]


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        (0.921, "accuracy is 0.30 points below the dense model's: 92.10 % against 92.40 %"),
        (0.934, "accuracy is 1.00 points above"),
        (0.924, "accuracy is that of the dense model"),
    ],
)
def test_quality_sentence(accuracy: float, words: str) -> None:
    assert words in findings(report(comparison=comparison(accuracy)))[1]


def test_without_labels_or_timings() -> None:
    bare = report(comparison=comparison(None, skipped=3), throughput=())
    said = findings(bare)
    assert len(said) == 3
    assert "dense model's answer for 97.5 % of 1000 images" in said[1]
    assert said[2] == "3 broken images were left out."
    assert "Speed" not in printed(bare)
    assert "accuracy" not in model_card(bare, "x")


@pytest.mark.parametrize(
    ("speedups", "words"),
    [
        (
            (0.93, 1.4, 1.5),
            "doesn't pay at small batches: 0.93x (slower) at batch size 1; it pays from batch size 16 on",
        ),
        ((1.2, 1.4, 1.5), "pays at every batch size measured: 1.20x at batch size 1, 1.40x"),
        ((0.8, 1.0, 1.04), "doesn't pay here at any batch size measured: 0.80x (slower) at batch size 1, 1.00x"),
        (
            (1.2, 1.0, 1.5),
            "pays at some batch sizes: 1.20x at batch size 1, 1.50x at batch size 64; not at others: 1.00x",
        ),
    ],
)
def test_where_it_pays(speedups: tuple[float, ...], words: str) -> None:
    rows = tuple(speed(size, speedup) for size, speedup in zip((1, 16, 64), speedups, strict=True))
    said = findings(report(throughput=rows[::-1]))
    assert any(words in sentence for sentence in said), said
    assert any(f"At batch size 64 it has {100 * speedups[2] / 1.6:.1f} %" in sentence for sentence in said)


def front_matter(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def test_model_card() -> None:
    card = model_card(report(), "me/deit-tiny-60")
    head = front_matter(card)
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "image-classification"
    assert {"vitprune", "token-pruning"} <= set(head["tags"])
    assert head["base_model"] == "facebook/deit-tiny"
    assert head["datasets"] == ["imagenet-1k"]
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.921}]
    assert 'AutoModelForImageClassification.from_pretrained("me/deit-tiny-60")' in card
    assert "| accuracy | 92.40 % | 92.10 % | -0.30 points |" in card


def test_model_card_tells_no_local_paths(tmp_path: Path) -> None:
    recipe = {"model": {"checkpoint": str(tmp_path / "vit")}, "data": {"path": str(tmp_path / "photos")}}
    card = model_card(report(recipe=recipe), "pruned-vit")
    assert str(tmp_path) not in card
    assert "`vit` with token pruning" in card
    assert "images of photos only" in card
    assert not {"base_model", "datasets"} & set(front_matter(card))
    assert "A Vision Transformer with token pruning" in model_card(report(recipe={}), "pruned-vit")


def latency(measured: float, predicted: float | None = 0.61) -> Latency:
    times = (Timing(median=seconds, fastest=seconds, slowest=seconds) for seconds in (2.0, 2.0 * measured))
    return Latency(asked=0.6, predicted=predicted, batch_size=16, dense=next(times), pruned=next(times), table=None)


@pytest.mark.parametrize(("measured", "met"), [(0.57, "met"), (0.6, "met"), (0.63, "met"), (0.56, "not met")])
def test_a_latency_budget_is_met_within_five_percent_of_it(measured: float, met: str) -> None:
    said = findings(report(budget=None, latency=latency(measured)))
    assert (
        f"At batch size 16 pruned takes {100 * measured:.1f} % of the dense model's time (the measured table expects "
        f"61.0 %): the latency budget of 60.0 % is {met}."
    ) in said
    text = printed(report(budget=None, latency=latency(measured)))
    assert "Latency budget on Some CPU, 2 threads, float32" in text
    assert "multiply-accumulates (MACs): the budget" not in text


def test_a_latency_that_was_only_checked_expects_nothing() -> None:
    said = findings(report(budget=None, latency=latency(0.6, predicted=None)))
    assert any("of the dense model's time: the latency budget of 60.0 % is met" in sentence for sentence in said)


def test_a_plan_for_a_budget_of_time_shows_the_dense_model_alone() -> None:
    plan = Plan(
        checkpoint="a",
        family="vit",
        model_class="ViTForImageClassification",
        num_blocks=1,
        num_prefix_tokens=1,
        stages=(1,),
        budget=0.6,
        rows=(PlanRow(0, 197, None, 2e6, None),),
        steps=(),
        counts="time",
    )
    text = printed(plan)
    assert "Budget 60.0 % of the time, stages" in text
    assert "2 M" in text
    assert "at the budget" not in text


def test_plan() -> None:
    plan = Plan(
        checkpoint="runs/[a]",
        family="vit",
        model_class="ViTForImageClassification",
        num_blocks=2,
        num_prefix_tokens=1,
        stages=(1,),
        budget=0.6,
        rows=(PlanRow(0, 197, 197.0, 2e6, 2e6), PlanRow(1, 197, 60.5, 2e6, 4e5)),
        steps=("calibrate on [red] images", "save to runs/x"),
    )
    text = printed(plan)
    for words in (
        "runs/[a]: ViTForImageClassification (vit), 2 blocks, 1 prefix token",
        "60.5",
        "400 k",
        "2.4 M (60.0 %)",
    ):
        assert words in text, words
    assert "1. calibrate on [red] images" in text
    assert "2. save to runs/x" in text
