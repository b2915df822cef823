"""Tags of preference data: validated, kept in the Arrow table, and filled from the columns of published data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reward_model.datasets import load_records
from reward_model.datasets import source as source_module
from reward_model.datasets.fields import BadRecordError
from reward_model.datasets.table import RecordTable
from reward_model.datasets.tags import MAX_LENGTH, published_tags
from reward_model.types import Tags
from tests.preference_files import (
    FOX,
    HPDV3,
    UNSAFEBENCH,
    image_reward_rows,
    pick_a_pic_rows,
    write_all_images,
    write_json,
    write_parquet,
    write_pick_a_pic,
)  # fmt: skip

RED, GREEN = "images/red.jpg", "images/green.jpg"
PAIR = {"prompt": FOX, "winner": RED, "loser": GREEN}


def own(folder: Path, *tags: Any) -> RecordTable:
    write_all_images(folder)
    lines = [json.dumps(PAIR if one is Ellipsis else {**PAIR, "tags": one}) for one in tags]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return load_records(folder / "pairs.jsonl")


def tags_of(records: RecordTable) -> list[Tags]:
    return [record.tags for record in records]


def test_tags_reach_the_records_and_null_or_nothing_is_none(tmp_path: Path) -> None:
    given = [{"tier": "binding", "generator": ["sdxl", "flux"]}, ..., None, {}, {"tier": None, "domain": "flat 日"}]
    expected = [{"tier": ("binding",), "generator": ("sdxl", "flux")}, {}, {}, {}, {"domain": ("flat 日",)}]
    assert tags_of(own(tmp_path, *given)) == expected


def test_every_form_may_have_tags(tmp_path: Path) -> None:
    write_all_images(tmp_path)
    forms = [
        PAIR,
        {**PAIR, "rating_gap": 1.0},
        {"prompt": FOX, "tie": [RED, GREEN]},
        {"winner_prompt": FOX, "loser_prompt": "a cat", "image": RED},
        {"winner_prompt": FOX, "loser_prompt": "a cat", "winner": RED, "loser": GREEN},
        {"prompt": FOX, "image": RED, "label": 1},
    ]
    path = tmp_path / "all.jsonl"
    path.write_text("\n".join(json.dumps({**form, "tags": {"tier": str(i)}}) for i, form in enumerate(forms)))
    assert tags_of(load_records(path)) == [{"tier": (str(i),)} for i in range(len(forms))]


def test_a_column_of_structs_with_nulls_is_read_too(tmp_path: Path) -> None:
    """Arrow gives every row each name of a struct, null where a row has none."""
    write_all_images(tmp_path)
    kind = pa.struct([("tier", pa.string()), ("generator", pa.list_(pa.string()))])
    tags = pa.array([{"tier": "binding", "generator": None}, None, {"tier": None, "generator": ["x", "y"]}], kind)
    columns = {key: pa.array([value] * 3) for key, value in PAIR.items()}
    pq.write_table(pa.table({**columns, "tags": tags}), tmp_path / "pairs.parquet")
    expected = [{"tier": ("binding",)}, {}, {"generator": ("x", "y")}]
    assert tags_of(load_records(tmp_path / "pairs.parquet")) == expected


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ("binding", r"'tags' is 'binding'; it must be an object"),
        (["binding"], r"'tags' is \['binding'\]; it must be an object"),
        ({"tier": 3}, r"tag 'tier' is 3; it must be a string"),
        ({"tier": True}, r"tag 'tier' is True; it must be a string"),
        ({"tier": {"a": "b"}}, r"tag 'tier' is .*; it must be a string"),
        ({"tier": ["a", 3]}, r"tag 'tier' is 3; it must be a string"),
        ({"tier": ["a", None]}, r"tag 'tier' is None; it must be a string"),
        ({"tier": []}, r"tag 'tier' is \[\]; it must be a string"),
        ({"tier": ["a", "a"]}, r"tag 'tier' is \['a', 'a'\]; each value must be given once"),
        ({"tier": ""}, r"tag 'tier' is ''; it must have 1 to 80"),
        ({"tier": "a "}, r"tag 'tier' is 'a '; .* no space at its ends"),
        ({"tier": "a\nb"}, r"printable"),
        ({"tier": "x" * (MAX_LENGTH + 1)}, r"it must have 1 to 80 printable"),
        ({"": "a"}, r"a name in 'tags' is ''"),
        ({"tier": "\ud83d"}, r"not valid Unicode"),
    ],
)
def test_invalid_tags_are_refused_with_their_value(tmp_path: Path, tags: Any, message: str) -> None:
    with pytest.raises(BadRecordError, match=message):
        own(tmp_path, ..., tags)


def test_the_longest_tag_fits(tmp_path: Path) -> None:
    assert tags_of(own(tmp_path, {"x" * MAX_LENGTH: "y" * MAX_LENGTH}))


def test_a_misspelt_key_is_named(tmp_path: Path) -> None:
    write_all_images(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({**PAIR, "tag": {"tier": "x"}}))
    with pytest.raises(BadRecordError, match="Did you mean 'tags'"):
        load_records(tmp_path / "pairs.jsonl")


def test_tags_survive_the_arrow_file_selection_and_concatenation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "_CACHED_FROM", 0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    given = [{"tier": str(i)} for i in range(5)]
    table = own(tmp_path, *given)
    assert list((tmp_path / "cache").rglob("records.arrow")), "a guard: this table was converted to a file"
    both = RecordTable.concatenate([table[1:3], RecordTable.of(list(table))])
    assert tags_of(both) == [{"tier": (one["tier"],)} for one in (*given[1:3], *given)]
    assert both[0].tags == {"tier": ("1",)}


def test_published_columns_become_tags(tmp_path: Path) -> None:
    write_all_images(tmp_path)
    path = write_json(tmp_path / "hpdv3.json", [{**HPDV3[0], "model1": "flux", "model2": "real_images"}])
    assert tags_of(load_records(f"hpdv3:{path}")) == [{"generator": ("flux", "real_images")}]
    path = write_json(tmp_path / "hpdv3.json", [{**HPDV3[0], "model1": "flux", "model2": "flux"}])
    assert tags_of(load_records(f"hpdv3:{path}")) == [{"generator": ("flux",)}]
    path = write_json(tmp_path / "hpdv3.json", [{**HPDV3[0], "model1": None, "model2": ""}])
    assert tags_of(load_records(f"hpdv3:{path}")) == [{}]
    path = write_json(tmp_path / "hpdv3.json", [{**HPDV3[0], "model1": 3}])
    with pytest.raises(BadRecordError, match="'model1' is 3; it must be a string"):
        load_records(f"hpdv3:{path}")
    rows = [{**pick_a_pic_rows()[0], "model_0": "xl", "model_1": "sd-1.5"}]
    pairs = load_records(f"pick_a_pic:{write_pick_a_pic(tmp_path / 'pick.parquet', rows)}")
    assert tags_of(pairs) == [{"generator": ("xl", "sd-1.5")}]
    labels = load_records(f"unsafe_bench:{write_parquet(tmp_path / 'unsafe.parquet', UNSAFEBENCH[:1])}")
    assert tags_of(labels) == [{"category": ("Shocking",), "source": (UNSAFEBENCH[0]["source"],)}]
    rated = load_records(f"image_reward_db/overall:{write_parquet(tmp_path / 'rated.parquet', image_reward_rows())}")
    assert {one["category"] for one in tags_of(rated)} == {("Animals",)}


def test_published_columns_are_stripped_shortened_and_given_once() -> None:
    fields = {"a": " x ", "b": "y" * 100, "c": "x"}
    assert published_tags(fields, one=("a", "c"), two=("b",), none=("d",)) == {"one": ("x",), "two": ("y" * 80,)}
