"""The comparison shows images of the same prompts and seeds, and in each column the numbers of its run folder."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recipes import compare as recipe
from rlhf_t2i.report.comparison import cell_text, curves, shared_cells, side_by_side
from rlhf_t2i.report.paired import paired_difference
from rlhf_t2i.report.svg import draw_runs
from tests.report_files import CELLS, COLOURS, SIDE, Page, add_grids, run_with_images


def test_columns_are_the_start_and_the_end_of_runs(tmp_path: Path) -> None:
    """Runs with the same images at the start share one column."""
    columns = side_by_side([run_with_images(tmp_path / "a", after=0.8), run_with_images(tmp_path / "b", after=0.5)])
    assert [one.name for one in columns] == ["before a", "a", "b"]
    before, a, b = columns
    assert cell_text(before, before, "oracle") == ("0.500 ± 0.030", "")
    assert cell_text(a, before, "oracle") == ("0.800 ± 0.040", "+0.300, z = 6.0")
    assert cell_text(b, before, "oracle") == ("0.500 ± 0.040", "+0.000, z = 0.0 (within noise)")
    assert cell_text(a, before, "llava_reward") == ("not measured", "")
    assert (a.trained_on, before.trained_on) == (frozenset({"oracle"}), frozenset())
    assert a.metadata["updates"] == "2"
    assert a.metadata["training images"] == "384"


def test_runs_with_the_same_folder_name_are_named_by_their_path(tmp_path: Path) -> None:
    one, two = (
        run_with_images(tmp_path / "one" / "run", after=0.8),
        run_with_images(tmp_path / "two" / "run", after=0.9),
    )
    assert [column.name for column in side_by_side([one, two])] == [f"before {one}", str(one), str(two)]


def page_of(folders: list[Path], output: Path) -> str:
    return recipe.main(recipe.Config(runs=",".join(map(str, folders)), output=str(output))).read_text()


def test_a_row_of_images_has_the_same_prompt_and_seed(tmp_path: Path) -> None:
    """For any order and number of columns in the image grids of the runs."""
    mixed = [CELLS[3], CELLS[0], CELLS[4], CELLS[2]]
    a, b = (
        run_with_images(tmp_path / "a", after=0.8),
        run_with_images(tmp_path / "b", after=0.9, cells=mixed, columns=3),
    )
    assert shared_cells(side_by_side([a, b])) == [CELLS[0], CELLS[2], CELLS[3]]
    page = page_of([a, b], tmp_path / "out.html")
    grids = re.findall(r"\.grid(\d+) \{ background-size: ([\d.]+)% ([\d.]+)%;.*?base64,(.*?)\)", page, flags=re.DOTALL)
    images: dict[str, Any] = {}
    for number, across, down, data in grids:
        (tmp_path / "grid.png").write_bytes(base64.b64decode(data))
        images[number] = Image.open(tmp_path / "grid.png").convert("RGB"), float(across) / 100, float(down) / 100
    figures = re.findall(r"<figure><button type=\"button\" class=\"zoom cells\">(.*?)</figure>", page, flags=re.DOTALL)
    assert len(figures) == 3
    for figure, cell in zip(figures, (CELLS[0], CELLS[2], CELLS[3]), strict=True):
        assert f"{cell[0]} (seed {cell[1]})" in figure
        shown = re.findall(r'class="grid(\d+)".*?background-position: ([\d.]+)% ([\d.]+)%', figure, flags=re.DOTALL)
        assert [number for number, _, _ in shown] == ["1", "2", "3", "4"]
        for number, x, y in shown:
            grid, columns, rows = images[number]
            column, row = round(float(x) / 100 * (columns - 1)), round(float(y) / 100 * (rows - 1))
            assert grid.getpixel((column * SIDE + 3, row * SIDE + 3)) == COLOURS[CELLS.index(cell)]


def test_evaluated_weights_are_columns(tmp_path: Path) -> None:
    """Also two with the same images and numbers."""
    folder = tmp_path / "evaluation"
    add_grids(folder, CELLS[:4], ["0.png", "1.png"], columns=2)
    row = {"oracle": 0.5, "oracle/standard_error": 0.03, "diversity": 0.3}
    (folder / "table.json").write_text(json.dumps({"base": row, "runs/a": row}))
    page = page_of([folder], tmp_path / "out.html")
    assert re.findall(r"<th scope=\"row\">\s*<span class=\"number\">\d</span>(base|runs/a)</th>", page)[:2] == [
        "base",
        "runs/a",
    ]
    assert "Curves" not in page


def test_each_run_has_its_own_line(tmp_path: Path) -> None:
    _, a, b = side_by_side([run_with_images(tmp_path / "a", after=0.8), run_with_images(tmp_path / "b", after=0.9)])
    lines = curves([a, b], "oracle")
    assert lines == {"a": [(0, 0.5, 0.03), (2, 0.8, 0.04)], "b": [(0, 0.5, 0.03), (2, 0.9, 0.04)]}
    paths = re.findall(
        r'<path style="stroke:(#\w+)" d="M([\d. L]+?)M.*?<title>(\w)</title>', draw_runs(lines, "oracle")
    )
    assert [name for _, _, name in paths] == ["a", "b"]
    assert len({stroke for stroke, _, _ in paths}) == 2
    # From 0.47, the lowest error bar, to 0.94, the highest, in 150 units.
    assert paths[0][1] == f"50.0 {166 - 150 * 0.03 / 0.47:.1f}L350.0 {166 - 150 * 0.33 / 0.47:.1f}"
    assert curves([a, b], "llava_reward") == {}


def test_eight_runs_have_eight_colours_and_images_of_any_shape(tmp_path: Path) -> None:
    """The column of the common start has no colour, and does not shift those of the runs."""
    folders = [run_with_images(tmp_path / f"run{i}", after=0.8) for i in range(8)]
    for folder in folders:
        for path in (folder / "images").glob("*.png"):
            Image.open(path).resize((2 * 12, 2 * 8)).save(path)
    page = page_of(folders, tmp_path / "out.html")
    keys = re.findall(r'class="key" style="background: (#\w+)"', page)
    assert len(set(keys)) == 8
    assert len(keys) == 3 * 8, "in two tables and in the legend of the curves"
    assert set(re.findall(r"aspect-ratio: ([\d.]+);\s+image-rendering", page)) == {"1.5"}


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    page = page_of([run_with_images(tmp_path / "a", after=0.8)], tmp_path / "out.html")
    assert "default-src 'none'" in page
    assert not Page(page).links
    assert not {"link", "img", "iframe"} & set(Page(page).tags)
    assert not re.search(r"https?://", page)


def test_folders_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    a, b = (
        run_with_images(tmp_path / "a", after=0.8, cells=CELLS[:2]),
        run_with_images(tmp_path / "b", after=0.8, cells=CELLS[2:4]),
    )
    with pytest.raises(ValueError, match=r"have no prompt and seed in common.*evaluate_policy.py --weights"):
        side_by_side([a, b])
    with pytest.raises(FileNotFoundError, match=r"contains no images of an evaluation.*recipes/evaluate_policy.py"):
        side_by_side([tmp_path])
    (b / "metrics.jsonl").unlink()  # as if killed between the images and their measurements
    with pytest.raises(FileNotFoundError, match=r"b has images and no measurements of them"):
        side_by_side([b])
    with pytest.raises(ValueError, match="runs is ; it must be at least one folder"):
        recipe.Config(runs="")


# --- the same images ------------------------------------------------------------------------------


def test_paired_differences_are_over_shared_images_by_hand() -> None:
    """Differences 0.1, 0.3 and 0.2 on the shared images: mean 0.2, standard error 0.1 / sqrt(3) = 0.0577."""
    first = {("a", 0): {"oracle": 0.1}, ("a", 1): {"oracle": 0.5}, ("b", 0): {"oracle": 0.3}, ("c", 0): {"oracle": 0.0}}
    other = {("a", 0): {"oracle": 0.2}, ("a", 1): {"oracle": 0.8}, ("b", 0): {"oracle": 0.5}, ("d", 0): {"oracle": 9.0}}
    found = paired_difference(first, other, "oracle")
    assert found is not None
    assert (found.count, found.is_noise) == (3, False)
    assert (found.mean, found.error) == (pytest.approx(0.2), pytest.approx(0.1 / 3**0.5))
    assert str(found) == "+0.200 (95 %: +0.087 to +0.313)"
    assert paired_difference(first, {("a", 0): {"oracle": 0.2}}, "oracle") is None
    assert paired_difference(first, other, "hps") is None
    noisy = paired_difference(first, {("a", 0): {"oracle": 0.3}, ("b", 0): {"oracle": 0.1}}, "oracle")
    assert str(noisy).endswith("within noise)")


def with_scores(folder: Path, cells: list[tuple[str, int]], *, last: float) -> Path:
    """Add the scores of all evaluation images, which rise from 0.5 by `last` and a little by image."""
    for step, rise in ((0, 0.0), (2, last)):
        scores = {"oracle": [0.5 + rise * (1 + i / 10) for i in range(len(cells))]}
        record = {"prompts": [prompt for prompt, _ in cells], "seeds": [seed for _, seed in cells], "scores": scores}
        (folder / "images" / f"step_{step:06}.json").write_text(json.dumps(record))
    return folder


def test_a_comparison_of_different_image_sets_says_so_and_pairs_what_matches(tmp_path: Path) -> None:
    a = with_scores(run_with_images(tmp_path / "a", after=0.8), CELLS[:4], last=0.3)
    b = with_scores(run_with_images(tmp_path / "b", after=0.9, cells=CELLS[1:]), CELLS[1:], last=0.4)
    (a / "report.html").write_text("")
    page = page_of([a, b], tmp_path / "pages" / "out.html")
    assert "The image sets differ." in page
    assert "on 3 shared images" in page
    assert Page(page).links.count("../a/report.html") == 4, "both of its columns, in two tables"
    assert "The image sets differ." not in page_of([a], tmp_path / "out.html")
