"""Options of recipes/fk_steering.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rlhf_t2i.settings.base import Group, Rule
from rlhf_t2i.settings.lists import names
from rlhf_t2i.settings.ranges import NonNegativeFloat, PositiveFloat, PositiveFraction, PositiveInt
from rlhf_t2i.settings.search import SearchConfig, steps_rule


@dataclass(frozen=True, kw_only=True)
class Config(SearchConfig):
    """FK steering settings."""

    num_particles: PositiveInt = 16
    """Number of images (particles) sampled together in one search, of which the best is returned."""
    eta: Annotated[PositiveFraction, Group("sampling")] = 1.0
    """Noise of each denoising step; 1 is the noise of the forward process. Not 0: copies of a particle would stay
    equal."""
    strength: NonNegativeFloat = 2.0
    """Strength of steering: the potential's lambda is strength / reward_std; 0 is plain sampling."""
    reward_std: PositiveFloat | None = None
    """Standard deviation of the reward among images of one prompt; null measures it on 64 calibration samples. With 1,
    strength is the paper's lambda."""
    potential: Literal["difference", "max", "sum"] = "difference"
    """Potential that log-weights add up: lambda times the reward's change since the last resampling step (difference),
    its highest value so far (max), or its sum so far (sum)."""
    initial_max: float | None = None
    """Reward that the potential max begins with: rewards below it count as this much. 0 is the published code's; null
    is none, the paper's."""
    resample_after: str | None = None
    """Comma-separated numbers of denoising steps after which particles are scored and may be resampled; each from 1 to
    num_denoising_steps - 1. Null is after 1/4, 3/8, 1/2 and 3/4 of num_denoising_steps."""
    ess_threshold: PositiveFraction = 1.0
    """Fraction of num_particles: particles are resampled if their effective sample size is below it; 1 always
    resamples."""
    baseline: bool = True
    """Also run best-of-N with as many images from the same seeds and report both; doubles the cost."""

    def rules(self) -> list[Rule]:
        after = ["1"] if self.resample_after is None else names(self.resample_after)
        works = bool(after) and all(part.isdigit() and 1 <= int(part) < self.num_denoising_steps for part in after)
        return [
            *super().rules(),
            ("num_denoising_steps", self.num_denoising_steps > 1, "at least 2 to resample between two steps"),
            ("resample_after", works, steps_rule(self.num_denoising_steps)),
        ]

    @property
    def resampling_steps(self) -> list[int]:
        """Numbers of denoising steps after which particles are scored."""
        if self.resample_after is None:
            last = self.num_denoising_steps - 1
            return sorted({min(max(1, round(share * (last + 1))), last) for share in (0.25, 0.375, 0.5, 0.75)})
        return sorted(int(part) for part in names(self.resample_after))
