"""Recipes, configs and reports that nobody would write: read, or refused in plain words.

VITPRUNE_FUZZ=10000 tries so many of each, and says which failed; by default there are few.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_up_report
import pytest
import samples
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import vitprune
from vitprune.recipe.schema import RecipeError, load_recipe
from vitprune.reports.model_card import model_card
from vitprune.reports.results import Report
from vitprune.reports.run_report import findings, tables_of

TRIES = int(os.environ.get("VITPRUNE_FUZZ", "150"))
fuzz = settings(
    max_examples=TRIES,
    deadline=None,
    database=None,
    derandomize=TRIES < 1000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# sizes that a model can be built with in no time
NUMBERS = st.one_of(st.integers(-3, 40), st.sampled_from([0.5, -1.5, 1e300, 65, 10**20]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=8), st.sampled_from(["65%", "auto"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=5,
)
RECIPE: dict[str, Any] = {
    "version": 1,
    "model": {"checkpoint": "some/model", "dtype": "float32", "task": "single-label"},
    "data": {"path": "some/data", "train": {"split": "train", "limit": 5}, "label_names": {"a": 1}},
    "pruning": {"before_blocks": [1, 2], "thresholds": [0.1, 0.2], "score": "redundancy", "dropped": "merge"},
    "budget": {"macs": "65%"},
    "finetune": {"epochs": 1, "losses": {"task": 1.0}, "checkpoint_every": "10 min"},
    "evaluate": {"batch_sizes": [1, 16], "metrics": ["accuracy"]},
    "output": {"path": "runs/x"},
    "seed": 0,
}


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in below for place in places(value, (*path, key)))]


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    result = copy.deepcopy(tree)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return result


def changes(tree: Any) -> st.SearchStrategy[Any]:
    """The tree with one or two of its values replaced."""

    def once(found: Any) -> st.SearchStrategy[Any]:
        return st.tuples(st.sampled_from(places(found)), VALUES).map(lambda change: changed(found, *change))

    return st.just(tree).flatmap(once) | st.just(tree).flatmap(once).flatmap(once)


def result_of(refusal: type[Exception], call: Callable[..., Any], *args: Any) -> Any:
    """What a call gives; None where it refuses in words, which is the only way in which it may fail."""
    try:
        return call(*args)
    except refusal as error:
        text = str(error)
    assert text
    return None


@fuzz
@given(changes(RECIPE))
@example({**RECIPE, "seed": float("nan")})
def test_a_recipe_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    recipe = result_of(RecipeError, load_recipe, path)
    if recipe is None:
        return
    again = path.with_name("again.yaml")
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(again) == recipe


@fuzz
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@example(b"version: 1\nmodel: *a\n")
@example(b"&a [*a]")
@example(b"? [a]\n: 1\n")
@example(b"version: 2001-01-01")
def test_any_text_is_refused(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_bytes(text)
    with pytest.raises(RecipeError):
        load_recipe(path)


@fuzz
@given(st.text(max_size=20), VALUES)
@example("model.checkpoint", {"a": 1})
@example("budget", "{")
def test_any_override_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "whole.yaml"
    path.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    for override in (f"{key}={value}", key, f"budget.macs={value}", f"pruning.thresholds={value}"):
        result_of(RecipeError, load_recipe, path, [override])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    dense = vitprune.load(samples.write_checkpoint(folder / "dense"))
    return vitprune.save(vitprune.prune_(dense, {"before_blocks": [1, 3], "thresholds": [0.1, 0.2]}), folder / "pruned")


CONFIG_KEYS = [
    "architectures",
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "image_size",
    "patch_size",
    "id2label",
    "problem_type",
    "quantization_config",
    "dtype",
    "hidden_act",
    "qkv_bias",
]


@fuzz
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")  # transformers warns of much that is odd; what is asked is how it ends
def test_a_config_is_read_or_refused(checkpoint: Path, data: st.DataObject) -> None:
    file = checkpoint / "config.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    known = {key: whole[key] for key in CONFIG_KEYS if key in whole}
    odd = data.draw(changes(known))
    file.write_text(json.dumps({**whole, **odd} if isinstance(odd, dict) else odd), encoding="utf-8")
    try:
        result_of(ValueError, vitprune.load, checkpoint)
    finally:
        file.write_text(json.dumps(whole), encoding="utf-8")


REPORT: dict[str, Any] = json.loads(made_up_report.report().model_dump_json(by_alias=True))


@fuzz
@given(changes(REPORT))
def test_a_report_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "report.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    report = result_of(ValueError, Report.load, path)
    if report is None:
        return
    assert findings(report)
    assert tables_of(report)
    assert model_card(report, "out")
