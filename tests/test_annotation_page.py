"""Skips, criteria and appended records of the annotation page; what annotators and the owner of the results see."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from recipes.collect_preferences import Config
from rlhf_t2i.annotation import answers as answers_module
from rlhf_t2i.annotation.agreement import disagreements, pairwise_win_rates
from rlhf_t2i.annotation.answers import Answers
from rlhf_t2i.annotation.questions import Candidate, Question, Role, read_questions, write_questions
from rlhf_t2i.annotation.records import Answer, criteria_of_pairs, seconds_per_answer
from rlhf_t2i.annotation.serve import Service, create_app
from tests import browser
from tests.layout import problems
from tests.servers import running

TALL, SQUARE = (12, 8), (8, 8)


def image(number: int, shape: tuple[int, int] = (8, 8)) -> Tensor:
    return torch.tensor([number % 251, number // 251, 100])[:, None, None].expand(3, *shape) / 255


def pairs(folder: Path, count: int, *, criteria: tuple[str, ...] = (), prompt: str = "a fox") -> list[Question]:
    """Questions about pairs of images of one colour, the first tall and the second square."""
    candidates = [
        Candidate(f"{prompt} {i}", (image(2 * i, TALL), image(2 * i + 1, SQUARE)), ("before", "after"))
        for i in range(count)
    ]
    return write_questions(folder, candidates, criteria=criteria)


def press(answers: Answers, annotator: str, *keys: Any) -> None:
    for key in keys:
        answers.record(annotator, shown=answers.open_pair(annotator).token, key=key)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Answers]:
    answers = Answers(tmp_path, pairs(tmp_path, 4), seed=0)
    yield answers
    answers.close()


def test_a_skipped_pair_comes_back_after_all_others_and_undo_takes_a_skip_back(opened: Answers) -> None:
    first = opened.open_pair("ann").question
    press(opened, "ann", "skip")
    assert opened.open_pair("ann").question != first
    press(opened, "ann", "undo")
    assert opened.open_pair("ann").question == first
    press(opened, "ann", "skip", "left", "left", "left")
    last = opened.open_pair("ann")
    assert (last.question, last.num_answered, last.can_undo) == (first, 3, True)
    press(opened, "ann", "tie")
    assert opened.open_pair("ann").question is None
    assert [answer.key for answer in opened.current()["ann"]] == ["left", "left", "left", "tie"]


def test_cannot_tell_is_an_answer_and_no_preference(opened: Answers, tmp_path: Path) -> None:
    press(opened, "ann", "unsure", "left")
    assert len(lines_of(tmp_path / "pairs.jsonl")) == 1
    (rate,) = pairwise_win_rates(opened.current(), opened.questions)
    assert (rate.unsure, rate.wins + rate.losses) == (1, 1)
    assert sum(rate.shares) == pytest.approx(1)


def test_answers_append_and_the_file_is_that_of_a_fresh_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only an undo writes the file anew, so the cost of an answer does not grow with the number of earlier ones."""
    rewritten: list[Path] = []
    write = answers_module.write_atomically

    def counted(path: Path, text: str) -> None:
        rewritten.append(path)
        write(path, text)

    monkeypatch.setattr(answers_module, "write_atomically", counted)
    answers = Answers(tmp_path, pairs(tmp_path, 30), seed=0)
    assert len(rewritten) == 1
    for name in ("ann", "bob"):
        press(answers, name, *["left", "skip", "bad", "tie", "right"] * 6)
    assert len(rewritten) == 1
    press(answers, "ann", "undo", "undo", "left")
    assert len(rewritten) == 3
    answers.close()
    held = (tmp_path / "pairs.jsonl").read_bytes()
    Answers(tmp_path, answers.questions, seed=0).close()
    assert (tmp_path / "pairs.jsonl").read_bytes() == held
    assert len(held.splitlines()) == 2 * 18 - 1


