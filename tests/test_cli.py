"""The command line: verbs, exit codes, and what stays away from torch."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from vitprune import __version__, cli
from vitprune.bench.settings import BenchSettings
from vitprune.cli import app
from vitprune.recipe.schema import Recipe, RecipeError, json_schema, load_recipe

RECIPE = """\
version: 1
model: {checkpoint: facebook/deit-small-patch16-224}
data: {path: fashion_mnist}
pruning:
  before_blocks: [4, 99]
budget: {macs: 65%}
"""


class Heavy:
    """Stands in for the modules that do the work and show it: records calls, raises what it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error: BaseException | None = None

    def run(self, verb: str, *arguments: object) -> str:
        self.calls.append((verb, *arguments))
        if self.error:
            raise self.error
        return f"result of {verb}"


@pytest.fixture
def heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Heavy:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VITPRUNE_DEBUG", raising=False)
    Path("recipe.yaml").write_text(RECIPE)
    heavy = Heavy()
    names = (
        "runs.apply",
        "runs.evaluate",
        "runs.plan",
        "runs.prefetch",
        "runs.show",
        "reports.token_pictures",
        "bench.sweep",
        "reports.run_report",
        "reports.bench_report",
    )
    modules = {name: ModuleType(f"vitprune.{name}") for name in names}
    for verb in ("apply", "plan", "evaluate"):
        setattr(
            modules[f"runs.{verb}"],
            verb,
            lambda *arguments, verb=verb, **options: heavy.run(
                verb, *arguments, *(name for name, value in options.items() if value)
            ),
        )
    vars(modules["runs.prefetch"])["prefetch"] = lambda recipe: heavy.run("prefetch", recipe).split(" of ")
    vars(modules["bench.sweep"])["bench"] = lambda settings, output: heavy.run("bench", settings, output)
    vars(modules["runs.show"])["show_files"] = lambda *arguments, output, **options: [
        (heavy.run("show", *arguments, options), output / "a.png")
    ]
    vars(modules["reports.token_pictures"])["in_a_line"] = str.upper
    for name, module in (("print_report", "reports.run_report"), ("print_plan", "runs.plan")):
        setattr(modules[module], name, lambda result, console, name=name: console.print(f"{name}: {result}"))
    vars(modules["reports.bench_report"]).update(
        print_benchmark=lambda result, console: console.print(f"print_benchmark: {result}"),
        print_files=lambda result, folder, console: console.print(f"print_files: {result} in {folder}"),
    )
    for module in modules.values():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return heavy


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    ("verb", "arguments", "printed"),
    [
        ("apply", (), "print_report: result of apply\nThe page: runs/pruned/report.html"),
        ("plan", (), "print_plan: result of plan"),
        ("prefetch", (), "result\nprefetch"),
        ("evaluate", ("runs/x",), "print_report: result of evaluate\nThe page: runs/evaluate/report.html"),
    ],
)
def test_verbs(heavy: Heavy, verb: str, arguments: tuple[str, ...], printed: str) -> None:
    result = invoke(verb, *arguments, "recipe.yaml", "--set", "finetune.epochs=2", "--set", "data.name=a=b")
    assert (result.exit_code, result.stdout, result.stderr) == (0, printed + "\n", "")
    called, *given = heavy.calls[0]
    (recipe,) = (value for value in given if isinstance(value, Recipe))
    output = (Path("runs/evaluate"),) if verb == "evaluate" else ()
    assert (called, *given) == (verb, *arguments, recipe, *output)
    assert recipe.finetune
    assert (recipe.finetune.epochs, recipe.data.name) == (2.0, "a=b")


def test_a_quiet_bench_draws_its_pictures(heavy: Heavy, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[object, bool]] = []
    module = sys.modules["vitprune.reports.bench_report"]
    monkeypatch.setattr(module, "print_files", lambda _, folder, console: drawn.append((folder, console.quiet)))
    result = invoke("bench", "facebook/dinov2-small", "--quiet", "--output", "here")
    assert (result.exit_code, result.stdout, drawn) == (0, "", [(Path("here"), True)])


