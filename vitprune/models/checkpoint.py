"""Checkpoints: a dense one comes in, a pruned one goes out, whole or not at all."""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from vitprune.models.families import supported
from vitprune.models.hooks import SUBMODULE
from vitprune.models.module import is_pruned
from vitprune.models.points import set_budget
from vitprune.models.structure import Structure, examine
from vitprune.recipe.errors import first_line
from vitprune.runtime.files import GIB, beside, contents, require_name_fits, require_writable, there
from vitprune.runtime.hub_cache import CONFIG, NO_SAFETENSORS, PROCESSOR, TOKENIZER, WEIGHTS, WEIGHTS_INDEX, absence

EXPORTED = "export.json"
"""By this file an exported model's folder is known."""
ASSETS = "assets"
"""Folder of a checkpoint's pictures."""
_TIMM = "timm_wrapper"


def load_config(checkpoint: str, revision: str | None = None) -> PreTrainedConfig:
    """The config of a checkpoint on the Hub or in a folder. Raises ValueError naming the checkpoint and the way out."""
    try:
        config = AutoConfig.from_pretrained(checkpoint, revision=revision, trust_remote_code=False)
    except Exception as error:  # of a config.json with odd values anything
        absent = absence(error, checkpoint, revision, "its config is", CONFIG)
        reason = _odd("config.json", error) if absent is None else f"there is no such folder, and {absent}"
        raise ValueError(f"{checkpoint}: {reason}") from error
    if config.model_type == _TIMM and config.model_args:  # transformers gives the number of classes a second time
        config.model_args = {name: value for name, value in config.model_args.items() if name != "num_classes"}
    return config


def _odd(file: str, error: Exception) -> str:
    """What to say of a library's error about one of a checkpoint's files."""
    match error:
        case ImportError():
            return f"{first_line(error)} (a package that this checkpoint needs isn't installed)"
        case OSError() | ValueError():
            return first_line(error)
        case _:
            return f"its {file} can't be used ({type(error).__name__}: {first_line(error)}); correct it"


