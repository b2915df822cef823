"""The configs for the models that people use: their commands are valid, and they run on tiny random models."""

from __future__ import annotations

import json
import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recipes import (
    best_of_n,
    ddpo,
    diffusion_dpo,
    diffusion_nft,
    draft,
    fk_steering,
    flow_grpo,
    train_reward_model,
)
from rlhf_t2i.config import parse_config
from rlhf_t2i.data.prompts import load_prompts
from rlhf_t2i.rewards import geneval, ocr
from rlhf_t2i.rewards.table import find_reward
from rlhf_t2i.settings.lists import names
from tests.geneval_files import make_geneval_models
from tests.runs import REDNESS, rows

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
RECIPES = {
    "best_of_n": best_of_n, "ddpo": ddpo, "diffusion_dpo": diffusion_dpo, "diffusion_nft": diffusion_nft,
    "draft": draft, "fk_steering": fk_steering, "flow_grpo": flow_grpo, "train_reward_model": train_reward_model,
}  # fmt: skip
WORDS = {ROOT / "recipes" / "configs" / f"{recipe}_words.yaml" for recipe in ("flow_grpo", "diffusion_nft")}
"""Configs of the built-in model of words, whose commands run as they are."""
SMALL = {path for path in CONFIGS if path.stem.endswith("_24gb")}
"""Configs of one GPU with 24 GB: other configs with switches that save memory."""
FLOW_GRPO = [path for path in CONFIGS if path.stem.startswith("flow_grpo") and path not in {*WORDS, *SMALL}]


def config_file(name: str) -> Path:
    return ROOT / "recipes" / "configs" / f"{name}.yaml"


def read(recipe: Any, path: Path, *options: str, **changes: object) -> Any:
    arguments = [part for name, value in changes.items() for part in (f"--{name}", str(value))]
    return parse_config(recipe.Config, arguments=["--config", str(path), *options, *arguments])


def command_of(path: Path) -> tuple[Any, list[str]]:
    """The recipe of the command in a file's comment, and its options."""
    comment = path.read_text().replace("\\\n#", "")
    (command,) = re.findall(r"^# +accelerate launch (.*)$", comment, flags=re.MULTILINE)
    words = shlex.split(command)
    (script,) = (word for word in words if word.startswith("recipes/") and word.endswith(".py"))
    return RECIPES[Path(script).stem], words[words.index(script) + 1 :]


def variants_of(path: Path) -> list[list[str]]:
    """The options of each variant in a file's comment: lines of a name, two blanks and options."""
    _, heading, after = path.read_text().partition("# Variants:\n")
    lines = after.split("\n\n")[0].splitlines() if heading else []
    return [shlex.split(line[line.index("--") :]) for line in lines]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_command_in_the_comment_reads_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe, options = command_of(path)
    config = parse_config(recipe.Config, arguments=options)
    from_file = read(recipe, path)
    if options:
        assert f"--config {path.relative_to(ROOT)}" in " ".join(options)
        assert parse_config(recipe.Config, arguments=["--config", str(path), *options]) == config
    for settings in (config, from_file):
        for option in {"rewards", "evaluation_rewards"} & vars(settings).keys():
            for reward in names(getattr(settings, option)):
                find_reward(reward)
    monkeypatch.chdir("/")  # a file of options works from any folder
    from_file = read(recipe, path)
    for option in {"prompts", "evaluation_prompts"} & vars(from_file).keys() - set(from_file.unused()):
        assert load_prompts(getattr(from_file, option))


@pytest.mark.parametrize(
    ("path", "count"),
    [
        *((path, 5) for path in FLOW_GRPO),
        *((config_file(name), 3) for name in ("diffusion_nft_sd35m", "diffusion_nft_qwen_image")),
    ],
    ids=lambda value: getattr(value, "stem", ""),
)  # fmt: skip
def test_every_variant_changes_the_settings(path: Path, count: int) -> None:
    recipe, _ = command_of(path)
    settings = [read(recipe, path), *(read(recipe, path, *options) for options in variants_of(path))]
    assert len(settings) == count + 1
    assert len({repr(each) for each in settings}) == count + 1


