"""The containers of preference data: JSON, JSONL, Parquet, tar, TFRecord, folders, and data sets of the Hub."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import pytest

from reward_model.datasets import BadRecordError, load_same_prompt_pairs, parquet
from reward_model.datasets.formats import FORMATS, parse_source, source_name
from reward_model.datasets.images import parse_prefix
from reward_model.datasets.parquet import read_parquet
from reward_model.datasets.tfrecord import masked_crc32c, read_tfrecord
from reward_model.images import to_tensor
from reward_model.stored_images import StoredImage, read_bytes
from reward_model.types import LabelledImage, PreferencePair
from tests.preference_files import (
    CAT,
    FOX,
    HPDV3,
    UNSAFEBENCH,
    as_rows,
    colour_of,
    encoded_image,
    example,
    field,
    framed,
    load_checked,
    pick_a_pic_rows,
    write_all_images,
    write_json,
    write_parquet,
    write_pick_a_pic,
    write_tar,
    write_tfrecord,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with images in it and in images/; unpacked images go to its runs/images."""
    monkeypatch.chdir(tmp_path)
    write_all_images(tmp_path)
    return tmp_path


# --- FORMAT:PATH ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_in_the_table_of_formats_can_be_parsed(name: str) -> None:
    given = name.replace("THRESHOLD", "0.5")
    form, path = parse_source(f"{given}:some/file.parquet")
    assert (form.name, path) == (given.partition("=")[0], "some/file.parquet")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("data/test.jsonl", "test"),
        ("hf:me/mine@test", "mine@test"),
        ("image_reward_db/rank:data/metadata-test.parquet", "image_reward_db-rank-metadata-test"),
        ("image_reward_db/overall:data/metadata-test.parquet", "image_reward_db-overall-metadata-test"),
        ("richhf/artifact=0.5:test.tfrecord", "richhf-artifact-test"),
        ("pick_a_pic:hf:yuvalkirstain/pickapic_v2@test", "pick_a_pic-pickapic_v2@test"),
    ],
)
def test_the_name_of_a_source_can_name_a_file(source: str, name: str) -> None:
    assert source_name(source) == name


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pickapick:x.parquet", r"pickapick is not a data format. Did you mean pick_a_pic\? Formats are own, "),
        ("image_reward_db:x.json", r"image_reward_db is not a data format\. Did you mean image_reward_db/\w+\?"),
        ("image_reward_db/fidelty:x.json", r"Did you mean image_reward_db/fidelity\?"),
        ("richhf/artifact:x.tfrecord", r"Did you mean richhf/artifact=THRESHOLD\?"),
        ("richhf/artifact=high:x.tfrecord", r"The threshold of richhf/artifact=high is not a finite number"),
        ("richhf/artifact=nan:x.tfrecord", r"The threshold of richhf/artifact=nan is not a finite number"),
        ("hpdv3=0.5:x.json", r"hpdv3=0.5 is not a data format"),
    ],
)
def test_an_unknown_format_is_refused_with_the_known_formats(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_checked(source)


def test_a_colon_in_a_file_name_does_not_start_a_format(folder: Path) -> None:
    (folder / "a:b.jsonl").write_text(json.dumps({"prompt": FOX, "image": "red.jpg", "label": 1}))
    assert as_rows(load_checked("a:b.jsonl")) == [("red", FOX, 1)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hpdv3:nowhere.json", "There is no data file nowhere.json"),
        ("own:x.csv", "x.csv has the suffix '.csv'; it must be one of .jsonl, .json, .parquet, .tar, .tfrecord"),
        ("image_folder:nowhere", "There is no folder nowhere"),
        ("own:images", "The folder images contains no file with the suffix .jsonl"),
        ("own:mixed", "The folder mixed contains .json and .jsonl files; all of its data files must have one suffix"),
        ("own:hf:owner/name", "hf:owner/name has no split; write hf:ID@SPLIT"),
        ("own:hf:nowhere/at_all@train", "hf:nowhere/at_all@train cannot be loaded: "),
    ],
)
def test_a_path_without_data_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (folder / "x.csv").write_text("")
    (folder / "mixed").mkdir()
    for name in ("a.json", "b.jsonl"):
        (folder / "mixed" / name).write_text("")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_checked(source)
    assert message in str(caught.value)


