"""Options of recipes/best_of_n.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from rlhf_t2i.settings.base import Group, Rule
from rlhf_t2i.settings.lists import names
from rlhf_t2i.settings.ranges import Fraction, PositiveInt
from rlhf_t2i.settings.search import SearchConfig, steps_rule


@dataclass(frozen=True, kw_only=True)
class Config(SearchConfig):
    """Best-of-N settings."""

    num_candidates: PositiveInt = 16
    """Number of images sampled in one search (N), of which the best is returned."""
    eta: Annotated[Fraction, Group("sampling")] = 0.0
    """Noise of each denoising step; 0 is deterministic, 1 is the noise of the forward process."""
    standardise_rewards: Annotated[bool, Group("reward")] = False
    """Order images by a weighted sum of rewards each of which is divided by its standard deviation among the candidates
    of the search, so that none drowns the others."""
    prune_after: str = ""
    """Comma-separated numbers of denoising steps after each of which the worse half of the candidates is dropped; empty
    finishes all. Each is below num_denoising_steps."""
    baseline: bool = True
    """With prune_after, also finish all candidates without pruning and report both; doubles the cost."""

    def rules(self) -> list[Rule]:
        works = all(part.isdigit() and 1 <= int(part) < self.num_denoising_steps for part in names(self.prune_after))
        return [*super().rules(), ("prune_after", works, steps_rule(self.num_denoising_steps))]

    @property
    def pruning_steps(self) -> list[int]:
        """Numbers of denoising steps after which candidates are dropped."""
        return sorted({int(part) for part in names(self.prune_after)})
