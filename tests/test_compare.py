"""The page lays the same images beside one another, and says of each column what its run folder says."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recipes import compare as recipe
from rlhf_t2i.report.comparison import curves, overlay, shared_cells, side_by_side, verdict_of
from tests.test_report import evaluation, run_folder, train

COLOURS = [(40 * i, 255 - 40 * i, 7 * i) for i in range(6)]
CELLS = [("a fox", 0), ("a fox", 1), ("a hen", 2), ("a cow", 3), ("a dog", 9)]
SIDE = 8


def draw_strip(path: Path, cells: list[tuple[str, int]], *, columns: int) -> None:
    """Each cell in the colour of its place among CELLS."""
    rows = -(-len(cells) // columns)
    strip = Image.new("RGB", (columns * SIDE, rows * SIDE), "white")
    for i, cell in enumerate(cells):
        strip.paste(COLOURS[CELLS.index(cell)], (i % columns * SIDE, i // columns * SIDE, (i % columns + 1) * SIDE,
                                                  (i // columns + 1) * SIDE))  # fmt: skip
    strip.save(path)


def add_images(folder: Path, cells: list[tuple[str, int]], names: list[str], *, columns: int) -> None:
    (folder / "images").mkdir(parents=True)
    for name in names:
        draw_strip(folder / "images" / name, cells, columns=columns)
    captions = {"prompts": [p for p, _ in cells], "seeds": [s for _, s in cells], "columns": columns}
    (folder / "images" / "captions.json").write_text(json.dumps(captions))


def tuned(folder: Path, *, after: float, cells: list[tuple[str, int]] = CELLS[:4], columns: int = 2) -> Path:
    folder.mkdir(parents=True)
    rows = [
        evaluation(0, 0.5, 0.03, elapsed=1), train(1, elapsed=30.0), train(2, elapsed=60.0),
        evaluation(2, after, 0.04, elapsed=61),
    ]  # fmt: skip
    run_folder(folder, rows, config="learning_rate: 0.001\nlora_rank: 4\nseed: 3\n")
    add_images(folder, cells, ["step_000000.png", "step_000002.png"], columns=columns)
    return folder


def test_columns_are_what_runs_began_and_ended_with(tmp_path: Path) -> None:
    """Runs that began alike share their first column."""
    entries = side_by_side([tuned(tmp_path / "a", after=0.8), tuned(tmp_path / "b", after=0.5)])
    assert [one.name for one in entries] == ["before a", "a", "b"]
    before, a, b = entries
    assert verdict_of(before, before, "oracle") == ("0.500 ± 0.030", "")
    assert verdict_of(a, before, "oracle") == ("0.800 ± 0.040", "+0.300, 6.0 standard errors")
    assert verdict_of(b, before, "oracle") == ("0.500 ± 0.040", "+0.000, 0.0 standard errors: within noise")
    assert verdict_of(a, before, "llava_reward") == ("not measured", "")
    assert (a.trained_on, before.trained_on) == (frozenset({"oracle"}), frozenset())
    assert a.facts["updates"] == "2"
    assert a.facts["images for training"] == "384"


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    one, two = tuned(tmp_path / "one" / "run", after=0.8), tuned(tmp_path / "two" / "run", after=0.9)
    assert [entry.name for entry in side_by_side([one, two])] == [f"before {one}", str(one), str(two)]


def page_of(folders: list[Path], output: Path) -> str:
    return recipe.main(recipe.Config(runs=",".join(map(str, folders)), output=str(output))).read_text()


def test_beside_one_another_lie_the_same_prompt_and_seed(tmp_path: Path) -> None:
    """Whatever the order and the number of columns of each run's own strip."""
    mixed = [CELLS[3], CELLS[0], CELLS[4], CELLS[2]]
    a, b = tuned(tmp_path / "a", after=0.8), tuned(tmp_path / "b", after=0.9, cells=mixed, columns=3)
    assert shared_cells(side_by_side([a, b])) == [CELLS[0], CELLS[2], CELLS[3]]
    page = page_of([a, b], tmp_path / "out.html")
    sheets = re.findall(
        r"\.sheet(\d+) \{ background-size: ([\d.]+)% ([\d.]+)%;.*?base64,(.*?)\)", page, flags=re.DOTALL
    )
    strips: dict[str, Any] = {}
    for number, across, down, data in sheets:
        (tmp_path / "strip.png").write_bytes(base64.b64decode(data))
        strips[number] = Image.open(tmp_path / "strip.png").convert("RGB"), float(across) / 100, float(down) / 100
    figures = re.findall(r"<figure><div class=\"cells\">(.*?)</figure>", page, flags=re.DOTALL)
    assert len(figures) == 3
    for figure, cell in zip(figures, (CELLS[0], CELLS[2], CELLS[3]), strict=True):
        assert f"{cell[0]} (seed {cell[1]})" in figure
        shown = re.findall(r'class="sheet(\d+)".*?background-position: ([\d.]+)% ([\d.]+)%', figure, flags=re.DOTALL)
        assert [number for number, _, _ in shown] == ["1", "2", "3", "4"]
        for number, x, y in shown:
            strip, columns, rows = strips[number]
            column, row = round(float(x) / 100 * (columns - 1)), round(float(y) / 100 * (rows - 1))
            assert strip.getpixel((column * SIDE + 3, row * SIDE + 3)) == COLOURS[CELLS.index(cell)]


