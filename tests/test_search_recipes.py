"""The search recipes end to end on a tiny random pipeline: results, resuming and bad input."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from recipes import best_of_n, fk_steering
from rlhf_t2i.output.run_folder import update_run_info
from rlhf_t2i.report.search import headline, write_report
from rlhf_t2i.search.records import curve, point, read_records, reward_names, scores_of
from rlhf_t2i.settings.search import SearchConfig
from rlhf_t2i.shapes.scenes import all_prompts
from tests import processes
from tests.geneval_files import LINES, write_prompts
from tests.pages import command_of
from tests.reward_models import reward_model_folder
from tests.runs import REDNESS, redness

ROOT = Path(__file__).parent.parent
RECIPES = {"best_of_n": best_of_n, "fk_steering": fk_steering}


def greenness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images[:, 1].mean(dim=(1, 2))


def redness_or_nan(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Redness, but NaN for the image with the least of it."""
    scores = redness(images, prompts)
    return scores.where(scores > scores.min(), math.nan)


def greenness_of_four(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    if len(images) > 4:
        raise torch.OutOfMemoryError("there is no room")
    return greenness(images, prompts)


def config(name: str, tiny_sd: Path, tmp_path: Path, **changes: Any) -> Any:
    """Two prompts with three images each, searched in batches of two."""
    (tmp_path / "prompts.txt").write_text("a fox\na cat\n")
    shared: dict[str, Any] = {
        "prompts": str(tmp_path / "prompts.txt"),
        "images_per_prompt": 3,
        "searches_per_batch": 2,
        "model": str(tiny_sd),
        "num_denoising_steps": 4,
        "guidance_scale": 1.0,
        "rewards": REDNESS,
        "evaluation_rewards": "tests.test_search_recipes:greenness",
        "run_folder": str(tmp_path / "run"),
        "num_cpu_threads": 1,
    }
    own = {
        "best_of_n": {"num_candidates": 4, "prune_after": "1"},
        "fk_steering": {"num_particles": 4, "resample_after": "1,2"},
    }
    return RECIPES[name].Config(**{**shared, **own[name], **changes})


def results(folder: Path) -> dict[str, Any]:
    """All records, without the seconds."""
    records: dict[str, Any] = {}
    for path in sorted((folder / "images").glob("*/search_*.json")):
        row = json.loads(path.read_text())
        for part in ("searched", "baseline"):
            if row[part]:
                del row[part]["cost"]["seconds"]
        records[str(path.relative_to(folder))] = row
    return records


def images(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "images").rglob("*.png"))}


# --- results -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(RECIPES))
def test_records_and_images_agree_and_the_report_shows_them(name: str, tiny_sd: Path, tmp_path: Path) -> None:
    RECIPES[name].main(config(name, tiny_sd, tmp_path))
    records = read_records(tmp_path / "run")
    searches = [(folder, search) for folder in ("00000", "00001") for search in range(3)]
    assert [(record.folder.name, record.search) for record in records] == searches
    assert [record.prompt for record in records] == ["a fox"] * 3 + ["a cat"] * 3
    for record in records:
        rewards = scores_of(record.row["searched"], "reward")
        assert record.selected_score("reward") == max(rewards)
        assert len(scores_of(record.baseline, "reward")) == 4
        path = record.folder / "samples" / f"{record.search:04d}.png"
        image = torch.tensor(list(Image.open(path).get_flattened_data()))
        shown = (image[:, 0].float() - image[:, 1:].float().mean(1)).mean().item() / 255
        assert shown == pytest.approx(record.selected_score("reward"), abs=3e-3)
    seeds = [seed for record in records for seed in record.row["seeds"]]
    assert len(set(seeds)) == len(seeds)
    page = (tmp_path / "run" / "report.html").read_text()
    for words in ("best of 2", "this search", "greenness", "denoiser calls", "reward calls", "seconds", "a fox"):
        assert words in page
    assert page.count("<svg") == 2 * 3


