"""A page to play with: upload an image, slide the budget, see which patches stay and what both models answer.

    python integrations/gradio/app.py [CHECKPOINT]

CHECKPOINT: folder or Hub id of a pruned classifier with several operating points (`budget: {macs: [80%, 65%, 50%]}`);
also a variable of the environment. Without one the recipe quickstart's small ViT is pruned first, which takes half a
minute. Runs on this machine alone.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import torch
from gradio.themes import Default
from PIL.Image import Image
from torch import nn
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

import vitprune

QUICKSTART = Path(__file__).resolve().parent.parent.parent / "recipes" / "quickstart"  # in a clone
BUDGETS = ["90%", "75%", "60%", "45%", "35%"]
IMAGES = 64  # to find levels on
REPEATS = 3  # forwards, of which the median time counts


class Space:
    """A pruned model, the dense one beside it, and the page."""

    def __init__(self, pruned: PreTrainedModel, dense: PreTrainedModel, processor: BaseImageProcessor) -> None:
        points = vitprune.points_of(pruned)
        if not points:
            raise ValueError("the checkpoint has one budget alone; make one with budget: {macs: [80%, 65%, 50%]}")
        config = pruned.config
        classifies = config.problem_type in (None, "single_label_classification") and len(config.id2label or ()) > 1
        if not (classifies and "ForImageClassification" in type(pruned).__name__):
            raise ValueError(
                f"the page shows which of several labels an image has, and {type(pruned).__name__} doesn't say"
            )
        if getattr(config, "num_channels", 3) != 3:
            raise ValueError(f"the checkpoint takes images of {config.num_channels} channels; the page uploads colours")
        self.pruned, self.dense, self.processor = pruned.eval(), dense.eval(), processor
        self.highest, self.lowest = points[0].budget, points[-1].budget

    @torch.no_grad()
    def look(self, image: Image | None, percent: float) -> tuple[Image | None, str]:
        """The picture of an image's patches, and a table of both models, as Markdown."""
        if image is None:
            return None, "Upload an image."
        image = image.convert("RGB")
        # the slider's steps may end beside its ends
        expected = vitprune.set_budget(self.pruned, min(max(percent / 100, self.lowest), self.highest))
        x: Any = self.processor(image, return_tensors="pt")["pixel_values"]
        with vitprune.trace(self.pruned) as seen:
            self.pruned(x)
        rows = [
            f"| dense | {answer(self.dense, x)} | 100 % | {milliseconds(self.dense, x):.0f} ms |",
            f"| pruned | {answer(self.pruned, x)} | {seen.ratio:.1%} | {milliseconds(self.pruned, x):.0f} ms |",
        ]
        table = "\n".join(["| model | answer | MACs of this image | time |", "|---|---|---|---|", *rows])
        note = f"On average over images {expected:.0%} of the MACs are expected at this budget."
        return vitprune.show(self.pruned, image, processor=self.processor, dense=self.dense), f"{table}\n\n{note}"

    def page(self) -> gr.Blocks:
        with gr.Blocks(title="vitprune") as page:
            gr.Markdown("# Which patches does it need?\nEach image keeps its own number of tokens; slide the budget.")
            with gr.Row():
                with gr.Column(scale=1):
                    image = gr.Image(type="pil", label="Image", height=260)
                    lowest, highest = (round(100 * end, 4) for end in (self.lowest, self.highest))
                    value = max(lowest, min(60, highest))
                    budget = gr.Slider(lowest, highest, value=value, step=0.5, label="Budget, % of the MACs")
                with gr.Column(scale=2):
                    tokens = gr.Image(
                        label="Patches after each stage", show_label=True, interactive=False, format="png"
                    )
                    told = gr.Markdown()
            for change in (image.change, budget.change):
                change(
                    self.look,
                    [image, budget],
                    [tokens, told],
                    show_progress="minimal",
                    trigger_mode="always_last",  # of a slide that goes on
                    concurrency_id="look",  # one at a time: the budget is the model's
                )
        return page


def quickstart() -> Space:
    """The quickstart's ViT with levels for several budgets."""
    checkpoint = str(QUICKSTART / "checkpoint")
    dense, processor = vitprune.load(checkpoint), vitprune.load_processor(checkpoint)
    data, split = vitprune.DataSpec(path=str(QUICKSTART / "data")), vitprune.SplitSpec(split="train", limit=IMAGES)
    images = vitprune.load_images(data, split, processor, id2label=None, labelled=False)
    pruned = vitprune.prune_(copy.deepcopy(dense), {"before_blocks": [1, 5, 8]})
    vitprune.find_points(pruned, images, BUDGETS)
    return Space(pruned, dense, processor)


def of_checkpoint(checkpoint: str) -> Space:
    pruned = vitprune.load(checkpoint)
    return Space(pruned, vitprune.restore_(copy.deepcopy(pruned)), vitprune.load_processor(checkpoint))


def answer(model: PreTrainedModel, x: torch.Tensor) -> str:
    probabilities = model(x).logits[0].softmax(-1)
    best = int(probabilities.argmax())
    names: Any = model.config.id2label or {}
    return f"{names.get(best, best)} ({probabilities[best]:.1%})"


def milliseconds(model: nn.Module, x: torch.Tensor) -> float:
    """The median of a few forwards."""
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        model(x)
        found.append(time.perf_counter() - began)
    return 1000 * statistics.median(found)


THEME = Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none from afar

if __name__ == "__main__":
    try:
        checkpoint = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("CHECKPOINT")
        space = of_checkpoint(checkpoint) if checkpoint else quickstart()
    except ValueError as error:
        sys.exit(str(error))
    space.page().launch(theme=THEME)
