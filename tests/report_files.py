"""Rows and run folders for tests of reports, and a parser of pages."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

Row = dict[str, Any]

RUN_INFO: Row = {
    "recipe": "ddpo",
    "command": "accelerate launch recipes/ddpo.py --seed 1",
    "started": "2026-11-23T06:30:00+00:00",
    "git_commit": None,
    "versions": {"torch": "2.13.0"},
    "device": "cpu",
    "processes": 1,
    "trainable_parameters": 2520360,
}
COLOURS = [(40 * i, 255 - 40 * i, 7 * i) for i in range(6)]
CELLS = [("a fox", 0), ("a fox", 1), ("a hen", 2), ("a cow", 3), ("a dog", 9)]
SIDE = 8
NEVER_CLOSED = {"meta", "link", "img", "br", "input"}


def train(step: int, *, elapsed: float, reward: float = 0.5, name: str = "oracle", **more: float) -> Row:
    """A training row of a run that trains on one reward."""
    counts = {"images": 192, "denoiser_calls": 1920}
    seconds = {"seconds/rollout": 10.0, "seconds/reward": 1.0, "seconds/update": 20.0, "elapsed": elapsed}
    health = {"ratio_std": 1e-4, "clip_fraction": 0.1}
    rewards = {"reward": reward, f"rewards/{name}": reward}
    return {"kind": "train", "step": step, **rewards, **health, **counts, **seconds, **more}


def evaluation(step: int, mean: float, error: float, *, elapsed: float, name: str = "oracle") -> Row:
    scores = {name: mean, f"{name}/standard_error": error, "diversity": 0.31}
    return {"kind": "evaluation", "step": step, "num_images": 408, **scores, "elapsed": elapsed}


def two_updates(*, before: float, after: float) -> list[Row]:
    """A run with two evaluations; errors of 0.03 and 0.04, so that their difference has an error of 0.05."""
    return [
        evaluation(0, before, 0.03, elapsed=12),
        train(1, elapsed=43.0),
        train(2, elapsed=74.0),
        evaluation(2, after, 0.04, elapsed=90.0),
    ]


def two_rewards(step: int, *, trained: float, oracle: float) -> Row:
    """An evaluation of 400 images whose standard deviations are 2 (llava_reward) and 0.5 (oracle)."""
    errors = {"llava_reward/standard_error": 0.1, "oracle/standard_error": 0.025}
    means = {"oracle": oracle, "llava_reward": trained, "diversity": 0.3}
    return {"kind": "evaluation", "step": step, "num_images": 400, **means, **errors, "elapsed": float(step)}


HACKED = [
    two_rewards(0, trained=1.0, oracle=0.4),
    train(1, elapsed=1.0, reward=1.0, name="llava_reward"),
    two_rewards(10, trained=3.0, oracle=0.65),
    two_rewards(20, trained=5.0, oracle=0.5),
]
"""A run that trains on llava_reward; at the end only that still rises."""


def run_folder(path: Path, rows: list[Row], *, run: Row = RUN_INFO, config: str = "seed: 1\n") -> Path:
    (path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (path / "config.yaml").write_text(config, encoding="utf-8")
    if rows:
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def add_images(folder: Path, prompts: list[str], *, steps: tuple[int, ...]) -> list[Path]:
    """Add image grids of 3 columns; each cell has 8 x 8 pixels in its own colour."""
    images = folder / "images"
    images.mkdir()
    captions = {"prompts": prompts, "columns": 3, "seeds": [100 + i for i in range(len(prompts))]}
    (images / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    paths = [images / f"step_{step:06}.png" for step in steps]
    for step, path in zip(steps, paths, strict=True):
        grid = Image.new("RGB", (24, 16), (step, step, step))
        for i, colour in enumerate(COLOURS[: len(prompts)]):
            grid.paste(colour, (8 * (i % 3), 8 * (i // 3), 8 * (i % 3) + 7, 8 * (i // 3) + 8))
        grid.save(path)
    return paths


def draw_grid(path: Path, cells: list[tuple[str, int]], *, columns: int) -> None:
    """Draw each cell in the colour of its index in CELLS."""
    rows = -(-len(cells) // columns)
    grid = Image.new("RGB", (columns * SIDE, rows * SIDE), "white")
    for i, cell in enumerate(cells):
        grid.paste(COLOURS[CELLS.index(cell)], (i % columns * SIDE, i // columns * SIDE, (i % columns + 1) * SIDE,
                                                  (i // columns + 1) * SIDE))  # fmt: skip
    grid.save(path)


def add_grids(folder: Path, cells: list[tuple[str, int]], names: list[str], *, columns: int) -> None:
    """Add image grids of some of CELLS."""
    (folder / "images").mkdir(parents=True)
    for name in names:
        draw_grid(folder / "images" / name, cells, columns=columns)
    captions = {"prompts": [p for p, _ in cells], "seeds": [s for _, s in cells], "columns": columns}
    (folder / "images" / "captions.json").write_text(json.dumps(captions))


def run_with_images(folder: Path, *, after: float, cells: list[tuple[str, int]] = CELLS[:4], columns: int = 2) -> Path:
    """Write the folder of a run of two updates that can be compared with others."""
    folder.mkdir(parents=True)
    rows = [
        evaluation(0, 0.5, 0.03, elapsed=1), train(1, elapsed=30.0), train(2, elapsed=60.0),
        evaluation(2, after, 0.04, elapsed=61),
    ]  # fmt: skip
    run_folder(folder, rows, config="learning_rate: 0.001\nlora_rank: 4\nseed: 3\n")
    add_grids(folder, cells, ["step_000000.png", "step_000002.png"], columns=columns)
    return folder


def plain(text: str) -> str:
    """Undo the typesetting of numbers."""
    return text.replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")


class Page(HTMLParser):
    """Tags, links and text of a page; asserts that all tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in NEVER_CLOSED:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data
