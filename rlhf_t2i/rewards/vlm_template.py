"""What a VLM behind HTTP is asked about an image, and the score that its answer is: a template file in YAML.

    form: yes_no               # or digits, or rubric
    question: 'Does this image show "{prompt}"? Answer yes or no.'

`{prompt}` and other `{field}` are taken from the row of the prompt. Beside these a file may have `model`, `scale`,
`aspects`, `max_tokens`, `concurrency`, `timeout` and `attempt_timeout`: the fields of `VlmTemplate`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from reward_model.text_files import read_yaml

_FIELD = re.compile(r"\{(\w+)\}")
_SPACE = " \n\t\u2581\u0120"
"""Blanks, and those of SentencePiece and of byte-level vocabularies, before the text of a token."""


class BadAnswerError(ValueError):
    """An answer of which no score can be made; another attempt may succeed."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class VlmTemplate:
    """A question about an image, and how its answer is scored, always in [0, 1].

        yes_no   P(yes) / (P(yes) + P(no)) at the first token of the answer, summed over spellings
        digits   sum_i P(i) i / scale over the digits 0 to scale, normalised to 1, at the first token
        rubric   mean over aspects of (rating - 1) / (scale - 1), from generated lines "ASPECT: RATING"; an aspect
                 that is rated n/a does not count

    The first two need no parsing and one token; they need a server that returns log-probabilities.
    """

    form: Literal["yes_no", "digits", "rubric"]
    question: str
    model: str | None = None
    """Name of the model at the server; None is the first one that it lists."""
    scale: Annotated[int, Ge(2), Le(9)] = 5
    """Highest digit or rating."""
    aspects: tuple[str, ...] = ()
    """What a rubric rates."""
    max_tokens: Annotated[int, Ge(1)] = 512
    """Tokens that the answer to a rubric may have."""
    concurrency: Annotated[int, Ge(1)] = 16
    """Images that are asked about at once."""
    timeout: Annotated[float, Gt(0)] = 600.0
    """Seconds for all images of a call."""
    attempt_timeout: Annotated[float, Gt(0)] = 120.0
    """Seconds for one answer, after which it is asked for again."""

    def __post_init__(self) -> None:
        if not _FIELD.search(self.question):
            raise ValueError("question has no {prompt} or other field of a row")
        if (self.form == "rubric") != bool(self.aspects):
            raise ValueError("aspects belong to the form rubric, which needs at least one")

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a row that the question needs besides its prompt."""
        return tuple(dict.fromkeys(name for name in _FIELD.findall(self.question) if name != "prompt"))

    def ask(self, row: Mapping[str, Any]) -> str:
        """Return the question for a row."""
        return _FIELD.sub(lambda field: str(row[field[1]]), self.question)

    def options(self) -> dict[str, Any]:
        """Return the options of the request."""
        if self.form == "rubric":
            return {"max_tokens": self.max_tokens, "temperature": 0}
        return {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}

    def score(self, answer: Any) -> float:
        """Return the score of a chat completion, as JSON; raises BadAnswerError for one without a score."""
        if self.form == "rubric":
            return self._rating(_text(answer))
        chances = _first_token(answer)
        match self.form:
            case "yes_no":
                values = {"yes": 1.0, "no": 0.0}
            case "digits":
                values = {str(digit): digit / self.scale for digit in range(self.scale + 1)}
        found = {name: chance for name, chance in chances.items() if name in values}
        total = math.fsum(found.values())
        if not total > 0:
            raise BadAnswerError(f"none of {', '.join(values)} among the likely first tokens {list(chances)[:5]}")
        return math.fsum(chance * values[name] for name, chance in found.items()) / total

    def _rating(self, text: str) -> float:
        ratings: list[float] = []
        for aspect in self.aspects:
            # "**Style** (1-5): 4/5" as well as "Style: 4"; the last one counts, after any reasoning.
            lines = re.findall(
                rf"{re.escape(aspect)}\W*(?:\([^)]*\)\W*)?[:=]\W*(n/?a\b|\d+(?:\.\d+)?)", text, re.IGNORECASE
            )
            if not lines:
                raise BadAnswerError(f"no line {aspect!r}: RATING in the answer {text[:200]!r}")
            if lines[-1][0] not in "nN":
                ratings.append(float(lines[-1]))
        if bad := [rating for rating in ratings if not 1 <= rating <= self.scale]:
            raise BadAnswerError(f"the rating {bad[0]:g} in the answer, which must be between 1 and {self.scale}")
        if not ratings:
            raise BadAnswerError("an answer to which no aspect applies")
        return (math.fsum(ratings) / len(ratings) - 1) / (self.scale - 1)


YES_NO = VlmTemplate(form="yes_no", question='Does this image show "{prompt}"? Answer yes or no.')
"""The template without a file."""


def read_template(file: str) -> VlmTemplate:
    """Read a template; raises FileNotFoundError, or ValueError that names the file and what is wrong."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no template {file!r} of a vlm reward.")
    try:
        return TypeAdapter(VlmTemplate).validate_python(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ValueError(f"{file}: {where}: {first['msg']}; the given value is {first['input']!r}.") from None


def _first_token(answer: Any) -> dict[str, float]:
    """Return the probability of each likely first token, by its text without blanks in lower case."""
    try:
        tokens = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        pairs = [(str(token["token"]).strip(_SPACE).lower(), float(token["logprob"])) for token in tokens]
    except (KeyError, IndexError, TypeError, ValueError):
        raise BadAnswerError(
            f"no log-probabilities (choices[0].logprobs.content[0].top_logprobs), which yes_no and digits need (use a "
            f"server that returns them or the form rubric), but {json.dumps(answer)[:200]}"
        ) from None
    chances: dict[str, float] = {}
    for text, log_prob in sorted(pairs, key=lambda pair: -pair[1]):
        chances[text] = chances.get(text, 0.0) + math.exp(min(log_prob, 0.0))
    return chances


def _text(answer: Any) -> str:
    try:
        choice = answer["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        text, reason = None, None
    if not isinstance(text, str) or not text.strip():
        raise BadAnswerError(f"no text (choices[0].message.content), but {json.dumps(answer)[:200]}")
    if reason == "length":
        raise BadAnswerError(f"half an answer, cut at max_tokens, that ends with {text[-80:]!r}")
    return text
