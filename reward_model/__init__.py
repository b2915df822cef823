"""LLaVA-Reward (arXiv:2507.21391): a multimodal LLM trained to score how well an image fits its prompt.

The model, its training, scoring, data sets and benchmarks, and scorers of other projects.
It imports nothing of rlhf_t2i.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reward_model.scoring import LlavaReward

__all__ = ["LlavaReward"]


def __getattr__(name: str) -> object:
    """Import LlavaReward on first use: it takes seconds."""
    if name == "LlavaReward":
        from reward_model.scoring import LlavaReward

        return LlavaReward
    raise AttributeError(f"module 'reward_model' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, for tab completion."""
    return sorted({*globals(), *__all__})