@pytest.mark.parametrize("path", [p for p in FLOW_GRPO if "sd35m" in p.stem], ids=lambda path: path.stem)
def test_flow_grpo_has_the_published_settings(path: Path) -> None:
    config = read(flow_grpo, path)
    assert (config.prompts_per_step, config.images_per_prompt, config.num_minibatches) == (48, 24, 2)
    assert (config.lora_rank, config.lora_alpha, config.clip_range, config.noise_scale) == (32, 64, 1e-4, 0.7)
    assert config.ema_decay == 0.948
    assert flow_grpo.noisy_window(config, 0) == (0, 9)


def test_flow_grpo_trains_one_of_the_early_steps_of_new_models() -> None:
    configs = [read(flow_grpo, config_file(f"flow_grpo_{name}")) for name in ("flux2_klein", "qwen_image")]
    assert [config.noisy_steps for config in configs] == [(1, 4), (1, 4)]
    assert [config.clip_range for config in configs] == [1e-5, 1e-4]
    for config in configs:
        start, end = flow_grpo.noisy_window(config, 0)
        assert end - start == 1


def test_diffusion_nft_has_the_published_settings() -> None:
    config = read(diffusion_nft, config_file("diffusion_nft_sd35m"))
    assert (config.prompts_per_step, config.images_per_prompt, config.num_minibatches) == (48, 24, 1)
    assert (config.beta, config.kl_weight, config.max_advantage, config.guidance_scale) == (1.0, 1e-4, 5.0, 1.0)
    assert (config.sampling_ema_start, config.sampling_ema_rise, config.sampling_ema_max) == (0, 1e-3, 0.5)
    assert (config.ema_decay, config.timestep_fraction) == (0.9, 0.9)


def test_fk_steering_has_the_published_guidance_and_maximum() -> None:
    configs = [read(fk_steering, config_file(name)) for name in ("fk_sd15", "fk_sdxl_geneval")]
    assert [(config.guidance_scale, config.initial_max) for config in configs] == [(7.5, 0.0), (5.0, 0.0)]


@pytest.mark.parametrize("name", ["diffusion_dpo_sd15", "diffusion_dpo_sdxl"])
def test_diffusion_dpo_states_its_forward_passes_and_has_the_published_rate_for_a_pair(name: str) -> None:
    config, comment = read(diffusion_dpo, config_file(name)), config_file(name).read_text()
    assert config.learning_rate == pytest.approx(1e-8 * config.pairs_per_step)
    for gpus in (1, 4, 8):
        passes = config.pairs_per_step // gpus // (config.microbatch_size // 2)
        assert re.search(rf"^#   {gpus} GPUs? +{passes} ", comment, flags=re.MULTILINE), gpus


# --- on tiny models -------------------------------------------------------------------------------


TINY_FLOW = {
    "resolution": 8, "prompts_per_step": 2, "images_per_prompt": 4, "num_denoising_steps": 3, "num_evaluation_steps": 4,
    "num_steps": 1, "num_evaluation_images": 2, "num_cpu_threads": 1,
}  # fmt: skip
OWN_REWARDS = [config_file("flow_grpo_sd35m_ocr"), config_file("flow_grpo_sd35m_geneval")]
"""Configs whose rewards and prompts need nothing of a user."""


NEW_MODELS = {"flux2": "tiny_flux2", "qwen_image": "tiny_qwen_image"}
"""Parts of a config's name, and the fixture of its model."""
OF_NEW_MODELS = [path for path in CONFIGS if any(part in path.stem for part in NEW_MODELS)]


