"""The house itself: what its pages say of it is so."""

from __future__ import annotations

import ast
import html
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from typer.main import get_command

import vitprune
from vitprune.cli import app
from vitprune.pruning import scores
from vitprune.recipe.schema import json_schema

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vitprune"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "_recipes" not in path.parts)
MOST_ENTRIES = 13
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("integrations/*/README.md")]


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def script(name: str) -> ModuleType:
    """One of those that write pages."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_contributing_has_the_rooms_that_are_checked() -> None:
    rooms, text = script("rooms"), (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert rooms.page(text) == text, "run `python docs/rooms.py`"


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES} - {PACKAGE}), ids=dotted)
def test_no_room_is_crowded(folder: Path) -> None:
    entries = [entry for entry in folder.iterdir() if entry.name not in ("__pycache__", "py.typed")]
    assert len(entries) <= MOST_ENTRIES
    assert len(folder.relative_to(PACKAGE).parts) <= 2
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))


def imported(path: Path) -> set[str]:
    """What a file imports of vitprune: `vitprune` for names of the package, else the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "vitprune"}


@pytest.mark.parametrize(
    "path",
    [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("integrations/**/*.py"), *ROOT.glob("recipes/**/*.py")],
    ids=lambda path: path.name,
)
def test_benchmarks_and_integrations_use_the_public_api(path: Path) -> None:
    # counts what only a GPU would run
    inside = {"vitprune.pruning", "vitprune.pruning.kernels"} if path.name == "gpu_model.py" else set()
    assert imported(path) <= {"vitprune", *inside}


def references() -> list[tuple[str, str]]:
    """`module.name` as pages and docstrings write them, with the file."""
    stems = {path.stem for path in MODULES} | {path.parent.name for path in MODULES}
    found = []
    for page in [*PAGES, *MODULES]:
        for text in re.findall(r"`([a-z_]+(?:\.\w+)+)(?:\([^`]*\))?`", page.read_text(encoding="utf-8")):
            head = text.split(".")[0]
            is_ours = head == "vitprune" or head in stems
            if is_ours and not text.endswith((".py", ".pyi", ".yaml", ".json", ".md", ".png", ".safetensors")):
                found.append((str(page.relative_to(ROOT)), text))
    return sorted(set(found))


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("benchmarks/*.sh"), ROOT / "Makefile"], ids=lambda page: page.name)
def test_files_that_are_named_are_there(page: Path) -> None:
    named = re.findall(r"\b(?:tests|benchmarks|docs|vitprune|recipes)/[\w/.-]*\.(?:py|sh|md|yaml)\b", page.read_text())
    missing = [name for name in named if not any((folder / name).exists() for folder in (ROOT, page.parent))]
    assert not missing


def keys(schema: dict[str, Any], of: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Paths of a JSON schema's keys, and their ends: pages write `losses.tokens` for `finetune.losses.tokens`."""
    for part in (of, *of.get("anyOf", []), *of.get("allOf", [])):
        part = schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        for name, inner in part.get("properties", {}).items():
            yield (name,)
            for path in keys(schema, inner):
                yield path
                yield (name, *path)


RECIPE_KEYS = {".".join(path) for path in keys(json_schema(), json_schema())}


@pytest.mark.parametrize(("page", "text"), references())
def test_what_pages_name_is_there(page: str, text: str) -> None:
    head, *names = text.split(".")
    if head == "vitprune":
        assert resolves(vitprune, names), f"{page}: {text}"
        return
    modules = [importlib.import_module(dotted(path)) for path in MODULES if dotted(path).split(".")[-1] == head]
    assert any(resolves(module, names) for module in modules) or text in RECIPE_KEYS, f"{page}: {text}"


def resolves(thing: object, names: list[str]) -> bool:
    for name in names:
        if isinstance(thing, ModuleType) and not hasattr(thing, name):
            try:
                thing = importlib.import_module(f"{thing.__name__}.{name}")
                continue
            except ModuleNotFoundError:
                return False
        if not hasattr(thing, name) and name not in getattr(thing, "__annotations__", {}):
            return False
        thing = getattr(thing, name, None)
    return True


def test_every_public_name_is_in_the_api_page() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"heading: vitprune\.(\w+)", text)) == sorted(vitprune.__all__)


def test_the_page_of_recipe_keys_is_current() -> None:
    keys = script("keys")
    assert keys.PAGE.read_text(encoding="utf-8") == keys.page(), "run `python docs/keys.py`"


def test_the_page_of_commands_is_current() -> None:
    """docs/commands.md, which typer wrote; another version of it would lay out the same words in another way."""
    page = html.unescape((ROOT / "docs" / "commands.md").read_text(encoding="utf-8"))
    sections = re.split(r"^##+ `(vitprune [a-z ]+)`$", page, flags=re.MULTILINE)[1:]
    said = dict(zip(sections[::2], sections[1::2], strict=True))
    verbs: dict[str, Any] = {f"vitprune {name}": verb for name, verb in vars(get_command(app))["commands"].items()}
    verbs |= {f"vitprune recipes {name}": verb for name, verb in verbs["vitprune recipes"].commands.items()}
    write = "run `python -m typer vitprune.cli utils docs --name vitprune --title Commands --output docs/commands.md`"
    assert said.keys() == verbs.keys(), write
    for name, verb in verbs.items():
        options = {option for one in verb.params for option in one.opts if option.startswith("--")} | {"--help"}
        assert set(re.findall(r"^\* `(?:-\w, )?(--[a-z-]+)", said[name], re.MULTILINE)) == options, write
        assert " ".join(verb.help.split()) in said[name], write
        for one in verb.params:
            assert one.help in said[name], write
            default = getattr(one.default, "value", one.default)
            if isinstance(default, str | int | Path) and not isinstance(default, bool):
                assert f"[default: {default}" in said[name], write


def code_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_score_of_the_page_is_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/scores.md, carried out; and an image's answer doesn't depend on its batch."""
    monkeypatch.setattr(scores, "SCORES", dict(scores.SCORES))
    monkeypatch.setattr("vitprune.pruning.selection.SCORES", scores.SCORES)
    (code,) = code_of("scores.md")
    exec(compile(code, "docs/scores.md", "exec"), {"__name__": "page"})
    spec = tiny.POLICIES["as-vit-merge"].model_copy(update={"score": "surprise", "thresholds": (0.4, 0.5)})
    model, x = vitprune.prune_(tiny.build("vit"), spec), tiny.images(4)
    with torch.no_grad(), vitprune.trace(model) as trace:
        together, alone = model(x).logits, torch.cat([model(image).logits for image in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert not trace.keep_masks[0].all()
    assert trace.keep_masks[0].any(1).all()


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_processes_ask_one_another_in_one_place(path: Path) -> None:
    """Which knows when the others don't listen."""
    asks = re.search(r"broadcast_object_list|gather_object|all_gather_object", path.read_text(encoding="utf-8"))
    assert not asks or dotted(path) == "vitprune.runtime.distributed"


def test_a_room_without_torch_imports_none() -> None:
    code = (
        "import sys, vitprune.recipe.schema, vitprune.reports.run_report, vitprune.reports.results, "
        "vitprune.bench.settings; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_the_page_on_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/python.md, from top to bottom, but for what needs torchao: integrations/torchao tests that."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    code = "\n".join(part for part in code_of("python.md") if "torchao" not in part)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(code, "docs/python.md", "exec"), names)
    assert names["found"].ratio == pytest.approx(0.65, abs=0.01)
    assert {path.name for path in tmp_path.iterdir()} >= {"pruned", "adapter", "merged"}
