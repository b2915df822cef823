"""The report says what the metrics say, and no more; and the page stands alone."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from PIL import Image

from rlhf_t2i.report import Chart, charts, draw, write_report
from rlhf_t2i.report.overview import create_app, summary
from rlhf_t2i.training.changes import before_after, compare, headline, reward_changes, reward_hacking_gap
from rlhf_t2i.training.metrics import read_metrics, time_split
from tests.report_files import (
    COLOURS,
    HACKED,
    RUN_INFO,
    Page,
    Row,
    add_images,
    evaluation,
    plain,
    run_folder,
    train,
    two_rewards,
    two_updates,
)
from tests.servers import running


def page_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def test_headline_has_the_numbers_computed_by_hand() -> None:
    """0.6 - 0.4 = 0.2; sqrt(0.03^2 + 0.04^2) = 0.05; 0.2 / 0.05 = 4. The update after the evaluation is not counted."""
    rows = [*two_updates(before=0.4, after=0.6), train(3, elapsed=121.0)]
    assert headline(rows) == (
        "oracle on the evaluation prompts rose from 0.400 ± 0.030 to 0.600 ± 0.040 "
        "(+0.200, 4.0 standard errors) in 2 updates, 384 images and 1.5 minutes"
    )


def test_the_page_contains_the_headline(tmp_path: Path) -> None:
    rows = two_updates(before=0.4, after=0.6)
    assert f"{headline(rows)}." in plain(Page(page_of(run_folder(tmp_path, rows))).text)


def test_a_run_that_stopped_early_is_told_by_its_exported_weights_and_checked_to_its_end(tmp_path: Path) -> None:
    """The headline, the table and the images have the best evaluation; the fall after it is still a warning."""
    rows = [
        *HACKED,
        two_rewards(30, trained=5.5, oracle=0.1),
        {"kind": "export", "step": 10, "elapsed": 31.0},
    ]
    assert "rose from 1.00 ± 0.10 to 3.00 ± 0.10" in headline(rows)
    assert [change.after for change in reward_changes(rows)] == ["3.00 ± 0.10", "0.650 ± 0.025"]
    assert before_after(rows).endswith("400 evaluation images; 10 steps, 192 training images, 0.2 minutes")
    add_images(run_folder(tmp_path, rows, config="evaluate_every: 10\n"), ["a red circle"], steps=(0, 10, 20, 30))
    page = plain(page_of(tmp_path))
    assert "From update 10 to 30 oracle went from 0.650" in page
    assert '<output id="caption" for="step">after update 10 (exported), llava_reward 3.00' in page
    assert 'value="1"' in page  # of the slider


def test_a_fall_is_called_a_fall() -> None:
    sentence = headline(two_updates(before=0.6, after=0.4))
    assert "fell from 0.600 ± 0.030 to 0.400 ± 0.040 (-0.200, 4.0 standard errors)" in sentence
    assert "rose" not in sentence


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (0.544, "went from 0.400 ± 0.030 to 0.544 ± 0.040 (+0.144, 2.9 standard errors: within noise)"),
        (0.256, "went from 0.400 ± 0.030 to 0.256 ± 0.040 (-0.144, 2.9 standard errors: within noise)"),
        (0.556, "rose from 0.400 ± 0.030 to 0.556 ± 0.040 (+0.156, 3.1 standard errors)"),
    ],
)
def test_under_three_standard_errors_is_within_noise(after: float, expected: str) -> None:
    assert expected in headline(two_updates(before=0.4, after=after))


@pytest.mark.parametrize("error", [0.0, math.nan])
def test_without_a_standard_error_no_direction_is_claimed(error: float) -> None:
    """As with a single image, or images with equal scores."""
    before, after = evaluation(0, 0.0, error, elapsed=1.0), evaluation(5, 1.0, error, elapsed=2.0)
    change = compare("oracle", before, after)
    assert (change.verb, change.z_text) == ("went", "unknown")


def test_numbers_are_rounded_to_the_second_digit_of_their_error() -> None:
    before, after = evaluation(0, -12.3456, 3.0, elapsed=1.0), evaluation(5, -1.2345, 4.0, elapsed=2.0)
    change = compare("oracle", before, after)
    assert (change.before, change.after, change.difference) == ("-12.3 ± 3.0", "-1.2 ± 4.0", "+11.1")


def test_an_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    rows = two_updates(before=0.4, after=0.6)
    complete = page_of(run_folder(tmp_path, rows))
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(train(3, elapsed=121.0))[:-9])
    assert read_metrics(tmp_path) == rows
    assert page_of(tmp_path) == complete


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "No evaluation has finished yet"),
        ([train(1, elapsed=31.0)], "No evaluation has finished yet"),
        (
            [evaluation(0, 0.4, 0.03, elapsed=12.0)],
            "oracle on the evaluation prompts is 0.400 ± 0.030 at update 0",
        ),
    ],
)
def test_a_run_that_has_just_started_has_a_valid_page(tmp_path: Path, rows: list[Row], sentence: str) -> None:
    run = {name: value for name, value in RUN_INFO.items() if name != "trainable_parameters"}
    page = Page(page_of(run_folder(tmp_path, rows, run=run)))
    assert sentence in plain(page.text)
    assert "No images yet" in page.text
    assert ("svg" in page.tags) == bool(rows)


def test_a_single_evaluation_shows_one_image_per_prompt(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, [evaluation(0, 0.4, 0.03, elapsed=12.0)])
    add_images(folder, ["a red square"] * 4, steps=(0,))
    page = page_of(folder)
    assert page.count('aria-label="before training: a red square"') == 4
    assert 'aria-label="after' not in page
    assert 'id="slider"' not in page


def test_user_text_is_escaped(tmp_path: Path) -> None:
    evil = "</style></pre><script>alert('&')</script>"
    run = {
        **RUN_INFO,
        "recipe": evil,
        "command": evil,
        "git_commit": evil,
        "device": evil,
        "versions": {evil: evil},
    }
    rows = [evaluation(step, 0.5, 0.01, elapsed=1.0 + step, name=evil) for step in (0, 4)]
    folder = run_folder(tmp_path, rows, run=run, config=f"prompt: {evil}\n")
    add_images(folder, [evil] * 4, steps=(0, 4))
    page = page_of(folder)
    assert page.count("<script") == Page(page).tags.count("script") == 1, "the slider's"
    assert f"prompt: {evil}" in Page(page).text


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, two_updates(before=0.4, after=0.6))
    add_images(folder, ["a red square"] * 6, steps=(0, 2))
    page = page_of(folder)
    assert not Page(page).links
    assert not {"link", "iframe", "object", "img"} & set(Page(page).tags)
    assert {url[:22] for url in re.findall(r"url\(([^)]*)", page)} == {"data:image/png;base64,"}
    assert "://" not in page
    assert "@import" not in page


def test_the_security_policy_allows_the_slider_script_only(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, two_updates(before=0.4, after=0.6))
    add_images(folder, ["a red square"] * 6, steps=(0, 2))
    page = page_of(folder)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_the_images_of_every_evaluation_are_embedded(tmp_path: Path) -> None:
    """Except step 1: after a resume from an earlier checkpoint its evaluation is not in the metrics any more."""
    folder = run_folder(tmp_path, two_updates(before=0.4, after=0.6))
    first, _, last = add_images(folder, ["a red square"] * 6, steps=(0, 1, 2))
    embedded = re.findall(r"base64,([^)]*)\)", page_of(folder))
    assert [base64.b64decode(text) for text in embedded] == [first.read_bytes(), last.read_bytes()]


@pytest.mark.parametrize("num_cells", [4, 6])
def test_each_caption_is_below_its_own_image(tmp_path: Path, num_cells: int) -> None:
    """CSS puts x% of the grid at x% of the box, so a cell begins at x% of (grid - cell)."""
    folder = run_folder(tmp_path, two_updates(before=0.4, after=0.6))
    (path,) = add_images(folder, [f"image {i}" for i in range(num_cells)], steps=(0,))
    page = page_of(folder)
    assert re.search(r"background-size:\s*300% 200%", page)
    shown = re.findall(r"background-position: (\S+)% (\S+)%.*?<figcaption>image (\d) \(seed&nbsp;(\d+)\)", page, re.S)
    with Image.open(path) as grid:
        for i, (x, y, number, seed) in enumerate(shown):
            corner = round(float(x) / 100 * (24 - 8)), round(float(y) / 100 * (16 - 8))
            assert (int(number), int(seed)) == (i, 100 + i)
            assert grid.getpixel(corner) == COLOURS[i]
    assert len(shown) == num_cells


def test_the_time_split_sums_to_the_elapsed_time() -> None:
    """2 updates of 10 + 1 + 20 seconds in 90 seconds: 28 seconds remain for evaluations."""
    split = time_split(two_updates(before=0.4, after=0.6))
    assert split == {"rollout": 20.0, "reward": 2.0, "update": 40.0, "evaluation and the rest": 28.0}


def test_curves_are_at_the_positions_of_their_numbers() -> None:
    """The plot spans x from 50 to 350, and y from 166 (lowest value) up to 16 (highest error bar)."""
    line, dot = [(0.0, 0.0, 0.0), (5.0, 0.5, 0.0), (10.0, 1.0, 0.0)], (10.0, 0.75, 0.25)
    svg = draw(Chart("oracle", "", training=line, evaluation=[dot]))
    assert 'class="training" d="M50.0 166.0L200.0 91.0L350.0 16.0h0"' in svg
    assert 'class="evaluation" d="M350.0 91.0L350.0 16.0"' in svg
    assert 'class="evaluation dot" d="M350.0 53.5h0"' in svg


def test_each_reward_has_a_training_and_an_evaluation_curve() -> None:
    rows = [evaluation(0, 0.4, 0.03, elapsed=12.0), train(1, elapsed=43.0, reward=0.7)]
    oracle = charts(rows)[0]
    assert (oracle.title, oracle.training, oracle.evaluation) == ("oracle", [(1, 0.7, 0)], [(0, 0.4, 0.03)])


@pytest.mark.parametrize("kl", [None, 1e-5])
def test_kl_is_drawn_if_it_was_logged(kl: float | None) -> None:
    rows = [train(1, elapsed=31.0) if kl is None else train(1, elapsed=31.0, kl=kl)]
    titles = [chart.title for chart in charts(rows)]
    assert ("KL divergence" in titles) == (kl is not None)
    assert "diversity" not in titles


def test_a_repeated_step_is_drawn_once_but_its_images_count_twice() -> None:
    """A resumed run repeats the steps after its last checkpoint."""
    rows = two_updates(before=0.4, after=0.6)
    again = [*rows[:3], train(2, elapsed=80.0, reward=0.9), rows[3]]
    assert charts(again)[0].training == [(1, 0.5, 0), (2, 0.9, 0)]
    assert "in 2 updates, 576 images" in headline(again)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run"):
        write_report(tmp_path)


def test_the_command_line_writes_the_page_without_torch(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, two_updates(before=0.4, after=0.6))
    run = "import runpy, sys; runpy.run_module('rlhf_t2i.report', run_name='__main__')"
    command = [sys.executable, "-c", f"{run}; assert 'torch' not in sys.modules", "--runs", str(folder)]
    output = subprocess.check_output(command, cwd=Path(__file__).parents[1], text=True)
    assert output.strip() == str(folder / "report.html")


# --- reward hacking -------------------------------------------------------------------------------


def test_gains_are_in_standard_deviations_of_the_first_images() -> None:
    gap = reward_hacking_gap(HACKED)
    assert gap is not None
    assert (gap.trained, gap.held_out) == ("llava_reward", "oracle")
    error = 2**0.5 * 0.05  # of the difference of two means of 400 images, in standard deviations
    assert gap.trained_gains == [(0, 0, 0), pytest.approx((10, 1.0, error)), pytest.approx((20, 2.0, error))]
    assert gap.held_out_gains == [(0, 0, 0), pytest.approx((10, 0.5, error)), pytest.approx((20, 0.2, error))]
    assert "gap of +1.80" in gap.sentence


def test_the_gap_is_drawn_and_stated(tmp_path: Path) -> None:
    drawn = charts(HACKED)
    assert [chart.title for chart in drawn[:2]] == ["gain of llava_reward and oracle", "gap"]
    assert [round(y, 6) for _, y, _ in drawn[1].evaluation] == [0.0, 0.5, 1.8]
    assert "a gap of +1.80" in page_of(run_folder(tmp_path, HACKED))


@pytest.mark.parametrize("missing", ["llava_reward", "oracle"])
def test_without_both_kinds_of_reward_there_is_no_gap(missing: str) -> None:
    rows = [{key: value for key, value in row.items() if not key.startswith(missing)} for row in HACKED]
    assert reward_hacking_gap(rows) is None
    assert all(chart.title != "gap" for chart in charts(rows))


def test_a_run_that_trains_nothing_is_listed_and_its_page_is_the_one_in_its_folder(tmp_path: Path) -> None:
    """Such as an evaluation of a reward model; it was called a training in its beginning, "So far"."""
    folder = tmp_path / "evaluated"
    folder.mkdir()
    run_folder(folder, [], run={**RUN_INFO, "recipe": "reward_model_evaluation"})
    row = summary("evaluated", folder)
    assert (row.state, row.has_page, row.error) == ("Ended", False, "")
    (folder / "report.html").write_text("<p>its own page</p>")
    assert summary("evaluated", folder).has_page
    with running(create_app(tmp_path)) as address, httpx.Client(base_url=address, trust_env=False) as client:
        assert client.get("/run/evaluated").text == "<p>its own page</p>"
        assert 'href="/run/evaluated"' in client.get("/").text
        (folder / "report.html").unlink()
        assert client.get("/run/evaluated").status_code == 404
        assert "href" not in client.get("/").text
