"""Who agrees with whom, and how sure that is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import get_args

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import binomtest
from torch import Tensor

from rlhf_t2i.annotation.answers import Choice, Given
from rlhf_t2i.annotation.questions import Question

_CHOICES: tuple[Choice, ...] = get_args(Choice)
Choices = Mapping[int, Choice]
"""Of one annotator, by the number of the question."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its interval of 95 %; nan where there is nothing to tell it from."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "undefined"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


_UNDEFINED = Estimate(np.nan, np.nan, np.nan)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two say the same of the same questions."""

    names: tuple[str, str]
    count: int
    """Questions that both answered or, with a judge, that both decided."""
    raw: Estimate
    """The share of equal answers, with Wilson's interval."""
    kappa: Estimate
    """Cohen's, over first, second, tie and both bad, with a bootstrap interval over the questions."""


def wilson(count: int, total: int) -> Estimate:
    """A share with Wilson's score interval (1927); undefined for a total of 0."""
    if not total:
        return _UNDEFINED
    ends = binomtest(count, total).proportion_ci(method="wilson")
    return Estimate(count / total, float(ends.low), float(ends.high))


def cohens_kappa(tables: Int[np.ndarray, "*R K K"]) -> Float[np.ndarray, "*R"]:
    """Agreement beyond chance (Cohen 1960): (observed - expected) / (1 - expected).

    tables[..., i, j] counts the questions to which one said i and the other j; expected is what two would agree on who
    give the same answers as often, but at random. It is nan where both always gave one and the same answer.
    """
    shares = tables / tables.sum((-2, -1), keepdims=True)
    observed = np.trace(shares, axis1=-2, axis2=-1)
    expected = (shares.sum(-1) * shares.sum(-2)).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected < 1 - 1e-12, (observed - expected) / (1 - expected), np.nan)


def kappa_estimate(table: Int[np.ndarray, "K K"], *, num_resamples: int = 2000, seed: int = 0) -> Estimate:
    """Cohen's kappa with a percentile bootstrap over the questions; resamples without a kappa are left out."""
    total = int(table.sum())
    value = float(cohens_kappa(table)) if total else np.nan
    if np.isnan(value):
        return _UNDEFINED
    drawn = np.random.default_rng(seed).multinomial(total, (table / total).ravel(), size=num_resamples)
    low, high = np.nanpercentile(cohens_kappa(drawn.reshape(-1, *table.shape)), [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def between_annotators(choices: Mapping[str, Choices]) -> list[Agreement]:
    """Each two annotators, on the questions that both answered; those who share none are left out."""
    found: list[Agreement] = []
    for one, other in combinations(choices, 2):
        shared = choices[one].keys() & choices[other].keys()
        table = np.zeros((len(_CHOICES), len(_CHOICES)), dtype=np.int64)
        for question in shared:
            table[_CHOICES.index(choices[one][question]), _CHOICES.index(choices[other][question])] += 1
        if shared:
            raw = wilson(int(np.trace(table)), len(shared))
            found.append(Agreement((one, other), len(shared), raw, kappa_estimate(table)))
    return found


def with_reward(choices: Mapping[str, Choices], scores: Float[Tensor, "N 2"], *, judge: str) -> list[Agreement]:
    """Each annotator, and the majority of them, against the image that a judge scores higher.

    Ties and "both bad" of people, and equal scores, are left out, and so is a majority without a lead.
    """
    gaps = (scores[:, 0] - scores[:, 1]).tolist()
    everyone = [("the majority", majority(choices))] if len(choices) > 1 else []
    found: list[Agreement] = []
    for name, own in [*choices.items(), *everyone]:
        table = np.zeros((2, 2), dtype=np.int64)
        for question, choice in own.items():
            if choice in ("first", "second") and gaps[question]:
                table[int(choice == "second"), int(gaps[question] < 0)] += 1
        count = int(table.sum())
        found.append(Agreement((name, judge), count, wilson(int(np.trace(table)), count), kappa_estimate(table)))
    return found


def majority(choices: Mapping[str, Choices]) -> dict[int, Choice]:
    """For each question the image that more annotators preferred; without a lead the question is left out."""
    votes: dict[int, Counter[Choice]] = {}
    for own in choices.values():
        for question, choice in own.items():
            votes.setdefault(question, Counter())[choice] += 1
    leads = {question: counts["first"] - counts["second"] for question, counts in votes.items()}
    return {question: "first" if lead > 0 else "second" for question, lead in leads.items() if lead}


@dataclass(frozen=True, slots=True)
class Duel:
    """How often images of one source were preferred to those of another."""

    sources: tuple[str, str]
    wins: int
    losses: int
    ties: int
    bad: int
    share: Estimate
    """Of wins among what was decided, with Wilson's interval. It takes answers of several people to one question for
    independent, and is too narrow where they are not."""


def duels(standing: Mapping[str, Sequence[Given]], questions: Sequence[Question]) -> list[Duel]:
    """What all annotators together said of each two different sources, in the order in which they were answered."""
    counts: dict[tuple[str, str], Counter[Choice]] = {}
    for given in (given for own in standing.values() for given in own):
        sources = questions[given.question].sources
        if sources[0] != sources[1]:
            counts.setdefault(sources, Counter())[given.choice] += 1
    return [
        Duel(sources, c["first"], c["second"], c["tie"], c["bad"], wilson(c["first"], c["first"] + c["second"]))
        for sources, c in counts.items()
    ]
