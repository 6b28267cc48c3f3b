"""Recipes: what is accepted, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from vitprune.cli import app
from vitprune.recipe.for_readers import without_paths
from vitprune.recipe.schema import (
    DataSpec,
    FinetuneSpec,
    LossWeights,
    OutputSpec,
    PruningSpec,
    Recipe,
    RecipeError,
    SplitSpec,
    load_recipe,
    locate,
    require_thresholds,
)

HEAD = """\
version: 1
model: {checkpoint: facebook/deit-small-patch16-224}
data: {path: fashion_mnist}
budget: {macs: 65%}
"""

# id: (text of the file, how the line after `file` begins, the way out that it shows)
BROKEN: dict[str, tuple[str | bytes, str, str]] = {
    "empty-file": ("", ":1: ", "is empty; a recipe is made of sections"),
    "only-comments": ("# nothing\n# yet\n", ":1: ", "is empty"),
    "list-at-the-top": ("# a list\n- version: 1\n", ":2: ", "holds a list; a recipe is made of sections"),
    "word-at-the-top": ("deit\n", ":1: ", "holds 'deit'; a recipe is made of sections"),
    "tabs": ("version: 1\nmodel:\n\tcheckpoint: x\n", ":3: ", "is indented with a tab; YAML wants spaces"),
    "bad-indentation": (HEAD + "seed: 1\n  output: x\n", ":6: ", "check the indentation"),
    "unclosed-list": (
        HEAD + "pruning: {before_blocks: [4, 7\nseed: 1\n",
        ":6: ",
        "check brackets, quotes and indentation",
    ),
    "two-documents": (HEAD + "---\nseed: 1\n", ":5: ", "a recipe is one"),
    "python-tag": (
        HEAD + "seed: !!python/object/apply:os.getpid []\n",
        ":5: ",
        "has the tag !!python/object/apply:os.getpid; remove it",
    ),
    "alias": (HEAD + "calibration: &c {images: 8}\nfinetune: *c\n", ":6: ", "write the value out"),
    "nested-too-deeply": (HEAD + "seed: " + "[" * 5000, ":1: ", "nested too deeply"),
    "binary": (b"\x89PNG\r\n\x1a\n\x00", ": ", "is not UTF-8 text (byte 0); is this a recipe?"),
    "nul-character": ("version: 1\n\x00\n", ":2: ", "unprintable character '\\x00'"),
    "duplicate-section": (HEAD + "seed: 1\nbudget: {macs: 50%}\n", ":6: budget: ", "first at recipe.yaml:4; keep one"),
    "duplicate-key": (HEAD + "finetune:\n  epochs: 1\n  epochs: 2\n", ":7: finetune.epochs: ", "is written twice"),
    "list-as-key": (HEAD + "? [a, b]\n: 1\n", ":5: ", "a key that is not a word"),
    "no-version": (HEAD.replace("version: 1\n", ""), ":1: version: ", "is missing; Format of the recipe; write"),
    "other-version": (HEAD.replace("version: 1", "version: 2"), ":1: version: ", "is 2, should be 1"),
    "no-model": ("version: 1\ndata: {path: x}\nbudget: {macs: 1}\n", ":1: model: ", "is missing; The dense model"),
    "no-budget": (HEAD.replace("macs: 65%", ""), ":4: budget: ", "says nothing; write {macs: 65%} or {latency: 60%}"),
    "two-budgets": (
        HEAD.replace("65%", "65%, latency: 60%"),
        ":4: budget: ",
        "has both macs and latency; keep the one",
    ),
    "device-of-macs": (
        HEAD.replace("65%", "65%, device: cpu"),
        ":4: budget.device: ",
        "has a meaning with budget.latency only; leave it out",
    ),
    "batch-of-macs": (
        HEAD.replace("65%", "65%, batch_size: 16"),
        ":4: budget.batch_size: ",
        "has a meaning with budget.latency only; leave it out",
    ),
    "bare-latency": (HEAD.replace("macs: 65%", "latency: 60"), ":4: budget.latency: ", "is 60; write 60% or 0.6"),
    "unknown-device": (
        HEAD.replace("macs: 65%", "latency: 60%, device: gpu"),
        ":4: budget.device: ",
        "is 'gpu', should be",
    ),
    "no-checkpoint": (
        HEAD.replace("model: {checkpoint: facebook/deit-small-patch16-224}", "model: {dtype: bfloat16}"),
        ":2: model.checkpoint: ",
        "is missing; Hub id or local folder",
    ),
    "empty-section": (HEAD + "pruning:\nseed: 1\n", ":5: pruning: ", "write its keys below it, indented, or leave it"),
    "list-for-a-section": (
        HEAD.replace("model: {checkpoint: facebook/deit-small-patch16-224}", "model:\n- checkpoint: x"),
        ":2: model: ",
        "should be a section, not a list",
    ),
    "word-for-a-section": (HEAD + "finetune: yes\n", ":5: finetune: ", "should be a section, not 'yes'"),
    "section-for-a-word": (HEAD + "output: {path: {x: 1}}\n", ":5: output.path: ", "should be text, not a section"),
    "unknown-section": (HEAD + "prunning: {}\n", ":5: prunning: ", "unknown key (did you mean 'pruning'?)"),
    "unknown-key": (
        HEAD + "finetune:\n  epochs: 1\n  learning_rte: 1e-4\n",
        ":7: finetune.learning_rte: ",
        "unknown key (did you mean 'learning_rate'?)",
    ),
    "key-in-the-wrong-section": (
        HEAD + "learning_rate: 1e-4\n",
        ":5: learning_rate: ",
        "unknown key (did you mean 'finetune.learning_rate'?)",
    ),
    "key-like-no-other": (HEAD + "output: {zzz: 1}\n", ":5: output.zzz: ", "known here are path, overwrite"),
    "unknown-key-in-a-list-of-sections": (
        HEAD
        + "pruning:\n  before_blocks: [1]\n"
        + "  points: [{budget: 80%, ratio: 0.8, levels: [0.1], temperatures: [1.0], lvls: 1}]\n",
        ":7: pruning.points[0].lvls: ",
        "unknown key (did you mean 'levels'?)",
    ),
    "missing-key-in-a-list-of-sections": (
        HEAD + "pruning:\n  before_blocks: [1]\n  points: [{budget: 80%, ratio: 0.8, temperatures: [1.0]}]\n",
        ":7: pruning.points[0].levels: ",
        "is missing",
    ),
    "a-file-that-is-not-there": (
        HEAD.replace("fashion_mnist", "x, label_names: no.yaml"),
        ":3: data.label_names: ",
        "is not there",
    ),
    "a-class-that-is-neither-name-nor-id": (
        HEAD.replace("fashion_mnist", "x, label_names: {a: 1.5}"),
        ":3: data.label_names.a: ",
        "should be a name or the id of a class, not 1.5",
    ),
    "levels-of-a-stage-that-is-not-there": (
        HEAD
        + "pruning:\n  before_blocks: [1]\n"
        + "  points: [{budget: 80%, ratio: 0.8, levels: [0.1, 0.2], temperatures: [1.0]}]\n",
        ":7: pruning.points: ",
        "has 2 levels at 80% for the 1 stages [1]; give one per stage",
    ),
    "yaml-merge": (HEAD + "output: {<<: {path: x}}\n", ":5: output.<<: ", "unknown key"),
    "number-for-text": (
        HEAD.replace("224}", "224, revision: 1234567}"),
        ":2: model.revision: ",
        "should be text, not 1234567; put it in quotes",
    ),
    "empty-text": (HEAD.replace("fashion_mnist", "''"), ":3: data.path: ", "is empty"),
    "text-for-a-number": (
        HEAD + "finetune: {epochs: many}\n",
        ":5: finetune.epochs: ",
        "should be a number, not 'many'",
    ),
    "part-of-an-image": (HEAD + "calibration: {images: 2.5}\n", ":5: calibration.images: ", "a whole number, not 2.5"),
    "bool-for-a-number": (HEAD + "finetune: {batch_size: true}\n", ":5: finetune.batch_size: ", "number, not true"),
    "word-for-a-bool": (
        HEAD + "output: {overwrite: yes}\n",
        ":5: output.overwrite: ",
        "should be true or false, not 'yes'",
    ),
    "negative": (HEAD + "finetune:\n  epochs: -1\n", ":6: finetune.epochs: ", "is -1, should be greater than 0"),
    "negative-seed": (HEAD + "seed: -1\n", ":5: seed: ", "should be greater than or equal to 0"),
    "nan": (HEAD + "finetune: {weight_decay: .nan}\n", ":5: finetune.weight_decay: ", "a finite number, not nan"),
    "infinite": (HEAD + "pruning: {temperature: .inf}\n", ":5: pruning.temperature: ", "a finite number, not inf"),
    "no-losses": (
        HEAD + "finetune:\n  losses: {task: 0, distillation: 0}\n",
        ":6: finetune.losses.distillation: ",
        "one of them should be above 0",
    ),
    "percent-as-number": (HEAD.replace("65%", "65"), ":4: budget.macs: ", "is 65; write 65% or 0.65"),
    "percent-as-text": (HEAD.replace("65%", "'65'"), ":4: budget.macs: ", "is 65; write 65% or 0.65"),
    "more-than-all": (HEAD.replace("65%", "120%"), ":4: budget.macs: ", "is 120%, should be above 0% and at most 100%"),
    "nothing-left": (HEAD.replace("65%", "0%"), ":4: budget.macs: ", "should be above 0% and at most 100%"),
    "no-budget-in-a-list": (
        HEAD.replace("65%", "[]"),
        ":4: budget.macs: ",
        "is an empty list; write a budget such as 65%",
    ),
    "all-of-it-among-others": (
        HEAD.replace("65%", "[100%, 50%]"),
        ":4: budget.macs: ",
        "has 100% among others; leave it",
    ),
    "a-budget-twice": (HEAD.replace("65%", "[50%, 0.5]"), ":4: budget.macs: ", "names the same budget twice"),
    "a-budget-of-many-too-high": (
        HEAD.replace("65%", "[50%, 120%]"),
        ":4: budget.macs[1]: ",
        "is 120%, should be above",
    ),
    "times-in-a-list": (
        HEAD.replace("macs: 65%", "latency: [60%, 50%]"),
        ":4: budget.latency: ",
        "should be a number, not a list",
    ),
    "no-part": (HEAD.replace("65%", "half"), ":4: budget.macs: ", "is 'half', should be a part such as 65% or 0.65"),
    "warmup-all-the-way": (HEAD + "finetune: {warmup: 100%}\n", ":5: finetune.warmup: ", "at least 0% and below 100%"),
    "unknown-choice": (
        HEAD + "pruning:\n  score: redundant\n",
        ":6: pruning.score: ",
        "should be 'head-weighted-class-attention', 'head-weighted-mean-attention' or 'redundancy' "
        "(did you mean 'redundancy'?)",
    ),
    "removed-choice": (
        HEAD + "pruning: {dropped: fuse}\n",
        ":5: pruning.dropped: ",
        "is 'fuse', should be 'leave' or 'merge'",
    ),
    "unknown-choice-in-a-list": (
        HEAD + "evaluate:\n  metrics:\n  - accuracy\n  - top5-accuracy\n",
        ":8: evaluate.metrics[1]: ",
        "(did you mean 'top-5-accuracy'?)",
    ),
    "word-for-a-list": (
        HEAD + "evaluate: {metrics: f1}\n",
        ":5: evaluate.metrics: ",
        "a list such as [a, b], not 'f1'",
    ),
    "stages-not-increasing": (
        HEAD + "pruning: {before_blocks: [7, 4, 10]}\n",
        ":5: pruning.before_blocks: ",
        "does not increase; write [4, 7, 10]",
    ),
    "stage-twice": (HEAD + "pruning: {before_blocks: [4, 4]}\n", ":5: pruning.before_blocks: ", "write [4]"),
    "stage-before-the-first-block": (
        HEAD + "pruning:\n  before_blocks:\n  - 4\n  - 0\n",
        ":8: pruning.before_blocks[1]: ",
        "is 0, should be greater than 0",
    ),
    "no-stages": (
        HEAD + "pruning: {before_blocks: []}\n",
        ":5: pruning.before_blocks: ",
        "write 'auto', 'every' or a list",
    ),
    "stages-misspelt": (
        HEAD + "pruning: {before_blocks: evry}\n",
        ":5: pruning.before_blocks: ",
        "is 'evry', should be 'auto', 'every' or a list of block numbers such as [4, 7, 10]",
    ),
    "stage-not-in-a-list": (
        HEAD + "pruning: {before_blocks: 4}\n",
        ":5: pruning.before_blocks: ",
        "such as [4, 7, 10]",
    ),
    "thresholds-too-few": (
        HEAD + "pruning:\n  before_blocks: [4, 7, 10]\n  thresholds: [0.1, 0.2]\n",
        ":7: pruning.thresholds: ",
        "has 2 numbers for the 3 stages [4, 7, 10]; give one per stage",
    ),
    "thresholds-unused": (
        HEAD + "pruning: {select: top-k, thresholds: [0.1]}\n",
        ":5: pruning.thresholds: ",
        "leave it out or use keep_ratios",
    ),
    "keep-ratios-of-tome": (
        HEAD + "pruning: {select: tome, before_blocks: [1, 2], keep_ratios: [60%, 30%]}\n",
        ":5: pruning.keep_ratios: ",
        "has 0.3, but by ToMe at most half",
    ),
    "thresholds-of-stages-that-are-searched": (
        HEAD + "pruning: {thresholds: [0.1, 0.2, 0.3]}\n",
        ":5: pruning.thresholds: ",
        "before_blocks doesn't say for which stages; name the blocks there",
    ),
    "exponent-unused": (
        HEAD + "pruning: {score: head-weighted-class-attention, redundancy_exponent: 3}\n",
        ":5: pruning.redundancy_exponent: ",
        "has no meaning with score: head-weighted-class-attention; leave it out",
    ),
    "threshold-rate-unused": (
        HEAD + "finetune: {threshold_learning_rate: 0.001}\n",
        ":5: finetune.threshold_learning_rate: ",
        "has no meaning with thresholds: scaled; leave it out or write thresholds: learned",
    ),
    "budget-loss-unused": (
        HEAD + "finetune: {thresholds: calibrated, losses: {budget: 10}}\n",
        ":5: finetune.losses: ",
        "has budget: 10, which has no meaning with thresholds: calibrated",
    ),
    "weights-rate-unused": (
        HEAD + "finetune: {train: thresholds, thresholds: learned, learning_rate: 1e-4}\n",
        ":5: finetune.learning_rate: ",
        "has no meaning with train: thresholds; theirs is threshold_learning_rate",
    ),
    "keep-ratios-unused": (HEAD + "pruning: {keep_ratios: [90%]}\n", ":5: pruning.keep_ratios: ", "or use thresholds"),
    "tome-by-another-score": (
        HEAD + "pruning: {score: head-weighted-class-attention, select: tome}\n",
        ":5: pruning.select: ",
        "needs pruning.score to be 'redundancy'",
    ),
    "tome-that-leaves": (HEAD + "pruning: {select: tome, dropped: leave}\n", ":5: pruning.dropped: ", "needs 'merge'"),
    "checkpoint-not-there": (
        HEAD.replace("facebook/deit-small-patch16-224", "./missing"),
        ":2: model.checkpoint: ",
        "'./missing' is not there; looked for",
    ),
    "data-not-there": (HEAD.replace("fashion_mnist", "x.parquet"), ":3: data.path: ", "'x.parquet' is not there"),
}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe(text: str | bytes, name: str = "recipe.yaml") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def load(text: str, *overrides: str) -> Recipe:
    return load_recipe(recipe(text), overrides)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(("text", "place", "way_out"), BROKEN.values(), ids=BROKEN)
def test_a_broken_recipe_says_where_and_what_to_do(text: str | bytes, place: str, way_out: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(text))
    (line,) = str(caught.value).splitlines()
    assert line.startswith("recipe.yaml" + place)
    assert way_out in line
    assert "Input should" not in line

    result = CliRunner().invoke(app, ["plan", "recipe.yaml"])
    assert result.exit_code == 2
    assert result.stderr == line + "\n"


def test_files_that_cannot_be_read() -> None:
    for path, why in ((Path("missing.yaml"), "there is no such file"), (Path(), "is a folder")):
        with pytest.raises(RecipeError, match=why):
            load_recipe(path)


def test_all_errors_at_once_in_the_order_of_the_lines() -> None:
    text = HEAD.replace("65%", "65") + "seed: x\nmodel: {}\nfinetune: {epochs: -1, epoch: 1}\n"
    found = problems(text, "a=1", "budget.mac=50%")
    assert [line.split(": ")[:2] for line in found] == [
        ["recipe.yaml:4", "budget.macs"],
        ["recipe.yaml:5", "seed"],
        ["recipe.yaml:6", "model"],
        ["recipe.yaml:7", "finetune.epochs"],
        ["recipe.yaml:7", "finetune.epoch"],
        ["--set budget.mac=50%", "budget.mac"],
        ["--set a=1", "a"],
    ]


def test_a_recipe_of_model_data_and_budget_is_complete() -> None:
    minimal = load(HEAD)
    assert minimal.model.checkpoint == "facebook/deit-small-patch16-224"
    assert minimal.data.train == SplitSpec(split="train")
    assert minimal.data.eval == SplitSpec(split="test")
    assert minimal.pruning == PruningSpec()
    assert minimal.pruning.before_blocks == "auto"
    assert minimal.finetune is None
    assert minimal.evaluate.batch_sizes == (1, 16, 64)
    assert (minimal.output.path, minimal.output.overwrite, minimal.seed) == ("runs/pruned", False, 0)


def test_what_people_write() -> None:
    full = load(
        HEAD.replace("65%", '"65 %"')
        + """
