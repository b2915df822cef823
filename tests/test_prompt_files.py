"""The formats of prompt files: rows with a prompt each, and every wrong one refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_t2i.data.prompt_files import read_rows
from rlhf_t2i.data.prompts import load_prompts
from rlhf_t2i.search.geneval import rows_to_write
from tests.geneval_files import LINES, write_prompts

FOX, CAFE = "a fox in the snow", "un caf\u00e9 \u00e0 Z\u00fcrich, \u6771\u4eac"
SUFFIXES = [".txt", ".jsonl", ".json", ".csv", ".parquet"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def write(path: Path, content: bytes | str) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def write_table(path: Path, **columns: Any) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return str(path)


def write_as(path: Path, prompts: list[str]) -> str:
    """Write prompts in the format of the path's suffix."""
    match path.suffix:
        case ".txt":
            return write(path, "\n".join(prompts))
        case ".jsonl":
            return write(path, "\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
        case ".json":
            return write(path, json.dumps([{"prompt": prompt} for prompt in prompts]))
        case ".csv":
            quoted = [prompt.replace(chr(34), 2 * chr(34)) for prompt in prompts]
            return write(path, "prompt\n" + "\n".join(f'"{prompt}"' for prompt in quoted))
        case _:
            return write_table(path, prompt=prompts)


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".TXT"])
def test_the_suffix_decides_the_format(folder: Path, suffix: str) -> None:
    path = write_as((folder / "prompts").with_suffix(suffix.lower()), [FOX, CAFE, "a pear", FOX])
    path = str(Path(path).rename(folder / f"named{suffix}"))
    assert load_prompts(path) == [FOX, CAFE, "a pear", FOX]  # repetition weights a prompt


@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_a_text_file_has_one_prompt_a_line(folder: Path, ending: str, mark: str) -> None:
    path = write(folder / "prompts.txt", mark + ending.join([FOX, CAFE, "a pear"]) + ending)
    assert load_prompts(path) == [FOX, CAFE, "a pear"]


