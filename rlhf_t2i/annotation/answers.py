"""What people answered, on the disk before it counts.

answers.jsonl   everything that was answered and undone, one line each, only ever added to: the truth
pairs.jsonl     what stands of it, in the format of train_reward_model.py and diffusion_dpo.py; made anew each time
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from rlhf_t2i.annotation.questions import IMAGES, Question
from rlhf_t2i.files import flush, write_atomically
from rlhf_t2i.seeds import ANNOTATE, seed_for

Key = Literal["left", "right", "tie", "bad", "undo"]
"""What an annotator can press; `bad` says that neither image is any good."""
Choice = Literal["first", "second", "tie", "bad"]
"""The same, whichever side the images were on."""


class StaleError(ValueError):
    """An answer to a pair that is not the open one."""


@dataclass(frozen=True, slots=True)
class Given:
    """One answer that stands."""

    question: int
    key: Key
    first_on_left: bool

    @property
    def choice(self) -> Choice:
        match self.key:
            case "left" | "right":
                return "first" if (self.key == "left") == self.first_on_left else "second"
            case "tie" | "bad":
                return self.key
            case "undo":
                raise AssertionError("what was undone does not stand")


@dataclass(frozen=True, slots=True)
class Showing:
    """What an annotator has before them."""

    token: str
    """Of this pair on this occasion: an answer that bears another one is not about what is open."""
    question: int | None
    """None when all are answered."""
    first_on_left: bool
    following: int | None
    """The question after it."""
    num_answered: int


class Answers:
    """The answers of all annotators to the questions of one folder; safe to use from several threads."""

    def __init__(self, folder: Path, questions: Sequence[Question], *, seed: int) -> None:
        """Take up what was answered before. `seed` decides order and sides, for each annotator anew.

        A last line that a crash has cut off was never confirmed to anyone, and is removed. Raises ValueError for any
        other line that is no answer, and BlockingIOError while another server collects into this folder.
        """
        self.folder, self.questions, self.seed = folder, questions, seed
        self._standing: dict[str, list[Given]] = {}
        self._lines: dict[str, list[str]] = {}
        self._num_events: dict[str, int] = {}
        self._accepted: dict[str, Key] = {}
        self._plans: dict[str, tuple[list[int], list[bool]]] = {}
        self._lock = threading.RLock()
        self.path = folder / "answers.jsonl"
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            flush(folder)  # a new file is only found again once its folder is on the disk
            self.torn = _cut_torn_line(self.path, self._file)
            for number, line in enumerate(self.path.read_bytes().split(b"\n")[:-1], start=1):
                self._replay(line, where=f"{self.path}:{number}")
        except BlockingIOError as error:
            os.close(self._file)
            raise BlockingIOError(
                f"Another server collects answers into {folder}; stop it, or name another --run_folder."
            ) from error
        except ValueError:
            os.close(self._file)
            raise
        self._write_pairs()

    def close(self) -> None:
        """Let another server have the folder."""
        os.close(self._file)

    # --- asking ---

    def showing(self, annotator: str) -> Showing:
        """The first question, in the annotator's own order, that they have not answered."""
        with self._lock:
            order, first_on_left = self._plan(annotator)
            standing = self._standing.get(annotator, [])
            answered = {given.question for given in standing}
            waiting = [question for question in order if question not in answered][:2]
            occasion = f"{self.seed}\0{annotator}\0{self._num_events.get(annotator, 0)}"
            return Showing(
                token=hashlib.sha256(occasion.encode()).hexdigest()[:20],
                question=waiting[0] if waiting else None,
                first_on_left=first_on_left[waiting[0]] if waiting else True,
                following=waiting[1] if len(waiting) > 1 else None,
                num_answered=len(standing),
            )

    def first_on_left(self, annotator: str, question: int) -> bool:
        """On which side an annotator sees the images of a question."""
        return self._plan(annotator)[1][question]

    def _plan(self, annotator: str) -> tuple[list[int], list[bool]]:
        """An annotator's order of the questions, and for each question whether its first image is on the left."""
        if annotator not in self._plans:
            digest = int.from_bytes(hashlib.sha256(annotator.encode()).digest()[:4])
            rng = np.random.default_rng(seed_for(self.seed, ANNOTATE, digest))
            count = len(self.questions)
            self._plans[annotator] = rng.permutation(count).tolist(), (rng.random(count) < 0.5).tolist()
        return self._plans[annotator]

    # --- answering ---

    def give(self, annotator: str, *, shown: str, key: Key) -> None:
        """Take an answer to the pair that was `shown`, or undo the one before it; it is on the disk when this returns.

        The same answer to the same showing again (a double click, a request that is repeated because its reply was
        lost) changes nothing. Raises StaleError for another answer to a pair that is not open any more, and ValueError
        where there is nothing to answer or to undo; OSError, with nothing taken, if the disk refuses.
        """
        with self._lock:
            showing = self.showing(annotator)
            if self._accepted.get(shown) == key:
                return
            if shown != showing.token:
                raise StaleError(
                    "That pair is not open any more, perhaps because it was answered in another tab: nothing was "
                    "changed. Here is the open one; undo (u) leads back."
                )
            if key == "undo" and not showing.num_answered:
                raise ValueError("There is nothing to undo.")
            if key != "undo" and showing.question is None:
                raise ValueError("All pairs are answered; undo (u) leads back to the last.")
            question = self._standing[annotator][-1].question if key == "undo" else showing.question
            row = {
                "annotator": annotator,
                "question": question,
                "key": key,
                "first_on_left": showing.first_on_left,
                "shown": shown,
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            }
            self._append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self._take(row)
            self._write_pairs()

    def _append(self, line: bytes) -> None:
        """All of the line is on the disk, or none of it is in the file."""
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(f"The disk of {self.path} is full.")
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def _replay(self, line: bytes, *, where: str) -> None:
        try:
            row = json.loads(line)
            assert row["key"] in get_args(Key)
            assert row["question"] in range(len(self.questions))
            assert isinstance(row["first_on_left"], bool)
            self._take(row)
        except (ValueError, KeyError, TypeError, IndexError, AssertionError) as error:
            raise ValueError(
                f"{where} is no answer to one of {len(self.questions)} questions: {line[:80]!r}. Restore the file, or "
                f"take the line out."
            ) from error

    def _take(self, row: Mapping[str, Any]) -> None:
        """What a line of the file changes."""
        annotator: str = row["annotator"]
        standing, lines = self._standing.setdefault(annotator, []), self._lines.setdefault(annotator, [])
        if row["key"] == "undo":
            standing.pop()
            lines.pop()
        else:
            given = Given(row["question"], row["key"], row["first_on_left"])
            standing.append(given)
            preferred = preference(self.questions[given.question], given, annotator=annotator)
            lines.append(json.dumps(preferred, ensure_ascii=False) + "\n" if preferred else "")
        self._num_events[annotator] = self._num_events.get(annotator, 0) + 1
        self._accepted[row["shown"]] = row["key"]

    # --- what stands ---

    def standing(self) -> dict[str, list[Given]]:
        """Each annotator's answers that were not undone, in the order in which they were given."""
        with self._lock:
            return {annotator: list(given) for annotator, given in self._standing.items()}

    def _write_pairs(self) -> None:
        text = "".join(line for lines in self._lines.values() for line in lines)
        write_atomically(self.folder / "pairs.jsonl", text)


