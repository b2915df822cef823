"""The answers of annotators, on disk before they are confirmed.

answers.jsonl   every answer and every undo, one line each; append-only, the source of truth
pairs.jsonl     the answers that were not undone, as preference pairs for train_reward_model.py and diffusion_dpo.py;
                each answer appends a line, and an undo writes the file anew. With criteria, one file for each:
                pairs_CRITERION.jsonl
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np

from reward_model.text_files import parse_json
from rlhf_t2i.annotation.append_only import AppendOnlyFile
from rlhf_t2i.annotation.questions import Question, Role
from rlhf_t2i.annotation.records import Answer, Key, criteria_of_pairs, pairs_file, preference_record
from rlhf_t2i.output.files import write_atomically
from rlhf_t2i.output.run_folder import ANSWERS, COLLECTED_PAIRS
from rlhf_t2i.seeds import ANNOTATE, seed_for

_LOG = logging.getLogger(__name__)


class StaleError(ValueError):
    """An answer to a pair that is no longer open."""


@dataclass(frozen=True, slots=True)
class OpenPair:
    """The pair that an annotator is to answer now."""

    token: str
    """Identifier of this pair at this point of the annotator's history; an answer with another one is stale."""
    question: int | None
    """Index of the question; None if all are answered."""
    first_on_left: bool
    following: int | None
    """Index of the next question; None if there is none."""
    num_answered: int
    can_undo: bool
    """True if there is an answer or a skip to take back."""


