"""GenEval's prompt file is read whole, and a bad line is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_t2i.search.geneval import Wanted, load_geneval, metadata_of, write_metadata

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


def written(folder: Path, rows: list[Any]) -> Path:
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_every_kind_of_prompt_is_read(tmp_path: Path) -> None:
    one, count, place, colour = load_geneval(written(tmp_path, LINES))
    assert (one.tag, one.prompt, one.include) == ("single_object", "a photo of a bench", (Wanted("bench", 1),))
    assert count.exclude == (Wanted("clock", 4),)
    assert place.include[1] == Wanted("tie", 1, None, ("right of", 0))
    assert [wanted.color for wanted in colour.include] == ["red", "blue"]


def test_the_scorer_gets_each_line_back(tmp_path: Path) -> None:
    path = written(tmp_path, LINES)
    rows = metadata_of(str(path), [line["prompt"] for line in LINES])
    write_metadata(tmp_path / "00002", rows[2])
    assert json.loads((tmp_path / "00002" / "metadata.jsonl").read_text()) == LINES[2]
    assert (tmp_path / "00002" / "samples").is_dir()


def test_other_prompts_are_written_as_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\n")
    assert metadata_of(str(tmp_path / "prompts.txt"), ["a fox"]) == [{"prompt": "a fox"}]
    assert metadata_of("shapes", ["a red circle"]) == [{"prompt": "a red circle"}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"include": "bench"}, r"jsonl:2 is no line of GenEval: it needs tag, prompt and a list under include"),
        ({"tag": None}, r"jsonl:2 is no line of GenEval"),
        ({"include": [{"class": "dog"}]}, r"jsonl:2, include 0 is .*; it needs a class and a count of at least 1"),
        ({"include": [{"class": "dog", "count": 0}]}, r"a count of at least 1"),
        ({"exclude": [{"count": 4}]}, r"jsonl:2, exclude 0 is"),
        ({"exclude": None}, r"jsonl:2 has None under exclude; it must be a list"),
        ({"include": [{"class": "dog", "count": 1, "color": 3}]}, r"has the color 3; it must be a word"),
        ({"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}, r"the number of an object before it"),
        ({"include": [{"class": "dog", "count": 1, "position": "left"}]}, r"has the position 'left'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = written(tmp_path, [LINES[0], {**LINES[0], **change}])
    with pytest.raises(ValueError, match=message):
        load_geneval(path)
