"""Draws which patches of an image are left after each stage, and what the others became part of.

Knows Pillow and nothing of models. Colours: a patch that is still a token of its own shows the image; patches that were
merged into one token share one colour, with the number of them on the patch that stands for them; what was dropped for
good, or never seen by the model, is faded.
"""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vitprune.reports.text import count, percent

SIDE = 252  # pixels of a panel's longer side
SHEET_SIDE = 168
PANELS = 6  # side by side
GAP = 10
TEXT = 13  # pixels of a line's letters
LEAST_CELL = 11  # pixels of a patch that a number fits on
PAPER, INK, QUIET = (255, 255, 255), (24, 24, 27), (113, 113, 122)
FADED_TO, FADED = np.array([244, 244, 245]), 0.82
TINT = 0.6  # of a group's colour, the rest is the mean of its pixels
LINE = np.array([255, 255, 255])

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in an image's pixels."""


@dataclass(frozen=True, eq=False)
class Stage:
    """What is left after one stage. merged_into: (rows, columns), the number of the patch whose token stands for each
    patch, counted row by row; −1 where none does.
    """

    before_block: int
    merged_into: NDArray[np.int64]

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """How many patches each patch's own token stands for, (patches,); 0 where it has none."""
        return np.bincount(self.merged_into[self.merged_into >= 0], minlength=self.merged_into.size)

    @property
    def tokens(self) -> int:
        """Patches that are tokens of their own."""
        return int((self.sizes > 0).sum())


@dataclass(frozen=True, eq=False)
class SeenImage:
    """One image on its way through a pruned model.

    picture: as it came, in RGB. box: the part of it that the model sees, which may reach beyond. dense, pruned: the
    answers in words. label: the right one, if it is known. likeness: of the answers, 1: the same.
    """

    name: str
    picture: Image.Image
    box: Box
    stages: tuple[Stage, ...]
    dense_macs: float
    macs: float
    dense: str
    pruned: str
    label: str | None = None
    likeness: float = 1.0

    @property
    def patches(self) -> int:
        return self.stages[0].merged_into.size

    @property
    def ratio(self) -> float:
        """Its MACs by those of the dense model."""
        return self.macs / self.dense_macs


def draw_image(image: SeenImage) -> Image.Image:
    """Draw the image and what is left of it after each stage, with tokens, MACs and both answers beneath."""
    panels = [draw_panel(image, None), *(draw_panel(image, stage) for stage in image.stages)]
    titles = [f"{image.patches} patches"]
    titles += [f"before block {s.before_block}: {s.tokens} left" for s in image.stages]
    facts = [f"{count(image.macs)} of {count(image.dense_macs)} MACs ({percent(image.ratio)})"]
    facts += [f"pruned: {image.pruned}"] + ([f"dense: {image.dense}"] if image.dense else [])
    facts += [] if image.label is None else [f"label: {image.label}"]
    head = _lines([image.name], INK, TEXT + 3)
    body = _grid([_captioned(p, [t]) for p, t in zip(panels, titles, strict=True)], PANELS)
    return _framed(_stacked([head, body, _lines(facts, INK)]))


def draw_stages(image: SeenImage, panels: int, side: int) -> Image.Image:
    """Draw the image beside what is left of it after stages, so many pictures at most, the last stage among them.

    What is between them is transparent.
    """
    some = min(panels - 1, len(image.stages))
    chosen = [image.stages[math.ceil((place + 1) * len(image.stages) / some) - 1] for place in range(some)]
    drawn = [draw_panel(image, stage, side) for stage in (None, *chosen)]
    row = Image.new("RGBA", (sum(panel.width + 4 for panel in drawn) - 4, drawn[0].height))
    for place, panel in enumerate(drawn):
        row.paste(panel, (place * (panel.width + 4), 0))
    return row


def in_a_line(image: SeenImage) -> str:
    """What was found out about an image, for a terminal."""
    tokens = f"{image.stages[-1].tokens} of {image.patches} patches left"
    answers = f"pruned {image.pruned}" + (f", dense {image.dense}" if image.dense else "")
    label = "" if image.label is None else f", label {image.label}"
    return f"{tokens}, {percent(image.ratio)} of the MACs; {answers}{label}"


def draw_sheet(images: Sequence[SeenImage], columns: int = 4) -> Image.Image:
    """Draw a contact sheet: each image beside what is left of it after the last stage."""
    cells = []
    for image in images:
        pair = [draw_panel(image, stage, SHEET_SIDE) for stage in (None, image.stages[-1])]
        tokens = f"{image.stages[-1].tokens} of {image.patches} patches, {percent(image.ratio)} of the MACs"
        answers = image.pruned if image.likeness == 1 or not image.dense else f"{image.pruned}, dense: {image.dense}"
        cells.append(_captioned(_grid(pair, 2, gap=3), [image.name, tokens, answers]))
    return _framed(_grid(cells, min(columns, len(cells)), gap=2 * GAP))


def as_png(picture: Image.Image) -> bytes:
    """Encode a picture."""
    encoded = io.BytesIO()
    picture.save(encoded, "png", optimize=True)
    return encoded.getvalue()


