"""Take screenshots of all pages for the documentation, in Chromium: `python -m tests.screenshots --output docs`.

Trains, searches and evaluates on the toy world first (half an hour of one core), in the folders of --runs; runs that
are there already are taken as they are. --only NAME takes those of these names alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from PIL import Image

from benchmarks.live_votes import vote_in_browser, vote_on
from recipes import compare
from rlhf_t2i.annotation.answers import Answers
from rlhf_t2i.annotation.questions import from_runs, image_path, write_questions
from rlhf_t2i.annotation.records import Key
from rlhf_t2i.annotation.serve import Service, create_app
from rlhf_t2i.output.run_folder import REPORT
from rlhf_t2i.report.overview import create_app as create_overview
from rlhf_t2i.report.page import write_report
from rlhf_t2i.report.reward_model import write_report as write_reward_model_report
from rlhf_t2i.report.search import write_report as write_search_report
from rlhf_t2i.seeds import generator_for
from tests import browser
from tests.servers import running

WIDTH, HEIGHT = 1280, 800
NUM_COLOURS = 256
"""Colours of a screenshot, chosen for it: a third of the bytes of all colours."""
PROMPTS = [
    f"a {colour} {shape} on a {ground} background"
    for colour, shape, ground in (
        ("red", "circle", "white"), ("blue", "square", "yellow"), ("green", "triangle", "white"),
        ("yellow", "circle", "blue"), ("red", "square", "green"), ("blue", "triangle", "white"),
    )
]  # fmt: skip
_DDPO = ["recipes/ddpo.py", "--num_steps", "20", "--evaluate_every", "5"]
RUNS = {
    "ddpo": _DDPO,
    "ddpo-seed-1": [*_DDPO, "--seed", "1"],
    "ddpo-jpeg": [*_DDPO, "--rewards", "jpeg_compressibility"],
    "fk_steering": [
        *("recipes/fk_steering.py", "--prompts", "PROMPTS"),
        *("--num_particles", "4", "--images_per_prompt", "4"),
    ],
    "reward_model": ["recipes/train_reward_model.py", "--num_steps", "60", "--evaluate_every", "10"],
    "reward_evaluation": ["recipes/evaluate_reward_model.py"],
}
"""The command of each run whose page is shown."""


def make_runs(root: Path) -> None:
    """Run what is not there yet."""
    root.mkdir(parents=True, exist_ok=True)
    prompts = root / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    for name, command in RUNS.items():
        if not (root / name / "report.html").is_file():
            given = [str(prompts) if word == "PROMPTS" else word for word in command]
            options = ["--run_folder", str(root / name), "--num_cpu_threads", "1"]
            subprocess.run([sys.executable, *given, *options], check=True)


def answer(number: int, images: list[bytes], prompt: str) -> Key:
    """Return the oracle's answer; for some questions that of a person who chooses at random, or cannot tell."""
    if number % 11 == 10:
        return "unsure"
    if number % 7 == 6:
        return "left"
    keys: dict[str, Key] = {"1": "left", "2": "right"}
    return keys.get(vote_on(images, prompt), "tie")


@contextmanager
def annotation(root: Path, folder: Path) -> Iterator[str]:
    """Serve the annotation page on images of a run before and after training, with answers of three people."""
    candidates = from_runs([root / "ddpo"], num_pairs=24, generator=generator_for(0))
    questions = write_questions(folder, candidates)
    with closing(Answers(folder, questions, seed=0)) as answers:
        for start, name in enumerate(("bob", "carol", "dave")):
            while (number := (shown := answers.open_pair(name)).question) is not None:
                images = questions[number].images if shown.first_on_left else questions[number].images[::-1]
                data = [image_path(folder, image).read_bytes() for image in images]
                key = answer(3 * start + shown.num_answered, data, questions[number].prompt)
                answers.record(name, shown=shown.token, key=key)
        with running(create_app(Service(answers, secret=None))) as address:
            yield address


@contextmanager
def addresses(root: Path, folder: Path) -> Iterator[dict[str, str]]:
    """Yield the address of each page but that of live votes, by the name of its screenshot."""
    runs = [root / "ddpo", root / "ddpo-seed-1", root / "ddpo-jpeg"]
    for run in runs:
        write_report(run)
    comparison = compare.main(compare.Config(runs=",".join(map(str, runs)), output=str(folder / "comparison.html")))
    with annotation(root, folder / "before-and-after") as asked, running(create_overview(root)) as overview:
        yield {
            "report": (root / "ddpo-jpeg" / REPORT).resolve().as_uri(),
            "comparison": comparison.resolve().as_uri(),
            "search": write_search_report(root / "fk_steering").resolve().as_uri(),
            "reward_model": write_reward_model_report(root / "reward_model").resolve().as_uri(),
            "reward_evaluation": (root / "reward_evaluation" / REPORT).resolve().as_uri(),
            "overview": overview,
            "collect": asked,
            "results": f"{asked}/results?show=1",
        }


def live(page: browser.Browser, output: Path) -> None:
    """Write the screenshot of the page of live votes, from a training of some steps."""
    with tempfile.TemporaryDirectory() as folder:
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
    """Write what the browser shows, in half the resolution of its screen of high density, in few colours."""
    page.screenshot(path)
    with Image.open(path) as shot:
        small = shot.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    small.quantize(NUM_COLOURS, method=Image.Quantize.MEDIANCUT, kmeans=3, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


def main(root: Path, output: Path, *, only: set[str]) -> None:
    """Write the screenshots; `only` holds the names of some, or nothing for all."""
    make_runs(root)
    with tempfile.TemporaryDirectory() as folder, browser.chromium() as page, addresses(root, Path(folder)) as found:
        page.emulate(width=WIDTH, height=HEIGHT)
        for name, address in found.items():
            if not only or name in only:
                page.open(address)
                if name == "collect":
                    page.type_in("name", "ann")
                    page.press("enter")
                    page.until("document.getElementById('left').naturalWidth > 0 && !document.querySelector('.busy')")
                take(page, output / f"{name}.png")
        if not only or "live" in only:
            live(page, output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the images")
    parser.add_argument("--runs", type=Path, default=Path("runs/screenshots"), help="folder of the runs that are shown")
    parser.add_argument("--only", nargs="+", default=[], help="names of the screenshots to take")
    given = parser.parse_args()
    main(given.runs, given.output, only=set(given.only))
