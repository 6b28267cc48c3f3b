"""Every recipe that comes with vitprune is valid, and editors are told so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vitprune.recipe import shipped
from vitprune.recipe.schema import json_schema, load_recipe

SHIPPED = shipped.shipped()


@pytest.mark.parametrize("name", SHIPPED)
def test_it_loads_and_says_how_to_run_it(name: str) -> None:
    path = SHIPPED[name]
    recipe = load_recipe(path)
    assert recipe.output.path.startswith("runs/")
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    assert first == f"# yaml-language-server: $schema={shipped.SCHEMA}"
    assert f"#   vitprune apply recipes/{name}.yaml" in rest
    assert shipped.summary(path)


def test_the_quickstart_brings_its_files() -> None:
    quickstart = load_recipe(SHIPPED["quickstart"])
    for path in (quickstart.model.checkpoint, quickstart.data.path):
        assert Path(path).is_dir()


def test_the_schema_beside_them_is_current() -> None:
    """Make it again with `vitprune schema > recipes/recipe.schema.json`."""
    assert json.loads((shipped.folder() / shipped.SCHEMA).read_text(encoding="utf-8")) == json_schema()
