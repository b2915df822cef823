"""Draw the figure of the README: held-out prompts with the same seeds before and after training, and which pass.

    accelerate launch recipes/ddpo.py --run_folder runs/figure
    python benchmarks/before_after.py runs/figure docs/before_after.png
    python benchmarks/before_after.py runs/figure progress.png --every_evaluation

The images are the first of the first and last evaluation, or of every one, none chosen. A green frame is a pass of the
oracle, a red frame none.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from rlhf_t2i.output.run_folder import evaluation_scores, image_grid
from rlhf_t2i.training.finished_run import FinishedRun, read_run

COLUMNS, SIDE, FRAME, GAP = 8, 128, 6, 14
TEXT_HEIGHT, LABEL_WIDTH = 64, 210
PASS, FAIL, INK, GRAY = "#2b9348", "#d00000", "#222222", "#666666"


def cells(run: FinishedRun, step: int) -> tuple[list[Image.Image], list[float]]:
    """Return the images of the grid of the evaluation after `step` steps, and the oracle's passes of all its images."""
    grid, columns = Image.open(image_grid(run.folder, step)), run.captions["columns"]
    side = grid.width // columns
    places = [(i % columns * side, i // columns * side) for i in range(COLUMNS)]
    scores = json.loads(evaluation_scores(run.folder, step).read_text())["scores"]
    return [grid.crop((x, y, x + side, y + side)) for x, y in places], scores["oracle_pass"]


def draw(run: FinishedRun, *, every_evaluation: bool = False) -> Image.Image:
    """Return the figure."""
    steps: list[int] = [row["step"] for row in run.evaluations]
    steps = steps if every_evaluation else [steps[0], steps[-1]]
    font = {size: ImageFont.load_default(size) for size in (15, 17, 30)}
    cell = SIDE + 2 * FRAME
    width = LABEL_WIDTH + COLUMNS * (cell + GAP)
    figure = Image.new("RGB", (width, TEXT_HEIGHT + len(steps) * (cell + GAP)), "white")
    pen = ImageDraw.Draw(figure)
    prompts: list[str] = run.captions["prompts"]
    for column, prompt in enumerate(prompts[:COLUMNS]):
        x = LABEL_WIDTH + column * (cell + GAP)
        text = "\n".join(textwrap.wrap(prompt, 18))
        pen.multiline_text((x + cell / 2, TEXT_HEIGHT - 6), text, INK, font[15], anchor="md", align="center")
    for row, step in enumerate(steps):
        images, passes = cells(run, step)
        title = f"after {step} steps" if row else "before"
        y = TEXT_HEIGHT + row * (cell + GAP)
        share = f"{100 * sum(passes) / len(passes):.0f} %"
        pen.text((10, y + cell / 2 - 22), title, INK, font[17], anchor="lm")
        pen.text((10, y + cell / 2 + 8), share, PASS if row else FAIL, font[30], anchor="lm")
        pen.text((10, y + cell / 2 + 36), f"of {len(passes)} images pass", GRAY, font[15], anchor="lm")
        for column, image in enumerate(images):
            x = LABEL_WIDTH + column * (cell + GAP)
            pen.rectangle((x, y, x + cell - 1, y + cell - 1), fill=PASS if passes[column] else FAIL)
            figure.paste(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST), (x + FRAME, y + FRAME))
    return figure


def main() -> None:
    """Draw the figure of a run folder into a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--every_evaluation", action="store_true", help="a row for each evaluation of the training")
    options = parser.parse_args()
    draw(read_run(options.run), every_evaluation=options.every_evaluation).save(options.output, optimize=True)


if __name__ == "__main__":
    main()
