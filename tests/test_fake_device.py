"""Every tensor of a step is where it belongs: recipes run on fake tensors of a device that has no kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.reward_models import ALL_FAMILIES, reward_model_folder
from tests.runs import REDNESS

RECIPES = [
    ("ddpo", "sd", {"images_per_prompt": 4, "kl_weight": 0.1, "guidance_scale": 3.0}),
    ("ddpo", "sdxl", {"images_per_prompt": 4, "lora_rank": None}),
    ("flow_grpo", "sd3", {"images_per_prompt": 4, "kl_weight": 0.1, "guidance_scale": 3.0}),
    ("flow_grpo", "flux", {"images_per_prompt": 4, "resolution": 64}),
    ("diffusion_nft", "sd3", {"images_per_prompt": 4}),
    ("flow_grpo", "flux2", {"images_per_prompt": 4, "kl_weight": 0.1, "guidance_scale": 3.0}),
    ("flow_grpo", "zimage", {"images_per_prompt": 4, "resolution": 64}),
    ("diffusion_nft", "qwen_image", {"images_per_prompt": 4, "guidance_scale": 3.0}),
    ("draft", "sd", {"backprop_steps": 1}),
    ("draft", "sana", {"backprop_steps": 1, "guidance_scale": 3.0}),
    ("diffusion_dpo", "sd", {"pairs": "missing.jsonl", "prompts": "", "pairs_per_step": 4}),
    ("diffusion_dpo", "flux2", {"pairs": "sampled", "images_per_prompt": 4}),
]
"""Recipe, model of tests/tiny.py, options."""


def name_of(recipe: str, model: str) -> str:
    return f"{recipe} {model}"


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Return the error of each case, None for one that ran, from a process in which torch knows the device."""
    folder = tmp_path_factory.mktemp("device")
    (prompts := folder / "prompts.txt").write_text("a fox\na pear\na bell\n", encoding="utf-8")
    shared = {
        "prompts": str(prompts), "evaluation_prompts": str(prompts), "prompts_per_step": 2, "num_denoising_steps": 4,
        "num_steps": 2, "microbatch_size": 2, "num_cpu_threads": 1, "lora_rank": 4, "rewards": REDNESS,
        "evaluation_rewards": REDNESS,
    }  # fmt: skip
    for model in {model for _, model, _ in RECIPES}:
        getattr(tiny, f"save_{model}")(folder / model)
    cases = [
        [name_of(recipe, model), recipe, {**shared, "model": str(folder / model), **options}]
        for recipe, model, options in RECIPES
    ]
    cases += [[name_of("score", kind), "score", {"folder": str(reward_model_folder(kind))}] for kind in ALL_FAMILIES]
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "tests.fake_device", str(folder / "cases.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "model"), [case[:2] for case in RECIPES])
def test_a_step_of_a_recipe_keeps_its_tensors_on_one_device(
    recipe: str, model: str, errors: dict[str, str | None]
) -> None:
    """Rollout or noised images, densities, reference, decoding, backward pass and optimiser."""
    assert errors[name_of(recipe, model)] is None


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_reward_model_scores_on_the_device_of_the_images(family: str, errors: dict[str, str | None]) -> None:
    assert errors[name_of("score", family)] is None


@pytest.mark.slow
def test_a_tensor_that_stays_on_the_cpu_is_found(errors: dict[str, str | None]) -> None:
    """Among fake tensors, and among those with numbers."""
    assert "FakeTensorDeviceMismatchError" in str(errors["left on the CPU, False"])
    assert "has tensors of the device and of the CPU" in str(errors["left on the CPU, True"])
