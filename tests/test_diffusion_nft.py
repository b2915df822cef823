"""DiffusionNFT on tiny random models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from recipes import diffusion_nft
from rlhf_t2i.diffusion.transitions import stochastic
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.sampling.rollout import generate, rollout
from rlhf_t2i.types import Sampler
from tests.runs import FLAT, REDNESS, lora_weights, rows


@pytest.fixture
def config(tiny_zimage: Path, tmp_path: Path) -> diffusion_nft.Config:
    """A run of three steps that uses every part of the recipe."""
    return diffusion_nft.Config(
        model=str(tiny_zimage),
        resolution=16,
        prompts_per_step=2,
        images_per_prompt=4,
        num_denoising_steps=4,
        timestep_fraction=0.5,
        lora_rank=2,
        num_minibatches=2,
        microbatch_size=8,
        learning_rate=1e-2,
        adam_epsilon=1e-3,  # or Adam makes whole steps of gradients that are nothing but rounding
        sampling_ema_rise=0.2,
        rewards=REDNESS,
        evaluation_rewards=REDNESS,
        num_steps=3,
        evaluate_every=0,
        num_evaluation_images=4,
        checkpoint_every=1,
        run_folder=str(tmp_path / "run"),
        num_cpu_threads=1,
    )


def train(config: diffusion_nft.Config) -> Path:
    return diffusion_nft.main(config)


@pytest.mark.parametrize(
    "changes",
    [{"lora_rank": None}, {"lora_rank": 4, "learning_rate": 3e-2}, {"model": "tiny_sd_v", "lora_rank": None}],
)
def test_the_reward_rises(
    config: diffusion_nft.Config, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """Whatever learns: all of a flow's denoiser, adapters on it, or a diffusion model."""
    if "model" in changes:
        changes = {**changes, "model": str(request.getfixturevalue(changes["model"])), "resolution": None}
    learning = {
        "images_per_prompt": 8, "num_steps": 6, "learning_rate": 5e-3, "adam_epsilon": 1e-8, "kl_weight": 0.0,
        "max_advantage": 1.0, "num_evaluation_images": 16, "checkpoint_every": 100,
    }  # fmt: skip
    before, after = rows(train(replace(config, **{**learning, **changes})), "evaluation")
    assert after[REDNESS] > before[REDNESS] + 0.005


@pytest.mark.slow
def test_the_built_in_flow_model_learns_from_the_judge(tmp_path: Path) -> None:
    """On held-out prompts, by the judge that it learns from and by the oracle, which it never sees."""
    config = diffusion_nft.Config(
        prompts_per_step=8, images_per_prompt=8, num_steps=3, learning_rate=6e-4, evaluate_every=0,
        num_evaluation_images=68, evaluation_rewards="judge,oracle", checkpoint_every=100,
        run_folder=str(tmp_path / "run"), num_cpu_threads=1,
    )  # fmt: skip
    before, after = rows(train(config), "evaluation")
    assert after["llava_reward"] > before["llava_reward"] + 0.2
    assert after["oracle"] > before["oracle"] + 0.1


def test_it_starts_at_the_weights_that_painted_and_moves_away(config: diffusion_nft.Config) -> None:
    """Before the first optimiser step nothing has moved, and painter, learner and reference are one."""
    one = replace(config, num_minibatches=1)
    first, second, _ = rows(train(one), "train")
    assert first["moved"] == 0
    assert first["reference_gap"] == 0
    assert first["gradient_norm"] > 0
    assert second["reference_gap"] > 0


def test_the_weights_that_paint_follow_those_that_learn(config: diffusion_nft.Config, tmp_path: Path) -> None:
    """Following at once, they are the same in each step; following not at all, those of the beginning paint."""
    at_once = rows(train(replace(config, sampling_ema_rise=0.0, num_minibatches=1)), "train")
    assert [row["moved"] for row in at_once] == [0, 0, 0]
    held = replace(
        config, sampling_ema_rise=0.99, sampling_ema_max=0.99, run_folder=str(tmp_path / "held"), num_minibatches=1
    )
    moved = [row["moved"] for row in rows(train(held), "train")]
    assert moved[0] == 0
    assert min(moved[1:]) > 0


def test_the_microbatch_size_changes_no_result(config: diffusion_nft.Config, tmp_path: Path) -> None:
    one, other = train(config), train(replace(config, microbatch_size=3, run_folder=str(tmp_path / "other")))
    for name, weight in lora_weights(one).items():
        assert_close(lora_weights(other)[name], weight, rtol=0, atol=2e-5)


def test_a_resumed_run_equals_one_that_was_never_stopped(config: diffusion_nft.Config, tmp_path: Path) -> None:
    whole = train(config)
    part = replace(config, run_folder=str(tmp_path / "part"))
    train(replace(part, num_steps=2))
    again = train(replace(part, resume=True))
    for name, weight in lora_weights(whole).items():
        assert_close(lora_weights(again)[name], weight, rtol=0, atol=0)


def test_images_that_all_earn_the_same_teach_nothing(config: diffusion_nft.Config) -> None:
    same = replace(config, rewards=FLAT, num_steps=1, num_minibatches=1, kl_weight=0.0)
    [row] = rows(train(same), "train")
    assert row["degenerate_groups"] == 2
    assert row["gradient_norm"] < 1e-6


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_painting_without_memory_paints_the_same(tiny_sd: Path, eta: float) -> None:
    policy = load_policy(str(tiny_sd), device=torch.device("cpu"))
    schedule = policy.schedule(4)
    sampler = Sampler(schedule, stochastic(schedule, eta=eta))
    prompts = ["a red circle", "a red circle", "a blue square", "a blue square"]

    def seeds() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    images, trajectory = rollout(policy, prompts, sampler=sampler, generators=seeds(), microbatch_size=3)
    again, latents = generate(policy, prompts, sampler=sampler, generators=seeds(), microbatch_size=3)
    assert torch.equal(images, again)
    assert torch.equal(trajectory.latents[:, -1], latents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images_per_prompt": 1, "num_minibatches": 1}, "images_per_prompt is 1; it must be at least 2"),
        ({"timestep_fraction": 0.0}, r"timestep_fraction is 0.0; it must be in \(0, 1\]"),
        ({"beta": 0.0}, "beta is 0.0; it must be positive"),
        ({"kl_weight": -1.0}, "kl_weight is -1.0"),
        ({"num_minibatches": 3}, r"a divisor of images_per_prompt \(4\)"),
        ({"sampling_ema_max": 1.0}, r"sampling_ema_max is 1.0; it must be in \[0, 1\)"),
        ({"eta": 1.5}, "eta is 1.5"),
    ],
)
def test_impossible_settings_are_refused(config: diffusion_nft.Config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)
