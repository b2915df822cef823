"""Memory of Parquet files whose pages state more than the footer, or whose values share bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reward_model.datasets import parquet
from reward_model.datasets.parquet import read_parquet

LIMIT = 1 << 20
TEXT = "a" * 2000
POOLS: list[pa.MemoryPool] = []
"""They must outlive what was allocated in them."""


@pytest.fixture(autouse=True)
def a_low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_ALWAYS_FREE", LIMIT)


@contextmanager
def counted() -> Iterator[pa.MemoryPool]:
    """The memory of Arrow, counted from here on."""
    before = pa.default_memory_pool()
    POOLS.append(pa.proxy_memory_pool(before))
    pa.set_memory_pool(POOLS[-1])
    yield POOLS[-1]
    pa.set_memory_pool(before)


def written(folder: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), folder / "x.parquet", compression="zstd", **options)
    return folder / "x.parquet"


def thrift(number: int) -> bytes:
    """A number in Thrift's compact protocol."""
    parts = [(2 * number) >> shift & 127 for shift in range(0, max(1, (2 * number).bit_length()), 7)]
    return bytes([*(part | 128 for part in parts[:-1]), parts[-1]])


def rows(path: Path) -> list[Any]:
    return [record.source for record in read_parquet(path, skip_columns=())]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"prompt": [[TEXT] * 1000]}, {}, "its texts take more than 1,048,576 bytes"),
        ({"image": [[TEXT.encode()] * 1000]}, {}, "its texts take more than 1,048,576 bytes"),
        ({"prompt": [[{"of": {"a": TEXT}}] * 1000]}, {}, "its texts take more than 1,048,576 bytes"),
        ({"prompt": ["a" * 100_000] * 16}, {}, "its texts take more than 1,048,576 bytes"),
        (
            {"prompt": pa.array([[TEXT.encode()] * 1000], pa.list_(pa.binary(2000)))},
            {},
            r"values of prompt\.list\.element that share bytes may take 2,000,000 bytes",
        ),
        (
            {"prompt": [[TEXT] * 1000]},
            {"use_dictionary": False, "column_encoding": {"prompt.list.element": "DELTA_BYTE_ARRAY"}},
            r"values of prompt\.list\.element that share bytes may take 2,",
        ),
    ],
)
def test_values_that_share_bytes_in_the_file_are_refused_before_each_has_its_own(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    path = written(tmp_path, columns, **options)
    assert path.stat().st_size < 10_000
    with (
        counted() as pool,
        pytest.raises(ValueError, match=rf"x\.parquet is refused, since a file of any size .* {message}"),
    ):
        rows(path)
    assert pool.max_memory() < LIMIT


def test_lists_of_texts_from_a_dictionary_are_read(tmp_path: Path) -> None:
    """Their values could share so many bytes that they are counted first."""
    table = [{"n": 1, "tags": [f"{'tag' * 100}{(7 * row + i) % 31}" for i in range(row % 5)]} for row in range(200)]
    path = written(tmp_path, {name: [row[name] for row in table] for name in ("n", "tags")})
    assert LIMIT < 31 * 300 * 400  # bytes of the dictionary times values
    assert rows(path) == table


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("columns", [{"n": list(range(1003))}, {"n": [list(range(1003))]}])
def test_pages_that_state_more_values_than_the_footer_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: dict[str, Any], version: str
) -> None:
    monkeypatch.setattr(parquet, "_MAX_VALUES", 5000)
    options = {"use_dictionary": False, "write_statistics": False, "data_page_version": version}
    path = written(tmp_path, columns, **options)
    content = path.read_bytes()
    path.write_bytes(content.replace(thrift(1003), thrift(8001), 1))  # in the header of the page, which comes first
    assert pq.read_metadata(path).row_group(0).column(0).num_values == 1003
    with pytest.raises(ValueError, match=r"the pages of n(\.list\.element)? have 8,001 values in"):
        rows(path)


def test_a_page_that_states_more_bytes_than_the_footer_is_refused_before_it_is_decompressed(tmp_path: Path) -> None:
    path = written(tmp_path, {"n": [TEXT * 1000]}, use_dictionary=False, write_statistics=False)
    content = path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    sizes = [
        pq.read_metadata(path).row_group(0).total_byte_size,
        pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size,
    ]
    lying = content[footer:-8]
    for size in sizes:
        lying = lying.replace(thrift(size), thrift(100))
    path.write_bytes(content[:footer] + lying + len(lying).to_bytes(4, "little") + b"PAR1")
    with counted() as pool, pytest.raises(ValueError, match=r"its pages take 2,000,0\d\d bytes of memory, and it has"):
        rows(path)
    assert pool.max_memory() < LIMIT


@pytest.mark.parametrize(
    ("place", "byte", "message"),
    [
        (0, 0x19, "does not begin a page: it has a field of type 9"),
        (0, 0x00, "does not begin a page: it does not state its bytes, values and encoding"),
    ],
)
def test_what_is_no_header_of_a_page_is_named_with_its_place(
    tmp_path: Path, place: int, byte: int, message: str
) -> None:
    path = written(tmp_path, {"n": [1, 2, 3]})
    content = bytearray(path.read_bytes())
    content[4 + place] = byte
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.parquet cannot be read as Parquet after row 0: byte 4 {message}"):
        rows(path)
