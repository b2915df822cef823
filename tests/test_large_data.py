"""Preference data of any size: records mapped from the cache, the order of blocks, the check and its stamp."""

from __future__ import annotations

import json
import os
import signal
import tracemalloc
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from torch.utils.data import DataLoader

from reward_model import stored_images
from reward_model.datasets import BadRecordError, json_list, load_records, scratch, source
from reward_model.datasets.__main__ import main
from reward_model.datasets.order import Numbers, OrderSampler, block_order, mixed_order, random_order
from reward_model.datasets.prepare import prepare_records
from reward_model.datasets.raw_records import parse_value, read_json_list
from reward_model.datasets.refill import Refill, UnusableError
from reward_model.datasets.split import split_by_prompt
from reward_model.datasets.table import SCHEMA, RecordTable
from reward_model.images import to_tensor
from reward_model.stored_images import StoredImage, read_bytes
from reward_model.types import LabelledImage, PreferencePair, Record
from tests.preference_files import encoded_image, write_tar


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a.png and b.png, and an empty cache that also takes the smallest data."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(source, "_CACHED_FROM", 0)
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (8, 8), colour).save(f"{name}.png")
    return tmp_path


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


GOOD = [{"prompt": f"fox {i}", "winner": "a.png", "loser": "b.png"} for i in range(5)]


# --- the table --------------------------------------------------------------------------------------


def some_records() -> list[Record]:
    a, stored = Path("a.png"), StoredImage("x.tar", 512, 9)
    pairs = [PreferencePair(a, stored, f"p{i}", f"p{i % 700}", tie=i % 3 == 0, where=f"x:{i}") for i in range(1500)]
    return [*pairs, *(LabelledImage(StoredImage("x.parquet", i, -1, "jpg"), "p", i % 2, f"y:{i}") for i in range(700))]


def test_a_table_holds_records_of_every_kind_and_selects_and_joins_them() -> None:
    records = some_records()
    table = RecordTable.of(records)
    assert table == records
    rows = np.random.default_rng(0).permutation(len(records))[:900]
    drawn = table.select(rows)
    expected = [records[row] for row in rows]
    assert drawn == expected
    assert (drawn[0], drawn[-1]) == (expected[0], expected[-1])
    assert drawn[100:200].select(np.array([3, 1])) == [expected[103], expected[101]]
    assert RecordTable.concatenate([drawn, table]) == [*expected, *records]
    assert RecordTable.concatenate([table, drawn])[-1] == expected[-1]
    assert [r.where for r in table.first_of_each_kind()] == ["x:0", "x:1", "y:0"]


def test_large_data_are_converted_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run maps the table: it neither reads the data nor refuses less. Changed data are read anew."""
    path, bad = write_rows(folder / "x.jsonl", *GOOD, {"prompt": "fox"}), folder / "skipped.jsonl"
    with pytest.raises(BadRecordError, match=r"x\.jsonl:6: the keys"):
        load_records(path)
    first = load_records(path, on_bad_record="skip", skipped=bad)
    line = bad.read_text()
    monkeypatch.setattr(source.Source, "open", lambda *_, **__: pytest.fail("the data were read again"))
    assert load_records(path, on_bad_record="skip", skipped=bad) == first
    assert bad.read_text() == line + line
    with pytest.raises(BadRecordError, match=r"x\.jsonl:6: the keys"):
        load_records(path)
    monkeypatch.undo()
    os.chdir(folder)
    write_rows(path, *GOOD[:2])
    assert len(load_records(path)) == 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_parts_that_are_read_side_by_side_give_one_table_and_the_error_of_the_first_bad_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Lines keep their numbers across parts, with a byte order mark, blank lines and no line feed at the end."""
    rows: list[Any] = [{"prompt": f"fox {i}", "winner": "a.png", "loser": "b.png"} for i in range(300)]
    rows[120], rows[250] = [dict(rows[0], prompt=prompt) for prompt in ("first \ud800", "second \ud800")]
    if kind == "jsonl":
        lines = "\ufeff" + "\n\n".join(json.dumps(row) for row in rows)
        (folder / "x.jsonl").write_text(lines)
    else:
        rows[120], rows[250] = [dict(rows[0], loser=loser) for loser in ("first", "second")]
        pq.write_table(pa.Table.from_pylist(rows), folder / "x.parquet", row_group_size=70)
    path, skipped = folder / f"x.{kind}", folder / "skipped.jsonl"
    whole = load_records(path, on_bad_record="skip", skipped=skipped)
    log = skipped.read_text()
    assert len(whole) == 298
    assert whole[-1].where == f"{path}:{'599' if kind == 'jsonl' else 'ROW 300'}"
    monkeypatch.setattr(source, "_VERSION", -1)
    monkeypatch.setattr(source, "_PART_LINES", 700)
    monkeypatch.setattr(source, "_PART_ROWS", 33)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    skipped.unlink()
    in_parts = load_records(path, on_bad_record="skip", skipped=skipped)
    assert in_parts == whole
    assert skipped.read_text() == log
    monkeypatch.setattr(source, "_VERSION", -2)
    with pytest.raises(BadRecordError, match=rf"x\.{kind}:(241|ROW 121): .*first"):
        load_records(path)


