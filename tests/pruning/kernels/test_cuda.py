"""The CUDA door's attention, in Triton's interpreter; what it shares with other doors is in test_doors.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny
import torch
from tiny import Tolerance
from torch.testing import assert_close

from vitprune.pruning import kernels, reference
from vitprune.pruning.kernels import cuda
from vitprune.pruning.layout import Layout

# of packed attention weights and results round
ATTENTION = {
    # as it rounds by its largest terms: logits are sums of some dozen, and reach 9
    torch.float32: Tolerance(rtol=1e-5, atol=5e-6),
    torch.bfloat16: Tolerance(rtol=2**-7, atol=2**-7),
    torch.float16: Tolerance(rtol=2**-9, atol=2**-9),
}

SEVERAL, H, K = (9, 23, 4, 14), 3, 7


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with torch.device("cuda" if tiny.on_gpu() else "cpu"):
        yield


def test_where_triton_cannot_build_operators_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def launches() -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(cuda, "_launches", launches)
    with pytest.warns(UserWarning, match=r"Triton doesn't work on cpu \(Failed to find C compiler.*torch's operators"):
        assert not cuda._can_launch.__wrapped__(torch.device("cpu"))


def test_a_launch_is_tried() -> None:
    assert cuda._can_launch.__wrapped__(torch.ones(1).device)


def test_kernels_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 3)
    monkeypatch.setattr(kernels.cpu, "fits", lambda x: True)
    assert kernels.choose(x) is kernels.cpu
    monkeypatch.setenv("VITPRUNE_KERNELS", "0")
    assert kernels.choose(x) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("lengths", [(9, 1, 70, 14), (130,)], ids=["images", "an image alone"])
@pytest.mark.parametrize("width", [7, 64])
@pytest.mark.parametrize("read", [None, 2], ids=["all ask", "few ask"])
def test_packed_attention_is_the_references(
    read: int | None, width: int, lengths: tuple[int, ...], sized: bool, dtype: torch.dtype
) -> None:
    layout = Layout(lengths, in_order=True)
    q, k, v = (torch.randn(sum(lengths), H, width).to(dtype) for _ in range(3))
    sizes_T = torch.randint(1, 9, (sum(lengths),)).float() if sized else torch.ones(sum(lengths))
    if read is not None:
        q = q[: read * len(lengths)]
    ours = cuda.packed_attention(q, k, v, sizes_T if sized else None, layout, 0.3, read=read)
    assert ours.dtype == dtype
    parts = (x.float().split(lengths) for x in (k, v, sizes_T))
    for own, q_own, k_own, v_own, sizes in zip(
        ours.split(read or lengths), q.float().split(read or lengths), *parts, strict=True
    ):
        q_HNK, k_HNK, v_HNK = (x.transpose(0, 1) for x in (q_own, k_own, v_own))
        _, expected = reference.attend(q_HNK, k_HNK, v_HNK, sizes, 0.0, 0.3)
        assert_close(own.transpose(0, 1).float(), expected, **ATTENTION[dtype])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of NaN
def test_an_image_that_is_no_number_attends_alone() -> None:
    layout = Layout(SEVERAL, in_order=True)
    q, k, v = (torch.randn(sum(SEVERAL), H, K) for _ in range(3))
    expected = cuda.packed_attention(q, k, v, None, layout, 0.3).split(SEVERAL)
    for x in (q, k, v):
        x.split(SEVERAL)[1].fill_(torch.nan)
    ours = cuda.packed_attention(q, k, v, None, layout, 0.3).split(SEVERAL)
    assert ours[1].isnan().all()
    assert all(torch.equal(ours[i], expected[i]) for i in (0, 2, 3))
