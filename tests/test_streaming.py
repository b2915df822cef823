"""Preference data in buckets: read where they lie, tried again after a lost connection, named when it stays lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch.utils.data import DataLoader

from reward_model import locations
from reward_model.collator import Collator
from reward_model.datasets import BadRecordError, load_records, source
from reward_model.datasets.__main__ import main as check_data
from reward_model.datasets.refill import Refill
from reward_model.datasets.table import RecordTable
from reward_model.images import to_tensor
from reward_model.types import LabelledImage, PreferencePair
from tests.bucket_server import Files, found_by_s3fs, serving
from tests.preference_files import encoded_image, pick_a_pic_rows, write_tar

RED, BLUE = encoded_image("red"), encoded_image("blue")


class Dropping(MemoryFileSystem):
    """Files in memory, of which the next `num_drops` reads fail as a lost connection does."""

    protocol: ClassVar[Any] = "dropping"
    num_drops: ClassVar[int] = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("dropping://", "memory://", 1))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        if Dropping.num_drops:
            Dropping.num_drops -= 1
            raise TimeoutError("the server\nhung up")
        return super().cat_file(path, start=start, end=end, **options)


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    """An empty bucket, with an empty cache of records and no pauses between tries."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(locations, "_FIRST_WAIT", 0)
    fsspec.register_implementation("dropping", Dropping, clobber=True)
    locations.version_in_bucket.cache_clear()
    Dropping.num_drops = 0
    system = Dropping()
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def upload(bucket: MemoryFileSystem, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        bucket.pipe_file(f"/{name}", content)


def lines(*rows: object) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


PAIR = {"prompt": "a fox", "winner": "images/a.jpg", "loser": "images/b.jpg"}
IMAGES = {"b/images/a.jpg": RED, "b/images/b.jpg": BLUE}


def parquet_of(tmp_path: Path, rows: list[dict[str, Any]]) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=2)
    return (tmp_path / "x.parquet").read_bytes()


def contents(records: RecordTable) -> list[tuple[Any, ...]]:
    """Return prompt and mean colours of each record."""
    found = list[tuple[Any, ...]]()
    for record in records:
        sides = (record.image,) if isinstance(record, LabelledImage) else (record.winner, record.loser)
        prompt = record.prompt if isinstance(record, LabelledImage) else record.winner_prompt
        found.append((prompt, *(to_tensor(image).mean((1, 2)).round().tolist() for image in sides)))
    return found


# --- where data may lie ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["files", "parquet", "tar", "folder of shards"])
@pytest.mark.parametrize("cached_from", [0, 2**30], ids=["kept", "read anew"])
def test_data_of_a_bucket_are_those_of_its_files(
    bucket: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, cached_from: int
) -> None:
    monkeypatch.setattr(source, "_CACHED_FROM", cached_from)
    red, blue = [1, 0, 0], [0, 0, 1]
    expected = [("a fox", red, blue)] * 2
    match kind:
        case "files":
            upload(bucket, {**IMAGES, "b/x.jsonl": lines(PAIR, PAIR)})
            place = "dropping://b/x.jsonl"
        case "folder of shards":
            upload(bucket, {**IMAGES, "b/x-1.jsonl": lines(PAIR), "b/x-2.jsonl": lines(PAIR)})
            place = "own:dropping://b"
        case "parquet":
            rows = pick_a_pic_rows()[:3]
            upload(bucket, {"b/x.parquet": parquet_of(tmp_path, rows)})
            place, expected = "pick_a_pic:dropping://b/x.parquet", contents(load_records("pick_a_pic:x.parquet"))
        case _:
            members = {f"{i}{end}": one for i in "01" for end, one in (
                (".json", b'{"prompt": "a fox"}'), (".winner.jpg", RED), (".loser.jpg", BLUE)
            )}  # fmt: skip
            upload(bucket, {"b/x.tar": write_tar(tmp_path / "x.tar", members).read_bytes()})
            place = "dropping://b/x.tar"
    assert contents(load_records(place)) == expected
    assert contents(load_records(place)) == expected


def test_images_may_be_in_a_bucket_and_their_records_here(bucket: MemoryFileSystem, tmp_path: Path) -> None:
    upload(bucket, IMAGES)
    (tmp_path / "x.jsonl").write_bytes(lines(PAIR))
    (record,) = load_records("x.jsonl", image_root="dropping://b")
    assert isinstance(record, PreferencePair)
    assert str(record.winner) == "dropping://b/images/a.jpg"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("images/none.jpg", r"'images/none\.jpg', relative to dropping://b, does not exist"),
        ("none/a.jpg", "does not exist"),
        ("images/empty.jpg", "is an empty file"),
        ("../secret.jpg", "is outside of the image root dropping://b"),
        ("/etc/passwd", "is outside of the image root dropping://b"),
        ("dropping://other/a.jpg", "is outside of the image root dropping://b"),
    ],
)
def test_an_image_that_is_not_in_the_bucket_is_refused(bucket: MemoryFileSystem, name: str, message: str) -> None:
    upload(bucket, {**IMAGES, "b/images/empty.jpg": b"", "b/x.jsonl": lines(PAIR, {**PAIR, "loser": name})})
    with pytest.raises(BadRecordError, match=rf"dropping://b/x\.jsonl:2: the image .*{message}"):
        load_records("dropping://b/x.jsonl")


