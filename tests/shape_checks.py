"""Checks of the shapes and types that functions are called with, in every module whose annotations state shapes.

Other modules are left out: a checked call takes some 100 µs more, and pyright knows their types.
"""

from __future__ import annotations

import typing
from functools import cache
from pathlib import Path
from typing import Any

from jaxtyping import install_import_hook

_ROOT = Path(__file__).parent.parent
_PACKAGES = ("rlhf_t2i", "reward_model")


def modules_with_shapes() -> list[str]:
    return [
        ".".join(path.relative_to(_ROOT).with_suffix("").parts)
        for package in _PACKAGES
        for path in sorted((_ROOT / package).rglob("*.py"))
        if "jaxtyping" in path.read_text()
    ]


def install() -> None:
    install_import_hook(modules_with_shapes(), "beartype.beartype")
    _leave_properties_unread()


def _leave_properties_unread() -> None:
    """Let a check against a protocol of the project not compute the properties of what it checks.

    Python 3.11 reads each attribute that a protocol has, at each call of a checked function: a policy would list all
    weights of its network (Python 3.12 has stopped reading them).
    """
    kind: Any = type(typing.Protocol)
    original, names = kind.__instancecheck__, cache(typing._get_protocol_attrs)  # type: ignore[attr-defined]

    def is_instance(protocol: Any, instance: object) -> bool:
        if not (protocol.__module__.startswith(_PACKAGES) and protocol._is_protocol):
            return original(protocol, instance)
        return all(hasattr(type(instance), name) or hasattr(instance, name) for name in names(protocol))

    kind.__instancecheck__ = is_instance
