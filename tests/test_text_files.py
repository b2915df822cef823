"""JSON and YAML of strangers: each fault is one line that names the file, and costs no time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reward_model.config import RewardModelConfig
from reward_model.text_files import read_json, read_object, read_yaml
from rlhf_t2i.data.prompt_files import read_rows
from rlhf_t2i.output.run_folder import (
    read_captions,
    read_evaluation_table,
    read_reward_history,
    read_reward_metrics,
    read_run_info,
)

DEEP, LONG = "[" * 100_000, "9" * 400
BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n"


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_json, DEEP, r"x cannot be read: its values are nested more than 100 deep\."),
        (read_json, "[" * 101 + "]" * 101, r"x cannot be read: its values are nested more than 100 deep\."),
        (read_json, f'{{"a": {LONG}}}', r"x cannot be read: the number 9{20}\.\.\. has 400 digits; at most 300"),
        (read_json, "1e999", "x cannot be read: the number 1e999 is beyond all floats"),
        (read_json, "[NaN]", "x cannot be read: NaN is not valid JSON; numbers must be finite"),
        (read_json, "{", "x is not JSON: "),
        (read_object, "[]", "x holds a list; it must be a JSON object"),
        (read_yaml, DEEP, "x is not YAML: values are nested more than 100 deep"),
        (read_yaml, BOMB, r"x is not YAML: \*a repeats a list"),
        (read_yaml, "9" * 5000, "x cannot be read: Exceeds the limit"),
        (read_yaml, "a: [", "x is not YAML: "),
    ],
)
def test_values_beyond_the_bounds_are_refused(
    read: Callable[[Path], Any], text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{message}"):
        read(written(tmp_path / "x", text))


def test_values_within_the_bounds_are_read(tmp_path: Path) -> None:
    nested = json.loads("[" * 100 + "]" * 100)
    assert read_json(written(tmp_path / "x", json.dumps(nested))) == nested
    assert read_json(written(tmp_path / "x", "9" * 300)) == int("9" * 300)
    assert read_yaml(written(tmp_path / "x", "a: &a 1\nb: *a\n")) == {"a": 1, "b": 1}


@pytest.mark.parametrize("text", [DEEP, "[3]", '{"prompts": 3, "seeds": [1], "columns": 0}', '{"a": [1]}', "{"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("images/captions.json", read_captions),
        ("table.json", read_evaluation_table),
        ("metrics.json", read_reward_metrics),
        ("history.json", read_reward_history),
    ],
)
def test_files_of_a_stranger_s_run_of_other_types_are_refused_by_name(
    name: str, read: Callable[[Path], Any], text: str, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    written(tmp_path / name, text)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{name}"):
        read(tmp_path)


def test_a_row_of_metrics_without_a_field_is_named(tmp_path: Path) -> None:
    """A flipped bit may change the name of a field."""
    row = {"naMe": "accuracy", "value": 0.5, "low": None, "high": None, "count": 4, "note": ""}
    written(tmp_path / "metrics.json", json.dumps({"validation": [row]}))
    with pytest.raises(ValueError, match=r"metrics\.json: validation\.0\.name is .*; Field required"):
        read_reward_metrics(tmp_path)


def test_measurements_of_a_run_that_are_not_finite_are_read(tmp_path: Path) -> None:
    written(tmp_path / "history.json", '[{"step": 1, "loss": NaN, "grad_norm": Infinity}]')
    assert read_reward_history(tmp_path)[0]["grad_norm"] == math.inf
    written(tmp_path / "table.json", '{"base": {"oracle": null, "score": 1}}')
    assert read_evaluation_table(tmp_path) == {"base": {"oracle": None, "score": 1}}


@pytest.mark.parametrize(
    ("value", "message"),
    [(DEEP, "nested more than 100"), ("[" * 900 + "]" * 900, "nested more than 100"), (LONG, "has 400 digits")],
)
def test_deep_values_and_long_numbers_of_prompt_rows_are_refused_with_their_line(
    value: str, message: str, tmp_path: Path
) -> None:
    """Python reads them, and fails wherever the row is used: when it is sent, stored or made a float."""
    path = written(tmp_path / "x.jsonl", f'{{"prompt": "a fox"}}\n{{"prompt": "a fox", "tag": {value}}}\n')
    with pytest.raises(ValueError, match=rf"x\.jsonl:2: .*{message}"):
        read_rows(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": ["ddpo"]}, "recipe is .'ddpo'.; Input should be a valid string"),
        ({"versions": {"torch": 2}}, "versions.torch is 2; Input should be a valid string"),
        ({"working_directory": None}, "working_directory is None; Input should be a valid string"),
        ({"command": {"x": "y" * 10**6}}, "command is .'x': 'yyyy.*'.; Input should be"),
    ],
)
def test_a_run_json_with_values_of_other_types_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    written(tmp_path / "run.json", json.dumps({"recipe": "ddpo", "unknown": [1]} | change))
    with pytest.raises(ValueError, match=rf"run\.json: {message}") as caught:
        read_run_info(tmp_path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": "64"}, "width is '64': Input should be a valid integer"),
        ({"width": 10**12}, r"width is 1000000000000; it must be in \[1, 32768\]"),
        ({"lora_rank": 10**9}, r"lora_rank is 1000000000; it must be in \[1, 32768\]"),
        ({"skip_ca": "no"}, "skip_ca is 'no': Input should be a valid boolean"),
        ({"backbone": ["x"]}, "backbone is .'x'.: Input should be a valid string"),
        ({"max_pixels": 0}, "max_pixels is 0; it must be null or at least 1"),
        ({"temperature": True}, "temperature is True: Input should be a valid number"),
        ({"skip_ca_heads": 65}, "skip_ca_heads is 65; it must be at least 1, and at most the width"),
    ],
)
def test_facts_of_a_reward_model_of_other_types_or_sizes_are_refused(change: dict[str, Any], message: str) -> None:
    facts = {"format": 1, "backbone": "b", "model_type": "llava", "width": 64}
    assert RewardModelConfig.from_json(json.dumps(facts), where="x").width == 64
    with pytest.raises(ValueError, match=f"x: {message}"):
        RewardModelConfig.from_json(json.dumps(facts | change), where="x")


@pytest.mark.parametrize("name", ["lora_alpha", "skip_ca_eps", "temperature"])
def test_an_infinite_setting_of_a_reward_model_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is inf; it must be positive"):
        RewardModelConfig(backbone="b", model_type="llava", width=64, **{name: float("inf")})
