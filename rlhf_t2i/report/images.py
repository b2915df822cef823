"""The images of a run folder, embedded in a page: image grids through training, and best and worst images.

To keep a page small, large images become thumbnails, and of many evaluations an evenly spaced selection is embedded.
"""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from reward_model.image_files import open_image
from reward_model.text_files import read_object
from rlhf_t2i.output.run_folder import (
    EXTREMES,
    IMAGES,
    evaluation_scores,
    extremes_grid,
    image_grid,
    read_captions,
)
from rlhf_t2i.report.templating import places_for, score_text
from rlhf_t2i.training.changes import with_error
from rlhf_t2i.training.metrics import ERROR, Row, by_step, evaluations_to_export, number, reward_names, trained_rewards

MAX_GRIDS = 24
"""Largest number of evaluations whose images a page embeds; about 6 MB of thumbnails."""
LOSSLESS_SIDE = 64
"""Largest width in pixels of images that are embedded unchanged and shown with sharp pixels."""
_THUMBNAIL_SIDE = 192
"""Width of thumbnails in pixels: twice that on the page, for screens of high density."""


@dataclass(frozen=True, slots=True)
class EmbeddedGrid:
    """A grid of images of equal size as a data URL for CSS."""

    url: str
    columns: int
    rows: int
    side: int
    """Width of one image in pixels, as embedded."""
    ratio: float
    """Width of one image divided by its height."""

    @property
    def is_pixelated(self) -> bool:
        """True if the images are so small that the page should show sharp pixels."""
        return self.side <= LOSSLESS_SIDE

    def position(self, cell: int) -> tuple[float, float]:
        """Return the `background-position` of a cell, in percent of (grid size - cell size)."""
        column, row = cell % self.columns, cell // self.columns
        return 100 * column / max(1, self.columns - 1), 100 * row / max(1, self.rows - 1)


@dataclass(frozen=True, slots=True)
class EvaluationImages:
    """The image grid of one evaluation."""

    step: int
    grid: EmbeddedGrid
    rewards: str
    """Mean and standard error of each reward over all images of the evaluation, as text."""
    values: dict[str, list[float]]
    """Scores of the images of the grid by each reward; empty if the run folder has none."""
    pass_reward: str | None
    """Reward that is 0 or 1 for every image of the history; None if there is none."""
    places: dict[str, int]
    """Decimals of the scores of each reward, the same in all evaluations."""

    @property
    def scores(self) -> dict[str, list[str]]:
        """Scores as text, without those of `pass_reward`."""
        graded = {name: values for name, values in self.values.items() if name != self.pass_reward}
        return {name: [score_text(value, self.places[name]) for value in v] for name, v in graded.items()}

    @property
    def passes(self) -> list[bool]:
        """Per image, True if it passes; empty if that is unknown."""
        return [value == 1 for value in self.values.get(self.pass_reward or "", [])]

    @property
    def when(self) -> str:
        return "before training" if self.step == 0 else f"after update {self.step:,}"


@dataclass(frozen=True, slots=True)
class ImageHistory:
    """Images of the same prompts and seeds from all evaluations, in order."""

    evaluations: list[EvaluationImages]
    cells: list[tuple[str, int]]
    """Prompt and seed of each cell."""
    num_evaluations: int
    """Number of evaluations in the run folder; `evaluations` may be a selection of them."""
    exported: int
    """Index in `evaluations` of the images of the exported weights."""
    damaged: list[str]
    """Files of image grids that are left out because they are damaged."""

    @property
    def by_prompt(self) -> list[int]:
        """All cells, those of the same prompt one after another."""
        first = {prompt: i for i, (prompt, _) in reversed(list(enumerate(self.cells)))}
        return sorted(range(len(self.cells)), key=lambda cell: first[self.cells[cell][0]])


@dataclass(frozen=True, slots=True)
class ScoredImage:
    """One image of the last evaluation."""

    position: tuple[float, float]
    prompt: str
    seed: int
    index: int
    """Index among the evaluation images, from 0."""
    scores: dict[str, float]
    texts: dict[str, str]
    """The scores as the page shows them."""


