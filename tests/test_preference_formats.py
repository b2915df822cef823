"""Every published data format, converted to records that are worked out by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from reward_model.datasets import BadRecordError
from tests.preference_files import (
    CAT,
    FOX,
    HPDV2_TEST,
    HPDV2_TRAIN,
    HPDV3,
    RICHHF,
    UNSAFEBENCH,
    as_rows,
    encoded_image,
    image_reward_rows,
    load_checked,
    pick_a_pic_rows,
    write_all_images,
    write_json,
    write_parquet,
    write_pick_a_pic,
    write_tfrecord,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with images where each data set has them; unpacked images go to its runs/images."""
    monkeypatch.chdir(tmp_path)
    write_all_images(tmp_path)
    return tmp_path


def error_of(source: str, **options: Any) -> str:
    with pytest.raises(BadRecordError) as caught:
        load_checked(source, **options)
    return str(caught.value)


# --- ImageRewardDB --------------------------------------------------------------------------------

BY_PERSPECTIVE = {
    "alignment": [("red", "blue", FOX, False, 5.0), ("green", "blue", FOX, False, 5.0)],
    "fidelity": [
        ("green", "red", FOX, False, 2.0),
        ("blue", "red", FOX, False, 1.0),
        ("green", "blue", FOX, False, 1.0),
        ("white", "red", CAT, False, 5.0),
    ],
    "overall": [
        ("red", "green", FOX, False, 2.0),
        ("red", "blue", FOX, False, 3.0),
        ("green", "blue", FOX, False, 1.0),
    ],
    "rank": [("red", "green", FOX, False, 1.0), ("red", "blue", FOX, False, 1.0)],
}


@pytest.mark.parametrize("perspective", BY_PERSPECTIVE)
@pytest.mark.parametrize("layout", ["metadata", "json", "rows", "groups"])
def test_each_rating_of_image_reward_db_orders_the_images_of_a_prompt(
    folder: Path, perspective: str, layout: str
) -> None:
    rows = image_reward_rows("image" if layout == "rows" else "image_path")
    without_preference = Counter[str]()
    match layout:
        case "metadata" | "rows":
            path = write_parquet(folder / "metadata-train.parquet", rows)
        case "json":
            path = write_json(folder / "train_1.json", rows)
        case _:
            keys = ("rank", "overall_rating", "image_text_alignment_rating", "fidelity_rating")
            groups = [
                {"prompt": rows[i]["prompt"], "prompt_id": rows[i]["prompt_id"], "classification": "Animals"}
                | {"image": [{"bytes": encoded_image(Path(row["image_path"]).stem), "path": None} for row in rows[i:j]]}
                | {key: [row[key] for row in rows[i:j]] for key in keys}
                for i, j in ((0, 3), (3, 5))
            ]
            path = write_parquet(folder / "groups.parquet", groups)
    records = load_checked(f"image_reward_db/{perspective}:{path}", without_preference=without_preference)
    assert as_rows(records) == BY_PERSPECTIVE[perspective]
    reason = f"image_reward_db/{perspective}: all images of the prompt are rated the same"
    assert without_preference == ({} if perspective == "fidelity" else {reason: 1})
    if layout == "metadata":
        assert records[0].where == f"{path}:ROW 1 to ROW 3"


def test_pair_rows_of_image_reward_db_are_by_rank_only(folder: Path) -> None:
    row = {"prompt_id": "x", "prompt": FOX, "classification": "Animals"}
    row |= {
        f"img_{side}": {"bytes": encoded_image(c), "path": None} for side, c in (("better", "blue"), ("worse", "red"))
    }
    path = write_parquet(folder / "pairs.parquet", [row])
    assert as_rows(load_checked(f"image_reward_db/rank:{path}")) == [("blue", "red", FOX, False, 0.0)]
    assert "are given by rank, not by fidelity" in error_of(f"image_reward_db/fidelity:{path}")


def test_the_test_set_of_image_reward_is_by_rank_only(folder: Path) -> None:
    row = {"id": "x", "prompt": FOX, "generations": ["red.jpg", "green.jpg", "blue.jpg"], "ranking": [2, 1, 2]}
    path = write_json(folder / "test.json", [row])
    assert as_rows(load_checked(f"image_reward_db/rank:{path}")) == [
        ("green", "red", FOX, False, 1.0),
        ("green", "blue", FOX, False, 1.0),
    ]
    assert "have a ranking only, and no ratings of alignment" in error_of(f"image_reward_db/alignment:{path}")


