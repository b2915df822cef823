"""Flow-GRPO on a tiny random Stable Diffusion 3."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from recipes import flow_grpo
from rlhf_t2i.advantages import globally_scaled_advantages, num_degenerate_groups
from rlhf_t2i.diffusion.gaussian import mean_log_prob, normalised_log_ratio, per_image, sample
from rlhf_t2i.diffusion.transitions import flow_sde, windowed
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.sampling.rollout import noise_of_rollout, rollout
from rlhf_t2i.training.batching import window_of_step
from rlhf_t2i.training.trainer import Trainer
from rlhf_t2i.types import Sampler, Transition
from tests import reference
from tests.runs import FLAT, REDNESS, as_for_toy_models, assert_same, lora_weights, redness, rows

CPU = torch.device("cpu")


def flat_squares(images: Tensor, prompts: list[str]) -> Tensor:
    """Redness of circles; all squares have the same reward."""
    return torch.tensor(
        [r if "circle" in p else 0.5 for r, p in zip(redness(images, prompts).tolist(), prompts, strict=True)]
    )


@pytest.fixture
def config(tiny_sd3: Path, tmp_path: Path) -> flow_grpo.Config:
    """Two steps that use every part of the recipe."""
    return flow_grpo.Config(
        **as_for_toy_models(
            model=str(tiny_sd3),
            prompts_per_step=2,
            images_per_prompt=4,
            num_denoising_steps=4,
            num_evaluation_steps=6,
            window_end=1.0,
            clip_range=1e-4,
            kl_weight=0.004,
            lora_rank=2,
            num_minibatches=2,
            num_inner_epochs=2,
            microbatch_size=8,
            learning_rate=1e-3,
            adam_epsilon=1e-3,  # or Adam amplifies gradients that are rounding errors
            rewards=REDNESS,
            evaluation_rewards=REDNESS,
            num_steps=2,
            evaluate_every=0,
            num_evaluation_images=4,
            checkpoint_every=1,
            run_folder=str(tmp_path / "run"),
            num_cpu_threads=1,
        )
    )


def train(config: flow_grpo.Config) -> Path:
    return flow_grpo.main(config)


# --- training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ratio_normalisation": True, "clip_range": 1e-3},
        {"dynamics": "cps", "noise_scale": 0.8},
    ],
)
@pytest.mark.slow
def test_the_reward_rises(config: flow_grpo.Config, changes: dict[str, Any]) -> None:
    learning = {
        "lora_rank": None, "images_per_prompt": 8, "num_steps": 12, "learning_rate": 3e-3, "adam_epsilon": 1e-8,
        "clip_range": 1e-2, "kl_weight": 0.0, "window_end": 0.5, "num_evaluation_images": 16, "checkpoint_every": 100,
    }  # fmt: skip
    folder = train(replace(config, **{**learning, **changes}))
    before, after = rows(folder, "evaluation")
    assert after[REDNESS] > before[REDNESS] + 0.01


@pytest.mark.slow
def test_the_toy_flow_model_learns_from_the_reward_model(tmp_path: Path) -> None:
    """On held-out prompts, by the reward model and by the oracle, which is not trained on."""
    config = flow_grpo.Config(
        prompts_per_step=8, images_per_prompt=8, num_steps=3, learning_rate=6e-4, evaluate_every=0,
        num_evaluation_images=68, evaluation_rewards="llava_reward,oracle", checkpoint_every=100,
        run_folder=str(tmp_path / "run"), num_cpu_threads=1,
    )  # fmt: skip
    before, after = rows(train(config), "evaluation")
    assert after["llava_reward"] > before["llava_reward"] + 0.2
    assert after["oracle"] > before["oracle"] + 0.1


@pytest.mark.parametrize(
    ("dynamics", "ratio_normalisation", "mixed_precision"),
    [("flow_sde", False, "no"), ("flow_sde", True, "bf16"), ("cps", False, "bf16"), ("cps", True, "no")],
)  # each two of them together
def test_the_first_replay_has_ratio_one_and_later_ones_move(
    config: flow_grpo.Config, dynamics: Any, ratio_normalisation: bool, mixed_precision: Any
) -> None:
    changes = {"dynamics": dynamics, "ratio_normalisation": ratio_normalisation, "mixed_precision": mixed_precision}
    [first, *_] = rows(train(replace(config, **changes, num_steps=1)), "train")
    # Normalisation computes the old mean as latents - std * noise, which is exact up to float32 rounding.
    assert first["replay_error"] <= (1e-12 if ratio_normalisation else 0)
    assert first["ratio_std"] > 1e-7
    assert first["kl"] > 0


def test_cps_has_the_published_log_probability_unless_its_density_is_asked_for(
    config: flow_grpo.Config, tmp_path: Path
) -> None:
    """Of the same images; the ratios of late denoising steps, with little noise, differ most."""
    config = replace(config, dynamics="cps", num_steps=1)
    [published] = rows(train(config), "train")
    density = replace(config, cps_log_prob="gaussian", run_folder=str(tmp_path / "gaussian"))
    [gaussian] = rows(train(density), "train")
    assert published["reward"] == gaussian["reward"]
    assert 0 < published["ratio_std"] < 0.9 * gaussian["ratio_std"]


@pytest.mark.slow
def test_the_microbatch_size_changes_no_result(config: flow_grpo.Config, tmp_path: Path) -> None:
    one = train(replace(config, ratio_normalisation=True))
    other = train(replace(config, ratio_normalisation=True, microbatch_size=3, run_folder=str(tmp_path / "other")))
    assert_same(lora_weights(other), lora_weights(one), atol=2e-5)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(config: flow_grpo.Config, tmp_path: Path) -> None:
    uninterrupted = train(config)
    stopped = replace(config, run_folder=str(tmp_path / "stopped"))
    train(replace(stopped, num_steps=1))
    resumed = train(replace(stopped, resume=True))
    assert_same(lora_weights(resumed), lora_weights(uninterrupted))


def test_evaluation_has_its_own_number_of_denoising_steps(config: flow_grpo.Config, tmp_path: Path) -> None:
    few = train(replace(config, num_steps=1, num_evaluation_steps=None))
    many = train(replace(config, num_steps=1, run_folder=str(tmp_path / "many")))
    assert rows(few, "train")[0]["reward"] == rows(many, "train")[0]["reward"]
    assert rows(few, "evaluation")[0][REDNESS] != rows(many, "evaluation")[0][REDNESS]


def test_groups_with_equal_rewards_are_counted_and_a_step_of_them_is_left_out(
    config: flow_grpo.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na red square\n")
    half = replace(
        config, prompts=str(tmp_path / "prompts.txt"), rewards="tests.test_flow_grpo:flat_squares", num_steps=1
    )
    [row] = rows(train(half), "train")
    assert row["degenerate_groups"] == 1
    monkeypatch.setattr(Trainer, "optimizer_step", pytest.fail)
    none = {"rewards": FLAT, "kl_weight": 0.1, "run_folder": str(tmp_path / "flat")}
    [row] = rows(train(replace(half, **none)), "train")
    assert row["degenerate_groups"] == 2


# --- advantages -------------------------------------------------------------------------------------


def test_globally_scaled_advantages_agree_with_the_slow_reference() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [0.1, 0.1, 0.1], [-1.0, 0.0, -1.0]])
    expected = torch.tensor(reference.globally_scaled(rewards.tolist()))
    found = globally_scaled_advantages(rewards)
    assert_close(found, expected)
    assert found[1].eq(0).all()
    assert_close(found.sum(dim=1), torch.zeros(3), rtol=0, atol=1e-6)
    assert num_degenerate_groups(rewards) == 1


# --- windows ----------------------------------------------------------------------------------------


def test_a_drawn_window_lies_within_its_bounds_and_reaches_them() -> None:
    draw = partial(window_of_step, 0, within=(1, 6), size=2, moves_every=None)
    found = {draw(generator=torch.Generator().manual_seed(seed)) for seed in range(60)}
    assert found == {(1, 3), (2, 4), (3, 5), (4, 6)}
    assert window_of_step(3, within=(1, 6), size=None, moves_every=None, generator=torch.Generator()) == (1, 6)


def test_a_moving_window_goes_from_noise_to_image_and_wraps_around() -> None:
    found = [
        window_of_step(step, within=(0, 4), size=2, moves_every=2, generator=torch.Generator()) for step in range(8)
    ]
    assert found == [(0, 2), (0, 2), (1, 3), (1, 3), (2, 4), (2, 4), (0, 2), (0, 2)]


def test_the_last_step_is_never_noisy(config: flow_grpo.Config) -> None:
    assert flow_grpo.noisy_window(config, 0) == (0, 3)
    assert {flow_grpo.noisy_window(replace(config, window_size=1), step) for step in range(40)} == {
        (0, 1),
        (1, 2),
        (2, 3),
    }
    assert flow_grpo.noisy_window(replace(config, window_start=0.5, window_end=0.75), 7) == (2, 3)


@torch.no_grad()
@pytest.mark.parametrize("same", [False, True])
def test_a_rollout_has_log_probabilities_in_its_window_only_and_its_noise_can_be_drawn_again(
    tiny_sd3: Path, same: bool
) -> None:
    """So the means of the old policy can be computed without having been stored."""
    policy = load_policy(str(tiny_sd3), device=CPU)
    schedule = policy.schedule(4)
    first, end = float(schedule.sigma[1]), float(schedule.sigma[3])
    step = partial(flow_sde, noise_scale=0.7, sigma_cap=first)
    sampler = Sampler(schedule, partial(windowed, dynamics=step, first=first, end=end))
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    _, trajectory = rollout(
        policy, ["a", "a", "b", "b"], sampler=sampler, generators=generators, microbatch_size=3, same_initial_noise=same
    )
    equal = [[torch.equal(one, other) for one, other in pairwise(trajectory.latents[:, t])] for t in range(4)]
    assert equal == [[same, False, same]] * 2 + [[False] * 3] * 2
    assert trajectory.log_probs.ne(0).tolist() == [[False, True, True, False]] * 4
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    noise = noise_of_rollout(policy, trajectory, generators=generators, same_initial_noise=same)
    for t in (1, 2):
        level, after = (schedule.at(torch.full((4,), t + i)) for i in (0, 1))
        latents = trajectory.latents[:, t]
        prediction = policy.predict(latents, level, trajectory.conditioning[:], guidance_scale=1.0)
        transition = step(latents, prediction, level, after)
        old_mean = trajectory.latents[:, t + 1] - per_image(transition.std) * noise[:, t]
        assert_close(old_mean, transition.mean, rtol=0, atol=1e-5)


# --- ratios -----------------------------------------------------------------------------------------


def test_a_normalised_log_ratio_is_the_change_of_the_mean_along_the_noise() -> None:
    """mean((mean - old_mean) * noise), by hand: it does not depend on the std."""
    old_mean, noise = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    change = 0.01 * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    std = torch.tensor([0.1, 0.9, 0.0])
    drawn = old_mean + per_image(std) * noise
    old, new = Transition(old_mean, std), Transition(old_mean + change, std)
    log_ratio = mean_log_prob(new, drawn) - mean_log_prob(old, drawn)
    expected = (change * noise).mean(dim=(1, 2, 3)) * torch.tensor([1.0, 1.0, 0.0])
    assert_close(normalised_log_ratio(log_ratio, new, old_mean), expected, rtol=1e-3, atol=1e-6)


def test_log_ratios_are_biased_and_normalised_ones_are_not() -> None:
    """Over many steps sampled from the old policy."""
    std, change, count = torch.full((4000,), 0.2), 0.1, 4000
    old = Transition(torch.zeros(count, 1, 2, 2), std)
    new = Transition(torch.full((count, 1, 2, 2), change), std)
    drawn = sample(old, generators=[torch.Generator().manual_seed(0)])
    log_ratio = mean_log_prob(new, drawn) - mean_log_prob(old, drawn)
    assert log_ratio.mean().item() == pytest.approx(-(change**2) / (2 * 0.2**2), rel=0.1)
    assert normalised_log_ratio(log_ratio, new, old.mean).mean().item() == pytest.approx(0, abs=2e-3)


# --- invalid settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images_per_prompt": 1, "num_minibatches": 1}, "images_per_prompt is 1; it must be at least 2"),
        ({"num_denoising_steps": 1}, "num_denoising_steps is 1; it must be at least 2"),
        ({"noise_scale": 0.0}, "noise_scale is 0.0; it must be positive"),
        ({"noise_scale": 1.2, "dynamics": "cps"}, "at most 1 with cps"),
        ({"window_size": 4}, "between 1 and the 3 steps that may be noisy"),
        ({"window_start": 0.9}, "later: no denoising step"),
        ({"window_moves_every": 0}, "window_moves_every is 0"),
        ({"num_minibatches": 3}, r"a divisor of images_per_prompt \(4\)"),
        ({"resolution": 0}, "resolution is 0; it must be at least 1"),
        ({"width": 0}, "width is 0; it must be at least 1"),
        ({"height": 64}, "height is 64 and width is null; give both, or resolution alone"),
        ({"width": 64}, "width is 64 and height is null; give both, or resolution alone"),
        (
            {"resolution": 32, "height": 32, "width": 64},
            "resolution is 32, height 32 and width 64; give resolution for square images, or height and width",
        ),
    ],
)
def test_impossible_settings_are_refused(config: flow_grpo.Config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_a_diffusion_model_is_refused_and_ddpo_is_named(config: flow_grpo.Config, tiny_sd: Path) -> None:
    with pytest.raises(ValueError, match=r"is not one; .* recipes/ddpo\.py --advantages group_relative"):
        train(replace(config, model=str(tiny_sd)))
