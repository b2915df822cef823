"""The project's own format and LLaVA-Reward's: valid and invalid records, images, splits and summaries."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reward_model.datasets import BadRecordError, describe, load_records, split_by_prompt, usable
from reward_model.datasets.prepare import prepare_records
from reward_model.datasets.raw_records import read_json_list
from reward_model.datasets.usable import usable_records
from reward_model.types import LabelledImage, PreferencePair, Record
from tests.preference_files import load_checked

FOX, BLUE = "a red fox", "a blue fox"
PAIR = {"prompt": FOX, "winner": "a.png", "loser": "b.png"}
LABELLED = {"prompt": FOX, "image": "a.png", "label": 1}
PUBLISHED_PAIR = {
    "prompt_id": "000904-0035",
    "prompt": FOX,
    "chosen_path": "a.png",
    "c_rate": 7,
    "reject_path": "b.png",
    "r_rate": 4,
}
PUBLISHED_LABELLED = {
    "path": "a.png",
    "label": 0,
    "prompt": "",
    "safety_label": "Unsafe",
    "category": "Shocking",
    "source": "Lexica",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the images a.png, b.png, more/c.jpg and more/d.webp."""
    (tmp_path / "more").mkdir()
    for name, colour in [("a.png", "red"), ("b.png", "blue"), ("more/c.jpg", "green"), ("more/d.webp", "white")]:
        Image.new("RGB", (24, 16), colour).save(tmp_path / name)
    return tmp_path


def write_lines(folder: Path, *rows: object, name: str = "pairs.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"\n".join(_source(row) for row in rows))
    return path


def write_list(folder: Path, *rows: object, name: str = "pairs.json") -> Path:
    path = folder / name
    path.write_bytes(b"[\n" + b",\n".join(_source(row) for row in rows) + b"\n]\n")
    return path


def _source(row: object) -> bytes:
    match row:
        case bytes():
            return row
        case str():
            return row.encode()
        case _:
            return json.dumps(row, ensure_ascii=False).encode()


def error_of(path: Path, **options: Any) -> str:
    with pytest.raises(BadRecordError) as caught:
        load_checked(path, **options)
    return str(caught.value)


# --- the project's own format ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR, ("a.png", "b.png", FOX, FOX, False, 0.0)),
        (PAIR | {"rating_gap": 2.0}, ("a.png", "b.png", FOX, FOX, False, 2.0)),
        (PAIR | {"rating_gap": 3}, ("a.png", "b.png", FOX, FOX, False, 3.0)),
        ({"prompt": FOX, "tie": ["a.png", "b.png"]}, ("a.png", "b.png", FOX, FOX, True, 0.0)),
        ({"winner_prompt": FOX, "loser_prompt": BLUE, "image": "a.png"}, ("a.png", "a.png", FOX, BLUE, False, 0.0)),
        (
            {"winner_prompt": FOX, "loser_prompt": BLUE, "winner": "more/c.jpg", "loser": "more/d.webp"},
            ("more/c.jpg", "more/d.webp", FOX, BLUE, False, 0.0),
        ),
        (PAIR | {"prompt": "", "id": 7, "comment": "no prompt"}, ("a.png", "b.png", "", "", False, 0.0)),
        (PAIR | {"prompt": "un café à Zürich, 東京"}, ("a.png", "b.png", *["un café à Zürich, 東京"] * 2, False, 0.0)),
    ],
    ids=["pair", "rated", "integer gap", "tie", "one image", "two images and prompts", "id and comment", "Unicode"],
)
def test_each_form_of_a_pair_is_converted(
    folder: Path, row: dict[str, Any], expected: tuple[str, str, str, str, bool, float]
) -> None:
    path = write_lines(folder, row)
    winner, loser, *rest = expected
    assert load_checked(path) == [PreferencePair(folder / winner, folder / loser, *rest, f"{path}:1")]


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("remark", [{}, {"id": None, "comment": ""}, {"id": "x"}, {"id": True}, {"id": 0.5}])
def test_a_labelled_image_may_have_any_scalar_as_its_id(folder: Path, label: int, remark: dict[str, Any]) -> None:
    path = write_lines(folder, LABELLED | {"label": label} | remark)
    assert load_checked(path) == [LabelledImage(folder / "a.png", FOX, label, f"{path}:1")]


@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_blank_lines_are_ignored_and_count_in_line_numbers(folder: Path, ending: str, mark: str) -> None:
    path = write_lines(folder, mark + ending.join(["", json.dumps(PAIR), "  ", "\t", json.dumps(LABELLED), ""]))
    assert [record.where for record in load_checked(path)] == [f"{path}:2", f"{path}:5"]


