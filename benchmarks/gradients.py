"""What the gradient of a threshold is worth: the straight-through estimate beside what the loss really does.

    python benchmarks/gradients.py CHECKPOINT DATA --budget 0.5 --batches 6 --batch-size 256

CHECKPOINT: folder or Hub id of a dense classifier. DATA: as `data.path` in a recipe, with a split train. Calibrates to
the budget, and then compares for every stage and every batch the gradient that training gives its threshold with the
central difference of the loss that is measured when the threshold is moved so far that a part `--step` of the stage's
patches changes sides. Both are per unit of that part (a positive number: the loss rises when more patches stay). Prints
a Markdown table for each loss (task, distillation, ratio of MACs): signs that agree, correlation, and scale.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from vitprune import (
    DataSpec,
    PruningSpec,
    SplitSpec,
    calibrate,
    load,
    load_images,
    load_processor,
    prune_,
    pruning_of,
    trace,
)

LOSSES = ("task", "distillation", "ratio")
CALIBRATION_IMAGES = 256
AT_A_TIME = 32
DROPPED = {"redundancy": ("merge", "leave"), "head-weighted-class-attention": ("leave",)}

HALF = False

Images = list[tuple[Tensor, Tensor, Tensor]]


def losses(model: PreTrainedModel, x_BCHW: Tensor, labels_B: Tensor, taught_BC: Tensor) -> Tensor:
    """Means over a few images, (3,)."""
    half = torch.autocast("cpu", torch.bfloat16, enabled=HALF)
    with trace(model) as seen, half:
        logits_BC = model(pixel_values=x_BCHW).logits.float()
    ratio = (seen.macs / seen.dense_macs).mean().to(logits_BC.dtype)
    return torch.stack(
        [
            F.cross_entropy(logits_BC, labels_B),
            F.kl_div(logits_BC.log_softmax(-1), taught_BC.log_softmax(-1), reduction="batchmean", log_target=True),
            ratio,
        ]
    )


@torch.no_grad()
def measured(model: PreTrainedModel, batch: Images) -> Tensor:
    """Means over a batch as inference gives them, (3,)."""
    model.eval()
    return torch.stack([losses(model, *part) for part in batch]).double().mean(0)


def central_differences(model: PreTrainedModel, batch: Images, steps_S: Tensor) -> Tensor:
    """(3, S), of each loss by each threshold."""
    levels = pruning_of(model).levels
    found = []
    for stage, step in enumerate(steps_S.tolist()):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                levels[stage] += sign * step
                sides.append(measured(model, batch))
                levels[stage] -= sign * step
        found.append((sides[0] - sides[1]) / (2 * step))
    return torch.stack(found, dim=1)


def estimated(model: PreTrainedModel, batch: Images) -> Tensor:
    """(3, S), the gradients that training takes steps by."""
    model.train()
    levels = pruning_of(model).levels
    total = torch.zeros(len(LOSSES), len(levels), dtype=torch.float64)
    for part in batch:
        for row, loss in enumerate(parts := losses(model, *part)):
            (gradient,) = torch.autograd.grad(loss, levels, retain_graph=row + 1 < len(parts))
            total[row] += gradient.double()
    return total / len(batch)


def table(title: str, slopes: Sequence[Tensor], gradients: Sequence[Tensor]) -> str:
    """slopes, gradients: one (3, S) a batch."""
    slopes_GLS, gradients_GLS = torch.stack(list(slopes)), torch.stack(list(gradients))
    stages = range(slopes_GLS.shape[2])
    lines = [
        f"\n{title}\n",
        "| loss | signs that agree | correlation | estimate ÷ measured | measured, by stage | estimate |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for row, name in enumerate(LOSSES):
        true_GS, guess_GS = slopes_GLS[:, row], gradients_GLS[:, row]
        agree = (true_GS.sign() == guess_GS.sign()).double().mean()
        correlation = torch.corrcoef(torch.stack([true_GS.flatten(), guess_GS.flatten()]))[0, 1]
        scale = (true_GS * guess_GS).sum() / true_GS.square().sum()
        shown = (" ".join(f"{-values_GS[:, s].mean():.3g}" for s in stages) for values_GS in (true_GS, guess_GS))
        lines.append(f"| {name} | {agree:.0%} | {correlation:.2f} | {scale:.2f} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("data")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--step", type=float, default=0.03, help="part of a stage's patches that changes sides")
    parser.add_argument("--softness", type=float, default=1.0, help="temperatures, times this")
    parser.add_argument("--before-blocks", type=int, nargs="+", default=[1, 4, 7, 10])
    parser.add_argument("--half", action="store_true", help="compute in bfloat16 (autocast)")
    parser.add_argument("--dropped", nargs="+", choices=("merge", "leave"))
    parser.add_argument("--score", default="redundancy", choices=DROPPED)
    args = parser.parse_args()

    processor, data = load_processor(args.checkpoint), DataSpec(path=args.data)
    images = load_images(data, SplitSpec(split="train"), processor, id2label=None)
    first = [batch["pixel_values"] for batch in images.sample(CALIBRATION_IMAGES, 0).loader(AT_A_TIME)]
    batches = make_batches(load(args.checkpoint), images.sample(args.batches * args.batch_size, 1), args.batch_size)
    globals()["HALF"] = args.half
    for dropped in args.dropped or DROPPED[args.score]:
        settings = {"score": args.score, "dropped": dropped, "before_blocks": args.before_blocks}
        model = prune_(load(args.checkpoint), PruningSpec.model_validate(settings, strict=False))
        calibrate(model, first, args.budget, progress=False)
        pruning = pruning_of(model)
        model.requires_grad_(False)
        pruning.levels.requires_grad_(True)
        pruning.execution = "packed"
        units_S = pruning.temperatures / 0.005
        pruning.temperatures.mul_(args.softness)
        slopes, gradients = [], []
        for batch in batches:
            slopes.append(central_differences(model, batch, args.step * units_S) * units_S)
            gradients.append(estimated(model, batch) * units_S)
            print(f"{dropped}: {len(slopes)} of {len(batches)} batches", flush=True)
        print(
            table(
                f"{args.score}, {dropped}, {args.budget:.0%}, {len(batches)} batches of {args.batch_size}",
                slopes,
                gradients,
            )
        )


@torch.inference_mode()
def _taught(dense: PreTrainedModel, x_BCHW: Tensor) -> Tensor:
    return dense(pixel_values=x_BCHW).logits


def make_batches(dense: PreTrainedModel, images: object, batch_size: int) -> list[Images]:
    """Pixel values, labels and the dense model's answers, a few images at a time."""
    parts = [
        (part["pixel_values"], part["labels"], _taught(dense, part["pixel_values"]).clone())
        for part in images.loader(AT_A_TIME)  # type: ignore[attr-defined]
    ]
    size = max(1, batch_size // AT_A_TIME)
    return [parts[start : start + size] for start in range(0, len(parts), size)]


if __name__ == "__main__":
    main()
