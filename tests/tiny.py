"""Tiny random models of every family, and the policies that the behaviour suite runs over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from vitprune.recipe import PruningSpec


class Tolerance(TypedDict):
    """Keyword arguments of `torch.testing.assert_close`."""

    rtol: float
    atol: float


SHAPE: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_labels": 5,
    # weights large enough that attention is far from uniform
    "initializer_range": 0.3,
}
PATCHES = 64

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**SHAPE, intermediate_size=96)),
    "vit-bare": lambda: ViTModel(ViTConfig(**SHAPE, intermediate_size=96)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**SHAPE, intermediate_size=96)),
    "deit-teacher": lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**SHAPE, intermediate_size=96)),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**SHAPE, mlp_ratio=2)),
    "dinov2-swiglu": lambda: Dinov2ForImageClassification(Dinov2Config(**SHAPE, mlp_ratio=2, use_swiglu_ffn=True)),
}

AS_VIT: dict[str, Any] = {"score": "head-weighted-class-attention", "before_blocks": [2, 4]}
# thresholds that drop about a third a stage on these models
POLICIES: dict[str, PruningSpec] = {
    "as-vit": PruningSpec(**AS_VIT, thresholds=[0.008, 0.012], dropped="leave"),
    "as-vit-merge": PruningSpec(**AS_VIT, thresholds=[0.008, 0.012], dropped="merge"),
    "as-vit-fuse": PruningSpec(**AS_VIT, thresholds=[0.008, 0.012], dropped="fuse"),
    "redundancy-merge": PruningSpec(thresholds=[0.01, 0.01, 0.012, 0.014, 0.018], dropped="merge"),
    "redundancy-leave": PruningSpec(thresholds=[0.01, 0.01, 0.012, 0.014, 0.018], dropped="leave"),
    "top-k-fuse": PruningSpec(**AS_VIT, select="top-k", keep_ratios=[0.7, 0.7], dropped="fuse"),
    "random-merge": PruningSpec(**AS_VIT, select="random", keep_ratios=[0.7, 0.7], dropped="merge"),
    "random-leave": PruningSpec(**AS_VIT, select="random", keep_ratios=[0.7, 0.7], dropped="leave"),
    "tome": PruningSpec(select="tome", keep_ratios=[0.85] * 5),
}


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def images(count: int) -> Tensor:
    """Images that differ in how busy they are, so that they keep different numbers of tokens."""
    generator = torch.Generator().manual_seed(1)
    strength = torch.linspace(0.2, 3.0, count)[:, None, None, None]
    return strength * torch.randn(count, 3, 32, 32, generator=generator)


def answer(output: object) -> Tensor:
    """What a user reads off a forward: logits, or the last hidden state of a bare model."""
    logits = getattr(output, "logits", None)
    return logits if logits is not None else output.last_hidden_state  # pyright: ignore[reportAttributeAccessIssue]