@dataclass(frozen=True, slots=True)
class Extremes:
    """The images with the highest and the lowest scores of one reward."""

    reward: str
    is_trained_on: bool
    best: list[ScoredImage]
    """From the highest score down."""
    worst: list[ScoredImage]
    """From the lowest score up."""
    num_equal: tuple[int, int]
    """Number of images that share the highest score, and the lowest; the first of them are shown."""


def embed_grid(path: Path, *, columns: int, num_cells: int) -> EmbeddedGrid:
    """Embed the image grid in a PNG: unchanged, or as thumbnails if its images are wider than 64 pixels.

    Raises ValueError, naming it, for a file that is damaged.
    """
    rows = -(-num_cells // columns)
    try:
        return _embedded(path, columns=columns, rows=rows)
    except (OSError, SyntaxError, ValueError, struct.error) as error:  # Pillow raises any of these
        raise ValueError(f"The images {path} are damaged: {error}") from error


def _embedded(path: Path, *, columns: int, rows: int) -> EmbeddedGrid:
    with open_image(path) as grid:
        side, ratio = grid.width // columns, grid.width * rows / (columns * grid.height)
        if side <= LOSSLESS_SIDE:
            grid.verify()
    if side <= LOSSLESS_SIDE:
        return EmbeddedGrid(_data_url("png", path.read_bytes()), columns, rows, side, ratio)
    data = _thumbnails(path, columns=columns, rows=rows)
    return EmbeddedGrid(_data_url("webp", data), columns, rows, min(side, _THUMBNAIL_SIDE), ratio)


def _thumbnails(path: Path, *, columns: int, rows: int) -> bytes:
    """Return the grid as WebP with each image resized on its own, so that neighbours do not mix.

    The file is cached beside the grid: otherwise each report of a run with large images would take seconds.
    """
    cached = path.with_suffix(".webp")
    if cached.is_file() and cached.stat().st_mtime_ns >= path.stat().st_mtime_ns and _is_whole(cached):
        return cached.read_bytes()
    with open_image(path) as opened:
        grid = opened.convert("RGB")
    width, height = grid.width // columns, grid.height // rows
    small_width = min(width, _THUMBNAIL_SIDE)
    size = small_width, round(height * small_width / width)
    small = Image.new("RGB", (columns * size[0], rows * size[1]))
    for x in range(columns):
        for y in range(rows):
            cell = grid.crop((x * width, y * height, (x + 1) * width, (y + 1) * height))
            small.paste(cell.resize(size), (x * size[0], y * size[1]))
    data = io.BytesIO()
    small.save(data, "WEBP", quality=82)
    part = cached.with_suffix(".part")  # a killed process leaves no truncated cache
    part.write_bytes(data.getvalue())
    part.replace(cached)
    return data.getvalue()


def _is_whole(path: Path) -> bool:
    """Return True for a WebP as long as its header says."""
    data = path.read_bytes()
    return data[:4] == b"RIFF" and len(data) == 8 + int.from_bytes(data[4:8], "little")


def image_history(folder: Path, rows: Sequence[Row]) -> ImageHistory | None:
    """Return the image grids of the evaluations in `rows` from a run folder; None if there are none."""
    evaluations = [row for row in by_step(rows, "evaluation") if image_grid(folder, row["step"]).is_file()]
    if not evaluations:
        return None
    captions = read_captions(folder)
    cells = list(zip(captions["prompts"], captions["seeds"], strict=True))
    spaced, last = evenly_spaced(evaluations, limit=MAX_GRIDS), evaluations_to_export(rows)[-1]
    shown = [row for row in evaluations if row in spaced or row is last]
    embedded, damaged = list[EvaluationImages](), list[str]()
    for row in shown:
        path = image_grid(folder, row["step"])
        try:
            grid = embed_grid(path, columns=captions["columns"], num_cells=len(cells))
        except ValueError:
            damaged.append(path.name)
            continue
        means = [f"{n} {with_error(number(row, n), number(row, n + ERROR))}" for n in reward_names([row])]
        values = _cell_scores(folder, row["step"], cells)
        embedded.append(EvaluationImages(row["step"], grid, ", ".join(means), values, None, {}))
    embedded = _with_common_format(embedded)
    exported = max((i for i, one in enumerate(embedded) if one.step <= last["step"]), default=0)
    return ImageHistory(embedded, cells, len(evaluations), exported, damaged) if embedded else None


def _cell_scores(folder: Path, step: int, cells: Sequence[tuple[str, int]]) -> dict[str, list[float]]:
    """Return the scores of the images of a grid; empty if their file is missing, damaged or of other images."""
    try:
        record: Row = read_object(evaluation_scores(folder, step))
        same = list(zip(record["prompts"], record["seeds"], strict=True))[: len(cells)] == list(cells)
        return {name: [float(v) for v in values[: len(cells)]] for name, values in record["scores"].items() if same}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _with_common_format(evaluations: list[EvaluationImages]) -> list[EvaluationImages]:
    """Return the evaluations with the first reward whose scores are 0 or 1 everywhere, and with decimals of scores."""
    names = list(evaluations[0].values) if evaluations else []
    binary = [n for n in names if all(set(one.values.get(n, ())) <= {0.0, 1.0} for one in evaluations)]
    found = next(iter(binary), None)
    everywhere = {
        n: [v for one in evaluations for v in one.values.get(n, ())] for one in evaluations for n in one.values
    }
    places = {name: places_for(values) for name, values in everywhere.items()}
    return [replace(one, pass_reward=found, places=places) for one in evaluations]


def most_changed(history: ImageHistory, reward: str, *, count: int = 6) -> list[int]:
    """Return the cells whose score by a reward changed most from the first to the exported images, most first.

    Empty if the scores are unknown or equal, or if there are no more than `count` cells.
    """
    first, last = history.evaluations[0], history.evaluations[history.exported]
    pairs = list(zip(first.values.get(reward, ()), last.values.get(reward, ()), strict=False))
    changes = {cell: abs(after - before) for cell, (before, after) in enumerate(pairs) if after != before}
    return sorted(changes, key=changes.__getitem__, reverse=True)[:count] if len(history.cells) > count else []


def evenly_spaced(rows: Sequence[Row], *, limit: int) -> list[Row]:
    """Return at most `limit` rows, evenly spaced, with the first and the last."""
    if len(rows) <= limit:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (limit - 1))] for i in range(limit)]