@pytest.mark.parametrize(
    "path",
    [
        *sorted({*FLOW_GRPO, *WORDS, config_file("diffusion_nft_sd35m")} - {*OWN_REWARDS, *OF_NEW_MODELS}),
        *(pytest.param(path, marks=pytest.mark.slow) for path in OF_NEW_MODELS),
    ],
    ids=lambda path: path.stem,
)
def test_recipes_of_flow_models_run(path: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    of_new = [fixture for part, fixture in NEW_MODELS.items() if part in path.stem]
    model = request.getfixturevalue(*of_new or ["tiny_flux" if "flux" in path.stem else "tiny_sd3"])
    small = {**TINY_FLOW, "model": model, "run_folder": tmp_path / "run"}
    recipe, _ = command_of(path)
    config = read(recipe, path, rewards=REDNESS, evaluation_rewards=REDNESS, **small)
    (row,) = rows(recipe.main(config), "train")
    assert row["gradient_norm"] > 0


@pytest.mark.parametrize("path", OWN_REWARDS, ids=lambda path: path.stem)
def test_flow_grpo_runs_with_ocr_and_with_geneval_as_they_are(
    path: Path, tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real OCR, of few pixels; GenEval by random models."""
    if path.stem.endswith("ocr"):
        pytest.importorskip("rapidocr", reason="the extra ocr is not installed")
        monkeypatch.setattr(ocr, "OcrReward", partial(ocr.OcrReward, min_side=32))
    else:
        make_geneval_models(tmp_path)
        monkeypatch.setattr(geneval, "DETECTOR", str(tmp_path / "detector"))
        monkeypatch.setattr(geneval, "CLIP", str(tmp_path / "clip"))
    config = read(flow_grpo, path, model=tiny_sd3, run_folder=tmp_path / "run", **TINY_FLOW)
    run_folder = flow_grpo.main(config)
    (row,), measured = rows(run_folder, "train"), rows(run_folder, "evaluation")[-1]
    assert all(0 <= score <= 1 for score in (row["reward"], measured[config.evaluation_rewards.partition(",")[0]]))


@pytest.mark.slow
def test_ddpo_on_sdxl_runs(tiny_sdxl: Path, tmp_path: Path) -> None:
    small = {
        "model": tiny_sdxl, "prompts_per_step": 2, "num_denoising_steps": 4, "num_steps": 1, "num_minibatches": 1,
        "num_evaluation_images": 2, "run_folder": tmp_path / "run", "num_cpu_threads": 1,
    }  # fmt: skip
    (row,) = rows(ddpo.main(read(ddpo, config_file("ddpo_sdxl"), **small)), "train")
    assert row["gradient_norm"] > 0
    assert row["replay_error"] == 0


def test_diffusion_dpo_on_sdxl_runs(tiny_sdxl: Path, tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (24, 24), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a fox", "winner": "a.png", "loser": "b.png"}\n')
    small = {
        "model": tiny_sdxl, "pairs": tmp_path / "pairs.jsonl", "pairs_per_step": 1, "num_denoising_steps": 4,
        "num_steps": 1, "num_evaluation_images": 2, "run_folder": tmp_path / "run", "num_cpu_threads": 1,
    }  # fmt: skip
    (row,) = rows(diffusion_dpo.main(read(diffusion_dpo, config_file("diffusion_dpo_sdxl"), **small)), "train")
    assert row["gradient_norm"] > 0


@pytest.mark.slow
def test_fk_steering_of_sdxl_runs_on_genevals_prompts(tiny_sdxl: Path, tmp_path: Path) -> None:
    prompt = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(prompt))
    small = {
        "model": tiny_sdxl, "prompts": tmp_path / "evaluation_metadata.jsonl", "rewards": "jpeg_compressibility",
        "images_per_prompt": 1, "run_folder": tmp_path / "run", "num_cpu_threads": 1,
    }  # fmt: skip
    (record,) = fk_steering.main(read(fk_steering, config_file("fk_sdxl_geneval"), **small))
    assert record.row["searched"]["cost"]["denoiser_calls"] == 800
    assert record.row["searched"]["cost"]["reward_calls"] == 20
