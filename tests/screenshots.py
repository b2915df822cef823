"""Take the screenshots of the documentation anew, in headless Chromium.

python -m tests.screenshots --run runs/ddpo-DATE --output docs

Writes report.png, the first screen of the run's report, and collect.png, the annotation page with its images before and
after training.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import closing
from pathlib import Path

from PIL import Image

from rlhf_t2i.annotation.answers import Answers
from rlhf_t2i.annotation.questions import from_runs, write_questions
from rlhf_t2i.annotation.serve import Service, create_app
from rlhf_t2i.report.page import write_report
from rlhf_t2i.seeds import generator_for
from tests import browser
from tests.servers import running

WIDTH, HEIGHT = 1280, 800


def main(run: Path, output: Path) -> None:
    """Write the screenshots."""
    with tempfile.TemporaryDirectory() as folder, browser.chromium() as page:
        page.emulate(width=WIDTH, height=HEIGHT)
        page.open(write_report(run).resolve().as_uri())
        take(page, output / "report.png")
        questions = write_questions(Path(folder), from_runs([run], num_pairs=None, generator=generator_for(0)))
        answers = Answers(Path(folder), questions, seed=0)
        with closing(answers), running(create_app(Service(answers, secret=None))) as address:
            page.open(address)
            page.run("document.getElementById('name').focus()")
            page.press(*"ann", "enter")
            page.until("document.getElementById('left').naturalWidth > 0 && !document.querySelector('.busy')")
            take(page, output / "collect.png")


def take(page: browser.Browser, path: Path) -> None:
    """Write what the browser shows, in half the resolution of its screen of high density."""
    page.screenshot(path)
    with Image.open(path) as shot:
        small = shot.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    small.save(path, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run that trained a diffusion model")
    parser.add_argument("--output", type=Path, required=True, help="folder for the images")
    given = parser.parse_args()
    main(given.run, given.output)