def model_class(checkpoint: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a checkpoint was saved from, if vitprune can prune it. Raises ValueError listing what works."""
    given: Any = config.architectures
    architectures = [given] if isinstance(given, str) and given else given if isinstance(given, list) else []
    if not architectures and config.model_type == _TIMM:  # timm's own files name the architecture alone
        architectures = [_classifier_of(config) if config.num_labels else "TimmWrapperModel"]
    if not architectures:
        raise ValueError(
            f"{checkpoint}: its config.json doesn't say what it was saved from; add the class's name, such as "
            f'"architectures": ["{_classifier_of(config)}"]'
        )
    found = [cls for name in architectures if (cls := _class_named(str(name), config)) is not None]
    if not found:
        named = ", ".join(map(str, architectures))
        raise ValueError(
            f"{checkpoint}: {named} (`architectures` in config.json, model type '{config.model_type}') is none of "
            f"transformers' models, nor registered with its Auto classes; supported are {supported()}. A class of your "
            f"own loads it by itself: {architectures[0]}.from_pretrained(...)"
        )
    cls = found[0]
    try:
        outline(cls, config)
    except Exception as error:  # as above
        raise ValueError(f"{checkpoint}: {_odd('config.json', error)}") from error
    return cls


def _class_named(name: str, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """A class of transformers, or one that was registered for such a config (`AutoModel.register`)."""
    found = getattr(transformers, name, None)
    if isinstance(found, type):
        return found
    for auto in (AutoModelForImageClassification, AutoModel):
        registered: Any = auto._model_mapping._extra_content.get(type(config))
        if getattr(registered, "__name__", None) == name:
            return registered
    return None


def _classifier_of(config: PreTrainedConfig) -> str:
    names: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    found = names.get(config.model_type, "ViTForImageClassification")
    return found if isinstance(found, str) else found[0]


def outline(cls: type[PreTrainedModel], config: PreTrainedConfig) -> tuple[PreTrainedModel, Structure]:
    """A model without weights, on the meta device, and its parts. Raises ValueError for what is no plain ViT."""
    with torch.device("meta"):
        model = cls(config)
    return model, examine(model)


def load_tokenizer(checkpoint: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model of two towers. Raises ValueError if none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, revision=revision or "main", trust_remote_code=False)
        if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
            raise ValueError("there are no words in it")  # what transformers makes of a config alone
        return tokenizer
    except (OSError, ValueError) as error:
        absent = absence(error, checkpoint, revision, "its tokenizer is", TOKENIZER)
        reason = absent or f"no tokenizer: {first_line(error)}; add its files"
        raise ValueError(f"{checkpoint}: {reason}") from error


def load(
    checkpoint: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    budget: float | str | None = None,
) -> PreTrainedModel:
    """Load a dense or pruned model in eval mode, from a folder or the Hub; safetensors only, nothing is unpickled.

    A pruned checkpoint comes back pruned, as it does through `AutoModelForImageClassification.from_pretrained`.

    budget: turns one with several operating points to it, as `set_budget` does; the one that it was saved with if None.

    Raises:
        ValueError: no such checkpoint, no safetensors, or no plain ViT; a budget that it has no levels for.
    """
    checkpoint = str(checkpoint)
    config = load_config(checkpoint, revision)
    cls = model_class(checkpoint, config)
    require_safetensors(checkpoint)
    known = {"config": config} if config.model_type == _TIMM else {}
    model, missing = _read(cls, checkpoint, revision, dtype, **known)
    if missing and all(name.startswith("pooler.") for name in missing) and _pools_by_choice(cls):
        # as it was saved from: a model that was built without
        model, missing = _read(cls, checkpoint, revision, dtype, add_pooling_layer=False)
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise ValueError(f"{checkpoint}: lacks weights of {cls.__name__} ({shown}); name a checkpoint that has them")
    if budget is not None:
        set_budget(model, budget)
    return model.eval()


def _pools_by_choice(cls: type[PreTrainedModel]) -> bool:
    return "add_pooling_layer" in inspect.signature(cls.__init__).parameters


def _read(
    cls: type[PreTrainedModel], checkpoint: str, revision: str | None, dtype: torch.dtype, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of weights that the checkpoint lacks."""
    places = {"revision": revision or "main", "use_safetensors": True, "output_loading_info": True}
    try:
        loaded: Any = cls.from_pretrained(checkpoint, dtype=dtype, **places, **options)
    except Exception as error:  # as above
        absent = absence(error, checkpoint, revision, "its weights are", (WEIGHTS, WEIGHTS_INDEX))
        if absent is not None:
            raise ValueError(f"{checkpoint}: {absent}") from error
        hint = "; is it a Git LFS pointer? run `git lfs pull`" if isinstance(error, SafetensorError) else ""
        raise ValueError(f"{checkpoint}: its weights can't be read: {_odd('weights', error)}{hint}") from error
    model, info = loaded
    return model, sorted(info["missing_keys"])


def require_safetensors(checkpoint: str) -> None:
    """Raise ValueError for a folder whose weights lie in other files alone."""
    folder = Path(checkpoint)
    if folder.is_dir() and not any((folder / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX)):
        raise ValueError(f"{checkpoint}: {NO_SAFETENSORS}")


def digest_weights(model: PreTrainedModel) -> str:
    """Tell a model's weights from others, wherever they came from."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_processor(checkpoint: str, revision: str | None = None) -> BaseImageProcessor:
    """Load a checkpoint's image processor; the PIL one, which needs no torchvision, where it has one.

    Raises ValueError if there is none.
    """
    try:
        return AutoImageProcessor.from_pretrained(checkpoint, revision=revision or "main", backend="pil")
    except Exception as error:  # as above
        absent = absence(error, checkpoint, revision, "its image processor is", PROCESSOR)
        way_out = "pip install torchvision" if isinstance(error, ImportError) else "add a preprocessor_config.json"
        reason = absent or f"no image processor: {first_line(error)}; {way_out}"
        raise ValueError(f"{checkpoint}: {reason}") from error


def require_free(path: Path, *, overwrite: bool) -> None:
    """Raise ValueError for an output path that can't be written, or where something is that may not be overwritten.

    Only a folder that holds nothing but a pruned checkpoint is ever overwritten.
    """
    if path == path.parent:
        raise ValueError(f"{path} is no folder of its own; name one below it")
    require_writable(path if os.path.ismount(path) else path.parent, path)
    old = beside(path, "old")
    if old.exists() and not path.exists():  # of a run that was killed between two renames
        old.rename(path)
    require_name_fits(path)
    # of a run that was killed while it moved its files
    if os.path.ismount(path) and beside(path, "unfinished").exists():
        return
    if not path.exists() or (path.is_dir() and not any(contents(path))):
        return
    if not overwrite:
        raise ValueError(f"{path} exists; choose another path or set output.overwrite=true")
    if not _is_pruned_checkpoint(path):
        raise ValueError(f"{path} is no pruned checkpoint, so it isn't overwritten; choose another path")


def _is_pruned_checkpoint(path: Path) -> bool:
    config = path / "config.json"
    if not config.is_file() or any(entry.is_dir() and entry.name != ASSETS for entry in contents(path)):
        return False
    return (path / EXPORTED).is_file() or f'"quant_method": "{SUBMODULE}"' in config.read_text(encoding="utf-8")


def save(
    model: PreTrainedModel,
    path: str | Path,
    *,
    processor: BaseImageProcessor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    files: Mapping[str, str | bytes] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a pruned model, its image processor and tokenizer and further files to a folder, whole or not at all.

    files: text or bytes by name, which may lie in the folder `assets`. Everything is written beside the path and
    renamed at the end.

    Raises:
        ValueError: the model isn't pruned or is a wrapper around one, or the path is taken and `overwrite` is false.
    """
    path = Path(path).resolve()
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is no model of transformers (PreTrainedModel); pass the model inside it, such as "
            "peft_model.merge_and_unload(), or model.module of DistributedDataParallel"
        )
    if not is_pruned(model):
        raise ValueError(f"{type(model).__name__} isn't pruned; save it with its own save_pretrained")

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        for reader in (processor, tokenizer):
            if reader is not None:
                reader.save_pretrained(folder)
        for name, content in (files or {}).items():
            place = folder / name
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(content if isinstance(content, bytes) else content.encode())

    write_folder(path, write, overwrite=overwrite)
    return path


