"""Questions about the images of a model in training, and people's votes on them, on disk before they are confirmed.

votes/votes.jsonl   every vote and every undo, one line each; append-only, the source of truth
votes/pairs.jsonl   the votes that were not undone, in the format of train_reward_model.py and diffusion_dpo.py; with
                    labels in place of pairs (question good_bad) it is votes/labels.jsonl, for train_reward_model.py
votes/images/       8-bit RGB as PNG, named by a hash of the pixels
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from reward_model.text_files import parse_json
from reward_model.types import Record
from rlhf_t2i.annotation.answers import StaleError, append_line
from rlhf_t2i.annotation.append_only import AppendOnlyFile
from rlhf_t2i.annotation.live_records import (
    KEYS,
    NUM_IMAGES,
    LiveQuestion,
    NewQuestion,
    QuestionKind,
    Shown,
    VoteKey,
    as_record,
    records_of,
)
from rlhf_t2i.annotation.questions import image_path, save_image
from rlhf_t2i.output.files import write_atomically
from rlhf_t2i.output.run_folder import COLLECTED_PAIRS, IMAGES, VOTE_LABELS, VOTES, VOTES_FOLDER
from rlhf_t2i.seeds import ANNOTATE, seed_for

GONE = "These images are gone, since training was started anew. Your vote was not counted; here are newer images."
LATE = "These images were of an earlier step, and newer ones follow. Your vote counts all the same."


class LiveVotes:
    """The open questions and all votes of one run; safe to use from several threads."""

    def __init__(self, run_folder: Path, *, kind: QuestionKind, seed: int) -> None:
        """Load the votes of a run. Raises ValueError for an invalid line, but for a truncated last one."""
        self.folder, self.seed = run_folder / VOTES_FOLDER, seed
        self.kind: QuestionKind = kind
        (self.folder / IMAGES).mkdir(parents=True, exist_ok=True)
        self.records_path = self.folder / (VOTE_LABELS if kind == "good_bad" else COLLECTED_PAIRS)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._open: list[LiveQuestion] = []
        self._current: dict[str, Shown] = {}
        self._known: dict[str, tuple[str, Shown]] = {}  # annotator and what was shown, by token
        self._accepted: dict[str, VoteKey] = {}
        self._history: dict[str, list[int]] = {}  # numbers of the rows of each annotator
        self._skipped: dict[str, set[int]] = {}
        self._rows: dict[int, dict[str, Any]] = {}
        self._num_lines = self._num_questions = 0
        self._file = AppendOnlyFile(self.folder / VOTES)
        try:
            for number, line in enumerate(self._file.lines(), start=1):
                self._replay(line, where=f"{self._file.path}:{number}")
        except ValueError:
            self._file.close()
            raise
        self._write_records()

    def close(self) -> None:
        """Close the file of votes."""
        self._file.close()

    # --- questions ---

    def offer(self, step: int, questions: Sequence[NewQuestion], *, max_age: int) -> None:
        """Add the questions of a step, and withdraw those that are more than `max_age` steps older.

        A question whose images are identical is left out. Images of withdrawn questions that nobody was shown are
        deleted.
        """
        saved = [(one, tuple(save_image(self.folder, image) for image in one.images)) for one in questions]
        with self._lock:
            for one, images in saved:
                if len(set(images)) == len(images):
                    favourite = None if one.favourite is None else images[one.favourite]
                    self._open.append(LiveQuestion(self._num_questions, step, one.prompt, images, favourite))
                    self._num_questions += 1
            self._withdraw(lambda question: question.step < step - max_age)

    def withdraw_all(self) -> None:
        """Withdraw all questions: training has ended."""
        with self._lock:
            self._withdraw(lambda question: True)

    def _withdraw(self, is_old: Callable[[LiveQuestion], bool]) -> None:
        old = [question for question in self._open if is_old(question)]
        self._open = [question for question in self._open if not is_old(question)]
        used = {name for row in self._rows.values() for name in row["images"]}
        used |= {name for question in self._open for name in question.images}
        for question in old:
            question.state = "withdrawn"
            if not question.shown_to:
                for name in set(question.images) - used:
                    image_path(self.folder, name).unlink(missing_ok=True)

    @property
    def num_questions(self) -> int:
        """Number of questions so far, those before a resume included if somebody voted on them or on a later one."""
        with self._lock:
            return self._num_questions

    @property
    def num_open(self) -> int:
        """Number of open questions."""
        with self._lock:
            return len(self._open)

    def shown(self, annotator: str) -> Shown | None:
        """Return what an annotator is to answer now; None if there is no open question.

        It stays the same until it is answered or withdrawn. New ones are first those that nobody looks at, of the
        newest step; two people are asked the same only if there is no other.
        """
        with self._lock:
            current = self._current.get(annotator)
            if current is not None and current.question.state != "withdrawn":
                return current
            skipped = self._skipped.get(annotator, set())
            waiting = [question for question in self._open if question.number not in skipped] or self._open
            if not waiting:
                self._current.pop(annotator, None)
                return None
            question = min(waiting, key=lambda one: (len(one.shown_to - {annotator}), -one.step, one.number))
            return self._show(annotator, question)

    def _show(self, annotator: str, question: LiveQuestion) -> Shown:
        digest = int.from_bytes(hashlib.sha256(annotator.encode()).digest()[:4])
        rng = np.random.default_rng(seed_for(self.seed, ANNOTATE, question.number, digest))
        order = tuple(question.images[i] for i in rng.permutation(len(question.images)))
        shown = Shown(secrets.token_hex(10), question, order)
        question.shown_to.add(annotator)
        self._current[annotator] = shown
        self._known[shown.token] = annotator, shown
        return shown

    # --- votes ---

    def vote(self, annotator: str, *, shown: str, key: VoteKey) -> str:
        """Write a vote, or an undo of the annotator's last one; it is on disk when this returns.

        `shown` is the token of what was shown, for an undo that of the vote to take back (`last_vote`). Returns a
        message for the annotator, empty if there is nothing to say. Repeating a recorded vote changes nothing. A vote
        on a withdrawn question is kept, as its images are. Raises StaleError for another vote on what was answered
        already, or on images that are gone, ValueError for a vote that the question does not allow, and OSError, with
        nothing recorded, if writing fails.
        """
        with self._lock:
            if key not in KEYS[self.kind]:
                raise ValueError(f"The vote is {key!r}; it must be one of {', '.join(KEYS[self.kind])}.")
            if self._accepted.get(shown) == key:
                return ""
            if key == "undo":
                return self._undo(annotator, shown)
            if shown in self._accepted:
                raise StaleError("This was answered already, perhaps in another tab. Nothing was changed.")
            if shown not in self._known or self._known[shown][0] != annotator:
                raise StaleError(GONE)
            seen = self._known[shown][1]
            if key == "skip":
                self._skipped.setdefault(annotator, set()).add(seen.question.number)
                self._current.pop(annotator, None)
                self._accepted[shown] = key
                return ""
            is_late = seen.question.state == "withdrawn"
            self._append({
                "annotator": annotator, "question": seen.question.number, "step": seen.question.step,
                "prompt": seen.question.prompt, "images": list(seen.images), "key": key, "shown": shown,
                "favourite": seen.question.favourite, "time": _now(),
            })  # fmt: skip
            self._open = [one for one in self._open if one is not seen.question]
            seen.question.state = "withdrawn" if is_late else "answered"
            self._current.pop(annotator, None)
            return LATE if is_late else ""

    def _undo(self, annotator: str, shown: str) -> str:
        if shown != self.last_vote(annotator):
            raise StaleError("Another vote was the last one. Nothing was changed.")
        row = self._rows[self._history[annotator][-1]]
        self._append({"annotator": annotator, "key": "undo", "shown": shown, "time": _now()})
        question = LiveQuestion(row["question"], row["step"], row["prompt"], tuple(row["images"]), row["favourite"])
        self._open.append(question)
        self._show(annotator, question)
        return "The last vote was taken back; what was already learned from it fades."

    def _append(self, row: Mapping[str, Any]) -> None:
        self._file.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        before = len(self._rows)
        self._apply(row)
        if len(self._rows) > before:
            for record in records_of(row, self.kind):
                append_line(self.records_path, json.dumps(record, ensure_ascii=False) + "\n")
        else:
            self._write_records()
        self._changed.notify_all()

    def _apply(self, row: Mapping[str, Any]) -> None:
        history = self._history.setdefault(row["annotator"], [])
        if row["key"] == "undo":
            del self._rows[history.pop()]
        else:
            history.append(self._num_lines)
            self._rows[self._num_lines] = dict(row)
            self._num_questions = max(self._num_questions, row["question"] + 1)
        self._accepted[row["shown"]] = row["key"]
        self._num_lines += 1

    def _replay(self, line: bytes, *, where: str) -> None:
        try:
            row = parse_json(line.decode())
            if row["key"] not in KEYS[self.kind]:
                raise ValueError(row["key"])
            if row["key"] != "undo" and len(row["images"]) != NUM_IMAGES[self.kind]:
                raise ValueError(row["images"])
            self._apply(row)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"{where} is no vote on a question of the kind {self.kind}: {line[:80]!r}. Restore the file, or remove "
                f"the line."
            ) from error

    def _write_records(self) -> None:
        records = [record for row in self._rows.values() for record in records_of(row, self.kind)]
        write_atomically(self.records_path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))

    # --- what was voted ---

    @property
    def num_votes(self) -> int:
        """Number of votes that were not undone."""
        with self._lock:
            return len(self._rows)

    def votes_of(self, annotator: str) -> int:
        """Return the number of an annotator's votes that were not undone."""
        with self._lock:
            return len(self._history.get(annotator, []))

    def last_vote(self, annotator: str) -> str | None:
        """Return the token of an annotator's last vote that was not undone; None without one."""
        with self._lock:
            own = self._history.get(annotator)
            return self._rows[own[-1]]["shown"] if own else None

    def records(self) -> list[Record]:
        """Return the votes that state a preference, a tie or a label, in their order, for a reward model."""
        with self._lock:
            rows = list(self._rows.values())
        return [as_record(one, self.folder) for row in rows for one in records_of(row, self.kind)]

    def foreseen(self, *, last: int) -> tuple[int, int]:
        """Return how many of the `last` decided votes chose the image that the reward model preferred before, and of
        how many."""
        with self._lock:
            decided = [row for row in self._rows.values() if row["key"] in "1234" and row["favourite"] is not None]
        hits = [row["images"][int(row["key"]) - 1] == row["favourite"] for row in decided[-last:]]
        return sum(hits), len(hits)

    def wait(self, is_over: Callable[[], bool]) -> None:
        """Return once `is_over()` is true, which is asked after each vote and a few times a second."""
        with self._changed:
            while not is_over():
                self._changed.wait(timeout=0.2)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
