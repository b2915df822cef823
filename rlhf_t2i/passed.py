"""Objects that a caller in Python passes in place of what options name: pipelines, prompts and rewards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class PassedObjects:
    """Objects of a caller in Python, each by the name that stands for it in the options."""

    pipelines: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """diffusers pipelines, by the value of the option model."""
    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    """Lists of prompts, by the value of the option prompts."""
    rewards: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Rewards, by their names in the option rewards."""


_PASSED: ContextVar[PassedObjects] = ContextVar("passed", default=PassedObjects())  # noqa: B039  # never changed


def passed() -> PassedObjects:
    """Return the objects of the caller; none outside of `passing`."""
    return _PASSED.get()


@contextmanager
def passing(objects: PassedObjects) -> Iterator[None]:
    """Context in which names in options stand for these objects."""
    token = _PASSED.set(objects)
    try:
        yield
    finally:
        _PASSED.reset(token)
