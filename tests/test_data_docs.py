"""docs/data.md and docs/benchmarks.md: their commands, formats, files, metrics and options are those of the code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from recipes import collect_preferences, diffusion_dpo, evaluate_reward_model, train_reward_model
from reward_model import scorers
from reward_model.benchmarks import (
    BENCHMARK_NAMES,
    genai_bench,
    genai_bench_tiger,
    hpdv3,
    load_benchmarks,
    mj_bench,
    mmrb2,
    pick_a_pic,
    ranked,
    tifa160,
    unsafe_bench,
)
from reward_model.benchmarks.metrics import label_metrics
from reward_model.benchmarks.rules import comparison_metrics, rating_metrics, scored_pairs
from reward_model.datasets import load_records, load_same_prompt_pairs, source
from reward_model.datasets.__main__ import main as check_data
from reward_model.datasets.containers import SUFFIXES
from reward_model.datasets.formats import FORMATS, parse_source
from reward_model.stored_images import open_hub_dataset
from reward_model.types import Record
from rlhf_t2i.config import parse_config
from rlhf_t2i.settings.lists import names
from tests.bucket_server import Files, found_by_s3fs, serving
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
    pick_a_pic_rows,
    write_images,
    write_json,
    write_parquet,
    write_pick_a_pic,
    write_tfrecord,
)

ROOT = Path(__file__).parent.parent
DATA, BENCHMARKS = ((ROOT / "docs" / name).read_text() for name in ("data.md", "benchmarks.md"))
RECIPES = (train_reward_model, evaluate_reward_model, diffusion_dpo, collect_preferences)


def commands_of(page: str) -> list[list[str]]:
    """Return the words of each command in the code blocks of a page."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    lines = [line for kind, block in blocks if not kind for line in block.replace("\\\n", " ").splitlines()]
    return [line.split() for line in lines]


