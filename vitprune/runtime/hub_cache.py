"""The Hub and its caches: what is on this machine already, and why something can't be had.

Knows the caches' folders, the variables that set them, and which files are a checkpoint's.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets.config
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, get_session, httpx, validate_repo_id

from vitprune.recipe.errors import first_line
from vitprune.runtime.files import there

WEIGHTS, WEIGHTS_INDEX = constants.SAFETENSORS_SINGLE_FILE, constants.SAFETENSORS_INDEX_FILE
NO_SAFETENSORS = (
    f"has no {WEIGHTS}, and nothing is unpickled; load it where you trust it, `save_pretrained` it to a folder and "
    "name that, or name a model.revision that has safetensors"
)
CONFIG = ("config.json",)
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
TOKENIZER = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")

Disconnected = httpx.HTTPError
"""What a failed request raises, unless it is an OSError."""

PREFETCH = "run `vitprune prefetch RECIPE`"


class Cache(NamedTuple):
    """A folder that things of the Hub come through. variable: sets it alone. offline: nothing is asked of the Hub."""

    variable: str
    folder: Path
    offline: bool

    @classmethod
    def of_models(cls) -> Cache:
        return cls("HF_HUB_CACHE", Path(constants.HF_HUB_CACHE).expanduser(), constants.HF_HUB_OFFLINE)

    @classmethod
    def of_data(cls) -> Cache:
        """Where data sets are prepared, local ones too. Their files come through the cache of models."""
        folder = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
        return cls("HF_DATASETS_CACHE", folder, datasets.config.HF_HUB_OFFLINE)

    @property
    def set_by(self) -> str:
        """The variable by which this user moves it."""
        return self.variable if self.variable in os.environ else "HF_HOME"

    def lack(self, what: str, fetch: str = PREFETCH) -> str | None:
        """What to say of something that isn't here, if the Hub can't be asked for it. None where it can.

        what: subject and verb, such as "its weights are". fetch: what brings it here.
        """
        reason = self._unreachable()
        if reason is None:
            return None
        way_out = f"check the spelling, or {fetch} where there is a network"
        return f"{what} not in the cache {self.folder}, and {reason}; {way_out}"

    def trouble(self, error: BaseException) -> str | None:
        """What to say of an error if it is that a cache's folder can't be read or written: the folder, the way out."""
        for cause in (*causes(error), *self._unreadable()):
            if not isinstance(cause, OSError) or cause.filename is None:
                continue
            for cache in (self, Cache.of_models(), Cache("HF_HOME", Path(constants.HF_HOME), False)):
                if _same_branch(Path(os.fsdecode(cause.filename)), cache.folder):
                    return (
                        f"the cache {cache.folder} can't be used ({cause.strerror}: {cause.filename}); set "
                        f"{cache.set_by} to a folder that can be read and written"
                    )
        return None

    def full(self, error: BaseException) -> str | None:
        """What to say of an error if it is that there is no room left: the folder, the way out."""
        for cause in causes(error):
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                cache = self._without_room(cause)
                way_out = f"make room, or set {cache.set_by} to a folder that has it"
                return f"{cause}: the cache {cache.folder} is full; {way_out}"
        return None

    def _without_room(self, error: OSError) -> Cache:
        """This one, or that of models, which the files of data sets come through; the error seldom names its file."""
        models = Cache.of_models()
        if error.filename is not None:
            return models if _same_branch(Path(os.fsdecode(error.filename)), models.folder) else self
        if error.errno == errno.ENOSPC:
            with contextlib.suppress(OSError):
                return min(self, models, key=lambda one: shutil.disk_usage(there(one.folder)).free)
        return self

    def _unreadable(self) -> Iterator[OSError]:
        """The folder is asked itself, too: it is often taken for an empty one where it can't be read."""
        try:
            os.listdir(self.folder)
        except FileNotFoundError:
            return
        except OSError as error:
            yield error

    def _unreachable(self) -> str | None:
        if self.offline:
            return "the Hub isn't asked (HF_HUB_OFFLINE)"
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except (OSError, Disconnected) as error:
            return f"the Hub can't be reached ({first_line(error)})"
        return None


def is_hub_id(name: str) -> bool:
    """Whether a name stands for something on the Hub: nothing on disk has it, and it is spelled like an id."""
    if Path(name).expanduser().exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def absence(error: Exception, checkpoint: str, revision: str | None, what: str, names: tuple[str, ...]) -> str | None:
    """What to say of an error in loading a part of a checkpoint, if the cache or the network is at fault.

    names: of the files that it may come from, of which one is enough. None: a local folder, or another cause.
    """
    if not is_hub_id(checkpoint):
        return None
    cache = Cache.of_models()
    found = weights_in_cache(checkpoint, revision) if WEIGHTS in names else in_cache(checkpoint, revision, names)
    if found:
        return cache.trouble(error)
    download = " ".join(["hf download", checkpoint, *(["--revision", revision] if revision else [])])
    return cache.trouble(error) or cache.lack(what, f"{PREFETCH} (or `{download}`)")


def in_cache(checkpoint: str, revision: str | None, names: tuple[str, ...]) -> list[Path]:
    """Those of a checkpoint's files that are in the cache."""
    found = [try_to_load_from_cache(checkpoint, name, revision=revision) for name in names]
    return [Path(path) for path in found if isinstance(path, str)]


def weights_in_cache(checkpoint: str, revision: str | None) -> list[Path]:
    """The files of a checkpoint's weights; none where one of several isn't in the cache."""
    if single := in_cache(checkpoint, revision, (WEIGHTS,)):
        return single
    for index in in_cache(checkpoint, revision, (WEIGHTS_INDEX,)):
        shards = shard_names(index)
        found = in_cache(checkpoint, revision, shards)
        return [index, *found] if len(found) == len(shards) else []
    return []


def shard_names(index: Path) -> tuple[str, ...]:
    """The files that weights are spread over."""
    return tuple(sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from. Not what was only being handled: that may have been an expected one."""
    while error is not None:
        yield error
        error = error.__cause__


def _same_branch(path: Path, folder: Path) -> bool:
    """Whether one is in the other: a folder fails where it is made, too, which is further up."""
    path, folder = path.absolute(), folder.absolute()
    return path.is_relative_to(folder) or folder.is_relative_to(path)
