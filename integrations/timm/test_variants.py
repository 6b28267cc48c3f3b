"""Every architecture of timm's: the plain vision transformers right, as small ones; the others refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import test_timm  # names the families that the suite reads
import timm
import torch
from timm.models import _registry
from tiny import Tolerance
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import TimmWrapperForImageClassification

import vitprune

FILES = {name: _registry._model_to_module[name] for name in timm.list_models()}
WITH_PLAIN_ONES = ("vision_transformer", "vision_transformer_hybrid", "deit", "vitamin")
PLAIN = [name for name, file in FILES.items() if file in WITH_PLAIN_ONES or name.startswith("beit3")]
# that pool by attention (SigLIP's, unless they average), distil, attend twice in a block, or subtract one attention
DIFFERENT = re.compile(r"siglip_(?!gap)|_map_|test_vit3|distilled|18x2|_d(little|pwee|wee)_")
# of the other files one each
OTHERS = {file: name for name, file in FILES.items() if name not in PLAIN}
SPEC = vitprune.PruningSpec(before_blocks=(1, 3), score="redundancy", dropped="merge", thresholds=(0.4, 0.4))
# a stem of fifty layers rounds as the batch has it
OF_CONVOLUTIONS = Tolerance(rtol=0.0, atol=5e-5)
SMALL: dict[str, Any] = {"depth": 4}
NARROW: dict[str, Any] = {"embed_dim": 48, "num_heads": 4}
# their stems give out patches as wide as the blocks are
OF_ONE_WIDTH = ("vitamin", "vit_base_mci")


def small(name: str) -> TimmWrapperForImageClassification:
    patch = next((part.removeprefix("patch") for part in name.split("_") if part.startswith("patch")), "16")
    side = 96 if FILES[name] in ("vision_transformer_hybrid", "vitamin") else 6 * int(patch)
    torch.manual_seed(0)
    model = TimmWrapperForImageClassification(
        test_timm.config(name, {**SMALL, **({} if name.startswith(OF_ONE_WIDTH) else NARROW), "img_size": side})
    )
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.3)  # attention far from uniform
    return model.eval()


def images_for(model: Any, count: int) -> torch.Tensor:
    return torch.randn(count, 3, *model.timm_model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [name for name in PLAIN if not DIFFERENT.search(name)])
def test_a_plain_one_is_right(name: str) -> None:
    import suite

    model, dense = small(name), small(name)
    x = {"pixel_values": images_for(model, 3)}
    vitprune.prune_(model, SPEC)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        of_dense = dense(**x).logits
    expected = suite.run_by_reference(model, x)
    answers, trace = suite.run(model, x)
    suite.same_decisions(trace, expected)
    assert not all(mask.all() for mask in trace.keep_masks)
    tolerance = suite.OF_LARGEST if model.timm_model.patch_embed.__class__.__name__ == "PatchEmbed" else OF_CONVOLUTIONS
    torch.testing.assert_close(trace.dense_macs.sum().item(), counter.get_total_flops() / 2, **suite.COUNTED)
    torch.testing.assert_close(answers / expected.largest, expected.answers / expected.largest, **tolerance)
    vitprune.pruning_of(model).thresholds.data.fill_(-1)
    torch.testing.assert_close(suite.run(model, x)[0] / expected.largest, of_dense / expected.largest, **tolerance)


@pytest.mark.parametrize("name", [*filter(DIFFERENT.search, PLAIN), *OTHERS.values()])
def test_another_is_refused_in_a_few_words(name: str) -> None:
    with torch.device("meta"):
        model = TimmWrapperForImageClassification(test_timm.config(name, {}))
    with pytest.raises(ValueError, match=r"wraps .*timm's") as caught:
        vitprune.prune_(model, SPEC)
    assert len(str(caught.value)) < 400
