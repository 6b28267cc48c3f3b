"""The page in a real browser, headless: upload, slide, read; nothing is asked of another machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

import vitprune

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
APP = Path(__file__).parent / "app.py"
CHECKPOINT = APP.parents[2] / "recipes" / "quickstart" / "checkpoint"
PATIENCE = 90_000  # ms, on a slow machine


def started(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(APP), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of the page that the documented command serves."""
    process = started()
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            yield found[0]
            break
    else:
        raise AssertionError(said)
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def opened(address: str) -> Iterator[tuple[Page, list[str]]]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, wrong = browser.new_page(viewport={"width": 1280, "height": 900}), []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda request: request.url.startswith((address, "data:", "blob:")) or wrong.append(request.url),
        )
        page.goto(address)
        yield page, wrong
        browser.close()


def told(page: Page) -> float:
    """What part of the MACs the page says that an image took, in percent."""
    row = page.locator("tr", has_text="pruned")
    expect(row).to_be_visible(timeout=PATIENCE)
    found = re.search(r"([\d.]+)%\s+\d+ ms", row.inner_text().replace("\t", " "))
    assert found is not None, row.inner_text()
    return float(found[1])


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; `make browser` installs it on Debian")
def test_upload_slide_and_read(opened: tuple[Page, list[str]], tmp_path: Path) -> None:
    page, wrong = opened
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    page.set_input_files("input[type=file]", tmp_path / "noise.png")
    first = told(page)
    expect(page.locator("img[src*='png']").last).to_be_visible(timeout=PATIENCE)
    slider = page.get_by_role("slider")
    slider.focus()
    for _ in range(30):
        slider.press("ArrowLeft")
    deadline = time.monotonic() + PATIENCE / 1000
    while (last := told(page)) >= first and time.monotonic() < deadline:
        page.wait_for_timeout(200)
    assert last < first, "a lower budget takes fewer MACs"
    page.screenshot(path=tmp_path / "page.png")
    assert wrong == []


def refused(*arguments: str) -> str:
    process = started(*arguments)
    said, _ = process.communicate(timeout=PATIENCE / 1000)
    assert process.returncode == 1
    assert "Traceback" not in said
    return said.splitlines()[-1]


def test_a_checkpoint_that_is_no_such_one_is_refused_in_a_line() -> None:
    assert "isn't pruned" in refused(str(CHECKPOINT))


def test_a_checkpoint_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKPOINT", str(CHECKPOINT))
    assert "isn't pruned" in refused()


def test_a_model_that_gives_several_labels_is_refused(tmp_path: Path) -> None:
    points = [{"budget": part, "ratio": part, "levels": [1 - part], "temperatures": [0.1]} for part in (0.8, 0.5)]
    model = vitprune.load(str(CHECKPOINT))
    model.config.problem_type = "multi_label_classification"
    spec = vitprune.PruningSpec(before_blocks=[3], thresholds=[0.2], points=points)
    processor = vitprune.load_processor(str(CHECKPOINT))
    place = vitprune.save(vitprune.prune_(model, spec), tmp_path / "several", processor=processor)
    assert "which of several labels an image has, and ViTForImageClassification doesn't say" in refused(str(place))
