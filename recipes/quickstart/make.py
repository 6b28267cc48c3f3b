"""Makes what the quickstart ships: a small ViT trained on Fashion-MNIST, and a slice of the data.

    python recipes/quickstart/make.py --data DIR        # DIR holds train.parquet and test.parquet

The ViT has the shape of DeiT in small: 12 blocks, a class token, 196 patches (28 px, patch 2), width 96, 3 heads.
So that two cores train it in about half an hour, it learns with patches of 4 px first (49 of them), takes these weights
over to patches of 2 px, and then sees a random half of its patches (PatchDropout, arXiv 2208.07220) before all of them.
Fashion-MNIST is MIT-licensed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

HERE = Path(__file__).parent
SEED = 0
BATCH_SIZE = 64
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.05
COARSE_LEARNING_RATE, FINE_LEARNING_RATE = 1e-3, 5e-4
# (epochs, part of the patches that the model sees)
COARSE_PHASES = ((6.0, 1.0),)
FINE_PHASES = ((1.0, 0.5), (0.3, 1.0))
KERNEL_AND_POSITIONS = ("patch_embeddings.projection.weight", "position_embeddings")
SLICE = {"train": 3000, "test": 2000}


def build_model(names: list[str], patch_size: int) -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            image_size=28,
            patch_size=patch_size,
            hidden_size=96,
            num_hidden_layers=12,
            num_attention_heads=3,
            intermediate_size=384,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )
    )


def refine(coarse: ViTForImageClassification, names: list[str]) -> ViTForImageClassification:
    """The same model for patches of half the size: it sees them as if they were magnified."""
    fine = build_model(names, patch_size=2)
    weights = coarse.state_dict()
    kernel, positions = (next(name for name in weights if name.endswith(end)) for end in KERNEL_AND_POSITIONS)
    weights[kernel] = nn.functional.avg_pool2d(weights[kernel], 2) * 4
    cls, grid = weights[positions][:, :1], weights[positions][:, 1:].unflatten(1, (7, 7)).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(14, 14), mode="bicubic")
    weights[positions] = torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)
    fine.load_state_dict(weights)
    return fine


class PatchDropout:
    """A forward hook on the embeddings that lets a random part of the patches through, the same for a batch."""

    def __init__(self) -> None:
        self.keep = 1.0

    def __call__(self, module: nn.Module, args: object, x_BND: Tensor) -> Tensor:
        if not module.training or self.keep == 1.0:
            return x_BND
        patches = x_BND.shape[1] - 1
        chosen = torch.randperm(patches)[: round(patches * self.keep)] + 1
        return torch.cat([x_BND[:, :1], x_BND[:, chosen]], dim=1)


def as_tensors(data: Dataset) -> tuple[Tensor, Tensor]:
    """uint8 images (n, 28, 28) and labels (n,)."""
    images = torch.from_numpy(np.stack([np.asarray(image) for image in data["image"]]))
    return images, torch.tensor(data["label"])


def pixel_values(images: Tensor) -> Tensor:
    """What the shipped image processor makes of grey images: three equal channels in [-1, 1]."""
    return (images.float() / 127.5 - 1.0)[:, None].expand(-1, 3, -1, -1)


def augment(images: Tensor) -> Tensor:
    """Flips half of the images and shifts all by up to two pixels."""
    images = torch.where(torch.rand(len(images), 1, 1) < 0.5, images.flip(-1), images)
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    dy, dx = (int(d) for d in torch.randint(0, 5, (2,)))
    return padded[:, dy : dy + 28, dx : dx + 28]


@torch.inference_mode()
def accuracy(model: ViTForImageClassification, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum(
        int((model(pixel_values=pixel_values(x)).logits.argmax(-1) == y).sum())
        for x, y in zip(images.split(250), labels.split(250), strict=True)
    )
    return right / len(labels)


def train(
    model: ViTForImageClassification,
    images: Tensor,
    labels: Tensor,
    phases: tuple[tuple[float, float], ...],
    learning_rate: float,
) -> None:
    dropout = PatchDropout()
    handle = model.vit.embeddings.register_forward_hook(dropout)
    steps = [(keep, int(epochs * len(images) / BATCH_SIZE)) for epochs, keep in phases]
    total = sum(count for _, count in steps)

    def schedule(step: int) -> float:
        return min(1.0, step / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / total))

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    batches = _endless_batches(len(images))
    step = 0
    for keep, count in steps:
        dropout.keep = keep
        for batch in islice(batches, count):
            model.train()
            loss = model(pixel_values=pixel_values(augment(images[batch])), labels=labels[batch]).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            if step % 200 == 0:
                print(f"step {step}/{total}  patches {keep:.0%}  loss {loss.item():.3f}", flush=True)
    handle.remove()


def _endless_batches(count: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(count).split(BATCH_SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", required=True, help="folder with Fashion-MNIST as train.parquet and test.parquet")
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    torch.manual_seed(SEED)

    files = {split: str(Path(args.data) / f"{split}.parquet") for split in SLICE}
    data = load_dataset("parquet", data_files=files)
    for split, count in SLICE.items():
        sample = data[split].shuffle(seed=SEED).select(range(count)).flatten_indices()
        sample.to_parquet(str(args.output / "data" / f"{split}.parquet"))

    names, (images, labels) = data["train"].features["label"].names, as_tensors(data["train"])
    coarse = build_model(names, patch_size=4)
    train(coarse, images, labels, COARSE_PHASES, COARSE_LEARNING_RATE)
    print(f"top-1 with 49 patches: {accuracy(coarse, *as_tensors(data['test'])):.4f}", flush=True)
    model = refine(coarse, names)
    train(model, images, labels, FINE_PHASES, FINE_LEARNING_RATE)
    print(f"top-1 on the {len(data['test'])} test images: {accuracy(model, *as_tensors(data['test'])):.4f}")
    model.half().save_pretrained(args.output / "checkpoint")
    ViTImageProcessorPil(size={"height": 28, "width": 28}, do_convert_rgb=True).save_pretrained(
        args.output / "checkpoint"
    )


if __name__ == "__main__":
    main()