def test_the_curve_and_the_point_of_a_report(tiny_sd: Path, tmp_path: Path) -> None:
    """At n = 4 the curve is the mean of the highest rewards; pruning is a point with fewer denoiser calls."""
    best_of_n.main(config("best_of_n", tiny_sd, tmp_path))
    records = read_records(tmp_path / "run")
    calls, mean, _ = curve(records, "reward", "denoiser_calls")[-1]
    assert calls == 4 * 4
    assert mean == pytest.approx(sum(max(scores_of(record.baseline, "reward")) for record in records) / 6, abs=1e-6)
    calls, mean, _ = point(records, "reward", "denoiser_calls")
    assert calls == 4 * 1 + 2 * 3
    assert mean <= curve(records, "reward", "denoiser_calls")[-1][1] + 1e-6
    assert point(records, "reward", "reward_calls")[0] == 4 + 2
    first = curve(records, "tests.test_search_recipes:greenness", "reward_calls")[0]
    values = [value for each in records for value in scores_of(each.baseline, "tests.test_search_recipes:greenness")]
    assert first[1] == pytest.approx(sum(values) / len(values), abs=1e-6)


def test_without_pruning_images_are_generated_once(tiny_sd: Path, tmp_path: Path) -> None:
    best_of_n.main(config("best_of_n", tiny_sd, tmp_path, prune_after=""))
    records = read_records(tmp_path / "run")
    assert all(record.row["baseline"] is None for record in records)
    assert records[0].row["searched"]["cost"]["denoiser_calls"] == 16
    assert "this search" not in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("name", list(RECIPES))
