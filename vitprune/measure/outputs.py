"""A model as a function of images alone: logits or numbers of a head, an embedding where it has none.

Knows where each model keeps its answer, and of which kind it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vitprune.data.batches import Batch, without_labels
from vitprune.measure.answers import KINDS, PROBLEM_TYPES, AnswerKind, Embedding, task_of
from vitprune.measure.timing import placed
from vitprune.models.structure import Inputs, examine
from vitprune.recipe.schema import Task

_WAY_OUT = "name the dense model that the pruned one was made of"


class ImageModel(nn.Module):
    """`pixel_values` in; logits or numbers (B, C), or embeddings (B, E), out.

    Logits come from a classification head, or by zero-shot from `classes_CE`, embeddings of the classes' names of
    length one. Otherwise the embedding is what the model pools: projected, if it projects; for a bare sequence its
    class token, or the mean of its patches where there is none.
    """

    classes_CE: Tensor | None

    def __init__(self, model: PreTrainedModel, classes_CE: Tensor | None = None) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("classes_CE", classes_CE, persistent=False)

    @staticmethod
    def of(model: nn.Module) -> ImageModel:
        """The model itself if it is one already.

        Raises TypeError for what is no model of transformers, such as a wrapper around one.
        """
        if isinstance(model, ImageModel):
            return model
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"{type(model).__name__} is no model of transformers (PreTrainedModel); pass the model inside it, such "
                "as model.module of DistributedDataParallel or peft_model.get_base_model()"
            )
        return ImageModel(model)

    @property
    def kind(self) -> AnswerKind:
        """How its answers are judged: as its config says where it has a head, by classes in zero-shot."""
        if self.classes_CE is not None:
            return KINDS["single-label"]
        return KINDS[task_of(self.model.config)] if has_head(self.model) else Embedding()

    def forward(self, pixel_values: Inputs) -> Tensor:
        """pixel_values: (B, C, H, W), or by name all that the model takes of images, videos or sounds."""
        model: Any = self.model
        sees = model.get_image_features if is_two_towers(model) else model
        output = sees(**pixel_values) if isinstance(pixel_values, Mapping) else sees(pixel_values)
        if is_two_towers(model):
            return self._classified(output.pooler_output)
        for name in ("logits", "image_embeds", "pooler_output"):
            if output.get(name) is not None:
                return output[name]
        sequence_BND = output.last_hidden_state
        return sequence_BND[:, 0] if self._has_class_token else sequence_BND.mean(1)

    @cached_property
    def _has_class_token(self) -> bool:
        return examine(self.model).has_class_token

    def _classified(self, image_BE: Tensor) -> Tensor:
        if self.classes_CE is None:
            return image_BE
        model: Any = self.model
        cosines_BC = F.normalize(image_BE, dim=-1) @ self.classes_CE.to(image_BE.dtype).T
        return cosines_BC * model.logit_scale.exp() + getattr(model, "logit_bias", 0.0)


def inputs_of(batch: Batch, model: nn.Module) -> Inputs:
    """What a model takes of a batch, where and as it computes: all but labels; whole numbers stay whole."""
    left = without_labels(batch)
    if isinstance(left, Tensor):
        return placed(left, model)
    return {name: placed(values, model) if isinstance(values, Tensor) else values for name, values in left.items()}


def has_head(model: PreTrainedModel) -> bool:
    """Whether a model has a head that transformers trains with labels."""
    return "Classification" in type(model).__name__


def class_names(model: PreTrainedModel) -> dict[int, str]:
    """Names of a model's classes by id, as its config has them; of what has no head there are none."""
    return {int(index): str(name) for index, name in (model.config.id2label or {}).items()} if has_head(model) else {}


def names_of_answers(model: PreTrainedModel, of_data: Sequence[str] | None) -> dict[int, str]:
    """Names of the classes that a model answers with: its own; in zero-shot, without a head, those of the data."""
    return class_names(model) or dict(enumerate(of_data or ()))


def declare_task(model: PreTrainedModel, task: Task) -> None:
    """Write into a model's config, in place, what its head is for. Raises ValueError for a model without one."""
    if not has_head(model):
        raise ValueError(f"is {task!r}, but {type(model).__name__} has no classification head; leave it out")
    if task == "single-label" and model.config.num_labels == 1:
        raise ValueError(
            f"is {task!r}, but the checkpoint has a single output, so there is nothing to choose among; write "
            "regression, or multi-label for a yes or no"
        )
    model.config.problem_type = PROBLEM_TYPES[task]


def require_same_kind(pruned: ImageModel, dense: ImageModel) -> None:
    """Raise ValueError where two models' answers are of different kinds."""
    if pruned.kind.name != dense.kind.name:
        ours, theirs = (f"{type(a.model).__name__} answers with {a.kind.described}" for a in (pruned, dense))
        raise ValueError(f"the pruned {ours}, but the dense {theirs}; {_WAY_OUT}")


def require_same_width(pruned: Tensor, dense: Tensor) -> None:
    """Raise ValueError where two models' answers to the same images, (B, C) or (B, E), aren't as wide."""
    if pruned.shape != dense.shape:
        ours, theirs = pruned.shape[-1], dense.shape[-1]
        raise ValueError(
            f"the pruned model answers with {ours} numbers an image, the dense one with {theirs}; {_WAY_OUT}"
        )


def is_two_towers(model: PreTrainedModel) -> bool:
    """Whether the model also reads text, as CLIP does: zero-shot classification."""
    return model.main_input_name == "input_ids"


@torch.no_grad()
def embed_classes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], prompt: str
) -> Tensor:
    """Embeddings of length one, (C, E), of a text for each class: the prompt with its name for {}."""
    two_towers: Any = model
    length = two_towers.config.text_config.max_position_embeddings
    texts = [prompt.replace("{}", name) for name in names]
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    text_CE = two_towers.get_text_features(**tokens.to(two_towers.device)).pooler_output
    return F.normalize(text_CE.float(), dim=-1)
