"""Changes of rewards between two evaluations, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rlhf_t2i.output.terminal import Colour, coloured
from rlhf_t2i.output.text_table import align
from rlhf_t2i.training.metrics import (
    ERROR,
    Points,
    Row,
    by_step,
    evaluations_to_export,
    number,
    reward_names,
    time_split,
    total,
    trained_rewards,
)

Z_THRESHOLD = 3.0
"""Standard errors above which a change counts as real: noise exceeds it, on one side, once in 740 times."""


@dataclass(frozen=True, slots=True)
class Change:
    """The change of one reward between two evaluations; means and their difference are formatted for printing."""

    name: str
    before: str
    after: str
    difference: str
    z: float
    """Difference divided by its standard error; NaN if that is unknown."""

    @property
    def is_noise(self) -> bool:
        """True unless |z| is at least 3."""
        return not abs(self.z) >= Z_THRESHOLD

    @property
    def verb(self) -> str:
        """Return "rose" or "fell", or "went" for a change within noise."""
        return "went" if self.is_noise else "rose" if self.z > 0 else "fell"

    @property
    def z_text(self) -> str:
        """Return z as a cell of a table."""
        if math.isnan(self.z):
            return "unknown"
        return f"{self.z:z.1f} (within noise)" if self.is_noise else f"{self.z:z.1f}"

    @property
    def num_errors(self) -> str:
        """Return |z| in words."""
        if math.isnan(self.z):
            return "standard error unknown"
        return f"{abs(self.z):.1f} standard errors{': within noise' if self.is_noise else ''}"


@dataclass(frozen=True, slots=True)
class Gap:
    """Gains of a reward that is trained on and of a held-out one; reward hacking makes them diverge.

    gain = (mean - first mean) / standard deviation of the first evaluation's images
    """

    trained: str
    held_out: str
    trained_gains: Points
    held_out_gains: Points
    """Gains at the same steps as `trained_gains`."""

    @property
    def points(self) -> Points:
        """Gain of the trained reward minus gain of the held-out one."""
        both = zip(self.trained_gains, self.held_out_gains, strict=True)
        return [(step, a - b, math.hypot(e, f)) for (step, a, e), (_, b, f) in both]

    @property
    def sentence(self) -> str:
        """The gains at the last evaluation."""
        trained, held_out = self.trained_gains[-1][1], self.held_out_gains[-1][1]
        return (
            f"In standard deviations of the first images, {self.trained}, which is trained on, gained {trained:+z.2f}, "
            f"and {self.held_out}, which is held out, {held_out:+z.2f}: a gap of {self.points[-1][1]:+z.2f}"
        )


def decimals(error: float) -> int:
    """Return the number of decimals that shows two digits of an error; 3 without an error."""
    return max(0, 1 - math.floor(math.log10(error))) if error > 0 else 3


def with_error(mean: float, error: float) -> str:
    """Return "mean ± error", rounded to the second digit of the error; the mean alone if the error is 0 or unknown."""
    return fixed_with_error(mean, error if error > 0 else math.nan, places=decimals(error))


def fixed_with_error(mean: float, error: float, *, places: int = 3) -> str:
    """Return "mean ± error" with a number of decimals; the mean alone if the error is unknown (NaN)."""
    return f"{mean:z.{places}f}" + (f" ± {error:.{places}f}" if math.isfinite(error) else "")


def compare(name: str, before: Row, after: Row) -> Change:
    """Return the change of one reward between two evaluations, which are treated as independent.

    z = (after - before) / sqrt(before_error^2 + after_error^2)
    """
    means = number(before, name), number(after, name)
    errors = number(before, name + ERROR), number(after, name + ERROR)
    difference, error = means[1] - means[0], math.hypot(*errors)
    places = decimals(error)
    first, last = (fixed_with_error(m, e, places=places) for m, e in zip(means, errors, strict=True))
    return Change(name, first, last, f"{difference:+z.{places}f}", difference / error if error > 0 else math.nan)


def diversity_of(evaluation: Row) -> str:
    """Return the diversity of an evaluation with its standard error, if that is known."""
    return with_error(evaluation["diversity"], float(evaluation.get("diversity_error", 0.0)))


def diversity_change(rows: Sequence[Row]) -> tuple[str, str, str] | None:
    """Return the diversity of the first and of the exported evaluation and the change; None unless both measured it."""
    evaluations = evaluations_to_export(rows)
    first, last = (number(evaluations[i], "diversity") for i in (0, -1))
    return None if math.isnan(last - first) else (f"{first:.3f}", f"{last:.3f}", f"{last - first:+z.3f}")


def reward_changes(rows: Sequence[Row]) -> list[Change]:
    """Return the change of each reward from the first evaluation to that of the exported weights."""
    evaluations = evaluations_to_export(rows)
    names = [name for name in reward_names(evaluations[:1]) if name in evaluations[-1]]
    return [compare(name, evaluations[0], evaluations[-1]) for name in names]


def headline(rows: Sequence[Row]) -> str:
    """Return a sentence on the change of the first reward from the first to the exported evaluation."""
    evaluations, changes = evaluations_to_export(rows), reward_changes(rows)
    if not changes:
        return "No evaluation has finished yet"
    change, last = changes[0], evaluations[-1]
    subject = f"{change.name} on the evaluation prompts"
    if len(evaluations) == 1:
        only = len(by_step(rows, "evaluation")) == 1
        note = "there is no other evaluation yet" if only else "the exported weights are those before training"
        return f"{subject} is {change.before} at update {last['step']}; {note}"
    so_far = rows[: rows.index(last) + 1]
    num_updates, minutes = len(by_step(so_far, "train")), sum(time_split(so_far).values()) / 60
    return (
        f"{subject} {change.verb} from {change.before} to {change.after} ({change.difference}, "
        f"{change.num_errors}) in {num_updates:,} update{'s' * (num_updates != 1)}, "
        f"{total(so_far, 'images'):,} images and {minutes:.1f} minutes"
    )


def reward_hacking_gap(rows: Sequence[Row]) -> Gap | None:
    """Return the gains of the first evaluated reward that is trained on and of the first that is held out.

    None if one of them is missing, or if their standard deviations are unknown or 0.
    """
    evaluations, trained_on = by_step(rows, "evaluation"), trained_rewards(rows)
    evaluated = reward_names(evaluations[:1])
    trained = next((name for name in evaluated if name in trained_on), None)
    held_out = next((name for name in evaluated if name not in trained_on), None)
    if trained is None or held_out is None:
        return None

    def gains(name: str) -> Points:
        first = evaluations[0]
        std = number(first, name + ERROR) * first["num_images"] ** 0.5 or math.nan
        points: Points = [(float(first["step"]), 0.0, 0.0)]
        for row in evaluations[1:]:
            error = math.hypot(number(first, name + ERROR), number(row, name + ERROR))
            points.append((float(row["step"]), (number(row, name) - number(first, name)) / std, error / std))
        return points

    gap = Gap(trained, held_out, gains(trained), gains(held_out))
    return gap if all(math.isfinite(y) for _, y, _ in gap.points) else None


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def _colour(change: Change) -> Colour:
    return "dim" if change.is_noise else "green" if change.z > 0 else "red"


def before_after(rows: Sequence[Row], *, colours: bool = False) -> str:
    """Return a table of the first and the exported evaluation, with the change of each reward and its z.

    `colours` adds a terminal's codes: green for a reward that rose, red for one that fell, dim for a change within
    noise.
    """
    last = evaluations_to_export(rows)[-1]
    table = [("", "before", "after", "change", "z")]
    table += [(one.name, one.before, one.after, one.difference, one.z_text) for one in reward_changes(rows)]
    if diversity := diversity_change(rows):
        table.append(("diversity", *diversity, ""))
    lines = align(table, left={0, 4})
    if colours:
        marks: list[Colour | None] = ["dim", *map(_colour, reward_changes(rows))]
        lines = [coloured(line, mark) for line, mark in zip_longest(lines, marks)]
    if gap := reward_hacking_gap(rows):
        lines.append(gap.sentence)
    images = total(rows[: rows.index(last)], "images")
    lines.append(
        f"{last['num_images']} evaluation images; {_steps(last['step'])}, {images:,} training images, "
        f"{last['elapsed'] / 60:.1f} minutes"
    )
    return "\n".join(lines)