def test_the_counts_of_rows_without_preference_are_kept(folder: Path) -> None:
    rows = [{"caption": "a", "jpg_0": encoded_image("red"), "jpg_1": encoded_image("blue"), "label_0": 1.0,
             "label_1": 0.0, "has_label": i > 0} for i in range(3)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "x.parquet")
    for _ in range(2):
        counts = Counter[str]()
        assert len(load_records("pick_a_pic:x.parquet", without_preference=counts)) == 2
        assert counts == {"pick_a_pic: has_label is false": 1}


def test_data_of_which_most_rows_are_bad_are_refused(folder: Path) -> None:
    path = write_rows(folder / "x.jsonl", GOOD[0], {}, {})
    with pytest.raises(ValueError, match=r"2 of the 3 records of .*x\.jsonl are invalid, more than half; see skipped"):
        load_records(path, on_bad_record="skip", skipped=Path("skipped.jsonl"))


def test_a_line_without_end_is_refused_before_it_takes_memory(folder: Path) -> None:
    with (folder / "x.jsonl").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(ValueError, match=r"x\.jsonl:1 has more than 67,108,864 bytes; a line is one record"):
        load_records("x.jsonl")


@pytest.mark.parametrize("kind", ["jsonl", "tar"])
def test_a_killed_process_of_the_conversion_is_named_and_leaves_nothing_that_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """kill -9 of the process that reads the third part, as the system does when memory is short."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(source, "_PART_LINES", 100)
    if kind == "jsonl":
        place, count = write_rows(folder / "x.jsonl", *GOOD), len(GOOD)
    else:
        place, count = folder / "shards", 4
        place.mkdir()
        for i in range(count):
            write_tar(place / f"{i}.tar", {"x.json": b'{"prompt": "a", "label": 1}', "x.jpg": encoded_image("red")})
    opened, test = source.Source.open, os.getpid()

    def killed(self: source.Source, part: Any) -> Any:
        if os.getpid() != test and (part.num_before == 2 or part.number == 2):
            os.kill(os.getpid(), signal.SIGKILL)
        return opened(self, part)

    monkeypatch.setattr(source.Source, "open", killed)
    with pytest.raises(ValueError, match=rf"A process that reads {place} ended: it was killed, .* start again\.$"):
        load_records(place)
    monkeypatch.setattr(source.Source, "open", opened)
    assert len(load_records(place)) == count
    assert not [*(folder / "cache").rglob("part*")]


def test_a_json_list_is_split_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut anywhere: within letters of several bytes, numbers, strings and blanks; errors name line and column."""
    values = [12345, "\u00e4 \u6771\n", {"a": [1.5e-3, None, True]}, [], -0.5, "x" * 50]
    path = tmp_path / "x.json"
    for text in (json.dumps(values, ensure_ascii=False), json.dumps(values, indent=3), "\ufeff [ ] \n", "[7]"):
        path.write_text(text)
        expected = json.loads(text.removeprefix("\ufeff"))
        for chunk in (1, 2, 3, 7, 10**6):
            monkeypatch.setattr(json_list, "_CHUNK", chunk)
            assert [parse_value(raw.source) for raw in read_json_list(path)] == expected  # type: ignore[arg-type]
    broken = {"[1,\n 2 3]": "line 2, column 4", "[1,\n\n {x}]": "line 3, column 3", "[1,": "line 1, column 4",
              "{}": "line 1, column 1", "[1] 2": "line 1, column 5", '[1, "a': "line 1, column 5"}  # fmt: skip
    for text, place in broken.items():
        path.write_text(text)
        for chunk in (1, 3, 10**6):
            monkeypatch.setattr(json_list, "_CHUNK", chunk)
            with pytest.raises(ValueError, match=rf"x\.json is not a JSON list: .*: {place}, near"):
                list(read_json_list(path))
    path.write_bytes(b'["\xc3\xa4", "\xff"]')
    for chunk in (1, 4, 10**6):
        monkeypatch.setattr(json_list, "_CHUNK", chunk)
        with pytest.raises(ValueError, match=r"x\.json is not UTF-8: invalid start byte at byte 8"):
            list(read_json_list(path))


