"""torch.compile of a pruned model: what a layer does by itself is traced, what depends on values stays as it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny
import torch
from tiny import Tolerance
from torch._dynamo.convert_frame import FRAME_COMPILE_COUNTER
from torch._dynamo.utils import counters
from torch.testing import assert_close

import vitprune
from vitprune.models.structure import examine

FLOAT32 = Tolerance(rtol=1e-5, atol=1e-5)
FAMILIES = ["vit", "dinov2", "dinov3", "beit", "deit"]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    FRAME_COMPILE_COUNTER.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["as-vit", "as-vit-merge", "redundancy-merge"])
@pytest.mark.parametrize("regional", [True, False])
def test_a_compiled_model_gives_the_same_answers_and_compiles_once(family: str, policy: str, regional: bool) -> None:
    model = vitprune.prune_(tiny.build(family), tiny.POLICIES[policy]).eval()
    batches = [tiny.take(tiny.inputs(family, 18), slice(first, first + 3)) for first in range(0, 18, 3)]
    with torch.no_grad():
        expected = [tiny.answer(tiny.forward(model, x)) for x in batches]
        if regional:
            for block in examine(model).blocks:
                block.compile(backend="eager", dynamic=True)
        else:
            model.compile(backend="eager")
        graphs = []
        for x, answer in zip(batches, expected, strict=True):
            with vitprune.trace(model) as trace:
                assert_close(tiny.answer(tiny.forward(model, x)), answer, **FLOAT32)
            assert not trace.keep_masks[-1].all(), "nothing is dropped: this test would see nothing"
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    # images keep different numbers of tokens in every batch; one graph more is for those that all keep as many
    assert graphs[-1] <= graphs[1] + 1


@pytest.mark.parametrize("family", [*FAMILIES, "siglip"])
def test_few_batch_sizes_compile_anything(family: str) -> None:
    """The dense model compiles at the first size and, with dynamic shapes, at the second."""
    model = vitprune.prune_(tiny.build(family), tiny.POLICIES["redundancy-merge"]).eval()
    model.compile(backend="eager")
    seen: list[int] = []
    with torch.no_grad():
        for size in (1, 2, 3, 5, 8, 13, 16, 32):
            tiny.forward(model, tiny.inputs(family, size))
            seen.append(sum(FRAME_COMPILE_COUNTER.values()))
    assert seen[0] > 0
    assert len(set(seen)) <= 2 + 2
    assert max(FRAME_COMPILE_COUNTER.values()) < torch._dynamo.config.recompile_limit
