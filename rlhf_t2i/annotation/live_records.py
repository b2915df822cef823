"""Kinds of questions about the images of a model in training, and votes on them as records of a preference file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from reward_model.types import LabelledImage, PreferencePair, Record
from rlhf_t2i.output.run_folder import IMAGES

QuestionKind = Literal["pair", "best_of_four", "good_bad"]
VoteKey = Literal["1", "2", "3", "4", "tie", "good", "bad", "unsure", "skip", "undo"]
KEYS: dict[QuestionKind, tuple[VoteKey, ...]] = {
    "pair": ("1", "2", "tie", "bad", "unsure", "skip", "undo"),
    "best_of_four": ("1", "2", "3", "4", "bad", "unsure", "skip", "undo"),
    "good_bad": ("good", "bad", "unsure", "skip", "undo"),
}
"""The votes that each question allows. `bad` of several images means all of them, `skip` asks about others."""
NUM_IMAGES: dict[QuestionKind, int] = {"pair": 2, "best_of_four": 4, "good_bad": 1}


@dataclass(frozen=True, slots=True)
class NewQuestion:
    """Images to ask about, which are not saved yet; the model may have made them in any size."""

    prompt: str
    images: Sequence[Float[Tensor, "3 _ _"]]
    favourite: int | None = None
    """Index of the image that the reward model prefers."""


@dataclass(slots=True)
class LiveQuestion:
    """A question that people can be asked, or that was withdrawn."""

    number: int
    step: int
    """Training steps that the model had taken when it made the images."""
    prompt: str
    images: tuple[str, ...]
    favourite: str | None
    shown_to: set[str] = field(default_factory=set[str])
    state: Literal["open", "answered", "withdrawn"] = "open"


@dataclass(frozen=True, slots=True)
class Shown:
    """What an annotator's browser shows."""

    token: str
    question: LiveQuestion
    images: tuple[str, ...]
    """The images in the order in which they are shown."""


def records_of(row: Mapping[str, Any], kind: QuestionKind) -> list[dict[str, Any]]:
    """Return a vote as records of a preference file; best of four gives the best one against each of the others."""
    files = [f"{IMAGES}/{name}.png" for name in row["images"]]
    remarks = {"id": row["question"], "comment": row["annotator"]}
    match kind, row["key"]:
        case "good_bad", "good" | "bad":
            return [{"prompt": row["prompt"], "image": files[0], "label": int(row["key"] == "good"), **remarks}]
        case "pair", "tie":
            return [{"prompt": row["prompt"], "tie": files, **remarks}]
        case _, "1" | "2" | "3" | "4":
            winner = files.pop(int(row["key"]) - 1)
            return [{"prompt": row["prompt"], "winner": winner, "loser": loser, **remarks} for loser in files]
        case _:
            return []


def as_record(record: Mapping[str, Any], folder: Path) -> Record:
    """Return a record of a preference file in `folder` as the reward model takes it."""
    prompt, where = record["prompt"], f"vote {record['id']}"
    if "label" in record:
        return LabelledImage(folder / record["image"], prompt, record["label"], where)
    first, second = record.get("tie") or (record["winner"], record["loser"])
    return PreferencePair(folder / first, folder / second, prompt, prompt, tie="tie" in record, where=where)
