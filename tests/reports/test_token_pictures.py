"""Pictures of tokens: what is drawn where."""

from __future__ import annotations

from typing import Any

import numpy as np
from made_up_report import CELL, STAGE
from made_up_report import seen_image as seen
from PIL import Image

from vitprune.reports.token_pictures import (
    SHEET_SIDE,
    SIDE,
    Stage,
    draw_image,
    draw_panel,
    draw_sheet,
    in_a_line,
)


def corners(panel: Image.Image, row: int, column: int, rows: int = 2, columns: int = 3) -> tuple[int, int, int]:
    """The colour of a patch, beside what is written in its middle and the line around it."""
    wide, high = panel.width / columns, panel.height / rows
    found: Any = panel.getpixel((int((column + 0.12) * wide), int((row + 0.12) * high)))
    return found


def test_a_stage_counts_what_tokens_stand_for() -> None:
    assert STAGE.sizes.tolist() == [1, 0, 2, 0, 2, 0]
    assert STAGE.tokens == 3


def test_before_any_stage_the_image_is_as_it_is() -> None:
    panel = draw_panel(seen(), None)
    assert panel.size == (SIDE, SIDE * 2 // 3)
    assert [corners(panel, r, c)[0] for r in (0, 1) for c in (0, 1, 2)] == [20, 60, 100, 140, 180, 220]


def test_kept_merged_and_dropped_patches_look_different() -> None:
    panel = draw_panel(seen(), STAGE)
    assert corners(panel, 0, 0) == (20, 20, 20), "a patch that is a token of its own shows the image"
    assert corners(panel, 0, 1) == corners(panel, 0, 2), "a group has one colour"
    assert corners(panel, 1, 1) == corners(panel, 1, 2)
    assert corners(panel, 0, 1) != corners(panel, 1, 1), "and another group another one"
    assert len(set(corners(panel, 0, 1))) > 1, "which a grey image hasn't got"
    red, *others = corners(panel, 1, 0)
    assert red > 220, "what was dropped is faded"
    assert max(others) - min(others) < 5


def test_what_the_model_does_not_see_is_faded() -> None:
    left = draw_panel(seen(box=(CELL, 0.0, 3.0 * CELL, 2.0 * CELL)), None)
    assert corners(left, 0, 0)[0] > 180
    assert corners(left, 0, 1)[0] == 60
    # and the patches lie in the box alone
    stage = Stage(1, np.array([[0, 1], [-1, 3]]))
    panel = draw_panel(seen(box=(CELL, 0.0, 3.0 * CELL, 2.0 * CELL), stages=(stage,)), stage)
    assert corners(panel, 0, 1)[0] == 60
    assert corners(panel, 1, 1)[0] > 220
    assert corners(panel, 1, 2)[0] == 220


def test_a_picture_of_one_image_has_a_panel_a_stage_and_wraps() -> None:
    one, many = draw_image(seen()), draw_image(seen(stages=(STAGE,) * 8))
    assert 2 * SIDE < one.width < 3 * SIDE
    assert many.height > 2 * SIDE * 2 / 3
    assert many.width > 6 * SIDE


def test_a_sheet_has_all_images() -> None:
    sheet = draw_sheet(
        [seen(), seen(), seen(name="a name that goes on and on, so that nobody would want to read it " * 3)]
    )
    assert sheet.width > 6 * SHEET_SIDE
    assert sheet.height < 3 * SHEET_SIDE


def test_a_tiny_picture_is_enlarged_and_a_thin_one_has_its_shape() -> None:
    tiny = Image.new("RGB", (6, 4))
    assert draw_panel(seen(picture=tiny, box=(0, 0, 6, 4)), STAGE).size == (SIDE, SIDE * 2 // 3)
    thin = Image.new("RGB", (500, 1))
    assert draw_panel(seen(picture=thin, box=(0, 0, 500, 1)), STAGE).size == (SIDE, 1)


def test_a_line_says_what_was_found() -> None:
    assert in_a_line(seen(label="cat")) == (
        "3 of 6 patches left, 50.0 % of the MACs; pruned dog 51.0 %, dense cat 90.0 %, label cat"
    )
