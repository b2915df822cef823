"""Every page in a real browser: nothing beyond its card, AA contrast, no console error, on screens and on paper."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from recipes import compare
from reward_model.attention import AttentionMap
from reward_model.backbones.token_boxes import grid_boxes
from reward_model.benchmarks.breakdown import break_down
from reward_model.benchmarks.evaluation import RecordScores, record_metrics, worst_mistakes
from reward_model.benchmarks.report import render_report
from reward_model.types import PreferencePair
from rlhf_t2i.report.overview import create_app
from rlhf_t2i.report.page import write_report
from rlhf_t2i.report.reward_model import write_report as write_reward_model_report
from rlhf_t2i.training.evaluation import Evaluation, save_evaluation
from tests import browser
from tests.layout import problems
from tests.report_files import RUN_INFO, Row, evaluation, plain, run_folder, train
from tests.servers import running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason=browser.MISSING),
]
TRAINED = "llava_reward:runs/a-reward-model-whose-name-is-long"
NAMES = [f"ddpo-with-a-name-of-thirty-char{i}" for i in range(8)]
SCREENS = [
    (1280, 800, False, "screen"),
    (1280, 800, True, "screen"),
    (390, 844, True, "screen"),
    (720, 1000, False, "print"),
]


def hacked_run(folder: Path, *, end: float = 0.1) -> Path:
    """A run of 16 updates whose trained reward rises throughout, and whose oracle falls to `end` after update 8."""
    (folder / "images").mkdir(parents=True)
    rows: list[Row] = []
    for step, trained, oracle in ((0, -1.0, 0.4), (8, 0.5, 0.6), (16, 2.0, end)):
        images = torch.full((16, 3, 8, 8), step / 16)
        images[:, 1] = torch.arange(16)[:, None, None] / 16
        spread = torch.arange(16) / 160
        scores = {TRAINED: trained + spread, "oracle": oracle + spread, "oracle_pass": (torch.arange(16) < 9).float()}
        prompts = [f"<b>a red circle</b> beside_a_word_of_thirty_letters_{i % 4}" for i in range(16)]
        save_evaluation(Evaluation(prompts, list(range(16)), images, scores), folder, step=step)
        means = evaluation(step, trained, 0.02, elapsed=10.0 * step, name=TRAINED) | {"num_images": 16}
        rows.append(means | {"oracle": oracle, "oracle/standard_error": 0.02})
        updates = {"kl": 1e-6 * step, "loss": -1e-4, "learning_rate": 3e-4, "gradient_norm": 0.3, "clip_range": 1e-3}
        rows += [
            train(i, elapsed=10.0 * i, reward=trained, name=TRAINED, **updates)
            for i in range(step + 1, step + 9)
            if i <= 16
        ]
    return run_folder(
        folder,
        rows,
        config="model: shapes\nnum_steps: 16\nkl_weight: 0.0\nlearning_rate: 0.0003\nlora_rank: 4\nseed: 1\n",
    )


def reward_model_run(folder: Path) -> Path:
    folder.mkdir()
    history = [{"step": step, "accuracy": 0.5 + step / 100, "eval_accuracy": 0.6, "loss": 0.7} for step in (1, 10, 20)]
    run_folder(folder, [], run={**RUN_INFO, "recipe": "reward_model"}, config="backbone: a/backbone-with-a-long-name\n")
    (folder / "history.json").write_text(json.dumps(history))
    metric = {"name": "accuracy over_a_long_subset_of_the_data", "value": 0.75, "low": 0.5, "high": 0.9, "count": 1200}
    (folder / "metrics.json").write_text(json.dumps({"a data set": [metric | {"note": "a note of many words " * 6}]}))
    return folder


def reward_model_evaluation(folder: Path) -> Path:
    """The page of a reward model with long names of tags, mistakes of two sizes of images, and maps of attention."""
    folder.mkdir()
    for name, size in (("wide", (300, 150)), ("tall", (24, 32))):
        Image.new("RGB", size, "teal").save(folder / f"{name}.png")
    images = folder / "wide.png", folder / "tall.png"
    prompts = [f"<b>a red circle</b> beside_a_word_of_thirty_letters_{i}" for i in range(60)]
    generators = [f"a-generator-with-a-name-of-fifty-characters-and-a-number-{i}" for i in range(15)]
    pairs = [
        PreferencePair(*images, text, text if i % 3 else "another", rating_gap=1.0 + i % 4, where=f"pairs.jsonl:{i}",
                       tags={"tier": ("one" if i < 40 else "binding",), "generator": (generators[i % 15],)})
        for i, text in enumerate(prompts)
    ]  # fmt: skip
    logits = torch.linspace(6, -6, 60)
    scores = RecordScores(pairs, logits, -logits, [], torch.zeros(0), logits, torch.zeros(60))
    found = AttentionMap(torch.arange(8) / 28, grid_boxes(2, 4).flatten(0, 1))
    mistakes = [replace(one, maps=(found, found)) for one in worst_mistakes(scores, count=6)]
    page = render_report(
        TRAINED, {"a data set": record_metrics(scores)}, {"a data set": mistakes}, {"a data set": break_down(scores)}
    )
    (folder / "report.html").write_text(page)
    return folder / "report.html"


@pytest.fixture(scope="module")
def page() -> Iterator[browser.Browser]:
    with browser.chromium() as page:
        yield page


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Each page with eight runs and long names; one of the runs is half written."""
    root = tmp_path_factory.mktemp("runs")
    folders = [hacked_run(root / name, end=0.1 + i / 10) for i, name in enumerate(NAMES)]
    reports = [write_report(folder) for folder in folders]
    output = root / "comparison.html"
    compare.main(compare.Config(runs=",".join(map(str, folders)), output=str(output)))
    reward_model = write_reward_model_report(reward_model_run(root / "reward-model"))
    evaluated = reward_model_evaluation(root / "reward-model-evaluation")
    (root / "half-written").mkdir()
    (root / "half-written" / "run.json").write_text('{"recipe": "dd')
    with running(create_app(root)) as address:
        yield {
            "run": reports[0].as_uri(), "comparison": output.as_uri(), "reward_model": reward_model.as_uri(),
            "overview": address, "evaluation": evaluated.as_uri(),
        }  # fmt: skip


