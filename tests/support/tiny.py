"""Tiny random models of every family, and the policies that the behaviour suite runs over them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypedDict

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from vitprune.pruning import kernels
from vitprune.pruning.kernels import cpu, cuda
from vitprune.recipe.schema import PruningSpec


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

MLP: dict[str, Any] = {**SHAPE, "intermediate_size": 96}
TEXT: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# neither of these drops anything in training
BEIT: dict[str, Any] = {**MLP, "drop_path_rate": 0.0}
CLIP: dict[str, Any] = {
    "vision_config": {**MLP, "projection_dim": 12, "initializer_factor": 5.0},
    "text_config": {**TEXT, "projection_dim": 12},
    "projection_dim": 12,
    "num_labels": 5,
}
SIGLIP: dict[str, Any] = {"vision_config": MLP, "text_config": {**TEXT, "projection_size": 48}, "num_labels": 5}
NAFLEX: dict[str, Any] = {**MLP, "num_patches": PATCHES}
SIGLIP2: dict[str, Any] = {**SIGLIP, "vision_config": NAFLEX}
REGISTERS: dict[str, Any] = {"num_register_tokens": 4}
VIDEO: dict[str, Any] = {**MLP, "num_frames": 8, "patch_size": 8}
AUDIO: dict[str, Any] = {
    **MLP,
    "patch_size": 4,
    "frequency_stride": 4,
    "time_stride": 4,
    "max_length": 64,
    "num_mel_bins": 16,
}


def _with_positions(model: PreTrainedModel) -> PreTrainedModel:
    """Relative positions that say something: they start as zeros."""
    for name, parameter in model.named_parameters():
        if "relative_position_bias_table" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    return model


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**MLP)),
    "vit-bare": lambda: hf.ViTModel(hf.ViTConfig(**MLP)),
    "deit": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**MLP)),
    "deit-teacher": lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**MLP)),
    "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**SHAPE, mlp_ratio=2)),
    "dinov2-swiglu": lambda: hf.Dinov2ForImageClassification(
        hf.Dinov2Config(**SHAPE, mlp_ratio=2, use_swiglu_ffn=True)
    ),
    "vit-msn": lambda: hf.ViTMSNForImageClassification(hf.ViTMSNConfig(**MLP)),
    "dinov2-registers": lambda: hf.Dinov2WithRegistersForImageClassification(
        hf.Dinov2WithRegistersConfig(**SHAPE, **REGISTERS, mlp_ratio=2)
    ),
    "dinov3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**MLP, **REGISTERS, pos_embed_rescale=None)),
    "beit": lambda: _with_positions(
        hf.BeitForImageClassification(hf.BeitConfig(**BEIT, use_relative_position_bias=True))
    ),
    "beit-shared": lambda: _with_positions(hf.BeitModel(hf.BeitConfig(**BEIT, use_shared_relative_position_bias=True))),
    "data2vec": lambda: _with_positions(
        hf.Data2VecVisionForImageClassification(hf.Data2VecVisionConfig(**BEIT, use_relative_position_bias=True))
    ),
    "clip": lambda: hf.CLIPForImageClassification(hf.CLIPConfig(**CLIP)),
    "clip-zero-shot": lambda: hf.CLIPModel(hf.CLIPConfig(**CLIP)),
    "clip-tower": lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**CLIP["vision_config"])),
    "metaclip2": lambda: hf.MetaClip2ForImageClassification(hf.MetaClip2Config(**CLIP)),
    "siglip": lambda: hf.SiglipForImageClassification(hf.SiglipConfig(**SIGLIP)),
    "siglip-zero-shot": lambda: hf.SiglipModel(hf.SiglipConfig(**SIGLIP)),
    "siglip-tower": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**MLP)),
    "siglip2": lambda: hf.Siglip2ForImageClassification(hf.Siglip2Config(**SIGLIP2)),
    "siglip2-tower": lambda: hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**NAFLEX)),
    "ijepa": lambda: hf.IJepaForImageClassification(hf.IJepaConfig(**MLP)),
    "videomae": lambda: hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**VIDEO)),
    "vivit": lambda: hf.VivitForVideoClassification(hf.VivitConfig(**VIDEO, tubelet_size=[2, 8, 8])),
    "ast": lambda: hf.ASTForAudioClassification(hf.ASTConfig(**AUDIO)),
}
WITHOUT_CLASS_TOKEN = {"siglip", "siglip-zero-shot", "siglip-tower", "siglip2", "siglip2-tower", "ijepa", "videomae"}

AS_VIT: dict[str, Any] = {"score": "head-weighted-class-attention", "before_blocks": [2, 4]}
# thresholds that drop about a third a stage on these models
REDUNDANCY: dict[str, Any] = {"before_blocks": [1, 3, 4], "thresholds": [0.15, 0.12, 0.15]}
POLICIES: dict[str, PruningSpec] = {
    "as-vit": PruningSpec(**AS_VIT, thresholds=[0.008, 0.012], dropped="leave"),
    "as-vit-merge": PruningSpec(**AS_VIT, thresholds=[0.008, 0.012], dropped="merge"),
    "redundancy-merge": PruningSpec(**REDUNDANCY, dropped="merge"),
    "redundancy-leave": PruningSpec(**REDUNDANCY, dropped="leave"),
    "top-k-merge": PruningSpec(**AS_VIT, select="top-k", keep_ratios=[0.7, 0.7], dropped="merge"),
    "random-merge": PruningSpec(**AS_VIT, select="random", keep_ratios=[0.7, 0.7], dropped="merge"),
    "random-leave": PruningSpec(**AS_VIT, select="random", keep_ratios=[0.7, 0.7], dropped="leave"),
    "tome": PruningSpec(select="tome", keep_ratios=[0.85] * 5),
}


REPRESENTATIVE = ("as-vit", "as-vit-merge", "redundancy-merge")
# one for each thing that pruning has to know of a family: the first runs under every policy
ARCHETYPES = {
    "vit": "a class token, which is all that the head reads",
    "deit": "two prefix tokens",
    "dinov2": "the head reads the class token and the mean of all patches",
    "dinov3": "registers, and rotary positions",
    "beit": "relative positions",
    "clip-zero-shot": "two towers",
    "siglip-tower": "no class token, and a pooling by attention",
    "siglip2-tower": "padded images",
    "videomae": "another medium, and no class token",
}


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for name, parameter in model.named_parameters():
        # a class token of zeros looks at all patches alike, and then rounding says which of them is more important
        if name.endswith("cls_token") and not parameter.any():
            torch.nn.init.normal_(parameter)
    return model


def spec_for(family: str, spec: PruningSpec) -> PruningSpec:
    """The policy, with the mean query's attention where there is no class token."""
    if family in WITHOUT_CLASS_TOKEN and spec.score == "head-weighted-class-attention":
        return spec.model_copy(update={"score": "head-weighted-mean-attention"})
    return spec