def test_without_a_baseline_the_report_shows_no_plain_samples(name: str, tiny_sd: Path, tmp_path: Path) -> None:
    """Particles and survivors are not samples of the model itself."""
    RECIPES[name].main(config(name, tiny_sd, tmp_path, baseline=False))
    records = read_records(tmp_path / "run")
    calls = {"best_of_n": 4 * 1 + 2 * 3, "fk_steering": 4 * 4}
    assert records[0].row["searched"]["cost"]["denoiser_calls"] == calls[name]
    assert curve(records, "reward", "seconds") == []
    assert not list((tmp_path / "run").rglob("baseline"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "this search" in page
    assert page.count("<svg") == 2 * 3
    for words in ("<td>one image", "best of 2", "plain samples", 'alt="plain sample"'):
        assert words not in page


def test_each_reward_has_one_column_and_the_headline_is_of_the_last_evaluation_reward(
    tiny_sd: Path, tmp_path: Path
) -> None:
    """Without evaluation rewards the headline is of the selecting reward."""
    red, green = REDNESS, "tests.test_search_recipes:greenness"
    records = best_of_n.main(config("best_of_n", tiny_sd, tmp_path, rewards=f"{red},{green}"))
    assert reward_names(records) == ["reward", red, green]
    assert headline(records).startswith(f"{green} of the selected")
    alone = {"rewards": f"{red},{green}", "evaluation_rewards": "", "run_folder": str(tmp_path / "alone")}
    assert headline(best_of_n.main(config("best_of_n", tiny_sd, tmp_path, **alone))).startswith(
        "reward, which chose, of the selected"
    )


def test_records_are_valid_json_if_a_reward_is_nan(tiny_sd: Path, tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    with pytest.warns(UserWarning, match="not finite; they are ranked last"):
        best_of_n.main(config("best_of_n", tiny_sd, tmp_path, rewards="tests.test_search_recipes:redness_or_nan"))
    rows = [json.loads(path.read_text(), parse_constant=refuse) for path in (tmp_path / "run").rglob("search_*.json")]
    assert len(rows) == 6
    assert None in [score for row in rows for score in row["early_rewards"]["1"]]


def test_evaluation_out_of_memory_halves_the_batch(tiny_sd: Path, tmp_path: Path) -> None:
    """Images that have been generated are not lost."""
    settings = {
        "evaluation_rewards": "tests.test_search_recipes:greenness_of_four", "prune_after": "", "microbatch_size": 8,
    }  # fmt: skip
    with pytest.warns(UserWarning, match="Out of memory with 8 images in one batch"):
        (record, *_) = best_of_n.main(config("best_of_n", tiny_sd, tmp_path, **settings))
    (plain, *_) = best_of_n.main(
        config("best_of_n", tiny_sd, tmp_path, prune_after="", run_folder=str(tmp_path / "plain"))
    )
    expected = scores_of(plain.row["searched"], "tests.test_search_recipes:greenness")
    assert scores_of(record.row["searched"], settings["evaluation_rewards"]) == pytest.approx(expected, abs=1e-5)


def test_the_images_have_the_layout_of_genevals_scorer(tiny_sd: Path, tmp_path: Path) -> None:
    """A folder named by digits for each prompt, with the line of the prompt and images named by digits."""
    source = str(write_prompts(tmp_path, LINES))
    best_of_n.main(config("best_of_n", tiny_sd, tmp_path, prompts=source, searches_per_batch=8))
    folders = sorted((tmp_path / "run" / "images").iterdir())
    assert [folder.name for folder in folders] == ["00000", "00001", "00002", "00003"]
    for folder, line in zip(folders, LINES, strict=True):
        assert json.loads((folder / "metadata.jsonl").read_text()) == line
        assert sorted(p.name for p in (folder / "samples").iterdir()) == ["0000.png", "0001.png", "0002.png"]


def test_a_report_can_be_written_before_the_first_result_and_names_another_base_of_the_weights(
    tiny_sd: Path, tmp_path: Path
) -> None:
    best_of_n.main(config("best_of_n", tiny_sd, tmp_path))
    shutil.rmtree(tmp_path / "run" / "images")
    update_run_info(tmp_path / "run", {"other_bases": {"runs/lora": "owner/base"}})
    page = write_report(tmp_path / "run").read_text()
    assert "finished so far:\n0. runs/lora was trained on owner/base, another base" in page
    assert "<svg" not in page


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RECIPES))
def test_the_page_s_command_improves_the_built_in_model(name: str, tmp_path: Path) -> None:
    """With one image of a dozen prompts, the oracle, an evaluation reward, passes more of the selected images."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(all_prompts("held-out")[::3][:12]))
    few = [
        "--prompts",
        str(prompts),
        "--images_per_prompt",
        "1",
        "--run_folder",
        str(tmp_path / "run"),
        "--num_cpu_threads",
        "1",
    ]
    output = launch([*command_of("docs/search.md", f"recipes/{name}.py"), *few])
    assert "best of 16" in output
    records = read_records(tmp_path / "run")
    assert point(records, "oracle_pass", "seconds")[1] > curve(records, "oracle_pass", "seconds")[0][1] + 0.2
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_the_published_settings_for_sd15_run(tiny_sd: Path, tmp_path: Path) -> None:
    small = {
        "model": tiny_sd, "rewards": "jpeg_compressibility", "images_per_prompt": 1, "num_denoising_steps": 100,
        "run_folder": tmp_path / "run", "prompts": write_prompts(tmp_path, LINES[:1]), "num_cpu_threads": 1,
    }  # fmt: skip
    flags = [part for key, value in small.items() for part in (f"--{key}", str(value))]
    launch(["recipes/fk_steering.py", "--config", "recipes/configs/fk_sd15.yaml", *flags])
    (record,) = read_records(tmp_path / "run")
    assert record.row["searched"]["cost"]["denoiser_calls"] == 800
    assert record.row["searched"]["cost"]["reward_calls"] == 20


# --- resuming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_resumed_search_generates_only_what_is_missing(name: str, tiny_sd: Path, tmp_path: Path) -> None:
    """After a kill that left one image half-written and one without its record."""
    settings = config(name, tiny_sd, tmp_path)
    RECIPES[name].main(settings)
    folder = tmp_path / "run"
    all_results, all_images = results(folder), images(folder)
    (folder / "images" / "00000" / "search_0001.json").unlink()
    (folder / "images" / "00000" / "samples" / "0001.png").write_bytes(b"half a pict")
    (folder / "images" / "00001" / "search_0002.json").rename(folder / "images" / "00001" / "search_0002.json.part")
    before = {path: path.stat().st_mtime_ns for path in (folder / "images").rglob("search_*.json")}
    RECIPES[name].main(replace(settings, resume=True))
    assert results(folder) == all_results
    assert images(folder) == all_images
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


@pytest.mark.slow
def test_kill_9_loses_nothing(tiny_sd: Path, tmp_path: Path) -> None:
    """Killed twice at random moments and resumed, a search gives the same images, each generated once.

    The code that is killed and resumed, `search/run.py`, is shared by the recipes.
    """
    name = "best_of_n"
    settings = config(name, tiny_sd, tmp_path, images_per_prompt=8, microbatch_size=1)
    best_of_n.main(settings)
    folder = tmp_path / "killed"
    rng, finished = random.Random(0), dict[Path, int]()
    for attempt in range(2):
        process = processes.start(
            [sys.executable, *command(name, replace(settings, run_folder=str(folder), resume=attempt > 0))],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while len(list(folder.glob("images/*/search_*.json"))) <= len(finished) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        records = {path: path.stat().st_mtime_ns for path in folder.glob("images/*/search_*.json")}
        assert finished.items() <= records.items()
        finished = records
    assert 0 < len(finished) < 16
    best_of_n.main(replace(settings, run_folder=str(folder), resume=True))
    assert results(folder) == results(tmp_path / "run")
    assert images(folder) == images(tmp_path / "run")
    assert all(path.stat().st_mtime_ns == then for path, then in finished.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RECIPES))
def test_two_processes_give_the_results_of_one(name: str, tiny_sd: Path, tmp_path: Path) -> None:
    settings = config(name, tiny_sd, tmp_path)
    RECIPES[name].main(settings)
    launch(command(name, replace(settings, run_folder=str(tmp_path / "two"))), "ddp.yaml")
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    one, two = results(tmp_path / "run"), results(tmp_path / "two")
    assert one.keys() == two.keys()
    for key, row in one.items():
        assert row["seeds"] == two[key]["seeds"]
        assert row["searched"]["scores"]["reward"] == pytest.approx(two[key]["searched"]["scores"]["reward"], abs=1e-5)


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("best_of_n", {"num_candidates": 0}, "num_candidates is 0; it must be at least 1"),
        ("best_of_n", {"prune_after": "early"}, "prune_after is early; it must be comma-separated integers"),
        ("best_of_n", {"prune_after": "4"}, "prune_after is 4; it must be comma-separated integers, from 1 to 3"),
        ("best_of_n", {"eta": -1.0}, r"eta is -1\.0"),
        ("best_of_n", {"images_per_prompt": 0}, "images_per_prompt is 0; it must be at least 1"),
        ("best_of_n", {"microbatch_size": 0}, "microbatch_size is 0; it must be at least 1"),
        ("fk_steering", {"num_particles": 0}, "num_particles is 0; it must be at least 1"),
        ("fk_steering", {"eta": 0.0}, r"eta is 0\.0; it must be in \(0, 1\]"),
        (
            "fk_steering",
            {"resample_after": "1,9"},
            "resample_after is 1,9; it must be comma-separated integers, from 1 to 3",
        ),
        ("fk_steering", {"strength": -1.0}, r"strength is -1\.0; it must be at least 0"),
        ("fk_steering", {"reward_std": 0.0}, r"reward_std is 0\.0; it must be positive"),
    ],
)
def test_impossible_settings_are_refused(
    name: str, changes: dict[str, Any], message: str, tiny_sd: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        RECIPES[name].main(config(name, tiny_sd, tmp_path, **changes))
    assert not list(tmp_path.glob("run/images/*/search_*.json"))


def test_a_reward_model_that_only_compares_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    reward = f"llava_reward:{reward_model_folder('llava', head='general_preference')}"
    with pytest.raises(ValueError, match="general-preference head: it compares two images but gives no score to one"):
        best_of_n.main(config("best_of_n", tiny_sd, tmp_path, rewards=reward))


def test_resuming_with_another_config_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    settings = config("best_of_n", tiny_sd, tmp_path)
    best_of_n.main(settings)
    with pytest.raises(ValueError, match="another config: num_candidates was 4 and is now 6"):
        best_of_n.main(replace(settings, num_candidates=6, resume=True))


def test_resuming_with_other_prompts_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    """The prompt file has the same name, so the config does not change."""
    settings = config("best_of_n", tiny_sd, tmp_path)
    best_of_n.main(settings)
    (tmp_path / "prompts.txt").write_text("a fox\na dog\n")
    with pytest.raises(
        ValueError, match=r"Prompt 1 of .* is now \{'prompt': 'a dog'\}, but .* generated for .*'a cat'"
    ):
        best_of_n.main(replace(settings, resume=True))
    assert json.loads((tmp_path / "run/images/00001/metadata.jsonl").read_text()) == {"prompt": "a cat"}


# --- processes ----------------------------------------------------------------------------------------


def command(name: str, settings: SearchConfig) -> list[str]:
    given = {key: value for key, value in asdict(settings).items() if value is not None}
    flags = [
        part
        for key, value in given.items()
        for part in (f"--{key}", str(value).lower() if isinstance(value, bool) else str(value))
    ]
    return [f"recipes/{name}.py", *flags]


def launch(arguments: list[str], accelerate_config: str = "single.yaml") -> str:
    """Run a recipe by `accelerate launch` to its end; return what it printed."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{accelerate_config}"]
    result = processes.run([sys.executable, *launcher, *arguments])
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr
