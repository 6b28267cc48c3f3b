"""One model of real size of each family, random weights: pruned against dense fused attention (sdpa), interleaved.

    python benchmarks/families.py --budget 0.5 --batch-size 4

Pruned by AS-ViT's score (the mean query's where there is no class token) before a third, seven and ten twelfths of the
blocks, dropped tokens left. timm's is measured where timm is installed (after `make install`: PYTHONPATH=.venv/timm).
Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

import vitprune
from vitprune import PruningSpec, describe_environment

Inputs = dict[str, Tensor]


def images(count: int, size: int = 224) -> Inputs:
    return {"pixel_values": torch.randn(count, 3, size, size)}


def naflex(count: int) -> Inputs:
    shapes = torch.tensor([[16, 16], [12, 20], [20, 12], [14, 18]])[torch.arange(count) % 4]
    mask = (torch.arange(256) < shapes.prod(1)[:, None]).long()
    return {"pixel_values": torch.randn(count, 256, 768), "pixel_attention_mask": mask, "spatial_shapes": shapes}


def video(frames: int) -> Callable[[int], Inputs]:
    return lambda count: {"pixel_values": torch.randn(count, frames, 3, 224, 224)}


def timm_model() -> PreTrainedModel:
    return hf.TimmWrapperForImageClassification(hf.TimmWrapperConfig(architecture="vit_base_patch16_224"))


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[int], Inputs]]] = {
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig()), images),
    "vit_msn": (lambda: hf.ViTMSNForImageClassification(hf.ViTMSNConfig()), images),
    "deit": (lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig()), images),
    "dinov2": (lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(patch_size=14)), images),
    "dinov2_with_registers": (
        lambda: hf.Dinov2WithRegistersForImageClassification(hf.Dinov2WithRegistersConfig(patch_size=14)),
        images,
    ),
    "dinov3_vit": (
        lambda: hf.DINOv3ViTModel(
            hf.DINOv3ViTConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_register_tokens=4)
        ),
        images,
    ),
    "beit": (lambda: hf.BeitForImageClassification(hf.BeitConfig(use_relative_position_bias=True)), images),
    "data2vec-vision": (
        lambda: hf.Data2VecVisionForImageClassification(hf.Data2VecVisionConfig(use_relative_position_bias=True)),
        images,
    ),
    "clip": (lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(patch_size=16)), images),
    "metaclip_2": (
        lambda: hf.MetaClip2VisionModelWithProjection(hf.MetaClip2VisionConfig(patch_size=16)),
        images,
    ),
    "siglip": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig()), images),
    "siglip2": (lambda: hf.Siglip2VisionModel(hf.Siglip2VisionConfig()), naflex),
    "ijepa": (
        lambda: hf.IJepaForImageClassification(
            hf.IJepaConfig(
                hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14
            )
        ),
        images,
    ),
    "videomae": (lambda: hf.VideoMAEForVideoClassification(hf.VideoMAEConfig()), video(16)),
    "vivit": (lambda: hf.VivitForVideoClassification(hf.VivitConfig()), video(32)),
    "audio_spectrogram_transformer": (
        lambda: hf.ASTForAudioClassification(hf.ASTConfig()),
        lambda count: {"input_values": torch.randn(count, 1024, 128)},
    ),
    "timm_wrapper": (timm_model, images),
}


def spec_for(dense: PreTrainedModel) -> PruningSpec:
    attached = vitprune.pruning_of(vitprune.prune_(copy.deepcopy(dense), PruningSpec()))
    blocks = len(attached.cost.linear)
    row = "class" if attached.has_class_token else "mean"
    options: dict[str, Any] = {"score": f"head-weighted-{row}-attention", "dropped": "leave"}
    return PruningSpec(before_blocks=tuple(blocks * part // 12 for part in (4, 7, 10)), **options)


def seconds(model: PreTrainedModel, x: Inputs) -> float:
    start = time.perf_counter()
    model(**x)
    return time.perf_counter() - start


@torch.no_grad()
def measure(name: str, budget: float, batch_size: int, repeats: int) -> str:
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    dense = build().eval()
    pruned = vitprune.prune_(copy.deepcopy(dense), spec_for(dense))
    x = inputs(batch_size)
    vitprune.calibrate(pruned, [x], budget, progress=False)
    with vitprune.trace(pruned) as trace:
        pruned(**x)
    dense(**x)
    pairs = [(seconds(dense, x), seconds(pruned, x)) for _ in range(repeats)]
    before, after = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = float(trace.macs.sum() / trace.dense_macs.sum())
    tokens = trace.keep_masks[0].shape[1] + trace.pruning.num_prefix_tokens
    efficiency = before / after * ratio
    return (
        f"| {name} | {tokens} | {ratio:.1%} | {1e3 * before:.0f} ms | {1e3 * after:.0f} ms | {before / after:.2f} | "
        f"{1 / ratio:.2f} | {efficiency:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    there = [name for name in MODELS if name != "timm_wrapper" or find_spec("timm") is not None]
    parser.add_argument("--only", nargs="+", default=there, choices=list(MODELS))
    args = parser.parse_args()
    print("| family | tokens | MACs | dense | pruned | speed-up | MACs allow | efficiency |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.only:
        print(measure(name, args.budget, args.batch_size, args.repeats), flush=True)
    environment = describe_environment(hf.ViTModel(hf.ViTConfig(num_hidden_layers=1)))
    print(f"\n{environment.cpu}, {environment.threads} threads, torch {environment.torch}")


if __name__ == "__main__":
    main()
