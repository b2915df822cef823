"""A GenEval prompt file with one line of each kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LINES: list[dict[str, Any]] = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 3}],
        "exclude": [{"class": "clock", "count": 4}],
        "prompt": "a photo of three clocks",
    },
    {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "tie", "count": 1, "position": ["right of", 0]}],
        "prompt": "a photo of a tie right of a dog",
    },
    {
        "tag": "color_attr",
        "include": [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
        "prompt": "a photo of a red cat and a blue dog",
    },
]


def write_prompts(folder: Path, rows: list[Any]) -> Path:
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path
