"""A recipe's things come into the cache, and are what it runs with offline; what is said of those that aren't there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets.config
import pytest
import samples
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file

from vitprune.recipe.schema import Recipe, load_recipe
from vitprune.runs.apply import apply
from vitprune.runs.evaluate import evaluate
from vitprune.runs.plan import plan
from vitprune.runs.prefetch import prefetch

SHA = "0123456789abcdef0123456789abcdef01234567"
CHECKPOINT, DATA = "org/tiny", "org/digits"
CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
INDEX, SHARDS = "model.safetensors.index.json", ["model-1.safetensors", "model-2.safetensors"]
RECIPE = f"""\
version: 1
model: {{checkpoint: {CHECKPOINT}}}
data: {{path: {DATA}}}
pruning: {{before_blocks: [2, 4], score: head-weighted-mean-attention}}
budget: {{macs: 60%}}
calibration: {{images: 24, batch_size: 8}}
evaluate: {{batch_sizes: []}}
"""
WAY_OUT = "run `vitprune prefetch RECIPE`"


class Hub:
    """A repository on the Hub, and the cache that its files come through. asked: the names that were asked for."""

    def __init__(self, folder: Path, revision: str = "main") -> None:
        self.remote, self.revision, self.asked = folder / "remote", revision, list[str]()
        self.cache = folder / "hub" / "models--org--tiny"
        self.snapshot = self.cache / "snapshots" / SHA

    def put(self, *names: str) -> None:
        """Into the cache; all there are without names."""
        self.snapshot.mkdir(parents=True, exist_ok=True)
        (self.cache / "refs").mkdir(exist_ok=True)
        (self.cache / "refs" / self.revision).write_text(SHA)
        for name in names or [path.name for path in self.remote.iterdir()]:
            shutil.copy(self.remote / name, self.snapshot / name)

    def snapshot_download(self, repo: str, *, revision: str | None, allow_patterns: list[str], **_: Any) -> str:
        assert (repo, revision or "main") == (CHECKPOINT, self.revision)
        self.asked += allow_patterns
        found = [name for name in allow_patterns if (self.remote / name).exists()]
        if found:
            self.put(*found)
        return str(self.snapshot)

    def hf_hub_download(self, repo: str, name: str, *, revision: str | None, **_: Any) -> str:
        assert (repo, revision or "main") == (CHECKPOINT, self.revision)
        if not (self.remote / name).exists():
            raise EntryNotFoundError(name)
        self.asked.append(name)
        self.put(name)
        return str(self.snapshot / name)

    def shard(self) -> None:
        """Spreads the weights over two files."""
        weights = load_file(self.remote / WEIGHTS)
        (self.remote / WEIGHTS).unlink()
        where = {name: SHARDS[number % 2] for number, name in enumerate(sorted(weights))}
        for file in SHARDS:
            part = {name: weights[name] for name in weights if where[name] == file}
            save_file(part, self.remote / file, metadata={"format": "pt"})
        (self.remote / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.fixture
def hub(home: Path) -> Hub:
    hub = Hub(home)
    samples.write_checkpoint(hub.remote)
    (hub.remote / "model.fp16.safetensors").write_text("other weights")
    (hub.remote / "pytorch_model.bin").write_text("pickled")
    return hub


@pytest.fixture
def connected(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Files can be fetched."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", hub.hf_hub_download)
    return hub


def put_data(home: Path) -> Path:
    """As `datasets` leaves a data set of the Hub that it has prepared."""
    source = samples.write_data(home / "source")
    files = {split: [str(source / f"{split}.parquet")] for split in ("train", "test")}
    prepared = home / "datasets" / "org___digits" / "default" / "0.0.0" / SHA
    Parquet(cache_dir=str(home / "other"), dataset_name="digits", data_files=files).download_and_prepare(str(prepared))
    info = json.loads((prepared / "dataset_info.json").read_text())
    (prepared / "dataset_info.json").write_text(json.dumps({**info, "config_name": "default"}))
    return prepared


def recipe(home: Path, *overrides: str) -> Recipe:
    (home / "recipe.yaml").write_text(RECIPE + f"output: {{path: {home / 'out'}}}\n")
    return load_recipe(home / "recipe.yaml", overrides)


def states(asked: Recipe) -> dict[str, str]:
    """What `prefetch` says of each thing, without sizes."""
    return {f"{piece.key} {piece.what}": piece.state.split(", ")[0] for piece in prefetch(asked)}


def error(run: Any, *arguments: Any) -> str:
    with pytest.raises(ValueError, match=r"\w") as raised:
        run(*arguments)
    return str(raised.value)


def test_exactly_what_is_needed_is_fetched(connected: Hub, home: Path) -> None:
    put_data(home)
    pieces = [str(piece) for piece in prefetch(recipe(home))]
    assert set(connected.asked) == {CONFIG, PROCESSOR, WEIGHTS, INDEX}
    assert {path.name for path in connected.snapshot.iterdir()} == {CONFIG, PROCESSOR, WEIGHTS}
    size = (connected.snapshot / WEIGHTS).stat().st_size
    assert f"model.checkpoint org/tiny, weights: in the cache, {size / 1000:.3g} kB in {connected.snapshot}" in pieces
    assert [piece.partition(":")[0] for piece in pieces] == [
        "model.checkpoint org/tiny, config",
        "model.checkpoint org/tiny, image processor",
        "model.checkpoint org/tiny, weights",
        "data.path org/digits, split 'train'",
        "data.path org/digits, split 'test'",
    ]
    assert pieces[3].endswith("48 rows")
    assert pieces[4].endswith("24 rows")


def test_shards_a_tokenizer_and_a_revision(home: Path, connected: Hub) -> None:
    put_data(home)
    shutil.rmtree(connected.remote)
    samples.write_checkpoint(connected.remote, "clip-zero-shot")
    connected.shard()
    connected.revision = "v1"
    asked = recipe(home, "model.revision=v1", "model.prompt=a photo {}")
    assert states(asked)["model.checkpoint tokenizer"] == "in the cache"
    assert {path.name for path in connected.snapshot.iterdir()} >= {"tokenizer.json", INDEX, *SHARDS}
    apply(asked)
    (connected.snapshot / SHARDS[1]).unlink()
    shutil.rmtree(home / "out")
    assert "its weights are not in the cache" in error(apply, asked)
    assert "its config is not in the cache" in error(apply, recipe(home, "model.revision=v2"))


def test_a_tokenizer_that_is_not_there(home: Path, hub: Hub) -> None:
    shutil.rmtree(hub.remote)
    samples.write_checkpoint(hub.remote, "clip-zero-shot")
    hub.put(CONFIG, PROCESSOR, WEIGHTS)
    for run in (apply, prefetch):
        put_data(home)
        assert "model.checkpoint: org/tiny: its tokenizer is not in the cache" in error(run, recipe(home))


def test_it_runs_offline_from_the_cache(hub: Hub, home: Path) -> None:
    hub.put(CONFIG, PROCESSOR, WEIGHTS)
    put_data(home)
    asked = recipe(home)
    assert set(states(asked).values()) == {"in the cache"}
    report = apply(asked)
    assert evaluate(str(home / "out"), asked, home / "evaluated").comparison.metrics == report.comparison.metrics


@pytest.mark.parametrize(
    ("cached", "what", "runs"),
    [
        ((), "there is no such folder, and its config is", (apply, plan, prefetch)),
        ((CONFIG, WEIGHTS), "its image processor is", (apply, plan, prefetch)),
        ((CONFIG, PROCESSOR), "its weights are", (apply, prefetch)),
    ],
)
def test_a_part_of_a_checkpoint_that_is_not_there(hub: Hub, home: Path, cached: Any, what: str, runs: Any) -> None:
    put_data(home)
    if cached:
        hub.put(*cached)
    for run in runs:
        said = error(run, recipe(home))
        assert said.startswith(f"model.checkpoint: org/tiny: {what} not in the cache {home / 'hub'}, and the Hub isn't")
        assert said.endswith(f"{WAY_OUT} (or `hf download org/tiny`) where there is a network")


def test_data_that_is_not_there(hub: Hub, home: Path) -> None:
    hub.put(CONFIG, PROCESSOR, WEIGHTS)
    for run in (apply, prefetch):
        said = error(run, recipe(home))
        assert said.startswith("data.path: org/digits")
        assert f"not in the cache {home / 'datasets'}" in said
        assert said.endswith(f"{WAY_OUT} where there is a network")
    put_data(home)
    said = error(apply, recipe(home, "data.name=other"))
    assert "['default']" in said
    assert said.endswith(f"Name one of them in `data.name`, or {WAY_OUT} where there is a network")


def test_another_cause_keeps_its_own_message(hub: Hub, home: Path) -> None:
    hub.put(CONFIG, PROCESSOR, WEIGHTS)
    put_data(home)
    said = error(apply, recipe(home, "data.train.split=trian"))
    assert "Should be one of ['train', 'test']. Name one" in said
    assert said.startswith("data.train.split: org/digits")
    (hub.snapshot / WEIGHTS).write_text("no weights")
    assert "its weights can't be read" in error(apply, recipe(home))
    (hub.snapshot / CONFIG).write_text('{"model_type": "vitt"}')
    assert "vitt" in error(plan, recipe(home))
    (hub.remote / PROCESSOR).unlink()
    said = error(plan, recipe(home, f"model.checkpoint={hub.remote}"))
    assert "add a preprocessor_config.json" in said
    assert WAY_OUT not in said


def test_a_hub_that_answers_says_it_itself(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said() -> str:
        monkeypatch.setattr("vitprune.runtime.hub_cache.get_session", lambda: session)
        return error(plan, recipe(home))

    class Session:
        down = False

        def head(self, *_: Any, **__: Any) -> None:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
            if self.down:
                raise OSError("no route to host")

    session = Session()
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", lambda *_, **__: _raise(EntryNotFoundError("no")))
    assert WAY_OUT not in said()
    session.down = True
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert f"the Hub can't be reached (no route to host); check the spelling, or {WAY_OUT}" in said()


def _raise(error: Exception) -> None:
    raise error


def test_mistakes_show_before_weights_are_fetched(connected: Hub, home: Path) -> None:
    assert "data.path: org/digits" in error(prefetch, recipe(home))
    assert "blocks" in error(prefetch, recipe(home, "pruning.before_blocks=[99]"))
    config = json.loads((connected.remote / CONFIG).read_text())
    (connected.snapshot / CONFIG).write_text(json.dumps({**config, "architectures": ["Nothing"]}))
    assert "supported are" in error(prefetch, recipe(home))
    assert WEIGHTS not in connected.asked


def test_no_safetensors(connected: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_data(home)
    (connected.remote / WEIGHTS).unlink()
    monkeypatch.setattr("vitprune.runtime.hub_cache.Cache._unreachable", lambda cache: None)
    assert "has no model.safetensors, and nothing is unpickled" in error(prefetch, recipe(home))
    assert "pytorch_model.bin" not in connected.asked


def test_what_is_local_or_streamed(connected: Hub, home: Path) -> None:
    put_data(home)
    streamed = states(recipe(home, "data.streaming=true"))
    assert streamed["data.path split 'train'"].startswith("streamed while it runs")
    fixed = "pruning.thresholds=[0.001, 0.002]"
    assert "data.path split 'train'" not in states(recipe(home, "data.streaming=true", fixed))
    connected.asked.clear()
    local = recipe(home, f"model.checkpoint={connected.remote}", f"data.path={home / 'source'}")
    assert set(states(local).values()) == {"local"}
    assert connected.asked == []


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE"])
@pytest.mark.parametrize("place", ["a-file", "a-file/below"])
def test_a_cache_that_cannot_be_used(
    connected: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, variable: str, place: str
) -> None:
    connected.put(CONFIG, PROCESSOR, WEIGHTS)
    (home / "a-file").write_text("")
    folder = home / place
    runs = (apply, prefetch, plan)
    if variable == "HF_DATASETS_CACHE":
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        runs = (apply, prefetch)
    else:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder if variable == "HF_HUB_CACHE" else folder / "hub"))
        monkeypatch.setattr("transformers.utils.hub.hf_hub_download", _cant_write)
    if variable == "HF_HOME":
        monkeypatch.setattr(constants, "HF_HOME", str(folder))
    else:
        monkeypatch.setenv(variable, str(folder))
    for run in runs:
        said = error(run, recipe(home))
        assert f"the cache {folder}" in said
        assert said.endswith(f"set {variable} to a folder that can be read and written")


def _cant_write(*_: Any, **__: Any) -> None:
    Path(constants.HF_HUB_CACHE, "models--org--tiny").mkdir(parents=True)


def test_a_local_data_set_is_prepared_in_a_cache_too(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "a-file").write_text("")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(home / "a-file"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "a-file")
    local = recipe(home, f"model.checkpoint={hub.remote}", f"data.path={samples.write_data(home / 'data')}")
    assert error(apply, local).endswith("set HF_DATASETS_CACHE to a folder that can be read and written")


@pytest.mark.parametrize(("file", "cache"), [("hub/models--org--tiny", "hub"), ("token", "")])
def test_a_cache_that_can_be_read_but_not_written(
    connected: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, file: str, cache: str
) -> None:
    refused = PermissionError(13, "Permission denied", str(home / file))
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", lambda *_, **__: _raise(refused))
    way_out = f"the cache {home / cache} can't be used (Permission denied: {home / file}); set HF_HOME to a folder"
    assert way_out in error(prefetch, recipe(home))
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", connected.hf_hub_download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: _raise(refused))
    put_data(home)
    assert way_out in error(prefetch, recipe(home))
