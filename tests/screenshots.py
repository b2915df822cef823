"""Take the screenshots of the documentation anew, in headless Chromium.

python -m tests.screenshots --run runs/ddpo-DATE --output docs
python -m tests.screenshots --live --output docs

The first writes report.png, the first screen of the run's report, and collect.png, the annotation page with its images
before and after training. The second trains by live votes of the oracle for some steps (two minutes), and writes
live.png, their page.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from PIL import Image

from benchmarks.live_votes import vote_in_browser
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


def live(output: Path) -> None:
    """Write the screenshot of the page of live votes, from a training of some steps."""
    with tempfile.TemporaryDirectory() as folder, browser.chromium() as page:
        command = [sys.executable, "recipes/live_preferences.py", "--port", "0", "--run_folder", f"{folder}/run"]
        command += ["--num_steps", "9", "--num_evaluation_images", "8", "--evaluate_every", "0"]
        command += [
            "--num_cpu_threads",
            "1",
            "--prompts_per_step",
            "8",
            "--questions_per_step",
            "6",
            "--first_votes",
            "6",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            address = next(line.split()[1] for line in process.stdout if line.startswith("page "))
            page.emulate(width=WIDTH, height=HEIGHT)
            is_early = "return state === null || state.training.step < 3 || !state.question || busy"
            vote_in_browser(page, address, Path(folder) / "run", 10**9, 0.2, lambda: bool(page.run(is_early)))
            take(page, output / "live.png")
            process.kill()


def take(page: browser.Browser, path: Path) -> None:
    """Write what the browser shows, in half the resolution of its screen of high density."""
    page.screenshot(path)
    with Image.open(path) as shot:
        small = shot.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    small.save(path, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a run that trained a diffusion model")
    parser.add_argument("--live", action="store_true", help="train by live votes, and take their page")
    parser.add_argument("--output", type=Path, required=True, help="folder for the images")
    given = parser.parse_args()
    if given.run:
        main(given.run, given.output)
    if given.live:
        live(given.output)
