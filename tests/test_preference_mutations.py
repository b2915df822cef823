"""Randomly changed rows and files of preferences are refused with their file and row, or give valid records."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from reward_model.datasets import containers
from reward_model.datasets.raw_records import RawRecord
from reward_model.datasets.table import RecordTable
from reward_model.image_files import open_image
from reward_model.stored_images import StoredImage
from reward_model.types import LabelledImage
from tests.preference_files import (
    CAT,
    FOX,
    HPDV2_TEST,
    HPDV2_TRAIN,
    HPDV3,
    RICHHF,
    UNSAFEBENCH,
    encoded_image,
    image_reward_rows,
    load_checked,
    pick_a_pic_rows,
    write_all_images,
    write_parquet,
    write_tar,
    write_tfrecord,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with images where each data set has them; unpacked images go to its runs/images."""
    monkeypatch.chdir(tmp_path)
    write_all_images(tmp_path)
    return tmp_path


VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 0.5, 1e308, -1e308, 10**30, float("nan"), float("inf")),
    *("", "null", FOX, "red.jpg", "blue.jpg", "..", "/etc/passwd", "../red.jpg", "images", "\0", "\ud800", "x" * 5000),
    *("Safe", "Unsafe", "東京 🦊", "missing.jpg", "half.jpg", "empty.jpg"),
    *([], {}, ["red.jpg", "blue.jpg"], ["red.jpg"] * 2, [1, 0], [0, 1], [1, 1, 2], [None], [[]], {"bytes": None}),
    *(b"", encoded_image("white"), encoded_image("white")[:150], {"bytes": encoded_image("blue"), "path": None}),
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "image_reward_db/fidelity": image_reward_rows(),
    "image_reward_db/rank": [
        {"prompt": FOX, "prompt_id": "x", "image_path": ["red.jpg", "blue.jpg"], "rank": [1, 2]},
        {"prompt": FOX, "prompt_id": "x", "img_better": encoded_image("red"), "img_worse": encoded_image("blue")},
    ],
    "pick_a_pic": pick_a_pic_rows(),
    "hpdv2": [*HPDV2_TRAIN, *HPDV2_TEST],
    "hpdv3": HPDV3,
    "unsafe_bench": UNSAFEBENCH,
    "richhf/artifact=0.5": RICHHF,
    "richhf/alignment=0.5": [row | {"prompt": CAT} for row in RICHHF],
    "own": [{"prompt": FOX, "winner": encoded_image("red"), "loser": encoded_image("blue"), "rating_gap": 2.0}],
    "llava_reward": [{"path": encoded_image("red"), "label": 1, "prompt": FOX, "safety_label": "Safe"}],
}


def mutated(rng: random.Random, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a row with one to three changes: a field or an element of a list removed, renamed or replaced."""
    row = dict(rng.choice(rows))
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(sorted(row) or ["prompt"])
        match rng.randrange(6):
            case 0:
                row.pop(key, None)
            case 1:
                row[key[:-1] + rng.choice("sx ")] = row.pop(key, None)
            case 2 | 3:
                row[key] = rng.choice(VALUES)
            case 4:
                row[key] = row.get(rng.choice(sorted(row) or ["prompt"]))
            case _ if isinstance(row.get(key), list) and row[key]:
                row[key] = [*row[key]]
                row[key][rng.randrange(len(row[key]))] = rng.choice(VALUES)
            case _:
                row[key] = [row.get(key)] * rng.randrange(4)
    return row


def check(records: RecordTable, folder: Path) -> None:
    assert records
    for record in records:
        if isinstance(record, LabelledImage):
            assert record.label in (0, 1)
            paths, texts = [record.image], [record.prompt]
        else:
            paths, texts = [record.winner, record.loser], [record.winner_prompt, record.loser_prompt]
            assert (paths[0], texts[0]) != (paths[1], texts[1])
            assert 0 <= record.rating_gap < float("inf")
            assert not (record.tie and record.rating_gap)
        assert all(text.encode() is not None for text in texts)
        for path in paths:
            file = Path(path.file) if isinstance(path, StoredImage) else path
            assert file.resolve().is_relative_to(folder)
            with open_image(path) as image:
                image.load()


def load_or_refuse(source: str) -> RecordTable | str:
    try:
        return load_checked(source)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", ROWS)
def test_a_randomly_changed_row_is_refused_with_its_number_or_valid(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """150 changed rows of each format, from a table, which has more types of values than JSON.

    For ImageRewardDB, one of the rows of a prompt is changed.
    """
    (folder / "half.jpg").write_bytes(encoded_image("red")[:200])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "x.parquet").write_bytes(b"")
    rng, outcomes = random.Random(name), {"valid": 0, "refused": 0}
    rows: list[dict[str, Any]] = []

    def placed(value: Any) -> Any:
        """Write bytes to a file, as a reader of tables only says where they lie."""
        match value:
            case bytes() | {"bytes": bytes()}:
                content = value if isinstance(value, bytes) else value["bytes"]
                with (folder / "cells").open("ab") as file:
                    start = file.tell()
                    file.write(content)
                return StoredImage(str(folder / "cells"), start, len(content))
            case list():
                return [placed(one) for one in value]
            case _:
                return value

    def read_parquet(path: Path, *, skip_columns: object, **_: object) -> list[RawRecord]:
        read = [{key: placed(value) for key, value in row.items()} for row in rows]
        return [RawRecord(f"{path}:ROW {number}", row) for number, row in enumerate(read, start=1)]

    monkeypatch.setattr(containers, "read_parquet", read_parquet)
    for _ in range(150):
        rows[:] = [mutated(rng, ROWS[name])]
        if name == "image_reward_db/fidelity":
            changed = rng.randrange(5)
            rows[:] = [
                *ROWS[name][:changed],
                mutated(rng, ROWS[name][changed : changed + 1]),
                *ROWS[name][changed + 1 :],
            ]
        outcome = load_or_refuse(f"{name}:x.parquet")
        if isinstance(outcome, RecordTable):
            check(outcome, folder)
        else:
            no_preference = outcome.startswith("x.parquet contains no record; for 1 rows ")
            assert no_preference or outcome.startswith("x.parquet:ROW "), rows
            assert len(outcome) < 1000, rows
            outcome.encode()
        outcomes["refused" if isinstance(outcome, str) else "valid"] += 1
    assert min(outcomes.values()) > 5, "the test proves nothing if all changed rows are valid, or none"


@pytest.mark.parametrize("kind", ["tfrecord", "tar", "parquet"])
def test_a_file_with_changed_bytes_is_refused_or_valid(folder: Path, kind: str) -> None:
    """40 changed files of each container; a ValueError names the file."""
    row = {"image": encoded_image("red"), "safety_label": "Safe", "text": FOX}
    path = folder / f"x.{kind}"
    match kind:
        case "tfrecord":
            write_tfrecord(path, [row])
        case "tar":
            write_tar(path, {"x.json": b'{"safety_label": "Safe"}', "x.jpg": encoded_image("red")})
        case _:
            write_parquet(path, [row])
    original, rng = path.read_bytes(), random.Random(kind)
    for _ in range(40):
        changed = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(changed)
        outcome = load_or_refuse(f"unsafe_bench:{path}")
        if isinstance(outcome, RecordTable):
            check(outcome, folder)
        else:
            assert str(path) in outcome