def images(count: int) -> Tensor:
    """Images that differ in how busy they are, so that they keep different numbers of tokens."""
    return _busy(count, 3, 32, 32)


def _busy(count: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    strength = torch.linspace(0.2, 3.0, count).view(-1, *(1 for _ in shape))
    return strength * torch.randn(count, *shape, generator=generator)


Inputs = dict[str, Tensor]


def inputs(family: str, count: int, *, padded: bool = True) -> Inputs:
    """What a forward of the family's model takes, for so many images, videos or sounds.

    padded: where the family pads images, some of these are.
    """
    match family:
        case "videomae" | "vivit":
            return {"pixel_values": _busy(count, 8, 3, 32, 32)}
        case "ast":
            return {"input_values": _busy(count, 64, 16)}
        case "siglip2" | "siglip2-tower":
            shapes = torch.tensor([[8, 8], [7, 8], [5, 12], [8, 8], [6, 9]])[torch.arange(count) % 5 * padded]
            mask = (torch.arange(PATCHES) < shapes.prod(1)[:, None]).long()
            return {"pixel_values": _busy(count, PATCHES, 48), "pixel_attention_mask": mask, "spatial_shapes": shapes}
        case _:
            return {"pixel_values": images(count)}


def take(x: Inputs, index: Tensor | slice) -> Inputs:
    return {name: values[index] for name, values in x.items()}


def each(x: Inputs) -> list[Inputs]:
    return [take(x, slice(i, i + 1)) for i in range(len(next(iter(x.values()))))]


def forward(model: PreTrainedModel, x: Inputs, **options: Any) -> Any:
    if isinstance(model, hf.CLIPModel | hf.SiglipModel):
        return model.get_image_features(**x, **options)
    return model(**x, **options)


def answer(output: Any) -> Tensor:
    """What a user reads off a forward: logits, an embedding, or the last hidden state of a bare model."""
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        if output.get(name) is not None:
            return output[name]
    raise AssertionError(f"no answer in {list(output)}")


def on_gpu() -> bool:
    """Whether the CUDA door's kernels run where they belong; elsewhere in Triton's interpreter, on the CPU."""
    return os.environ["TRITON_INTERPRET"] == "0"


def in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on stages and packed attention in inference are the CUDA door's kernels, in Triton's interpreter."""
    monkeypatch.setattr(kernels, "choose", lambda _: None if torch.is_grad_enabled() else cuda)


def in_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on stages are operators of torch on a CPU too, as without numba and on other devices."""
    monkeypatch.setattr(cpu, "fits", lambda *_: False)