def test_a_long_json_list_takes_the_memory_of_its_elements(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"prompt": "a" * 1000}] * 20_000))
    tracemalloc.start()
    assert sum(1 for _ in read_json_list(path)) == 20_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6e6 < path.stat().st_size


@pytest.mark.parametrize(
    ("second", "message"),
    [('{"a": 1}x, ', "Expecting ',' delimiter|Expecting ','"), ("[" * 500 + "1, ", "over 300 characters")],
    ids=["no comma", "too long"],
)
def test_a_broken_json_list_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str, message: str
) -> None:
    monkeypatch.setattr(json_list, "_CHUNK", 100)
    monkeypatch.setattr(json_list, "MAX_ELEMENT", 300)
    path = tmp_path / "x.json"
    path.write_text("[" + second + '{"a": 1}, ' * 10_000 + "1]")
    largest = list[int]()
    grow = json_list._Text.grow
    monkeypatch.setattr(json_list._Text, "grow", lambda text: [grow(text), largest.append(len(text.buffer))][0])
    with pytest.raises(ValueError, match=message):
        list(read_json_list(path))
    assert max(largest) < 2_000


# --- images within data files -----------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["bytes", "bytes and path"])
@pytest.mark.parametrize("limit", [10**6, 1500], ids=["kept", "too large to keep"])
def test_cells_of_all_row_groups_are_read_in_any_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch, nested: bool, limit: int
) -> None:
    monkeypatch.setattr(stored_images, "_MAX_KEPT", limit)
    contents = [b"%03d" % i * 100 for i in range(20)]
    cells = [{"bytes": one, "path": None} for one in contents] if nested else contents
    rows = [{"image": cell, "safety_label": "Safe"} for cell in cells]
    pq.write_table(pa.Table.from_pylist(rows), folder / "x.parquet", row_group_size=6)
    table = load_records("unsafe_bench:x.parquet")
    assert table.column("block").tolist() == [*[0] * 6, *[1] * 6, *[2] * 6, *[3] * 2]
    for row in np.random.default_rng(0).permutation(20):
        record = table[int(row)]
        assert isinstance(record, LabelledImage)
        assert isinstance(record.image, StoredImage)
        assert read_bytes(record.image) == contents[row]


def test_a_data_file_that_was_cut_after_it_was_read_is_named(folder: Path) -> None:
    members = {"x.json": b'{"prompt": "a", "label": 1}', "x.jpg": encoded_image("red")}
    path = write_tar(folder / "x.tar", members)
    (record,) = load_records("x.tar")
    assert isinstance(record, LabelledImage)
    assert to_tensor(record.image).shape == (3, 8, 8)
    path.write_bytes(path.read_bytes()[:1600])
    with pytest.raises(ValueError, match=r"at byte 1,536 of x\.tar has \d+ bytes, of which 64 are there"):
        to_tensor(record.image)


# --- order and replacement --------------------------------------------------------------------------


