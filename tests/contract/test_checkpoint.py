"""Checkpoints of before: saved by earlier versions, they load for ever and answer what they answered.

`checkpoints/` was written by the version before the rooms (format 2); nothing rewrites it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import Tolerance
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForImageClassification

import vitprune

FOLDER = Path(__file__).parent / "checkpoints"
# another version of torch, on another CPU
FLOAT32 = Tolerance(rtol=1e-4, atol=1e-4)


def images() -> Tensor:
    """Those that the answers beside the checkpoints are for."""
    waves = torch.tensor([0.37, 1.7]).view(2, 1, 1, 1)
    return torch.sin(torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32) * waves)


@pytest.mark.parametrize("name", ["as-vit", "redundancy"])
@pytest.mark.parametrize("loads", [vitprune.load, AutoModelForImageClassification.from_pretrained])
def test_an_old_checkpoint_answers_what_it_answered(name: str, loads: object) -> None:
    expected = json.loads((FOLDER / name / "answers.json").read_text())
    model = loads(FOLDER / name).eval()  # type: ignore[operator]
    with torch.no_grad(), vitprune.trace(model) as trace:
        logits = model(images()).logits
    assert [mask.sum(1).tolist() for mask in trace.keep_masks] == expected["kept"]
    assert_close(logits, torch.tensor(expected["logits"]), **FLOAT32)
