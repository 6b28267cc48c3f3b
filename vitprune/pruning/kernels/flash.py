"""Flash attention of packed sequences (`torch.nn.attention.varlen`), with gradients, for CUDA in half precision.

It takes no bias, so sizes travel in the heads' width.

Shapes: T rows of the batch laid end to end, H heads, K head width.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from vitprune.pruning.layout import Layout, on_device

# flash attention takes head widths that are a multiple of this, up to the most
FLASH_MULTIPLE, FLASH_MOST = 8, 256
# with sizes so many more numbers a head, of which two are used
_SIZE_WIDTH = FLASH_MULTIPLE


def fits_flash(q: Tensor) -> bool:
    """Whether flash attention is there for queries (…, K) on their device, with room for sizes."""
    width = q.shape[-1]
    return width % FLASH_MULTIPLE == 0 and width + _SIZE_WIDTH <= FLASH_MOST and _has_flash(q.device)


def _has_flash(device: torch.device) -> bool:
    """Flash attention is for NVIDIA's Ampere and later, and torch for Windows comes without."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_attention(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, key_bias_T: Tensor | None, layout: Layout, scale: float
) -> Tensor:
    """Context vectors (T, H, K) of packed tokens; each row has to be an image's.

    key_bias_T: added to each key's logits; None: nothing is.
    """
    width = q_THK.shape[-1]
    if key_bias_T is not None:
        q_THK, k_THK, v_THK = _with_sizes(q_THK, k_THK, v_THK, key_bias_T, scale)
    rows = layout.rows
    bounds = list(accumulate((rows[image] for image in layout.order), initial=0))
    bounds_X = on_device(bounds, q_THK.device).int()
    longest = max(rows)
    output = varlen_attn(q_THK, k_THK, v_THK, bounds_X, bounds_X, longest, longest, scale=scale)
    assert isinstance(output, Tensor)
    return output[..., :width]


def _with_sizes(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, key_bias_T: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Wider queries, keys and values whose products have the log of each key's size in them, for kernels without bias.

    q' = [q, 1, 1], k' = [k, b, b'] with b + b' = log s / scale: in two parts, since half precision rounds.
    """
    bias_T = key_bias_T / scale
    coarse_T = bias_T.to(k_THK.dtype)
    fine_T = (bias_T - coarse_T.float()).to(k_THK.dtype)
    biases_TH2 = torch.stack([coarse_T, fine_T], -1)[:, None].expand(-1, k_THK.shape[1], -1)
    q_THK = F.pad(F.pad(q_THK, (0, 2), value=1.0), (0, _SIZE_WIDTH - 2))
    k_THK = F.pad(torch.cat([k_THK, biases_TH2], -1), (0, _SIZE_WIDTH - 2))
    return q_THK, k_THK, F.pad(v_THK, (0, _SIZE_WIDTH))
