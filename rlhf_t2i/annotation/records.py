"""Answers of annotators in memory and as records of a preference file."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from statistics import median
from typing import Literal

from rlhf_t2i.annotation.questions import Question
from rlhf_t2i.output.run_folder import COLLECTED_PAIRS, IMAGES

_PAUSE_SECONDS = 300.0
"""A longer time between two answers was a pause."""

Key = Literal["left", "right", "tie", "bad", "unsure", "skip", "undo"]
"""An annotator's key press; `bad` means that both images are bad, `unsure` that the annotator cannot tell, and `skip`
that the pair is to come back after all others."""
Choice = Literal["first", "second", "tie", "bad", "unsure"]
"""An answer by the order of the images in the question, independent of the side they were shown on."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that was not undone, or a skip."""

    question: int
    key: Key
    first_on_left: bool
    time: datetime | None = None

    @property
    def choice(self) -> Choice:
        match self.key:
            case "left" | "right":
                return "first" if (self.key == "left") == self.first_on_left else "second"
            case "tie" | "bad" | "unsure":
                return self.key
            case "skip" | "undo":
                raise AssertionError(f"{self.key} is no answer")


def pairs_file(criterion: str | None) -> str:
    """Return the name of the file of the preferences by one criterion; None is the only one."""
    return COLLECTED_PAIRS if criterion is None else COLLECTED_PAIRS.replace(".", f"_{criterion}.")


def criteria_of_pairs(questions: Sequence[Question]) -> list[list[int]]:
    """Return the indices of the questions about each pair of images, which follow one another by their criteria."""
    groups: list[list[int]] = []
    for i, question in enumerate(questions):
        is_next = groups and question.criterion is not None and _asks_on(questions[groups[-1][-1]], question)
        groups[-1].append(i) if is_next else groups.append([i])
    return groups


def _asks_on(one: Question, other: Question) -> bool:
    """Return True if two questions are about the same pair by different criteria."""
    same = one.images == other.images and one.prompt == other.prompt
    return same and one.criterion != other.criterion


def seconds_per_answer(answers: Sequence[Answer]) -> float | None:
    """Return the median time between an annotator's answers, without pauses of more than 5 minutes; None if unknown."""
    times = [answer.time for answer in answers if answer.time is not None]
    gaps = [(b - a).total_seconds() for a, b in pairwise(sorted(times))]
    active = [gap for gap in gaps if gap <= _PAUSE_SECONDS]
    return median(active) if active else None


def preference_record(question: Question, answer: Answer, *, annotator: str) -> dict[str, object] | None:
    """Return an answer as a record of a preference file; None for "both bad", "cannot tell" and a skip.

    A tie is a record too: train_reward_model.py trains on it, diffusion_dpo.py skips it. Every annotator's answer is a
    record of its own, so a question that annotators disagree on appears with both preferences.
    """
    files = [f"{IMAGES}/{name}.png" for name in question.images]
    remarks = {"id": answer.question, "comment": annotator}
    match "unsure" if answer.key == "skip" else answer.choice:
        case "first" | "second":
            winner, loser = files if answer.choice == "first" else reversed(files)
            return {"prompt": question.prompt, "winner": winner, "loser": loser, **remarks}
        case "tie":
            return {"prompt": question.prompt, "tie": files, **remarks}
        case "bad" | "unsure":
            return None


def annotator_name(text: str) -> str:
    """Return a normalised name: in lower case and with single blanks, so that one person has one name.

    Raises ValueError for a name that is empty, longer than 40 characters, or has control characters.
    """
    name = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    if not 1 <= len(name) <= 40 or not name.isprintable():
        raise ValueError("Please enter a name of 1 to 40 characters.")
    return name
