"""Plans as a person sees them; what they know of a recipe is tested beside `apply`."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

from vitprune.runs.plan import Plan, PlanRow, print_plan


def printed(planned: Plan) -> str:
    console = Console(file=StringIO(), width=200)
    print_plan(planned, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def plan(**changes: Any) -> Plan:
    """Of a model of one block, or another."""
    common = {"checkpoint": "a", "family": "vit", "model_class": "ViTForImageClassification", "num_prefix_tokens": 1}
    return Plan(**{**common, "num_blocks": 1, "stages": (1,), "budget": 0.6, "steps": (), **changes})


def test_a_plan_for_a_budget_of_time_shows_the_dense_model_alone() -> None:
    text = printed(plan(rows=(PlanRow(0, 197, None, 2e6, None),), macs_outside=3e5, counts="time"))
    assert "Budget 60.0 % of the time, stages" in text
    assert "2 M" in text
    assert "at the budget" not in text


def test_blocks_and_steps_are_printed() -> None:
    rows = (PlanRow(0, 197, 197.0, 2e6, 2e6), PlanRow(1, 197, 60.5, 2e6, 4e5))
    steps = ("calibrate on [red] images", "save to runs/x")
    text = printed(plan(checkpoint="runs/[a]", num_blocks=2, rows=rows, macs_outside=6e5, steps=steps))
    for words in (
        "runs/[a]: ViTForImageClassification (vit), 2 blocks, 1 prefix token",
        "60.5",
        "400 k",
        "600 k",
        "3 M (65.2 %)",
    ):
        assert words in text, words
    assert "1. calibrate on [red] images" in text
    assert "2. save to runs/x" in text
