"""Hard negatives: pairs of one image under its prompt and under a prompt with one changed word.

The winner of a pair matches its prompt, so it should score lower for the same prompt with another colour, number,
position or attribute. LLaVA-Reward's alignment data contain such records (arXiv:2507.21391); how they were made is
not published.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from reward_model.datasets.keys import prompt_key
from reward_model.datasets.scratch import filled, scratch
from reward_model.datasets.table import RecordTable
from reward_model.types import PreferencePair, Record

_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_OPPOSITES = (
    # Positions.
    *(("to the left of", "to the right of"), ("on the left", "on the right"), ("above", "below")),
    *(("in front of", "behind"), ("on top of", "underneath"), ("inside", "outside"), ("near", "far from")),
    # Attributes.
    *(("big", "small"), ("large", "tiny"), ("tall", "short"), ("wide", "narrow"), ("thick", "thin")),
    *(("old", "young"), ("ancient", "modern"), ("open", "closed"), ("empty", "full"), ("wet", "dry")),
    *(("bright", "dark"), ("hot", "cold"), ("round", "square"), ("smooth", "rough"), ("shiny", "matte")),
    *(("wooden", "metal"), ("happy", "sad"), ("day", "night"), ("summer", "winter"), ("indoor", "outdoor")),
)
_REPLACEMENTS: dict[str, tuple[str, ...]] = {
    **{word: tuple(other for other in kind if other != word) for kind in (_COLOURS, _NUMBERS) for word in kind},
    "grey": tuple(other for other in _COLOURS if other != "gray"),
    **{word: (other,) for pair in _OPPOSITES for word, other in (pair, pair[::-1])},
}
# Longest first, so that "on the left" is not matched within a longer expression.
_WORDS = re.compile(rf"\b({'|'.join(sorted(_REPLACEMENTS, key=len, reverse=True))})\b", flags=re.IGNORECASE)


def hard_negatives(
    records: Iterable[Record], *, fraction: float, seed: int, held_out: np.ndarray | None = None
) -> RecordTable:
    """Return one hard negative for about `fraction`, in [0, 1], of the distinct (winner image, prompt) of the pairs.

    Ties, labels, pairs of two prompts and prompts without a replaceable word give none. The random choice for a prompt
    depends on `seed`, the prompt and the name of the image only, not on the other records. No prompt whose `prompt_key`
    is among `held_out` is generated, so that validation and test prompts stay unseen in training.

    Raises ValueError if `fraction` is not in [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must be in [0, 1].")
    excluded = np.unique(held_out) if held_out is not None else np.zeros(0, np.uint64)
    table = RecordTable.of(records)
    return RecordTable.in_file(_negatives(table, fraction=fraction, seed=seed, excluded=excluded) if fraction else ())


def _negatives(table: RecordTable, *, fraction: float, seed: int, excluded: np.ndarray) -> Iterator[PreferencePair]:
    inputs = _inputs(table)
    distinct = filled([inputs], len(inputs), np.uint64)
    distinct.sort()
    is_made = scratch(len(distinct), bool)
    for number, record in enumerate(table):
        if not isinstance(record, PreferencePair) or record.tie or record.winner_prompt != record.loser_prompt:
            continue
        prompt, place = record.winner_prompt, np.searchsorted(distinct, inputs[number])
        name = record.winner.name if isinstance(record.winner, Path) else str(record.winner)
        rng = random.Random(f"{seed}\0{prompt}\0{name}")
        if is_made[place] or rng.random() >= fraction:
            continue
        wrong = sorted({other for other in wrong_prompts(prompt) if not _is_among(prompt_key(other), excluded)})
        if wrong:
            is_made[place] = True
            where = f"hard negative of {record.where}"
            yield PreferencePair(record.winner, record.winner, prompt, rng.choice(wrong), where=where)


def _inputs(table: RecordTable) -> np.ndarray:
    """Return 64 bits that stand for the winner's image and prompt of each record, (N,)."""
    sides = (table.column_parts("winner_image_key"), table.column_parts("winner_prompt_key"))
    # An odd factor, so that equal bits of both do not cancel.
    parts = (image ^ (prompt * np.uint64(0x9E3779B97F4A7C15)) for image, prompt in zip(*sides, strict=True))
    return filled(parts, len(table), np.uint64)


def _is_among(key: int, ordered: np.ndarray) -> bool:
    place = np.searchsorted(ordered, np.uint64(key))
    return bool(place < len(ordered) and ordered[place] == key)


def wrong_prompts(prompt: str) -> Iterator[str]:
    """Yield the prompt with one word replaced by another of its kind, and with two words of a kind swapped.

    "a red cube on a blue ball" gives "a green cube on a blue ball" and so on, and "a blue cube on a red ball".
    """
    found = list(_WORDS.finditer(prompt))
    for match in found:
        for word in _REPLACEMENTS[match[0].lower()]:
            yield _replace(prompt, [(match, word)])
    for one, other in combinations(found, 2):
        first, second = one[0].lower(), other[0].lower()
        nouns = _noun_after(prompt, one), _noun_after(prompt, other)
        # "a red and a blue ball" and "a red ball and a blue ball" keep their meaning when the words are swapped.
        if second in _REPLACEMENTS[first] and nouns[0] != nouns[1] and None not in nouns:
            yield _replace(prompt, [(one, second), (other, first)])


def _replace(prompt: str, changes: Sequence[tuple[re.Match[str], str]]) -> str:
    """Replace each match by its word, keeping an upper-case first letter and choosing `a` or `an` before it."""
    for match, word in reversed(changes):
        before, old = prompt[: match.start()], match[0]
        word = word.capitalize() if old[0].isupper() else word
        article = re.search(r"\b([Aa])n?(\s+)$", before)
        if article:
            n = "n" if word[0].lower() in "aeiou" and word.lower() != "one" else ""
            before = f"{before[: article.start()]}{article[1]}{n}{article[2]}"
        prompt = f"{before}{word}{prompt[match.end() :]}"
    return prompt


def _noun_after(prompt: str, match: re.Match[str]) -> str | None:
    """Return the word that directly follows a match in lower case; None if there is none, or it is `and` or `or`."""
    following = re.match(r"\s+(\w+)", prompt[match.end() :])
    return None if following is None or following[1].lower() in ("and", "or") else following[1].lower()