def test_blank_lines_and_surrounding_blanks_are_ignored(folder: Path) -> None:
    path = write(folder / "prompts.txt", f"\n  {FOX}\t\n\n   \n{CAFE}  ")
    assert load_prompts(path) == [FOX, CAFE]


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_a_jsonl_file_has_a_prompt_in_each_object(folder: Path, mark: str) -> None:
    rows = [{"prompt": FOX, "source": 3}, {"id": 1, "prompt": f" {CAFE} "}]
    path = write(folder / "prompts.jsonl", mark + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert load_prompts(path) == [FOX, CAFE]


@pytest.mark.parametrize("character", ["\u2028", "\u0085"], ids=["U+2028", "U+0085"])
def test_only_a_line_feed_ends_a_line_of_jsonl(folder: Path, character: str) -> None:
    """JSON allows U+2028 and U+0085 unescaped within a string; str.splitlines would split there."""
    text = f"a fox{character}in the snow"
    path = write(folder / "prompts.jsonl", json.dumps({"prompt": text}, ensure_ascii=False) + "\n")
    assert load_prompts(path) == [text]


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_a_json_file_is_one_list_of_texts_or_objects(folder: Path, mark: str) -> None:
    path = write(folder / "prompts.json", mark + json.dumps([FOX, {"prompt": CAFE, "tag": "place"}], indent=1))
    assert [dict(row.metadata) for row in read_rows(path)] == [{"prompt": FOX}, {"prompt": CAFE, "tag": "place"}]


@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_a_csv_file_has_named_columns_and_quoted_cells(folder: Path, mark: str, ending: str) -> None:
    lines = ["id, prompt,tag", f'1,"{CAFE}",place', "", f"2, {FOX} ,", '3,"a sign that says ""OPEN""",text']
    rows = read_rows(write(folder / "prompts.csv", mark + ending.join(lines) + ending))
    assert rows == [CAFE, FOX, 'a sign that says "OPEN"']
    assert [row.metadata["tag"] for row in rows] == ["place", "", "text"]
    assert rows[1].where.endswith("prompts.csv:4")


def test_columns_of_images_are_left_out_of_a_table(folder: Path) -> None:
    image = [{"bytes": b"x" * 1000, "path": None}]
    path = write_table(folder / "prompts.parquet", prompt=[FOX], jpg=[b"x" * 1000], image=image, score=[0.5])
    assert [dict(row.metadata) for row in read_rows(path)] == [{"prompt": FOX, "score": 0.5}]


def test_a_data_set_of_the_hub_is_loaded_through_datasets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    (folder / "table").mkdir()
    write_table(folder / "table" / "train-00000-of-00001.parquet", prompt=[FOX, CAFE], jpg=[b"", b""])
    assert load_prompts(f"hf:{folder / 'table'}@train") == [FOX, CAFE]
    with pytest.raises(ValueError, match="has no split; write hf:ID@SPLIT"):
        load_prompts(f"hf:{folder / 'table'}")


def test_prompts_of_geneval_keep_their_fields(folder: Path) -> None:
    path = write_prompts(folder, LINES)
    assert load_prompts(str(path)) == [line["prompt"] for line in LINES]
    assert [dict(row.metadata) for row in read_rows(str(path))] == LINES
    assert rows_to_write(load_prompts(str(path))) == LINES


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nothing.txt", "."])
def test_a_missing_file_is_named_with_the_possible_sources(folder: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no prompt file .*one prompt a line.*'shapes'") as caught:
        load_prompts(str(folder / name))
    assert repr(str(folder / name)) in str(caught.value)


@pytest.mark.parametrize("name", ["prompts.yaml", "prompts.tsv", "prompts", "prompts.txt.gz"])
def test_another_suffix_is_refused_with_the_known_ones(folder: Path, name: str) -> None:
    """A file that is read as lines of text, whatever it is, trains on lines such as `- prompt: a fox`."""
    with pytest.raises(ValueError, match=r"has the suffix '.*'; it must be one of .txt, .jsonl, .json, .csv, .parquet"):
        load_prompts(write(folder / name, FOX))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_without_a_prompt_is_refused(folder: Path, suffix: str) -> None:
    with pytest.raises(ValueError, match=rf"prompts{suffix}' holds no prompt"):
        load_prompts(write_as(folder / f"prompts{suffix}", []))


@pytest.mark.parametrize("content", ["", "\n \n\t\n", "\ufeff"], ids=["empty", "blank", "only a byte order mark"])
@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_a_file_of_blanks_is_refused(folder: Path, name: str, content: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}' holds no prompt"):
        load_prompts(write(folder / name, content))


@pytest.mark.parametrize(
    ("content", "byte"),
    [
        (b"a fox\ncaf\xe9\n", 9),
        (b"\xff\xfea\x00", 0),
        (b"x" * 100_000 + b"\xe9\n", 100_000),
        (b"\xef\xbb\xbfcaf\xe9\n", 6),
    ],
    ids=["Latin-1", "UTF-16", "far into the file", "after a byte order mark"],
)
def test_a_file_that_is_not_utf_8_is_refused_with_the_position(folder: Path, content: bytes, byte: int) -> None:
    with pytest.raises(ValueError, match=rf"prompts.txt' is not UTF-8: .* at byte {byte}\. Save it as UTF-8"):
        load_prompts(write(folder / "prompts.txt", content))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"\n', r"p.jsonl:3: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\r{"prompt": "b"}\n', r"p.jsonl:1: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n' + "[" * 100_000, r"p.jsonl:2: .* cannot be parsed as JSON"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', r"p.jsonl:1: the key 'prompt' is given twice"),
        ("p.json", '{"prompt": "a"}', r"p.json is not a JSON list"),
        ("p.json", "[" * 100_000, r"p.json is not a list of records: its values are nested too deeply"),
        ("p.json", '["a", 3]', r"p.json:RECORD 2: 3 is not a record"),
        ("p.csv", "text\na fox\n", r"p.csv:1 names 0 of 1 columns 'prompt', not 1: \['text'\]"),
        ("p.csv", "prompt;tag\na fox;x\n", r"p.csv:1 names 0 of 1 columns .* separated by commas"),
        ("p.csv", "prompt,prompt\na,b\n", r"p.csv:1 names 2 of 2 columns 'prompt', not 1"),
        ("p.csv", "prompt,tag\na,b\na fox, red,b\n", r"p.csv:3 has 3 cells; the file has 2 columns"),
        ("p.csv", 'prompt\n"a fox\n', r"p.csv:2 is not CSV"),
        ("p.csv", "prompt\na fox\ra hen\n", r"p.csv:2 is not CSV"),
        ("p.parquet", "PAR1", r"p.parquet cannot be read as Parquet"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_with_file_and_line(folder: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_prompts(write(folder / name, content))


@pytest.mark.parametrize("row", ['{"text": "a fox"}', '{"prompt": 3}', '{"prompt": " "}', '"a fox"', "[]", "null"])
def test_a_row_without_a_prompt_is_refused_with_its_line(folder: Path, row: str) -> None:
    path = write(folder / "prompts.jsonl", '{"prompt": "a"}\n' + row)
    with pytest.raises(
        ValueError, match=r"prompts.jsonl:2(: .* is not a record| has no '| has no text under 'prompt')"
    ):
        load_prompts(path)


def test_a_table_without_a_column_of_prompts_is_refused_with_its_columns(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"p.parquet:ROW 1 has no 'prompt'; its fields are \['caption'\]"):
        load_prompts(write_table(folder / "p.parquet", caption=[FOX]))


@pytest.mark.parametrize(
    ("character", "meaning"),
    [("\r", "U\\+000D, a carriage return"), ("\0", "U\\+0000, a control"), ("\x1b", "U\\+001B, a control")],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_characters_that_are_no_text_are_refused_with_their_place(
    folder: Path, suffix: str, character: str, meaning: str
) -> None:
    """A lone carriage return is a line of an old Mac: the whole file would be one prompt."""
    path = write_as(folder / f"prompts{suffix}", [FOX, f"a fox{character}in the snow"])
    place = {".txt": ":2", ".jsonl": ":2", ".json": ":RECORD 2", ".csv": ":3", ".parquet": ":ROW 2"}[suffix]
    with pytest.raises(ValueError, match=rf"prompts{suffix}{place}: character 6 of the prompt .* is {meaning}"):
        load_prompts(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_half_of_a_surrogate_pair_is_refused(folder: Path, suffix: str) -> None:
    with pytest.raises(ValueError, match=r"character 6 of the prompt .* is U\+D83D, half of a surrogate pair"):
        load_prompts(write_as(folder / f"prompts{suffix}", ["a fox\ud83d"]))


def test_a_prompt_may_have_several_lines(folder: Path) -> None:
    path = write(folder / "prompts.csv", 'prompt\n"a fox\r\nin the snow"\n')
    assert load_prompts(path) == ["a fox\r\nin the snow"]