@pytest.mark.parametrize("character", ["\u2028", "\u0085"], ids=["U+2028", "U+0085"])
def test_only_a_line_feed_ends_a_line(folder: Path, character: str) -> None:
    (record,) = load_checked(write_lines(folder, LABELLED | {"prompt": f"a{character}b"}))
    assert isinstance(record, LabelledImage)
    assert record.prompt == f"a{character}b"


# --- the format of LLaVA-Reward -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompts", "tie", "gap"),
    [
        (PUBLISHED_PAIR, (FOX, FOX), False, 3.0),
        (PUBLISHED_PAIR | {"prompt": [FOX, BLUE]}, (FOX, BLUE), False, 3.0),
        (PUBLISHED_PAIR | {"r_rate": 7.0}, (FOX, FOX), True, 0.0),
        (PUBLISHED_PAIR | {"r_rate": 6.5}, (FOX, FOX), False, 0.5),
        ({"prompt": FOX, "chosen_path": "a.png", "reject_path": "b.png"}, (FOX, FOX), False, 0.0),
    ],
    ids=["pair", "two prompts", "tie", "fraction", "unrated"],
)
def test_each_form_of_a_published_pair_is_converted(
    folder: Path, row: dict[str, Any], prompts: tuple[str, str], tie: bool, gap: float
) -> None:
    path = write_list(folder, row)
    expected = PreferencePair(folder / "a.png", folder / "b.png", *prompts, tie, gap, f"{path}:RECORD 1")
    assert load_checked(path) == [expected]


def test_published_labelled_images_may_have_the_extra_fields_of_their_authors(folder: Path) -> None:
    extras = {"prompt_id": 1, "id": [2], "text": None}
    path = write_list(folder, PUBLISHED_LABELLED, PUBLISHED_LABELLED | extras | {"label": 1, "prompt": FOX})
    tags = {"category": ("Shocking",), "source": ("Lexica",)}
    assert load_checked(path) == [
        LabelledImage(folder / "a.png", "", 0, f"{path}:RECORD 1", tags),
        LabelledImage(folder / "a.png", FOX, 1, f"{path}:RECORD 2", tags),
    ]


