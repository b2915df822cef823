"""Hard negatives: the same image under a prompt in which one thing is wrong.

A winner of a pair serves its prompt; so it should score lower for the same prompt with another colour, number, place
or attribute. LLaVA-Reward's alignment data hold such records (arXiv:2507.21391); how theirs were written is not
published.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

from reward_model.datasets.overlap import normalise, normalised_prompts
from reward_model.types import PreferencePair, Record

_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_OPPOSITES = (
    # Where things are.
    *(("to the left of", "to the right of"), ("on the left", "on the right"), ("above", "below")),
    *(("in front of", "behind"), ("on top of", "underneath"), ("inside", "outside"), ("near", "far from")),
    # How things are.
    *(("big", "small"), ("large", "tiny"), ("tall", "short"), ("wide", "narrow"), ("thick", "thin")),
    *(("old", "young"), ("ancient", "modern"), ("open", "closed"), ("empty", "full"), ("wet", "dry")),
    *(("bright", "dark"), ("hot", "cold"), ("round", "square"), ("smooth", "rough"), ("shiny", "matte")),
    *(("wooden", "metal"), ("happy", "sad"), ("day", "night"), ("summer", "winter"), ("indoor", "outdoor")),
)
_OTHERS: dict[str, tuple[str, ...]] = {
    **{word: tuple(other for other in kind if other != word) for kind in (_COLOURS, _NUMBERS) for word in kind},
    "grey": tuple(other for other in _COLOURS if other != "gray"),
    **{word: (other,) for pair in _OPPOSITES for word, other in (pair, pair[::-1])},
}
# Longer ones first: "on the left" must not be found within "to the left of".
_WORDS = re.compile(rf"\b({'|'.join(sorted(_OTHERS, key=len, reverse=True))})\b", flags=re.IGNORECASE)


def hard_negatives(
    records: Sequence[Record], *, share: float, seed: int, held_back: Iterable[Record] = ()
) -> list[PreferencePair]:
    """For about `share` of the images that won under a prompt, one pair of them with the prompt against a wrong one.

    Ties, labels and pairs of two prompts give none, nor does a prompt without a word that can be exchanged. Whether
    and how a prompt is changed only depends on `seed`, the prompt and the image, not on the other records. Prompts
    of the records `held_back` are never written: they would no longer be unread.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it must be in [0, 1].")
    pairs: dict[tuple[str, str], PreferencePair] = {}
    unread = normalised_prompts(held_back)
    for record in records:
        if not isinstance(record, PreferencePair) or record.tie or record.winner_prompt != record.loser_prompt:
            continue
        prompt, key = record.winner_prompt, (str(record.winner), record.winner_prompt)
        draw = random.Random(f"{seed}\0{prompt}\0{record.winner.name}")
        if key in pairs or draw.random() >= share:
            continue
        wrong = sorted({other for other in wrong_prompts(prompt) if normalise(other) not in unread})
        if wrong:
            where = f"hard negative of {record.where}"
            pairs[key] = PreferencePair(record.winner, record.winner, prompt, draw.choice(wrong), where=where)
    return list(pairs.values())


def wrong_prompts(prompt: str) -> Iterator[str]:
    """The prompt with one word exchanged for another of its kind, or with two words of a kind in each other's place.

    "a red cube on a blue ball": "a green cube on a blue ball" and so on, and "a blue cube on a red ball".
    """
    found = list(_WORDS.finditer(prompt))
    for match in found:
        for word in _OTHERS[match[0].lower()]:
            yield _replaced(prompt, [(match, word)])
    for one, other in combinations(found, 2):
        first, second = one[0].lower(), other[0].lower()
        # "a red and a blue ball" and "a red ball and a blue ball" mean the same with both exchanged.
        differ = _noun_behind(prompt, one) != _noun_behind(prompt, other)
        if second in _OTHERS[first] and differ and None not in (_noun_behind(prompt, one), _noun_behind(prompt, other)):
            yield _replaced(prompt, [(one, second), (other, first)])


def _replaced(prompt: str, changes: Sequence[tuple[re.Match[str], str]]) -> str:
    """With the case of the first letter kept, and `a` or `an` before it as the new word needs it."""
    for match, word in reversed(changes):
        before, old = prompt[: match.start()], match[0]
        word = word.capitalize() if old[0].isupper() else word
        article = re.search(r"\b([Aa])n?(\s+)$", before)
        if article:
            n = "n" if word[0].lower() in "aeiou" and word.lower() != "one" else ""
            before = f"{before[: article.start()]}{article[1]}{n}{article[2]}"
        prompt = f"{before}{word}{prompt[match.end() :]}"
    return prompt


def _noun_behind(prompt: str, match: re.Match[str]) -> str | None:
    """The word behind a match, if it directly follows and is none that joins two."""
    behind = re.match(r"\s+(\w+)", prompt[match.end() :])
    return None if behind is None or behind[1].lower() in ("and", "or") else behind[1].lower()
