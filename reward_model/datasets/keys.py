"""Keys of prompts and images: 64 bits that tell them apart, so that no set of texts has to be held in memory."""

from __future__ import annotations

import hashlib
import unicodedata
from functools import lru_cache


class _Spaces(dict[int, str]):
    """Letters, marks and digits as they are, and a space for every other character."""

    def __missing__(self, code: int) -> str:
        # Without the marks, words of Hindi or Thai would be split.
        character = chr(code)
        self[code] = character if unicodedata.category(character)[0] in "LMN" else " "
        return self[code]


_SPACES = _Spaces()


def normalise(prompt: str) -> str:
    """Return the words of a prompt without case, punctuation and different encodings of the same letters (NFKC).

    "A red  fox!" and "a red fox" give the same. A prompt without letters and digits is only stripped.
    """
    text = unicodedata.normalize("NFKC", prompt).casefold()
    return " ".join(text.translate(_SPACES).split()) or text.strip()


@lru_cache(maxsize=4096)  # the records of a prompt often follow one another
def prompt_key(prompt: str) -> int:
    """Return 64 bits that are equal for prompts with the same `normalise`; 0 for the empty prompt."""
    text = normalise(prompt)
    return text_key(text) if text else 0


def text_key(text: str) -> int:
    """Return the first 64 bits of the SHA-256 of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