def test_the_order_of_blocks_is_a_permutation_by_seed_and_epoch_and_keeps_blocks_together() -> None:
    blocks = np.repeat(np.arange(40), 100)
    order = block_order(blocks, seed=0, epoch=1)
    assert np.array_equal(np.sort(order), np.arange(4000))
    assert np.array_equal(order, block_order(blocks, seed=0, epoch=1))
    for other in ({"seed": 0, "epoch": 2}, {"seed": 1, "epoch": 1}):
        assert not np.array_equal(order, block_order(blocks, **other))
    windows = [{*blocks[order[start : start + 200]].tolist()} for start in range(0, 4000, 200)]
    assert max(map(len, windows)) <= 6
    assert np.abs(np.diff(order)).min(initial=9) >= 1
    assert (np.diff(order) != 1).mean() > 0.9
    lonely = block_order(np.full(1000, -1), seed=0, epoch=0)
    assert np.corrcoef(lonely, np.arange(1000))[0, 1] == pytest.approx(0, abs=0.1)


def test_a_mixture_draws_sources_by_weight_and_repeats_no_record_before_all_were_drawn() -> None:
    sources = np.repeat([0, 1], [900, 300])
    blocks = np.full(1200, -1)
    epochs = [mixed_order(blocks, sources, [1, 3], seed=0, epoch=epoch) for epoch in range(3)]
    for order in epochs:
        assert np.bincount(sources[order]).tolist() == [300, 900]
        assert np.bincount(sources[order[:400]])[1] == pytest.approx(300, abs=40)
    drawn = np.concatenate(epochs)
    assert np.array_equal(np.sort(drawn[sources[drawn] == 0]), np.arange(900))  # a third in each epoch
    assert np.bincount(drawn[sources[drawn] == 1] - 900).tolist() == [9] * 300
    assert np.array_equal(epochs[1], mixed_order(blocks, sources, [1, 3], seed=0, epoch=1))
    assert not np.array_equal(epochs[1], mixed_order(blocks, sources, [1, 3], seed=1, epoch=1))
    uneven = mixed_order(blocks, sources, [1, 1e-3], seed=0, epoch=7)
    assert len(uneven) == 1200
    with pytest.raises(ValueError, match="Data file 2 of the mixture has no record to train on"):
        mixed_order(blocks[:900], sources[:900], [1, 1], seed=0, epoch=0)


