"""What is known of each family of ViTs: one entry of `FAMILIES`. docs/families.md shows how one is added."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn
from transformers import PreTrainedModel


class Stem(NamedTuple):
    """What makes `patches` patches of an image of some (channels, height, width)."""

    module: nn.Module
    image: tuple[int, int, int]
    patches: int


@dataclass(frozen=True)
class Family:
    """What differs between plain ViTs. Most entries need the first two or three.

    classes: the model classes that work; the last hidden state means one thing to all of them.
    num_prefix_tokens: class, distillation and register tokens, which are never pruned; the class token is the first.
    final_norm: module of the backbone that works token by token behind the blocks, as does all before it; behind it the
        dense sequence is wanted back. None, or one that the model doesn't have: behind the last block.
    has_class_token: without one, tokens are scored by the mean query's attention.
    blocks: path of the list of blocks, where the model declares no block class.
    has_interface: attention goes through transformers' interface; else the blocks' calls of torch's fused attention are
        taken.
    rope: blocks are given a table of rotary positions for the patches.
    pads: blocks are given a mask of patches that are padding.
    media: what its inputs are; recipes read images.
    inner: timm's model inside transformers' wrapper: state dicts have its names, and it checkpoints in its own way.
    pooling: the `nn.MultiheadAttention` by which the head pools patches.
    heads: number of heads and head width.
    stem: what makes patches of images, where that is more than one convolution of a patch each.
    reads_patches: whether the model's answer depends on the patches behind the last block; to say so is never wrong.
    """

    classes: tuple[str, ...]
    num_prefix_tokens: Callable[[PreTrainedModel], int] = lambda backbone: 1
    final_norm: str | None = "layernorm"
    has_class_token: Callable[[PreTrainedModel], bool] = lambda backbone: True
    blocks: str | None = None
    has_interface: bool = True
    rope: bool = False
    pads: bool = False
    inner: str | None = None
    media: Literal["images", "images of several shapes", "videos", "sounds"] = "images"
    pooling: str | None = None
    heads: Callable[[PreTrainedModel], tuple[int, int]] = lambda backbone: _heads_of_config(backbone)
    stem: Callable[[PreTrainedModel], Stem | None] = lambda backbone: None
    reads_patches: Callable[[PreTrainedModel], bool] = lambda model: True


def _none(backbone: PreTrainedModel) -> int:
    return 0


def _never(backbone: PreTrainedModel) -> bool:
    return False


def _with_registers(backbone: PreTrainedModel) -> int:
    return 1 + backbone.config.num_register_tokens


def _heads_of_config(backbone: PreTrainedModel) -> tuple[int, int]:
    heads = backbone.config.num_attention_heads
    return heads, getattr(backbone.config, "head_dim", None) or backbone.config.hidden_size // heads


def _all_but_class_heads(model: PreTrainedModel) -> bool:
    """Where a classifier reads the prefix tokens; a bare model gives out everything, and who knows what others do."""
    forward = type(model).forward
    return not forward.__module__.startswith("transformers.") or "Classification" not in forward.__qualname__


def _timm(backbone: PreTrainedModel) -> Any:
    return backbone.get_submodule("timm_model")


def attention_of_timm(block: nn.Module) -> Any:
    """The one module of a block of timm's that attends, as in a plain vision transformer; None where it is another."""
    attending = [module for module in block.modules() if hasattr(module, "fused_attn")]
    is_plain = [type(module).__name__ for module in attending] in (["Attention"], ["ParallelScalingBlock"])
    return attending[0] if is_plain else None


def _reads_patches_of_timm(model: PreTrainedModel) -> bool:
    attention = attention_of_timm(_timm(model).blocks[-1])
    # one layer makes keys and what else a block makes of every token
    is_apart = type(attention).__name__ == "Attention" and getattr(attention, "gate", None) is None
    return _all_but_class_heads(model) or _timm(model).global_pool != "token" or not is_apart


def _heads_of_timm(backbone: PreTrainedModel) -> tuple[int, int]:
    attention = attention_of_timm(_timm(backbone).blocks[0])
    return attention.num_heads, attention.head_dim


def _stem_of_timm(backbone: PreTrainedModel) -> Stem | None:
    embedding = _timm(backbone).patch_embed
    if not hasattr(embedding, "backbone"):
        return None
    channels = next(module.in_channels for module in embedding.modules() if isinstance(module, nn.Conv2d))
    return Stem(embedding, (channels, *embedding.img_size), embedding.num_patches)