def test_what_is_missing_for_a_bucket_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no data file dropping://b/none\.jsonl"):
        load_records("dropping://b/none.jsonl")
    with pytest.raises(ValueError, match=r"s4://b/x\.jsonl cannot be read: .*s4"):
        load_records("s4://b/x.jsonl")
    with pytest.raises(ValueError, match=r"image_folder reads folders of this machine\. Pack it into tar shards"):
        load_records("image_folder:dropping://b")


def test_streaming_reads_the_data_files_of_a_data_set_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pairs").mkdir()
    rows = pick_a_pic_rows()[:3]
    (tmp_path / "pairs" / "train.parquet").write_bytes(parquet_of(tmp_path, rows))
    records = load_records("pick_a_pic:hf:pairs@train", streaming=True)
    assert contents(records) == contents(load_records("pick_a_pic:pairs"))
    assert {record.where.rpartition("/")[2] for record in records} == {f"train.parquet:ROW {i}" for i in (1, 2, 3)}
    assert not list(tmp_path.rglob("cache/**/*.arrow"))  # nothing was copied
    with pytest.raises(ValueError, match=r"hf:pairs@test has no split 'test'; it has train"):
        load_records("pick_a_pic:hf:pairs@test", streaming=True)


# --- lost connections --------------------------------------------------------------------------------


def test_a_lost_connection_is_tried_again(bucket: MemoryFileSystem) -> None:
    upload(bucket, {**IMAGES, "b/x.jsonl": lines(PAIR)})
    Dropping.num_drops = locations.NUM_TRIES - 1
    (record,) = load_records("dropping://b/x.jsonl")
    assert isinstance(record, PreferencePair)
    Dropping.num_drops = locations.NUM_TRIES - 1
    assert to_tensor(record.winner).shape == (3, 8, 8)
    Dropping.num_drops = 10**9
    with pytest.raises(ConnectionError, match=r"^dropping://b/images/a\.jpg could not be read in 5 tries .*hung up"):
        to_tensor(record.winner)
    with pytest.raises(ConnectionError, match=r"^dropping://b/x\.jsonl could not be read in 5 tries"):
        load_records("dropping://b/x.jsonl")


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_lost_connection_is_not_taken_for_a_broken_file(bucket: MemoryFileSystem, tmp_path: Path, kind: str) -> None:
    tar = write_tar(tmp_path / "x.tar", {"x.json": b'{"prompt": "a", "label": 1}', "x.jpg": RED}).read_bytes()
    upload(bucket, {"b/x.tar": tar, "b/x.parquet": parquet_of(tmp_path, pick_a_pic_rows())})
    Dropping.num_drops = 10**9
    with pytest.raises(ConnectionError, match=rf"dropping://b/x\.{kind} could not be read in 5 tries"):
        load_records(f"{'pick_a_pic' if kind == 'parquet' else 'own'}:dropping://b/x.{kind}")


def test_a_lost_connection_in_training_stops_and_skips_nothing(bucket: MemoryFileSystem, tmp_path: Path) -> None:
    upload(bucket, {**IMAGES, "b/x.jsonl": lines(PAIR)})
    records, skipped = load_records("dropping://b/x.jsonl"), tmp_path / "skipped.jsonl"

    class Model:
        class backbone:  # noqa: N801
            prepare: ClassVar[Callable[..., Any]] = staticmethod(lambda images, _: {"images": torch.stack([*images])})

    collate = Collator(Model, records, Refill(1, skipped=skipped))  # pyright: ignore[reportArgumentType]
    Dropping.num_drops = 10**9
    with pytest.raises(ConnectionError, match=r"dropping://b/images/a\.jpg could not be read"):
        collate([{"record": 0}])
    assert not skipped.exists()


# --- shards ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["has changed", "was added", "is missing"])
def test_a_shard_of_a_bucket_that_changed_since_the_check_is_refused(bucket: MemoryFileSystem, what: str) -> None:
    upload(bucket, {**IMAGES, "b/x-1.jsonl": lines(PAIR), "b/x-2.jsonl": lines(PAIR)})
    assert check_data(["check", "own:dropping://b", "--num_workers", "1"]) == 0
    shard = "x-3" if what == "was added" else "x-2"
    if what == "is missing":
        bucket.rm_file(f"/b/{shard}.jsonl")
    else:
        upload(bucket, {f"b/{shard}.jsonl": lines(PAIR, PAIR)})
    locations.version_in_bucket.cache_clear()  # as in a new process
    with pytest.raises(ValueError, match=rf"dropping:/+b/{shard}\.jsonl {what} since own:dropping://b was checked on"):
        load_records("own:dropping://b")


