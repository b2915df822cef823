"""Settings that cannot work are refused before anything is loaded, and defaults follow other settings."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from rlhf_t2i.config import parse_config
from rlhf_t2i.settings.base import Settings
from rlhf_t2i.settings.ddpo import Config as DdpoConfig


def settings(recipe: str, **given: Any) -> Any:
    return import_module(f"rlhf_t2i.settings.{recipe}").Config(**given)


@pytest.mark.parametrize(("rank", "rule"), [("0", "at least 1 or null"), ("abc", "a whole number or null, at least 1")])
def test_a_rank_that_is_none_is_refused(rank: str, rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(DdpoConfig, arguments=["--lora_rank", rank])
    assert capsys.readouterr().err == f"error: lora_rank is {rank}; it must be {rule}.\n"


@pytest.mark.parametrize(
    ("recipe", "given"),
    [("ddpo", {}), ("flow_grpo", {}), ("diffusion_nft", {}), ("draft", {}), ("diffusion_dpo", {"pairs": "sampled"})],
)
def test_prompts_must_be_shared_equally_by_the_processes_of_the_launcher(
    recipe: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings(recipe, prompts_per_step=7, **given).prompts_per_step == 7
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert settings(recipe, prompts_per_step=8, **given).prompts_per_step == 8
    with pytest.raises(
        ValueError, match=r"prompts_per_step is 7; it must be a multiple of the number of processes \(4\)"
    ):
        settings(recipe, prompts_per_step=7, **given)


@pytest.mark.parametrize("recipe", ["ddpo", "flow_grpo", "draft", "best_of_n", "fk_steering"])
@pytest.mark.parametrize("num_steps", [2, 3, 4, 8, 28, 50])
def test_defaults_work_with_any_number_of_denoising_steps(recipe: str, num_steps: int) -> None:
    made: Settings = settings(recipe, num_denoising_steps=num_steps)
    for name in ("trained_window", "noisy_steps"):
        if window := getattr(made, name, None):
            assert 0 <= window[0] < window[1] <= num_steps


@pytest.mark.parametrize("recipe", ["ddpo", "draft", "best_of_n", "diffusion_nft"])
def test_defaults_work_with_one_denoising_step(recipe: str) -> None:
    made = settings(recipe, num_denoising_steps=1)
    assert getattr(made, "trained_window", (0, 1)) == (0, 1)


@pytest.mark.parametrize(
    ("num_steps", "expected"), [(8, [2, 3, 4, 6]), (4, [1, 2, 3]), (3, [1, 2]), (2, [1]), (100, [25, 38, 50, 75])]
)
def test_particles_are_resampled_at_the_same_fractions_of_sampling_by_default(
    num_steps: int, expected: list[int]
) -> None:
    assert settings("fk_steering", num_denoising_steps=num_steps).resampling_steps == expected


@pytest.mark.parametrize(
    ("recipe", "given", "message"),
    [
        ("best_of_n", {"prune_after": "2,8"}, "prune_after is 2,8; it must be comma-separated integers, from 1 to 7"),
        ("best_of_n", {"prune_after": "1", "num_denoising_steps": 1}, "it must be empty with one denoising step"),
        ("fk_steering", {"resample_after": ""}, "resample_after is ; it must be comma-separated integers"),
        ("fk_steering", {"num_denoising_steps": 1}, "num_denoising_steps is 1; it must be at least 2 to resample"),
    ],
)
def test_a_step_outside_of_sampling_is_refused(recipe: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(recipe, **given)