class Answers:
    """The answers of all annotators to the questions of one folder; safe to use from several threads."""

    def __init__(self, folder: Path, questions: Sequence[Question], *, seed: int) -> None:
        """Load the answers in `folder`. `seed` and an annotator's name determine their order of questions and sides.

        An incomplete last line, left by a crash, was never confirmed to an annotator and is removed. Raises ValueError
        for any other invalid line. The folder must be claimed (`claim_folder`), so that no other server uses it.
        """
        self.folder, self.questions, self.seed = folder, questions, seed
        self._current: dict[str, list[Answer]] = {}  # with skips
        self._lines: dict[int, tuple[str, str]] = {}  # file and line of each record, by the number of its event
        self._events: dict[str, list[int]] = {}  # number of the event of each entry of _current
        self._num_all = 0
        self._num_events: dict[str, int] = {}
        self._accepted: dict[str, Key] = {}
        self._orders: dict[str, tuple[list[int], list[bool]]] = {}
        self._lock = threading.RLock()
        self.path = folder / ANSWERS
        self._file = AppendOnlyFile(self.path)
        self.truncated_line = self._file.truncated_line
        try:
            for number, line in enumerate(self._file.lines(), start=1):
                self._replay(line, where=f"{self.path}:{number}")
        except ValueError:
            self._file.close()
            raise
        self._write_pairs()

    def close(self) -> None:
        """Close the file of answers; raises OSError if pairs.jsonl lacks some and still cannot be written."""
        self._file.close()
        if not self._has_all_pairs:
            self._write_pairs()

    # --- questions ---

    def open_pair(self, annotator: str) -> OpenPair:
        """Return the first question, in the annotator's own order, without an answer."""
        with self._lock:
            order, first_on_left = self._order(annotator)
            current = self._current.get(annotator, [])
            answered = {answer.question for answer in current if answer.key != "skip"}
            skipped = {answer.question: i for i, answer in enumerate(current) if answer.key == "skip"}
            later = sorted((q for q in skipped if q not in answered), key=skipped.__getitem__)
            waiting = [q for q in order if q not in answered and q not in skipped][:2]
            waiting = [*waiting, *later][:2]
            history = f"{self.seed}\0{annotator}\0{self._num_events.get(annotator, 0)}"
            return OpenPair(
                token=hashlib.sha256(history.encode()).hexdigest()[:20],
                question=waiting[0] if waiting else None,
                first_on_left=first_on_left[waiting[0]] if waiting else True,
                following=waiting[1] if len(waiting) > 1 else None,
                num_answered=len(answered),
                can_undo=bool(current),
            )

    def first_on_left(self, annotator: str, question: int) -> bool:
        """Return True if an annotator sees the first image of a question on the left."""
        return self._order(annotator)[1][question]

    def _order(self, annotator: str) -> tuple[list[int], list[bool]]:
        """Return an annotator's order of the questions, and per question True if its first image is on the left."""
        if annotator not in self._orders:
            digest = int.from_bytes(hashlib.sha256(annotator.encode()).digest()[:4])
            rng = np.random.default_rng(seed_for(self.seed, ANNOTATE, digest))
            groups = criteria_of_pairs(self.questions)
            shuffled = [groups[group] for group in rng.permutation(len(groups)).tolist()]
            order = [question for group in arranged(shuffled, self.questions) for question in group]
            on_left: list[bool] = (rng.random(len(groups)) < 0.5).tolist()
            sides = {question: left for group, left in zip(groups, on_left, strict=True) for question in group}
            self._orders[annotator] = order, [sides[question] for question in range(len(self.questions))]
        return self._orders[annotator]

    # --- answers ---

    def record(self, annotator: str, *, shown: str, key: Key) -> None:
        """Write an answer to the open pair, or an undo of the previous answer; it is on disk when this returns.

        `shown` is the token of the open pair. Repeating a recorded answer (a double click, a request repeated after a
        lost response) changes nothing. If only pairs.jsonl cannot be written, a warning is logged.

        Raises StaleError for another answer to a pair that is no longer open, ValueError if there is nothing to answer
        or to undo, and OSError, with nothing recorded, if writing fails.
        """
        with self._lock:
            pair = self.open_pair(annotator)
            if self._accepted.get(shown) == key:
                return
            if shown != pair.token:
                raise StaleError(
                    "This pair is no longer open, perhaps because it was answered in another tab. Nothing was changed. "
                    "The open pair is shown now; undo (u) goes back."
                )
            if key == "undo" and not pair.can_undo:
                raise ValueError("There is nothing to undo.")
            if key != "undo" and pair.question is None:
                raise ValueError("All pairs are answered; undo (u) goes back to the last one.")
            question = self._current[annotator][-1].question if key == "undo" else pair.question
            row = {
                "annotator": annotator,
                "question": question,
                "key": key,
                "first_on_left": pair.first_on_left,
                "shown": shown,
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            }
            self._file.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            number = self._num_all
            self._apply(row)
            try:
                self._add_pair(number, undone=key == "undo")
            except OSError as error:  # the answer is on disk already
                _LOG.warning(
                    "%s could not be written (%s); the answers are in %s, and the next one writes both.",
                    self.folder / COLLECTED_PAIRS, error, self.path,
                )  # fmt: skip

    def _replay(self, line: bytes, *, where: str) -> None:
        try:
            row = parse_json(line.decode())
            assert row["key"] in get_args(Key)
            assert row["question"] in range(len(self.questions))
            assert isinstance(row["first_on_left"], bool)
            self._apply(row)
        except (ValueError, KeyError, TypeError, IndexError, AssertionError) as error:
            raise ValueError(
                f"{where} is no answer to one of {len(self.questions)} questions: {line[:80]!r}. Restore the file, or "
                f"remove the line."
            ) from error

    def _apply(self, row: Mapping[str, Any]) -> None:
        """Update the state in memory by a line of answers.jsonl."""
        annotator: str = row["annotator"]
        current, events = self._current.setdefault(annotator, []), self._events.setdefault(annotator, [])
        if row["key"] == "undo":
            current.pop()
            self._lines.pop(events.pop(), None)
        else:
            answer = Answer(row["question"], row["key"], row["first_on_left"], _time_of(row))
            current.append(answer)
            events.append(self._num_all)
            question = self.questions[answer.question]
            record = preference_record(question, answer, annotator=annotator) if question.role == "question" else None
            if record:
                line = json.dumps(record, ensure_ascii=False) + "\n"
                self._lines[self._num_all] = pairs_file(question.criterion), line
        self._num_all += 1
        self._num_events[annotator] = self._num_events.get(annotator, 0) + 1
        self._accepted[row["shown"]] = row["key"]

    def current(self) -> dict[str, list[Answer]]:
        """Return the answers of each annotator that were not undone, in the order in which they came."""
        with self._lock:
            return {name: [one for one in own if one.key != "skip"] for name, own in self._current.items()}

    def known_answer(self, annotator: str) -> str:
        """Return a text about an annotator's last answer if that was in the training round; empty otherwise."""
        with self._lock:
            own = [answer for answer in self._current.get(annotator, []) if answer.key != "skip"]
        if not own or self.questions[own[-1].question].role != "training":
            return ""
        right = f"The known answer is image {1 if own[-1].first_on_left else 2}."
        return f"Right. {right}" if own[-1].choice == "first" else f"Not this time. {right}"

    def _add_pair(self, number: int, *, undone: bool) -> None:
        """Append the record of an event; write the files anew after an undo, or if they lack earlier records."""
        if undone or not self._has_all_pairs:
            self._write_pairs()
        elif number in self._lines:
            self._has_all_pairs = False  # until the line is complete
            file, line = self._lines[number]
            append_line(self.folder / file, line)
            self._has_all_pairs = True

    def _write_pairs(self) -> None:
        self._has_all_pairs = False
        texts = {pairs_file(question.criterion): "" for question in self.questions if question.role == "question"}
        for file in texts:
            texts[file] = "".join(line for own, line in self._lines.values() if own == file)
            write_atomically(self.folder / file, texts[file])
        self._has_all_pairs = True


def arranged(groups: Sequence[list[int]], questions: Sequence[Question]) -> list[list[int]]:
    """Return groups of questions with the training round first and the attention checks evenly among the others."""
    by_role: dict[Role, list[list[int]]] = {"training": [], "question": [], "check": []}
    for group in groups:
        by_role[questions[group[0]].role].append(group)
    found, checks = by_role["question"], by_role["check"]
    gap = len(found) / (len(checks) + 1)
    for i, check in reversed(list(enumerate(checks, start=1))):
        found.insert(round(i * gap), check)
    return by_role["training"] + found


def append_line(path: Path, line: str) -> None:
    """Append a line to a file; it is on disk when this returns."""
    with path.open("ab") as stream:
        stream.write(line.encode())
        stream.flush()
        os.fsync(stream.fileno())


def _time_of(row: Mapping[str, Any]) -> datetime | None:
    try:
        return datetime.fromisoformat(row["time"])
    except (KeyError, TypeError, ValueError):
        return None
