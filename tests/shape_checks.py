"""Checks of the shapes and types that functions are called with, in every module whose annotations state shapes.

Other modules are left out: a checked call takes some 100 µs more, and pyright knows their types.
"""

from __future__ import annotations

from pathlib import Path

from jaxtyping import install_import_hook

_ROOT = Path(__file__).parent.parent


def modules_with_shapes() -> list[str]:
    return [
        ".".join(path.relative_to(_ROOT).with_suffix("").parts)
        for package in ("rlhf_t2i", "reward_model")
        for path in sorted((_ROOT / package).rglob("*.py"))
        if "jaxtyping" in path.read_text()
    ]


def install() -> None:
    install_import_hook(modules_with_shapes(), "beartype.beartype")
