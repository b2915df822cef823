"""RLHF for text-to-image diffusion models: score, search and train, from recipes or from Python.

    from rlhf_t2i import ddpo, load_rewards

    result = ddpo.train(ddpo.Config(num_steps=20), pipeline=pipe, prompts=["a fox", "a pear"], reward=my_reward)
    result.pipeline("a fox")

The algorithms are `ddpo`, `flow_grpo`, `diffusion_nft`, `draft` and `diffusion_dpo`, each with `Config` and `train`;
`best_of_n` and `fk_steering` search without training; `LlavaReward` and `load_rewards` score images.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reward_model import LlavaReward
    from rlhf_t2i.rewards.load import load_rewards
    from rlhf_t2i.search import best_of_n, fk_steering, to_pil

    ddpo: Any
    diffusion_dpo: Any
    diffusion_nft: Any
    draft: Any
    flow_grpo: Any

__version__ = "0.1.0"
__all__ = [
    "LlavaReward", "__version__", "best_of_n", "ddpo", "diffusion_dpo", "diffusion_nft", "draft", "fk_steering",
    "flow_grpo", "load_rewards", "to_pil",
]  # fmt: skip

_RECIPES = ("ddpo", "diffusion_dpo", "diffusion_nft", "draft", "flow_grpo")
_MODULES = {
    "LlavaReward": "reward_model",
    "best_of_n": "rlhf_t2i.search",
    "fk_steering": "rlhf_t2i.search",
    "load_rewards": "rlhf_t2i.rewards.load",
    "to_pil": "rlhf_t2i.search",
}


def __getattr__(name: str) -> Any:
    """Import a name on first use: torch and diffusers take seconds."""
    if name in _RECIPES:
        return import_module(f"rlhf_t2i.recipes.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """Return the public names, for tab completion."""
    return sorted(__all__)
