"""RLHF for text-to-image diffusion models: score, search and train, from recipes or from Python."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reward_model import LlavaReward
    from rlhf_t2i.rewards.load import load_rewards
    from rlhf_t2i.search import best_of_n, fk_steering, to_pil

__version__ = "0.1.0"
__all__ = ["LlavaReward", "__version__", "best_of_n", "fk_steering", "load_rewards", "to_pil"]

_MODULES = {
    "LlavaReward": "reward_model",
    "best_of_n": "rlhf_t2i.search",
    "fk_steering": "rlhf_t2i.search",
    "load_rewards": "rlhf_t2i.rewards.load",
    "to_pil": "rlhf_t2i.search",
}


def __getattr__(name: str) -> Any:
    """Import a name on first use: torch and diffusers take seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """Return the public names, for tab completion."""
    return sorted(__all__)
