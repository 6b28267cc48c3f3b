"""Pages in a real browser, headless: they open without an error or a request, fit a phone, and can be sorted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_up_recipe import FINETUNE, RECIPE, recipe
from playwright.sync_api import Browser, Page, sync_playwright

from vitprune.runs.apply import apply

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; `make browser` installs it on Debian")
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    apply(recipe(folder, RECIPE + FINETUNE))
    return folder / "out" / "report.html"


def opened(browser: Browser, path: Path, width: int = 1280, scheme: str = "light") -> tuple[Page, list[str]]:
    """A page, and what went wrong on it."""
    page, wrong = browser.new_page(viewport={"width": width, "height": 900}), []
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url)
    )
    page.goto(path.as_uri())
    page.wait_for_load_state("load")
    return page, wrong


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_report_opens_and_fits(browser: Browser, report: Path, width: int, scheme: str) -> None:
    page, wrong = opened(browser, report, width, scheme)
    assert wrong == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "it is wider than the screen"
    pictures = "[...document.images].map(image => image.naturalWidth)"
    assert min(page.evaluate(pictures)) > 0, "a picture is broken"
    dark = (
        sum(map(int, page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(", "))) < 100
    )
    assert dark == (scheme == "dark")
    page.close()


def test_classes_are_sorted_by_a_click(browser: Browser, report: Path) -> None:
    page, wrong = opened(browser, report)
    table = page.locator("table.sortable")
    for column, heading in enumerate(table.locator("th").all_inner_texts()):
        button = table.get_by_role("button", name=heading)
        for order in ("ascending", "descending"):
            button.click()
            assert table.locator("th").nth(column).get_attribute("aria-sort") == order
            cells = table.locator(f"tbody td:nth-child({column + 1})")
            values = [cell.get_attribute("data-value") or "" for cell in cells.all()]
            keys = [value if column == 0 else float(value) for value in values]
            assert keys == sorted(keys, reverse=order == "descending")
    assert wrong == []
    page.close()