@pytest.mark.parametrize(
    ("change", "clue"),
    [
        ({"fidelity_rating": 8}, "'fidelity_rating' is 8; it must be an integer from 1 to 7"),
        ({"fidelity_rating": -1}, "'fidelity_rating' is -1"),
        ({"fidelity_rating": 3.5}, "'fidelity_rating' is 3.5"),
        ({"fidelity_rating": None}, "'fidelity_rating' is None"),
        ({"prompt": CAT}, "'prompt' is ['a red fox', 'two cats on a sofa', 'a red fox']; it must be a string"),
        ({"image_amount_in_total": 4}, "'image_amount_in_total' is [3, 4, 3], but there are 3 consecutive rows"),
        ({"image_path": "images/train/train_1/red.jpg"}, "must differ in the image"),
        ({"image_path": "images/train/train_1/grey.jpg"}, "grey.jpg', relative to"),
    ],
)
def test_an_invalid_image_invalidates_only_its_prompt(folder: Path, change: dict[str, Any], clue: str) -> None:
    rows = image_reward_rows()
    rows[1] |= change
    path = write_json(folder / "train_1.json", rows)
    message = error_of(f"image_reward_db/fidelity:{path}")
    assert message.startswith(f"{path}:RECORD 1 to RECORD 3: ")
    assert clue in message
    remaining = load_checked(f"image_reward_db/fidelity:{path}", on_bad_record="skip", skipped=folder / "skipped.jsonl")
    assert as_rows(remaining) == BY_PERSPECTIVE["fidelity"][3:]
    (line,) = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert clue in line["reason"]


def test_rows_of_a_prompt_that_are_not_consecutive_are_refused(folder: Path) -> None:
    rows = image_reward_rows()
    path = write_json(folder / "train_1.json", [rows[0], rows[3], rows[1], rows[2], rows[4]])
    assert "'image_amount_in_total' is 3, but there are 1 consecutive rows" in error_of(
        f"image_reward_db/overall:{path}"
    )


# --- Pick-a-Pic, HPD, UnsafeBench, RichHF, folders ---------------------------------------------------


def test_pick_a_pic_has_winners_and_ties_and_counts_rows_without_a_label(folder: Path) -> None:
    without_preference = Counter[str]()
    records = load_checked(
        f"pick_a_pic:{write_pick_a_pic(folder / 'test.parquet')}", without_preference=without_preference
    )
    assert as_rows(records) == [
        ("red", "blue", FOX, False, 0.0),
        ("blue", "red", FOX, False, 0.0),
        ("red", "blue", FOX, True, 0.0),
    ]
    assert without_preference == {"pick_a_pic: has_label is false": 1, "pick_a_pic: are_different is false": 1}


@pytest.mark.parametrize(
    ("change", "clue"),
    [
        ({"label_0": 0.7, "label_1": 0.3}, "'label_0' and 'label_1' are 0.7 and 0.3; they must be"),
        ({"label_0": 1.0, "label_1": 1.0}, "are 1 and 1"),
        ({"label_0": float("nan")}, "'label_0' is nan"),
        ({"label_1": None}, "'label_1' is None"),
        ({"has_label": None}, "'has_label' is None; it must be true or false"),
        ({"caption": None}, "'caption' is None"),
        ({"jpg_0": b""}, "test.parquet is empty"),
        ({"jpg_0": encoded_image("red")[:200]}, "cannot be read as an image"),
        ({"jpg_1": encoded_image("red")}, "a pair must differ"),
    ],
)
def test_an_invalid_row_of_pick_a_pic_is_refused_with_its_number(
    folder: Path, change: dict[str, Any], clue: str
) -> None:
    rows = pick_a_pic_rows()
    rows[1] |= change
    path = write_pick_a_pic(folder / "test.parquet", rows)
    message = error_of(f"pick_a_pic:{path}")
    assert message.startswith(f"{path}:ROW 2: ")
    assert clue in message


def test_the_variant_of_pick_a_pic_without_images_is_recognised(folder: Path) -> None:
    bare = [{key: row[key] for key in row if key not in ("jpg_0", "jpg_1")} for row in pick_a_pic_rows()]
    assert "variant without images" in error_of(f"pick_a_pic:{write_pick_a_pic(folder / 'x.parquet', bare)}")


def test_hpdv2_has_two_layouts(folder: Path) -> None:
    train, test = write_json(folder / "train.json", HPDV2_TRAIN), write_json(folder / "test.json", HPDV2_TEST)
    assert as_rows(load_checked(f"hpdv2:{train}")) == [
        ("red", "green", FOX, False, 0.0),
        ("green", "red", CAT, False, 0.0),
    ]
    assert as_rows(load_checked(f"hpdv2:{test}")) == [
        ("green", "red", FOX, False, 1.0),
        ("green", "blue", FOX, False, 1.0),
    ]


@pytest.mark.parametrize(
    ("row", "clue"),
    [
        (HPDV2_TRAIN[0] | {"human_preference": [1, 1]}, "'human_preference' is [1, 1]; it must be [1, 0] or [0, 1]"),
        (HPDV2_TRAIN[0] | {"human_preference": [1]}, "'file_path' has 2 elements and 'human_preference' has 1"),
        (HPDV2_TEST[0] | {"rank": [1, 2]}, "'image_path' has 3 elements and 'rank' has 2"),
        (HPDV2_TEST[0] | {"rank": 3}, "'rank' is 3; it must be a list"),
        ({"prompt": FOX, "file_path": ["red.jpg", "blue.jpg"], "human_preferences": [1, 0]}, "'human_preference'?"),
    ],
)
def test_an_invalid_record_of_hpdv2_is_refused(folder: Path, row: dict[str, Any], clue: str) -> None:
    path = write_json(folder / "x.json", [row])
    message = error_of(f"hpdv2:{path}")
    assert message.startswith(f"{path}:RECORD 1: ")
    assert clue in message


