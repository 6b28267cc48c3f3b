"""What a benchmark's target stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitprune.bench.settings import is_recipe, read_part, read_target
from vitprune.recipe.schema import RecipeError

RECIPE = """\
version: 1
model: {checkpoint: facebook/deit-small-patch16-224, dtype: bfloat16}
data: {path: fashion_mnist}
pruning: {dropped: leave}
budget: {macs: 65%}
"""


def test_a_checkpoint_is_the_smallest_recipe() -> None:
    recipe, random_pixels = read_target("facebook/dinov2-small", None)
    assert recipe.model.checkpoint == "facebook/dinov2-small"
    assert random_pixels
    assert "pruning" not in recipe.model_fields_set


def test_a_checkpoint_with_data_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my model").mkdir()
    (tmp_path / "data: 1").mkdir()
    recipe, random_pixels = read_target("my model", "data: 1", ["pruning.dropped=leave", "data.eval.split=val"])
    assert recipe.model.checkpoint == str(tmp_path / "my model")
    assert recipe.data.path == str(tmp_path / "data: 1")
    assert not random_pixels
    assert (recipe.pruning.dropped, recipe.data.eval.split) == ("leave", "val")


def test_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe, random_pixels = read_target("recipe.yaml", None, ["seed=3"])
    assert (recipe.data.path, recipe.seed, random_pixels) == ("fashion_mnist", 3, False)
    (tmp_path / "data: 1").mkdir()
    recipe, _ = read_target("recipe.yaml", "data: 1")
    assert recipe.data.path == str(tmp_path / "data: 1")


def test_is_recipe() -> None:
    assert is_recipe("recipes/quickstart.yaml")
    assert is_recipe("a.yml")
    assert not is_recipe("facebook/dinov2-small")


@pytest.mark.parametrize(
    ("target", "data", "overrides", "message"),
    [
        ("a/b", None, ["pruning.droped=leave"], "--set pruning.droped=leave: pruning.droped: unknown key"),
        ("a/b", None, ["pruning.dropped"], "--set pruning.dropped: write it as key=value"),
        ("./nowhere", None, [], r"\./nowhere: model.checkpoint: '\./nowhere' is not there"),
        ("a/b", "./nowhere", [], r"--data \./nowhere: data.path: '\./nowhere' is not there"),
        ("nowhere.yaml", None, [], "nowhere.yaml: there is no such file"),
    ],
)
def test_wrong(target: str, data: str | None, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_target(target, data, overrides)


def test_read_part() -> None:
    assert read_part("65%") == 0.65
    assert read_part("0.65") == 0.65
    for text, message in (("65", "write 65% or 0.65"), ("0", "above 0%"), ("half", "should be a part such as 65%")):
        with pytest.raises(ValueError, match=message):
            read_part(text)


def test_data_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "\N{LLAMA} é"
    folder.mkdir()
    (tmp_path / "r.yaml").write_text("version: 1\nmodel: {checkpoint: a/b}\ndata: {path: c/d}\nbudget: {macs: 65%}\n")
    assert read_target(str(tmp_path / "r.yaml"), str(folder))[0].data.path == str(folder)
