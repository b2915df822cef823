"""The vocabulary of a benchmark: images that a judge is shown, and what people said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from reward_model.images import ImageInput

Image = Path | bytes
"""A file, or the bytes of one where a data set holds its images itself."""


@runtime_checkable
class Scorer(Protocol):
    """What a benchmark asks of a judge: higher is better."""

    def score(
        self, images: Sequence[ImageInput], prompts: Sequence[str], *, batch_size: int = 32
    ) -> Float[Tensor, " B"]: ...


@runtime_checkable
class PairwiseScorer(Protocol):
    """A judge that may know of two images which is better without a score for either."""

    @property
    def gives_scores(self) -> bool: ...

    def logits(
        self, first: Sequence[ImageInput], second: Sequence[ImageInput], prompts: Sequence[str], *, batch_size: int = 32
    ) -> Float[Tensor, " B"]: ...


@dataclass(frozen=True, slots=True)
class Item:
    """An image under its prompt, which a judge sees once."""

    image: Image
    prompt: str
    group: str
    """Whose images belong together, mostly the prompt's: intervals draw whole groups."""
    tags: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By what the report on domains sorts it: {"source": ["coco"], "skill": ["counting", "scene"]}."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Which of two items people preferred."""

    first: int
    """Places among the benchmark's items; both have the same prompt. The order is that of the data set."""
    second: int
    outcome: Literal[1, 0, -1]
    """+1 the first won, 0 tie, -1 the second won."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One test set: exactly one of `comparisons`, `ratings` and `labels` is given."""

    name: str
    rule: str
    """Which of the reported numbers is the published one, and how it was computed."""
    items: Sequence[Item]
    comparisons: Sequence[Comparison] = ()
    ratings: Sequence[float] = ()
    """What people thought of each item, higher is better."""
    labels: Sequence[int] = ()
    """Of each item: 1 good or safe, 0 bad or unsafe."""
    validation: Benchmark | None = None
    """On which the width of a judge's tie band is chosen, where the published rule does so."""
    notes: Sequence[str] = ()
    """What a reader must know of this copy of the data: records without a label, labels that are all alike."""

    def __post_init__(self) -> None:
        """ValueError if people said nothing; the rest would be a loader's mistake."""
        if not (self.comparisons or self.ratings or self.labels):
            raise ValueError(f"{self.name} holds no two images of one prompt, and so nothing to compare.")
        assert sum(map(bool, (self.comparisons, self.ratings, self.labels))) == 1, self.name
        for said in (self.ratings, self.labels):
            assert len(said) in (0, len(self.items)), self.name
