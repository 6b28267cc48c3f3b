"""What a recipe needs comes into the cache: `prefetch`, after which `apply` needs no network.

Knows what `apply` will load, and has it loaded by the same functions, so that the same files come; weights alone are
fetched without them, since they needn't be in memory for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from datasets import Dataset
from transformers import PreTrainedModel

from vitprune.data.source import open_source, require_found
from vitprune.measure.outputs import is_two_towers
from vitprune.models.checkpoint import load_config, load_tokenizer, model_class, outline, require_safetensors
from vitprune.recipe.errors import concerning, first_line
from vitprune.recipe.schema import DataSpec, ModelSpec, Recipe
from vitprune.reports.text import storage
from vitprune.runs.plan import plan
from vitprune.runtime.hub_cache import (
    CONFIG,
    NO_SAFETENSORS,
    PROCESSOR,
    TOKENIZER,
    WEIGHTS,
    WEIGHTS_INDEX,
    Disconnected,
    absence,
    in_cache,
    is_hub_id,
    shard_names,
    weights_in_cache,
)

LOCAL = "local, nothing to fetch"
STREAMED = "streamed while it runs, over the network; to have it in the cache set data.streaming: false"


@dataclass(frozen=True)
class Piece:
    """One thing that a recipe needs. key: of the recipe; name: folder or Hub id; state: where it is now."""

    key: str
    name: str
    what: str
    state: str

    def __str__(self) -> str:
        return f"{self.key} {self.name}, {self.what}: {self.state}"


def prefetch(recipe: Recipe) -> tuple[Piece, ...]:
    """Bring everything that `apply` loads into the cache; say of each thing where it is.

    Mistakes that `plan` sees, and a data set that isn't there, are told before weights and data are fetched. The
    libraries that fetch show progress.

    Raises:
        ValueError: the checkpoint is none of a plain ViT or lacks something, there is no such data set or split, the
            cache can't be written, or the Hub can't be reached; names the place and the way out.
    """
    plan(recipe)
    require_found(recipe.data)
    with concerning("model", "checkpoint"):
        checkpoint = tuple(_fetch_checkpoint(recipe.model))
    with concerning("data", "path"):
        return (*checkpoint, *_fetch_data(recipe))


def _fetch_checkpoint(spec: ModelSpec) -> Iterator[Piece]:
    model = _outline(spec)
    parts = {"config": CONFIG, "image processor": PROCESSOR}
    if is_two_towers(model):
        load_tokenizer(spec.checkpoint, spec.revision)
        parts["tokenizer"] = TOKENIZER
    if not is_hub_id(spec.checkpoint):
        require_safetensors(spec.checkpoint)
        for what in (*parts, "weights"):
            yield Piece("model.checkpoint", spec.checkpoint, what, LOCAL)
        return
    for what, names in parts.items():
        yield _cached(spec, what, in_cache(spec.checkpoint, spec.revision, names))
    yield _cached(spec, "weights", _fetch_weights(spec))


def _outline(spec: ModelSpec) -> PreTrainedModel:
    config = load_config(spec.checkpoint, spec.revision)
    return outline(model_class(spec.checkpoint, config), config)[0]


def _fetch_weights(spec: ModelSpec) -> list[Path]:
    """Safetensors alone, and of these the ones that transformers loads: not other precisions beside them."""
    try:
        _download(spec, (WEIGHTS, WEIGHTS_INDEX))
        if not in_cache(spec.checkpoint, spec.revision, (WEIGHTS,)):
            for index in in_cache(spec.checkpoint, spec.revision, (WEIGHTS_INDEX,)):
                _download(spec, shard_names(index))
    except (OSError, ValueError, Disconnected) as error:
        raise ValueError(f"{spec.checkpoint}: {_absent(spec, error) or first_line(error)}") from error
    files = weights_in_cache(spec.checkpoint, spec.revision)
    if not files:
        error = ValueError(NO_SAFETENSORS)
        raise ValueError(f"{spec.checkpoint}: {_absent(spec, error) or error}")
    return files


def _download(spec: ModelSpec, names: Sequence[str]) -> None:
    huggingface_hub.snapshot_download(spec.checkpoint, revision=spec.revision, allow_patterns=list(names))


def _absent(spec: ModelSpec, error: Exception) -> str | None:
    return absence(error, spec.checkpoint, spec.revision, "its weights are", (WEIGHTS, WEIGHTS_INDEX))


def _cached(spec: ModelSpec, what: str, files: Sequence[Path]) -> Piece:
    return Piece("model.checkpoint", spec.checkpoint, what, _in_the_cache(files))


def _fetch_data(recipe: Recipe) -> Iterator[Piece]:
    """The training split where `apply` reads it, and the one that is compared on."""
    data, splits = recipe.data, [recipe.data.eval.split]
    if recipe.reads_training_images:
        splits.insert(0, data.train.split)
    for split in splits:
        yield Piece("data.path", data.path, f"split {split!r}", _fetch_split(data, split))


def _fetch_split(data: DataSpec, split: str) -> str:
    if not is_hub_id(data.path):
        return LOCAL
    if data.streaming:
        return STREAMED
    rows = open_source(data, split, None, labelled=False).rows
    assert isinstance(rows, Dataset)
    return f"{_in_the_cache([Path(file['filename']) for file in rows.cache_files])}, {len(rows):,} rows"


def _in_the_cache(files: Sequence[Path]) -> str:
    """With what they take and where they are."""
    size = sum(file.stat().st_size for file in files)
    return f"in the cache, {storage(size)} in {files[0].parent}" if files else "in the cache"
