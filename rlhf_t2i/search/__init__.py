"""Inference-time search: best-of-N, pruning, FK steering, noise search, their run folder and their Python API.

Every algorithm works on a `SearchContext`; nothing here trains a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_t2i.search import best_of_n, fk_steering, to_pil

__all__ = ["best_of_n", "fk_steering", "to_pil"]


def __getattr__(name: str) -> Any:
    """Import the Python API on first use, so that importing a submodule does not import torch and diffusers."""
    if name in __all__:
        from rlhf_t2i.search import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, for tab completion."""
    return sorted({*globals(), *__all__})