def plain_block_order(blocks: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """The order of blocks, with all numbers in memory at once."""
    rng, blocks = np.random.default_rng((seed, epoch)), blocks.copy()
    lonely = np.flatnonzero(blocks < 0)
    blocks[lonely] = -1 - lonely
    _, block_of, sizes = np.unique(blocks, return_inverse=True, return_counts=True)
    shuffled = rng.permutation(len(sizes))
    before = np.concatenate([[0], np.cumsum(sizes[shuffled])[:-1]])
    window_of_block = np.empty(len(sizes), np.int64)
    window_of_block[shuffled] = before // 256
    return np.lexsort((rng.random(len(blocks)), window_of_block[block_of]))


@pytest.mark.parametrize("chunk", [7, 2**16])
def test_orders_in_mapped_files_are_those_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(scratch, "_CHUNK", chunk)
    monkeypatch.setattr(scratch, "_MAPPED_FROM", 0)
    mixed = np.concatenate(
        [np.repeat([9, 2**33, 4], 333), np.full(500, -1), np.repeat(np.arange(20, 23), [3, 600, 90])]
    )
    for blocks in (np.repeat(np.arange(40), 50), np.full(1000, -1), mixed, mixed[::3]):
        order = block_order(blocks, seed=3, epoch=2)
        assert np.array_equal(order, plain_block_order(blocks, seed=3, epoch=2))
    drawn = torch.randperm(1000, generator=torch.Generator().manual_seed(3 + 2))
    assert random_order(1000, seed=3, epoch=2).tolist() == drawn.tolist()
    assert not [*(folder / "cache").iterdir()]


def test_preparing_in_mapped_files_gives_what_it_gives_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared() -> list[Any]:
        pairs = [PreferencePair(Path("a"), Path(f"{i % 31}"), f"a red fox {i % 97}", f"a red fox {i % 97}",
                                rating_gap=i % 20 / 3) for i in range(1000)]  # fmt: skip
        lines, found = list[str](), list[Any]()
        for records in (pairs, some_records(), pairs + some_records()):
            found += prepare_records(
                records, [], {"test": some_records()[:50]}, exclude_test_prompts=True, validation_fraction=0.2,
                hard_negatives=0.5, seed=1, log=lines.append,
            )  # fmt: skip
            found.append(RecordTable.concatenate(found[-2:]).sources().tolist())
        return [*(list(one) for one in found), lines]

    in_memory = prepared()
    monkeypatch.setattr(scratch, "_CHUNK", 13)
    monkeypatch.setattr(scratch, "_MAPPED_FROM", 0)
    assert prepared() == in_memory
    assert not [*(folder / "cache").iterdir()]


def test_the_memory_of_preparing_does_not_grow_with_the_records(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A split, summaries and an order take less than one array of 8 bytes a record, of which each has several."""
    monkeypatch.setattr(scratch, "_CHUNK", 2**10)
    rng, size, batches = np.random.default_rng(0), 2**11, list[pa.RecordBatch]()
    names, empty = pa.array([f"{i}.png" for i in range(size)]), [pa.int64(), pa.int64(), pa.string()]
    kind = SCHEMA.field("winner").type
    image = pa.StructArray.from_arrays([names, *(pa.nulls(size, one) for one in empty)], fields=list(kind))
    for number in range(96):
        keys = pa.array(rng.integers(0, 20_000, size, np.uint64))
        columns: dict[str, Any] = {"winner": image, "loser": image, "winner_prompt": names, "where": names}
        columns |= {"tie": pa.array([False] * size), "rating_gap": pa.array([0.0] * size)}
        columns |= {"block": pa.array([number] * size), "winner_prompt_key": keys, "loser_prompt_key": keys}
        made = [columns.get(field.name, pa.nulls(size, field.type).fill_null(1) if field.type == pa.uint64() else
                pa.nulls(size, field.type)) for field in SCHEMA]  # fmt: skip
        batches.append(pa.record_batch(made, schema=SCHEMA))
    table = RecordTable(batches)
    tracemalloc.start()
    training, held_out = prepare_records(
        table, [], {}, exclude_test_prompts=False, validation_fraction=0.1, hard_negatives=0.0, seed=0, log=str
    )
    order = block_order(training.column("block"), seed=0, epoch=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(order) + len(held_out) == len(table) == 96 * size
    assert peak < 8 * len(table)


@pytest.mark.parametrize("num_processes", [2, 8])
def test_a_mixture_has_the_same_global_batches_on_any_number_of_processes(num_processes: int) -> None:
    sources, num_records = np.repeat([0, 1, 2], [300, 500, 200]), 1000
    blocks = np.concatenate([np.full(300, -1), np.repeat(np.arange(10), 50), np.full(200, -1)])
    order = partial(mixed_order, blocks, sources, [3, 1, 1], seed=5)

    def batches(rank: int, size: int) -> list[list[list[int]]]:
        loader = DataLoader(
            Numbers(0, num_records), 16 // size, sampler=OrderSampler(order, num_records),
            collate_fn=lambda rows: [row["record"] for row in rows],
        )  # fmt: skip
        shared = prepare_data_loader(loader, num_processes=size, process_index=rank, put_on_device=False)
        epochs = list[list[list[int]]]()
        for epoch in (0, 4):
            shared.set_epoch(epoch)
            epochs.append([*shared])
        return epochs

    of_ranks = [batches(rank, num_processes) for rank in range(num_processes)]
    for epoch, alone in enumerate(batches(0, 1)):
        together = zip(*(of_rank[epoch] for of_rank in of_ranks), strict=True)
        assert [[row for part in step for row in part] for step in together][:62] == alone[:62]  # whole ones


def test_records_know_the_source_that_they_are_of_after_a_split() -> None:
    first, second = RecordTable.of(some_records()[:1500]), RecordTable.of(some_records()[1500:])
    drawn = RecordTable.concatenate([first, second]).select(np.array([0, 1600, 3, 2199]))
    assert drawn.sources().tolist() == [0, 1, 0, 1]


def test_training_stops_when_more_than_half_of_what_it_meets_is_unusable(tmp_path: Path) -> None:
    refill = Refill(100, skipped=tmp_path / "skipped.jsonl")

    def make(indices: list[int]) -> list[int]:
        for position, index in enumerate(indices):
            if index % 4:
                raise UnusableError(position, "broken")
        return indices

    assert refill.collate([0, 1, 4], make, where=str) == [0, 4, 4]
    with pytest.raises(BadRecordError, match=r"of the \d+ records that training met cannot be used, more than half"):
        refill.collate(list(range(100)), make, where=str)


# --- the split --------------------------------------------------------------------------------------


def test_the_split_is_that_of_a_plain_computation_with_strings() -> None:
    """As before prompts were hashed: groups in the order of the SHA-256 of their alphabetically first prompt."""
    import hashlib

    from scipy.cluster.hierarchy import DisjointSet

    records, seed = some_records(), 3
    groups = DisjointSet()
    sides = [(r.prompt,) * 2 if isinstance(r, LabelledImage) else (r.winner_prompt, r.loser_prompt) for r in records]
    for one, other in sides:
        groups.add(one)
        groups.add(other)
        groups.merge(one, other)
    first = {prompt: min(group) for group in groups.subsets() for prompt in group}
    sizes, room, held_out = Counter(first[one] for one, _ in sides), round(0.3 * len(records)), set[str]()
    for group in sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest()):
        if sizes[group] <= room:
            room -= sizes[group]
            held_out.add(group)
    _, validation = split_by_prompt(records, fraction=0.3, seed=seed)
    assert validation == [record for record, (one, _) in zip(records, sides, strict=True) if first[one] in held_out]


# --- the check --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", ["1", "2"])
def test_the_check_names_every_bad_record_and_stamps_good_data(
    folder: Path, capsys: pytest.CaptureFixture[str], num_workers: str
) -> None:
    (folder / "broken.png").write_bytes(b"nothing")
    write_rows(folder / "x.jsonl", *GOOD, {"prompt": "a"}, {**GOOD[0], "loser": "broken.png"})
    command = ["check", "x.jsonl", "--num_workers", num_workers]
    assert main(command) == 1
    bad = [json.loads(line) for line in Path("bad_records.jsonl").read_text().splitlines()]
    assert [line["where"] for line in bad] == ["x.jsonl:6", "x.jsonl:7"]
    assert "broken.png" in bad[1]["reason"]
    assert "2 records cannot be used; bad_records.jsonl has" in capsys.readouterr().out
    write_rows(folder / "x.jsonl", *GOOD)
    assert main(command) == 0
    assert "5 records and 10 images can be used" in capsys.readouterr().out
    assert main(["check", "nowhere.jsonl"]) == 2
    assert "FileNotFoundError: There is no data file nowhere.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["has changed", "was added", "is missing"])
def test_a_data_file_that_changed_since_the_check_is_refused(folder: Path, what: str) -> None:
    (folder / "shards").mkdir()
    for name in ("a", "b"):
        write_rows(folder / "shards" / f"{name}.jsonl", GOOD[0])
    place = ["shards", "--num_workers", "1"]
    for name in ("a.png", "b.png"):
        (folder / "shards" / name).write_bytes((folder / name).read_bytes())
    assert main(["check", *place]) == 0
    assert len(load_records("shards")) == 2
    match what:
        case "has changed":
            changed = write_rows(folder / "shards" / "b.jsonl", *GOOD)
        case "was added":
            changed = write_rows(folder / "shards" / "c.jsonl", *GOOD)
        case _:
            changed = folder / "shards" / "b.jsonl"
            changed.unlink()
    with pytest.raises(ValueError, match=rf"{changed} {what} since shards was checked on .*check it again: python -m"):
        load_records("shards")


def test_images_of_tables_are_those_of_their_files(folder: Path) -> None:
    pq.write_table(pa.table({"image": [encoded_image("red")], "safety_label": ["Safe"]}), folder / "x.parquet")
    (folder / "red.jpg").write_bytes(encoded_image("red"))
    (record,) = load_records("unsafe_bench:x.parquet")
    assert isinstance(record, LabelledImage)
    assert torch.equal(to_tensor(record.image), to_tensor(folder / "red.jpg"))
