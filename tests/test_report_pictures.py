"""What an evaluation leaves in the run folder, and how the page shows it: through training, the best and the worst."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from rlhf_t2i.report.charts import Chart, draw, ticks
from rlhf_t2i.report.images import MAX_STRIPS, best_and_worst, read_sheet, spread, through_training
from rlhf_t2i.report.page import flags, typeset, write_report
from rlhf_t2i.training.evaluation import Evaluation, diversity, extremes, save_evaluation
from tests import browser
from tests.test_report import Page, Row, add_images, evaluation, plain, run_folder, train, two_updates

SIDE = 8
TRAINED = train(1, elapsed=30.0)


def seen(num: int, *, shade: float = 0.0) -> Evaluation:
    """Image i has i / 255 in red, the shade in green; the oracle likes late ones, pass is 1 for the last three."""
    images = torch.zeros(num, 3, SIDE, SIDE)
    images[:, 0] = torch.arange(num)[:, None, None] / 255
    images[:, 1] = shade
    scores = {"oracle": torch.arange(num) / 10, "pass": (torch.arange(num) >= num - 3).float()}
    return Evaluation([f"image {i}" for i in range(num)], [100 + i for i in range(num)], images, scores)


def looked_at(folder: Path, *, num: int = 40, steps: tuple[int, ...] = (0, 10, 20)) -> list[Row]:
    """A run folder with the images of its evaluations, as a run leaves them; returns its rows."""
    (folder / "images").mkdir()
    for step in steps:
        save_evaluation(seen(num, shade=step / 100), folder, step=step)
    means = [{**evaluation(step, step / 10, 0.01, elapsed=1.0 + step), "num_images": num} for step in steps]
    rows = [means[0], TRAINED, *means[1:]]
    run_folder(folder, rows)
    return rows


# --- what an evaluation leaves --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "count", "best", "worst"),
    [
        ([0.1, 0.9, 0.5, 0.7], 2, [1, 3], [0, 2]),
        ([0.1, 0.9, 0.5, 0.7, 0.6], 6, [1, 3], [0, 2]),  # none is on both sides
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 1], [2, 3]),  # of equal ones the earliest
        ([0.3, 0.4], 6, [1], [0]),
    ],
)
def test_the_utmost_images_come_in_order(scores: list[float], count: int, best: list[int], worst: list[int]) -> None:
    assert extremes(torch.tensor(scores), count=count) == (best, worst)


def test_every_score_of_an_evaluation_is_written_down(tmp_path: Path) -> None:
    save_evaluation(seen(40), tmp_path, step=10)
    told = json.loads((tmp_path / "images" / "step_000010.json").read_text())
    assert told["scores"]["pass"] == [0.0] * 37 + [1.0] * 3
    assert told["scores"]["oracle"] == pytest.approx([i / 10 for i in range(40)])
    assert (told["prompts"][39], told["seeds"][39]) == ("image 39", 139)


def test_only_the_last_evaluation_keeps_its_utmost_images(tmp_path: Path) -> None:
    for step in (0, 10):
        save_evaluation(seen(40), tmp_path, step=step)
    assert {path.name for path in (tmp_path / "images").glob("extremes*")} == {"extremes_000010.png", "extremes.json"}
    assert len(list((tmp_path / "images").glob("step_*.png"))) == 2


def test_diversity_and_its_error_by_hand() -> None:
    """Two prompts, whose images lie 0.2 and 0.6 apart at every pixel: 0.4 ± 0.283 / sqrt(2) = 0.2."""
    values = torch.tensor([0.1, 0.3, 0.2, 0.8])
    images = values[:, None, None, None].expand(4, 3, 32, 32)
    assert diversity(images, ["a", "a", "b", "b"]) == pytest.approx((0.4, 0.2), abs=1e-6)
    assert diversity(images[:2], ["a", "a"]) == (pytest.approx(0.2, abs=1e-6), None)
    assert diversity(images, ["a", "b", "c", "d"]) == (0.0, None)


# --- what the page makes of it --------------------------------------------------------------------


def test_of_many_evaluations_a_part_is_shown_evenly_spread() -> None:
    rows: list[Row] = [{"step": step} for step in range(100)]
    shown = [row["step"] for row in spread(rows, most=MAX_STRIPS)]
    assert (len(shown), shown[0], shown[-1]) == (MAX_STRIPS, 0, 99)
    assert {b - a for a, b in pairwise(shown)} == {4, 5}
    assert spread(rows[:MAX_STRIPS], most=MAX_STRIPS) == rows[:MAX_STRIPS]


def test_each_strip_has_the_step_and_the_means_of_its_evaluation(tmp_path: Path) -> None:
    through = through_training(tmp_path / "images", looked_at(tmp_path))
    assert through is not None
    assert [strip.when for strip in through.strips] == ["before training", "after update 10", "after update 20"]
    assert [strip.verdict for strip in through.strips] == [f"oracle {n} ± 0.010" for n in ("0.000", "1.000", "2.000")]
    assert through.cells[:2] == [("image 0", 100), ("image 1", 101)]
    assert len(through.cells) == 32


def strip_of_large_images(path: Path, *, step: int) -> None:
    """Four of 400 pixels in rows of three; the red of an image is `step` times its number."""
    strip = Image.new("RGB", (3 * 400, 2 * 400), "white")
    for cell in range(4):
        left, top = cell % 3 * 400, cell // 3 * 400
        strip.paste((step * cell, 0, 0), (left, top, left + 400, top + 400))
    strip.save(path)


def test_large_images_become_thumbnails_that_do_not_run_into_one_another(tmp_path: Path) -> None:
    strip_of_large_images(tmp_path / "strip.png", step=50)
    sheet = read_sheet(tmp_path / "strip.png", columns=3, num_cells=4)
    assert (sheet.columns, sheet.rows, sheet.side, sheet.place(3)) == (3, 2, 192, (0.0, 100.0))
    data = sheet.url.removeprefix("data:image/webp;base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as small:
        assert small.size == (3 * 192, 2 * 192)
        for cell in range(4):
            for corner in (3, 188):
                pixel = small.convert("RGB").getpixel((cell % 3 * 192 + corner, cell // 3 * 192 + corner))
                assert pixel == pytest.approx((50 * cell, 0, 0), abs=10)


def test_thumbnails_are_made_once_for_each_strip(tmp_path: Path) -> None:
    """A resumed run writes a strip anew, and its images may be others."""
    path, kept = tmp_path / "strip.png", tmp_path / "strip.webp"
    strip_of_large_images(path, step=50)
    first = read_sheet(path, columns=3, num_cells=4)
    made = kept.stat().st_mtime_ns
    assert read_sheet(path, columns=3, num_cells=4) == first
    assert kept.stat().st_mtime_ns == made
    strip_of_large_images(path, step=20)
    os.utime(path, ns=(made + 1, made + 1))
    os.utime(kept, ns=(made, made))
    assert read_sheet(path, columns=3, num_cells=4) != first
    assert {one.name for one in tmp_path.iterdir()} == {"strip.png", "strip.webp"}


def test_the_best_and_the_worst_are_those_images_with_their_scores(tmp_path: Path) -> None:
    rows = looked_at(tmp_path)
    utmost = best_and_worst(tmp_path / "images", rows)
    assert utmost is not None
    sheet, (oracle, passed) = utmost
    assert (oracle.reward, oracle.trained, passed.trained) == ("oracle", True, False)
    assert [one.index for one in oracle.best] == [39, 38, 37, 36, 35, 34]
    assert [one.index for one in oracle.worst] == [0, 1, 2, 3, 4, 5]
    assert oracle.best[0].scores == {"oracle": pytest.approx(3.9), "pass": 1.0}
    assert (oracle.best[0].prompt, oracle.best[0].seed) == ("image 39", 139)
    assert (oracle.num_equal, passed.num_equal) == ((1, 1), (3, 37))
    data = base64.b64decode(sheet.url.removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(data)) as strip:
        for one in (*oracle.best, *oracle.worst, *passed.best):
            corner = [round(place / 100 * (side - SIDE)) for place, side in zip(one.place, strip.size, strict=True)]
            assert strip.getpixel((corner[0], corner[1])) == (one.index, 51, 0)


def test_utmost_images_of_an_evaluation_that_is_forgotten_are_not_shown(tmp_path: Path) -> None:
    """A run that goes on from step 10 has no evaluation of step 20 any more."""
    rows = looked_at(tmp_path)
    assert best_and_worst(tmp_path / "images", rows[:-1]) is None


def test_a_folder_of_an_earlier_version_has_a_page_without_them(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, two_updates(before=0.4, after=0.6))
    add_images(folder, ["a red square"] * 6, steps=(0, 2))
    page = write_report(folder).read_text(encoding="utf-8")
    assert "The best and the worst" not in page


def test_warnings_come_first_and_what_is_fine_is_said(tmp_path: Path) -> None:
    rows = two_updates(before=0.4, after=0.6)
    text = Page(write_report(run_folder(tmp_path, rows)).read_text(encoding="utf-8")).text
    assert "Nothing to warn of" in text
    assert "Images of one prompt still differ" in text
    collapsed = [*rows[:-1], {**rows[-1], "diversity": 0.01}]
    text = Page(write_report(run_folder(tmp_path, collapsed)).read_text(encoding="utf-8")).text
    assert "1 warning\n" in text
    assert "Diversity went from 0.310 to 0.010, 3% of what it was" in plain(text)
    assert text.index("Diversity has collapsed") < text.index("Also checked") < text.index("Before and after")


def test_settings_are_set_apart_and_all_else_is_escaped() -> None:
    assert flags("a lower --kl_weight <b>") == "a lower <code>--kl_weight</code> &lt;b&gt;"


@pytest.mark.parametrize(("value", "middle"), [(0.4, "91.0"), (-2.0, "91.0"), (0.0, "166.0")])
def test_a_flat_line_lies_on_an_axis_with_zero(value: float, middle: str) -> None:
    """The plot spans y from 166 up to 16: [0, 0.8], [-4, 0], and [0, 1] for zero itself."""
    drawn = draw(Chart("flat", "", training=[(0.0, value, 0.0), (1.0, value, 0.0)], evaluation=[]))
    assert f'd="M50.0 {middle}L350.0 {middle}h0"' in drawn


def test_numbers_are_typeset_and_words_are_not() -> None:
    assert typeset("held-out a-1: -0.5 ± 0.1, 1e-05") == "held-out a-1: \N{MINUS SIGN}0.5\xa0±\xa00.1, 1e-05"


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0.0, 1.0, ["0.0", "0.5", "1.0"]),
        (0.437, 0.81, ["0.5", "0.6", "0.7", "0.8"]),
        (0.0002, 0.0004, ["0.00020", "0.00025", "0.00030", "0.00035", "0.00040"]),
        (-1.07, -0.2, ["\N{MINUS SIGN}1.0", "\N{MINUS SIGN}0.5"]),
        (0.0, 40000.0, ["0", "10,000", "20,000", "30,000", "40,000"]),
        (1e-6, 5e-6, ["1e\N{MINUS SIGN}06", "2e\N{MINUS SIGN}06", "3e\N{MINUS SIGN}06", "4e\N{MINUS SIGN}06",
                      "5e\N{MINUS SIGN}06"]),
    ],
)  # fmt: skip
def test_axes_have_round_numbers(low: float, high: float, texts: list[str]) -> None:
    assert [text for _, text in ticks(low, high)] == texts
    assert all(low - 1e-9 <= value <= high + 1e-9 for value, _ in ticks(low, high))


def test_a_curve_can_be_heard() -> None:
    chart = Chart("oracle", "", training=[(1.0, 0.25, 0.0), (9.0, 0.5, 0.0)], evaluation=[(10.0, 0.75, 0.1)])
    heard = (
        "oracle: training images from 0.25 at update 1 to 0.5 at 9; evaluations from 0.75 at update 10 to 0.75 at 10"
    )
    assert f'aria-label="{heard}"' in draw(chart)


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page() -> Iterator[browser.Browser]:
    if not (browser.CHROMIUM and browser.DRIVER):
        pytest.skip(browser.MISSING)
    with browser.chromium() as page:
        yield page


def test_the_slider_goes_through_training_on_any_screen(tmp_path: Path, page: browser.Browser) -> None:
    wide = {"clip:someone/a-judge-of-a-long-name": 0.5, "clip:someone/a-judge-of-a-long-name/standard_error": 0.01}
    run_folder(tmp_path, [row | wide if row["kind"] == "evaluation" else row for row in looked_at(tmp_path)])
    address = write_report(tmp_path).as_uri()
    shots = Path(os.environ.get("SCREENSHOTS", tmp_path))
    shown = "return getComputedStyle(document.querySelector('.now')).backgroundImage"
    background = "return getComputedStyle(document.body).backgroundColor"
    said = "return document.getElementById('said').textContent"
    page.emulate(width=1200, height=800)
    page.open(address)
    last, light = page.run(shown), page.run(background)
    assert page.run(said).startswith("after update 20, oracle 2.000")
    page.run("document.getElementById('step').focus()")
    page.press("left")
    assert page.run(said).startswith("after update 10, oracle 1.000")
    assert page.run("return document.getElementById('step').getAttribute('aria-valuetext')") == page.run(said)
    assert page.run("return document.querySelector('.now').ariaLabel") == "after update 10: image 0"
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
    # A phone zooms out to fit what is too wide, so that innerWidth alone would hide it.
    assert page.run("return [document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    assert page.run(background) != light
    page.screenshot(shots / "report_dark_phone.png")
    assert page.console() == []
    page.run("const s = document.createElement('script'); s.textContent = 'x = 1'; document.body.append(s)")
    assert page.run("return typeof x") == "undefined", "no other script may run"


def test_without_its_script_the_page_shows_before_and_after(tmp_path: Path, page: browser.Browser) -> None:
    looked_at(tmp_path)
    report = write_report(tmp_path)
    bare = re.sub(r"<script>.*?</script>", "", report.read_text(encoding="utf-8"), flags=re.S)
    report.write_text(bare, encoding="utf-8")
    page.open(report.as_uri())
    assert page.run("return getComputedStyle(document.getElementById('slider')).display") == "none"
    labels = page.run("return [...document.querySelectorAll('.cells > span')].slice(0, 2).map(one => one.ariaLabel)")
    assert labels == ["before training: image 0", "after update 20: image 0"]
    assert page.run("return document.querySelectorAll('.one').length") == 4 * 6, "best and worst, by two rewards"
