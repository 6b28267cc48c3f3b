"""Kernels for packed tokens against sums written out image by image, and against each other in whole models."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from tiny import Tolerance
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.testing import assert_close
from written_out import (
    LENGTHS,
    QKV,
    SCALING,
    H,
    K,
    batch_of,
    bias_of,
    dense_attention,
    every_layout,
    images_of,
    in_both_ways,
    mean_score,
    of_images,
    packed,
    relative_positions,
    score,
    with_or_without_sizes,
)

from vitprune import packed_attention as module
from vitprune import varlen
from vitprune.layout import Layout
from vitprune.packed_attention import Kernel, PackedAttention, Query, kernel_for
from vitprune.pruner import prune_
from vitprune.tokens import TokenBatch
from vitprune.tracing import pruning_of

EXACT = Tolerance(rtol=0.0, atol=0.0)
# float32 sums in another order
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-6)
MODEL = Tolerance(rtol=1e-5, atol=1e-5)
# of each parameter, against its largest: sums in another order
GRADIENTS = Tolerance(rtol=1e-3, atol=2e-4)
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
    monkeypatch.setattr(varlen, "varlen_attn", flash)


# buckets: one for every length, some of a few images, and one for all. varlen has no rows without a token
KERNELS = [("buckets", 1), ("buckets", 4), ("buckets", 16), ("padded", 1), ("padded", 4), ("varlen", 1)]
with_bias = pytest.mark.parametrize(("kernel", "alignment"), KERNELS[:-1])
every_kernel = pytest.mark.parametrize(("kernel", "alignment"), KERNELS)


@every_kernel
@every_layout
@with_or_without_sizes
def test_packed_attention_is_each_image_alone(
    kernel: Kernel, alignment: int, sized: bool, lengths: tuple[int, ...]
) -> None:
    batch, qkv, sizes = packed(sized, lengths, alignment)
    attention = PackedAttention(*qkv, batch, SCALING, kernel=kernel)
    scores_BM = attention.scores("class")
    contexts = of_images(batch, attention.contexts_THK)
    for ours, score_M, image in zip(contexts, scores_BM, images_of(batch, qkv, sizes), strict=True):
        weights, context = dense_attention(*image)
        assert_close(ours.transpose(0, 1), context, **FLOAT32)
        assert_close(score_M[: len(ours)], score(weights, context), **FLOAT32)
        assert not score_M[len(ours) :].any()


@every_kernel
@with_or_without_sizes
def test_an_image_that_is_not_finite_stays_alone(kernel: Kernel, alignment: int, sized: bool) -> None:
    batch, qkv, _ = packed(sized, alignment=alignment)
    expected = PackedAttention(*qkv, batch, SCALING, kernel=kernel).contexts_THK
    is_image = batch.layout.images(expected.device) == 1
    for x in qkv:
        x[:, :, is_image] = torch.nan
    attention = PackedAttention(*qkv, batch, SCALING, kernel=kernel)
    ours = attention.contexts_THK
    assert_close(ours[~is_image], expected[~is_image], **EXACT)
    assert ours[is_image].isnan().all()
    assert attention.scores("class").isnan().any(1).tolist() == [False, True, False]


@with_bias
@every_layout
@with_or_without_sizes
def test_in_packed_attention_the_bias_goes_by_position(
    kernel: Kernel, alignment: int, sized: bool, lengths: tuple[int, ...]
) -> None:
    batch, qkv, sizes = packed(sized, lengths, alignment)
    bias = relative_positions()
    attention = PackedAttention(*qkv, batch, SCALING, bias, kernel)
    for ours, score_M, image, positions in zip(
        of_images(batch, attention.contexts_THK),
        attention.scores("class"),
        images_of(batch, qkv, sizes),
        of_images(batch, batch.positions_T),
        strict=True,
    ):
        weights, context = dense_attention(*image, bias_of(positions.tolist(), bias))
        assert_close(ours.transpose(0, 1), context, **FLOAT32)
        assert_close(score_M[: len(ours)], score(weights, context), **FLOAT32)


@every_kernel
@every_layout
@with_or_without_sizes
def test_packed_attention_scores_by_the_mean_query_of_each_image(
    kernel: Kernel, alignment: int, sized: bool, lengths: tuple[int, ...]
) -> None:
    batch, qkv, sizes = packed(sized, lengths, alignment)
    scores_BM = PackedAttention(*qkv, batch, SCALING, kernel=kernel).scores("mean")
    for ours, length, image in zip(scores_BM, lengths, images_of(batch, qkv, sizes), strict=True):
        assert_close(ours[:length], mean_score(*image), **FLOAT32)


@every_kernel
@in_both_ways
def test_the_metric_is_the_mean_key_of_length_one(loops: bool, kernel: Kernel, alignment: int) -> None:
    batch, (q, k, v), _ = packed(sized=False, alignment=alignment, loops=loops)
    k = k.bfloat16()
    attention = PackedAttention(q.bfloat16(), k, v.bfloat16(), batch, SCALING, kernel=kernel)
    scores_BM, metric_TK = attention.find(None, wants_metric=True)
    assert scores_BM is None
    assert metric_TK is not None
    assert metric_TK.dtype == torch.float32
    for ours, keys_HLK in zip(of_images(batch, metric_TK), of_images(batch, k[0].float(), 1), strict=True):
        mean_LK = keys_HLK.mean(0)
        assert_close(ours, mean_LK / mean_LK.square().sum(-1, keepdim=True).sqrt(), **FLOAT32)


@every_kernel
@in_both_ways
@pytest.mark.parametrize("query", ["class", "mean"])
def test_what_is_found_are_the_scores_and_no_metric_unasked(
    query: Query, loops: bool, kernel: Kernel, alignment: int
) -> None:
    batch, qkv, _ = packed(sized=True, alignment=alignment, loops=loops)
    attention = PackedAttention(*qkv, batch, SCALING, kernel=kernel)
    scores_BM, metric_TK = attention.find(query, wants_metric=False)
    assert scores_BM is not None
    assert metric_TK is None
    assert_close(scores_BM, attention.scores(query), **FLOAT32)


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
    monkeypatch.setattr(varlen, "_has_flash", lambda device: True)
    assert kernel_for(*qkv, batch, None) == "varlen"
    assert kernel_for(*qkv_like(dtype, "cpu"), batch, None) == "buckets"


def test_what_flash_attention_cannot_do_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_has_flash", lambda device: True)
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
    monkeypatch.setattr(varlen, "varlen_attn", lambda *args, **options: flash(*args, **options).float())
    ours = PackedAttention(q, k, v, batch, SCALING, kernel="varlen").contexts_THK
    expected = PackedAttention(q.float(), k.float(), v.float(), batch, SCALING, kernel="buckets").contexts_THK
    assert_close(ours, expected.bfloat16().float(), **BFLOAT16)


# --- whole models ---


def as_on_a_gpu(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> list[Kernel]:
    """Layouts and kernels of another device; returns which kernels ran."""
    ran: list[Kernel] = []

    def choose(q: Tensor, k: Tensor, v: Tensor, batch: TokenBatch, bias_1HNN: Tensor | None) -> Kernel:
        ran.append("padded" if bias_1HNN is not None or batch.learning is not None else kernel)
        return ran[-1]

    def fitting(cls: type[Layout], lengths: Sequence[int], x_TD: Tensor, *, learns: bool = False) -> Layout:
        return cls(tuple(lengths))

    monkeypatch.setattr(module, "kernel_for", choose)
    monkeypatch.setattr(Layout, "fitting", classmethod(fitting))
    return ran


@pytest.mark.parametrize("kernel", ["padded", "varlen"])
@pytest.mark.parametrize(("family", "policy"), tiny.FAMILIES_AND_POLICIES)
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


@pytest.mark.parametrize("policy", tiny.REPRESENTATIVE)
def test_thresholds_learn_the_same_with_padded_images(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prune_(tiny.build("vit"), tiny.spec_for("vit", tiny.POLICIES[policy])).train()
    pruning_of(model).execution = "packed"
    x = tiny.inputs("vit", 5)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        tiny.answer(tiny.forward(model, x)).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    ran = as_on_a_gpu("varlen", monkeypatch)
    largest = max(gradient.abs().max().item() for gradient in expected)
    for ours, gradient in zip(gradients(), expected, strict=True):
        # some are 0 but for rounding: nothing depends on the bias of all keys
        scale = max(gradient.abs().max().item(), 1e-2 * largest)
        assert_close(ours / scale, gradient / scale, **GRADIENTS)
    assert set(ran) == {"padded"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_layout
@with_or_without_sizes
def test_on_a_gpu_kernels_agree_with_the_cpu(
    sized: bool, lengths: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    batch, qkv, _ = packed(sized, lengths, alignment=1)
    sizes_T = None if batch.sizes_T is None else batch.sizes_T.cuda()
    on_gpu = batch_of(batch.layout, batch.positions_T.cuda(), sizes_T)
    q, k, v = (x.to(dtype) for x in qkv)
    expected = PackedAttention(q.float(), k.float(), v.float(), batch, SCALING)
    ours = PackedAttention(q.cuda(), k.cuda(), v.cuda(), on_gpu, SCALING)
    assert_close(ours.contexts_THK.float().cpu(), expected.contexts_THK, **BFLOAT16)
    assert_close(ours.scores("class").cpu(), expected.scores("class"), **BFLOAT16)
