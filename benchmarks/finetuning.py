"""What fine-tuning is worth: dense, calibrated only and fine-tuned on the same test images, at one budget.

    python benchmarks/finetuning.py CHECKPOINT DATA --budget 0.35 --images 4000
    python benchmarks/finetuning.py CHECKPOINT DATA --budget 0.35 --policy tome --set losses.task=1

CHECKPOINT: folder or Hub id of a dense classifier. DATA: as `data.path` in a recipe, with splits train and test.
Calibrates in bfloat16, or in `--dtype`, on 256 training images, trains one epoch unless told otherwise, scales the
thresholds to the budget on held-out images, and prints what the checks saw and a row for each model. `--set`: keys of a
recipe's section `finetune`. `--before-blocks`: stages in place of a search's.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from vitprune import (
    DataSpec,
    FinetuneSpec,
    PruningSpec,
    SplitSpec,
    calibrate,
    finetune,
    load,
    load_images,
    load_processor,
    prune_,
    scale_to_budget,
    trace,
)

CALIBRATION_IMAGES = 256
AT_A_TIME = 32
WINDOW = 16  # steps over which the ratio is averaged
POLICIES: dict[str, dict[str, object]] = {
    "default": {},
    "as-vit": {"score": "head-weighted-class-attention", "before_blocks": [4, 7, 10], "dropped": "leave"},
    "tome": {"select": "tome"},
    "top-k": {"select": "top-k", "before_blocks": [1, 4, 7, 10]},
}


def pixels(batches: object, dtype: torch.dtype) -> list[Tensor]:
    return [batch["pixel_values"].to(dtype) for batch in batches]  # type: ignore[attr-defined]


@torch.inference_mode()
def answers(model: PreTrainedModel, images: Sequence[Tensor]) -> Tensor:
    """Logits (B, C), float32."""
    return torch.cat([model.eval()(pixel_values=x).logits.float() for x in images])


def row(name: str, logits: Tensor, dense: Tensor, labels: Tensor, ratio: float) -> str:
    top1, same = (float((logits.argmax(-1) == other).double().mean()) for other in (labels, dense.argmax(-1)))
    kl = F.kl_div(logits.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean")
    return f"| {name} | {ratio:.1%} | {100 * top1:.1f} | {same:.3f} | {kl:.4f} |"


def compared(name: str, model: PreTrainedModel, images: Sequence[Tensor], dense: Tensor, labels: Tensor) -> str:
    with trace(model) as seen:
        logits = answers(model, images)
    return row(name, logits, dense, labels, seen.ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("data")
    parser.add_argument("--budget", type=float, default=0.35)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--policy", choices=POLICIES, default="default")
    parser.add_argument("--before-blocks", type=int, nargs="+")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    settings: dict[str, object] = {"mixed_precision": "no" if dtype == torch.float32 else "bf16"}
    for key, value in (change.split("=", 1) for change in args.changes):
        section, _, name = key.rpartition(".")
        settings[section or key] = {**dict(settings.get(section, {})), name: value} if section else value  # type: ignore[call-overload]
    spec = FinetuneSpec.model_validate(settings, strict=False)
    processor, data = load_processor(args.checkpoint), DataSpec(path=args.data)
    test = list(load_images(data, SplitSpec(split="test", limit=args.test_images), processor, id2label=None).loader(32))
    images, labels = pixels(test, dtype), torch.cat([batch["labels"] for batch in test])
    everything = load_images(data, SplitSpec(split="train"), processor, id2label=None)
    policy = POLICIES[args.policy] | ({"before_blocks": args.before_blocks} if args.before_blocks else {})
    model = prune_(load(args.checkpoint, dtype=dtype), PruningSpec.model_validate(policy, strict=False))
    calibrate(model, pixels(everything.sample(CALIBRATION_IMAGES, 0).loader(AT_A_TIME), dtype), args.budget)
    taught = answers(load(args.checkpoint, dtype=dtype), images)
    rows = [row("dense", taught, taught, labels, 1.0), compared("calibrated", model, images, taught, labels)]

    limit = SplitSpec(split="train", limit=args.images + spec.holdout)
    train, holdout = load_images(data, limit, processor, id2label=None).holdout(spec.holdout, args.seed)
    dense, student = load(args.checkpoint), copy.deepcopy(model).float()
    history = finetune(student, dense, train, spec, args.budget, holdout=holdout, seed=args.seed)
    assert history.training is not None
    student.to(dtype)
    if history.training.kept_step and student.get_submodule("vitprune").spec.select == "threshold":  # type: ignore[union-attr]
        scale_to_budget(student, pixels(holdout.loader(AT_A_TIME), dtype), args.budget)
    rows.append(compared(f"fine-tuned, step {history.training.kept_step}", student, images, taught, labels))

    for check in history.training.checks:
        loss = math.nan if check.loss is None else check.loss
        print(f"step {check.step}: held-out loss {loss:.4f}, ratio {check.ratio:.1%}, kept {check.kept}")
    ratios = torch.tensor([record["ratio"] for record in history.records]).double()
    if len(ratios) > 2 * WINDOW:
        off = (ratios[WINDOW:].unfold(0, WINDOW, 1).mean(1) - args.budget).abs().max()
        print(f"ratio after {WINDOW} steps: means of {WINDOW} steps are at most {100 * off:.2f} points off")
    print("\n| model | MACs | top-1 | agreement | KL |\n|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