def rows_of(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading, or of the one whose first column has this heading."""
    pattern = rf"^(?:## |\| ){re.escape(heading)}.*?^\|---[^\n]*\n((?:\|[^\n]*\n)+)"
    table = re.search(pattern, page, flags=re.DOTALL | re.MULTILINE)
    assert table is not None, heading
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[1].splitlines()]


def names_in(cell: str) -> list[str]:
    """Return the code in a cell."""
    return re.findall(r"`([^`]+)`", cell)


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
    "s3": [("red", "blue", FOX, False, 0.0), ("blue", "red", CAT, False, 0.0)],
    "unsafe_bench": [("red", FOX, 0), ("green", "", 1)],
    "richhf/artifact=0.5": [("red", FOX, 1), ("green", CAT, 0)],
}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the files of the page's commands in a few rows each, and a stand-in for the Hub."""
    import datasets

    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    for place in (
        *("ImageRewardDB/images/train/train_1", "HPDv2/train", "HPDv2/test", "HPDv3/images"),
        *("pickapic_v1/train", "pickapic_v2/data", "richhf-18k"),
    ):
        (data / place).mkdir(parents=True)
        write_images(data / place)
    for split in ("train", "validation"):
        write_parquet(data / f"ImageRewardDB/metadata-{split}.parquet", image_reward_rows())
    write_pick_a_pic(data / "pickapic_v2" / "data" / "train-00000.parquet")
    write_json(data / "HPDv2" / "train.json", HPDV2_TRAIN)
    write_json(data / "HPDv2" / "test.json", HPDV2_TEST)
    write_json(data / "HPDv3" / "train.json", HPDV3)
    write_tfrecord(data / "richhf-18k" / "train.tfrecord", RICHHF)
    for colour, prompt in (("red", FOX), ("green", CAT)):
        (data / "pickapic_v1" / "train" / f"{colour}.txt").write_text(prompt)
    hub = {"yuvalkirstain/pickapic_v2": pick_a_pic_rows(), "yiting/UnsafeBench": UNSAFEBENCH}

    def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        assert config is None
        assert split in ("train", "test", "validation_unique")
        return datasets.Dataset.from_list(hub[name])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    open_hub_dataset.cache_clear()
    return tmp_path


# --- data.md -----------------------------------------------------------------------------------------


def config_of(recipe: Any, arguments: list[str], **changes: Any) -> Any:
    paths = [str(ROOT / argument) if argument.startswith("recipes/configs/") else argument for argument in arguments]
    return replace(parse_config(recipe.Config, description="", arguments=paths), **changes)


def test_there_are_commands() -> None:
    assert len(commands_of(DATA)) == 17


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server for s3://my-bucket."""
    rows = [
        {"prompt": prompt, "winner": f"{one}.png", "loser": f"{other}.png"} for one, other, prompt, *_ in EXPECTED["s3"]
    ]
    content = {"my-bucket/pairs.jsonl": "\n".join(map(json.dumps, rows)).encode()}
    content |= {f"my-bucket/{colour}.png": encoded_image(colour, "PNG") for colour in ("red", "blue")}
    with serving(Files(content)) as files, found_by_s3fs(files, monkeypatch):
        yield


def test_the_parts_of_an_archive_are_unpacked_by_the_command(world: Path) -> None:
    (command,) = (one for one in commands_of(DATA) if one[0] == "cat")
    folder = world / "data" / "HPDv3"
    subprocess.run(["tar", "-czf", "all.tar.gz", "images"], cwd=folder, check=True)
    subprocess.run(["split", "-b", "100", "all.tar.gz", "images.tar.gz."], cwd=folder, check=True)
    shutil.rmtree(folder / "images")
    subprocess.run(" ".join(command), shell=True, check=True, cwd=world)
    assert as_rows(load_records("hpdv3:data/HPDv3/train.json")) == EXPECTED["hpdv3"]


def test_downloads_go_where_the_other_commands_look() -> None:
    used = " ".join(word for command in commands_of(DATA) if command[0] != "hf" for word in command)
    downloads = [command for command in commands_of(DATA) if command[0] == "hf"]
    assert len(downloads) == 2
    for command in downloads:
        assert command[1:2] + command[3:5] == ["download", "--repo-type", "dataset"]
        assert f":{command[command.index('--local-dir') + 1]}/" in used


@pytest.mark.parametrize(
    "command",
    [c for c in commands_of(DATA) if c[0] not in ("hf", "cat", "pip")],
    ids=lambda command: " ".join(command[-4:]),
)
@pytest.mark.usefixtures("bucket")
def test_a_command_loads_the_data_that_it_names(
    world: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    """Everything except the training, whose models are not available here."""
    if command[:4] == ["python", "-m", "reward_model.datasets", "check"]:
        assert check_data([*command[3:], "--num_workers", "1"]) == 0
        return
    assert command[:2] == ["accelerate", "launch"]
    if "--streaming" in command:
        files = [str(world / "data" / "pickapic_v2" / "data" / "train-00000.parquet")]
        monkeypatch.setattr(source, "data_files_of_hub", lambda _: files)
    found: list[Record]
    match command[2]:
        case "recipes/train_reward_model.py":
            config = config_of(train_reward_model, command[3:], validation_fraction=0.5)
            named = config.train_data
            if named.startswith("pick_a_pic") and not config.validation_data:
                config = replace(config, validation_data=named)  # all rows are of one prompt
            training, validation, tests = train_reward_model.load_data(config, world)
            found = [*training, *([] if config.validation_data else validation)]
            for records in [validation] * bool(config.validation_data) + [*tests.values()]:
                assert as_rows(records) == EXPECTED[parse_source(named)[0].name.partition("=")[0]]
        case "recipes/diffusion_dpo.py":
            config = config_of(diffusion_dpo, command[3:])
            named = config.pairs
            found = [*load_same_prompt_pairs(names(named), image_root=None, skipped=None, keep_ties=True)]
        case other:
            assert other == "recipes/evaluate_reward_model.py"
            config = config_of(evaluate_reward_model, command[3:])
            (found,) = evaluate_reward_model.load_data(config, world).values()
            assert as_rows(found) == [("green", "red", FOX, False, 1.0), ("green", "blue", FOX, False, 1.0)]
            return
    expected = EXPECTED[named.partition(":")[0]]
    assert sorted(map(repr, as_rows(found))) == sorted(map(repr, expected))


def test_the_table_of_formats_names_exactly_the_formats() -> None:
    first_cells = [re.sub(r"\(.*?\)", "", row[0]) for row in rows_of(DATA, "Formats")]
    named = [name.replace("=T", "=THRESHOLD") for cell in first_cells for name in names_in(cell)]
    assert sorted(named) == sorted(FORMATS)


def test_the_default_formats_are_those_of_the_table() -> None:
    assert parse_source("x.json")[0].name == "llava_reward"
    assert {parse_source(f"x{suffix}")[0].name for suffix in SUFFIXES if suffix != ".json"} == {"own"}


def test_the_table_of_paths_names_exactly_the_suffixes() -> None:
    named = [name.removeprefix("x") for row in rows_of(DATA, "Paths") for name in names_in(row[0]) if name[0] == "x"]
    assert sorted(named) == sorted(SUFFIXES)


def test_the_lines_of_the_own_format_are_what_the_page_says(tmp_path: Path) -> None:
    """A pair, one with a gap, an edit, a tie, an image with two prompts, two with two prompts, a labelled one."""
    (block,) = re.findall(r"^```json\n(.*?)^```$", DATA, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "pairs.jsonl").write_text(block)
    for name, colour in (("a", "red"), ("b", "blue"), ("fox", "blue")):
        (tmp_path / f"{name}.png").write_bytes(encoded_image(colour, "PNG"))
    *pairs, labelled = load_records(tmp_path / "pairs.jsonl", with_references=True)
    edit = pairs.pop(2)
    assert edit.reference == tmp_path / "fox.png"  # type: ignore[union-attr]
    assert as_rows([*pairs[:3], labelled]) == [
        ("red", "blue", FOX, False, 0.0), ("red", "blue", FOX, False, 2.0), ("red", "blue", FOX, True, 0.0),
        ("red", FOX, 1),
    ]  # fmt: skip
    sides = [(p.winner.name, p.loser.name, p.winner_prompt, p.loser_prompt) for p in pairs[3:]]  # type: ignore[union-attr]
    assert sides == [("a.png", "a.png", FOX, "a blue fox"), ("a.png", "b.png", FOX, "a blue fox")]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_defaults_of_image_options_are_the_same_in_all_recipes(recipe: Any) -> None:
    defaults = {field.name: field.default for field in fields(recipe.Config)}
    assert (defaults["image_root"], defaults["image_prefix"]) == (None, None)


@pytest.mark.parametrize("page", [DATA, BENCHMARKS], ids=["data", "benchmarks"])
def test_every_option_on_a_page_exists(page: str) -> None:
    known = {field.name for recipe in RECIPES for field in fields(recipe.Config)} | {"config"}
    known |= {"include", "repo", "local"}  # of `hf download`
    assert set(re.findall(r"--([a-z_0-9]+)", page)) <= known


def test_test_prompts_are_excluded_and_hard_negatives_added(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pair of the fox is excluded; the two pairs of "two cats" have the same winner, and so one hard negative."""
    write_json(world / "data" / "HPDv3" / "images" / "test.json", HPDV2_TEST)
    write_json(world / "data" / "HPDv3" / "held_out.json", [HPDV3[0] | {"prompt": "a bird"}])
    config = train_reward_model.Config(
        train_data="hpdv3:data/HPDv3/train.json", validation_data="hpdv3:data/HPDv3/held_out.json",
        test_data="hpdv2:data/HPDv3/images/test.json", exclude_test_prompts=True, hard_negatives=1.0,
    )  # fmt: skip
    training, validation, tests = train_reward_model.load_data(config, world)
    output = capsys.readouterr().out
    assert "hpdv2-test: 1 of 1 prompts occur in the training data, in 1 of 3 records, such as 'a red fox'" in output
    assert "1 training records with prompts of the test data are excluded" in output
    assert "1 hard negatives are added to 2 training records" in output
    assert as_rows(training[:2]) == EXPECTED["hpdv3"][1:]
    (negative,) = training[2:]
    assert negative.where.startswith("hard negative of data/HPDv3/train.json:RECORD 2")
    assert as_rows(validation) == [("red", "green", "a bird", False, 0.0)]
    assert [*tests] == ["hpdv2-test"]


# --- benchmarks.md -----------------------------------------------------------------------------------


def computed_metrics() -> set[str]:
    """Return the names of all metrics of `evaluate`, on data with ties and a tuned threshold."""
    options: dict[str, Any] = {"num_resamples": 2}
    pairs = scored_pairs([1.0, 0.5, -1.0], [1, 0, -1], ["a", "b", "c"])
    metrics = comparison_metrics(pairs, tuned_threshold=0.1, **options)
    metrics += rating_metrics([1.0, 2.0], [1.0, 2.0], ["a", "a"], **options)
    metrics += label_metrics([1.0, 2.0], [0, 1], [0.2, 0.8], **options)
    return {metric.name for metric in metrics}


def test_the_commands_on_the_page_are_parsed() -> None:
    (command,) = commands_of(BENCHMARKS)
    assert command[:3] == ["accelerate", "launch", "recipes/evaluate_reward_model.py"]
    config = config_of(evaluate_reward_model, command[3:])
    specified = [name.partition(":")[0] for name in names(config.benchmarks)]
    assert len(specified) == 3
    assert set(specified) <= {*BENCHMARK_NAMES}


def test_the_tables_name_exactly_the_scorers_and_the_benchmarks() -> None:
    named = [name.removesuffix(":PATH") for row in rows_of(BENCHMARKS, "`--reward`") for name in names_in(row[0])]
    assert sorted(named) == sorted(scorers.NAMES)
    named = [name for row in rows_of(BENCHMARKS, "Files of each test set") for name in names_in(row[0])]
    assert sorted(named) == sorted(BENCHMARK_NAMES)


def test_the_annotation_file_of_each_benchmark_is_the_one_that_is_looked_for(tmp_path: Path) -> None:
    for first, files, _ in rows_of(BENCHMARKS, "Files of each test set"):
        (name,), named = names_in(first), names_in(files)
        with pytest.raises(FileNotFoundError) as caught:
            load_benchmarks(f"{name}:{tmp_path}")
        if named:
            assert named[0] in str(caught.value)


def test_the_table_of_rules_names_exactly_the_accuracies_that_are_computed() -> None:
    named = {name for row in rows_of(BENCHMARKS, "Rules") for name in names_in(row[0])}
    assert named == {
        name for name in computed_metrics() if name.startswith(("accuracy_", "agreement_", "pairwise_accuracy_", "f1_"))
    }


def test_the_published_rule_of_each_benchmark_names_metrics_that_are_computed() -> None:
    modules = (genai_bench, genai_bench_tiger, hpdv3, mj_bench, mmrb2, pick_a_pic, tifa160, unsafe_bench)
    rules = [*(module.RULE for module in modules), hpdv3.PLUS_PLUS_RULE, ranked.IMAGE_REWARD_RULE, ranked.HPDV2_RULE]
    for rule in rules:
        named = set(re.findall(r"\b(?:accuracy|agreement|pairwise_accuracy|kendall|f1)_\w+|\bpearson\b", rule))
        assert named
        assert named <= computed_metrics()
