"""GenEval prompt files: every kind of line is read, and a bad line is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_t2i.data.prompts import load_prompts
from rlhf_t2i.search.geneval import ObjectCondition, load_geneval, rows_to_write, write_metadata
from tests.geneval_files import LINES, write_prompts


def test_every_kind_of_prompt_is_read(tmp_path: Path) -> None:
    one, count, place, colour = load_geneval(write_prompts(tmp_path, LINES))
    assert (one.tag, one.prompt, one.include) == ("single_object", "a photo of a bench", (ObjectCondition("bench", 1),))
    assert count.exclude == (ObjectCondition("clock", 4),)
    assert place.include[1] == ObjectCondition("tie", 1, None, ("right of", 0))
    assert [condition.color for condition in colour.include] == ["red", "blue"]


def test_metadata_is_the_unchanged_line(tmp_path: Path) -> None:
    rows = rows_to_write(load_prompts(str(write_prompts(tmp_path, LINES))))
    write_metadata(tmp_path / "00002", rows[2])
    assert json.loads((tmp_path / "00002" / "metadata.jsonl").read_text()) == LINES[2]
    assert (tmp_path / "00002" / "samples").is_dir()


def test_other_prompts_have_only_their_text_as_metadata(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\n")
    assert rows_to_write(load_prompts(str(tmp_path / "prompts.txt"))) == [{"prompt": "a fox"}]
    assert rows_to_write(["a red circle"]) == [{"prompt": "a red circle"}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"include": "bench"}, r"jsonl:2 is not a line of GenEval: it needs tag, prompt and a list under include"),
        ({"tag": None}, r"jsonl:2 is not a line of GenEval"),
        ({"include": [{"class": "dog"}]}, r"jsonl:2, include 0 is .*; it needs a class and a count of at least 1"),
        ({"include": [{"class": "dog", "count": 0}]}, r"a count of at least 1"),
        ({"exclude": [{"count": 4}]}, r"jsonl:2, exclude 0 is"),
        ({"exclude": None}, r"jsonl:2 has None under exclude; it must be a list"),
        ({"include": [{"class": "dog", "count": 1, "color": 3}]}, r"has the color 3; it must be a word"),
        ({"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}, r"the index of an earlier object"),
        ({"include": [{"class": "dog", "count": 1, "position": "left"}]}, r"has the position 'left'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_prompts(tmp_path, [LINES[0], {**LINES[0], **change}])
    with pytest.raises(ValueError, match=message):
        load_geneval(path)
