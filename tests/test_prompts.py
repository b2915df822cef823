"""The formats of prompt files, and the prompts of each step."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from rlhf_t2i.prompts import load_prompts, prompts_of_step
from rlhf_t2i.shapes.scenes import all_scenes

FOX, CAFE = "a fox in the snow", "un café à Zürich, 東京"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def write(path: Path, content: bytes | str) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# --- files ----------------------------------------------------------------------------------------


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


def test_repeated_prompts_are_kept(folder: Path) -> None:
    """Repetition weights a prompt."""
    assert load_prompts(write(folder / "prompts.txt", "a\nb\na\n")) == ["a", "b", "a"]


@pytest.mark.parametrize("name", ["nothing.txt", "."])
def test_a_missing_file_is_named_with_the_possible_sources(folder: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no prompt file .*one prompt a line.*'shapes'") as caught:
        load_prompts(str(folder / name))
    assert repr(str(folder / name)) in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n \n\t\n", "\ufeff"], ids=["empty", "blank", "only a byte order mark"])
@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_a_file_without_a_prompt_is_refused(folder: Path, name: str, content: str) -> None:
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


def test_an_invalid_line_of_jsonl_is_refused_with_its_number(folder: Path) -> None:
    """Blank lines count, as in an editor."""
    path = write(folder / "prompts.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl:3 is not JSON"):
        load_prompts(path)


@pytest.mark.parametrize("row", ['{"text": "a fox"}', '{"prompt": 3}', '{"prompt": " "}', '"a fox"', "[]", "null"])
def test_a_line_of_jsonl_without_a_prompt_is_refused_with_its_number_and_text(folder: Path, row: str) -> None:
    path = write(folder / "prompts.jsonl", '{"prompt": "a"}\n' + row)
    with pytest.raises(ValueError, match=r"prompts.jsonl:2 has no text under 'prompt'") as caught:
        load_prompts(path)
    assert row in str(caught.value)


def test_training_and_held_out_prompts_of_the_built_in_world_are_disjoint() -> None:
    training, held_out = load_prompts("shapes"), load_prompts("shapes", held_out=True)
    assert not set(training) & set(held_out)
    assert sorted(training + held_out) == sorted(scene.prompt for scene in all_scenes("one"))


# --- the prompts of a step ------------------------------------------------------------------------

PROMPTS = [f"prompt {i}" for i in range(10)]


@pytest.mark.parametrize("num_prompts", [1, 3, 10, 16])
def test_every_prompt_occurs_once_in_each_pass(num_prompts: int) -> None:
    """Also if the prompts of a step do not divide a pass."""
    steps = [prompts_of_step(PROMPTS, step, num_prompts=num_prompts, seed=0) for step in range(40)]
    assert all(len(step) == num_prompts for step in steps)
    sequence = [prompt for step in steps for prompt in step]
    for start in range(0, len(sequence) - 9, 10):
        assert Counter(sequence[start : start + 10]) == Counter(PROMPTS)


def test_the_prompts_of_a_step_depend_on_the_arguments_only() -> None:
    forward = [prompts_of_step(PROMPTS, step, num_prompts=4, seed=5) for step in range(12)]
    torch.manual_seed(1)
    backward = [prompts_of_step(PROMPTS, step, num_prompts=4, seed=5) for step in reversed(range(12))]
    assert forward == backward[::-1]


def test_each_pass_and_each_seed_has_another_order() -> None:
    passes = [tuple(prompts_of_step(PROMPTS, step, num_prompts=10, seed=seed)) for step in range(6) for seed in (0, 1)]
    assert len(set(passes)) == 12


def test_every_prompt_is_first_about_equally_often() -> None:
    """In 100 passes each of 10 prompts is expected 10 times; 30 is more than six standard deviations above that."""
    first = Counter(prompts_of_step(PROMPTS, step, num_prompts=10, seed=0)[0] for step in range(100))
    assert set(first) == set(PROMPTS)
    assert max(first.values()) < 30


def test_repeated_prompts_occur_as_often_as_they_are_listed() -> None:
    assert Counter(prompts_of_step(["a", "a", "b"], 0, num_prompts=6, seed=0)) == {"a": 4, "b": 2}


def test_the_global_generator_and_the_list_are_unchanged() -> None:
    before, prompts = torch.get_rng_state(), list(PROMPTS)
    prompts_of_step(prompts, 3, num_prompts=4, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert prompts == PROMPTS
