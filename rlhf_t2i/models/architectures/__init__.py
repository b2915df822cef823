"""Published architectures of models: the sizes in the configs of their parts, without weights. A JSON file for each."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any


@functools.cache
def _published() -> dict[str, dict[str, Any]]:
    files = sorted(Path(__file__).parent.glob("*.json"))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {name: architecture for architecture in found for name in architecture["ids"]}


def published_architecture(model: str) -> dict[str, Any] | None:
    """Return what is published of a Hub id, or None if it is unknown.

    That is its pipeline class (`_class_name`), the config of each part (`parts`), and switches of the pipeline
    (`options`).
    """
    return _published().get(model)
