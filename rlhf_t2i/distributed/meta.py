"""Networks that are built before there is memory for their weights."""

from __future__ import annotations

from contextlib import AbstractContextManager

from accelerate import init_empty_weights


def without_weights() -> AbstractContextManager[None]:
    """Return a context in which modules are built with parameters on the meta device, and with real buffers."""
    return init_empty_weights()