def best_and_worst(folder: Path, rows: Sequence[Row]) -> tuple[EmbeddedGrid, list[Extremes]] | None:
    """Return the extreme images of the last evaluation, rewards that are trained on first.

    None if there is no evaluation, or if the run folder has no extremes of the last one.
    """
    evaluations, path = by_step(rows, "evaluation"), folder / IMAGES / EXTREMES
    layout: Row = read_object(path) if path.is_file() else {"step": None}
    if not evaluations or layout["step"] != evaluations[-1]["step"]:
        return None
    record: Row = read_object(evaluation_scores(folder, layout["step"]))
    grid = embed_grid(extremes_grid(folder, layout["step"]), columns=layout["columns"], num_cells=len(layout["cells"]))

    places = {name: places_for(values) for name, values in record["scores"].items()}

    def scored(images: Sequence[int]) -> list[ScoredImage]:
        all_scores = [{name: values[i] for name, values in record["scores"].items()} for i in images]
        return [
            ScoredImage(
                grid.position(layout["cells"].index(i)), record["prompts"][i], record["seeds"][i], i, scores,
                {name: score_text(value, places[name]) for name, value in scores.items()},
            )
            for i, scores in zip(images, all_scores, strict=True)
        ]  # fmt: skip

    trained = trained_rewards(rows)
    extremes = [
        Extremes(
            name, name in trained, scored(layout["best"][name]), scored(layout["worst"][name]),
            (values.count(max(values)), values.count(min(values))),
        )
        for name, values in record["scores"].items()
    ]  # fmt: skip
    return grid, sorted(extremes, key=lambda extreme: not extreme.is_trained_on)


def _data_url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