def preference(question: Question, given: Given, *, annotator: str) -> dict[str, object] | None:
    """An answer as a line of a preference file; None for "both bad", which prefers nothing.

    A tie is kept as one: train_reward_model.py learns from it that the images are equally good, diffusion_dpo.py
    passes over it. Each annotator's answer is a line of its own, so what they disagree on is there both ways.
    """
    files = [f"{IMAGES}/{name}.png" for name in question.images]
    remarks = {"id": given.question, "comment": annotator}
    match given.choice:
        case "first" | "second":
            winner, loser = files if given.choice == "first" else reversed(files)
            return {"prompt": question.prompt, "winner": winner, "loser": loser, **remarks}
        case "tie":
            return {"prompt": question.prompt, "tie": files, **remarks}
        case "bad":
            return None


def annotator_name(text: str) -> str:
    """A name as it is kept: in lower case and with single blanks, so that one person is not taken for two.

    Raises ValueError for one that is empty, longer than 40 letters, or has control characters.
    """
    name = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    if not 1 <= len(name) <= 40 or not name.isprintable():
        raise ValueError("Please give a name of 1 to 40 letters.")
    return name


def _cut_torn_line(path: Path, file: int) -> bytes:
    """What a crash left of a last line, which this removes; empty if there is none."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.ftruncate(file, whole)
        os.fsync(file)
    return content[whole:]