def emulate(page: browser.Browser, width: int, height: int, dark: bool, medium: str) -> None:
    page.emulate(width=width, height=height, dark=dark)
    features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    media = {"media": "print" if medium == "print" else "", "features": features}
    page.call("goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params=media)


@pytest.mark.parametrize("name", ["run", "comparison", "reward_model", "evaluation", "overview"])
def test_nothing_is_clipped_and_all_text_has_contrast(
    name: str, addresses: dict[str, str], page: browser.Browser, tmp_path: Path
) -> None:
    shots = Path(os.environ.get("SCREENSHOTS", tmp_path))
    for width, height, dark, medium in SCREENS:
        emulate(page, width, height, dark, medium)
        page.open(addresses[name])
        page.run("for (const one of document.querySelectorAll('details')) one.open = true")
        page.screenshot(shots / f"{name}_{width}_{'dark' if dark else 'light'}.png")
        assert problems(page) == [], (width, dark, medium)
    assert page.console() == []


def test_the_first_screen_of_a_hacked_run_says_what_went_wrong(
    addresses: dict[str, str], page: browser.Browser
) -> None:
    """In its first 800 pixels: reward hacking, both rewards with their numbers and their curves, and what to do."""
    emulate(page, 1280, 800, dark=False, medium="screen")
    page.open(addresses["run"])
    bottom = "document.querySelector('{}').getBoundingClientRect().bottom"
    tops = page.run(
        f"return [{', '.join(bottom.format(one) for one in ('.summary.headline', '.finding', '.first svg'))}]"
    )
    assert tops == sorted(tops, key=lambda y: y > 800)
    assert max(tops) <= 800
    summary = page.run("return document.querySelector('.summary').textContent")
    assert summary == f"Reward hacking or overfitting: {TRAINED} rose, but the held-out oracle fell."
    finding = plain(page.run("return document.querySelector('.finding').innerText"))
    assert "oracle went from 0.600 ± 0.020 to 0.100 ± 0.020" in finding
    assert "--kl_weight" in finding
    assert f"run {NAMES[0]}" in page.run("return document.title")


def test_images_enlarge_and_charts_show_values_by_pointer_and_keys(
    addresses: dict[str, str], page: browser.Browser
) -> None:
    emulate(page, 1280, 800, dark=False, medium="screen")
    page.open(addresses["run"])
    page.run("document.querySelector('.cells.zoom').click()")
    shown = "document.querySelector('#large {}')"
    assert page.run(f"return {shown.format('figcaption')}.innerText").startswith("<b>a red circle</b>")
    assert "(seed 4)" in plain(page.run(f"return {shown.format('figcaption')}.innerText"))
    assert page.run(f"return {shown.format('.frame > span')}.getBoundingClientRect().width") > 300
    assert problems(page) == []
    first = page.run(f"return {shown.format('figcaption')}.innerText")
    page.press("right")
    assert page.run(f"return {shown.format('figcaption')}.innerText") != first
    page.press("\ue00c")  # Escape
    assert not page.run("return document.getElementById('large').open")
    assert page.run("return document.activeElement.matches('button.zoom')"), "the keyboard goes on where it was"

    page.run("document.querySelector('.first svg').focus({focusVisible: true})")
    page.press("left")
    values = "return document.querySelector('.first .values').textContent"
    assert page.run(values).startswith(f"update 8: {TRAINED} ")
    assert "oracle" in page.run(values)
    page.press("right")
    assert page.run(values).startswith("update 16:")


def test_maps_of_attention_cover_their_image_and_can_be_switched_off(
    addresses: dict[str, str], page: browser.Browser
) -> None:
    emulate(page, 1280, 800, dark=False, medium="screen")
    page.open(addresses["evaluation"])
    boxes = page.run(
        "return [...document.querySelectorAll('.frame')].map((frame) => [...frame.querySelectorAll('img')]"
        ".map((one) => [one.getBoundingClientRect().toJSON(), one.naturalWidth / one.naturalHeight]))"
    )
    assert len(boxes) == 12
    assert all(image == overlay for image, overlay in boxes), "the same place, and the same shape within it"
    shown = "return getComputedStyle(document.querySelector('img.map')).visibility"
    assert page.run(shown) == "visible"
    page.run("document.querySelector('.maps').focus()")
    page.press(" ")
    assert page.run(shown) == "hidden"
    assert "Clearly worse" in page.run("return document.body.innerText")
    assert page.run("return document.querySelectorAll('summary').length") == 1, "three of fifteen generators are folded"


def test_the_overview_shows_a_half_written_run_and_links_to_the_others(
    addresses: dict[str, str], page: browser.Browser
) -> None:
    page.open(addresses["overview"])
    text = page.run("return document.body.innerText")
    assert "half-written" in text
    assert "Not readable" in text
    page.run("document.querySelector(\"a[href$='char3']\").click()")
    page.until("document.querySelector('.summary, .headline')")
    assert page.run("return document.title").endswith(f"run {NAMES[3]}")
    page.open(f"{addresses['overview']}/run/..%2f..%2fetc%2fpasswd")
    assert "There is no run of this name" in page.run("return document.body.innerText")
    page.console()
