"""What docs/data.md says of formats, places and settings is so, and its commands read what they say they read."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from recipes import collect_preferences, diffusion_dpo, evaluate_reward_model, train_reward_model
from reward_model.datasets import load_same_prompt_pairs
from reward_model.datasets.containers import SUFFIXES
from reward_model.datasets.formats import FORMATS, parse_source
from reward_model.types import Record
from rlhf_t2i.config import names, parse_config
from tests.preference_files import (
    CAT,
    FOX,
    HPDV2_TEST,
    HPDV2_TRAIN,
    HPDV3,
    RICHHF,
    UNSAFEBENCH,
    as_rows,
    image_reward_rows,
    pick_a_pic_rows,
    write_images,
    write_json,
    write_parquet,
    write_pick_a_pic,
    write_tfrecord,
)

ROOT = Path(__file__).parent.parent
DOC = (ROOT / "docs" / "data.md").read_text()
COMMANDS = [
    line.split()
    for block in re.findall(r"^```\n(.*?)\n```$", DOC, flags=re.DOTALL | re.MULTILINE)
    for line in block.replace("\\\n", " ").splitlines()
]
FOX_WINS = ("red", "blue", FOX, False, 0.0)
EXPECTED: dict[str, list[tuple[Any, ...]]] = {
    "image_reward_db/alignment": [("red", "blue", FOX, False, 5.0), ("green", "blue", FOX, False, 5.0)],
    "pick_a_pic": [FOX_WINS, ("blue", "red", FOX, False, 0.0), ("red", "blue", FOX, True, 0.0)],
    "hpdv2": [("red", "green", FOX, False, 0.0), ("green", "red", CAT, False, 0.0)],
    "hpdv3": [
        ("red", "green", FOX, False, 0.0),
        ("blue", "red", CAT, False, 0.0),
        ("blue", "green", CAT, False, 0.0),
    ],
    "unsafe_bench": [("red", FOX, 0), ("green", "", 1)],
    "richhf/artifact=0.5": [("red", FOX, 1), ("green", CAT, 0)],
}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the page names, each with a few rows, and a Hub that only has what it names."""
    import datasets

    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    for place in (
        *("ImageRewardDB/images/train/train_1", "HPDv2/train", "HPDv2/test", "HPDv3/images"),
        *("pickapic_v1/train", "pickapic_v2", "richhf-18k"),
    ):
        (data / place).mkdir(parents=True)
        write_images(data / place)
    for split in ("train", "validation"):
        write_parquet(data / f"ImageRewardDB/metadata-{split}.parquet", image_reward_rows())
    write_pick_a_pic(data / "pickapic_v2" / "train-00000.parquet")
    write_json(data / "HPDv2" / "train.json", HPDV2_TRAIN)
    write_json(data / "HPDv2" / "test.json", HPDV2_TEST)
    write_json(data / "HPDv3" / "train.json", HPDV3)
    write_tfrecord(data / "richhf-18k" / "train.tfrecord", RICHHF)
    for colour, prompt in (("red", FOX), ("green", CAT)):
        (data / "pickapic_v1" / "train" / f"{colour}.txt").write_text(prompt)
    hub = {"yuvalkirstain/pickapic_v2": pick_a_pic_rows(), "yiting/UnsafeBench": UNSAFEBENCH}

    def load_dataset(name: str, *, split: str) -> datasets.Dataset:
        assert split in ("train", "test", "validation_unique")
        return datasets.Dataset.from_list(hub[name])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return tmp_path


def config_of(recipe: Any, arguments: list[str], **changes: Any) -> Any:
    whole = [str(ROOT / argument) if argument.startswith("recipes/configs/") else argument for argument in arguments]
    return replace(parse_config(recipe.Config, description="", arguments=whole), **changes)


