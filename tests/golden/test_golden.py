"""The published AS-ViT modules' numbers, forward and gradient, on two tiny ViTs (shared/golden)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from samples import SHARED
from tiny import Tolerance
from torch import Tensor
from torch.testing import assert_close
from transformers import ViTConfig, ViTForImageClassification

import vitprune
from vitprune.measure.answers import SingleLabel
from vitprune.models.module import pruning_of
from vitprune.models.trace import Trace, watching
from vitprune.pruning.costs import CostModel

pytestmark = pytest.mark.shared

VALUES = Tolerance(rtol=1e-4, atol=1e-5)
# gradients of thresholds pass through a temperature of 1e-4
THRESHOLD_GRADIENTS = Tolerance(rtol=1e-3, atol=1e-5)
# what is left out beyond thresholds.BAND, as a part of the gradient; the bound is 2/(1 + e^9) on evenly spread scores
BAND_ERROR = 2e-3
BUDGET = 0.65


@dataclass
class Golden:
    expected: dict[str, Tensor]
    dense: ViTForImageClassification
    model: ViTForImageClassification
    stages: list[int]

    @property
    def images(self) -> Tensor:
        return self.expected["pixel_values"]


@pytest.fixture(params=["asvit_a", "asvit_b"])
def golden(request: pytest.FixtureRequest) -> Golden:
    path = SHARED / "golden" / f"{request.param}.weights.safetensors"
    with safe_open(path, "pt") as file:
        meta = {key: json.loads(value) for key, value in file.metadata().items()}

    def build() -> ViTForImageClassification:
        config = ViTConfig(
            image_size=meta["image_size"],
            patch_size=meta["patch_size"],
            hidden_size=meta["hidden_size"],
            intermediate_size=4 * meta["hidden_size"],
            num_hidden_layers=meta["num_hidden_layers"],
            num_attention_heads=meta["num_attention_heads"],
            layer_norm_eps=meta["layer_norm_eps"],
            num_labels=10,  # pyright: ignore[reportCallIssue] — PreTrainedConfig's, not among the fields
        )
        model = ViTForImageClassification(config)
        model.load_state_dict(load_file(path))
        return model.eval()

    spec = vitprune.PruningSpec(
        before_blocks=meta["stages"],
        thresholds=meta["thresholds"],
        score="head-weighted-class-attention",
        dropped="leave",
        temperature=meta["temperature"],
    )
    model = build()
    vitprune.prune_(model, spec)
    expected = load_file(SHARED / "golden" / f"{request.param}.expected.safetensors")
    return Golden(expected, build(), model, meta["stages"])


class PublishedCost(CostModel):
    """The published cost leaves out the score's attention row."""

    def attention_row(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        return 0 * tokens


@dataclass(eq=False)
class Scores(Trace):
    """Keeps the scores that stages compare with their thresholds."""

    seen: list[Tensor] = field(default_factory=list)

    def level(self, stage: int, scores_BM: Tensor, valid_BM: Tensor, current: Tensor) -> Tensor:
        self.seen.append(scores_BM[:, 1:])
        return current


def test_masked_pass_has_the_published_scores_masks_and_logits(golden: Golden) -> None:
    pruning = pruning_of(golden.model)
    seen = Scores(pruning, pruning.before_blocks)
    with watching(seen):
        logits = golden.model.train()(golden.images).logits
    assert_close(logits, golden.expected["train.logits"], **VALUES)
    before = torch.ones_like(seen.keep_masks[0])
    for stage, scores_BM in enumerate(seen.seen):
        mask = golden.expected[f"train.mask.{stage}"].bool()
        assert torch.equal(seen.keep_masks[stage], mask)
        # scores of the patches that were there, image by image, in order
        ours = torch.cat([row[row > -torch.inf] for row in scores_BM])
        assert_close(ours, golden.expected[f"train.score.{stage}"][before], **VALUES)
        before = mask


def test_losses_and_all_gradients_are_the_published_ones(golden: Golden) -> None:
    expected, model, patches = golden.expected, golden.model.train(), 196
    with torch.no_grad():
        teacher = golden.dense(golden.images).logits
    assert_close(teacher, expected["teacher.logits"], **VALUES)
    cost = pruning_of(model).cost = PublishedCost(**{**vars(pruning_of(model).cost), "read": None})
    with vitprune.trace(model) as trace:
        logits = model(golden.images).logits
    # the published cost: blocks and patch embedding, without the head; 196 tokens for the teacher
    gmacs = (trace.macs - cost.head).float() / 1e9
    teacher_gmacs = (sum(cost.block(b, patches) for b in range(len(cost.linear))) + cost.patch * patches) / 1e9
    assert_close(torch.tensor(teacher_gmacs), expected["teacher.gmacs"], **VALUES)
    assert_close(gmacs.detach() - cost.patch * patches / 1e9, expected["train.gmacs_per_block"].sum(0), **VALUES)
    losses = {
        "ce": torch.nn.functional.cross_entropy(logits, expected["labels"]),
        "kl": SingleLabel().distance(logits, teacher),
        "budget": (gmacs.mean() - BUDGET * teacher_gmacs).abs(),
    }
    weights = [model.get_parameter(f"vit.layers.0.attention.{name}_proj.weight") for name in "qkv"]
    for name, loss in losses.items():
        key = "loss.budget_gmacs" if name == "budget" else f"loss.{name}"
        assert_close(loss.detach(), expected[key], **VALUES)
        thresholds, *qkv = torch.autograd.grad(loss, (pruning_of(model).levels, *weights), retain_graph=True)
        published = torch.stack([expected[f"grad.{name}.threshold.{s}"] for s in range(len(golden.stages))])
        assert_close(thresholds, published, **THRESHOLD_GRADIENTS)
        assert_close(torch.cat(qkv), expected[f"grad.{name}.block0_qkv_weight"], **VALUES)


def test_packed_training_reaches_the_published_gradients(golden: Golden) -> None:
    """Tokens far from their thresholds leave in training, too; gradients differ by what those would have told."""
    expected, model = golden.expected, golden.model.train()
    pruning_of(model).execution = "packed"
    with torch.no_grad():
        teacher = golden.dense(golden.images).logits
    logits = model(golden.images).logits
    assert_close(logits, expected["train.logits"], **VALUES)
    losses = {
        "ce": torch.nn.functional.cross_entropy(logits, expected["labels"]),
        "kl": SingleLabel().distance(logits, teacher),
    }
    for name, loss in losses.items():
        (thresholds,) = torch.autograd.grad(loss, pruning_of(model).levels, retain_graph=True)
        published = torch.stack([expected[f"grad.{name}.threshold.{s}"] for s in range(len(golden.stages))])
        assert (thresholds - published).norm() < BAND_ERROR * published.norm()


def test_inference_keeps_the_published_patches(golden: Golden) -> None:
    model = golden.model.eval()
    with torch.no_grad(), vitprune.trace(model) as batched:
        logits = model(golden.images).logits
    with torch.no_grad(), vitprune.trace(model) as alone:
        logits_alone = torch.cat([model(image[None]).logits for image in golden.images])
    assert_close(logits, golden.expected["eval.logits"], **VALUES)
    assert_close(logits_alone, golden.expected["eval.logits"], **VALUES)
    for image in range(len(golden.images)):
        left = torch.arange(196)
        for stage in range(len(golden.stages)):
            left = left[golden.expected[f"eval.keep.{stage}.image{image}"]]
            for trace in (batched, alone):
                assert torch.equal(trace.keep_masks[stage][image].nonzero().squeeze(1), left)