# --- containers -----------------------------------------------------------------------------------


def test_the_shards_of_a_folder_are_read_in_the_order_of_their_names(folder: Path) -> None:
    (folder / "shards").mkdir()
    for name, colour in (("b", "blue"), ("a", "green")):
        write_parquet(folder / "shards" / f"{name}.parquet", [UNSAFEBENCH[0] | {"image": encoded_image(colour)}])
    records = load_checked("unsafe_bench:shards")
    assert [(row[0], record.where) for row, record in zip(as_rows(records), records, strict=True)] == [
        ("green", "shards/a.parquet:ROW 1"),
        ("blue", "shards/b.parquet:ROW 1"),
    ]


def test_a_tar_with_duplicate_names_or_with_data_after_its_end_is_refused(folder: Path) -> None:
    path = write_tar(folder / "x.tar", {"x.json": b"{}"})
    archive, member = path.read_bytes(), path.read_bytes()[:1024]
    for broken, message in (
        (member + archive, r"x\.tar has two members 'x\.json'"),
        (archive + archive, r"x\.tar cannot be read after byte 1,024: no member starts there"),
        (member + b"x" * 512 + archive, r"x\.tar cannot be read after byte 1,024"),
    ):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=message):
            load_checked("own:x.tar")


def test_image_prefix_also_applies_to_members_of_an_archive(folder: Path) -> None:
    row = b'{"prompt": "a", "label": 0, "image": "/scr/y.jpg"}'
    write_tar(folder / "x.tar", {"x.json": row, "in/y.jpg": encoded_image("blue")})
    assert as_rows(load_checked("own:x.tar", image_prefix="/scr=in")) == [("blue", "a", 0)]