def draw_panel(image: SeenImage, stage: Stage | None, side: int = SIDE) -> Image.Image:
    """Draw one image in its own aspect ratio as it is after a stage; before any where that is None."""
    width, height = image.picture.size
    scale = side / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    way = Image.Resampling.NEAREST if scale > 4 else Image.Resampling.LANCZOS
    canvas = np.asarray(image.picture.convert("RGB").resize(size, way)).astype(np.float64)
    shown = _fade(canvas)
    left, top, right, bottom = (round(edge * scale) for edge in image.box)
    inside = np.s_[max(0, top) : max(0, bottom), max(0, left) : max(0, right)]
    shown[inside] = canvas[inside]
    if stage is None:
        return Image.fromarray(shown.round().astype(np.uint8))
    owners = _by_pixel(stage.merged_into, (left, top, right, bottom), size)
    _paint_groups(shown, canvas, owners, stage.sizes)
    _draw_borders(shown, owners, stage.sizes)
    drawn = Image.fromarray(shown.round().astype(np.uint8))
    _write_sizes(drawn, stage, (left, top, right, bottom))
    return drawn


OUTSIDE = -2


def _by_pixel(
    merged_into: NDArray[np.int64], box: tuple[int, int, int, int], size: tuple[int, int]
) -> NDArray[np.int64]:
    """Which patch's token stands for each pixel, (height, width); −1: none does; `OUTSIDE`: no model sees it."""
    rows, columns = merged_into.shape
    left, top, right, bottom = box
    x = np.floor((np.arange(size[0]) + 0.5 - left) * columns / max(1, right - left)).astype(np.int64)
    y = np.floor((np.arange(size[1]) + 0.5 - top) * rows / max(1, bottom - top)).astype(np.int64)
    owners = merged_into[y.clip(0, rows - 1)][:, x.clip(0, columns - 1)]
    seen = ((y >= 0) & (y < rows))[:, None] & ((x >= 0) & (x < columns))
    return np.where(seen, owners, OUTSIDE)


def _paint_groups(
    shown: NDArray[np.float64], canvas: NDArray[np.float64], owners: NDArray[np.int64], sizes: NDArray[np.int64]
) -> None:
    shown[owners == -1] = _fade(canvas[owners == -1])
    for patch in np.flatnonzero(sizes > 1):
        group = owners == patch
        if group.any():
            shown[group] = (1 - TINT) * canvas[group].mean(0) + TINT * _colour(int(patch))


def _colour(patch: int) -> NDArray[np.float64]:
    """One that differs from those of the patches beside it."""
    return 255 * np.array(colorsys.hsv_to_rgb(patch * 0.618034 % 1, 0.6, 0.8))


def _draw_borders(shown: NDArray[np.float64], owners: NDArray[np.int64], sizes: NDArray[np.int64]) -> None:
    """Around patches that became one token; those that are tokens of their own are left as an image."""
    groups = np.where((owners >= 0) & (sizes[owners.clip(min=0)] > 1), owners, -1)
    edges = np.zeros(owners.shape, dtype=bool)
    edges[:, 1:] |= groups[:, 1:] != groups[:, :-1]
    edges[1:] |= groups[1:] != groups[:-1]
    shown[edges] = 0.45 * shown[edges] + 0.55 * LINE


def _write_sizes(drawn: Image.Image, stage: Stage, box: tuple[int, int, int, int]) -> None:
    """How many patches a token stands for, on its own patch, where there is room."""
    rows, columns = stage.merged_into.shape
    left, top, right, bottom = box
    wide, high = (right - left) / columns, (bottom - top) / rows
    if min(wide, high) < LEAST_CELL:
        return
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(min(wide, high) * 0.62)
    for patch in np.flatnonzero(stage.sizes > 1):
        y, x = divmod(int(patch), columns)
        centre = (left + (x + 0.5) * wide, top + (y + 0.5) * high)
        pen.text(centre, str(stage.sizes[patch]), PAPER, font, anchor="mm", stroke_width=1, stroke_fill=INK)


def _fade(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    return (1 - FADED) * pixels + FADED * FADED_TO


def _lines(
    texts: Sequence[str], ink: tuple[int, int, int] = QUIET, size: int = TEXT, width: int | None = None
) -> Image.Image:
    """Lines of text; cut where they are wider than `width`."""
    font = ImageFont.load_default(size)
    if width is not None:
        texts = [_cut(text, font, width) for text in texts]
    broad = max(1, *(math.ceil(font.getlength(text)) for text in texts)) + 2
    drawn = Image.new("RGB", (broad if width is None else width, len(texts) * (size + 5)), PAPER)
    pen = ImageDraw.Draw(drawn)
    for place, text in enumerate(texts):
        pen.text((0, place * (size + 5)), text, ink, font)
    return drawn


def _cut(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _captioned(picture: Image.Image, texts: Sequence[str]) -> Image.Image:
    return _stacked([picture, _lines(texts, width=picture.width)], gap=4)


def _stacked(parts: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    return _grid(parts, 1, gap=gap)


def _grid(cells: Sequence[Image.Image], columns: int, gap: int = GAP) -> Image.Image:
    """Pictures in rows, each column as wide as its widest, each row as high as its highest."""
    rows = [cells[first : first + columns] for first in range(0, len(cells), columns)]
    widths = [max(cell.width for cell in cells[column::columns]) for column in range(min(columns, len(cells)))]
    heights = [max(cell.height for cell in row) for row in rows]
    sheet = Image.new("RGB", (sum(widths) + gap * (len(widths) - 1), sum(heights) + gap * (len(rows) - 1)), PAPER)
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            sheet.paste(cell, (sum(widths[:c]) + gap * c, sum(heights[:r]) + gap * r))
    return sheet


def _framed(picture: Image.Image) -> Image.Image:
    sheet = Image.new("RGB", (picture.width + 2 * GAP, picture.height + 2 * GAP), PAPER)
    sheet.paste(picture, (GAP, GAP))
    return sheet