def test_weights_of_an_evaluation_are_columns_too(tmp_path: Path) -> None:
    """Also two that came out alike."""
    folder = tmp_path / "evaluation"
    add_images(folder, CELLS[:4], ["0.png", "1.png"], columns=2)
    row = {"oracle": 0.5, "oracle/standard_error": 0.03, "diversity": 0.3}
    (folder / "table.json").write_text(json.dumps({"base": row, "runs/a": row}))
    page = page_of([folder], tmp_path / "out.html")
    assert re.findall(r"<th>(base|runs/a)</th>", page) == ["base", "runs/a"]
    assert "Curves" not in page


def test_each_run_has_a_line_of_its_own(tmp_path: Path) -> None:
    _, a, b = side_by_side([tuned(tmp_path / "a", after=0.8), tuned(tmp_path / "b", after=0.9)])
    lines = curves([a, b], "oracle")
    assert lines == {"a": [(0, 0.5, 0.03), (2, 0.8, 0.04)], "b": [(0, 0.5, 0.03), (2, 0.9, 0.04)]}
    drawn = re.findall(r'<path style="stroke:(#\w+)" d="M([\d. L]+?)M.*?<title>(\w)</title>', overlay(lines, "oracle"))
    assert [name for _, _, name in drawn] == ["a", "b"]
    assert len({stroke for stroke, _, _ in drawn}) == 2
    # From 0.47, the lowest whisker, to 0.94, the highest, in 150 units.
    assert drawn[0][1] == f"50.0 {166 - 150 * 0.03 / 0.47:.1f}L350.0 {166 - 150 * 0.33 / 0.47:.1f}"
    assert curves([a, b], "llava_reward") == {}


def test_the_page_asks_nobody_for_anything(tmp_path: Path) -> None:
    page = page_of([tuned(tmp_path / "a", after=0.8)], tmp_path / "out.html")
    assert "default-src 'none'" in page
    assert not re.search(r"<script|https?://|src=", page)


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    a, b = tuned(tmp_path / "a", after=0.8, cells=CELLS[:2]), tuned(tmp_path / "b", after=0.8, cells=CELLS[2:4])
    with pytest.raises(ValueError, match=r"show no prompt with the same seed.*evaluate_policy.py --weights"):
        side_by_side([a, b])
    with pytest.raises(FileNotFoundError, match=r"shows no images of an evaluation.*recipes/evaluate_policy.py"):
        side_by_side([tmp_path])
    with pytest.raises(ValueError, match="runs is ; it must be at least one folder"):
        recipe.Config(runs="")
