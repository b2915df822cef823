"""The configs for the models people use today run, with a tiny random model of the same family in its place."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from recipes import ddpo, diffusion_dpo, diffusion_nft, fk_steering, flow_grpo
from rlhf_t2i.config import parse_config
from tests.runs import REDNESS

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "recipes" / "configs"
FLOW_GRPO = sorted(CONFIGS.glob("flow_grpo_*.yaml"))
NFT = CONFIGS / "diffusion_nft_sd35m.yaml"


def read(recipe: Any, path: Path, **changes: object) -> Any:
    flags = [part for name, value in changes.items() for part in (f"--{name}", str(value))]
    return parse_config(recipe.Config, description="", arguments=["--config", str(path), *flags])


def last_row(folder: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"][-1]


def changed_by(recipe: Any, path: Path, flags: Sequence[str]) -> Any:
    """The config with the flags of one of its variants."""
    return read(recipe, path, **{name[2:]: value for name, value in zip(flags[::2], flags[1::2], strict=True)})


@pytest.mark.parametrize(
    ("recipe", "path"), [*((flow_grpo, path) for path in FLOW_GRPO), (diffusion_nft, NFT)],
    ids=lambda value: getattr(value, "stem", ""),
)  # fmt: skip
def test_group_recipes_run(recipe: Any, path: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model = request.getfixturevalue("tiny_flux" if "flux" in path.stem else "tiny_sd3")
    small = {
        "model": model, "resolution": 8, "prompts_per_step": 2, "images_per_prompt": 4, "num_denoising_steps": 3,
        "num_evaluation_steps": 4, "num_steps": 1, "num_evaluation_images": 2, "rewards": REDNESS,
        "evaluation_rewards": REDNESS, "run_folder": tmp_path / "run", "num_cpu_threads": 1,
    }  # fmt: skip
    assert last_row(recipe.main(read(recipe, path, **small)))["gradient_norm"] > 0


@pytest.mark.parametrize("path", [path for path in FLOW_GRPO if "sd35m" in path.stem], ids=lambda path: path.stem)
def test_flow_grpos_are_as_published(path: Path) -> None:
    config = read(flow_grpo, path)
    assert (config.prompts_per_step, config.images_per_prompt, config.num_minibatches) == (48, 24, 2)
    assert (config.lora_rank, config.lora_alpha, config.clip_range, config.noise_scale) == (32, 64, 1e-4, 0.7)
    assert flow_grpo.noisy_window(config, 0) == (0, 9)


def test_diffusion_nft_is_as_published() -> None:
    config = read(diffusion_nft, NFT)
    assert (config.prompts_per_step, config.images_per_prompt, config.num_minibatches) == (48, 24, 1)
    assert (config.beta, config.kl_weight, config.max_advantage, config.guidance_scale) == (1.0, 1e-4, 5.0, 1.0)
    assert (config.sampling_ema_start, config.sampling_ema_rise, config.sampling_ema_max) == (0, 1e-3, 0.5)


@pytest.mark.parametrize(
    ("recipe", "path", "count"), [*((flow_grpo, path, 5) for path in FLOW_GRPO), (diffusion_nft, NFT, 3)],
    ids=lambda value: getattr(value, "stem", ""),
)  # fmt: skip
def test_variants_are_read(recipe: Any, path: Path, count: int) -> None:
    variants = re.findall(r"^#   \S.*?(--.*)$", path.read_text(), flags=re.MULTILINE)
    variants = [variant for variant in variants if "--config" not in variant and "num_processes" not in variant]
    assert len(variants) == count
    for variant in variants:
        assert changed_by(recipe, path, variant.split()) != read(recipe, path)


def test_ddpo_on_sdxl_runs(tiny_sdxl: Path, tmp_path: Path) -> None:
    small = {
        "model": tiny_sdxl, "prompts_per_step": 2, "num_denoising_steps": 4, "num_steps": 1, "num_minibatches": 1,
        "num_evaluation_images": 2, "run_folder": tmp_path / "run", "num_cpu_threads": 1,
    }  # fmt: skip
    row = last_row(ddpo.main(read(ddpo, CONFIGS / "ddpo_sdxl.yaml", **small)))
    assert row["gradient_norm"] > 0
    assert row["replay_error"] == 0


def test_diffusion_dpo_on_sdxl_runs_and_its_batches_are_worked_out_right(tiny_sdxl: Path, tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (24, 24), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a fox", "winner": "a.png", "loser": "b.png"}\n')
    path = CONFIGS / "diffusion_dpo_sdxl.yaml"
    small = {
        "model": tiny_sdxl, "pairs": tmp_path / "pairs.jsonl", "pairs_per_step": 1, "num_denoising_steps": 4,
        "num_steps": 1, "num_evaluation_images": 2, "run_folder": tmp_path / "run", "num_cpu_threads": 1,
    }  # fmt: skip
    assert last_row(diffusion_dpo.main(read(diffusion_dpo, path, **small)))["gradient_norm"] > 0
    config, header = read(diffusion_dpo, path), path.read_text()
    assert config.learning_rate == pytest.approx(1e-8 * config.pairs_per_step)
    for gpus in (1, 4, 8):
        passes = config.pairs_per_step // gpus // (config.microbatch_size // 2)
        assert re.search(rf"^#   {gpus} GPUs? +{passes} ", header, flags=re.MULTILINE), gpus


def test_fk_steering_of_sdxl_runs_on_genevals_prompts(tiny_sdxl: Path, tmp_path: Path) -> None:
    (tmp_path / "evaluation_metadata.jsonl").write_text(
        json.dumps(
            {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
        )
    )
    small = {
        "model": tiny_sdxl, "prompts": tmp_path / "evaluation_metadata.jsonl", "rewards": "jpeg_compressibility",
        "images_per_prompt": 1, "run_folder": tmp_path / "run", "num_cpu_threads": 1,
    }  # fmt: skip
    (one,) = fk_steering.main(read(fk_steering, CONFIGS / "fk_sdxl_geneval.yaml", **small))
    assert one.row["searched"]["cost"]["denoiser_calls"] == 800
    assert one.row["searched"]["cost"]["reward_calls"] == 20


@pytest.mark.parametrize(
    "path", [*FLOW_GRPO, NFT, *(CONFIGS / f"{n}.yaml" for n in ("ddpo_sdxl", "diffusion_dpo_sdxl", "fk_sdxl_geneval"))],
    ids=lambda path: path.stem,
)  # fmt: skip
def test_each_opens_with_its_command_hardware_and_what_is_untested(path: Path) -> None:
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"--config recipes/configs/{path.name}" in head
    for word in ("accelerate launch", "GPU", "measured", "differs" if path.stem != "ddpo_sdxl" else "no settings"):
        assert word in head
    assert yaml.safe_load(path.read_text())