# by the model type of the backbone
FAMILIES = {
    # The class token's head, or the class token itself.
    "vit": Family(("ViTForImageClassification", "ViTModel"), reads_patches=_all_but_class_heads),
    "vit_msn": Family(("ViTMSNForImageClassification", "ViTMSNModel"), reads_patches=_all_but_class_heads),
    # Class and distillation token, a head each or one.
    "deit": Family(
        ("DeiTForImageClassification", "DeiTForImageClassificationWithTeacher", "DeiTModel"),
        lambda backbone: 2,
        reads_patches=_all_but_class_heads,
    ),
    # Class token beside the mean of the patches, those that are kept, by size.
    "dinov2": Family(("Dinov2ForImageClassification", "Dinov2Model")),
    "dinov2_with_registers": Family(
        ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersModel"), _with_registers
    ),
    # Class token; rotary positions travel with their tokens.
    "dinov3_vit": Family(("DINOv3ViTModel",), _with_registers, "norm", rope=True),
    # Mean of the kept patches, or the class token; relative positions travel with their tokens.
    "beit": Family(("BeitForImageClassification", "BeitModel")),
    "data2vec-vision": Family(
        ("Data2VecVisionForImageClassification", "Data2VecVisionModel"), blocks="encoder.layer", has_interface=False
    ),
    # Class token in the tower, mean of the kept patches in classification.
    "clip_vision_model": Family(
        ("CLIPForImageClassification", "CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection"), final_norm=None
    ),
    "metaclip_2_vision_model": Family(
        (
            "MetaClip2ForImageClassification",
            "MetaClip2Model",
            "MetaClip2VisionModel",
            "MetaClip2VisionModelWithProjection",
        ),
        final_norm=None,
    ),
    # Attention pooling over the kept patches in the tower, their mean in classification.
    "siglip_vision_model": Family(
        ("SiglipForImageClassification", "SiglipModel", "SiglipVisionModel"),
        _none,
        "post_layernorm",
        _never,
        pooling="head.attention",
    ),
    "siglip2_vision_model": Family(
        ("Siglip2ForImageClassification", "Siglip2Model", "Siglip2VisionModel"),
        _none,
        "post_layernorm",
        _never,
        pads=True,
        media="images of several shapes",
        pooling="head.attention",
    ),
    # Mean of the kept patches.
    "ijepa": Family(("IJepaForImageClassification", "IJepaModel"), _none, has_class_token=_never),
    # Mean of the kept tubes, or class token.
    "videomae": Family(
        ("VideoMAEForVideoClassification", "VideoMAEModel"), _none, has_class_token=_never, media="videos"
    ),
    "vivit": Family(("VivitForVideoClassification", "VivitModel"), media="videos", reads_patches=_all_but_class_heads),
    # Mean of class and distillation token.
    "audio-spectrogram-transformer": Family(
        ("ASTForAudioClassification", "ASTModel"),
        lambda backbone: 2,
        media="sounds",
        reads_patches=_all_but_class_heads,
    ),
    # Class token or mean of the kept patches, as the model says.
    "timm_wrapper": Family(
        ("TimmWrapperForImageClassification", "TimmWrapperModel"),
        lambda backbone: _timm(backbone).num_prefix_tokens,
        "timm_model.norm",
        lambda backbone: _timm(backbone).has_class_token,
        blocks="timm_model.blocks",
        has_interface=False,
        inner="timm_model",
        heads=_heads_of_timm,
        stem=_stem_of_timm,
        reads_patches=_reads_patches_of_timm,
    ),
}


def supported() -> str:
    """What works, for messages."""
    return f"ViTs of the model types {', '.join(FAMILIES)}"


def register_family(model_type: str, family: Family) -> None:
    """Make models of a type known to `prune_`, for this process.

    Args:
        model_type: `config.model_type` of the module that takes the image.
        family: what pruning has to know of such models.

    Raises:
        ValueError: the type is known already.
    """
    if model_type in FAMILIES:
        raise ValueError(
            f"the family '{model_type}' is registered already; its classes are {FAMILIES[model_type].classes}"
        )
    FAMILIES[model_type] = family