def test_a_shard_that_is_cut_is_named(bucket: MemoryFileSystem, tmp_path: Path) -> None:
    whole = parquet_of(tmp_path, pick_a_pic_rows())
    upload(bucket, {"b/1.parquet": whole, "b/2.parquet": whole[:-100]})
    with pytest.raises(ValueError, match=r"dropping://b/2\.parquet cannot be read as Parquet after row 0"):
        load_records("pick_a_pic:dropping://b")


def test_a_column_that_changes_its_type_in_the_seventh_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for shard in range(1, 9):
        rows = [{**row, "caption": 7} if shard == 7 else row for row in pick_a_pic_rows()]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shards" / f"{shard}.parquet")
    with pytest.raises(BadRecordError, match=r"shards/7\.parquet:ROW 1: 'caption' is 7; it must be a string"):
        load_records("pick_a_pic:shards")


# --- S3 and web servers ------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    """A server of pairs of a fox, red against blue, which s3fs finds by its variables; requests are not repeated."""
    content = {"my-bucket/pairs.jsonl": lines(*[PAIR] * 3)}
    content |= {name.replace("b/", "my-bucket/", 1): image for name, image in IMAGES.items()}
    with serving(Files(content)) as files, found_by_s3fs(files, monkeypatch):
        yield files


def place_of(server: Files, protocol: str, name: str = "pairs.jsonl") -> str:
    return f"s3://my-bucket/{name}" if protocol == "s3" else f"{server.address}/my-bucket/{name}"


@pytest.mark.parametrize("protocol", ["s3", "http"])
def test_pairs_and_images_are_read_by_ranges_and_in_the_processes_of_a_loader(server: Files, protocol: str) -> None:
    records = load_records(place_of(server, protocol))
    assert contents(records) == [("a fox", [1, 0, 0], [0, 0, 1])] * 3
    assert all(wanted for method, path, wanted in server.requests if method == "GET" and "?" not in path)
    # Forked after this process has used its connections.
    loader = DataLoader(range(3), 1, num_workers=2, collate_fn=lambda rows: contents(records.select(np.array(rows))))
    assert [*loader] == [[("a fox", [1, 0, 0], [0, 0, 1])]] * 3


@pytest.mark.parametrize("protocol", ["s3", "http"])
def test_a_server_that_hangs_up_is_asked_again_and_then_named(server: Files, protocol: str) -> None:
    (record, *_) = load_records(place_of(server, protocol))
    assert isinstance(record, PreferencePair)
    server.num_drops = locations.NUM_TRIES - 1
    assert to_tensor(record.winner).shape == (3, 8, 8)
    server.num_drops = 10**9
    with pytest.raises(ConnectionError, match=r"my-bucket/images/a\.jpg could not be read in 5 tries"):
        to_tensor(record.winner)
    with pytest.raises(ConnectionError, match=r"my-bucket/pairs\.jsonl could not be read in 5 tries"):
        load_records(place_of(server, protocol))


@pytest.mark.parametrize("protocol", ["s3", "http"])
def test_a_file_that_is_not_on_a_server_is_named(server: Files, protocol: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no data file .*my-bucket/none\.jsonl"):
        load_records(place_of(server, protocol, "none.jsonl"))
    server.content["my-bucket/pairs.jsonl"] += lines({**PAIR, "loser": "images/none.jpg"})
    with pytest.raises(BadRecordError, match=r"pairs\.jsonl:4: the image 'images/none\.jpg'.* does not exist"):
        load_records(place_of(server, protocol))


@pytest.mark.parametrize("with_tags", [True, False])
def test_a_web_file_that_changed_since_the_check_is_noticed(server: Files, with_tags: bool) -> None:
    """By its ETag or, without one, by its size; fsspec only looks at the address."""
    server.with_tags = with_tags
    place = place_of(server, "http")
    assert check_data(["check", place, "--num_workers", "1"]) == 0
    assert len(load_records(place)) == 3
    server.content["my-bucket/pairs.jsonl"] = lines(*[{**PAIR, "prompt": "a cat" if with_tags else "two cats"}] * 3)
    locations.version_in_bucket.cache_clear()
    with pytest.raises(ValueError, match=r"my-bucket/pairs\.jsonl has changed since .* was checked"):
        load_records(place)


def test_a_web_server_that_cannot_send_parts_is_named(server: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "_BLOCK", 100)
    server.with_ranges = False
    with pytest.raises(ValueError, match=r"pairs\.jsonl cannot be read by ranges of bytes: its server sends all of it"):
        load_records(place_of(server, "http"))
