"""Vision models of transformers that no entry names: recognised, and right."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from torch.testing import assert_close

import vitprune
from vitprune.models.module import pruning_of
from vitprune.models.structure import examine

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "mlp_dim": 64,
    "mlp_ratio": 2,
    "image_size": 32,
    "patch_size": 4,
    "initializer_range": 0.2,
    "attention_dropout": 0.0,
}
# benchmarks/sweep.py finds them among all classes; those with a part that they name as here are the same ViT inside
RECOGNISED = [
    "AltCLIPVisionModel",
    "Blip2VisionModel",
    "ChineseCLIPVisionModel",
    "DPTModel",
    "GitVisionModel",
    "InstructBlipVisionModel",
    "JanusVisionModel",
    "OwlViTVisionModel",
    "Owlv2VisionModel",
    "PixioModel",
    "Tipsv2VisionModel",
]


def build(name: str) -> Any:
    cls = getattr(hf, name, None)
    if cls is None:
        pytest.skip(f"this version of transformers has no {name}")
    config = cls.config_class()
    for key, value in SHAPE.items():
        if hasattr(config, key):
            setattr(config, key, value)
    torch.manual_seed(0)
    return cls(config).eval()


@pytest.mark.parametrize("name", RECOGNISED)
@torch.no_grad()
def test_it_is_right(name: str) -> None:
    model, x = build(name), tiny.images(4)
    assert examine(model).is_generic
    dense = model(x)
    vitprune.prune_(model, {"before_blocks": [1, 2, 3], "thresholds": [0.3, 0.3, 0.3]})
    with vitprune.trace(model) as seen:
        together = model(x)
    assert seen.ratio < 0.95
    alone = [model(image) for image in x.split(1)]
    for field in ("last_hidden_state", "pooler_output"):
        if dense.get(field) is None:
            continue
        assert_close(torch.cat([one[field] for one in alone]), together[field], rtol=1e-4, atol=1e-4)
        assert together[field].shape == dense[field].shape
        assert not torch.equal(together[field], dense[field])
    pruning_of(model).levels.fill_(-torch.inf)
    with vitprune.trace(model):
        assert_close(model(x).last_hidden_state, dense.last_hidden_state, rtol=1e-4, atol=1e-4)


def test_what_names_its_input_otherwise_is_refused() -> None:
    """OneFormer has a list of inputs."""
    with torch.device("meta"):
        model = hf.OneFormerModel(hf.OneFormerConfig())
    with pytest.raises(ValueError, match=r"OneFormerModel .* is no plain ViT"):
        vitprune.prune_(model, vitprune.PruningSpec())