def test_the_first_image_of_hpdv3_wins_at_any_confidence(folder: Path) -> None:
    assert as_rows(load_checked(f"hpdv3:{write_json(folder / 'train.json', HPDV3)}")) == [
        ("red", "green", FOX, False, 0.0),
        ("blue", "red", CAT, False, 0.0),
        ("blue", "green", CAT, False, 0.0),
    ]
    path = write_json(folder / "x.json", [HPDV3[0] | {"confidence": 1.5}])
    assert "'confidence' is 1.5; it must be null or in [0, 1]" in error_of(f"hpdv3:{path}")


def test_safe_is_label_1_and_a_missing_text_is_an_empty_prompt(folder: Path) -> None:
    path = write_parquet(folder / "train.parquet", UNSAFEBENCH)
    assert as_rows(load_checked(f"unsafe_bench:{path}")) == [("red", FOX, 0), ("green", "", 1)]
    path = write_parquet(folder / "x.parquet", [UNSAFEBENCH[0] | {"safety_label": "safe"}])
    assert "'safety_label' is 'safe'; it must be one of 'Safe', 'Unsafe'" in error_of(f"unsafe_bench:{path}")


@pytest.mark.parametrize("kind", ["tfrecord", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("score", "labels"),
    [("artifact=0.5", [1, 0]), ("alignment=0.5", [0, 1]), ("overall=0.5", [1, 1]), ("aesthetics=0.1", [1, 0])],
)
def test_scores_of_richhf_from_the_threshold_on_are_label_1(
    folder: Path, kind: str, score: str, labels: list[int]
) -> None:
    (folder / "train" / "red.txt").write_text(f"{FOX}\n")
    (folder / "train" / "green.txt").write_text(CAT)
    rows = [row | {"artifact_map": b"\xff" * 300, "prompt_misalignment_label": "0 1"} for row in RICHHF]
    match kind:
        case "tfrecord":
            path = write_tfrecord(folder / "train.tfrecord", rows)
        case "parquet":
            path = write_parquet(folder / "train.parquet", rows)
        case _:
            path = folder / "train.jsonl"
            path.write_text("\n".join(map(json.dumps, RICHHF)))
    expected = [("red", FOX, labels[0]), ("green", CAT, labels[1])]
    assert as_rows(load_checked(f"richhf/{score}:{path}")) == expected


def test_alignment_of_richhf_needs_a_prompt_and_artifacts_do_not(folder: Path) -> None:
    path = write_tfrecord(folder / "train.tfrecord", RICHHF)
    assert [row[1] for row in as_rows(load_checked(f"richhf/artifact=0.5:{path}"))] == ["", ""]
    assert "there is no prompt" in error_of(f"richhf/alignment=0.5:{path}")
    exported = write_json(folder / "train.json", [row | {"caption": CAT, "prompt_id": "x"} for row in RICHHF])
    assert [row[1] for row in as_rows(load_checked(f"richhf/alignment=0.5:{exported}"))] == [CAT, CAT]


@pytest.mark.parametrize(
    ("key", "hint"),
    [("txt", "text"), ("texts", "text"), ("safety_lable", "safety_label"), ("imge", "image"), ("context", None)],
)
def test_an_unknown_column_is_accepted_unless_it_looks_like_a_typo(folder: Path, key: str, hint: str | None) -> None:
    """Published data sets gain columns; a misspelt `text` must not become an empty prompt."""
    row = {"image": encoded_image("red"), "safety_label": "Safe"}
    row[key] = row.pop(hint or "", FOX)
    path = write_parquet(folder / "x.parquet", [row])
    if hint is None:
        assert as_rows(load_checked(f"unsafe_bench:{path}")) == [("red", "", 1)]
    else:
        assert f"the key {key!r} is unknown. Did you mean {hint!r}?" in error_of(f"unsafe_bench:{path}")


def test_an_image_folder_is_labelled_by_its_sub_folders(folder: Path) -> None:
    for kind, colour in (("safe", "green"), ("unsafe", "red")):
        (folder / "sorted" / kind).mkdir(parents=True)
        (folder / "sorted" / kind / "x.jpg").write_bytes(encoded_image(colour))
    (folder / "sorted" / "safe" / "x.txt").write_text(CAT)
    for root in (None, folder / "images"):  # image_root applies to other sources of the same list only
        found = load_checked(f"image_folder:{folder / 'sorted'}", image_root=root)
        assert as_rows(found) == [("green", CAT, 1), ("red", "", 0)]
    (folder / "sorted" / "usafe").mkdir()
    with pytest.raises(ValueError, match=r"usafe is not a known class; sub-folders must be named good, safe"):
        load_checked(f"image_folder:{folder / 'sorted'}")
