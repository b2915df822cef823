"""Objects that a caller in Python gives in place of what an option names: a pipeline, prompts, a reward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_GIVEN: ContextVar[Mapping[str, Any]] = ContextVar("given", default={})  # noqa: B039  # never changed


@contextmanager
def standing_for(objects: Mapping[str, Any]) -> Iterator[None]:
    """Within it, an option with one of these names as its value stands for the object."""
    token = _GIVEN.set({**_GIVEN.get(), **objects})
    try:
        yield
    finally:
        _GIVEN.reset(token)


def given(name: str) -> Any:
    """Return the object that a name stands for, or None."""
    return _GIVEN.get().get(name)
