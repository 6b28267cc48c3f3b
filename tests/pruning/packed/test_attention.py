"""Kernels for packed tokens against sums written out image by image, and against each other in whole models."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from suite import ARCHETYPES_AND_POLICIES
from tiny import Tolerance
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.testing import assert_close
from written_out import (
    LENGTHS,
    QKV,
    SCALE,
    H,
    K,
    alone,
    batch_of,
    bias_of,
    every_layout,
    images_of,
    in_both_ways,
    of_images,
    packed,
    relative_positions,
    with_or_without_sizes,
)

from vitprune.models.prune import prune_
from vitprune.pruning import reference
from vitprune.pruning.attention import StatsRequest
from vitprune.pruning.kernels import flash as flash_module
from vitprune.pruning.layout import Layout
from vitprune.pruning.packed import attention as module
from vitprune.pruning.packed.attention import Kernel, PackedAttention, kernel_for
from vitprune.pruning.scores import Row, TokenStats
from vitprune.pruning.token_batch import NO_TOKEN, Kernels, TokenBatch

EXACT = Tolerance(rtol=0.0, atol=0.0)
# float32 sums in another order
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-6)
MODEL = Tolerance(rtol=1e-5, atol=1e-5)
# one rounding of the result
BFLOAT16 = Tolerance(rtol=2**-7, atol=2**-7)


def flash(*args: Any, **options: Any) -> Tensor:
    """What torch documents of `varlen_attn`, image by image: its own kernel is for CUDA alone."""
    call = inspect.signature(varlen_attn).bind(*args, **options)
    q, k, v, bounds, bounds_k, most, most_k = call.args[:7]
    assert bounds.dtype == bounds_k.dtype == torch.int32
    assert q.shape == k.shape == v.shape
    lengths = bounds.diff()
    assert torch.equal(bounds, bounds_k)
    assert bounds[0] == 0
    assert bounds[-1] == len(q)
    assert most == most_k == lengths.max()
    outputs = []
    for image in zip(*(x.split(lengths.tolist()) for x in (q, k, v)), strict=True):
        own_q, own_k, own_v = (x.transpose(0, 1).double() for x in image)
        weights = (own_q @ own_k.transpose(1, 2) * call.arguments["scale"]).softmax(-1)
        outputs.append((weights @ own_v).transpose(0, 1).to(q.dtype))
    return torch.cat(outputs)


@pytest.fixture(autouse=True)
def flash_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_module, "varlen_attn", flash)


# buckets: one for every length, some of a few images, and one for all. varlen has no rows without a token
KERNELS = [("buckets", 1), ("buckets", 4), ("buckets", 16), ("padded", 1), ("padded", 4), ("varlen", 1)]
with_bias = pytest.mark.parametrize(("kernel", "alignment"), KERNELS[:-1])
every_kernel = pytest.mark.parametrize(("kernel", "alignment"), KERNELS)


def attend(
    batch: TokenBatch, qkv: QKV, row: Row | None = None, kernel: Kernel | None = None, bias: Tensor | None = None
) -> tuple[Tensor, TokenStats]:
    """Contexts (T, H, K), and what was found."""
    attention = PackedAttention(batch, StatsRequest(row, metric=True), kernel)
    return attention.attend(*qkv, bias, SCALE, 0.0)[0], attention.stats


@every_kernel
@every_layout
@with_or_without_sizes
@in_both_ways
@pytest.mark.parametrize("row", ["class", "mean"])
def test_packed_attention_is_the_references_for_each_image(
    row: Row, kernels: Kernels | None, kernel: Kernel, alignment: int, sized: bool, lengths: tuple[int, ...]
) -> None:
    batch, qkv, sizes = packed(sized, lengths, alignment, kernels=kernels)
    contexts, stats = attend(batch, qkv, row, kernel)
    assert stats.attention_BM is not None
    assert stats.metric_TK is not None
    found = zip(of_images(batch, contexts), stats.attention_BM, of_images(batch, stats.metric_TK), strict=True)
    for (ours, scores_M, metric), image in zip(found, images_of(batch, qkv, sizes), strict=True):
        expected, by_class, by_mean = alone(*image)
        assert_close(ours.transpose(0, 1), expected, **FLOAT32)
        assert_close(scores_M[: len(ours)], by_class if row == "class" else by_mean, **FLOAT32)
        assert not scores_M[len(ours) :].any()
        assert_close(metric, reference.metric(image[1]), **FLOAT32)


@every_kernel
@with_or_without_sizes
@in_both_ways
def test_an_image_that_is_not_finite_stays_alone(
    kernels: Kernels | None, kernel: Kernel, alignment: int, sized: bool
) -> None:
    batch, qkv, _ = packed(sized, alignment=alignment, kernels=kernels)
    expected, _ = attend(batch, qkv, "class", kernel)
    is_image = batch.layout.images(expected.device) == 1
    for x in qkv:
        x[:, :, is_image] = torch.nan
    ours, stats = attend(batch, qkv, "class", kernel)
    assert_close(ours[~is_image], expected[~is_image], **EXACT)
    assert ours[is_image].isnan().all()
    assert stats.attention_BM is not None
    assert stats.attention_BM.isnan().any(1).tolist() == [False, True, False]


@with_bias
@every_layout
@with_or_without_sizes
def test_in_packed_attention_the_bias_goes_by_position(
    kernel: Kernel, alignment: int, sized: bool, lengths: tuple[int, ...]
) -> None:
    batch, qkv, sizes = packed(sized, lengths, alignment)
    bias = relative_positions()
    contexts, stats = attend(batch, qkv, "class", kernel, bias)
    assert stats.attention_BM is not None
    for ours, scores_M, image, positions in zip(
        of_images(batch, contexts),
        stats.attention_BM,
        images_of(batch, qkv, sizes),
        of_images(batch, batch.positions_T),
        strict=True,
    ):
        expected, by_class, _ = alone(*image, bias_of(positions.tolist(), bias))
        assert_close(ours.transpose(0, 1), expected, **FLOAT32)
        assert_close(scores_M[: len(ours)], by_class, **FLOAT32)


@with_or_without_sizes
@in_both_ways
def test_rows_behind_the_last_token_change_nothing(kernels: Kernels | None, sized: bool) -> None:
    batch, qkv, _ = packed(sized, alignment=4, kernels=kernels)
    expected, wanted = attend(batch, qkv, "class")
    rows, padding = sum(batch.layout.rows), 8
    longer = batch_of(
        replace(batch.layout, row_multiple=rows + padding),
        F.pad(batch.positions_T, (0, padding), value=NO_TOKEN),
        None if batch.sizes_T is None else F.pad(batch.sizes_T, (0, padding)),
        kernels=kernels,
    )
    filler = torch.full((1, H, padding, K), torch.nan)
    q, k, v = (torch.cat([x, filler], 2) for x in qkv)
    ours, found = attend(longer, (q, k, v), "class")
    assert_close(ours[:rows], expected, **EXACT)
    assert ours[rows:].isfinite().all()
    assert_close(found.attention_BM, wanted.attention_BM, **EXACT)


def test_a_token_of_size_two_counts_like_the_token_twice() -> None:
    q, k, v = (torch.randn(1, H, 6, K) for _ in range(3))
    twice = torch.tensor([0, 1, 2, 3, 3, 4, 5])
    doubled = batch_of(Layout((7,)), torch.arange(7), tokens=7)
    merged = batch_of(Layout((6,)), torch.arange(6), torch.tensor([1.0, 1, 1, 2, 1, 1]), tokens=7)
    expected, _ = attend(doubled, (q[:, :, twice], k[:, :, twice], v[:, :, twice]))
    ours, _ = attend(merged, (q, k, v))
    assert_close(ours, expected[torch.tensor([0, 1, 2, 3, 5, 6])], **FLOAT32)


# --- which kernel ---


def qkv_like(dtype: torch.dtype, device: str = "meta", width: int = K) -> QKV:
    x = torch.empty(1, H, sum(LENGTHS), width, dtype=dtype, device=device)
    return x, x, x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attention_takes_packed_tokens_in_half_precision(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, _, _ = packed(sized=True, alignment=1)
    qkv = qkv_like(dtype)
    assert kernel_for(*qkv, batch, None) == "padded"
    monkeypatch.setattr(flash_module, "_has_flash", lambda device: True)
    assert kernel_for(*qkv, batch, None) == "varlen"
    assert kernel_for(*qkv_like(dtype, "cpu"), batch, None) == "buckets"


def test_what_flash_attention_cannot_do_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_module, "_has_flash", lambda device: True)
    tight, _, _ = packed(sized=True, alignment=1)
    with_fillers, _, _ = packed(sized=True, alignment=4)
    half = qkv_like(torch.bfloat16)
    assert kernel_for(*qkv_like(torch.float32), tight, None) == "padded"
    assert kernel_for(*half, tight, relative_positions()) == "padded"
    assert kernel_for(*half, with_fillers, None) == "padded"
    assert kernel_for(*qkv_like(torch.bfloat16, width=12), tight, None) == "padded"
    assert kernel_for(*qkv_like(torch.bfloat16, width=256), tight, None) == "padded"
    mixed = half[0], half[1].float(), half[2]
    assert kernel_for(*mixed, tight, None) == "padded"


def test_in_half_precision_sizes_weigh_as_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, qkv, _ = packed(sized=True, alignment=1)
    assert batch.sizes_T is not None
    batch = replace(batch, sizes_T=torch.randint(2, 200, batch.sizes_T.shape).float())
    q, k, v = (x.bfloat16() for x in qkv)
    # the stand-in computes in double precision: what is left is how sizes are handed over
    monkeypatch.setattr(flash_module, "varlen_attn", lambda *args, **options: flash(*args, **options).float())
    ours, _ = attend(batch, (q, k, v), kernel="varlen")
    expected, _ = attend(batch, (q.float(), k.float(), v.float()), kernel="buckets")
    assert_close(ours, expected.bfloat16().float(), **BFLOAT16)


# --- whole models ---


def as_on_a_gpu(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> list[Kernel]:
    """Layouts and kernels of another device; returns which kernels ran."""
    ran: list[Kernel] = []

    def choose(q: Tensor, k: Tensor, v: Tensor, batch: TokenBatch, bias_1HNN: Tensor | None) -> Kernel:
        ran.append("padded" if bias_1HNN is not None else kernel)
        return ran[-1]

    def fitting(cls: type[Layout], lengths: Sequence[int], x_TD: Tensor, *, learns: bool = False) -> Layout:
        return cls(tuple(lengths))

    monkeypatch.setattr(module, "kernel_for", choose)
    monkeypatch.setattr(Layout, "fitting", classmethod(fitting))
    return ran


@pytest.mark.parametrize("kernel", ["padded", "varlen"])
@pytest.mark.parametrize(("family", "policy"), ARCHETYPES_AND_POLICIES)
def test_models_give_the_same_answer_with_every_kernel(
    family: str, policy: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prune_(tiny.build(family), tiny.spec_for(family, tiny.POLICIES[policy]))
    x = tiny.inputs(family, 5)
    with torch.no_grad():
        expected = tiny.answer(tiny.forward(model, x))
        ran = as_on_a_gpu(kernel, monkeypatch)
        ours = tiny.answer(tiny.forward(model, x))
    assert ran
    assert_close(ours, expected, **MODEL)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_layout
@with_or_without_sizes
def test_on_a_gpu_kernels_agree_with_the_cpu(
    sized: bool, lengths: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_module, "varlen_attn", varlen_attn)
    batch, qkv, _ = packed(sized, lengths, alignment=1)
    sizes_T = None if batch.sizes_T is None else batch.sizes_T.cuda()
    on_gpu = batch_of(batch.layout, batch.positions_T.cuda(), sizes_T)
    q, k, v = (x.to(dtype) for x in qkv)
    expected, wanted = attend(batch, (q.float(), k.float(), v.float()), "class")
    ours, found = attend(on_gpu, (q.cuda(), k.cuda(), v.cuda()), "class")
    assert found.attention_BM is not None
    assert_close(ours.float().cpu(), expected, **BFLOAT16)
    assert_close(found.attention_BM.cpu(), wanted.attention_BM, **BFLOAT16)