def test_a_table_loaded_through_datasets_gives_the_same_records(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_dataset` of a folder of Parquet files with a column of type `datasets.Image`."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    (folder / "table").mkdir()
    rows = {key: [row[key] for row in UNSAFEBENCH] for key in UNSAFEBENCH[0]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(folder / "table" / "train-00000-of-00001.parquet")
    records = load_checked(f"unsafe_bench:hf:{folder / 'table'}@train")
    assert as_rows(records) == [("red", FOX, 0), ("green", "", 1)]
    assert records[1].where == f"hf:{folder / 'table'}@train:ROW 2"
    with pytest.raises(ValueError, match="table@test cannot be loaded: ValueError: Unknown split"):
        load_checked(f"unsafe_bench:hf:{folder / 'table'}@test")


def test_a_sample_of_a_tar_finds_its_images_by_field_or_by_name(folder: Path) -> None:
    members = {
        "a/0001.json": json.dumps({"prompt": FOX, "label": 1}).encode(),
        "a/0001.jpg": encoded_image("green"),
        "a/0002.json": json.dumps({"prompt": CAT}).encode(),
        "a/0002.winner.PNG": encoded_image("red", "PNG"),
        "a/0002.loser.png": encoded_image("blue", "PNG"),
        "b.json": json.dumps({"prompt": CAT, "tie": ["a/0001.jpg", "a/0002.loser.png"]}).encode(),
    }
    records = load_checked(str(write_tar(folder / "shard.tar", members)))
    tie = ("green", "blue", CAT, True, 0.0)
    assert as_rows(records) == [("green", FOX, 1), ("red", "blue", CAT, False, 0.0), tie]
    assert [record.where.rpartition(":")[2] for record in records] == ["a/0001.json", "a/0002.json", "b.json"]


@pytest.mark.parametrize(
    ("members", "clue"),
    [
        ({"x.json": b'{"prompt": "a", "label": 1, "image": "../red.jpg"}'}, "'../red.jpg' is not a member"),
        ({"x.json": b'{"prompt": "a", "label": 1, "image": "red.jpg"}'}, "'red.jpg' is not a member"),
        (
            {"x.json": b'{"prompt": "a", "label": 1}', "x.jpg": b"text"},
            "shard.tar cannot be read as an image: cannot identify",
        ),
        ({"x.json": b'{"prompt": "a", "label": 1}', "y.jpg": b"text"}, "do not form a record"),
        ({"x.json": b'{"prompt": '}, "not JSON"),
    ],
)
def test_an_invalid_sample_of_a_tar_is_refused_with_its_name(
    folder: Path, members: dict[str, bytes], clue: str
) -> None:
    """Files outside of the archive are not used, not even images beside it."""
    path = write_tar(folder / "shard.tar", members)
    with pytest.raises(BadRecordError) as caught:
        load_checked(str(path))
    assert str(caught.value).startswith(f"{path}:x.json: ")
    assert clue in str(caught.value)


@pytest.mark.parametrize("name", ["x.tar", "x.parquet", "x.tfrecord"])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.97])
def test_a_truncated_file_is_refused(folder: Path, name: str, keep: float) -> None:
    row = {"image": encoded_image("red"), "safety_label": "Safe"}
    match name:
        case "x.tar":
            path = write_tar(
                folder / name, {"x.json": b'{"safety_label": "Safe"}', "x.jpg": row["image"] + bytes(9999)}
            )
        case "x.parquet":
            path = write_parquet(folder / name, [row])
        case _:
            path = write_tfrecord(folder / name, [row])
    content_before = path.read_bytes()
    if name == "x.tar":
        content_before = content_before[:10240]  # only zeros follow
    path.write_bytes(content_before[: round(keep * len(content_before))])
    with pytest.raises(ValueError, match=rf"{name}.* (cannot be read|is not an Example|is truncated)"):
        load_checked(f"unsafe_bench:{path}")


def test_the_checksum_is_masked_crc32c() -> None:
    """CRC-32C of "123456789" is 0xe3069283; the mask rotates it right by 15 bits and adds a constant."""
    rotated = (0xE3069283 >> 15 | 0xE3069283 << 17) & 0xFFFFFFFF
    assert masked_crc32c(b"123456789") == (rotated + 0xA282EAD8) % 2**32


@pytest.mark.parametrize("packed", [True, False])
def test_all_types_of_features_of_a_tfrecord_are_decoded(folder: Path, packed: bool) -> None:
    fields = {"name": "zwei Füchse", "raw": b"\xff\x00", "score": 0.25, "count": -3, "many": 2**40}
    (folder / "x.tfrecord").write_bytes(framed(example(fields, packed=packed)))
    (row,) = read_tfrecord(folder / "x.tfrecord", skip_columns={"raw"})
    assert row.source == {key: value for key, value in fields.items() if key != "raw"}


# --- paths of images ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "name", "found"),
    [
        ("/scr/them=images", "/scr/them/red.jpg", "images/red.jpg"),
        ("/scr/them/=images/", "/scr/them/red.jpg", "images/red.jpg"),
        ("/scr/them=", "/scr/them/red.jpg", "red.jpg"),
        ("/scr/them={folder}/train", "/scr/them/red.jpg", "train/red.jpg"),
        ("images=images", "red.jpg", "red.jpg"),
    ],
)
def test_image_prefix_replaces_the_start_of_paths(folder: Path, prefix: str, name: str, found: str) -> None:
    path = write_json(folder / "x.json", [{"path": name, "label": 1, "prompt": FOX}])
    (record,) = load_checked(path, image_prefix=prefix.format(folder=folder))
    assert isinstance(record, LabelledImage)
    assert record.image == folder / found


def test_image_prefix_matches_complete_folder_names_and_cannot_leave_the_image_root(folder: Path) -> None:
    path = write_json(folder / "x.json", [{"path": "/scr/them2/red.jpg", "label": 1, "prompt": FOX}])
    for prefix in ("/scr/them=images", "/scr/them2=../images"):
        with pytest.raises(BadRecordError, match="outside of the image root"):
            load_checked(path, image_prefix=prefix)


@pytest.mark.parametrize("text", ["", "=", "=x", "/a/b", "/="])
def test_an_image_prefix_without_two_sides_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="it must be OLD=NEW"):
        parse_prefix(text)


def test_images_are_read_from_the_cells_of_a_table_and_nothing_is_written(folder: Path) -> None:
    path = write_pick_a_pic(folder / "x.parquet", pick_a_pic_rows()[:2])
    before = sorted(folder.rglob("*"))
    one, two = load_checked(f"pick_a_pic:{path}")
    assert isinstance(one, PreferencePair)
    assert isinstance(two, PreferencePair)
    for image, row, column, colour in (
        (one.winner, 0, "jpg_0", "red"), (one.loser, 0, "jpg_1", "blue"),
        (two.winner, 1, "jpg_1", "blue"), (two.loser, 1, "jpg_0", "red"),
    ):  # fmt: skip
        assert image == StoredImage(str(path), row, -1, column)
        assert read_bytes(image) == encoded_image(colour)
        assert to_tensor(image).shape == (3, 8, 8)
    assert sorted(folder.rglob("*")) == before


def test_same_prompt_pairs_come_from_published_formats_and_exclude_labels(folder: Path) -> None:
    table = write_pick_a_pic(folder / "x.parquet")
    write_json(folder / "x.json", HPDV3)
    pairs = load_same_prompt_pairs([f"pick_a_pic:{table}", "hpdv3:x.json"], image_root=None, skipped=None)
    assert [(colour_of(pair.winner), colour_of(pair.loser)) for pair in pairs] == [
        ("red", "blue"), ("blue", "red"), ("red", "green"), ("blue", "red"), ("blue", "green"),
    ]  # fmt: skip
    write_parquet(folder / "safe.parquet", UNSAFEBENCH)
    with pytest.raises(BadRecordError, match=r"safe\.parquet:ROW 1: this is a label"):
        load_same_prompt_pairs(["unsafe_bench:safe.parquet"], image_root=None, skipped=None)


def test_a_length_beyond_the_end_of_the_file_is_refused_before_it_is_read(folder: Path) -> None:
    path = folder / "x.tfrecord"
    for length, message in ((9, "the file ends 1 bytes after its header"), (2**60, "its length is 1,152,921,504,606,")):
        head = struct.pack("<Q", length)
        path.write_bytes(head + struct.pack("<I", masked_crc32c(head)) + b"x")
        with pytest.raises(ValueError, match=rf"RECORD 1 is not an Example .* {message}"):
            load_checked(f"unsafe_bench:{path}")


def test_a_hole_of_a_file_is_not_read(folder: Path) -> None:
    """A file can have a terabyte of zeros that take no disk."""
    head = struct.pack("<Q", 10**12)
    with (folder / "x.tfrecord").open("wb") as file:
        file.write(head + struct.pack("<I", masked_crc32c(head)))
        file.truncate(10**12 + 16)
    with pytest.raises(ValueError, match=r"its length is 1,000,000,000,000 bytes; an Example may have at most 268,435"):
        load_checked("unsafe_bench:x.tfrecord")
    member = tarfile.TarInfo("x.json")
    member.size = 10**12
    with (folder / "x.tar").open("wb") as file:
        file.write(member.tobuf(tarfile.PAX_FORMAT))
        file.truncate(file.tell() + 10**12)
    with pytest.raises(ValueError, match=r"x\.json: the member 'x\.json' has 1,000,000,000,000 bytes; it may have at"):
        load_checked("x.tar")


def test_a_changed_byte_of_an_example_is_detected(folder: Path) -> None:
    content = bytearray(framed(example({"image": encoded_image("red"), "safety_label": "Safe", "text": FOX})))
    content[-12] ^= 1  # in the text
    (folder / "x.tfrecord").write_bytes(content)
    with pytest.raises(ValueError, match=r"RECORD 1 is not an Example .* the checksum of its content is 0x\w+, not 0x"):
        load_checked("unsafe_bench:x.tfrecord")


def test_an_example_of_more_than_a_million_numbers_is_refused_before_they_are_read(folder: Path) -> None:
    """As Python objects 120 MB of numbers took 2.4 GB."""
    entry = field(1, b"x") + field(2, field(2, field(1, bytes(4 << 20))))
    (folder / "x.tfrecord").write_bytes(framed(field(1, field(1, entry))))
    with pytest.raises(ValueError, match="it has more than 1,048,576 features and values"):
        load_checked("unsafe_bench:x.tfrecord")


def test_a_varint_has_at_most_10_bytes(folder: Path) -> None:
    """Reading one of 262,144 bytes took 12 seconds, and was then refused as something else."""
    (folder / "x.tfrecord").write_bytes(framed(b"\xff" * 262_144 + b"\x01"))
    with pytest.raises(ValueError, match=r"RECORD 1 is not an Example .* a varint has more than 10 bytes"):
        load_checked("unsafe_bench:x.tfrecord")


def test_sparse_members_of_a_tar_are_refused_before_memory_is_asked_for(folder: Path) -> None:
    headers = {"GNU.sparse.realsize": str(10**13), "GNU.sparse.name": "1.winner.png", "GNU.sparse.map": "0,10"}
    with tarfile.open(folder / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in {"1.json": b'{"prompt": "a"}', "1.winner.png": b"0123456789"}.items():
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(content), headers if name == "1.winner.png" else {}
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match=r"x\.tar has the sparse member '1\.winner\.png'"):
        load_checked("x.tar", on_bad_record="skip", skipped=folder / "skipped.jsonl")


def test_a_table_that_claims_gigabytes_is_read_row_by_row(folder: Path) -> None:
    """A file of a few kilobytes can claim any number of equal images; only one row may be in memory at once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = bytes(4 << 20)
    pq.write_table(pa.table({"prompt": ["a"] * 16, "winner": [image] * 16}), folder / "x.parquet", compression="zstd")
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in read_parquet(folder / "x.parquet", skip_columns=()))
    assert most < 16 << 20


def test_a_table_that_takes_far_more_memory_than_its_file_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal values cost a file nothing, be they long or many."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def refused(columns: dict[str, Any], *, dictionary: bool, message: str) -> None:
        pq.write_table(pa.table(columns), folder / "x.parquet", compression="zstd", use_dictionary=dictionary)
        with pytest.raises(ValueError, match=rf"x\.parquet is refused, since a file of any size .* {message}"):
            list(read_parquet(folder / "x.parquet", skip_columns=()))

    many = pa.nulls(1_000_001, pa.string()).fill_null("a")
    refused({"prompt": many}, dictionary=True, message="its column 1 has 1,000,001 values in")
    refused({"prompt": [["a"] * 1_000_001]}, dictionary=True, message="its column 1 has 1,000,001 values in")
    monkeypatch.setattr(parquet, "_ALWAYS_FREE", 1 << 20)
    refused({"prompt": ["a" * 2000] * 1000}, dictionary=False, message="its columns take 2,")
    refused({"prompt": ["a" * 2000] * 1000}, dictionary=True, message="its texts take more than 1,048,576 bytes")


def test_a_table_whose_footer_lies_about_its_rows_or_bytes_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def as_thrift(number: int) -> bytes:
        parts = [(2 * number) >> shift & 127 for shift in range(0, max(1, (2 * number).bit_length()), 7)]
        return bytes([*(part | 128 for part in parts[:-1]), parts[-1]])

    path, texts = folder / "x.parquet", ["a" * 2000] * 1003
    pq.write_table(pa.table({"prompt": texts}), path, compression="zstd", use_dictionary=False)
    content, true = path.read_bytes(), pq.read_metadata(path)
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    monkeypatch.setattr(parquet, "_ALWAYS_FREE", 1 << 20)
    for number, stated, message in (
        (true.num_rows, 2**40, "its column 1 has 1,099,511,627,776 values in"),
        (true.row_group(0).total_byte_size, 100, "its pages take 2,"),
    ):
        footer = content[start:-8].replace(as_thrift(number), as_thrift(stated))
        path.write_bytes(content[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
        monkeypatch.setattr(parquet, "_MOST_INFLATED", 1 if stated == 100 else 10_000)
        with pytest.raises(ValueError, match=rf"x\.parquet is refused, since a file of any size .* {message}"):
            list(read_parquet(path, skip_columns=()))


def test_a_changed_byte_of_a_page_with_a_checksum_is_detected(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "x.parquet"
    table = pa.table({"prompt": [FOX]})
    pq.write_table(table, path, compression="none", write_statistics=False, write_page_checksum=True)
    content = path.read_bytes()
    path.write_bytes(content.replace(FOX.encode(), b"a bed fox", 1))
    with pytest.raises(ValueError, match=r"cannot be read as Parquet after row 0: .*CRC"):
        list(read_parquet(path, skip_columns=()))