@pytest.mark.parametrize("layout", [None, 2, "\t"], ids=["one line", "indented", "tabs"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_a_json_list_may_have_any_layout(folder: Path, layout: Any, mark: str) -> None:
    rows = [PUBLISHED_LABELLED | {"prompt": f'{i} [x], {{"y"}}\n'} for i in range(3)]
    path = folder / "points.json"
    path.write_text(mark + json.dumps(rows, indent=layout), encoding="utf-8")
    assert [(record.prompt, record.where) for record in load_checked(path) if isinstance(record, LabelledImage)] == [
        (row["prompt"], f"{path}:RECORD {i}") for i, row in enumerate(rows, start=1)
    ]


# --- invalid records ------------------------------------------------------------------------------

BAD_LINES: dict[str, tuple[object, list[str]]] = {
    "misspelt key": (PAIR | {"winer": "c"}, ["'winer'", "Did you mean 'winner'?"]),
    "foreign key": (PAIR | {"zzz": 1}, ["'zzz'", "Known are", "loser_prompt"]),
    "half a pair": ({"prompt": FOX, "winner": "a.png"}, ["['prompt', 'winner']", "prompt, winner, loser"]),
    "two forms at once": (PAIR | {"label": 1}, ["'label'", "A record has exactly"]),
    "no keys": ({}, ["[]", "A record has exactly"]),
    "only id and comment": ({"id": 3, "comment": "todo"}, ["[]", "A record has exactly"]),
    "a gap in a tie": ({"prompt": FOX, "tie": ["a.png", "b.png"], "rating_gap": 1}, ["'rating_gap'", "exactly"]),
    "label true": (LABELLED | {"label": True}, ["'label' is True", "1 (good"]),
    "label two": (LABELLED | {"label": 2}, ["'label' is 2", "0 (bad"]),
    "label text": (LABELLED | {"label": "1"}, ["'label' is '1'"]),
    "label half": (LABELLED | {"label": 0.5}, ["'label' is 0.5"]),
    "label one point zero": (LABELLED | {"label": 1.0}, ["'label' is 1.0"]),
    "label null": (LABELLED | {"label": None}, ["'label' is None"]),
    "gap zero": (PAIR | {"rating_gap": 0}, ["'rating_gap' is 0", "above 0", "'tie'"]),
    "gap negative": (PAIR | {"rating_gap": -1.5}, ["'rating_gap' is -1.5", "above 0"]),
    "gap true": (PAIR | {"rating_gap": True}, ["'rating_gap' is True", "finite number"]),
    "gap text": (PAIR | {"rating_gap": "2"}, ["'rating_gap' is '2'", "finite number"]),
    "gap overflows": (json.dumps(PAIR)[:-1] + ', "rating_gap": 1e999}', ["the number 1e999 is beyond all floats"]),
    "gap beyond floats": (PAIR | {"rating_gap": 10**400}, ["the number 1000", "has 401 digits"]),
    "gap NaN": (json.dumps(PAIR)[:-1] + ', "rating_gap": NaN}', ["NaN", "finite"]),
    "id NaN": (json.dumps(PAIR)[:-1] + ', "id": NaN}', ["NaN", "finite"]),
    "gap Infinity": (json.dumps(PAIR)[:-1] + ', "rating_gap": -Infinity}', ["-Infinity", "finite"]),
    "prompt a number": (PAIR | {"prompt": 3}, ["'prompt' is 3", "must be a string"]),
    "prompt a list": (PAIR | {"prompt": [FOX, BLUE]}, ["'prompt' is ['a red fox', 'a blue fox']", "must be a string"]),
    "half a character": (json.dumps(PAIR | {"prompt": "\ud83d"}), ["'\\ud83d'", "Unicode"]),
    "image a number": (LABELLED | {"image": 3}, ["'image' is 3", "must be a string"]),
    "tie of one": ({"prompt": FOX, "tie": ["a.png"]}, ["'tie' is ['a.png']", "two strings"]),
    "tie of three": ({"prompt": FOX, "tie": ["a.png"] * 3}, ["'tie' is", "two strings"]),
    "tie of numbers": ({"prompt": FOX, "tie": [1, 2]}, ["'tie' is 1", "must be a string"]),
    "tie true": ({"prompt": FOX, "tie": True}, ["'tie' is True", "two strings"]),
    "tie of two letters": ({"prompt": FOX, "tie": "ab"}, ["'tie' is 'ab'", "two strings"]),
    "id a list": (PAIR | {"id": [1]}, ["'id' is [1]", "string or number"]),
    "comment a number": (PAIR | {"comment": 1}, ["'comment' is 1", "must be a string"]),
    "same image": (PAIR | {"loser": "./more/../a.png"}, ["a.png", FOX, "must differ"]),
    "tie with itself": ({"prompt": FOX, "tie": ["a.png", "a.png"]}, ["a.png", "must differ"]),
    "same prompt": ({"winner_prompt": FOX, "loser_prompt": FOX, "image": "a.png"}, [FOX, "must differ"]),
    "duplicate keys": (json.dumps(PAIR)[:-1] + ', "loser": "a.png"}', ["'loser'", "twice", "'b.png' and 'a.png'"]),
    "a list": ([PAIR], ["[{", "JSON object"]),
    "a number": ("3", ["3 is not a record", "JSON object"]),
    "broken off": (json.dumps(PAIR)[:30], ["not JSON", "column", "a red fox"]),
    "single quotes": (str(PAIR), ["not JSON", "column 2", "{'prompt"]),
    "two objects": ("{} {}", ["not JSON", "Extra data", "{} {}"]),
    "not UTF-8": (b'{"prompt": "caf\xe9"}', ["not UTF-8", "byte 15", "\\xe9", "Save it as UTF-8"]),
    "thousands of digits": ('{"label": ' + "9" * 5000 + "}", ["cannot be parsed as JSON", "has 5,000 digits"]),
    "thousands of brackets": ('{"id": ' + "[" * 100_000, ["cannot be parsed as JSON", "[[["]),
    "null byte in a name": (LABELLED | {"image": "a\0.png"}, ["'a\\x00.png'", "null byte"]),
    "name of 10,000 characters": (LABELLED | {"image": "a" * 10_000}, ["'aaaa", "cannot be read"]),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_an_invalid_line_is_refused_with_its_number_and_value(folder: Path, name: str) -> None:
    row, clues = BAD_LINES[name]
    path = write_lines(folder, PAIR, "", row, LABELLED)
    message = error_of(path)
    assert message.startswith(f"{path}:3: ")
    assert [clue for clue in clues if clue not in message] == []
    assert len(message) < 800
    message.encode()


BAD_ELEMENTS: dict[str, tuple[object, list[str]]] = {
    "chosen is worse": (PUBLISHED_PAIR | {"r_rate": 8}, ["'c_rate' is 7 and 'r_rate' is 8", "at least the rating"]),
    "one rate": ({k: v for k, v in PUBLISHED_PAIR.items() if k != "r_rate"}, ["only one", "both or neither"]),
    "rate text": (PUBLISHED_PAIR | {"c_rate": "7"}, ["'c_rate' is '7'", "finite number"]),
    "rate null": (PUBLISHED_PAIR | {"r_rate": None}, ["'r_rate' is None", "finite number"]),
    "rate NaN": (json.dumps(PUBLISHED_PAIR | {"r_rate": float("nan")}), ["NaN", "finite"]),
    "gap overflows": (PUBLISHED_PAIR | {"c_rate": 1.7e308, "r_rate": -1.7e308}, ["1.7e+308", "finite"]),
    "three prompts": (PUBLISHED_PAIR | {"prompt": [FOX, BLUE, FOX]}, ["'prompt' is", "two strings"]),
    "prompt null": (PUBLISHED_PAIR | {"prompt": None}, ["'prompt' is None", "must be a string"]),
    "misspelt key": (PUBLISHED_PAIR | {"choosen_path": "a.png"}, ["Did you mean 'chosen_path'?"]),
    "no rejected": ({"prompt": FOX, "chosen_path": "a.png"}, ["reject_path missing in", FOX]),
    "no prompt": ({"path": "a.png", "label": 1}, ["prompt missing in", "a.png"]),
    "pair and label": (PUBLISHED_PAIR | {"label": 1}, ["'chosen_path' is unknown"]),
    "label true": (PUBLISHED_LABELLED | {"label": True}, ["'label' is True"]),
    "path null": (PUBLISHED_LABELLED | {"path": None}, ["'path' is None", "must be a string"]),
    "same image": (PUBLISHED_PAIR | {"reject_path": "a.png"}, ["must differ"]),
    "duplicate keys": ('{"path": "a.png", "label": 1, "label": 0, "prompt": ""}', ["'label'", "twice", "1 and 0"]),
    "own format": (PAIR, ["'winner'", "unknown", "chosen_path"]),
    "a number": (3, ["3 is not a record"]),
    "thousands of digits": ('{"label": ' + "9" * 5000 + "}", ["cannot be parsed as JSON", "has 5,000 digits"]),
    "no such image": (PUBLISHED_LABELLED | {"path": "/scr/shijie/1.jpg"}, ["'/scr/shijie/1.jpg'", "image_root"]),
}


@pytest.mark.parametrize("name", BAD_ELEMENTS)
def test_an_invalid_published_record_is_refused_with_its_number_and_value(folder: Path, name: str) -> None:
    row, clues = BAD_ELEMENTS[name]
    path = write_list(folder, PUBLISHED_LABELLED, row, PUBLISHED_PAIR)
    message = error_of(path)
    assert message.startswith(f"{path}:RECORD 2: ")
    assert [clue for clue in clues if clue not in message] == []
    assert len(message) < 800


@pytest.mark.parametrize("depth", range(900, 1000, 3))
def test_a_value_near_the_recursion_limit_is_refused_like_any_other(folder: Path, depth: int) -> None:
    """At these depths json.loads succeeds, but repr of the value fails."""
    path = write_lines(folder, json.dumps(PAIR)[:-1] + ', "id": ' + "[" * depth + "]" * depth + "}")
    assert error_of(path).startswith(f"{path}:1: ")


@pytest.mark.parametrize(
    ("content", "clues"),
    [
        (b"", ["Expecting '['", "line 1, column 1"]),
        (json.dumps(PUBLISHED_PAIR).encode(), ["Expecting '['", ".jsonl"]),
        (json.dumps([PUBLISHED_PAIR]).encode()[:-1], ["Expecting ',' or ']'"]),
        (b'[\n{"a": 1}\n{"a": 2}]', ["Expecting ','", "line 3, column 1", '{"a": 2}']),
        (b"[1,]", ["Expecting value", "column 4"]),
        (b"[1] 2", ["Expecting the end", "column 5"]),
        (b'["\xff"]', ["not UTF-8", "byte 2"]),
        (b"[" * 100_000, ["nested too deeply"]),
    ],
    ids=["empty", "object", "open", "no comma", "trailing comma", "trailing data", "not UTF-8", "deep"],
)
def test_a_json_file_that_is_not_a_list_is_refused(folder: Path, content: bytes, clues: list[str]) -> None:
    path = folder / "pairs.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"pairs\.json") as caught:
        list(read_json_list(path))
    assert [clue for clue in clues if clue not in str(caught.value)] == []


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", " [ ] ")])
def test_a_file_without_records_is_refused(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{name} contains no record\."):
        load_checked(folder / name)


@pytest.mark.parametrize("name", ["pairs.csv", "pairs", "pairs.jsonl.gz"])
def test_an_unknown_suffix_is_refused_with_the_known_ones(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"must be one of \.jsonl, \.json, \.parquet"):
        load_checked(write_lines(folder, PAIR, name=name))


def test_a_missing_data_file_or_image_root_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data file .*missing\.jsonl"):
        load_checked(folder / "missing.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere \(image_root\)"):
        load_checked(write_lines(folder, PAIR), image_root=folder / "nowhere")


# --- skipping -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "good", "where"),
    [(write_lines, PAIR, ":{}"), (write_list, PUBLISHED_PAIR, ":RECORD {}")],
    ids=["jsonl", "json"],
)
def test_skipping_keeps_the_order_and_writes_the_skipped_records_to_a_file(
    folder: Path, write: Callable[..., Path], good: dict[str, Any], where: str
) -> None:
    duplicates = '{"prompt": "東京", "prompt": ""}'
    path = write(folder, good | {"prompt": "1"}, good | {"prompt": 2}, good | {"prompt": "3"}, duplicates)
    log = folder / "logs" / "today" / "skipped.jsonl"
    records = load_checked(path, on_bad_record="skip", skipped=log)
    assert [record.winner_prompt for record in records if isinstance(record, PreferencePair)] == ["1", "3"]
    skipped = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [row["where"] for row in skipped] == [f"{path}{where.format(2)}", f"{path}{where.format(4)}"]
    assert "'prompt' is 2" in skipped[0]["reason"]
    assert [json.loads(skipped[0]["record"]), skipped[1]["record"]] == [good | {"prompt": 2}, duplicates]


def test_skipped_bytes_that_are_not_utf8_are_written_escaped(folder: Path) -> None:
    log = folder / "skipped.jsonl"
    load_checked(write_lines(folder, b'{"caf\xe9"}', PAIR), on_bad_record="skip", skipped=log)
    assert json.loads(log.read_text(encoding="utf-8"))["record"] == '{"caf\\xe9"}'


def test_skipped_records_are_appended_and_valid_files_write_none(folder: Path) -> None:
    log = folder / "skipped.jsonl"
    load_checked(write_lines(folder, PAIR), on_bad_record="skip", skipped=log)
    assert not log.exists()
    for _ in range(2):
        load_checked(write_lines(folder, PAIR, "{}"), on_bad_record="skip", skipped=log)
    assert len(log.read_text(encoding="utf-8").splitlines()) == 2


def test_skipping_needs_a_file_other_than_the_data(folder: Path) -> None:
    path = write_lines(folder, PAIR, "{}")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="needs `skipped`"):
        load_checked(path, on_bad_record="skip")
    with pytest.raises(ValueError, match="is the data file"):
        load_checked(path, on_bad_record="skip", skipped=folder / "more" / ".." / "pairs.jsonl")
    assert path.read_bytes() == before


def test_skipping_all_records_is_an_error(folder: Path) -> None:
    path, log = write_lines(folder, "{}", "3"), folder / "skipped.jsonl"
    with pytest.raises(ValueError, match=r"all of its 2 were invalid, see .*skipped\.jsonl"):
        load_checked(path, on_bad_record="skip", skipped=log)
    assert len(log.read_text(encoding="utf-8").splitlines()) == 2


# --- images -------------------------------------------------------------------------------------


def test_image_paths_are_relative_to_the_data_file_or_to_image_root(folder: Path) -> None:
    row = PAIR | {"winner": "c.jpg", "loser": "d.webp"}
    expected = [folder / "more" / "c.jpg", folder / "more" / "d.webp"]
    for path, root in [
        (write_lines(folder / "more", row), None),
        (write_lines(folder, row), folder / "more"),
        (write_lines(folder, row | {"winner": str(folder / "more" / "c.jpg")}), folder / "more"),
        (write_lines(folder, row | {"winner": "../more/c.jpg"}), folder / "more"),
    ]:
        (record,) = load_checked(path, image_root=root)
        assert isinstance(record, PreferencePair)
        assert [record.winner, record.loser] == expected


@pytest.mark.parametrize("name", ["../a.png", "x/../../a.png", "{folder}/a.png", "link.png", "linked/a.png"])
def test_paths_outside_of_the_image_root_are_refused(folder: Path, name: str) -> None:
    """The path may leave it by `..`, as an absolute path, or through a link to a file or a folder."""
    root = folder / "more"
    (root / "link.png").symlink_to(folder / "a.png")
    (root / "linked").symlink_to(folder)
    name = name.format(folder=folder)
    message = error_of(write_lines(folder, LABELLED | {"image": name}), image_root=root)
    assert name in message
    assert f"outside of the image root {root}" in message


def test_links_within_the_image_root_are_resolved_and_reveal_equal_images(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder / "b.png")
    (record,) = load_checked(write_lines(folder, PAIR | {"loser": "link.png"}))
    assert isinstance(record, PreferencePair)
    assert record.loser == folder / "b.png"
    assert "must differ" in error_of(write_lines(folder, PAIR | {"winner": "link.png"}))


def test_the_image_root_may_be_a_link(folder: Path) -> None:
    (folder / "root").symlink_to(folder / "more")
    (record,) = load_checked(write_lines(folder, LABELLED | {"image": "c.jpg"}), image_root=folder / "root")
    assert isinstance(record, LabelledImage)
    assert record.image == folder / "more" / "c.jpg"


def test_circular_links_are_refused(folder: Path) -> None:
    (folder / "x.png").symlink_to(folder / "x.png")
    assert "'x.png'" in error_of(write_lines(folder, LABELLED | {"image": "x.png"}))


def write_broken_image(folder: Path, kind: str) -> str:
    """Write an image that cannot be used and return its name; `kind` is its flaw, or the suffix of a truncated file."""
    match kind:
        case "empty":
            (folder / "x.png").write_bytes(b"")
        case "folder":
            (folder / "x.png").mkdir()
        case "text":
            (folder / "x.png").write_text("not an image", encoding="utf-8")
        case "pipe":
            os.mkfifo(folder / "x.png")
        case "flipped bit":
            content = bytearray((folder / "a.png").read_bytes())
            content[-16] ^= 1
            (folder / "x.png").write_bytes(content)
        case "missing":
            pass
        case suffix:
            Image.effect_noise((64, 64), 50).save(folder / f"complete.{suffix}")
            content = (folder / f"complete.{suffix}").read_bytes()
            (folder / "x.png").write_bytes(content[: len(content) // 2])
    return "x.png"


@pytest.mark.parametrize(
    ("kind", "clue"),
    [
        ("missing", "does not exist"),
        ("empty", "empty file"),
        ("folder", "not a file"),
        ("pipe", "not a file"),
        ("text", "cannot identify"),
        ("flipped bit", "cannot be read as an image"),
        *((suffix, "cannot be read as an image") for suffix in ("png", "jpg", "webp", "gif", "bmp", "tiff")),
    ],
)
def test_a_broken_image_is_refused(folder: Path, kind: str, clue: str) -> None:
    path = write_lines(folder, PAIR, LABELLED | {"image": write_broken_image(folder, kind)})
    message = error_of(path)
    assert message.startswith(f"{path}:2: the image '")
    assert "x.png'" in message
    assert clue in message


UNSUPPORTED = {("jpg", "P"), ("jpg", "RGBA"), ("png", "CMYK"), ("gif", "CMYK"), ("bmp", "CMYK")}
SUFFIXES_AND_MODES = [
    (suffix, mode)
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tiff")
    for mode in ("RGB", "L", "P", "RGBA", "1", "CMYK")
    if (suffix, mode) not in UNSUPPORTED
]


@pytest.mark.parametrize(("suffix", "mode"), SUFFIXES_AND_MODES)
def test_images_of_every_common_format_and_mode_are_accepted(folder: Path, suffix: str, mode: str) -> None:
    Image.new(mode, (9, 7)).save(folder / f"x.{suffix}")
    assert len(load_checked(write_lines(folder, LABELLED | {"image": f"x.{suffix}"}))) == 1


def test_an_image_may_have_max_pixels_and_not_one_more(folder: Path) -> None:
    path = write_lines(folder, PAIR)
    assert len(load_checked(path, max_pixels=24 * 16)) == 1
    message = error_of(path, max_pixels=24 * 16 - 1)
    assert "decompression bomb: 24 x 16 = 384 pixels" in message
    assert "max_pixels is 383" in message


@pytest.mark.parametrize("limit", [100, 300], ids=["Pillow's error", "Pillow's warning"])
def test_pillows_own_limit_of_pixels_does_not_apply(folder: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    path = write_lines(folder, LABELLED)
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        message = error_of(path, max_pixels=50)
        if limit == 300:
            assert len(load_checked(path)) == 1
    assert "decompression bomb" in message
    assert "384" in message
    assert "max_pixels is 50" in message
    assert leaked == []


def test_each_image_is_opened_once_whatever_paths_name_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none when records are loaded."""
    opened: list[str] = []
    original = usable.flaw_of_image

    def spy(path: Path, *, max_pixels: int) -> str | None:
        opened.append(path.name)
        return original(path, max_pixels=max_pixels)

    monkeypatch.setattr(usable, "flaw_of_image", spy)
    (folder / "x.png").write_text("no image")
    rows = [PAIR, PAIR | {"winner": "./a.png"}, LABELLED | {"image": "x.png"}, LABELLED | {"image": "x.png"}]
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_, **__: pytest.fail("an image was opened"))
        records = load_records(write_lines(folder, *rows))
    assert len(usable_records(records, skipped=folder / "skipped.jsonl")) == 2
    assert sorted(opened) == ["a.png", "b.png", "x.png"]


# --- training and validation ----------------------------------------------------------------------


def some_records(num_records: int, *, num_prompts: int, seed: int) -> list[Record]:
    rng = random.Random(seed)
    a, b, records = Path("a.png"), Path("b.png"), []
    for i in range(num_records):
        first, second = (f"prompt {rng.randrange(num_prompts)}" for _ in range(2))
        match rng.randrange(10):
            case 0:
                records.append(PreferencePair(a, a, first, second, where=str(i)))
            case 1 | 2 | 3:
                records.append(LabelledImage(a, first, 1, str(i)))
            case _:
                records.append(PreferencePair(a, b, first, first, where=str(i)))
    return records


def prompts(records: list[Record]) -> set[str]:
    return {
        prompt
        for record in records
        for prompt in (
            (record.prompt,) if isinstance(record, LabelledImage) else (record.winner_prompt, record.loser_prompt)
        )
    }


@pytest.mark.parametrize("seed", range(20))
def test_no_prompt_is_on_both_sides_and_no_record_is_lost(seed: int) -> None:
    records = some_records(300, num_prompts=200, seed=seed)
    training, validation = split_by_prompt(records, fraction=0.2, seed=seed)
    assert not prompts(training) & prompts(validation)
    position = {record.where: i for i, record in enumerate(records)}
    for side in (training, validation):
        assert side == sorted(side, key=lambda record: position[record.where])
    assert sorted(position) == sorted(record.where for side in (training, validation) for record in side)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5, 0.9])
def test_about_the_given_fraction_is_held_out(fraction: float) -> None:
    records = some_records(1000, num_prompts=2000, seed=1)
    _, validation = split_by_prompt(records, fraction=fraction, seed=0)
    assert len(validation) == pytest.approx(1000 * fraction, abs=10)


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_records() -> None:
    records = some_records(300, num_prompts=300, seed=2)
    shuffled = random.Random(3).sample(records, len(records))
    sides = [{record.where for record in split_by_prompt(records, fraction=0.3, seed=seed)[1]} for seed in (0, 0, 1)]
    assert sides[0] == sides[1] == {record.where for record in split_by_prompt(shuffled, fraction=0.3, seed=0)[1]}
    assert sides[0] != sides[2]


def test_prompts_that_are_connected_through_a_chain_stay_together() -> None:
    image = Path("a.png")
    chain: list[Record] = [PreferencePair(image, image, str(i), str(i + 1)) for i in range(50)]
    random.Random(0).shuffle(chain)
    others: list[Record] = [LabelledImage(image, f"other {i}", 1) for i in range(50)]
    for seed in range(10):
        training, validation = split_by_prompt(chain + others, fraction=0.4, seed=seed)
        assert set(chain) <= set(training)
        assert len(validation) == 40


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_fraction_outside_of_0_and_1_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"fraction is {fraction}; it must be above 0 and below 1"):
        split_by_prompt(some_records(10, num_prompts=10, seed=0), fraction=fraction, seed=0)


@pytest.mark.parametrize(
    ("num_records", "num_prompts", "fraction", "side"),
    [(10, 1, 0.5, "validation"), (3, 100, 0.1, "validation"), (3, 100, 0.9, "training"), (0, 1, 0.5, "validation")],
    ids=["one prompt", "small fraction", "large fraction", "no records"],
)
def test_neither_side_may_be_empty(num_records: int, num_prompts: int, fraction: float, side: str) -> None:
    with pytest.raises(ValueError, match=f"of {num_records} records leaves none for {side}"):
        split_by_prompt(some_records(num_records, num_prompts=num_prompts, seed=0), fraction=fraction, seed=0)


# --- the summary ----------------------------------------------------------------------------------


def counts_in(summary: str) -> dict[str, str]:
    return {name.strip(): count for name, count in (line.rsplit(maxsplit=1) for line in summary.splitlines())}


def test_the_summary_by_hand() -> None:
    a, b, c = Path("a.png"), Path("b.png"), Path("c.png")
    records: list[Record] = [
        PreferencePair(a, b, FOX, FOX, rating_gap=1.0),
        PreferencePair(b, a, BLUE, BLUE, rating_gap=2.5),
        PreferencePair(a, b, "", "", rating_gap=1.0),
        PreferencePair(a, b, FOX, FOX, tie=True),
        PreferencePair(a, a, FOX, BLUE),
        LabelledImage(c, FOX, 1),
        LabelledImage(a, "x", 0),
        LabelledImage(b, "x", 0),
    ]
    assert counts_in(describe(records)) == {
        "pairs": "5",
        "ties": "1",
        "ties among the pairs": "20.0%",
        "with two prompts": "1",
        "with a rating gap": "3",
        "gap 1": "2",
        "gap 2.5": "1",
        "labelled images": "3",
        "label 1 (good)": "1",
        "label 0 (bad)": "2",
        "good among the labels": "33.3%",
        "distinct prompts": "4",
        "most records of one": "4",
        "distinct images": "3",
    }


def test_many_different_gaps_are_counted_in_bins() -> None:
    gaps = [*range(1, 102), 101]
    records: list[Record] = [PreferencePair(Path("a"), Path("b"), FOX, FOX, rating_gap=float(gap)) for gap in gaps]
    bins = {name: count for name, count in counts_in(describe(records)).items() if name.startswith("gap")}
    assert bins == {"gap 1 to 26": "25", "gap 26 to 51": "25", "gap 51 to 76": "25", "gap 76 to 101": "27"}


def test_a_summary_of_no_records_is_all_zeros() -> None:
    assert set(counts_in(describe([])).values()) == {"0"}


# --- random changes -------------------------------------------------------------------------------

VALID_LINES = [
    PAIR | {"rating_gap": 2.0, "id": 3, "comment": "x"},
    {"prompt": FOX, "tie": ["a.png", "b.png"]},
    {"winner_prompt": FOX, "loser_prompt": BLUE, "image": "a.png"},
    {"winner_prompt": FOX, "loser_prompt": BLUE, "winner": "more/c.jpg", "loser": "more/d.webp"},
    LABELLED,
]
VALID_ELEMENTS = [PUBLISHED_PAIR, PUBLISHED_PAIR | {"prompt": [FOX, BLUE]}, PUBLISHED_LABELLED]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 0.5, 1e308, -1e308, 10**30, float("nan"), float("inf")),
    *("", "a", FOX, "a.png", "more/c.jpg", "..", "/", "/etc/passwd", ".", "a.png/x", "\0", "\ud800", "x" * 5000, "~"),
    *([], {}, ["a.png", "b.png"], ["", ""], [1, 2], [[]], {"prompt": FOX}, [FOX, BLUE]),
]
KEYS = [
    *PAIR,
    *LABELLED,
    *PUBLISHED_PAIR,
    *PUBLISHED_LABELLED,
    "tie",
    "id",
    "comment",
    "winer",
    "",
    "Prompt",
    "rating_gap",
]


def mutated(rng: random.Random, rows: list[dict[str, Any]]) -> bytes:
    row = dict(rng.choice(rows))
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(list(row) or ["prompt"])
        match rng.randrange(5):
            case 0:
                row.pop(key, None)
            case 1:
                row[rng.choice(KEYS)] = row.pop(key, None)
            case 2:
                row[key] = rng.choice(VALUES)
            case 3:
                row[rng.choice(KEYS)] = rng.choice(VALUES)
            case _:
                other = rng.choice(list(row) or ["prompt"])
                row[key], row[other] = row.get(other), row.get(key)
    source = bytearray(json.dumps(row).encode())
    if rng.random() < 0.4:
        start = rng.randrange(len(source))
        source[start : start + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
    return bytes(source)


def load_or_refuse(path: Path) -> list[Record] | str:
    try:
        return load_checked(path)
    except ValueError as error:
        return str(error)


def check_records(records: list[Record], root: Path) -> None:
    for record in records:
        if isinstance(record, LabelledImage):
            assert type(record.label) is int
            assert record.label in (0, 1)
            paths, texts = [record.image], [record.prompt]
        else:
            paths, texts = [record.winner, record.loser], [record.winner_prompt, record.loser_prompt]
            assert (paths[0], texts[0]) != (paths[1], texts[1])
            assert type(record.tie) is bool
            assert type(record.rating_gap) is float
            assert 0 <= record.rating_gap < float("inf")
            assert not (record.tie and record.rating_gap)
        assert all(isinstance(text, str) and text.encode() is not None for text in texts)
        for path in paths:
            assert path.is_relative_to(root)
            with Image.open(path) as image:
                image.load()


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_randomly_changed_record_is_refused_with_its_file_or_valid(folder: Path, kind: str) -> None:
    write, rows = (write_lines, VALID_LINES) if kind == "jsonl" else (write_list, VALID_ELEMENTS)
    rng, outcomes = random.Random(0), {"valid": 0, "refused": 0}
    for _ in range(600):
        source = mutated(rng, rows)
        path = write(folder, source)
        outcome = load_or_refuse(path)
        if isinstance(outcome, str):
            assert str(path) in outcome, source
            assert len(outcome) < 1000, source
            outcome.encode()
            outcomes["refused"] += 1
        else:
            check_records(outcome, folder)
            outcomes["valid"] += 1
    assert min(outcomes.values()) > 20, "the test proves nothing if all changed records are valid, or none"


@pytest.mark.parametrize(
    ("records", "warning"),
    [
        ([LabelledImage(Path(f"{i}.png"), f"{i}", 1) for i in range(8)], "all labels are 1, so that a model which"),
        (
            [PreferencePair(Path(f"{i}"), Path("b"), FOX, FOX, tie=True) for i in range(8)],
            "all pairs are ties, so that",
        ),
        ([LabelledImage(Path(f"{i}.png"), f"{i}", i % 2) for i in range(8)], ""),
    ],
)
def test_records_that_teach_no_order_are_warned_of(records: list[Record], warning: str) -> None:
    log: list[str] = []
    prepare_records(
        records,
        records,
        {},
        exclude_test_prompts=False,
        validation_fraction=0.1,
        hard_negatives=0.0,
        seed=0,
        log=log.append,
    )
    found = [text for text in log if text.startswith("WARNING")]
    names = ("training", "validation") if warning else ()
    assert all(text.startswith(f"WARNING: in the {n} data {warning}") for n, text in zip(names, found, strict=True))