def test_bench(heavy: Heavy) -> None:
    several = ["--macs", "80%", "--macs", "0.5", "--batch-size", "1", "--batch-size", "64", "--dtype", "bfloat16"]
    sizes = ["--image-size", "224", "--image-size", "448", "--mode", "eager", "--mode", "compiled", "--repeats", "5"]
    training = ["--training", "--training-batch-size", "8", "--output", "here", "--set", "pruning.dropped=leave"]
    result = invoke("bench", "facebook/dinov2-small", *several, *sizes, *training)
    printed = "print_benchmark: result of bench\nprint_files: result of bench in here\n"
    assert (result.exit_code, result.stdout, result.stderr) == (0, printed, "")
    ((_, settings, output),) = heavy.calls
    assert output == Path("here")
    assert settings == BenchSettings(
        settings.recipe,
        True,
        targets=(0.8, 0.5),
        batch_sizes=(1, 64),
        dtypes=("bfloat16",),
        image_sizes=(224, 448),
        modes=("eager", "compiled"),
        repeats=5,
        training=True,
        training_batch_size=8,
    )
    assert settings.recipe.model.checkpoint == "facebook/dinov2-small"
    assert settings.recipe.pruning.dropped == "leave"


class Reported(str):
    """Stands in for a report."""

    def model_dump_json(self, **options: object) -> str:
        return json.dumps({"report": self})


@pytest.mark.parametrize("verb", [("apply",), ("evaluate", "runs/x")])
def test_json_and_nothing_else_or_nothing_at_all(
    heavy: Heavy, verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = heavy.run
    monkeypatch.setattr(heavy, "run", lambda *arguments: Reported(run(*arguments)))
    result = invoke(*verb, "recipe.yaml", "--json")
    assert json.loads(result.stdout) == {"report": f"result of {verb[0]}"}
    assert result.stderr == ""
    assert (invoke(*verb, "recipe.yaml", "--quiet").output, heavy.calls[1][0]) == ("", verb[0])
    heavy.error = ValueError("no data")
    assert invoke(*verb, "recipe.yaml", "-q").stderr == "failed: no data (VITPRUNE_DEBUG=1 shows where)\n"


def test_show(heavy: Heavy) -> None:
    result = invoke("show", "runs/x", "a.png", "folder", "--dense", "facebook/deit", "--output", "here")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "here/a.png: RESULT OF SHOW\n", "")
    rest = {"data": None, "split": None, "rows": None, "dense": "facebook/deit", "budget": None}
    assert heavy.calls == [("show", "runs/x", ["a.png", "folder"], rest)]
    heavy.error = ValueError("there is no image in folder")
    failed = invoke("show", "runs/x", "--data", "mnist", "--split", "train", "--rows", "3,5", "--budget", "50%")
    assert (failed.exit_code, failed.stderr) == (
        1,
        "failed: there is no image in folder (VITPRUNE_DEBUG=1 shows where)\n",
    )
    assert heavy.calls[1][2:] == (
        [],
        {"data": "mnist", "split": "train", "rows": "3,5", "dense": None, "budget": "50%"},
    )


