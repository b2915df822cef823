"""Agreement between annotators and with a reward, and pairwise win rates, with 95 % intervals."""

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

from rlhf_t2i.annotation.questions import Question, Role
from rlhf_t2i.annotation.records import Answer, Choice

_CHOICES: tuple[Choice, ...] = get_args(Choice)
Choices = Mapping[int, Choice]
"""The choices of one annotator by the index of the question."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval; nan if it, or the interval, is undefined."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "undefined"
        if np.isnan(self.low):
            return f"{self.value:z.2f}"
        return f"{self.value:z.2f} [{self.low:z.2f}, {self.high:z.2f}]"


_UNDEFINED = Estimate(np.nan, np.nan, np.nan)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of two annotators, or of an annotator and a reward."""

    names: tuple[str, str]
    count: int
    """Questions that both answered; with a reward, only those with a preference of both."""
    raw: Estimate
    """Fraction of equal answers, with Wilson's interval."""
    kappa: Estimate
    """Cohen's kappa over first, second, tie, both bad and cannot tell (with a reward: first and second), with a
    bootstrap interval over the questions."""


def wilson(count: int, total: int) -> Estimate:
    """Return count / total with Wilson's score interval (1927); undefined for a total of 0."""
    if not total:
        return _UNDEFINED
    ends = binomtest(count, total).proportion_ci(method="wilson")
    return Estimate(count / total, float(ends.low), float(ends.high))


def cohens_kappa(tables: Int[np.ndarray, "*R K K"]) -> Float[np.ndarray, "*R"]:
    """Return the agreement beyond chance (Cohen 1960): (observed - expected) / (1 - expected).

    tables[..., i, j] counts the questions that one answered with i and the other with j; expected is the agreement of
    two independent annotators with the same marginals. The result is nan if both always gave the same single answer.
    """
    fractions = tables / tables.sum((-2, -1), keepdims=True)
    observed = np.trace(fractions, axis1=-2, axis2=-1)
    expected = (fractions.sum(-1) * fractions.sum(-2)).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected < 1 - 1e-12, (observed - expected) / (1 - expected), np.nan)


def kappa_estimate(table: Int[np.ndarray, "K K"], *, num_resamples: int = 2000, seed: int = 0) -> Estimate:
    """Return Cohen's kappa with a percentile bootstrap over the questions; resamples without a kappa are ignored.

    There is no interval if all resamples give the same: without any disagreement the bootstrap cannot draw one.
    """
    total = int(table.sum())
    value = float(cohens_kappa(table)) if total else np.nan
    if np.isnan(value):
        return _UNDEFINED
    drawn = np.random.default_rng(seed).multinomial(total, (table / total).ravel(), size=num_resamples)
    low, high = np.nanpercentile(cohens_kappa(drawn.reshape(-1, *table.shape)), [2.5, 97.5])
    return Estimate(value, np.nan, np.nan) if low == high else Estimate(value, float(low), float(high))


def between_annotators(choices: Mapping[str, Choices]) -> list[Agreement]:
    """Compare every two annotators on the questions that both answered; two without such questions are omitted."""
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


def with_reward(choices: Mapping[str, Choices], scores: Float[Tensor, "N 2"], *, reward: str) -> list[Agreement]:
    """Compare each annotator, and their majority, with the image that a reward scores higher.

    `scores` are of both images of each question, `reward` is the name. Questions without a preference of the annotator
    or with equal scores are omitted.
    """
    gaps = (scores[:, 0] - scores[:, 1]).tolist()
    all_together = [("the majority", majority(choices))] if len(choices) > 1 else []
    found: list[Agreement] = []
    for name, own in [*choices.items(), *all_together]:
        table = np.zeros((2, 2), dtype=np.int64)
        for question, choice in own.items():
            if choice in ("first", "second") and gaps[question]:
                table[int(choice == "second"), int(gaps[question] < 0)] += 1
        count = int(table.sum())
        found.append(Agreement((name, reward), count, wilson(int(np.trace(table)), count), kappa_estimate(table)))
    return found


def majority(choices: Mapping[str, Choices]) -> dict[int, Choice]:
    """Return for each question the image that more annotators preferred; questions without a majority are omitted."""
    votes: dict[int, Counter[Choice]] = {}
    for own in choices.values():
        for question, choice in own.items():
            votes.setdefault(question, Counter())[choice] += 1
    leads = {question: counts["first"] - counts["second"] for question, counts in votes.items()}
    return {question: "first" if lead > 0 else "second" for question, lead in leads.items() if lead}


@dataclass(frozen=True, slots=True)
class WinRate:
    """Comparisons of the images of one source with those of another."""

    sources: tuple[str, str]
    wins: int
    """Answers that preferred the image of the first source."""
    losses: int
    ties: int
    bad: int
    """Answers that both images are bad."""
    unsure: int
    """Answers of annotators who cannot tell."""
    rate: Estimate
    """wins / (wins + losses), with Wilson's interval. The interval assumes independent answers, and is too narrow if
    several annotators answered the same questions."""
    criterion: str | None = None

    @property
    def shares(self) -> list[float]:
        """Fractions of wins, ties, both bad, cannot tell and losses among all answers, which sum to 1."""
        counts = [self.wins, self.ties, self.bad, self.unsure, self.losses]
        return [count / (sum(counts) or 1) for count in counts]


def pairwise_win_rates(answers: Mapping[str, Sequence[Answer]], questions: Sequence[Question]) -> list[WinRate]:
    """Return the win rates between every two sources, over all annotators, in order of their first answer."""
    counts: dict[tuple[tuple[str, str], str | None], Counter[Choice]] = {}
    for answer in (answer for own in answers.values() for answer in own):
        question = questions[answer.question]
        if question.sources[0] != question.sources[1]:
            counts.setdefault((question.sources, question.criterion), Counter())[answer.choice] += 1
    return [
        WinRate(
            sources, c["first"], c["second"], c["tie"], c["bad"], c["unsure"],
            wilson(c["first"], c["first"] + c["second"]), criterion,
        )
        for (sources, criterion), c in counts.items()
    ]  # fmt: skip


def passed(answers: Sequence[Answer], questions: Sequence[Question], *, role: Role) -> Estimate:
    """Return the fraction of an annotator's answers to questions of a role that are the known ones; nan without any."""
    known = [answer.choice == "first" for answer in answers if questions[answer.question].role == role]
    return wilson(sum(known), len(known))


def disagreements(choices: Mapping[str, Choices]) -> dict[int, dict[str, Choice]]:
    """Return the questions of which some prefer the first image and some the second, with everyone's choice."""
    found: dict[int, dict[str, Choice]] = {}
    for name, own in choices.items():
        for question, choice in own.items():
            found.setdefault(question, {})[name] = choice
    return {q: votes for q, votes in sorted(found.items()) if {"first", "second"} <= set(votes.values())}
