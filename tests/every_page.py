"""Every page of the project, with many runs, long names, names with tags, and images of other shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from recipes import compare
from reward_model.attention import AttentionMap
from reward_model.backbones.token_boxes import grid_boxes
from reward_model.benchmarks.breakdown import break_down
from reward_model.benchmarks.evaluation import RecordScores, worst_mistakes
from reward_model.benchmarks.metrics import Metric
from reward_model.benchmarks.report import render_report
from reward_model.types import PreferencePair
from rlhf_t2i.annotation.answers import Answers
from rlhf_t2i.annotation.live_records import NewQuestion
from rlhf_t2i.annotation.live_serve import LiveService, Progress, TrainingState
from rlhf_t2i.annotation.live_serve import create_app as create_live_app
from rlhf_t2i.annotation.live_votes import LiveVotes
from rlhf_t2i.annotation.questions import Candidate, Role, save_image, write_questions
from rlhf_t2i.annotation.serve import Service, create_app
from rlhf_t2i.output.image_grids import NUM_COLUMNS
from rlhf_t2i.report.overview import create_app as create_overview
from rlhf_t2i.report.page import write_report
from rlhf_t2i.report.reward_model import write_report as write_reward_model_report
from rlhf_t2i.report.search import write_report as write_search_report
from rlhf_t2i.training.evaluation import Evaluation, save_evaluation
from tests import browser
from tests.report_files import RUN_INFO, Row, evaluation, run_folder, train
from tests.servers import running

TRAINED = "llava_reward:runs/a-reward-model-whose-name-is-long"
NAMES = [f"ddpo-with-a-name-of-thirty-char{i}" for i in range(8)]
PERSON = "<b>ann</b> with a name of 32 letters"
TALL, WIDE, SQUARE = (24, 16), (16, 32), (16, 16)
PROMPTS = [f"<b>a red circle</b> beside_a_word_of_thirty_letters_{i % 4}" for i in range(16)]


def drawn(number: int, shape: tuple[int, int] = SQUARE) -> Tensor:
    """A ring on a gradient, round whatever the shape, so that an image that is stretched or cut can be seen."""
    high, wide = shape
    y = torch.linspace(-high / 2, high / 2, high)[:, None] / (min(shape) / 2)
    x = torch.linspace(-wide / 2, wide / 2, wide)[None] / (min(shape) / 2)
    ring = ((x**2 + y**2).sqrt() - 0.65).abs() < 0.2
    colour = torch.tensor([number * 37 % 100, number * 61 % 100, number * 89 % 100]) / 100
    ground = (torch.linspace(0.85, 0.6, high)[:, None] * torch.ones(shape)).expand(3, *shape)
    return torch.where(ring, colour[:, None, None].expand(3, *shape), ground)


def hacked_run(folder: Path, *, end: float = 0.1, shape: tuple[int, int] = SQUARE) -> Path:
    """A run of 16 updates whose trained reward rises throughout, and whose oracle falls to `end` after update 8."""
    (folder / "images").mkdir(parents=True)
    rows: list[Row] = []
    for step, trained, oracle in ((0, -1.0, 0.4), (8, 0.5, 0.6), (16, 2.0, end)):
        images = torch.stack([drawn(i + step, shape) for i in range(16)])
        spread = torch.arange(16) / 160
        scores = {TRAINED: trained + spread, "oracle": oracle + spread, "oracle_pass": (torch.arange(16) < 9).float()}
        save_evaluation(Evaluation(PROMPTS, list(range(16)), images, scores), folder, step=step)
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
    """A run that trained a reward model, with its metrics."""
    folder.mkdir()
    history = [{"step": step, "accuracy": 0.5 + step / 100, "eval_accuracy": 0.6, "loss": 0.7} for step in (1, 10, 20)]
    run_folder(folder, [], run={**RUN_INFO, "recipe": "reward_model"}, config="backbone: a/backbone-with-a-long-name\n")
    (folder / "history.json").write_text(json.dumps(history))
    metric = {"name": "accuracy over_a_long_subset_of_the_data", "value": 0.75, "low": 0.5, "high": 0.9, "count": 1200}
    (folder / "metrics.json").write_text(json.dumps({"a data set": [metric | {"note": "a note of many words " * 6}]}))
    return folder


def search_run(folder: Path) -> Path:
    """A search over four prompts with images of three shapes, whose gain is within noise."""
    folder.mkdir()
    run_folder(folder, [], run={**RUN_INFO, "recipe": "fk_steering"}, config=f"model: shapes\nrewards: {TRAINED}\n")
    for i, shape in enumerate((TALL, WIDE, SQUARE, SQUARE)):
        prompt_folder = folder / "images" / f"{i:05d}"
        names = {
            kind: save_image(prompt_folder, drawn(i + 9 * k, shape)) for k, kind in enumerate(("samples", "baseline"))
        }
        for kind, name in names.items():
            (prompt_folder / kind).mkdir()
            (prompt_folder / "images" / f"{name}.png").rename(prompt_folder / kind / "0000.png")
        entry = {
            "scores": {"reward": [0.1 * k + 0.2 * i for k in range(4)], TRAINED: [1.0 * k * i for k in range(4)]},
            "evaluation_scores": {"oracle": [0.1 * (k + i) for k in range(4)]},
            "rank": [3, 2, 1, 0], "vetoed": [False] * 4, "selected": 3,
            "cost": {"denoiser_calls": 3200.0, "reward_calls": 40.0, "seconds": 81.25},
        }  # fmt: skip
        row = {"prompt": PROMPTS[i], "is_baseline": False, "searched": entry, "baseline": entry}
        (prompt_folder / "search_0000.json").write_text(json.dumps(row))
        (prompt_folder / "metadata.jsonl").write_text(json.dumps({"prompt": PROMPTS[i]}) + "\n")
    return folder


def evaluated_reward_model(folder: Path) -> Path:
    """The page of an evaluation: many groups of pairs, notes, and mistakes with maps, and tokens, of three shapes."""
    shapes = [TALL, WIDE, SQUARE]
    images = [folder / "images" / f"{save_image(folder, drawn(i, shapes[i % 3]))}.png" for i in range(65)]
    prompts = [f"<b>a red circle</b> beside_a_word_of_thirty_letters_{i}" for i in range(60)]
    generators = [f"a-generator-with-a-name-of-fifty-characters-and-a-number-{i}" for i in range(15)]
    pairs = [
        PreferencePair(
            images[i], images[i + 5], text, text if i % 3 else "another", rating_gap=1.0 + i % 4,
            where=f"a/folder/of/preferences/pairs.jsonl:{i + 1}",
            tags={"tier": ("one" if i < 40 else "binding",), "generator": (generators[i % 15],)},
        )
        for i, text in enumerate(prompts)
    ]  # fmt: skip
    logits = torch.linspace(6, -6, 60)
    scores = RecordScores(pairs, logits, -logits, [], torch.zeros(0), logits, torch.zeros(60))
    found = AttentionMap(torch.arange(8) / 28, grid_boxes(2, 4).flatten(0, 1))
    tokens = [(word, 1.25 - i) for i, word in enumerate(prompts[0].split() * 4)]
    mistakes = [replace(one, maps=(found, found), contributions=tokens) for one in worst_mistakes(scores, count=6)]
    metrics = [
        Metric("pairwise_accuracy_within_prompts", 0.75, 0.5, 1.0, 1240, ""),
        Metric("kendall_tau_b", -0.123456, -0.25, 0.0, 1024, 'a "note" of many words ' * 6),
        Metric("auroc", float("nan"), None, None, 8, "undefined: one class"),
    ]
    names = ["a data set", "another_data_set_with_a_name_of_40_letters"]
    page = render_report(
        TRAINED, dict.fromkeys(names, metrics), {names[0]: mistakes, names[1]: []}, {names[0]: break_down(scores)}
    )
    (folder / "report.html").write_text(page)
    return folder / "report.html"


def candidates(count: int, *, sources: tuple[str, str] = ("before", NAMES[0])) -> list[Candidate]:
    """Pairs of images of two shapes."""
    return [Candidate(PROMPTS[i], (drawn(i, TALL), drawn(i + 7, WIDE)), sources) for i in range(count)]


@contextmanager
def annotation(folder: Path) -> Iterator[tuple[str, Answers]]:
    """The annotation page with criteria, a guideline, known pairs, and the answers of eight people."""
    known: list[tuple[Role, Candidate]] = [("training", one) for one in candidates(1)] + [
        ("check", one) for one in candidates(2)[1:]
    ]
    questions = write_questions(folder, candidates(3), criteria=("alignment", "quality"), known=known)
    with closing(Answers(folder, questions, seed=0)) as answers:
        for number, name in enumerate(f"a_person_with_a_name_of_thirty_{i}" for i in range(8)):
            while answers.open_pair(name).question is not None:
                keys: Sequence[Any] = ("left", "right", "tie", "left", "bad", "unsure")
                shown = answers.open_pair(name)
                answers.record(name, shown=shown.token, key=keys[(shown.num_answered + number) % 6])
        scores = torch.arange(2.0 * len(questions)).view(-1, 2)
        service = Service(
            answers, secret=None, reward=(TRAINED, scores), guideline="Compare the shapes.\n\nIgnore <i>the frame</i>."
        )
        with running(create_app(service)) as address:
            yield address, answers


@contextmanager
def live(folder: Path, kind: Any = "pair") -> Iterator[tuple[str, LiveService]]:
    """The page of live votes in a training that has made progress, with images of a tall shape."""
    votes = LiveVotes(folder, kind=kind, seed=0)
    count = {"pair": 2, "best_of_four": 4, "good_bad": 1}[kind]
    for i in range(3):
        votes.offer(
            i, [NewQuestion(PROMPTS[i], [drawn(4 * i + k, TALL) for k in range(count)], 0 if count > 1 else None)],
            max_age=9,
        )  # fmt: skip
    progress = [
        Progress(
            PROMPTS[i],
            cast(Any, tuple(save_image(votes.folder, drawn(i + k)) for k in (0, 3, 6))),
            0.8, 0.55,
        )
        for i in range(3)
    ]  # fmt: skip
    training = TrainingState("training on the votes so far", 12, 30, None, None, False, 0.73, progress)
    service = LiveService(votes, training, secret=None)
    with closing(votes), running(create_live_app(service)) as address:
        yield address, service


@contextmanager
def every_page(root: Path) -> Iterator[dict[str, str]]:
    """Yield the address of each page; one of the runs under `root` is half written."""
    shapes = [SQUARE, TALL, WIDE, *[SQUARE] * 5]
    folders = [
        hacked_run(root / name, end=0.1 + i / 10, shape=shape)
        for i, (name, shape) in enumerate(zip(NAMES, shapes, strict=True))
    ]
    reports = [write_report(folder) for folder in folders]
    assert NUM_COLUMNS == 8
    output = root / "comparison.html"
    compare.main(compare.Config(runs=",".join(map(str, folders)), output=str(output)))
    (root / "half-written").mkdir()
    (root / "half-written" / "run.json").write_text('{"recipe": "dd')
    with ExitStack() as stack:
        asked, _ = stack.enter_context(annotation(root / "annotation"))
        yield {
            "run": reports[0].as_uri(),
            "run_tall": reports[1].as_uri(),
            "comparison": output.as_uri(),
            "search": write_search_report(search_run(root / "search")).as_uri(),
            "reward_model": write_reward_model_report(reward_model_run(root / "reward-model")).as_uri(),
            "reward_evaluation": evaluated_reward_model(root / "evaluation").as_uri(),
            "overview": stack.enter_context(running(create_overview(root))),
            "annotation": asked,
            "annotation_results": f"{asked}/results?show=1",
            "live": stack.enter_context(live(root / "live"))[0],
            "live_best_of_four": stack.enter_context(live(root / "live4", "best_of_four"))[0],
            "live_good_bad": stack.enter_context(live(root / "live1", "good_bad"))[0],
        }


def enter(page: browser.Browser, name: str = PERSON) -> None:
    """Enter one of the annotation pages, unless this tab has."""
    page.until("state !== null || !sessionStorage.getItem('annotator')")
    if page.run("return state === null"):
        page.run(f"document.getElementById('name').value = {json.dumps(name)}")
        page.run("document.getElementById('enter').click()")
    page.until("state && !busy")
