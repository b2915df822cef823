"""The images of a run folder as a page can hold them: strips through training, and the best and the worst.

Small images are embedded as they are, large ones as thumbnails, and of many evaluations a part, evenly spread, so
that a page stays light enough to send.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from rlhf_t2i.training.changes import with_error
from rlhf_t2i.training.metrics import ERROR, Row, by_step, number, reward_names, trained_rewards

MAX_STRIPS = 24
"""Evaluations whose images a page holds: with thumbnails about 6 MB."""
_LOSSLESS_SIDE = 64
"""Images up to this width are embedded pixel for pixel."""
_THUMBNAIL_SIDE = 192
"""Twice the width at which the page shows an image, for screens of high density."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """Images of one size in rows, as data that a style can refer to."""

    url: str
    columns: int
    rows: int
    side: int
    """Width of one image in pixels, as embedded."""

    def place(self, cell: int) -> tuple[float, float]:
        """Where an image lies, in percent of what the sheet is larger than it."""
        column, row = cell % self.columns, cell // self.columns
        return 100 * column / max(1, self.columns - 1), 100 * row / max(1, self.rows - 1)


@dataclass(frozen=True, slots=True)
class Strip:
    """The images of one evaluation, and what was said of all that it saw."""

    step: int
    sheet: Sheet

    verdict: str
    """The mean of each reward with its error."""

    @property
    def when(self) -> str:
        return "before training" if self.step == 0 else f"after update {self.step:,}"


@dataclass(frozen=True, slots=True)
class Through:
    """The same prompts and seeds at every evaluation, from first to last."""

    strips: list[Strip]
    cells: list[tuple[str, int]]
    """Prompt and seed of each image."""
    num_evaluations: int
    """Of which `strips` may be a part."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One image of the last evaluation."""

    place: tuple[float, float]
    prompt: str
    seed: int
    index: int
    """Its place among the evaluation images, from 0."""
    scores: dict[str, float]


@dataclass(frozen=True, slots=True)
class Extremes:
    """The best and the worst images by one reward, the utmost first."""

    reward: str
    trained: bool
    best: list[Judged]
    worst: list[Judged]
    num_equal: tuple[int, int]
    """How many images score as the very best does, and as the very worst: of these the earliest are shown."""


def read_sheet(path: Path, *, columns: int, num_cells: int) -> Sheet:
    """Embed a strip of `num_cells` images: as it is, or large ones as thumbnails."""
    rows = -(-num_cells // columns)
    with Image.open(path) as strip:
        side = strip.width // columns
    if side <= _LOSSLESS_SIDE:
        return Sheet(_url("png", path.read_bytes()), columns, rows, side)
    data = _thumbnails(path, columns=columns, rows=rows)
    return Sheet(_url("webp", data), columns, rows, min(side, _THUMBNAIL_SIDE))


def _thumbnails(path: Path, *, columns: int, rows: int) -> bytes:
    """A strip whose images have shrunk, each for itself, as WebP.

    It is kept beside the strip, because a run of large images would spend seconds on it at every evaluation.
    """
    kept = path.with_suffix(".webp")
    if kept.is_file() and kept.stat().st_mtime_ns >= path.stat().st_mtime_ns:
        return kept.read_bytes()
    with Image.open(path) as opened:
        strip = opened.convert("RGB")
    width, height = strip.width // columns, strip.height // rows
    shown = min(width, _THUMBNAIL_SIDE)
    size = shown, round(height * shown / width)
    small = Image.new("RGB", (columns * size[0], rows * size[1]))
    for x in range(columns):
        for y in range(rows):
            cell = strip.crop((x * width, y * height, (x + 1) * width, (y + 1) * height))
            small.paste(cell.resize(size), (x * size[0], y * size[1]))
    data = io.BytesIO()
    small.save(data, "WEBP", quality=82)
    part = kept.with_suffix(".part")  # whoever is killed now leaves no half of it
    part.write_bytes(data.getvalue())
    part.replace(kept)
    return data.getvalue()


def through_training(folder: Path, rows: Sequence[Row]) -> Through | None:
    """The strips of the evaluations that the rows tell of; None where there is none yet."""
    evaluations = [row for row in by_step(rows, "evaluation") if _strip(folder, row["step"]).is_file()]
    if not evaluations:
        return None
    captions: Row = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    cells = list(zip(captions["prompts"], captions["seeds"], strict=True))
    strips = [
        Strip(
            row["step"],
            read_sheet(_strip(folder, row["step"]), columns=captions["columns"], num_cells=len(cells)),
            ", ".join(f"{n} {with_error(number(row, n), number(row, n + ERROR))}" for n in reward_names([row])),
        )
        for row in spread(evaluations, most=MAX_STRIPS)
    ]
    return Through(strips, cells, len(evaluations))


def spread(things: Sequence[Row], *, most: int) -> list[Row]:
    """At most so many of them, evenly spread, the first and the last always among them."""
    if len(things) <= most:
        return list(things)
    return [things[round(i * (len(things) - 1) / (most - 1))] for i in range(most)]


def best_and_worst(folder: Path, rows: Sequence[Row]) -> tuple[Sheet, list[Extremes]] | None:
    """The utmost images of the last evaluation by each reward, those first that are trained on.

    None where nothing was evaluated yet, or by a version that did not keep them.
    """
    evaluations, path = by_step(rows, "evaluation"), folder / "extremes.json"
    facts: Row = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"step": None}
    if not evaluations or facts["step"] != evaluations[-1]["step"]:
        return None
    spoken: Row = json.loads((folder / f"step_{facts['step']:06d}.json").read_text(encoding="utf-8"))
    strip = folder / f"extremes_{facts['step']:06d}.png"
    sheet = read_sheet(strip, columns=facts["columns"], num_cells=len(facts["cells"]))

    def judged(images: Sequence[int]) -> list[Judged]:
        return [
            Judged(
                sheet.place(facts["cells"].index(i)), spoken["prompts"][i], spoken["seeds"][i], i,
                {name: values[i] for name, values in spoken["scores"].items()},
            )
            for i in images
        ]  # fmt: skip

    trained = trained_rewards(rows)
    found = [
        Extremes(
            name, name in trained, judged(facts["best"][name]), judged(facts["worst"][name]),
            (values.count(max(values)), values.count(min(values))),
        )
        for name, values in spoken["scores"].items()
    ]  # fmt: skip
    return sheet, sorted(found, key=lambda one: not one.trained)


def _strip(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}.png"


def _url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
