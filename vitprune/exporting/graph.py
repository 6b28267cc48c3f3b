"""A model as one graph: what `torch.export` traces, dense or pruned.

A pruned model is traced as it is, transformers' modules and all; while it is, its forward works in padded tensors
(`pruning.padded`), with one length a stage that depends on the data.

Tensor suffixes: B images, C channels, H height, W width, S stages, N patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F
from transformers import PreTrainedModel

from vitprune.models import context
from vitprune.models.block import NAME
from vitprune.models.context import Exporting
from vitprune.models.module import is_pruned, pruning_of
from vitprune.models.prune import set_attention
from vitprune.models.structure import examine
from vitprune.pruning.padded import PaddedForward

INPUT = "pixel_values"
ANSWERS = ("logits", "image_embeds", "last_hidden_state", "pooler_output")
"""What a graph gives out, of what the model does; by transformers' names, as other exporters have them."""
KEPT_TOKENS = "kept_tokens"
"""And of each image how many tokens it has behind each stage, int64 (B, S), prefix tokens included."""
MERGED_INTO = "merged_into"
"""And, where it is asked for, what became of its patches, int64 (B, S, N), see `Trace.merged_into`."""
TRACED_IMAGES = 2  # of one image alone a graph would be of one image alone


class Graphed(nn.Module):
    """`pixel_values` in; a dict of answers, and what a pruned model did, out."""

    def __init__(self, model: PreTrainedModel, *, tells_patches: bool) -> None:
        super().__init__()
        self.tells_patches = tells_patches
        self.model = model
        self.levels = tuple(pruning_of(model).levels.tolist()) if is_pruned(model) else ()

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        exporting = Exporting(self.levels)
        with context.within(exporting=exporting):
            output: Any = self.model(pixel_values=pixel_values, return_dict=True)
        found = {name: output[name] for name in ANSWERS if output.get(name) is not None}
        forward = exporting.forward
        if isinstance(forward, PaddedForward) and forward.kept_B:
            found[KEPT_TOKENS] = torch.stack(forward.kept_B, 1)
            if self.tells_patches:
                found[MERGED_INTO] = torch.stack(forward.merged_into, 1)
        return found


@contextmanager
def _attending_plainly(model: PreTrainedModel) -> Iterator[None]:
    """Dense models, too, through our interface: transformers' own puts a mask into each graph that masks nothing."""
    structure = examine(model)
    backbone, own = structure.backbone, structure.backbone.config._attn_implementation
    if is_pruned(model) or not structure.family.has_interface:
        yield
        return
    set_attention(backbone, NAME)
    try:
        yield
    finally:
        set_attention(backbone, own or "sdpa")


def trace_graph(
    model: PreTrainedModel, image: tuple[int, int, int], *, any_size: bool = False, tells_patches: bool = False
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Trace a model on images of (channels, height, width), any number of which fit the graph; and name its outputs.

    any_size: so do images of another height and width, where the model takes them. tells_patches: gives out
    `MERGED_INTO`, too.
    """
    first = next(model.parameters())
    x_BCHW = torch.zeros(TRACED_IMAGES, *image, dtype=first.dtype, device=first.device)
    dims: dict[int, Any] = {0: Dim("batch_size")}
    if any_size:
        # traced at a size that is neither square nor the model's own, of which some models make cases of their own
        x_BCHW = F.pad(x_BCHW, (0, image[2], 0, image[1] // 2))
        dims |= {2: Dim.AUTO, 3: Dim.AUTO}
    graphed = Graphed(model, tells_patches=tells_patches).eval()
    with torch.no_grad(), _attending_plainly(model):
        program = torch.export.export(graphed, (), {INPUT: x_BCHW}, dynamic_shapes={INPUT: dims}, strict=False)
    spec = program.call_spec.out_spec
    assert spec is not None
    return program, tuple(spec.context)
