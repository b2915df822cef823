"""What became of each reward between two evaluations, in words and with its certainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_t2i.training.metrics import (
    ERROR,
    Points,
    Row,
    by_step,
    number,
    reward_names,
    time_split,
    total,
    trained_rewards,
)


@dataclass(frozen=True, slots=True)
class Change:
    """One reward before and after, in the words in which it is printed."""

    name: str
    verb: str
    before: str
    after: str
    difference: str
    certainty: str


@dataclass(frozen=True, slots=True)
class Gap:
    """What a reward that is trained on gained beside one that is not: where they part, the first is being hacked."""

    trained: str
    held_out: str
    trained_gains: Points
    held_out_gains: Points
    """Of the same steps, in standard deviations that the images of the first evaluation had."""

    @property
    def points(self) -> Points:
        """How much more the trained reward gained than the held-out one."""
        both = zip(self.trained_gains, self.held_out_gains, strict=True)
        return [(step, a - b, math.hypot(e, f)) for (step, a, e), (_, b, f) in both]

    @property
    def sentence(self) -> str:
        """The last gains in words."""
        trained, held_out = self.trained_gains[-1][1], self.held_out_gains[-1][1]
        return (
            f"{self.trained}, which is trained on, gained {trained:+.2f} standard deviations of the first images, "
            f"{self.held_out}, which is not, {held_out:+.2f}: a gap of {self.points[-1][1]:+.2f}"
        )


def decimals(error: float) -> int:
    """How many make the second digit of an error visible; 3 where there is no error."""
    return max(0, 1 - math.floor(math.log10(error))) if error > 0 else 3


def with_error(mean: float, error: float) -> str:
    """A mean to the second digit of its error, and the error; the mean alone where that is unknown."""
    places = decimals(error)
    return f"{mean:.{places}f} ± {error:.{places}f}" if error > 0 else f"{mean:.{places}f}"


def compare(name: str, before: Row, after: Row) -> Change:
    """How one reward differs between two evaluations, taken as independent; under three errors it is noise.

    error = sqrt(before_error^2 + after_error^2), and numbers are printed to its second digit
    """
    means = number(before, name), number(after, name)
    errors = number(before, name + ERROR), number(after, name + ERROR)
    difference, error = means[1] - means[0], math.hypot(*errors)
    num_errors = abs(difference) / error if error > 0 else math.nan
    places = decimals(error)
    first, last = (f"{m:.{places}f} ± {e:.{places}f}" for m, e in zip(means, errors, strict=True))
    verb, certainty = "rose" if difference > 0 else "fell", f"{num_errors:.1f} standard errors"
    if math.isnan(num_errors):
        verb, certainty = "went", "error unknown"
    elif num_errors < 3:
        verb, certainty = "went", f"{certainty}: within noise"
    return Change(name, verb, first, last, f"{difference:+.{places}f}", certainty)


def diversity_of(evaluation: Row) -> tuple[float, float]:
    """Its mean, and its standard error, or 0 where that is not known."""
    return number(evaluation, "diversity"), float(evaluation.get("diversity_error", 0.0))


def reward_changes(rows: Sequence[Row]) -> list[Change]:
    """The last evaluation against the first, for every reward that both hold."""
    ends = by_step(rows, "evaluation")
    return [compare(name, ends[0], ends[-1]) for name in reward_names(ends[:1]) if name in ends[-1]]


def headline(rows: Sequence[Row]) -> str:
    """One sentence: what became of the first reward between the first and the last evaluation."""
    evaluations, changes = by_step(rows, "evaluation"), reward_changes(rows)
    if not changes:
        return "Nothing has been evaluated yet, so nothing can be said about this run"
    change, last = changes[0], evaluations[-1]
    subject = f"{change.name} on the evaluation prompts"
    if len(evaluations) == 1:
        return f"{subject} is {change.before} at update {last['step']}, with nothing to compare it to yet"
    spent = rows[: rows.index(last) + 1]
    num_updates, minutes = len(by_step(spent, "train")), sum(time_split(spent).values()) / 60
    return (
        f"{subject} {change.verb} from {change.before} to {change.after} ({change.difference}, "
        f"{change.certainty}) in {num_updates:,} update{'s' * (num_updates != 1)}, "
        f"{total(spent, 'images'):,} images and {minutes:.1f} minutes"
    )


def hacking(rows: Sequence[Row]) -> Gap | None:
    """The first evaluated reward that is trained on against the first that is not; None unless there are both.

    gain = (mean - first mean) / standard deviation of the first evaluation's images
    """
    evaluations, trained_on = by_step(rows, "evaluation"), trained_rewards(rows)
    evaluated = reward_names(evaluations[:1])
    trained = next((name for name in evaluated if name in trained_on), None)
    held_out = next((name for name in evaluated if name not in trained_on), None)
    if trained is None or held_out is None:
        return None

    def gains(name: str) -> Points:
        first = evaluations[0]
        deviation = number(first, name + ERROR) * first["num_images"] ** 0.5 or math.nan
        found: Points = [(float(first["step"]), 0.0, 0.0)]
        for row in evaluations[1:]:
            error = math.hypot(number(first, name + ERROR), number(row, name + ERROR))
            found.append((float(row["step"]), (number(row, name) - number(first, name)) / deviation, error / deviation))
        return found

    gap = Gap(trained, held_out, gains(trained), gains(held_out))
    return gap if all(math.isfinite(y) for _, y, _ in gap.points) else None


def before_after(rows: Sequence[Row]) -> str:
    """A table of the first and the last evaluation: each reward's mean, its change, and how sure that is."""
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    first, last = evaluations[0], evaluations[-1]
    lines = [f"{'':24}{'before':>18}{'after':>18}{'change':>10}  certainty"]
    lines += [
        f"{change.name:24}{change.before:>18}{change.after:>18}{change.difference:>10}  {change.certainty}"
        for change in reward_changes(rows)
    ]
    gap = last["diversity"] - first["diversity"]
    lines.append(f"{'diversity':24}{first['diversity']:18.3f}{last['diversity']:18.3f}{gap:+10.3f}")
    if seen := hacking(rows):
        lines.append(seen.sentence)
    painted = sum(row["images"] for row in rows if row["kind"] == "train")
    lines.append(
        f"{last['num_images']} evaluation images; {last['step']} steps, {painted:,} images for training, "
        f"{last['elapsed'] / 60:.1f} minutes"
    )
    return "\n".join(lines)