def write_folder(path: Path, write: Callable[[Path], None], *, overwrite: bool) -> None:
    """Write a checkpoint's folder beside its path and rename it at the end, so that it is there whole or not at all.

    Raises ValueError where the path is taken and `overwrite` is false, or what is there is no checkpoint of ours.
    """
    require_free(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = beside(path, "unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        write(unfinished)
        _replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(there(path)).free / GIB
        raise OSError(
            f"the checkpoint can't be written to {path}: {first_line(error)} ({free:.3g} GiB are free there); make "
            "room, or choose another path"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def require_room(path: Path, model: PreTrainedModel) -> None:
    """Raise ValueError for an output path on a disk that has no room for the model."""
    needed = sum(weight.numel() * weight.element_size() for weight in model.state_dict().values())
    free = shutil.disk_usage(there(path)).free
    if free < needed:
        raise ValueError(
            f"{path}: the checkpoint takes {needed / GIB:.3g} GiB, and {free / GIB:.3g} GiB are free "
            "there; make room, or choose another path"
        )


def _replace(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    if os.path.ismount(path):  # config.json, by which it is a checkpoint, goes first and comes last
        for name in CONFIG:
            (path / name).unlink(missing_ok=True)
        shutil.rmtree(path / ASSETS, ignore_errors=True)  # a folder isn't replaced by another
        for file in sorted(new.iterdir(), key=lambda file: file.name in CONFIG):
            file.replace(path / file.name)
        return
    old = beside(path, "old")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old)
