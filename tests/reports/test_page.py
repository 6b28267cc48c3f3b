"""The page of a report: one file, everything in it, nothing that runs what data says."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from made_up_report import comparison, report
from made_up_report import seen_image as seen

from vitprune.reports.page import ShownImages, report_page
from vitprune.reports.results import Breakdown, Check, ClassResult, Histogram, PointResult, Training

BREAKDOWN = Breakdown(
    macs=Histogram(edges=(0.4, 0.6, 0.8), counts=(30, 10)),
    classes=(
        ClassResult(name="<script>alert(1)</script>", images=3, dense=0.5, pruned=0.25, agreement=0.75, ratio=0.6),
        ClassResult(name="dog", images=4, dense=1.0, pruned=1.0, agreement=1.0, ratio=0.5),
    ),
)
IMAGES = ShownImages((seen(),), (seen(name="row 7"),), (seen(pruned="<i>dog</i>", label="cat"),))


def page(images: ShownImages = IMAGES, **changes: Any) -> str:
    return report_page(report(**{"breakdown": BREAKDOWN, **changes}), "vit-60", images)


class Reader(HTMLParser):
    """Text, tags and addresses of a page; fails where tags don't match."""

    VOID = ("meta", "link", "img", "br", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.addresses, self.tags = "", [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and "script" not in self.open:
            self.text += data


def test_it_is_one_file_of_matching_tags() -> None:
    found = Reader(page())
    assert found.tags.count("img") == 3
    assert all(address.startswith("data:") for address in found.addresses)
    assert not re.search(r"https?://", page())


def test_it_says_what_was_found() -> None:
    text = Reader(page()).text.replace("\xa0", " ")
    for part in (
        "vit-60",
        "92.1 %",
        "dense 92.4 %: -0.30 points",
        "97.5 %",
        "1.52x",
        "Easiest images",
        "row 7",
        "Where the answers differ",
        "before block 4",
        "40.0 %",
        "AutoModelForImageClassification.from_pretrained",
        "Some CPU",
    ):
        assert part in text, part


def test_what_data_says_is_text() -> None:
    text = page()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    assert "<i>" not in text


def test_parts_that_a_run_has_not_are_left_out() -> None:
    bare = Reader(page(ShownImages(missing="There are none."), breakdown=None, throughput=())).text
    assert "There are none." in bare
    for part in ("By class", "Work by image", "Training", "speed-up"):
        assert part not in bare, part


def test_training_is_drawn() -> None:
    checks = tuple(Check(step=10 * n, loss=1.0 / (n + 1), losses={}, ratio=0.6, kept=(0.5,)) for n in range(4))
    text = page(training=Training(steps=30, images=100, kept_step=30, checks=checks), calibrated=comparison(0.9))
    assert "<polyline" in text
    assert "Fine-tuning brought the loss" in text


@pytest.mark.parametrize("kind", ["embedding", "regression", "multi-label"])
def test_other_kinds_of_answers(kind: str) -> None:
    fields: dict[str, Any] = {
        "embedding": {"similarity": 0.987, "agreement": None},
        "regression": {"correlation": 0.9, "deviation": 0.1, "agreement": None},
        "multi-label": {"agreement": 0.95},
    }[kind]
    result = comparison(None).model_copy(update={"answers": kind, **fields})
    text = Reader(page(comparison=result, breakdown=None)).text
    shown = {"embedding": "0.9870", "regression": "0.9000", "multi-label": "labels as dense"}[kind]
    assert shown in text
    points = (PointResult(budget=0.625, comparison=result), PointResult(budget=0.5, comparison=result))
    several = Reader(page(comparison=result, breakdown=None, points=points)).text
    assert {"embedding": "cosine", "regression": "correlation", "multi-label": "same labels"}[kind] in several
    assert "same answer" not in several
    assert "62.5" in several


def test_an_exported_model_is_opened_as_one() -> None:
    environment = report().environment.model_copy(update={"runtime": "onnxruntime 1.32"})
    text = Reader(page(environment=environment)).text
    assert 'vitprune.ExportedModel.load("vit-60")' in text
    assert "from_pretrained" not in text
