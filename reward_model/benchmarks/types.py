"""Types of benchmarks: the scorers that are evaluated, and images with the preferences, ratings or labels of people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from reward_model.images import ImageInput
from reward_model.stored_images import ImageSource

Image = ImageSource
"""Where an image lies: in a file of its own, or within a data file."""


@runtime_checkable
class Scorer(Protocol):
    """A model that scores images: `LlavaReward`, a `PointwiseScorer`, or any object with this method."""

    def score(
        self, images: Sequence[ImageInput], prompts: Sequence[str], *, batch_size: int = 32
    ) -> Float[Tensor, " B"]:
        """Return a score for each image and its prompt; higher is better."""
        ...


@runtime_checkable
class PairwiseScorer(Protocol):
    """A model that compares two images, and may not be able to score one alone."""

    @property
    def gives_scores(self) -> bool:
        """True if `score` can be called; else only `logits` can."""
        ...

    def logits(
        self, first: Sequence[ImageInput], second: Sequence[ImageInput], prompts: Sequence[str], *, batch_size: int = 32
    ) -> Float[Tensor, " B"]:
        """Return the log-odds that each first image is preferred to the second."""
        ...


@dataclass(frozen=True, slots=True)
class Item:
    """An image and its prompt."""

    image: Image
    prompt: str
    group: str
    """Name of the items that belong together, mostly those of one prompt; the bootstrap resamples groups."""
    tags: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Domains for the accuracy by domain: {"source": ["coco"], "skill": ["counting", "scene"]}."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The preference of people between two items."""

    first: int
    """Index of an item of the benchmark; both items have the same prompt, in the order of the data set."""
    second: int
    outcome: Literal[1, 0, -1]
    """+1 the first was preferred, 0 tie, -1 the second was preferred."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A test set with exactly one of `comparisons`, `ratings` and `labels`.

    Raises ValueError if none is given.
    """

    name: str
    rule: str
    """Published rule: the metric that corresponds to it, and how it is computed."""
    items: Sequence[Item]
    comparisons: Sequence[Comparison] = ()
    ratings: Sequence[float] = ()
    """One rating an item; higher is better."""
    labels: Sequence[int] = ()
    """One label an item: 1 good or safe, 0 bad or unsafe."""
    validation: Benchmark | None = None
    """Set on which the tie threshold is chosen, where the published rule does so."""
    notes: Sequence[str] = ()
    """Remarks about this copy of the data, such as the number of records without a label."""

    def __post_init__(self) -> None:
        """Raise ValueError without any comparison, rating or label; other errors would be a loader's mistake."""
        if not (self.comparisons or self.ratings or self.labels):
            raise ValueError(f"{self.name} contains no two images of one prompt, and so nothing to compare.")
        assert sum(map(bool, (self.comparisons, self.ratings, self.labels))) == 1, self.name
        for values in (self.ratings, self.labels):
            assert len(values) in (0, len(self.items)), self.name