pruning: {before_blocks: [1, 2], select: top-k, keep_ratios: [90%, 0.8], temperature: 1e-4}
finetune: {epochs: 1, warmup: 5%, learning_rate: "2e-5", mixed_precision: no, losses: {task: 1}}
evaluate: {metrics: [], batch_sizes: []}
"""
    )
    assert full.budget.macs == 0.65
    assert full.pruning.before_blocks == (1, 2)
    assert full.pruning.keep_ratios == (0.9, 0.8)
    assert full.pruning.temperature == 1e-4
    assert full.finetune == FinetuneSpec(learning_rate=2e-5, losses=LossWeights(task=1.0))
    assert (full.evaluate.metrics, full.evaluate.batch_sizes) == ((), ())


@pytest.mark.parametrize("written", ["65%", "65 %", "'65%'", "0.65", "'0.65'", ".65", "6.5e-1", "65.0%"])
def test_fractions(written: str) -> None:
    assert load(HEAD.replace("65%", written)).budget.macs == 0.65


def test_several_budgets() -> None:
    budget = load(HEAD.replace("65%", "[65%, 0.8, 50%]")).budget
    assert budget.points == (0.65, 0.8, 0.5)
    assert (budget.part, budget.strictest) == (0.65, 0.5)
    assert load(HEAD).budget.points == (0.65,)


def test_a_budget_of_time() -> None:
    budget = load(HEAD.replace("macs: 65%", "latency: 60%, device: cpu, batch_size: 8")).budget
    assert (budget.macs, budget.latency, budget.part, budget.device, budget.timed_batch) == (None, 0.6, 0.6, "cpu", 8)
    assert load(HEAD.replace("macs: 65%", "latency: 60%")).budget.timed_batch == 16
    assert load(HEAD).budget.part == 0.65


def test_a_limit_keeps_the_usual_split() -> None:
    assert load(HEAD, "data.train.limit=100").data.train == SplitSpec(split="train", limit=100)
    assert load(HEAD, "data.eval={limit: 100}").data.eval == SplitSpec(split="test", limit=100)


def test_overrides() -> None:
    text = HEAD + "finetune: {epochs: 3, losses: {task: 0.5}}\npruning:\n"
    changed = load(
        text,
        "finetune.epochs=1",
        "finetune.losses.tokens = 4",
        "pruning.before_blocks=[4, 7]",
        "data.name=a=b",
        "output={path: x}",
        "budget.macs=50%",
    )
    assert changed.finetune == FinetuneSpec(epochs=1.0, losses=LossWeights(task=0.5, tokens=4.0))
    assert changed.pruning.before_blocks == (4, 7)
    assert (changed.data.name, changed.output.path, changed.budget.macs) == ("a=b", "x", 0.5)
    assert load(text, "pruning={}", "output.path=runs/exp #3").output.path == "runs/exp #3"
    assert load(text, "pruning={}", "data.name=a\t#3").data.name == "a\t#3"
    assert load(text, "pruning={}", "data.name=#3").data.name == "#3"
    assert load(text, "pruning={}", 'data.name="a" # why').data.name == "a"
    assert load(text, "pruning={}", "finetune=null").finetune is None
    assert load(text, "pruning={}", "finetune=null", "finetune.epochs=2").finetune == FinetuneSpec(epochs=2.0)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("finetune.epochs=x", "finetune.epochs: should be a number, not 'x'"),
        ("finetune.epoch=1", "finetune.epoch: unknown key (did you mean 'epochs'?)"),
        ("finetune.epochs=", "finetune.epochs: should be a number, not nothing"),
        ("finetune={epoch: 1}", "finetune.epoch: unknown key (did you mean 'epochs'?)"),
        ("model={}", "model.checkpoint: is missing; Hub id or local folder of a ViT, such as"),
        ("pruning.before_blocks=[4, 7", "pruning.before_blocks: is not YAML: expected ',' or ']'"),
        ("pruning.before_blocks=[4, 0]", "pruning.before_blocks[1]: is 0, should be greater than 0"),
        ("model.checkpoint.name=x", "model.checkpoint: holds 'facebook/deit-small-patch16-224', so nothing can be set"),
        ("data.path=./x", "data.path: './x' is not there"),
        ("epochs", "write it as key=value, such as finetune.epochs=1"),
        ("=1", "write it as key=value"),
        ("finetune..epochs=1", "write it as key=value"),
    ],
)
def test_a_broken_override_is_its_own_place(override: str, line: str) -> None:
    (found,) = problems(HEAD, override)
    assert found.startswith(f"--set {override}: {line}")


def test_an_override_mends_what_the_file_has_wrong() -> None:
    assert load(HEAD.replace("65%", "65"), "budget.macs=65%").budget.macs == 0.65


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    for folder in (beside / "model", beside / "both", elsewhere / "images", elsewhere / "both"):
        folder.mkdir(parents=True)
    text = HEAD.replace("facebook/deit-small-patch16-224", "model").replace("fashion_mnist", "images")
    path = recipe(text, "recipes/recipe.yaml").absolute()
    monkeypatch.chdir(elsewhere)
    found = load_recipe(path)
    assert found.model.checkpoint == str(beside / "model")
    assert found.data.path == str(elsewhere / "images")
    assert found.output.path == "runs/pruned"
    assert load_recipe(path, ["data.path=both"]).data.path == str(elsewhere / "both")  # as a shell would see it
    path.write_text(text.replace("images", "./both"))
    assert load_recipe(path).data.path == str(beside / "both")


@pytest.mark.parametrize("missing", ["./x", "../x", "/x", "~/x/y", "a/b/c", "x.parquet"])
def test_a_local_path_that_is_not_there(missing: str) -> None:
    (line,) = problems(HEAD.replace("fashion_mnist", missing))
    assert line.startswith(f"recipe.yaml:3: data.path: {missing!r} is not there; looked for /")


@pytest.mark.parametrize("hub_id", ["imagenet-1k", "ILSVRC/imagenet-1k", "hf://datasets/a/b", "facebook/dinov2.5"])
def test_hub_ids_stay(hub_id: str) -> None:
    assert load(HEAD.replace("fashion_mnist", hub_id)).data.path == hub_id


@pytest.mark.parametrize(
    "more",
    [
        "",
        "model.revision='1234567'",
        "model.revision='1e7'",
        "budget={latency: 60%}",
        "budget={latency: 60%, device: cpu, batch_size: 4}",
        "data.name='true'",
        "data.name='Größe: 1 # x'",
        "finetune.learning_rate=1.2345678901234567e-07",
        "pruning={before_blocks: [4, 7, 10], thresholds: [1e-3, 0, 0.1]}",
        "pruning={select: random, before_blocks: [4], keep_ratios: [0.3333333333333333]}",
    ],
)
def test_round_trip(more: str) -> None:
    first = load(HEAD, *([more] if more else []))
    assert load(first.to_yaml()) == first


def test_other_yaml_readers_understand_what_is_written() -> None:
    written = load(HEAD, "finetune.mixed_precision=no", "data.name=2024-01-01").to_yaml()
    assert "mixed_precision: 'no'" in written
    assert "name: '2024-01-01'" in written


def test_python_users_may_write_lists() -> None:
    spec = PruningSpec(
        before_blocks=[4, 7, 10],
        thresholds=[0.001, 0.002, 0.003],
        score="head-weighted-class-attention",
        dropped="leave",
    )
    assert (spec.before_blocks, spec.thresholds) == ((4, 7, 10), (0.001, 0.002, 0.003))
    assert hash(spec) == hash(spec.model_copy())
    with pytest.raises(ValidationError, match="frozen"):
        spec.min_tokens = 2
    with pytest.raises(ValueError, match="does not increase"):
        PruningSpec(before_blocks=[7, 4])


def test_stages() -> None:
    assert PruningSpec(before_blocks=[4, 7]).stages(12) == (4, 7)
    assert PruningSpec().stages(12) == (1, 4, 7)  # until they are searched
    assert PruningSpec().stages(24) == (2, 8, 14)
    assert PruningSpec(before_blocks="every").stages(4) == PruningSpec(select="tome").stages(4) == (1, 2, 3)
    outside = "pruning.before_blocks: stage 99 is outside the model's 12 blocks (1 to 11)"
    with pytest.raises(ValueError, match="stage 99") as caught:
        PruningSpec(before_blocks=[4, 99]).stages(12)
    assert str(caught.value) == outside
    with pytest.raises(ValueError, match=r"pruning.thresholds: has 2 numbers for 3 stages in 4 blocks"):
        PruningSpec(before_blocks="every", thresholds=[0.1, 0.2]).stages(4)


def test_what_shows_only_beside_the_model_gets_its_line() -> None:
    text = HEAD + "pruning:\n  before_blocks: [4, 99]\n"
    with pytest.raises(RecipeError) as caught:
        load(text).pruning.stages(12)
    assert str(locate(caught.value, "recipe.yaml")).startswith("recipe.yaml:6: pruning.before_blocks: stage 99")
    overrides = ["pruning.before_blocks=[98]"]
    assert str(locate(caught.value, "recipe.yaml", overrides)).startswith("--set pruning.before_blocks=[98]: ")


def test_paths_have_environment_variables_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "images").mkdir()
    text = HEAD.replace("fashion_mnist", "$DATA/images") + 'output: {path: "~/${DATA}"}\n'
    (tmp_path / "r.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.data.path == str(tmp_path / "images")
    assert recipe.output.path == f"{tmp_path}/home/{tmp_path}"
    assert DataSpec(path="~/images").path == f"{tmp_path}/home/images"
    with pytest.raises(RecipeError, match=r"output\.path: .*no environment variable NOWHERE is set; set it"):
        load_recipe(tmp_path / "r.yaml", ["output.path=$NOWHERE/x"])
    assert load_recipe(tmp_path / "r.yaml", ["output.path=for-$5"]).output.path == "for-$5"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (".", "the budget of 60.0% is missed by data.label_column in ./here"),
        ("/anywhere/runs/x", "/anywhere/runs/x is full: 60.0%"),
    ],
)
def test_notes_name_the_last_part_of_paths(output: str, said: str) -> None:
    recipe = load(HEAD).model_copy(update={"output": OutputSpec(path=output)})
    assert without_paths(said, recipe) == said.replace("/anywhere/runs/", "")


def test_a_name_with_a_dollar_that_is_there_is_meant_so(tmp_path: Path) -> None:
    (tmp_path / "$HOME").mkdir()
    assert DataSpec(path=f"{tmp_path}/$HOME").path == f"{tmp_path}/$HOME"


def test_a_threshold_has_to_be_a_number_of_float32() -> None:
    assert PruningSpec(before_blocks=[1], thresholds=[3e38]).thresholds == (3e38,)
    with pytest.raises(ValueError, match=r"has 1e\+39, but a threshold is at most 3\.4e\+38"):
        PruningSpec(before_blocks=[1], thresholds=[1e39])


def test_learned_thresholds_need_thresholds() -> None:
    learned = FinetuneSpec(thresholds="learned")
    require_thresholds(PruningSpec(), learned)
    with pytest.raises(ValueError, match=r"thresholds: learned has none to learn, as pruning\.select is 'tome'"):
        require_thresholds(PruningSpec(select="tome"), learned)
    for spec in ({}, {"thresholds": "scaled"}, {"thresholds": "calibrated"}):
        with pytest.raises(ValueError, match=r"trains thresholds, but these are \w+; write thresholds: learned"):
            FinetuneSpec.model_validate({"train": "thresholds", **spec})
