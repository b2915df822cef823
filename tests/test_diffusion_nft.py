"""DiffusionNFT on tiny random models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes import diffusion_nft
from rlhf_t2i.diffusion.transitions import stochastic
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.sampling.rollout import generate, rollout
from rlhf_t2i.training.trainer import Trainer
from rlhf_t2i.types import Sampler
from tests.runs import FLAT, REDNESS, as_for_toy_models, assert_same, lora_weights, rows


@pytest.fixture
def config(tiny_zimage: Path, tmp_path: Path) -> diffusion_nft.Config:
    """Three steps that use every part of the recipe."""
    return diffusion_nft.Config(
        **as_for_toy_models(
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
            adam_epsilon=1e-3,  # or Adam amplifies gradients that are rounding errors
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
    """With the full denoiser of a flow model, with a LoRA, and with a diffusion model."""
    if "model" in changes:
        changes = {**changes, "model": str(request.getfixturevalue(changes["model"])), "resolution": None}
    learning = {
        "images_per_prompt": 8, "num_steps": 6, "learning_rate": 5e-3, "adam_epsilon": 1e-8, "kl_weight": 0.0,
        "max_advantage": 1.0, "num_evaluation_images": 16, "checkpoint_every": 100,
    }  # fmt: skip
    before, after = rows(train(replace(config, **{**learning, **changes})), "evaluation")
    assert after[REDNESS] > before[REDNESS] + 0.005


@pytest.mark.slow
def test_the_toy_flow_model_learns_from_the_reward_model(tmp_path: Path) -> None:
    """On held-out prompts, by the reward model and by the oracle, which is not trained on."""
    config = diffusion_nft.Config(
        prompts_per_step=8, images_per_prompt=8, num_steps=2, learning_rate=1e-3, evaluate_every=0,
        num_evaluation_images=68, evaluation_rewards="llava_reward,oracle", checkpoint_every=100,
        run_folder=str(tmp_path / "run"), num_cpu_threads=1,
    )  # fmt: skip
    before, after = rows(train(config), "evaluation")
    assert after["llava_reward"] > before["llava_reward"] + 0.2
    assert after["oracle"] > before["oracle"] + 0.1


def test_training_starts_at_the_sampling_weights_and_the_reference(config: diffusion_nft.Config) -> None:
    """Before the first optimiser step sampling weights, trained weights and reference are equal."""
    one = replace(config, num_minibatches=1)
    first, second, _ = rows(train(one), "train")
    assert first["sampling_gap"] == 0
    assert first["reference_gap"] == 0
    assert first["gradient_norm"] > 0
    assert second["reference_gap"] > 0


def test_the_sampling_ema_follows_the_trained_weights(config: diffusion_nft.Config, tmp_path: Path) -> None:
    """With decay 0 it equals them in each step; with decay 0.99 it stays near the initial weights."""
    equal = rows(train(replace(config, sampling_ema_rise=0.0, num_minibatches=1)), "train")
    assert [row["sampling_gap"] for row in equal] == [0, 0, 0]
    slow = replace(
        config, sampling_ema_rise=0.99, sampling_ema_max=0.99, run_folder=str(tmp_path / "slow"), num_minibatches=1
    )
    gaps = [row["sampling_gap"] for row in rows(train(slow), "train")]
    assert gaps[0] == 0
    assert min(gaps[1:]) > 0


def test_the_microbatch_size_changes_no_result(config: diffusion_nft.Config, tmp_path: Path) -> None:
    one, other = train(config), train(replace(config, microbatch_size=3, run_folder=str(tmp_path / "other")))
    assert_same(lora_weights(other), lora_weights(one), atol=2e-5)


def test_a_resumed_run_equals_an_uninterrupted_one(config: diffusion_nft.Config, tmp_path: Path) -> None:
    uninterrupted = train(config)
    stopped = replace(config, run_folder=str(tmp_path / "stopped"))
    train(replace(stopped, num_steps=2))
    resumed = train(replace(stopped, resume=True))
    assert_same(lora_weights(resumed), lora_weights(uninterrupted))


def test_a_step_with_equal_rewards_is_left_out(
    config: diffusion_nft.Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weight decay and the rounding errors of a KL, which Adam makes as large as any gradient, would move the model."""
    monkeypatch.setattr(Trainer, "optimizer_step", pytest.fail)
    [row] = rows(train(replace(config, rewards=FLAT, num_steps=1, kl_weight=0.1)), "train")
    assert row["degenerate_groups"] == 2
    assert "in step 1 the images of each prompt have equal rewards; the update was left out" in capsys.readouterr().out


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_generate_gives_the_images_of_a_rollout(tiny_sd: Path, eta: float) -> None:
    policy = load_policy(str(tiny_sd), device=torch.device("cpu"))
    schedule = policy.schedule(4)
    sampler = Sampler(schedule, stochastic(schedule, eta=eta))
    prompts = ["a red circle", "a red circle", "a blue square", "a blue square"]

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    images, trajectory = rollout(policy, prompts, sampler=sampler, generators=generators(), microbatch_size=3)
    again, latents = generate(policy, prompts, sampler=sampler, generators=generators(), microbatch_size=3)
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
