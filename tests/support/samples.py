"""A small data set on disk and a tiny checkpoint beside it, for tests of whole steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PIL
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from vitprune.measure.outputs import is_two_towers

SHARED = Path(__file__).parents[3] / "shared"
"""Golden values and a real model, where they are."""

NAMES = ["black", "dark", "grey", "light", "white"]


def write_checkpoint(folder: Path, family: str = "vit") -> Path:
    """A tiny dense model with its image processor, and its tokenizer if it reads text."""
    model = tiny.build(family)
    model.config.id2label = dict(enumerate(NAMES))
    model.config.label2id = {name: index for index, name in enumerate(NAMES)}
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    if is_two_towers(model):
        words = {word: number for number, word in enumerate(["<s>", "</s>", "<pad>", "a", "photo", *NAMES])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
    return folder


def write_data(folder: Path, *, train: int = 48, test: int = 24, labelled: bool = True) -> Path:
    """train.parquet and test.parquet: noise whose brightness is the class."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split, count in {"train": train, "test": test}.items():
        labels = [i % len(NAMES) for i in range(count)]
        noise = rng.integers(0, 80, (count, 32, 32, 3))
        pictures = [PIL.fromarray((noise[i] + 40 * label).astype("uint8")) for i, label in enumerate(labels)]
        columns = {"image": pictures, **({"label": labels} if labelled else {"caption": ["x"] * count})}
        second = {"label": ClassLabel(names=NAMES)} if labelled else {"caption": Value("string")}
        rows = Dataset.from_dict(columns, features=Features({"image": Image(), **second}))
        rows.to_parquet(str(folder / f"{split}.parquet"))
    return folder
