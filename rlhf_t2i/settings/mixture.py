"""Settings of data from several sources."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_t2i.settings.base import Rule, Settings
from rlhf_t2i.settings.lists import names


@dataclass(frozen=True, kw_only=True)
class MixtureSettings(Settings, group="data"):
    """Mixing of preference data."""

    data_weights: str | None = None
    """Comma-separated weights, one for each file of preference data to train on, in proportion to which an epoch draws
    their records, such as 3,1; null draws every record once."""

    @property
    def weights(self) -> tuple[float, ...]:
        """The numbers of data_weights; () for null."""
        return tuple(map(float, names(self.data_weights or "")))

    def weights_rule(self, sources: str) -> Rule:
        """Return the rule of data_weights for a comma-separated list of data."""
        given, count = names(self.data_weights or ""), len(names(sources))
        valid = self.data_weights is None or (count > 0 and len(given) == count and all(map(_is_weight, given)))
        needed = f"{count} positive numbers, one for each data file" if count else "null with data that are made here"
        return ("data_weights", valid, needed)


def _is_weight(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
