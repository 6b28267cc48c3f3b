"""Puts a finished checkpoint on the Hub, with its card, pictures, results and recipe: `push`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitprune.recipe.yaml_source import dump
from vitprune.reports.model_card import PICTURES, model_card
from vitprune.reports.results import REPORT_JSON, Report
from vitprune.runtime.hub_upload import require_rights, upload

PAGE = "report.html"
RECIPE, CARD = "recipe.yaml", "README.md"


def push(checkpoint: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload the folder of a checkpoint that `apply` wrote to a repository `user/name`; return its address.

    The card names the repository, and the recipe has no local paths. A repository that isn't there is made, public
    unless `private`; one that is there stays as private as it is.

    Raises:
        ValueError: no such checkpoint, no token, or no right to write there; names the way out.
        OSError: the upload failed; it can be tried again.
    """
    folder = Path(checkpoint)
    if not (folder / REPORT_JSON).is_file() or not (folder / "config.json").is_file():
        raise ValueError(
            f"{checkpoint} is no folder of a checkpoint that `vitprune apply` wrote (it has no {REPORT_JSON})"
        )
    require_rights(repo)
    report = Report.load(folder / REPORT_JSON)
    there = {caption: file for caption, file in PICTURES.items() if (folder / file).is_file()}
    instead = {CARD: model_card(report, repo, there)}
    if (folder / RECIPE).is_file():
        instead[RECIPE] = _without_paths(folder / RECIPE, report)
    if (folder / PAGE).is_file():  # whose code names the folder
        page = (folder / PAGE).read_text(encoding="utf-8")
        instead[PAGE] = page.replace(f"(&#34;{folder.resolve().name}&#34;)", f"(&#34;{repo}&#34;)")
    return upload(folder, repo, private=private, instead=instead, message="Upload a checkpoint pruned by vitprune")


def _without_paths(recipe: Path, report: Report) -> str:
    """The recipe as the report has it, which knows of local paths the last part alone."""
    first, _, _ = recipe.read_text(encoding="utf-8").partition("\n")
    return f"{first}\n{dump(_known(report.recipe))}"


def _known(values: dict[str, Any]) -> dict[str, Any]:
    found = {key: _known(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in found.items() if value is not None}
