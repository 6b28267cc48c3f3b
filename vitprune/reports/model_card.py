"""The model card of a pruned checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from vitprune.reports.results import Report
from vitprune.reports.run_report import findings, tables_of
from vitprune.reports.text import markdown_table, percent

PICTURES = MappingProxyType(
    {
        "The easiest and the hardest images": "assets/images.png",
        "Images that pruned and dense answer differently": "assets/differences.png",
    }
)
"""A checkpoint's pictures, by what they show."""
NO_PICTURES: Mapping[str, str] = MappingProxyType({})
CARD = """
# {name}

{introduction}

## How to use it

{usage}

## Results

{results}
{pictures}
## Limits

- Without `import vitprune` transformers loads the weights as a dense model, where nothing is dropped or faster, and
  warns of an unknown quantization type. Don't delete `quantization_config` from config.json, as it advises: it says
  where tokens leave.
- How fast it is depends on machine, batch size and images; measure it with `vitprune evaluate`.
- How many tokens stay depends on the image: the budget holds on average over images like those it was calibrated on.
- Evaluated on {images} images of {data} only.

`report.html` shows all of this, `report.json` has all figures, `recipe.yaml` what was asked for. Made with
vitprune {environment.vitprune}, torch {environment.torch}, transformers {environment.transformers}.
"""


CLASSIFIER = """\
import vitprune  # teaches transformers to load it pruned
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("{name}")
processor = AutoImageProcessor.from_pretrained("{name}")
"""
ALSO_A_PIPELINE = '`pipeline("image-classification", "{name}")` works too, after `import vitprune`.'

OTHER = """\
import vitprune
from transformers import AutoImageProcessor

model = vitprune.load("{name}")
processor = AutoImageProcessor.from_pretrained("{name}")
"""
ALSO_ITS_CLASS = "The `from_pretrained` of the model's own class works too, after `import vitprune`."


EXPORTED = """\
import vitprune

model = vitprune.ExportedModel.load("{name}")
outputs = model(picture)  # a PIL image, or several; the folder's README.md says how to do without vitprune
"""


def model_card(report: Report, name: str, pictures: Mapping[str, str] = NO_PICTURES) -> str:
    """A Markdown model card with YAML front matter.

    name: how the model is to be loaded, a Hub id or a folder. pictures: files beside the card, by what they show.
    """
    base, data = _asked(report.recipe, "model", "checkpoint"), _asked(report.recipe, "data", "path")
    also = (ALSO_A_PIPELINE if _classifies(report) else ALSO_ITS_CLASS).format(name=name)
    body = CARD.format(
        name=name,
        introduction=_introduction(report, base),
        usage=f"```python\n{usage_of(report, name)}```\n\n{also}",
        results=_results(report),
        pictures="".join(f"\n**{shown}**\n\n![{shown}]({file})\n" for shown, file in pictures.items()),
        images=report.comparison.images,
        data=_shown_name(data) or "one data set",
        environment=report.environment,
    )
    return f"---\n{_front_matter(report, name, base, data).to_yaml()}\n---\n{body}"


def usage_of(report: Report, name: str) -> str:
    """The code that loads the checkpoint, or an exported model."""
    if report.environment.runtime is not None:
        return EXPORTED.format(name=name)
    return (CLASSIFIER if _classifies(report) else OTHER).format(name=name)


def _classifies(report: Report) -> bool:
    return _task(report) == "image-classification"


def _introduction(report: Report, base: str | None) -> str:
    origin = f"`{_shown_name(base)}`" if base else "A Vision Transformer"
    return (
        f"{origin} with token pruning by vitprune: on its way through the blocks each image drops the patches that it "
        f"needs least, so that on average it takes {percent(report.comparison.macs.ratio)} of the dense model's "
        "multiply-accumulates (MACs)."
    )


def _results(report: Report) -> str:
    parts = [f"**{title}**\n\n{markdown_table(cells)}" for title, cells in tables_of(report)]
    return "\n\n".join([*parts, "\n".join(f"- {sentence}" for sentence in findings(report))])


def _front_matter(report: Report, name: str, base: str | None, data: str | None) -> ModelCardData:
    shown = _shown_name(data) or "unknown"
    results = [
        EvalResult(
            task_type=_task(report),
            dataset_type=shown,
            dataset_name=shown,
            metric_type=metric,
            metric_value=round(pair.pruned, 4),
        )
        for metric, pair in report.comparison.metrics.items()
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=_task(report),
        tags=["vitprune", "token-pruning"],
        base_model=base if base and not _is_local(base) else None,
        datasets=[data] if data and not _is_local(data) else None,
        model_name=Path(name).name,
        eval_results=results or None,
    )


def _task(report: Report) -> str:
    """The Hub's name for what the model is for."""
    if report.comparison.similarity is not None:
        return "image-feature-extraction"
    return "zero-shot-image-classification" if _asked(report.recipe, "model", "prompt") else "image-classification"


def _asked(recipe: dict[str, Any], section: str, key: str) -> str | None:
    found = recipe.get(section)
    value = found.get(key) if isinstance(found, dict) else None
    return value if isinstance(value, str) else None


def _is_local(path: str) -> bool:
    return path.startswith("./") or Path(path).is_absolute()


def _shown_name(path: str | None) -> str | None:
    """A Hub id as it is, of a local path the last part: a card is for others, who don't care where it lay."""
    return Path(path).name if path and _is_local(path) else path