def test_bench_of_a_recipe_by_default(heavy: Heavy) -> None:
    assert invoke("bench", "recipe.yaml").exit_code == 0
    ((_, settings, output),) = heavy.calls
    assert settings == BenchSettings(settings.recipe)
    assert settings.recipe.data.path == "fashion_mnist"
    assert output == Path("runs/bench")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe.yaml", "--macs", "65"], "is 65; write 65% or 0.65"),
        (["recipe.yaml", "--batch-size", "0"], "--batch-size"),
        (["recipe.yaml", "--dtype", "int8"], "--dtype"),
        (["recipe.yaml", "--mode", "fast"], "--mode"),
        (["recipe.yaml", "--training-batch-size", "8"], "--training-batch-size: is of steps of fine-tuning"),
        (["recipe.yaml", "--set", "seed=x"], "--set seed=x: seed: should be a whole number"),
        (["a/b", "--set", "sed=1"], "--set sed=1: sed: unknown key"),
        (["./nowhere"], "./nowhere: model.checkpoint: './nowhere' is not there"),
        ([], "Missing argument"),
    ],
)
def test_bench_wrong_usage(heavy: Heavy, arguments: list[str], message: str) -> None:
    result = invoke("bench", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not heavy.calls


def test_bench_failures(heavy: Heavy) -> None:
    heavy.error = ValueError("ViT takes no images of 225 px")
    result = invoke("bench", "a/b")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "failed: ViT takes no images of 225 px (VITPRUNE_DEBUG=1 shows where)\n"
    recipe = load_recipe("recipe.yaml")
    with pytest.raises(RecipeError) as caught:
        recipe.pruning.stages(12)
    heavy.error = caught.value
    assert invoke("bench", "recipe.yaml").stderr.startswith("recipe.yaml:5: pruning.before_blocks: stage 99 is outside")
    result = invoke("bench", "a/b", "--set", "pruning.before_blocks=[4, 99]")
    assert (result.exit_code, result.stderr.startswith("pruning.before_blocks: stage 99 is outside")) == (2, True)


@pytest.mark.parametrize("error", [ValueError("no labels"), OSError(28, "No space left"), RuntimeError("no labels")])
def test_a_failure_is_one_clear_message(heavy: Heavy, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    heavy.error = error
    result = invoke("apply", "recipe.yaml")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"failed: {error} (VITPRUNE_DEBUG=1 shows where)\n"
    monkeypatch.setenv("VITPRUNE_DEBUG", "1")
    result = invoke("apply", "recipe.yaml")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_a_loader_process_that_was_killed(heavy: Heavy) -> None:
    heavy.error = RuntimeError("DataLoader worker (pid 16314) is killed by signal: Killed. ")
    result = invoke("apply", "recipe.yaml")
    assert result.exit_code == 1
    assert "a process that loads images was killed, most often for want of memory; lower data.workers" in result.stderr
    heavy.error = RuntimeError(
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit."
    )
    assert "for want of shared memory (in a container: --shm-size); lower data" in invoke("apply", "recipe.yaml").stderr


@pytest.mark.parametrize(("kind", "said"), [(OSError, "Hub: 503"), (ValueError, "row 3: class 17 is none\nof 10")])
def test_an_error_in_a_loader_process_is_said_as_it_was(heavy: Heavy, kind: type[Exception], said: str) -> None:
    heavy.error = kind(
        f"Caught {kind.__name__} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        f'  File "worker.py", line 1, in fetch\n    raise {kind.__name__}: no\n{kind.__name__}: {said}\n'
    )
    assert invoke("apply", "recipe.yaml").stderr == f"failed: {said} (VITPRUNE_DEBUG=1 shows where)\n"


@pytest.mark.parametrize("error", [AssertionError("ours"), KeyError("ours")])
def test_our_bugs_keep_their_traceback(heavy: Heavy, error: Exception) -> None:
    heavy.error = error
    assert invoke("apply", "recipe.yaml").exception is error


def test_ctrl_c(heavy: Heavy) -> None:
    heavy.error = KeyboardInterrupt()
    result = invoke("apply", "recipe.yaml")
    assert result.exit_code == 130
    assert result.stderr == "interrupted; nothing half-written is left in the output path\n"


def test_a_recipe_that_does_not_fit_the_model_is_a_wrong_recipe(heavy: Heavy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["vitprune.runs.plan"], "plan", lambda recipe: recipe.pruning.stages(12))
    result = invoke("plan", "recipe.yaml")
    assert result.exit_code == 2
    place = "recipe.yaml:5: pruning.before_blocks: "
    assert result.stderr == f"{place}stage 99 is outside the model's 12 blocks (1 to 11)\n"


def test_wrong_usage(heavy: Heavy) -> None:
    for arguments in (["apply"], ["aply", "recipe.yaml"], ["apply", "missing.yaml"], ["apply", "recipe.yaml", "--set"]):
        assert invoke(*arguments).exit_code == 2
    assert not heavy.calls
    result = invoke("apply", "missing.yaml")
    assert result.stderr.startswith("missing.yaml: there is no such file; `vitprune recipes ls`")


def test_schema_and_version() -> None:
    assert json.loads(invoke("schema").stdout) == json_schema()
    assert invoke("--version").stdout == f"vitprune {__version__}\n"


def test_recipes_ls() -> None:
    lines = invoke("recipes", "ls").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["deit-small-imagenet", "dinov2-small-imagenet", "quickstart"]
    assert lines[0].split(maxsplit=1)[1].startswith("DeiT-S on ImageNet-1k")


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped recipes, one with files beside it."""
    shelf = tmp_path / "shelf"
    (shelf / "small" / "data").mkdir(parents=True)
    (shelf / "small" / "__pycache__").mkdir()
    (shelf / "small" / "data" / "train.parquet").write_text("rows")
    (shelf / "small.yaml").write_text(RECIPE)
    (shelf / "large.yaml").write_text(RECIPE)
    (shelf / "recipe.schema.json").write_text("{}")
    monkeypatch.setattr("vitprune.recipe.shipped.folder", lambda: shelf)
    monkeypatch.chdir(tmp_path)
    return shelf


def test_recipes_cp(shelf: Path) -> None:
    result = invoke("recipes", "cp", "small", "mine")
    assert (result.exit_code, result.stdout.split()) == (
        0,
        ["mine/small.yaml", "mine/small", "mine/recipe.schema.json"],
    )
    assert sorted(str(path) for path in Path("mine").rglob("*")) == [
        "mine/recipe.schema.json",
        "mine/small",
        "mine/small.yaml",
        "mine/small/data",
        "mine/small/data/train.parquet",
    ]
    assert invoke("recipes", "cp", "large.yaml", "mine").stdout.split() == ["mine/large.yaml"]


def test_recipes_cp_overwrites_nothing(shelf: Path) -> None:
    Path("small").mkdir()
    result = invoke("recipes", "cp", "small")
    assert (result.exit_code, result.stderr) == (1, "failed: small is already there; name another folder\n")
    assert not Path("small.yaml").exists()
    Path("notes").write_text("mine")
    result = invoke("recipes", "cp", "small", "notes")
    assert (result.exit_code, result.stderr) == (1, "failed: notes is no folder; name one\n")


def test_recipes_cp_that_breaks_off_leaves_nothing(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*place: object, **how: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copytree", interrupted)
        assert invoke("recipes", "cp", "small", "mine").exit_code != 0
    assert not list(Path("mine").iterdir())
    assert invoke("recipes", "cp", "small", "mine").exit_code == 0


def test_recipes_cp_of_an_unknown_name(shelf: Path) -> None:
    result = invoke("recipes", "cp", "smal")
    assert result.exit_code == 2
    assert "did you mean 'small'?" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["schema"], ["recipes", "ls"], ["plan", "missing.yaml"], ["bench", "--help"], ["--version"]],
)
def test_light_verbs_leave_torch_alone(arguments: list[str]) -> None:
    code = """
import sys
from vitprune.cli import main
try:
    main()
except SystemExit:
    pass
print(*(name for name in ("torch", "transformers", "datasets", "numpy") if name in sys.modules), sep=",", end="|")
"""
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "|" if arguments[0] != "plan" else run.stdout == "|"


def test_python_m() -> None:
    run = subprocess.run([sys.executable, "-m", "vitprune", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"vitprune {__version__}\n"


def test_a_warning_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(cli, "app", lambda: None)
    cli.main()
    assert warnings.formatwarning(UserWarning("no labels"), UserWarning, "images.py", 49) == "note: no labels\n"
    assert warnings.formatwarning("old", FutureWarning, "a.py", 1, line="x = 1") == "FutureWarning: old\n"
