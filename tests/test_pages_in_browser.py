"""Every page in a real browser: nothing beyond its card, AA contrast, no console error, on screens and on paper."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import browser
from tests.every_page import NAMES, TRAINED, enter, every_page, live
from tests.layout import problems
from tests.report_files import plain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason=browser.MISSING),
]
SCREENS = [
    (1280, 800, False, "screen"),
    (1280, 800, True, "screen"),
    (390, 844, False, "screen"),
    (390, 844, True, "screen"),
    (720, 1000, False, "print"),
]
PAGES = (
    "run",
    "run_tall",
    "comparison",
    "search",
    "reward_model",
    "reward_evaluation",
    "overview",
    "annotation_results",
)
ENTERED = ("annotation", "live", "live_best_of_four", "live_good_bad")


@pytest.fixture(scope="module")
def page() -> Iterator[browser.Browser]:
    with browser.chromium() as page:
        yield page


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with every_page(tmp_path_factory.mktemp("runs")) as found:
        yield found


def emulate(page: browser.Browser, width: int, height: int, dark: bool, medium: str) -> None:
    page.emulate(width=width, height=height, dark=dark)
    features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    media = {"media": "print" if medium == "print" else "", "features": features}
    page.call("goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params=media)


@pytest.mark.parametrize("name", [*PAGES, *ENTERED])
def test_nothing_is_clipped_and_all_text_has_contrast(
    name: str, addresses: dict[str, str], page: browser.Browser
) -> None:
    """The page is loaded once; SCREENSHOTS=FOLDER keeps what was seen."""
    assert set(addresses) == {*PAGES, *ENTERED}
    page.open(addresses[name])
    flaws = [("entrance", flaw) for flaw in problems(page)]
    if name in ENTERED:
        enter(page)
    page.run("for (const one of document.querySelectorAll('details')) one.open = true")
    for width, height, dark, medium in SCREENS:
        emulate(page, width, height, dark, medium)
        flaws += [((width, dark, medium), flaw) for flaw in problems(page)]
        if "SCREENSHOTS" in os.environ:
            scheme = "dark" if dark else "light"
            page.screenshot(Path(os.environ["SCREENSHOTS"]) / f"{name}_{width}_{scheme}.png")
    assert flaws == []
    assert page.console() == []


def test_the_first_screen_of_a_hacked_run_says_what_went_wrong(
    addresses: dict[str, str], page: browser.Browser
) -> None:
    """In its first 800 pixels: reward hacking, both rewards with their numbers and their curves, and what to do."""
    emulate(page, 1280, 800, dark=False, medium="screen")
    page.open(addresses["run"])
    bottom = "document.querySelector('{}').getBoundingClientRect().bottom"
    tops = page.run(
        f"return [{', '.join(bottom.format(one) for one in ('.summary.headline', '.finding', '.first svg', '.strip'))}]"
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
    page.open(addresses["reward_evaluation"])
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
    page.open(f"{addresses['overview']}/run/half-written")
    assert "The run cannot be shown now" in page.run("return document.body.innerText")
    page.open(f"{addresses['overview']}/run/..%2f..%2fetc%2fpasswd")
    assert "There is no run of this name" in page.run("return document.body.innerText")
    page.console()


def test_people_who_vote_see_that_training_failed(page: browser.Browser, tmp_path: Path) -> None:
    """Without a reload; with the reason as plain text, and the number of votes that are kept."""
    with live(tmp_path) as (address, service):
        emulate(page, 390, 844, dark=False, medium="screen")
        page.open(address)
        enter(page)
        page.press("1")
        page.until("state.votes === 1 && !busy")
        service.training.failure = "RuntimeError: <b>out of memory</b>"
        page.until("document.querySelector('#nothing .headline').textContent === 'Training has failed'")
        assert "RuntimeError: <b>out of memory</b>. The one vote is kept." in page.run("return document.body.innerText")
        assert page.run("return document.getElementById('others').hidden")
        assert problems(page) == []