def test_criteria_are_asked_one_after_another_and_have_files_of_their_own(tmp_path: Path) -> None:
    questions = pairs(tmp_path, 3, criteria=("alignment", "quality"))
    assert questions == read_questions(tmp_path)
    assert criteria_of_pairs(questions) == [[0, 1], [2, 3], [4, 5]]
    answers = Answers(tmp_path, questions, seed=0)
    asked: list[tuple[int, str | None, bool]] = []
    for key in ("left", "right", "tie", "bad", "right", "left"):
        shown = answers.open_pair("ann")
        assert shown.question is not None
        asked.append((shown.question // 2, questions[shown.question].criterion, shown.first_on_left))
        press(answers, "ann", key)
    answers.close()
    for (pair, criterion, side), (same_pair, other, same_side) in zip(asked[::2], asked[1::2], strict=True):
        assert (pair, criterion, other, side) == (same_pair, "alignment", "quality", same_side)
    assert len(lines_of(tmp_path / "pairs_alignment.jsonl")) == 3
    assert len(lines_of(tmp_path / "pairs_quality.jsonl")) == 2
    assert not (tmp_path / "pairs.jsonl").exists()


@pytest.mark.parametrize("criteria", ["", "a,a", "Quality", "../x"])
def test_criteria_that_cannot_name_a_file_are_refused(criteria: str) -> None:
    with pytest.raises(ValueError, match=r"criteria is .*lower-case letters"):
        Config(runs="x", criteria=criteria)


def test_the_median_pace_leaves_out_pauses() -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    times = [start + timedelta(seconds=seconds) for seconds in (0, 2, 6, 1000, 1003)]
    assert seconds_per_answer([Answer(i, "left", True, time) for i, time in enumerate(times)]) == 3
    assert seconds_per_answer([Answer(0, "left", True, start)]) is None


def test_disagreements_are_opposite_preferences() -> None:
    choices: Any = {"ann": {0: "first", 1: "first", 2: "tie"}, "bob": {0: "second", 1: "bad", 2: "first"}}
    assert disagreements(choices) == {0: {"ann": "first", "bob": "second"}}


def test_results_wait_for_who_still_answers_and_are_downloaded_as_text(opened: Answers) -> None:
    with running(create_app(Service(opened, secret=None))) as address, httpx.Client(base_url=address) as client:
        press(opened, "=ann", "left")
        early = client.get("/results").text
        assert "1 annotator has not finished yet" in early
        assert "before" not in early
        assert "Pairwise win rates" in client.get("/results?show=1").text
        press(opened, "=ann", "left", "left", "left")
        assert "Pairwise win rates" in client.get("/results").text
        rows = list(csv.reader(io.StringIO(client.get("/answers.csv").text)))
    assert rows[0][:5] == ["annotator", "question", "prompt", "criterion", "choice"]
    assert [row[0] for row in rows[1:]] == ["'=ann"] * 4, "a spreadsheet must not read a name as a formula"


# --- in a browser ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason=browser.MISSING)
def test_images_fill_their_cards_and_can_be_enlarged_on_any_screen(tmp_path: Path) -> None:
    long = "a prompt of many words and <b>tags</b> " + "that_is_one_word_of_sixty_letters_" * 2
    answers = Answers(tmp_path, pairs(tmp_path, 3, criteria=("alignment", "quality"), prompt=long), seed=0)
    service = Service(answers, secret=None, guideline="Compare the shapes.\n\nIgnore <i>the frame</i>.")
    asked = "document.querySelector('#criterion b').textContent === '{}' && !document.querySelector('.busy')"
    with running(create_app(service)) as address, browser.chromium() as page:
        for width, height, dark in ((1280, 800, False), (390, 844, True)):
            page.emulate(width=width, height=height, dark=dark)
            page.open(address)
            if width == 1280:
                assert "Ignore <i>the frame</i>." in page.run("return document.body.innerText")
                page.type_in("name", "Ann")
                page.press("enter")
            page.until(asked.format("alignment"))
            assert problems(page) == []
            filled = "const [i, c] = [one, one.closest('.choice')].map((x) => x.getBoundingClientRect().width); "
            ratio = page.run(
                f"return [...document.querySelectorAll('.look img')].map((one) => {{{filled} return i / c}})"
            )
            assert ratio == [1, 1]
            bottom = page.run("return document.getElementById('others').getBoundingClientRect().bottom")
            assert bottom <= height, "every answer is on the first screen"
            page.press("z")
            assert page.run("return document.getElementById('zoom').open")
            page.press("z")
            assert not page.run("return document.getElementById('zoom').open")
        page.run("document.querySelector('.look').click()")
        assert page.run("return document.getElementById('zoom').open")
        page.press("s")
        page.until(asked.format("quality"))
        assert not page.run("return document.getElementById('zoom').open"), "the next question is shown in its place"
        page.run("document.querySelector('[data-answer=unsure]').click()")
        page.until("document.getElementById('count').textContent.startsWith('1 of 6')")
        assert page.console() == []
    answers.close()
    assert [row["key"] for row in lines_of(tmp_path / "answers.jsonl")] == ["skip", "unsure"]


def test_a_training_round_comes_first_with_its_answers_and_checks_come_between(tmp_path: Path) -> None:
    """Neither is a preference; the results page says how many each annotator got right."""
    known: list[tuple[Role, Candidate]] = [
        (role, Candidate("a known fox", (image(300 + i), image(400 + i)), ("better", "worse")))
        for i, role in enumerate(("training", "training", "check", "check"))
    ]
    candidates = [Candidate(f"a fox {i}", (image(2 * i), image(2 * i + 1)), ("before", "after")) for i in range(6)]
    questions = write_questions(tmp_path, candidates, known=known)
    assert read_questions(tmp_path) == questions
    with closing(Answers(tmp_path, questions, seed=0)) as answers:
        roles: list[Role] = []
        app = create_app(Service(answers, secret=None))
        with running(app) as address, httpx.Client(base_url=address, trust_env=False) as client:
            pair = client.post("/enter", json={"annotator": "ann"}).json()
            while (number := answers.open_pair("ann").question) is not None:
                roles.append(questions[number].role)
                is_right = len(roles) != 2  # wrong in the second question of the training round
                side = "left" if answers.first_on_left("ann", number) == is_right else "right"
                body = {"annotator": "ann", "shown": pair["shown"], "answer": side}
                pair = client.post("/answer", json=body).json()
                said = {1: "Right.", 2: "Not this time."}.get(len(roles), "")
                assert pair.get("message", "").startswith(said)
                assert ("message" in pair) == bool(said)
            page = client.get("/results", params={"show": "1"}).text
        assert roles[:2] == ["training"] * 2
        assert [i for i, role in enumerate(roles[2:]) if role == "check"] == [2, 5]
        assert len(lines_of(tmp_path / "pairs.jsonl")) == 6
        assert "6 answers to 6 pairs" in " ".join(page.split())
        assert "0.50 [0.09, 0.91]" in page  # one of two in the training round
        assert "1.00 [0.34, 1.00]" in page  # both checks
        assert "better" not in page.split("Pairwise win rates")[1].split("</table>")[0]


def test_known_pairs_and_their_numbers_belong_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="known_pairs is None; it must be given together with num_training_questions"):
        Config(pairs="x.jsonl", num_attention_checks=1)
