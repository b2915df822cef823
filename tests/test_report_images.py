"""Images and scores that an evaluation writes into the run folder, and how the report shows them."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from rlhf_t2i.report.charts import Chart
from rlhf_t2i.report.images import MAX_GRIDS, best_and_worst, embed_grid, evenly_spaced, image_history
from rlhf_t2i.report.page import flags, typeset, write_report
from rlhf_t2i.report.svg import draw, ticks
from rlhf_t2i.report.templating import places_for, score_text
from rlhf_t2i.training.evaluation import Evaluation, diversity, extremes, prune_image_grids, save_evaluation
from tests import browser
from tests.report_files import Page, Row, add_images, evaluation, plain, run_folder, train, two_updates

SIDE = 8
TRAINED = train(1, elapsed=30.0)


def scored_images(num: int, *, shade: float = 0.0) -> Evaluation:
    """Image i has red i / 255 and green `shade`; its oracle score is i / 10, and pass is 1 for the last three."""
    images = torch.zeros(num, 3, SIDE, SIDE)
    images[:, 0] = torch.arange(num)[:, None, None] / 255
    images[:, 1] = shade
    scores = {"oracle": torch.arange(num) / 10, "pass": (torch.arange(num) >= num - 3).float()}
    return Evaluation([f"image {i}" for i in range(num)], [100 + i for i in range(num)], images, scores)


def evaluated_run(folder: Path, *, num: int = 40, steps: tuple[int, ...] = (0, 10, 20)) -> list[Row]:
    """Write a run folder with the images of its evaluations; returns its rows."""
    (folder / "images").mkdir()
    for step in steps:
        save_evaluation(scored_images(num, shade=step / 100), folder, step=step)
    means = [{**evaluation(step, step / 10, 0.01, elapsed=1.0 + step), "num_images": num} for step in steps]
    rows = [means[0], TRAINED, *means[1:]]
    run_folder(folder, rows)
    return rows


# --- files of an evaluation -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "count", "best", "worst"),
    [
        ([0.1, 0.9, 0.5, 0.7], 2, [1, 3], [0, 2]),
        ([0.1, 0.9, 0.5, 0.7, 0.6], 6, [1, 3], [0, 2]),  # no image is in both
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 1], [2, 3]),  # equal scores: the first images
        ([0.3, 0.4], 6, [1], [0]),
    ],
)
def test_extremes_are_sorted_by_score(scores: list[float], count: int, best: list[int], worst: list[int]) -> None:
    assert extremes(torch.tensor(scores), count=count) == (best, worst)


def test_all_scores_of_an_evaluation_are_saved(tmp_path: Path) -> None:
    save_evaluation(scored_images(40), tmp_path, step=10)
    record = json.loads((tmp_path / "images" / "step_000010.json").read_text())
    assert record["scores"]["pass"] == [0.0] * 37 + [1.0] * 3
    assert record["scores"]["oracle"] == pytest.approx([i / 10 for i in range(40)])
    assert (record["prompts"][39], record["seeds"][39]) == ("image 39", 139)


def test_extremes_are_kept_of_the_last_evaluation_only(tmp_path: Path) -> None:
    for step in (0, 10):
        save_evaluation(scored_images(40), tmp_path, step=step)
    assert {path.name for path in (tmp_path / "images").glob("extremes*")} == {"extremes_000010.png", "extremes.json"}
    assert len(list((tmp_path / "images").glob("step_*.png"))) == 2


def test_diversity_and_its_error_by_hand() -> None:
    """Images of two prompts differ by 0.2 and 0.6 at every pixel: 0.4 ± 0.283 / sqrt(2) = 0.2."""
    values = torch.tensor([0.1, 0.3, 0.2, 0.8])
    images = values[:, None, None, None].expand(4, 3, 32, 32)
    assert diversity(images, ["a", "a", "b", "b"]) == pytest.approx((0.4, 0.2), abs=1e-6)
    assert diversity(images[:2], ["a", "a"]) == (pytest.approx(0.2, abs=1e-6), None)
    assert diversity(images, ["a", "b", "c", "d"]) == (None, None)


# --- the page -------------------------------------------------------------------------------------


def test_of_many_image_grids_evenly_spaced_ones_are_kept_with_the_first_the_best_and_the_last(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for step in range(0, 1000, 10):
        for name in (f"step_{step:06d}.png", f"step_{step:06d}.webp", f"step_{step:06d}.json"):
            (folder / name).touch()
        prune_image_grids(tmp_path, most=12, kept=[130])
    kept = [int(path.stem[5:]) for path in sorted(folder.glob("*.png"))]
    assert (len(kept), kept[0], kept[-1]) == (12, 0, 990)
    assert 130 in kept
    assert max(b - a for a, b in pairwise(kept)) <= 2 * 990 / 11
    assert [path.stem for path in sorted(folder.glob("*.webp"))] == [path.stem for path in sorted(folder.glob("*.png"))]
    assert len(list(folder.glob("*.json"))) == 100


def test_of_many_evaluations_an_evenly_spaced_selection_is_shown() -> None:
    rows: list[Row] = [{"step": step} for step in range(100)]
    shown = [row["step"] for row in evenly_spaced(rows, limit=MAX_GRIDS)]
    assert (len(shown), shown[0], shown[-1]) == (MAX_GRIDS, 0, 99)
    assert {b - a for a, b in pairwise(shown)} == {4, 5}
    assert evenly_spaced(rows[:MAX_GRIDS], limit=MAX_GRIDS) == rows[:MAX_GRIDS]


def test_each_image_grid_has_the_step_and_the_means_of_its_evaluation(tmp_path: Path) -> None:
    history = image_history(tmp_path, evaluated_run(tmp_path))
    assert history is not None
    assert [one.when for one in history.evaluations] == ["before training", "after update 10", "after update 20"]
    assert [one.rewards for one in history.evaluations] == [f"oracle {n} ± 0.010" for n in ("0.000", "1.000", "2.000")]
    assert history.cells[:2] == [("image 0", 100), ("image 1", 101)]
    assert len(history.cells) == 32


def grid_of_large_images(path: Path, *, step: int) -> None:
    """Write a grid of 3 columns with 4 images of 400 pixels; image i has red i * `step`."""
    grid = Image.new("RGB", (3 * 400, 2 * 400), "white")
    for cell in range(4):
        left, top = cell % 3 * 400, cell // 3 * 400
        grid.paste((step * cell, 0, 0), (left, top, left + 400, top + 400))
    grid.save(path)


def test_thumbnails_do_not_mix_neighbouring_images(tmp_path: Path) -> None:
    grid_of_large_images(tmp_path / "grid.png", step=50)
    grid = embed_grid(tmp_path / "grid.png", columns=3, num_cells=4)
    assert (grid.columns, grid.rows, grid.side, grid.position(3)) == (3, 2, 192, (0.0, 100.0))
    data = grid.url.removeprefix("data:image/webp;base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as small:
        assert small.size == (3 * 192, 2 * 192)
        for cell in range(4):
            for corner in (3, 188):
                pixel = small.convert("RGB").getpixel((cell % 3 * 192 + corner, cell // 3 * 192 + corner))
                assert pixel == pytest.approx((50 * cell, 0, 0), abs=10)


def test_thumbnails_are_cached_until_the_image_grid_changes(tmp_path: Path) -> None:
    """A resumed run writes the grids of repeated evaluations again."""
    path, cached = tmp_path / "grid.png", tmp_path / "grid.webp"
    grid_of_large_images(path, step=50)
    first = embed_grid(path, columns=3, num_cells=4)
    made = cached.stat().st_mtime_ns
    assert embed_grid(path, columns=3, num_cells=4) == first
    assert cached.stat().st_mtime_ns == made
    grid_of_large_images(path, step=20)
    os.utime(path, ns=(made + 1, made + 1))
    os.utime(cached, ns=(made, made))
    assert embed_grid(path, columns=3, num_cells=4) != first
    assert {file.name for file in tmp_path.iterdir()} == {"grid.png", "grid.webp"}


def test_a_damaged_thumbnail_is_made_again(tmp_path: Path) -> None:
    grid_of_large_images(tmp_path / "grid.png", step=50)
    first = embed_grid(tmp_path / "grid.png", columns=3, num_cells=4)
    cached = tmp_path / "grid.webp"
    cached.write_bytes(cached.read_bytes()[:-9])
    assert embed_grid(tmp_path / "grid.png", columns=3, num_cells=4) == first


def test_the_best_and_worst_images_have_their_own_scores(tmp_path: Path) -> None:
    rows = evaluated_run(tmp_path)
    found = best_and_worst(tmp_path, rows)
    assert found is not None
    grid, (oracle, passed) = found
    assert (oracle.reward, oracle.is_trained_on, passed.is_trained_on) == ("oracle", True, False)
    assert [one.index for one in oracle.best] == [39, 38, 37, 36, 35, 34]
    assert [one.index for one in oracle.worst] == [0, 1, 2, 3, 4, 5]
    assert oracle.best[0].scores == {"oracle": pytest.approx(3.9), "pass": 1.0}
    assert (oracle.best[0].prompt, oracle.best[0].seed) == ("image 39", 139)
    assert (oracle.num_equal, passed.num_equal) == ((1, 1), (3, 37))
    data = base64.b64decode(grid.url.removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(data)) as image:
        for one in (*oracle.best, *oracle.worst, *passed.best):
            corner = [round(x / 100 * (side - SIDE)) for x, side in zip(one.position, image.size, strict=True)]
            assert image.getpixel((corner[0], corner[1])) == (one.index, 51, 0)


def test_extremes_of_an_evaluation_that_is_not_in_the_metrics_are_not_shown(tmp_path: Path) -> None:
    """As after a resume from step 10, if step 20 had been evaluated."""
    rows = evaluated_run(tmp_path)
    assert best_and_worst(tmp_path, rows[:-1]) is None


def test_a_run_folder_without_extremes_has_a_page_without_them(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, two_updates(before=0.4, after=0.6))
    add_images(folder, ["a red square"] * 6, steps=(0, 2))
    page = write_report(folder).read_text(encoding="utf-8")
    assert 'zoom extreme-image"' not in page


def test_warnings_come_first_then_passed_checks(tmp_path: Path) -> None:
    rows = two_updates(before=0.4, after=0.6)
    text = Page(write_report(run_folder(tmp_path, rows)).read_text(encoding="utf-8")).text
    assert "No warnings" in text
    assert "Images of the same prompt still differ" in text
    collapsed = [*rows[:-1], {**rows[-1], "diversity": 0.01}]
    text = Page(write_report(run_folder(tmp_path, collapsed)).read_text(encoding="utf-8")).text
    assert "1 warning\n" in text
    assert "Diversity went from 0.310 to 0.010, 3% of the first value" in plain(text)
    assert text.index("Diversity has collapsed") < text.index("Also checked") < text.index("Before and after")


def test_options_become_code_and_text_is_escaped() -> None:
    assert flags("a lower --kl_weight <b>") == "a lower <code>--kl_weight</code> &lt;b&gt;"


@pytest.mark.parametrize(("value", "middle"), [(0.4, "91.0"), (-2.0, "91.0"), (0.0, "166.0")])
def test_the_axis_of_a_flat_line_includes_zero(value: float, middle: str) -> None:
    """The plot spans y from 166 up to 16: [0, 0.8], [-4, 0], and [0, 1] for a line at 0."""
    svg = draw(Chart("flat", "", training=[(0.0, value, 0.0), (1.0, value, 0.0)], evaluation=[]))
    assert f'd="M50.0 {middle}L350.0 {middle}h0"' in svg


def test_only_numbers_are_typeset() -> None:
    assert typeset("held-out a-1: -0.5 ± 0.1, 1e-05") == "held-out a-1: \N{MINUS SIGN}0.5\xa0±\xa00.1, 1e-05"


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.437, 0.81, ["0.5", "0.6", "0.7", "0.8"]),
        (0.0002, 0.0004, ["0.00020", "0.00025", "0.00030", "0.00035", "0.00040"]),
        (-1.07, -0.2, [f"\N{MINUS SIGN}{value}" for value in ("1.0", "0.8", "0.6", "0.4", "0.2")]),
        (-4.0, 37.5, ["0", "10", "20", "30"]),
        (0.0, 40000.0, ["0", "10,000", "20,000", "30,000", "40,000"]),
        (1e-6, 5e-6, ["1e\N{MINUS SIGN}06", "2e\N{MINUS SIGN}06", "3e\N{MINUS SIGN}06", "4e\N{MINUS SIGN}06",
                      "5e\N{MINUS SIGN}06"]),
    ],
)  # fmt: skip
def test_axes_have_round_numbers(low: float, high: float, texts: list[str]) -> None:
    assert [text for _, text in ticks(low, high)] == texts
    assert all(low - 1e-9 <= value <= high + 1e-9 for value, _ in ticks(low, high))


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.4, 1.0, 0.0149], ["0.40", "1.00", "0.01"]),
        ([-1.1, -0.741, math.nan], ["\N{MINUS SIGN}1.10", "\N{MINUS SIGN}0.74", "nan"]),
        ([1234.5, 2.0], ["1,234", "2"]),
        ([2e-5, -3e-6], ["0.0000200", "\N{MINUS SIGN}0.0000030"]),
        ([0.0], ["0.00"]),
    ],
)
def test_scores_of_a_reward_have_the_same_decimals(values: list[float], texts: list[str]) -> None:
    """As many as show three digits of the largest one."""
    assert [score_text(value, places_for(values)) for value in values] == texts


@pytest.mark.parametrize("scale", [1, 8])
def test_images_of_other_shapes_keep_their_shape(scale: int, tmp_path: Path) -> None:
    """Also as thumbnails; in a grid with an empty cell in its last row."""
    grid = Image.new("RGB", (3 * 24 * scale, 2 * 16 * scale))
    grid.save(tmp_path / "grid.png")
    embedded = embed_grid(tmp_path / "grid.png", columns=3, num_cells=5)
    assert embedded.ratio == 1.5
    assert embedded.is_pixelated == (scale == 1)


def test_a_curve_has_a_description_for_screen_readers() -> None:
    chart = Chart("oracle", "", training=[(1.0, 0.25, 0.0), (9.0, 0.5, 0.0)], evaluation=[(10.0, 0.75, 0.1)])
    description = (
        "oracle: training images from 0.25 at update 1 to 0.5 at 9; evaluations from 0.75 at update 10 to 0.75 at 10"
    )
    assert f'aria-label="{description}"' in draw(chart)


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page() -> Iterator[browser.Browser]:
    if not (browser.CHROMIUM and browser.DRIVER):
        pytest.skip(browser.MISSING)
    with browser.chromium() as page:
        yield page


def test_the_slider_shows_all_evaluations_on_any_screen(tmp_path: Path, page: browser.Browser) -> None:
    wide = {
        "clip:someone/a-reward-with-a-long-name": 0.5,
        "clip:someone/a-reward-with-a-long-name/standard_error": 0.01,
    }
    run_folder(tmp_path, [row | wide if row["kind"] == "evaluation" else row for row in evaluated_run(tmp_path)])
    address = write_report(tmp_path).as_uri()
    shots = Path(os.environ.get("SCREENSHOTS", tmp_path))
    shown = "return getComputedStyle(document.querySelector('.now')).backgroundImage"
    background = "return getComputedStyle(document.body).backgroundColor"
    caption = "return document.getElementById('caption').textContent"
    page.emulate(width=1200, height=800)
    page.open(address)
    last, light = page.run(shown), page.run(background)
    assert page.run(caption).startswith("after update 20, oracle 2.000")
    page.run("document.getElementById('step').focus()")
    page.press("left")
    assert page.run(caption).startswith("after update 10, oracle 1.000")
    assert page.run("return document.getElementById('step').getAttribute('aria-valuetext')") == page.run(caption)
    assert page.run("return document.querySelector('.now').ariaLabel") == "after update 10: image 0, does not pass"
    middle = page.run(shown)
    page.press("left")
    first = page.run(shown)
    assert len({first, middle, last}) == 3
    assert first == page.run("return getComputedStyle(document.querySelector('.before')).backgroundImage")
    page.press("right", "right")
    assert page.run(shown) == last
    page.screenshot(shots / "report_light.png")
    page.emulate(width=360, height=740, dark=True)
    page.open(address)
    page.run("for (const one of document.querySelectorAll('details')) one.open = true")
    # A phone zooms out to fit a page that is too wide, so innerWidth alone would not reveal it.
    assert page.run("return [document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    assert page.run(background) != light
    page.screenshot(shots / "report_dark_phone.png")
    assert page.console() == []
    page.run("const s = document.createElement('script'); s.textContent = 'x = 1'; document.body.append(s)")
    assert page.run("return typeof x") == "undefined", "the security policy must block other scripts"


def test_without_its_script_the_page_shows_before_and_after(tmp_path: Path, page: browser.Browser) -> None:
    evaluated_run(tmp_path)
    report = write_report(tmp_path)
    bare = re.sub(r"<script>.*?</script>", "", report.read_text(encoding="utf-8"), flags=re.S)
    report.write_text(bare, encoding="utf-8")
    page.open(report.as_uri())
    assert page.run("return getComputedStyle(document.getElementById('slider')).display") == "none"
    labels = page.run("return [...document.querySelectorAll('.cells > span')].slice(0, 2).map(one => one.ariaLabel)")
    assert labels == ["before training: image 0, does not pass", "after update 20: image 0, does not pass"]
    assert page.run("return document.querySelectorAll('.extreme-image').length") == 4 * 6, (
        "best and worst by two rewards"
    )