def test_there_are_commands() -> None:
    assert len(COMMANDS) == 8


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[-4:]))
def test_a_command_reads_what_it_names(world: Path, command: list[str]) -> None:
    """Everything but the training itself, for which the models are not here; that has tests of its own."""
    assert command[:2] == ["accelerate", "launch"]
    found: list[Record]
    match command[2]:
        case "recipes/train_reward_model.py":
            config = config_of(train_reward_model, command[3:], validation_fraction=0.5)
            source = config.train_data
            training, held_out, tests = train_reward_model.load_data(config, world)
            found = [*training, *([] if config.validation_data else held_out)]
            for records in [held_out] * bool(config.validation_data) + [*tests.values()]:
                assert as_rows(records) == EXPECTED[parse_source(source)[0].name.partition("=")[0]]
        case "recipes/diffusion_dpo.py":
            config = config_of(diffusion_dpo, command[3:])
            source = config.pairs
            found = [*load_same_prompt_pairs(names(source), image_root=None, skipped=None, keep_ties=True)]
        case other:
            assert other == "recipes/evaluate_reward_model.py"
            config = config_of(evaluate_reward_model, command[3:])
            (found,) = evaluate_reward_model.load_data(config, world).values()
            assert as_rows(found) == [("green", "red", FOX, False, 1.0), ("green", "blue", FOX, False, 1.0)]
            return
    expected = EXPECTED[source.partition(":")[0]]
    assert sorted(map(repr, as_rows(found))) == sorted(map(repr, expected))


def test_every_format_and_kind_of_file_is_on_the_page() -> None:
    table = DOC.split("## Formats")[1].split("## Places")[0]
    named = set(re.findall(r"`([a-z0-9_]+(?:/[a-z]+)?)(?:=T)?`", "".join(re.findall(r"^\|[^|]*\|", table, re.M))))
    assert {name.partition("=")[0] for name in FORMATS} <= named
    assert [ending for ending in SUFFIXES if f"`x{ending}`" not in DOC] == []


@pytest.mark.parametrize("recipe", [train_reward_model, evaluate_reward_model, diffusion_dpo, collect_preferences])
def test_the_settings_of_images_are_the_same_everywhere(recipe: Any) -> None:
    named = {field.name: field.default for field in fields(recipe.Config)}
    assert (named["image_root"], named["image_prefix"], named["unpack_folder"]) == (None, None, "runs/images")


def test_every_setting_that_the_page_names_exists() -> None:
    recipes = (train_reward_model, evaluate_reward_model, diffusion_dpo, collect_preferences)
    known = {field.name for recipe in recipes for field in fields(recipe.Config)} | {"config"}
    assert set(re.findall(r"--([a-z_0-9]+)", DOC)) <= known


def test_test_prompts_are_left_out_and_hard_negatives_added(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of three pairs the one of the fox goes; of the two of "two cats" each winner is the same image."""
    write_json(world / "data" / "HPDv3" / "images" / "test.json", HPDV2_TEST)
    write_json(world / "data" / "HPDv3" / "held_out.json", [HPDV3[0] | {"prompt": "a bird"}])
    config = train_reward_model.Config(
        train_data="hpdv3:data/HPDv3/train.json", validation_data="hpdv3:data/HPDv3/held_out.json",
        test_data="hpdv2:data/HPDv3/images/test.json", exclude_test_prompts=True, hard_negatives=1.0,
    )  # fmt: skip
    training, held_out, tests = train_reward_model.load_data(config, world)
    said = capsys.readouterr().out
    assert "hpdv2-test: 1 of 1 prompts occur in the training data, in 1 of 3 records, such as 'a red fox'" in said
    assert "1 training records with prompts of the test data are excluded" in said
    assert "1 hard negatives are added to 2 training records" in said
    assert as_rows(training[:2]) == EXPECTED["hpdv3"][1:]
    (negative,) = training[2:]
    assert negative.where.startswith("hard negative of data/HPDv3/train.json:RECORD 2")
    assert as_rows(held_out) == [("red", "green", "a bird", False, 0.0)]
    assert [*tests] == ["hpdv2-test"]
